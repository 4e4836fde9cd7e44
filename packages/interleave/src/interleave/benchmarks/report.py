"""The figures of a benchmark with their intervals, how many items they stand on, and what they can be compared with."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from imgen_common.console import count, markdown_table
from imgen_common.errors import one_line
from imgen_common.judging.answers import Answer
from interleave.benchmarks.base import Benchmark, Item, Output, Prompts, Scores

NUM_RESAMPLINGS, SEED = 1000, 0
NO_BOUNDS: tuple[float | None, float | None] = (None, None)
Answers = Mapping[str, Mapping[str, Answer]]
"""By item and question."""
Rows = Sequence[tuple[Item, Scores]]


@dataclass(frozen=True)
class Figure:
    """A figure, its 95 % bootstrap interval over items, and what it is where failures count as the worst."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    as_zero: float | None


@dataclass(frozen=True)
class BenchmarkReport:
    """All that a table says.

    failures: of questions, by kind.  first_error: of the first question that failed, in words.  differences:
    why the figures cannot be compared with published ones; empty: words and judge are those of the authors, and all of
    the given data was used.
    """

    benchmark: str
    title: str
    judge: str
    prompts: str
    num_items: int
    num_generated: int
    num_judged: int
    num_answers: int
    failures: Mapping[str, int]
    first_error: str | None
    num_calls: int
    num_prompt_tokens: int
    num_completion_tokens: int
    figures: Sequence[Figure]
    differences: Sequence[str]


def make_report(
    benchmark: Benchmark, items: Sequence[Item], outputs: Mapping[str, Output], answers: Answers, prompts: Prompts,
    differences: Sequence[str],
) -> BenchmarkReport:  # fmt: skip
    """The report on the items' answers.  differences: see `BenchmarkReport`."""
    shown = {item.id: answers.get(item.id, {}) for item in items}
    every = [answer for found in shown.values() for answer in found.values()]
    left_out, worst = (_rows(benchmark, items, shown, as_zero=zero) for zero in (False, True))
    values, zeros = benchmark.figures(left_out), benchmark.figures(worst)
    bounds = bootstrap_bounds(benchmark.figures, left_out)
    return BenchmarkReport(
        benchmark=benchmark.name,
        title=benchmark.title,
        judge=", ".join(sorted({answer.judge for answer in every})),
        prompts=f"{prompts.source} ({prompts.hash})",
        num_items=len(items),
        num_generated=sum(item.id in outputs for item in items),
        num_judged=sum(bool(f) and all(a.error_kind is None for a in f.values()) for f in shown.values()),
        num_answers=len(every),
        failures=dict(sorted(Counter(answer.error_kind for answer in every if answer.error_kind).items())),
        first_error=next((answer.error for answer in every if answer.error_kind), None),
        num_calls=sum(answer.num_calls for answer in every),
        num_prompt_tokens=sum(answer.num_prompt_tokens for answer in every),
        num_completion_tokens=sum(answer.num_completion_tokens for answer in every),
        figures=[
            Figure(name, values.get(name), *bounds.get(name, NO_BOUNDS), as_zero=zeros.get(name))
            for name in dict.fromkeys((*values, *zeros))
        ],
        differences=differences,
    )


def _rows(benchmark: Benchmark, items: Sequence[Item], answers: Answers, *, as_zero: bool) -> list[tuple[Item, Scores]]:
    rows = []
    for item in items:
        values = {name: answer.value for name, answer in answers[item.id].items()}
        rows.append((item, benchmark.score(item, values, as_zero=as_zero)))
    return [(item, scores) for item, scores in rows if scores]


def bootstrap_bounds(figures: Callable[[Rows], Mapping[str, float]], rows: Rows) -> dict[str, tuple[float, float]]:
    """95 % percentile bootstrap intervals of figures over items, resampled within their categories."""
    rng = np.random.default_rng(SEED)
    strata: dict[str, list[int]] = {}
    for index, (item, _) in enumerate(rows):
        strata.setdefault(item.category, []).append(index)
    found: dict[str, list[float]] = {}
    for _ in range(NUM_RESAMPLINGS if rows else 0):
        picks = [rng.choice(indices, len(indices)) for indices in strata.values()]
        for name, value in figures([rows[i] for pick in picks for i in pick]).items():
            found.setdefault(name, []).append(value)
    return {
        name: (float(low), float(high))
        for name, values in found.items()
        for low, high in [np.quantile(values, [0.025, 0.975])]
    }


def table_markdown(report: BenchmarkReport) -> str:
    """The table, and under it what a reader must know of it."""
    cells = [
        [
            figure.name,
            _number(figure.value),
            f"{_number(figure.low)} to {_number(figure.high)}",
            _number(figure.as_zero),
        ]
        for figure in report.figures
    ]
    header = [report.title, "value", "95 % interval", "failures as worst"]
    return "\n".join([markdown_table(header, cells), "", *notes(report)]) + "\n"


def notes(report: BenchmarkReport) -> list[str]:
    """What stands under the table."""
    failures = ", ".join(f"{count} {kind}" for kind, count in report.failures.items()) or "none"
    reason = "" if report.first_error is None else f" The first of them: {one_line(report.first_error, 200)}."
    lines = [
        f"{count(report.num_items, 'item')}: {report.num_generated} generated, {report.num_judged} judged whole. "
        f"{count(report.num_answers, 'question')}, failed: {failures}.{reason}",
        f"Judge: {report.judge or 'none'}. Questions: {report.prompts}. {count(report.num_calls, 'call')}, "
        f"{report.num_prompt_tokens} tokens read, {report.num_completion_tokens} written.",
        "Intervals: percentile bootstrap over items within their categories, failures left out.",
    ]
    if report.differences:
        return [*lines, f"Not comparable with published figures: {'; '.join(report.differences)}."]
    return [*lines, "Questions and judge are those of published figures; whether the data are, was not checked."]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
