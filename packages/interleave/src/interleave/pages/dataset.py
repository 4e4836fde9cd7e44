"""One self-contained HTML page about a set: what is in it, what was left out, and some rows with their images."""

import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from imgen_common import page
from imgen_common.files import write_atomic
from interleave.agents.parsing import parse_plan, parse_verdict
from interleave.datasets.check import FILES, find_row_files, parse_set_row, read_set_info
from interleave.datasets.filters import SetInfo, SetName
from interleave.datasets.rows import RlRow, SftRow, read_lines
from interleave.pages import TEMPLATES
from interleave.pages.images import PageImages
from interleave.pages.words import shorten
from interleave.records import Plan, Verdict
from interleave.storage.images import IMAGES, ImageStore

PAGE = "statistics.html"
MAX_EXAMPLES = 6
"""Rows of each file that are shown."""
BINS = 10


class Bar(NamedTuple):
    """Two lengths one after the other.  most: what fills the bar."""

    good: int
    bad: int
    most: int


@dataclass(frozen=True)
class ExampleRow:
    """A row that is shown.  number: counts from 1 in its file.  prompt: folded, of rows that hold one."""

    number: int
    image_ids: tuple[str, ...]
    words: str
    note: str = ""
    facts: str = ""
    prompt: str = ""

    @classmethod
    def of(cls, number: int, row: SftRow | RlRow) -> "ExampleRow":
        """What is shown of a row."""
        if isinstance(row, SftRow):
            prompt = "\n[image]\n".join(row.texts).strip()
            return cls(number, row.image_ids, shorten(row.completion, 700), prompt=prompt)
        known, is_same = row.evaluation, row.prompt_used in ("", row.original_prompt)
        success = str(known.success).lower()
        return cls(
            number,
            (row.before_id, row.after_id),
            row.original_prompt,
            "" if is_same else f"generated with: {row.prompt_used}",
            f"success: {success} · semantics {known.semantics:g} · quality {known.quality:g}",
        )


@dataclass
class FileSummary:
    """What the page says of one file's rows.

    lengths: words of prompt and answer.  steps, images: how many plans, or prompts, have so many.
    scores: (semantics, quality, success).
    """

    rows: int = 0
    lengths: list[tuple[int, int]] = field(default_factory=list)
    images: Counter[int] = field(default_factory=Counter)
    steps: Counter[int] = field(default_factory=Counter)
    verdicts: Counter[bool] = field(default_factory=Counter)
    scores: list[tuple[float, float, bool]] = field(default_factory=list)
    unreadable: int = 0
    examples: list[ExampleRow] = field(default_factory=list)

    @classmethod
    def of(cls, file: Path) -> "FileSummary":
        """Of all rows; the examples are spread evenly over the file."""
        name, _ = FILES[file.name]
        total = sum(1 for _ in read_lines(file))
        examples = {total * i // MAX_EXAMPLES for i in range(MAX_EXAMPLES)}
        summary = cls()
        for number, (_, line) in enumerate(read_lines(file)):
            try:
                summary.add(parse_set_row(line, name), name, number in examples)
            except ValueError:
                summary.unreadable += 1
        return summary

    def add(self, row: SftRow | RlRow, name: SetName, is_example: bool) -> None:
        """One more row."""
        self.rows += 1
        if is_example:
            self.examples.append(ExampleRow.of(self.rows, row))
        if isinstance(row, RlRow):
            known = row.evaluation
            self.verdicts[known.success] += 1
            self.scores.append((known.semantics, known.quality, known.success))
            self.lengths.append((len(row.original_prompt.split()), len(row.prompt_used.split())))
            return
        self.lengths.append((sum(len(part.split()) for part in row.texts), len(row.completion.split())))
        self.images[len(row.image_ids)] += 1
        parse = parse_plan if name == "planner_sft" else parse_verdict
        match parse(row.completion, "tolerant"):
            case Plan() as plan:
                self.steps[len(plan.steps)] += 1
            case Verdict() as verdict:
                self.verdicts[verdict.success] += 1
            case _:
                self.unreadable += 1


def write_page(folder: Path) -> Path:
    """Writes the page of the set in `folder` anew; returns its path.  Raises UserError if there is no set.

    Rows that cannot be read are left to `data check`.
    """
    files = {file.name: FileSummary.of(file) for file in find_row_files(folder)}
    ids = [image_id for one in files.values() for row in one.examples for image_id in row.image_ids]
    info = read_set_info(folder)
    values = {
        "name": folder.resolve().name,
        "facts": _facts(files, info),
        "info": info,
        "files": files,
        "categories": _categories(info),
        "lengths": _lengths(files),
        "scores": _scores(files),
        "images": PageImages(ids, ImageStore(folder / IMAGES).get),
    }
    path = folder / PAGE
    write_atomic(path, page.render("dataset.html.jinja", values, TEMPLATES))
    return path


def _facts(files: Mapping[str, FileSummary], info: SetInfo | None) -> list[str]:
    facts = [f"{sum(one.rows for one in files.values())} rows in {len(files)} files"]
    if info is not None:
        facts += [f"{sum(info.trajectories.values())} trajectories"] if info.trajectories else []
        facts += [f"judge: {info.judge}"] if info.judge else []
        facts += [f"source: {info.source}"]
    return facts


def _categories(info: SetInfo | None) -> list[tuple[str, int, Bar]]:
    """Each category with its requests, and how many became complete and how many did not."""
    known = info.categories if info else {}
    most = max((sum(ends.values()) for ends in known.values()), default=1)
    return [
        (name or "(none)", num, Bar(ends.get("complete", 0), num - ends.get("complete", 0), most))
        for name, ends in known.items()
        for num in (sum(ends.values()),)
    ]


def _lengths(files: Mapping[str, FileSummary]) -> list[tuple[str, ...]]:
    """Least, median, 95th percentile and most words of each part of each file's rows."""
    rows: list[tuple[str, ...]] = []
    for name, one in files.items():
        parts = ("instruction", "rewritten prompt") if name.startswith("critic_rl") else ("prompt", "answer")
        for part, *lengths in zip(parts, *one.lengths, strict=True) if one.lengths else ():
            lengths.sort()
            nearly_all = lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))]
            median = f"{statistics.median(lengths):g}"
            rows.append((name, part, str(lengths[0]), median, str(nearly_all), str(lengths[-1])))
    return rows


def _scores(files: Mapping[str, FileSummary]) -> list[tuple[str, Bar, Bar]]:
    """For each bin of scores, how many rows have them in semantics and in quality, by the critic's verdict."""
    scores = [one for file in files.values() for one in file.scores]
    if not scores:
        return []
    counts = [Counter((min(int(one[i]), BINS - 1), one[2]) for one in scores) for i in range(2)]
    most = max(num[low, True] + num[low, False] for num in counts for low in range(BINS))
    return [
        (f"{low} to {low + 1}", *(Bar(num[low, True], num[low, False], most) for num in counts))  # type: ignore[misc]
        for low in range(BINS)
    ]
