"""A chat model as judge: two questions on one image, scores from 0 to 10.

`semantics` is the lower of two scores for doing what was asked and for leaving the rest alone, `quality` the lower of
two for naturalness and freedom from faults, each the mean over `num_samples` answers.  Source: InterleaveThinker,
arXiv 2606.13679 (after VIEScore); the words of the questions are ours, and scores depend on the words.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Le
from PIL import Image

from imgen_common.config import Config
from imgen_common.streams import stream_seed
from interleave.agents.parsing import ParseFailure, describe_failure, parse_json
from interleave.agents.prompts import Template, load_template, render_judge
from interleave.models.chat import ChatConfig
from interleave.models.chat.endpoint import EndpointChatConfig
from interleave.models.concurrency import map_concurrently
from interleave.protocols import BackendError, ChatModel, CriticInput, HashedImage, Message
from interleave.records import Scores


class ModelJudgeConfig(Config):
    """A chat model judges; give a model other than the critic's, or the critic is judged by itself."""

    kind: Literal["model"] = "model"
    model: ChatConfig = EndpointChatConfig()
    """The model."""
    semantics_template: str = "judge_semantics"
    """Question on what was asked: a built-in name or a text file."""
    quality_template: str = "judge_quality"
    """Question on the image alone."""
    num_samples: Annotated[int, Ge(1), Le(32)] = 1
    """Answers averaged per question, with different seeds."""
    tries: Annotated[int, Ge(1), Le(10)] = 3
    """How often a question is asked until the answer can be read, per sample."""

    def build(self) -> "ChatJudge":
        """The judge, its model loaded.  Raises UserError where it cannot be had."""
        questions = load_template(self.semantics_template), load_template(self.quality_template)
        return ChatJudge(self.model.build(), *questions, self.num_samples, self.tries)


class ChatJudge:
    """Asks a chat model both questions, all samples at once."""

    def __init__(
        self, model: ChatModel, semantics: Template, quality: Template, num_samples: int = 1, tries: int = 3
    ) -> None:
        self.model, self._semantics, self._quality = model, semantics, quality
        self._num_samples, self._tries = num_samples, tries
        # What scores depend on: the model, the words of the questions, the number of samples
        self.id = f"{model.id} {semantics.hash[:8]} {quality.hash[:8]} x{num_samples}"

    async def score(self, shown: CriticInput) -> Scores:
        """Scores of the image after.  Raises BackendError, `malformed_response` where no answer could be read."""
        after, size = shown.after, shown.before.image.size
        if after.image.size != size:
            after = HashedImage.from_pil(after.image.resize(size, Image.Resampling.LANCZOS))
        task = render_judge(self._semantics, shown.original_prompt, (shown.before, after))
        alone = render_judge(self._quality, shown.original_prompt, (after,))
        asked = [(question, sample) for question in (task, alone) for sample in range(self._num_samples)]
        scores = await map_concurrently(self._ask, asked, len(asked))
        semantics, quality = scores[: self._num_samples], scores[self._num_samples :]
        return Scores(
            semantics=float(np.mean(semantics)),
            quality=float(np.mean(quality)),
            judge_id=self.id,
            num_samples=self._num_samples,
        )

    async def close(self) -> None:
        """Release the model."""
        await self.model.close()

    async def _ask(self, asked: tuple[Message, int]) -> float:
        """The lower score of one answer, to a question and the number of the sample."""
        (question, sample), reason = asked, ""
        for attempt in range(self._tries):
            reply = await self.model.chat(question, stream_seed(0, "judge", sample, attempt))
            scores = parse_scores(reply.text)
            if not isinstance(scores, ParseFailure):
                return min(scores)
            reason = describe_failure(reply, scores)
        raise BackendError("malformed_response", f"{self._tries} answers of the judge could not be read ({reason})")


def parse_scores(answer: str) -> tuple[float, float] | ParseFailure:
    """The two scores in [0, 10] of `{"score": [a, b], "reasoning": ...}`; anything else is a failure, never a guess.

    Reasoning before the object, and a code fence around it, are allowed (`parsing.parse_json`).
    """
    value = parse_json(answer)
    if isinstance(value, ParseFailure):
        return value
    scores = value.get("score") if isinstance(value, dict) else None
    if not isinstance(scores, list) or len(scores) != 2:
        return ParseFailure("score must be a list of two numbers")
    for score in scores:
        if isinstance(score, bool) or not isinstance(score, int | float) or not isfinite(score) or not 0 <= score <= 10:
            shown = type(score).__name__ if isinstance(score, list | dict) else json.dumps(score)[:40]
            return ParseFailure(f"a score must be a number from 0 to 10, not {shown}")
    return float(scores[0]), float(scores[1])


@dataclass(frozen=True)
class JudgeAgreement:
    """How far two judges of the same images agree: mean absolute differences of scores, Pearson correlations (nan
    where one judge gives all the same), and the share of pairs of images that both order alike, ties left out."""

    num: int
    semantics_difference: float
    quality_difference: float
    semantics_correlation: float
    quality_correlation: float
    same_order: float


def judge_agreement(first: Sequence[Scores], second: Sequence[Scores]) -> JudgeAgreement:
    """Two judges' scores of the same images, in the same order.  Raises ValueError for fewer than two."""
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"two judges of the same images, at least two: got {len(first)} and {len(second)}")
    a = np.array([[s.semantics, s.quality] for s in first])
    b = np.array([[s.semantics, s.quality] for s in second])
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = [float(np.corrcoef(a[:, i], b[:, i])[0, 1]) for i in range(2)]
    left, right = np.sqrt(a.prod(1)), np.sqrt(b.prod(1))
    i, j = np.triu_indices(len(first), 1)
    order = np.sign(left[i] - left[j]) * np.sign(right[i] - right[j])
    decided = order[order != 0]
    return JudgeAgreement(
        num=len(first),
        semantics_difference=float(np.abs(a[:, 0] - b[:, 0]).mean()),
        quality_difference=float(np.abs(a[:, 1] - b[:, 1]).mean()),
        semantics_correlation=correlation[0],
        quality_correlation=correlation[1],
        same_order=float((decided > 0).mean()) if len(decided) else float("nan"),
    )
