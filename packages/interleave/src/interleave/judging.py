"""Judges by configuration, and a cache so that no picture is judged twice."""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from PIL import Image
from pydantic import Field

from imgen_common.config import Config
from imgen_common.errors import UserError
from imgen_common.runs import write_atomic
from interleave import chat, resilience
from interleave.judge import ChatJudge, ModelJudgeConfig
from interleave.parts import Judge, Look, PartFailed, Picture
from interleave.records import Scores
from interleave.store import writing

PROBE = "a red circle"
"""What a part is asked to see whether it answers."""


class VerifierJudgeConfig(Config):
    """The miniature's verifier as judge."""

    kind: Literal["shapes_verifier"] = "shapes_verifier"


JudgeConfig = Annotated[ModelJudgeConfig | VerifierJudgeConfig, Field(discriminator="kind")]


def make(config: ModelJudgeConfig | VerifierJudgeConfig) -> Judge:
    """The judge that `config` names, its model loaded.  Raises UserError where it cannot be had."""
    if isinstance(config, ModelJudgeConfig):
        return ChatJudge.of(config, chat.make(config.model))
    from interleave.miniature.oracle import VerifierJudge

    return VerifierJudge()


class CachedJudge:
    """Keeps scores on disk by judge, both pictures and what was asked; equal questions at once are asked once."""

    def __init__(self, inner: Judge, folder: Path) -> None:
        self._inner, self._folder = inner, folder
        self._asked: dict[str, asyncio.Task[Scores]] = {}
        self.hits, self.misses = 0, 0

    @property
    def id(self) -> str:
        """The judge's."""
        return self._inner.id

    async def score(self, look: Look) -> Scores:
        """The kept scores, or the judge's.  Raises PartFailed, and then keeps nothing, and UserError on a full disk."""
        named = json.dumps([self.id, look.before.id, look.after.id, look.original_prompt])
        key = hashlib.sha256(named.encode()).hexdigest()
        if (kept := self._read(key)) is not None:
            self.hits += 1
            return kept
        if key in self._asked:
            self.hits += 1
        else:
            self.misses += 1
            self._asked[key] = asyncio.create_task(self._ask(key, look))
        return await asyncio.shield(self._asked[key])

    async def close(self) -> None:
        """Let go of the judge."""
        await self._inner.close()

    async def _ask(self, key: str, look: Look) -> Scores:
        try:
            scores = await self._inner.score(look)
            path = self._path(key)
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, scores.model_dump_json())
            return scores
        finally:
            del self._asked[key]

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"

    def _read(self, key: str) -> Scores | None:
        """None where there are none, or the file is damaged: then they are asked for again."""
        try:
            return Scores.model_validate_json(self._path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


def white() -> Picture:
    """A small white picture."""
    return Picture.of(Image.new("RGB", (32, 32), "white"))


async def probe(judge: Judge) -> None:
    """Raises UserError if the judge does not answer; what it says of a white picture does not matter."""
    try:
        await judge.score(Look(white(), white(), PROBE, PROBE))
    except PartFailed as failure:
        if failure.kind != "garbage":
            raise UserError(
                f"the judge {judge.id} does not answer ({failure.kind}: {failure}); start it, mend judge, or build "
                "without one (judge=null)"
            ) from None


async def score_all(
    judge: Judge,
    looks: Sequence[Callable[[], Look]],
    concurrency: int,
    may_fail: float,
    told: Callable[[int, int], None],
    go_on: str,
) -> tuple[list[Scores | None], Counter[str]]:
    """The judge's scores of all looks, several at once, None where it failed, and how often it failed how.

    may_fail: share of them.  told: how many are done, of how many.  go_on: what to do once the judge is mended.
    Raises UserError once it failed on more.
    """
    failed, done = Counter[str](), 0

    async def one(look: Callable[[], Look]) -> Scores | None:
        nonlocal done
        scores = None
        try:
            scores = await judge.score(await asyncio.to_thread(look))
        except PartFailed as failure:
            failed[failure.kind] += 1
            if failed.total() > may_fail * len(looks):
                raise _too_many(failed, failure, go_on) from None
        done += 1
        told(done, len(looks))
        return scores

    return await resilience.each(one, looks, concurrency), failed


def _too_many(failed: Counter[str], last: PartFailed, go_on: str) -> UserError:
    reasons = ", ".join(f"{count} {kind}" for kind, count in failed.most_common())
    return UserError(
        f"the judge failed on {failed.total()} pictures ({reasons}; the last: {last}), more than max_unscored allows; "
        f"everything is kept: {go_on}"
    )
