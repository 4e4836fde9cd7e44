"""What a benchmark is: items, what was made for them, the questions for the judge, and the figures."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from imgen_common.judging.questions import Question

Content = tuple[str | Path, ...]
"""Texts and image files, in order."""
Scores = Mapping[str, float]
"""The numbers of one item by their names; one that does not apply, or is missing, is not there."""


@dataclass(frozen=True)
class Item:
    """One item of a benchmark.

    content: what the generator is given: texts, and images in their places.  category: by which figures are grouped.
    row: the item as the official data has it, for questions.  root: the folder from which its paths count.
    """

    id: str
    content: Content
    category: str
    row: Mapping[str, Any] = field(default_factory=dict)
    root: Path = Path()


@dataclass(frozen=True)
class Output:
    """What was made for an item: texts and images in the order of the story."""

    content: Content

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts alone."""
        return tuple(part for part in self.content if isinstance(part, str))

    @property
    def images(self) -> tuple[Path, ...]:
        """The image files alone."""
        return tuple(part for part in self.content if isinstance(part, Path))


@dataclass(frozen=True)
class Prompts:
    """The words of a judge's questions by their names, with placeholders such as `{question}`.

    source: where they come from, for readers.  is_official: whether they are the authors' own; figures of other words
    cannot be compared with published ones.
    """

    texts: Mapping[str, str]
    source: str = "our own words"
    is_official: bool = False

    def answer_tokens(self, official: int, own: int) -> int:
        """About how many tokens an answer has: to the authors' words, which may ask for reasons, or to ours."""
        return official if self.is_official else own

    @property
    def hash(self) -> str:
        """The first 12 hex digits of the sha256 of all texts."""
        return hashlib.sha256(json.dumps(self.texts, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class OfficialJudge:
    """The judge of published figures: its model and settings of its requests; whether one shows several images, and
    whether questions have a system turn, for the check of any judge before images are made."""

    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    sees_several: bool = True
    has_system: bool = False


class Benchmark(Protocol):
    """One benchmark.  All methods are pure but for the files that they read and write."""

    name: str
    """As on the command line and in every file."""
    title: str
    """As in tables."""
    judge: OfficialJudge

    def load(self, data: Path) -> list[Item]:
        """The items of the official data on disk, in their order.

        Raises UserError that says which file or key is missing, which id is there twice, or which image cannot be
        read, and where the data comes from.
        """
        ...

    def read_prompts(self, repository: Path | None) -> Prompts:
        """The words of the questions: the authors', out of a copy of their repository, or None: our own.

        Raises UserError naming the file, and what is not in it as expected.
        """
        ...

    def questions(self, item: Item, output: Output, prompts: Prompts, answers: Mapping[str, Any]) -> Sequence[Question]:
        """What the judge is asked about an item.

        answers: values by the names of questions; called again with them until it asks for nothing that is not there,
        so that a question may depend on an answer.  A question that failed is in it with None.
        """
        ...

    def score(self, item: Item, answers: Mapping[str, Any], *, as_zero: bool) -> Scores:
        """The numbers of an item from the values of its answers; a missing or failed one is None or not there.

        as_zero: a failed answer counts as the worst; otherwise what needs it is left out.
        """
        ...

    def figures(self, rows: Sequence[tuple[Item, Scores]]) -> Mapping[str, float]:
        """The benchmark's figures, in the order in which a table shows them; those without any item are left out."""
        ...

    def read_outputs(self, folder: Path, items: Sequence[Item]) -> dict[str, Output]:
        """What others made, in the layout of the authors' own scorer, by item id; an item may be missing.

        Raises UserError for what is no such layout, or an image that cannot be read.
        """
        ...

    def write_outputs(self, outputs: Mapping[str, Output], items: Sequence[Item], folder: Path) -> None:
        """Writes that layout, so that the authors' scorer can be run on what we made."""
        ...
