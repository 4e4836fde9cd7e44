"""Two judges on the pictures of a set: how far they agree, and on which rows they do not."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any

from imgen_common.errors import UserError
from interleave.agents import scoring
from interleave.agents.judge import JudgeAgreement, judge_agreement
from interleave.datasets.build import SCORES
from interleave.datasets.check import FILES, files_of
from interleave.datasets.config import DataConfig
from interleave.datasets.rows import RlRow, parsed
from interleave.protocols import Judge
from interleave.records import Scores
from interleave.storage.images import IMAGES, ImageStore

UNNAMED = "not named"


@dataclass(frozen=True)
class Apart:
    """A row, and what either judge gave it."""

    where: str
    prompt: str
    first: Scores
    second: Scores

    @property
    def distance(self) -> float:
        """How far the marks are apart, both together, in [0, 20]."""
        return abs(self.first.semantics - self.second.semantics) + abs(self.first.quality - self.second.quality)


@dataclass(frozen=True)
class Compared:
    """Scores that a set holds against another judge's.

    first: who scored the set.  failed: how often the second judge failed how.  apart: the rows on which they are
    furthest apart, the furthest first.
    """

    first: str
    second: str
    agreement: JudgeAgreement
    failed: Mapping[str, int]
    apart: tuple[Apart, ...]

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        a = self.agreement
        failures = ", ".join(f"{count} {kind}" for kind, count in self.failed.items())
        yield f"judges: {self.first} (of the set); {self.second}"
        yield f"pictures: {a.num} scored by both" + (f"; the second failed on {failures}" if failures else "")
        yield f"semantics: {a.semantics_difference:.2f} apart on average, correlation {a.semantics_correlation:.3f}"
        yield f"quality: {a.quality_difference:.2f} apart on average, correlation {a.quality_correlation:.3f}"
        yield f"order: {a.same_order:.1%} of the pairs of pictures alike, by sqrt(semantics quality), ties left out"
        if self.apart:
            yield "furthest apart (semantics, quality):"
        for row in self.apart:
            marks = (
                f"{row.first.semantics:g}, {row.first.quality:g} and {row.second.semantics:g}, {row.second.quality:g}"
            )
            yield f"  {row.where}: {marks}: {row.prompt}"

    def as_json(self) -> dict[str, Any]:
        """For a machine; what is not defined is null."""
        return {
            "judges": [self.first, self.second],
            "agreement": {name: None if isnan(value) else value for name, value in asdict(self.agreement).items()},
            "failed": self.failed,
            "apart": [
                {
                    "where": row.where,
                    "prompt": row.prompt,
                    "first": row.first.model_dump(mode="json"),
                    "second": row.second.model_dump(mode="json"),
                }
                for row in self.apart
            ],
        }


def compare(path: Path, config: DataConfig, judge: Judge, told: Callable[[int, int], None], shown: int = 5) -> Compared:
    """The scores of critic_rl (a set's folder or one of the files) against those that `judge` gives the same pictures.

    shown: rows in `apart`, at most.  The judge's scores are kept beside those of the build, so that nothing is asked
    twice.  Closes the judge.  Raises UserError if there are fewer than two scored rows, they are this judge's own, or
    the judge does not answer or fails on more than `config.max_unscored` of them.
    """
    return asyncio.run(_compare(path, config, judge, told, shown))


async def _compare(
    path: Path, config: DataConfig, judge: Judge, told: Callable[[int, int], None], shown: int
) -> Compared:
    try:
        rows = _rows(path, judge.id)
        await scoring.check_judge(judge)
        folder = path if path.is_dir() else path.parent
        pictures = ImageStore(folder / IMAGES)
        scores, failed = await scoring.score_all(
            scoring.CachedJudge(judge, folder / SCORES),
            [partial(row.critic_input, pictures) for row in rows.values()],
            config.run.loop.concurrency,
            config.max_unscored,
            told,
            "run the same command again when it answers",
        )
    finally:
        await judge.close()
    both = [
        Apart(where, row.original_prompt, _recorded(row), other)
        for (where, row), other in zip(rows.items(), scores, strict=True)
        if other is not None
    ]
    if len(both) < 2:
        raise UserError(f"{path}: {len(both)} pictures scored by both judges; at least 2 are needed")
    differ = sorted((one for one in both if one.distance > 0), key=lambda one: -one.distance)
    names = Counter(one.first.judge_id for one in both)
    found = judge_agreement([one.first for one in both], [one.second for one in both])
    return Compared(", ".join(names), judge.id, found, failed, tuple(differ[:shown]))


def _rows(path: Path, judge_id: str) -> dict[str, RlRow]:
    """The scored rows by file and line.  Raises UserError."""
    found: dict[str, RlRow] = {}
    for file in files_of(path):
        if FILES[file.name][0] != "critic_rl":
            continue
        for number, line in enumerate(file.read_bytes().splitlines(), 1):
            try:
                row = parsed(line, RlRow)
            except ValueError as error:
                raise UserError(f"{file}:{number}: {error}") from None
            found[f"{file.name}:{number}"] = row
    if not found:
        raise UserError(f"{path}: no rows of critic_rl, which hold a judge's scores; give a set that has some")
    if judge_id in {_recorded(row).judge_id for row in found.values()}:
        raise UserError(f"{path}: was scored by {judge_id} itself; give another judge with --set judge....")
    return found


def _recorded(row: RlRow) -> Scores:
    known = row.evaluation
    named = (known.model_extra or {}).get("judge_id")
    return Scores(semantics=known.semantics, quality=known.quality, judge_id=str(named or UNNAMED))
