"""Benchmark folders as rows of the papers' tables, with bootstrap intervals over prompts."""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from flowbp.evaluation.benchmarks.geneval import Tag
from flowbp.evaluation.benchmarks.settings import GENEVAL_KINDS, GENEVAL_SHAPES, BenchmarkConfig, read_scores
from flowbp.evaluation.compare import MeanScore, format_score, mean_score, sort_scores
from imgen_common.console import markdown_table
from imgen_common.errors import UserError
from imgen_common.files import write_atomic
from imgen_common.run_folder.find import CONFIG, check_maker
from imgen_common.run_folder.folder import RunFolder

OVERALL = "overall"
GENEVAL_TITLES = dict(
    zip((OVERALL, *get_args(Tag)), ("Overall", "Single", "Two", "Count", "Color", "Position", "Attr"), strict=True)
)
SHAPES_TITLES = {f"shapes_{name}": f"{title} (shapes)" for name, title in GENEVAL_TITLES.items()}
PERCENT = GENEVAL_TITLES | SHAPES_TITLES
"""Scores in percent: those of GenEval, and of GenEval (shapes), which have names of their own."""
COLUMN_TITLES = PERCENT | {
    "hpsv2": "HPSv2.1",
    "hpsv3": "HPSv3",
    "pickscore": "PickScore",
    "imagereward": "ImageReward",
    "ur_align": "UR-Align",
    "ur_iq": "UR-IQ",
}
"""Columns in the order of the papers; other scores follow under their own names."""
SHAPES_NOTE = (
    "GenEval (shapes) has GenEval's rules, prompts of the shapes world and its verifier as the judge: its numbers "
    "cannot be compared with published ones of GenEval."
)


@dataclass(frozen=True)
class BenchmarkRow:
    """One folder: the mean of every score and its 95 % interval.

    scored: number of images with a row, by scorer.  unscored: of those, images to which the scorer gave no score; the
    means leave them out.  content: digest of the prompts.
    """

    label: str
    folder: str
    protocol: str
    images: int
    scored: dict[str, int]
    unscored: dict[str, int]
    means: dict[str, MeanScore]
    content: str = ""


def read_row(folder: Path) -> BenchmarkRow:
    """The row of a folder, finished or not.  Raises UserError if it is not a folder of `flowbp benchmark`."""
    if not (folder / CONFIG).is_file():
        what = "not a folder of `flowbp benchmark`" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {what}; give the --out of one")
    check_maker(folder, "flowbp benchmark")
    config = RunFolder.open(folder, is_main=False).config(BenchmarkConfig)
    found = {spec.name: read_scores(folder, spec.name).values() for spec in config.scorers}
    scored = {name: len(rows) for name, rows in found.items()}
    unscored = {name: sum(row["score"] is None for row in rows) for name, rows in found.items()}
    strata: dict[str, list[list[float]]] = {}
    for spec in config.scorers:
        rows = found[spec.name]
        if spec.kind in GENEVAL_KINDS:
            prefix = "shapes_" if spec.kind == GENEVAL_SHAPES else ""
            strata |= {prefix + name: values for name, values in _by_task(rows).items()}
        else:
            strata[spec.name] = [_by_prompt(rows)]
    means = {name: mean_score(*values) for name, values in strata.items() if any(values)}
    return BenchmarkRow(
        config.label, str(folder), config.protocol, len(config.image_ids), scored, unscored, means, config.content
    )


def _by_prompt(rows: Collection[Mapping[str, Any]]) -> list[float]:
    """The mean score of every prompt that has one."""
    values: dict[int, list[float]] = {}
    for row in rows:
        if row["score"] is not None:
            values.setdefault(row["prompt"], []).append(row["score"])
    return [float(np.mean(values[prompt])) for prompt in sorted(values)]


def _by_task(rows: Collection[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """Correct images in percent by task, and of all tasks, in whose mean every task has the same weight."""
    found = {tag: [100 * value for value in _by_prompt([r for r in rows if r["tag"] == tag])] for tag in get_args(Tag)}
    strata = {tag: values for tag, values in found.items() if values}
    return {OVERALL: list(strata.values())} | {tag: [values] for tag, values in strata.items()}


def score_columns(rows: Sequence[BenchmarkRow]) -> list[str]:
    """All scores of the rows, in the order of the papers."""
    return sort_scores(dict.fromkeys(name for row in rows for name in row.means), COLUMN_TITLES)


def row_labels(rows: Sequence[BenchmarkRow]) -> list[str]:
    """The label of each row: its model, and the folder too where several rows have that model."""
    models = [row.label for row in rows]
    return [row.label if models.count(row.label) == 1 else f"{row.label} ({Path(row.folder).name})" for row in rows]


def format_cell(row: BenchmarkRow, name: str) -> tuple[str, str]:
    """Mean and interval of a score as people read them."""
    one = row.means.get(name)
    if one is None:
        return "-", ""
    if name in PERCENT:
        return f"{one.mean:.2f}", f"{one.low:.1f} to {one.high:.1f}"
    shown = (one.mean, one.low, one.high)
    mean, low, high = (format_score(name, value, *shown) for value in shown)
    return mean, f"{low} to {high}"


def table_notes(rows: Sequence[BenchmarkRow]) -> list[str]:
    """What a reader of the table must know."""
    columns = score_columns(rows)
    within = ", for Overall within each task" if not PERCENT.keys().isdisjoint(columns) else ""
    notes = [f"Below each mean its 95 % interval: percentile bootstrap over prompts{within}."]
    if not columns:
        asked = any(row.scored for row in rows)
        notes = ["No image has a score; see below." if asked else "No scores yet; give --score KIND=REF."]
    notes += [SHAPES_NOTE] if not SHAPES_TITLES.keys().isdisjoint(columns) else []
    contents = Counter(protocol for protocol, _ in {(row.protocol, row.content) for row in rows})
    notes += [
        f"Rows of {protocol} are of different prompts: their scores cannot be compared."
        for protocol, count in contents.items()
        if count > 1
    ]
    for row in rows:
        notes += [
            f"{row.folder}: {name} has {number} of {row.images} images; run the same command again to continue."
            for name, number in row.scored.items()
            if number < row.images
        ]
        notes += [
            f"{row.folder}: {name} gave {number} of {row.scored[name]} images no score (a reward's "
            "was not finite, a judge's could not be read); they are left out."
            for name, number in row.unscored.items()
            if number
        ]
    return notes


def table_markdown(rows: Sequence[BenchmarkRow]) -> str:
    """The table for a document."""
    names = score_columns(rows)
    body = [
        [label, *(" <br> ".join(filter(None, format_cell(row, name))) for name in names)]
        for label, row in zip(row_labels(rows), rows, strict=True)
    ]
    table = markdown_table(["", *(COLUMN_TITLES.get(name, name) for name in names)], body)
    return "\n".join([table, "", *table_notes(rows)]) + "\n"


def write_table(folder: Path) -> BenchmarkRow:
    """Writes the folder's own table; returns its row."""
    row = read_row(folder)
    write_atomic(folder / "table.json", json.dumps([asdict(row)], indent=2) + "\n")
    write_atomic(folder / "table.md", table_markdown([row]))
    return row
