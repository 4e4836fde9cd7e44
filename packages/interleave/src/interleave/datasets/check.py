"""Checks every row and every image of a set."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imgen_common.errors import UserError, is_blank, nearest
from imgen_common.images import shape_problem
from imgen_common.judging.objects import ParseMode
from interleave.agents.parsing import ParseFailure, parse_plan, parse_verdict
from interleave.agents.prompts import IMAGE_MARKER, Template, expect_planner, load_template, nearest_prompt
from interleave.datasets.filters import INFO, SETS, SPLITS, SetInfo, SetName, Split, file_name
from interleave.datasets.rows import RlRow, SftRow, parse_row, read_lines, text_problems
from interleave.loop.config import ModelCritic, ModelPlanner, RunConfig, SelfCritic
from interleave.storage.images import IMAGES, ImageStore

FILES: dict[str, tuple[SetName, Split]] = {file_name(name, split): (name, split) for name in SETS for split in SPLITS}

QUOTED = 40
"""Characters that are quoted of a difference."""
REMEDY = "make one of files in other formats with interleave data import"


@dataclass(frozen=True)
class RowProblem:
    """What is wrong with a row, or with a file (`line` None).  Lines count from 1."""

    file: Path
    line: int | None
    why: str

    def __str__(self) -> str:
        return f"{self.file}{'' if self.line is None else f':{self.line}'}: {self.why}"


@dataclass
class FileCounts:
    """Rows of a file, and how many of them are wrong."""

    rows: int = 0
    wrong: int = 0


@dataclass
class PromptCounts:
    """How many prompts of a file are, to the letter and the place of every image, prompts of run time.

    key: of the templates in the recipe.  first: line of the first that is none, what it has from the first difference
    on, and what run time shows there.
    """

    key: str
    templates: tuple[Template, ...]
    """Of prompts without and with images."""
    same: int = 0
    different: int = 0
    first: tuple[int, str, str] | None = None

    def add(self, row: SftRow, number: int) -> None:
        """Compare the prompt of a row with those of run time."""
        shown = IMAGE_MARKER.join(row.texts)
        expected = nearest_prompt(self.templates[bool(row.image_ids)], shown)
        if shown == expected:
            self.same += 1
            return
        self.different += 1
        pairs = enumerate(zip(shown, expected, strict=False))
        start = next((at for at, (a, b) in pairs if a != b), min(len(shown), len(expected)))
        self.first = self.first or (number, shown[start:][:QUOTED], expected[start:][:QUOTED])

    @property
    def names(self) -> list[str]:
        """Of the templates."""
        return list(dict.fromkeys(template.name for template in self.templates))

    def describe(self) -> str:
        """The counts, and what to do about prompts that differ."""
        what = f"run time shows with {' and '.join(self.names)}"
        if self.first is None:
            return f"all {self.same} prompts are what {what}"
        number, *quoted = self.first
        has, expected = (repr(text) if text else "nothing more" for text in quoted)
        return (
            f"{self.different} of {self.same + self.different} prompts are not what {what}: line {number} has {has} "
            f"where run time has {expected}; sft trains on the text of the rows, which run time then does not show; "
            f"mend them, or name the template that they were made with in a recipe ({self.key}: {{file: PATH.txt}}) "
            "and give it as --run-config"
        )

    def as_json(self) -> dict[str, Any]:
        """The same for programs; `warning` is null where no prompt differs."""
        first = self.first and dict(zip(("line", "row", "run_time"), self.first, strict=True))
        counts = {"templates": self.names, "same": self.same, "different": self.different, "first": first}
        return counts | {"warning": self.describe() if self.different else None}


@dataclass
class SetChecker:
    """One pass over a set's folder or one of its files; all counts are complete when `problems` was read to its end.

    parse_mode: how answers are parsed, as by the agents that the set is for.  run: the recipe with whose templates the
    prompts of supervised rows are compared; None: rows from sharegpt files, whose text is not made here, with those of
    a run without a recipe.  Raises UserError if there is no set, or the recipe has no such templates.
    """

    path: Path
    parse_mode: ParseMode = "strict"
    run: RunConfig | None = None
    counts: dict[str, FileCounts] = field(default_factory=dict)
    prompts: dict[str, PromptCounts] = field(default_factory=dict)
    _split_of: dict[str, tuple[Split, str]] = field(default_factory=dict)
    _images: dict[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.files = find_row_files(self.path)
        self._store = ImageStore(self.files[0].parent / IMAGES)
        info = read_set_info(self.files[0].parent)
        if self.run is not None or (info is not None and info.source.startswith("sharegpt ")):
            names = {file.name: FILES[file.name][0] for file in self.files}
            run = self.run or RunConfig()
            self.prompts = {file: _prompt_counts(name, run) for file, name in names.items() if name != "critic_rl"}

    def problems(self) -> Iterator[RowProblem]:
        """All problems in the order of the files and their lines."""
        for file in self.files:
            yield from self._check_file(file)
        if self.path.is_dir():
            yield from self._check_info()

    def _check_file(self, file: Path) -> Iterator[RowProblem]:
        name, split = FILES[file.name]
        counts = self.counts[file.name] = FileCounts()
        for number, line in read_lines(file):
            counts.rows += 1
            reasons = list(self._check_line(line, name, split, file.name, number))
            counts.wrong += bool(reasons)
            yield from (RowProblem(file, number, reason) for reason in reasons)
        if not counts.rows:
            yield RowProblem(file, None, "holds no rows")

    def _check_line(self, line: bytes, name: SetName, split: Split, file: str, number: int) -> Iterator[str]:
        try:
            row = parse_set_row(line, name)
        except ValueError as error:
            yield str(error)
            return
        if isinstance(row, SftRow):
            yield from text_problems(row)
            yield from self._check_answer(row, name)
            if file in self.prompts:
                self.prompts[file].add(row, number)
            ids, trajectory = row.image_ids, row.trajectory_id
        else:
            ids, trajectory = (row.before_id, row.after_id), row.extra.get("trajectory_id")
            if is_blank(row.original_prompt):
                yield "original_prompt is empty"
        for image_id in dict.fromkeys(ids):
            if reason := self._check_image(image_id):
                yield reason
        if isinstance(trajectory, str):
            other, there = self._split_of.setdefault(trajectory, (split, f"{file}:{number}"))
            if other != split:
                yield f"trajectory {trajectory} is in {split} here and in {other} at {there}"

    def _check_answer(self, row: SftRow, name: SetName) -> Iterator[str]:
        if name == "critic_sft" and len(row.image_ids) < 2:
            yield f"a critic compares two images, but the row has {len(row.image_ids)}"
        if not row.completion.strip():
            return
        parse = parse_plan if name == "planner_sft" else parse_verdict
        answer = parse(row.completion, self.parse_mode)
        if isinstance(answer, ParseFailure):
            yield f"the answer cannot be read ({answer.reason})"

    def _check_image(self, image_id: str) -> str | None:
        if image_id not in self._images:
            try:
                wrong = shape_problem(*self._store.get(image_id).image.size)
                self._images[image_id] = wrong and f"image {image_id[:12]}... {wrong}"
            except UserError as error:
                self._images[image_id] = str(error)
        return self._images[image_id]

    def _check_info(self) -> Iterator[RowProblem]:
        file = self.path / INFO
        info = read_set_info(self.path)
        if info is None:
            yield RowProblem(file, None, "missing or damaged: the set is not complete; build or import it again")
            return
        for name, (of, split) in FILES.items():
            given, found = info.rows.get(of, {}).get(split, 0), self.counts.get(name, FileCounts()).rows
            if given != found:
                yield RowProblem(file, None, f"gives {given} rows for {name}, which has {found}")


def _prompt_counts(name: SetName, run: RunConfig) -> PromptCounts:
    """The templates of the agent that rows of a set train."""
    agent = run.planner if name == "planner_sft" else run.critic
    if isinstance(agent, ModelPlanner):
        templates = load_template(agent.text_template), load_template(agent.images_template)
        for template in templates:
            expect_planner(template)
        return PromptCounts("planner.text_template and planner.images_template", templates)
    if isinstance(agent, ModelCritic | SelfCritic):
        return PromptCounts("critic.template", (load_template(agent.template),) * 2)
    role = "planner" if name == "planner_sft" else "critic"
    raise UserError(f"{role}.kind {agent.kind}: has no template for the rows of {name}; give a recipe with kind: model")


def find_row_files(path: Path) -> list[Path]:
    """The files of rows that `path` names: itself, or those in the folder.  Raises UserError if there are none."""
    if path.is_dir():
        files = [path / name for name in FILES if (path / name).is_file()]
        if not files:
            raise UserError(f"{path}: no set in it; a set has one of {', '.join(FILES)}; {REMEDY}")
        return files
    if path.name not in FILES:
        allowed, what = ", ".join(FILES), "not a file of a set" if path.exists() else "no such file or folder"
        raise UserError(f"{path}: {what}{nearest(path.name, FILES)}; allowed: {allowed}; {REMEDY}")
    if not path.is_file():
        others = [name for name in FILES if (path.parent / name).is_file()]
        remedy = f"there are: {', '.join(others)}" if others else "make a set with interleave data build --out DIR"
        raise UserError(f"{path}: no such file; {remedy}")
    return [path]


def parse_set_row(line: bytes, name: SetName) -> SftRow | RlRow:
    """The row of a line.  Raises ValueError saying what is wrong."""
    return parse_row(line, RlRow) if name == "critic_rl" else parse_row(line, SftRow)


def read_set_info(folder: Path) -> SetInfo | None:
    """The content of `set.json`; None where it is missing or damaged."""
    try:
        return SetInfo.model_validate_json((folder / INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
