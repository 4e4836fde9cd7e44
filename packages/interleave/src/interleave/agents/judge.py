"""A chat model as judge, of any question, or with two on one image as a source of scores from 0 to 10.

`semantics` is the lower of two scores for doing what was asked and for leaving the rest alone, `quality` the lower of
two for naturalness and freedom from faults, each the mean over `num_samples` answers.  Source: InterleaveThinker,
arXiv 2606.13679 (after VIEScore); the words of the questions are ours, and scores depend on the words.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Annotated, Literal, cast

import numpy as np
from annotated_types import Ge, Le
from PIL import Image

from imgen_common.config import Config
from imgen_common.http import HttpError
from imgen_common.judging.escaping import JOINER
from imgen_common.judging.questions import JudgeError, JudgeReply, Question, Unreadable
from imgen_common.judging.questions import Message as JudgeMessage
from imgen_common.judging.runner import ask_question
from imgen_common.tables import CONTROL_TOKEN
from interleave.agents.parsing import ParseFailure, describe_ending, parse_json
from interleave.agents.prompts import Template, load_template, render_judge
from interleave.models.chat import ChatConfig
from interleave.models.chat.endpoint import EndpointChatConfig
from interleave.models.concurrency import map_concurrently
from interleave.protocols import BackendError, ChatModel, CriticInput, HashedImage, SystemText
from interleave.records import FailureKind, Scores

KINDS = {"unreadable": "malformed_response", "bad_request": "refused"}
"""What records call failures of a judge's questions."""
OUTAGES = ("unreachable", "rate_limited")
"""Failures after which no other question would be answered either: their requests were repeated for minutes."""


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


class ChatModelJudge:
    """A chat model of the loop, asked any question."""

    def __init__(self, model: ChatModel) -> None:
        self.model, self.id = model, model.id

    async def ask(self, system: str, message: JudgeMessage, seed: int) -> JudgeReply:
        """The answer.  Raises JudgeError."""
        turn = tuple(_spell(part) if isinstance(part, str) else HashedImage.from_pil(part) for part in message)
        try:
            reply = await self.model.chat((SystemText(system), *turn) if system else turn, seed)
        except BackendError as failure:
            raise judge_error(failure) from None
        ending = describe_ending(reply) + " (its max_new_tokens)" * reply.truncated
        return JudgeReply(reply.text, reply.num_prompt_tokens, reply.num_completion_tokens, ending, reply.truncated)

    async def close(self) -> None:
        """Release the model."""
        await self.model.close()


def _spell(text: str) -> str:
    """The text, with a control token that the model under test wrote, such as `<|im_end|>`, spelled out; nothing else
    changes, so that the authors' questions reach the judge as they are."""
    return CONTROL_TOKEN.sub(lambda token: token[0][0] + JOINER + token[0][1:], text)


def judge_error(failure: BackendError) -> JudgeError:
    """What the failure of a model or judge says of a question."""
    if isinstance(failure.__cause__, HttpError):
        return JudgeError.of_http(failure.__cause__)
    return JudgeError(failure.kind, str(failure), is_outage=failure.kind in OUTAGES)


class ChatJudge(ChatModelJudge):
    """Scores an image by two questions to a chat model, each asked `num_samples` times."""

    def __init__(
        self, model: ChatModel, semantics: Template, quality: Template, num_samples: int = 1, tries: int = 3
    ) -> None:
        super().__init__(model)
        self._semantics, self._quality = semantics, quality
        self._num_samples, self._tries = num_samples, tries
        self.num_questions = 2 * num_samples
        self.prompts = f"{semantics.hash[:8]} {quality.hash[:8]}"
        # What scores depend on: the model, the words of the questions, the number of samples
        self.id = f"{model.id} {self.prompts} x{num_samples}"

    def questions(self, shown: CriticInput) -> list[Question]:
        """What the model is asked about the image after, which it sees at the size of the one before."""
        after, size = shown.after, shown.before.image.size
        if after.image.size != size:
            after = HashedImage.from_pil(after.image.resize(size, Image.Resampling.LANCZOS))
        task = render_judge(self._semantics, shown.original_prompt, (shown.before, after))
        alone = render_judge(self._quality, shown.original_prompt, (after,))
        return [
            Question(
                f"{name} {sample + 1}",
                tuple(part if isinstance(part, str) else part.image for part in message),
                parse_scores,
                sample=sample,
                tries=self._tries,
            )
            for name, message in (("semantics", task), ("quality", alone))
            for sample in range(self._num_samples)
        ]

    def scores(self, values: Mapping[str, Sequence[float]]) -> Scores:
        """The scores of the answers by the names of questions: of each the lower number, the mean over samples."""
        semantics, quality = (
            float(np.mean([min(value) for name, value in values.items() if name.startswith(kind)]))
            for kind in ("semantics", "quality")
        )
        return Scores(semantics=semantics, quality=quality, judge_id=self.id, num_samples=self._num_samples)

    async def score(self, shown: CriticInput) -> Scores:
        """Scores of the image after, of which everything is asked at once.

        Raises BackendError, `malformed_response` where no answer could be read.
        """

        async def value(question: Question) -> Sequence[float]:
            try:
                answer = await ask_question(self, question)
            except JudgeError as failure:
                raise BackendError(cast(FailureKind, failure.kind), str(failure)) from None
            if answer.error_kind is not None:
                kind = KINDS.get(answer.error_kind, answer.error_kind)
                raise BackendError(cast(FailureKind, kind), f"{question.name}: {answer.error}")
            return answer.value

        asked = await asyncio.to_thread(self.questions, shown)
        values = await map_concurrently(value, asked, len(asked))
        return self.scores(dict(zip((question.name for question in asked), values, strict=True)))


def parse_scores(answer: str) -> tuple[float, float]:
    """The two scores in [0, 10] of `{"score": [a, b], "reasoning": ...}`.  Raises Unreadable for anything else.

    Reasoning before the object, and a code fence around it, are allowed (`parsing.parse_json`).
    """
    value = parse_json(answer)
    if isinstance(value, ParseFailure):
        raise Unreadable(value.reason)
    if isinstance(value, list) and len(value) == 1:  # as Gemini's models answer
        (value,) = value
    scores = value.get("score") if isinstance(value, dict) else None
    if not isinstance(scores, list) or len(scores) != 2:
        raise Unreadable("score must be a list of two numbers")
    for score in scores:
        if isinstance(score, bool) or not isinstance(score, int | float) or not isfinite(score) or not 0 <= score <= 10:
            shown = type(score).__name__ if isinstance(score, list | dict) else json.dumps(score)[:40]
            raise Unreadable(f"a score must be a number from 0 to 10, not {shown}")
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
