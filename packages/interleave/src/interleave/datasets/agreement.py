"""Comparison of two judges on the images of a set: how far they agree, and on which rows they do not."""

import asyncio
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import Any

from imgen_common.errors import UserError
from interleave.agents import scoring
from interleave.agents.judge import JudgeAgreement, judge_agreement
from interleave.datasets.build import BuildProgress
from interleave.datasets.check import FILES, find_row_files
from interleave.datasets.config import DataConfig
from interleave.datasets.rows import RlRow, parse_row, read_lines
from interleave.protocols import Judge
from interleave.records import Record, Scores

UNNAMED = "not named"


class Disagreement(Record):
    """A row with the scores of both judges."""

    where: str
    prompt: str
    first: Scores
    second: Scores

    @property
    def distance(self) -> float:
        """Sum of the differences of both scores, in [0, 20]."""
        return abs(self.first.semantics - self.second.semantics) + abs(self.first.quality - self.second.quality)


@dataclass(frozen=True)
class JudgeComparison:
    """The scores of a set compared with those of another judge.

    first: the judge of the set.  failed: failures of the second judge by kind.  disagreements: the rows on which they
    differ most, the largest difference first.
    """

    first: str
    second: str
    agreement: JudgeAgreement
    failed: Mapping[str, int]
    disagreements: tuple[Disagreement, ...]

    def lines(self) -> Iterator[str]:
        """Lines for a terminal."""
        a = self.agreement
        failures = ", ".join(f"{count} {kind}" for kind, count in self.failed.items())
        yield f"judges: {self.first} (of the set); {self.second}"
        yield f"images: {a.num} scored by both" + (f"; the second failed on {failures}" if failures else "")
        for name in ("semantics", "quality"):
            correlation = getattr(a, f"{name}_correlation")
            shown = "none (one gave all the same score)" if math.isnan(correlation) else f"{correlation:.3f}"
            yield f"{name}: {getattr(a, f'{name}_difference'):.2f} apart on average, correlation {shown}"
        if math.isnan(a.same_order):
            yield "order: not defined, since all pairs of images are ties"
        else:
            order = f"equal for {a.same_order:.1%} of the pairs of images"
            yield f"order: {order}, by sqrt(semantics quality), without ties"
        if self.disagreements:
            yield "largest differences (semantics, quality):"
        for row in self.disagreements:
            scores = [f"{one.semantics:g}, {one.quality:g}" for one in (row.first, row.second)]
            yield f"  {row.where}: {' and '.join(scores)}: {row.prompt}"

    def as_json(self) -> dict[str, Any]:
        """JSON; numbers that are not defined are null."""
        return {
            "judges": [self.first, self.second],
            "agreement": {name: None if isnan(value) else value for name, value in asdict(self.agreement).items()},
            "failed": self.failed,
            "apart": [row.model_dump(mode="json") for row in self.disagreements],
        }


def compare_judges(
    path: Path, config: DataConfig, judge: Judge, progress: BuildProgress, max_disagreements: int = 5
) -> JudgeComparison:
    """Compares the scores of critic_rl (a set's folder or one of its files) with those of `judge` for the same images.

    max_disagreements: rows in `disagreements`, at most.  The judge's scores are kept beside those of the build, so that
    nothing is scored twice.  Closes the judge.  Raises UserError if there are fewer than two scored rows, they are this
    judge's own, or the judge does not answer or fails on more than `config.max_unscored` of them.
    """
    work = scoring.ImageScoring(
        judge,
        path if path.is_dir() else path.parent,
        config.run.loop.concurrency,
        config.max_unscored,
        "run the same command again when it answers, or with a higher max_unscored",
        progress.on_questions,
        progress.on_scored,
    )
    with asyncio.Runner() as runner:
        try:
            rows = _scored_rows(path, judge.id)
            runner.run(scoring.check_judge(judge))
            looks = [(row.before_id, row.after_id, row.original_prompt) for row in rows.values()]
            scores, failed = runner.run(work.score_all(looks))
        finally:
            runner.run(judge.close())
    both = [
        Disagreement(where=where, prompt=row.original_prompt, first=_recorded_scores(row), second=other)
        for (where, row), other in zip(rows.items(), scores, strict=True)
        if other is not None
    ]
    if len(both) < 2:
        raise UserError(f"{path}: {len(both)} images scored by both judges; at least 2 are needed")
    differ = sorted((one for one in both if one.distance > 0), key=lambda one: -one.distance)
    names = Counter(one.first.judge_id for one in both)
    found = judge_agreement([one.first for one in both], [one.second for one in both])
    return JudgeComparison(", ".join(names), judge.id, found, failed, tuple(differ[:max_disagreements]))


def _scored_rows(path: Path, judge_id: str) -> dict[str, RlRow]:
    """The scored rows by file and line.  Raises UserError."""
    found: dict[str, RlRow] = {}
    for file in find_row_files(path):
        if FILES[file.name][0] != "critic_rl":
            continue
        for number, line in read_lines(file):
            try:
                row = parse_row(line, RlRow)
            except ValueError as error:
                raise UserError(f"{file}:{number}: {error}") from None
            found[f"{file.name}:{number}"] = row
    if not found:
        raise UserError(f"{path}: no rows of critic_rl, which hold a judge's scores; give a set that has some")
    if judge_id in {_recorded_scores(row).judge_id for row in found.values()}:
        raise UserError(f"{path}: was scored by {judge_id} itself; give another judge with --set judge....")
    return found


def _recorded_scores(row: RlRow) -> Scores:
    known = row.evaluation
    named = (known.model_extra or {}).get("judge_id")
    return Scores(semantics=known.semantics, quality=known.quality, judge_id=str(named or UNNAMED))
