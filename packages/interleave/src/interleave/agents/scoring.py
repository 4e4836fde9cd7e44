"""Judges by configuration, and a cache so that no image is judged twice."""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from imgen_common.config import Config
from imgen_common.errors import UserError
from imgen_common.files import write_atomic, writing
from interleave.agents.judge import ChatJudge, ModelJudgeConfig
from interleave.models.chat.endpoint import EndpointChat
from interleave.models.concurrency import SingleFlight, map_concurrently
from interleave.protocols import BackendError, CriticInput, HashedImage, Judge
from interleave.records import Scores

PROBE = "a red circle"
"""What a part is asked to see whether it answers."""


class VerifierJudgeConfig(Config):
    """The miniature's verifier as judge; it reads images at 32x32, others resized and padded to that."""

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
    """Keeps scores on disk by judge, both images and what was asked; equal questions at once are asked once."""

    def __init__(self, inner: Judge, folder: Path) -> None:
        self._inner, self._folder, self.id = inner, folder, inner.id
        self._in_flight = SingleFlight[Scores]()
        self.hits, self.misses = 0, 0

    async def score(self, shown: CriticInput) -> Scores:
        """The kept scores, or the judge's.  Raises BackendError, keeping nothing, and UserError on a full disk."""
        named = json.dumps([self.id, shown.before.id, shown.after.id, shown.original_prompt])
        key = hashlib.sha256(named.encode()).hexdigest()
        if (kept := self._read(key)) is not None:
            self.hits += 1
            return kept
        self.hits += key in self._in_flight
        self.misses += key not in self._in_flight
        return await self._in_flight(key, lambda: self._ask(key, shown))

    async def close(self) -> None:
        """Release the judge."""
        await self._inner.close()

    async def _ask(self, key: str, shown: CriticInput) -> Scores:
        scores = await self._inner.score(shown)
        path = self._path(key)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, scores.model_dump_json())
        return scores

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"

    def _read(self, key: str) -> Scores | None:
        """None where there are none, or the file is damaged: then they are asked for again."""
        try:
            return Scores.model_validate_json(self._path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


async def check_judge(judge: Judge) -> None:
    """Raises UserError if the judge does not answer; what it says of a white image does not matter."""
    white = HashedImage.white(32, 32)
    if isinstance(judge, ChatJudge) and isinstance(judge.model, EndpointChat):
        await judge.model.check((white, "Say yes."))  # at once, where `score` waits for a service that is down
    try:
        await judge.score(CriticInput(white, white, PROBE, PROBE))
    except BackendError as failure:
        if failure.kind != "malformed_response":
            raise UserError(
                f"the judge {judge.id} does not answer ({failure.description}); start it, change judge, or build "
                "without one (judge=null)"
            ) from None


async def score_all(
    judge: Judge,
    inputs: Sequence[Callable[[], CriticInput]],
    concurrency: int,
    max_failed_share: float,
    on_progress: Callable[[int, int], None],
    how_to_resume: str,
) -> tuple[list[Scores | None], Counter[str]]:
    """The judge's scores of all inputs, several at once, None where it failed, and how often it failed how.

    on_progress: called with how many are done, of how many.  how_to_resume: what to do once the judge works again.
    Raises UserError once it failed on more than `max_failed_share` of the inputs.
    """
    failed, done = Counter[str](), 0

    async def one(make_input: Callable[[], CriticInput]) -> Scores | None:
        nonlocal done
        scores = None
        try:
            scores = await judge.score(await asyncio.to_thread(make_input))
        except BackendError as failure:
            failed[failure.kind] += 1
            if failed.total() > max_failed_share * len(inputs):
                reasons = ", ".join(f"{count} {kind}" for kind, count in failed.most_common())
                raise UserError(
                    f"the judge failed on {failed.total()} images ({reasons}; the last: {failure}), more than "
                    f"max_unscored allows; everything is kept: {how_to_resume}"
                ) from None
        done += 1
        on_progress(done, len(inputs))
        return scores

    return await map_concurrently(one, inputs, concurrency), failed
