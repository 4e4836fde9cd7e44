"""Answers on disk: one JSON line each, with the judge's own words, appended the moment it is complete.

Processes that share the work write a file each in one folder, and read all of them.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from imgen_common.errors import UserError
from imgen_common.files import append_line, lock, read_json_lines, whole_lines, writing

PATTERN = "answers*.jsonl"
FINAL = ("refused", "unreadable")
"""Failures of the question itself; all others are of the moment, and the question is asked again by the next run."""


class Answer(BaseModel):
    """What a judge said to one question of one item.

    key: what it depends on (`Question.key`).  shown: what another judge would see, too (`Question.shown`).  raws: the
    words of every call, in order.  value: what was read in the last one; None where the question failed: then
    `error_kind` says how (`unreadable`: none of the answers was of the form that was asked for; others as of
    `JudgeError`), and `error` in words.  prompts: hash of the words of the benchmark's questions.  date: of this line,
    UTC, as ISO 8601 writes it.  num_calls: 0 where an equal question had been answered.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    item: str
    question: str
    key: str
    shown: str = ""
    judge: str
    prompts: str
    date: str
    raws: tuple[str, ...] = ()
    value: Any = None
    error: str | None = None
    error_kind: str | None = None
    num_calls: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0

    @property
    def is_final(self) -> bool:
        """Whether asking again is of no use."""
        return self.error_kind is None or self.error_kind in FINAL


def read_answers(folder: Path) -> list[Answer]:
    """All answers in a folder, from the oldest to the newest; of an item's question the newest, whichever its file.

    Lines that cannot be read, as a kill leaves one, are left out.
    """
    found = [answer for file in sorted(folder.glob(PATTERN)) for answer, _ in read_json_lines(file, Answer)]
    found.sort(key=lambda answer: (answer.date, answer.is_final))  # of one second, a failure of the moment comes first
    return list({(answer.item, answer.question): answer for answer in found}.values())


class AnswerLog:
    """The answers of a folder, and the file to which this process adds its own."""

    def __init__(self, folder: Path, part: str = "") -> None:
        """part: what tells the files of processes that share the work apart, such as `2-of-8`."""
        self._file = folder / f"answers{f'.{part}' if part else ''}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._read()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other processes from the file: they would ask the same.  Raises UserError if one has it."""
        with writing(self._file):
            file = self._file.open("ab")
        with file:
            if not lock(file):
                raise UserError(
                    f"{self._file}: another process asks a judge and writes its answers there; wait for it to end, or "
                    "give each process a part of its own"
                )
            os.truncate(self._file, sum(map(len, whole_lines(self._file))))  # a kill may have left half a line
            self._read()
            yield

    def _read(self) -> None:
        kept = [answer for answer in read_answers(self._file.parent) if answer.is_final]
        self._by_key = {answer.key: answer for answer in kept}
        self._own = {(answer.item, answer.question): answer for answer in kept}

    def find(self, key: str, item: str = "", question: str = "") -> Answer | None:
        """The answer to an equal question, that of the item's own if there is one; None where there is none, or it
        failed for a moment only."""
        own = self._own.get((item, question))
        return own if own is not None and own.key == key else self._by_key.get(key)

    def add(self, answer: Answer) -> None:
        """Keeps an answer.  Raises UserError on a full disk."""
        if answer.is_final:
            self._by_key[answer.key] = self._own[answer.item, answer.question] = answer
        append_line(self._file, answer.model_dump_json())


def count_failures(answers: Mapping[str, Mapping[str, Answer]]) -> Counter[str]:
    """Of how many items a question failed, by the kind of the first failure."""
    failures = (next((a.error_kind for a in one.values() if a.error_kind), None) for one in answers.values())
    return Counter(kind for kind in failures if kind is not None)


def by_item(answers: Iterable[Answer]) -> dict[str, dict[str, Answer]]:
    """Answers by item and question."""
    found: dict[str, dict[str, Answer]] = {}
    for answer in answers:
        found.setdefault(answer.item, {})[answer.question] = answer
    return found
