"""A chat model as judge: two questions on one picture, marks from 0 to 10.

sc is the lower of two marks for doing what was asked and for leaving the rest alone, pq the lower of two for
naturalness and freedom from faults, each the mean over `num_samples` answers.  Source: InterleaveThinker,
arXiv 2606.13679 (after VIEScore); the words of the questions are ours, and marks depend on the words.
"""

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Le
from PIL import Image

from imgen_common.config import Config
from imgen_common.streams import stream_key
from interleave.chat import ChatConfig, EndpointChatConfig
from interleave.parsing import Unreadable
from interleave.parts import ChatModel, Look, Message, PartFailed, Picture
from interleave.prompts import Template, render_judge, template
from interleave.records import Scores

FENCE = re.compile(r"\s*```\w*\s(.*)```\s*", re.DOTALL)


class ModelJudgeConfig(Config):
    """A chat model judges; give a model other than the critic's, or the critic is judged by itself."""

    kind: Literal["model"] = "model"
    model: ChatConfig = EndpointChatConfig()
    """The model."""
    semantics_template: str = "judge_semantics"
    """Question on what was asked: a built-in name or a text file."""
    quality_template: str = "judge_quality"
    """Question on the picture alone."""
    num_samples: Annotated[int, Ge(1), Le(32)] = 1
    """Answers averaged per question, with different seeds."""
    tries: Annotated[int, Ge(1), Le(10)] = 3
    """How often a question is asked until the answer can be read, per sample."""


class ChatJudge:
    """Asks a chat model both questions, all samples at once."""

    def __init__(
        self, model: ChatModel, semantics: Template, quality: Template, num_samples: int = 1, tries: int = 3
    ) -> None:
        self._model, self._semantics, self._quality = model, semantics, quality
        self._num_samples, self._tries = num_samples, tries

    @classmethod
    def of(cls, config: ModelJudgeConfig, model: ChatModel) -> "ChatJudge":
        """The judge that `config` describes, over its model."""
        return cls(
            model,
            template(config.semantics_template),
            template(config.quality_template),
            config.num_samples,
            config.tries,
        )

    @property
    def id(self) -> str:
        """Model, words of the questions and samples: what marks depend on."""
        return f"{self._model.id} {self._semantics.hash[:8]} {self._quality.hash[:8]} x{self._num_samples}"

    async def score(self, look: Look) -> Scores:
        """Marks of the picture after.  Raises PartFailed, `garbage` if an answer cannot be read in all tries."""
        after = _of_size(look.after, look.before)
        task = render_judge(self._semantics, look.original_prompt, (look.before, after))
        alone = render_judge(self._quality, look.original_prompt, (after,))
        asked = [self._ask(question, sample) for question in (task, alone) for sample in range(self._num_samples)]
        marks = await asyncio.gather(*asked)
        sc, pq = marks[: self._num_samples], marks[self._num_samples :]
        return Scores(sc=float(np.mean(sc)), pq=float(np.mean(pq)), judge_id=self.id, num_samples=self._num_samples)

    async def close(self) -> None:
        """Let go of the model."""
        await self._model.close()

    async def _ask(self, question: Message, sample: int) -> float:
        """The lower mark of one answer."""
        reason = ""
        for attempt in range(self._tries):
            reply = await self._model.chat(question, stream_key(0, "judge", sample, attempt) % 2**31)
            marks = parse_marks(reply.text)
            if not isinstance(marks, Unreadable):
                return min(marks)
            reason = marks.reason
        raise PartFailed("garbage", f"{self._tries} answers of the judge could not be read ({reason})")


def _of_size(picture: Picture, like: Picture) -> Picture:
    if picture.image.size == like.image.size:
        return picture
    return Picture.of(picture.image.resize(like.image.size, Image.Resampling.LANCZOS))


def parse_marks(answer: str) -> tuple[float, float] | Unreadable:
    """Two marks in [0, 10] of `{"score": [a, b], "reasoning": ...}`; anything else is unreadable, never a guess."""
    fenced = FENCE.fullmatch(answer)
    try:
        value = json.loads(fenced[1] if fenced else answer)
    except (ValueError, RecursionError) as error:
        return Unreadable(f"not JSON ({error})")
    marks = value.get("score") if isinstance(value, dict) else None
    if not isinstance(marks, list) or len(marks) != 2:
        return Unreadable("score must be a list of two marks")
    for mark in marks:
        if isinstance(mark, bool) or not isinstance(mark, int | float) or not isfinite(mark) or not 0 <= mark <= 10:
            return Unreadable(f"a mark must be a number from 0 to 10, not {json.dumps(mark)[:40]}")
    return float(marks[0]), float(marks[1])


@dataclass(frozen=True)
class Agreement:
    """How far two judges of the same pictures agree: mean absolute differences in marks, Pearson correlations (nan
    where one judge gives all the same), and the share of pairs of pictures that both order alike, ties left out."""

    num: int
    sc_difference: float
    pq_difference: float
    sc_correlation: float
    pq_correlation: float
    same_order: float


def agreement(first: Sequence[Scores], second: Sequence[Scores]) -> Agreement:
    """Two judges' scores of the same pictures, in the same order.  Raises ValueError for fewer than two."""
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"two judges of the same pictures, at least two: got {len(first)} and {len(second)}")
    a = np.array([[s.sc, s.pq] for s in first])
    b = np.array([[s.sc, s.pq] for s in second])
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = [float(np.corrcoef(a[:, i], b[:, i])[0, 1]) for i in range(2)]
    left, right = np.sqrt(a.prod(1)), np.sqrt(b.prod(1))
    i, j = np.triu_indices(len(first), 1)
    order = np.sign(left[i] - left[j]) * np.sign(right[i] - right[j])
    decided = order[order != 0]
    return Agreement(
        num=len(first),
        sc_difference=float(np.abs(a[:, 0] - b[:, 0]).mean()),
        pq_difference=float(np.abs(a[:, 1] - b[:, 1]).mean()),
        sc_correlation=correlation[0],
        pq_correlation=correlation[1],
        same_order=float((decided > 0).mean()) if len(decided) else float("nan"),
    )
