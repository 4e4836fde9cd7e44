"""Judges by configuration; scores of many images by the common judging runner; and a cache for scores one by one."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from imgen_common.config import Config
from imgen_common.errors import UserError, warn_once
from imgen_common.files import write_atomic, writing
from imgen_common.judging.answers import Answer, AnswerLog, by_item, count_failures, read_answers
from imgen_common.judging.questions import JudgeReply, Question
from imgen_common.judging.questions import Message as JudgeMessage
from imgen_common.judging.runner import Judging, all_at_once
from imgen_common.shapes.vocabulary import VERIFIER
from interleave.agents.judge import ChatJudge, ModelJudgeConfig, judge_error
from interleave.models.chat.endpoint import EndpointChat
from interleave.models.concurrency import SingleFlight
from interleave.protocols import BackendError, CriticInput, HashedImage, Judge
from interleave.records import Scores
from interleave.storage.images import IMAGES, ImageStore

PROBE = "a red circle"
"""What a part is asked to see whether it answers."""


SCORES = "scores"
Look = tuple[str, str, str]
"""The ids of the images before and after, and what was asked: all that scores of a judge depend on."""


class VerifierJudgeConfig(Config):
    """The miniature's verifier as judge; it reads images at 32x32, others resized and padded to that."""

    ref: ClassVar = VERIFIER
    kind: Literal["shapes_verifier"] = "shapes_verifier"

    def build(self) -> Judge:
        """The judge."""
        from interleave.agents.miniature import VerifierJudge

        return VerifierJudge()


JudgeConfig = Annotated[
    ModelJudgeConfig | VerifierJudgeConfig,  # a new judge is one more member
    Field(discriminator="kind"),
]


class CachedJudge:
    """Keeps scores on disk by judge, both images and what was asked; equal questions at once are asked once.

    It is for scores that are asked for one by one, as in training, where many processes share the folder.
    """

    def __init__(self, inner: Judge, folder: Path) -> None:
        self._inner, self._folder, self.id = inner, folder, inner.id
        self._in_flight = SingleFlight[Scores]()
        self.hits, self.misses = 0, 0

    async def score(self, shown: CriticInput) -> Scores:
        """The kept scores, or the judge's, with one warning where they cannot be kept.  Raises BackendError."""
        look = shown.before.id, shown.after.id, shown.original_prompt
        if (kept := self.find(look)) is not None:
            self.hits += 1
            return kept
        key = self._key(look)
        self.hits += key in self._in_flight
        self.misses += key not in self._in_flight
        return await self._in_flight(key, lambda: self._ask(key, shown))

    def find(self, look: Look) -> Scores | None:
        """The kept scores; None where there are none, or the file is damaged: then they are asked for again."""
        try:
            return Scores.model_validate_json(self._path(self._key(look)).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    async def close(self) -> None:
        """Release the judge."""
        await self._inner.close()

    async def _ask(self, key: str, shown: CriticInput) -> Scores:
        scores = await self._inner.score(shown)
        path = self._path(key)
        try:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, scores.model_dump_json())
        except UserError as error:  # the scores are there, and perhaps paid for
            warn_once(f"the cache of scores keeps nothing: {error}, or set cache: null")
        return scores

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"

    def _key(self, look: Look) -> str:
        return hashlib.sha256(json.dumps([self.id, *look]).encode()).hexdigest()


async def check_judge(judge: Judge) -> None:
    """Raises UserError if the judge does not answer; what it says of a white image does not matter."""
    white = HashedImage.white(32, 32)
    if isinstance(judge, ChatJudge) and isinstance(judge.model, EndpointChat):
        await judge.model.check((white, white, "Say yes."))  # at once, where `score` waits for a service that is down
    try:
        await judge.score(CriticInput(white, white, PROBE, PROBE))
    except BackendError as failure:
        if failure.kind != "malformed_response":
            raise UserError(
                f"the judge {judge.id} does not answer ({failure.description}); start it, change judge, or build "
                "without one (judge=null)"
            ) from None


class DirectJudge:
    """A judge that asks no chat model, as one that is asked a single question and answers with its scores."""

    prompts, num_questions = "", 1

    def __init__(self, judge: Judge) -> None:
        self._judge, self.id = judge, judge.id

    def questions(self, shown: CriticInput) -> list[Question]:
        """The one question."""
        return [Question("scores", (shown.original_prompt, shown.before.image, shown.after.image), json.loads, tries=1)]

    def scores(self, values: Mapping[str, Mapping[str, Any]]) -> Scores:
        """The scores of the answer."""
        return Scores.model_validate(values["scores"])

    async def ask(self, system: str, message: JudgeMessage, seed: int) -> JudgeReply:
        """The judge's scores as JSON.  Raises JudgeError."""
        prompt = "".join(part for part in message if isinstance(part, str))
        before, after = (HashedImage.from_pil(part) for part in message if not isinstance(part, str))
        try:
            scores = await self._judge.score(CriticInput(before, after, prompt, prompt))
        except BackendError as failure:
            raise judge_error(failure) from None
        return JudgeReply(scores.model_dump_json())

    async def close(self) -> None:
        """Release the judge."""
        await self._judge.close()


@dataclass(frozen=True)
class ImageScoring:
    """Scores many images of a folder.  The answers are kept under `scores`, those of each judge in a folder of its own.

    concurrency: images that are scored at once.  max_failed_share: of the images on which the judge may fail.
    how_to_resume: what to do once it works again.  on_questions: called, before a chat model is asked, with all that it
    will be asked, about white images of the same sizes; it may raise.
    """

    judge: Judge
    folder: Path
    concurrency: int
    max_failed_share: float
    how_to_resume: str
    on_questions: Callable[[Iterable[Question]], None] = lambda questions: None
    on_progress: Callable[[int, int], None] = lambda done, total: None

    async def score_all(self, looks: Sequence[Look]) -> tuple[list[Scores | None], Counter[str]]:
        """The judge's scores, None where it failed, and on how many images it failed how; equal ones are scored once.

        Raises UserError once the judge is not there, or failed too often; what it answered is kept.
        """
        asked = self.judge if isinstance(self.judge, ChatJudge) else DirectJudge(self.judge)
        images, kept_in = ImageStore(self.folder / IMAGES), self.folder / SCORES
        own = kept_in / hashlib.sha256(self.judge.id.encode()).hexdigest()[:12]
        kept = by_item(answer for answer in read_answers(own) if answer.is_final)
        earlier = CachedJudge(self.judge, kept_in)  # scores without words, as builds kept them once

        def questions(look: Look, image_of: Callable[[str], HashedImage]) -> list[Question]:
            return asked.questions(CriticInput(image_of(look[0]), image_of(look[1]), look[2], look[2]))

        def scores(answers: Mapping[str, Answer]) -> Scores | None:
            values = {name: answer.value for name, answer in answers.items() if answer.error_kind is None}
            return asked.scores(values) if len(values) == asked.num_questions else None

        found = {look: earlier.find(look) or scores(kept.get(" ".join(look), {})) for look in looks}
        left = {" ".join(look): look for look, one in found.items() if one is None}
        if left and isinstance(asked, ChatJudge):
            every = ((name, q) for name, look in left.items() for q in questions(look, images.blank))
            self.on_questions(q for name, q in every if q.name not in kept.get(name, {}))
        limit = self.max_failed_share * len(found)
        judging = Judging(asked, AnswerLog(own), asked.prompts, self.concurrency, limit, self.how_to_resume)
        items = {name: all_at_once(partial(questions, look, images.get)) for name, look in left.items()}
        answers = await judging.judge_all(items, self.on_progress)
        found |= {left[name]: scores(one) for name, one in answers.items()}
        return [found[look] for look in looks], count_failures(answers)
