"""Benchmark folders as rows of the papers' tables, with bootstrap intervals over prompts."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from flowbp.benchmark import GENEVAL, BenchmarkConfig, read_scores
from flowbp.compare import Level, level
from flowbp.evaluators.geneval import Tag
from imgen_common.runs import RunFolder, write_atomic

OVERALL = "overall"
PER_CENT: tuple[str, ...] = (OVERALL, *get_args(Tag))
TITLES = dict(zip(PER_CENT, ("Overall", "Single", "Two", "Count", "Colour", "Position", "Attr"), strict=True)) | {
    "hpsv2": "HPSv2.1",
    "hpsv3": "HPSv3",
    "pickscore": "PickScore",
    "imagereward": "ImageReward",
    "ur_align": "UR-Align",
    "ur_iq": "UR-IQ",
}
"""Columns in the papers' order; others follow under their own names."""
Scored = Collection[Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """One folder: the mean of every score and its 95 % interval; for every scorer how many pictures it has looked at,
    and to how many of them it gave no score, which are left out."""

    label: str
    folder: str
    protocol: str
    pictures: int
    scored: dict[str, int]
    unscored: dict[str, int]
    levels: dict[str, Level]


def row_of(folder: Path) -> Row:
    """The row of a folder, finished or not.  Raises UserError if it is none of `flowbp benchmark`."""
    config = RunFolder.open(folder, is_main=False).config(BenchmarkConfig)
    scored, unscored = {}, {}
    levels: dict[str, Level] = {}
    for spec in config.scorers:
        rows = read_scores(folder, spec.name).values()
        scored[spec.name] = len(rows)
        unscored[spec.name] = sum(row["score"] is None for row in rows)
        levels |= _by_task(rows) if spec.kind == GENEVAL else _levels({spec.name: [_by_prompt(rows)]})
    return Row(config.label, str(folder), config.protocol, len(config.items), scored, unscored, levels)


def _by_prompt(rows: Scored) -> list[float]:
    """The mean score of every prompt that has one."""
    values: dict[int, list[float]] = {}
    for row in rows:
        if row["score"] is not None:
            values.setdefault(row["prompt"], []).append(row["score"])
    return [float(np.mean(values[prompt])) for prompt in sorted(values)]


def _by_task(rows: Scored) -> dict[str, Level]:
    """Right pictures in per cent by task, and the mean of the tasks, in which every task weighs the same."""
    found = {tag: [100 * value for value in _by_prompt([r for r in rows if r["tag"] == tag])] for tag in get_args(Tag)}
    strata = {tag: values for tag, values in found.items() if values}
    return _levels({OVERALL: list(strata.values())} | {tag: [values] for tag, values in strata.items()})


def _levels(scores: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Level]:
    return {name: level(*strata) for name, strata in scores.items() if any(strata)}


def columns(rows: Sequence[Row]) -> list[str]:
    """All scores of the rows, in the papers' order."""
    names = dict.fromkeys(name for row in rows for name in row.levels)
    known = list(TITLES)
    return sorted(names, key=lambda name: known.index(name) if name in known else len(known))


def labels(rows: Sequence[Row]) -> list[str]:
    """What to call each row: its model, and where several have one, its folder too."""
    models = [row.label for row in rows]
    return [row.label if models.count(row.label) == 1 else f"{row.label} ({Path(row.folder).name})" for row in rows]


def cell(row: Row, name: str) -> tuple[str, str]:
    """Mean and interval for people."""
    one = row.levels.get(name)
    if one is None:
        return "-", ""
    if name in PER_CENT:
        return f"{one.mean:.2f}", f"{one.low:.1f} to {one.high:.1f}"
    return f"{one.mean:.4f}", f"{one.low:.4f} to {one.high:.4f}"


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader of the table must know."""
    within = ", for Overall within each task" if OVERALL in columns(rows) else ""
    said = [f"Below each mean its 95 % interval: percentile bootstrap over prompts{within}."]
    said = said if columns(rows) else ["No scores yet; give --score KIND=REF."]
    for row in rows:
        said += [
            f"{row.folder}: {name} has {number} of {row.pictures} pictures; run the same command again to go on."
            for name, number in row.scored.items()
            if number < row.pictures
        ]
        said += [
            f"{row.folder}: {name} gave {number} of {row.scored[name]} pictures no score; they are left out."
            for name, number in row.unscored.items()
            if number
        ]
    return said


def markdown(rows: Sequence[Row]) -> str:
    """The table for a document."""
    names = columns(rows)
    lines = ["| | " + " | ".join(TITLES.get(name, name) for name in names) + " |", "| --- |" + " ---: |" * len(names)]
    for label, row in zip(labels(rows), rows, strict=True):
        cells = [" <br> ".join(filter(None, cell(row, name))) for name in names]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *notes(rows)]) + "\n"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The table for machines."""
    return [asdict(row) for row in rows]


def write(folder: Path) -> Row:
    """Writes the folder's own table; returns its row."""
    row = row_of(folder)
    write_atomic(folder / "table.json", json.dumps(as_json([row]), indent=2) + "\n")
    write_atomic(folder / "table.md", markdown([row]))
    return row
