"""One row of a set in a form that people can read."""

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgen_common.errors import UserError
from interleave.agents.prompts import TemplateRef, load_template, render_critic
from interleave.datasets.check import FILES, find_row_files, parse_set_row, read_set_info
from interleave.datasets.rows import SftRow, placeholder_image, read_lines
from interleave.protocols import Message
from interleave.storage.images import IMAGES, ImageStore


@dataclass(frozen=True)
class ReadableRow:
    """A row of a set: texts and paths of images as the model reads them, the answer to learn (None in a row for
    reinforcement learning), and the other fields of the row."""

    prompt: tuple[str | Path, ...]
    answer: str | None
    known: dict[str, Any]

    def lines(self) -> Iterator[str]:
        """Lines for a terminal, which no character of a text can rewrite."""
        number = 0
        for part in self.prompt:
            if isinstance(part, Path):
                number += 1
                yield f"[image {number}: {part}{'' if part.is_file() else ', which is missing'}]"
            else:
                yield _visible(part)
        if self.answer is not None:
            yield f"--- answer\n{_visible(self.answer)}"
        if self.known:
            yield f"--- known\n{_visible(json.dumps(self.known, ensure_ascii=False))}"

    def as_json(self) -> dict[str, Any]:
        """JSON."""
        prompt = [{"image": str(part)} if isinstance(part, Path) else {"text": part} for part in self.prompt]
        return {"prompt": prompt, "answer": self.answer, "known": self.known}


def read_row(path: Path, number: int, template: TemplateRef | None = None) -> ReadableRow:
    """The row in line `number`, counted from 1, of a set's file.

    template: for a row of critic_rl, which holds no prompt; None: the one that the set was built for.
    Raises UserError if there is no such row, it cannot be read, or no template is known.
    """
    if path.is_dir():
        raise UserError(f"{path}: give one of its files: {', '.join(file.name for file in find_row_files(path))}")
    find_row_files(path)
    name, _ = FILES[path.name]
    lines = dict(read_lines(path))
    if number not in lines:
        what = f"line {number} is blank" if number < max(lines, default=0) else f"no row {number}; it has {len(lines)}"
        raise UserError(f"{path}: {what}")
    try:
        row = parse_set_row(lines[number], name)
    except ValueError as error:
        raise UserError(f"{path}:{number}: {error}") from None
    store = ImageStore(path.parent / IMAGES)
    if isinstance(row, SftRow):
        known: dict[str, Any] = {"trajectory_id": row.trajectory_id} if row.trajectory_id else {}
        return ReadableRow(_with_paths(row.message(placeholder_image), store), row.completion, known | dict(row.extra))
    if template is None:
        info = read_set_info(path.parent)
        if info is None or "critic" not in info.templates:
            raise UserError(f"{path}: its set.json names no template of the critic; give --template NAME")
        template = info.templates["critic"]
    message = render_critic(load_template(template), row.critic_input(placeholder_image))
    generated = "from the prompt alone" if row.is_t2i else "by editing image 1"
    known = {"generated": generated, "evaluation": row.evaluation.model_dump(mode="json"), **row.extra}
    return ReadableRow(_with_paths(message, store), None, known)


def _with_paths(message: Message, store: ImageStore) -> tuple[str | Path, ...]:
    return tuple(part if isinstance(part, str) else store.path(part.id) for part in message)


def _visible(value: str) -> str:
    """`value` with control and hidden characters shown by number, as ⟨U+202E⟩; line breaks stay."""
    return "".join(
        f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c != "\n" else c for c in value
    )
