"""One row of a set as a person reads it."""

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from imgen_common.errors import UserError
from interleave.agents.prompts import load_template, render_critic
from interleave.datasets.check import FILES, files_of, info_of, row_of
from interleave.datasets.rows import RlRow, SftRow
from interleave.protocols import Message
from interleave.storage.images import IMAGES, ImageStore


@dataclass(frozen=True)
class Shown:
    """What a model reads, texts and paths of pictures in order; the answer it is taught (None: it finds its own); and
    what else the row knows."""

    reads: tuple[str | Path, ...]
    answer: str | None
    known: dict[str, Any]

    def lines(self) -> Iterator[str]:
        """For a terminal: nothing in a text can rewrite it."""
        number = 0
        for part in self.reads:
            if isinstance(part, Path):
                number += 1
                yield f"[picture {number}: {part}{'' if part.is_file() else ', which is missing'}]"
            else:
                yield _visible(part)
        if self.answer is not None:
            yield f"--- answer\n{_visible(self.answer)}"
        if self.known:
            yield f"--- known\n{_visible(json.dumps(self.known, ensure_ascii=False))}"

    def as_json(self) -> dict[str, Any]:
        """For a machine."""
        reads = [{"picture": str(part)} if isinstance(part, Path) else {"text": part} for part in self.reads]
        return {"reads": reads, "answer": self.answer, "known": self.known}


def shown(path: Path, number: int, template_name: str | None = None) -> Shown:
    """Row `number`, counted from 1, of a set's file.

    template_name: of a reinforcement row, which holds no prompt; None: the one that the set was built for.
    Raises UserError if there is no such row, it cannot be read, or no template is known.
    """
    if path.is_dir():
        raise UserError(f"{path}: give one of its files: {', '.join(file.name for file in files_of(path))}")
    files_of(path)
    name, _ = FILES[path.name]
    with path.open("rb") as lines:
        line = next(islice(lines, number - 1, number), None)
    if line is None:
        with path.open("rb") as lines:
            raise UserError(f"{path}: no row {number}; it has {sum(1 for _ in lines)}")
    try:
        row = row_of(line, name)
    except ValueError as error:
        raise UserError(f"{path}:{number}: {error}") from None
    store = ImageStore(path.parent / IMAGES)
    if isinstance(row, SftRow):
        known = {"trajectory_id": row.trajectory_id} if row.trajectory_id else {}
        reads = [
            row.texts[0],
            *(x for pair in zip(map(store.path, row.image_ids), row.texts[1:], strict=True) for x in pair),
        ]
        return Shown(tuple(part for part in reads if part != ""), row.completion, {**known, **row.extra})
    return Shown(_reads(row, store, template_name or _template(path)), None, _known(row))


def _template(path: Path) -> str:
    info = info_of(path.parent)
    if info is None or "critic" not in info.templates:
        raise UserError(f"{path}: it does not say for which template it was built; give --template NAME")
    return info.templates["critic"]


def _reads(row: RlRow, store: ImageStore, name: str) -> tuple[str | Path, ...]:
    message: Message = render_critic(load_template(name), row.named())
    return tuple(part if isinstance(part, str) else store.path(part.id) for part in message)


def _known(row: RlRow) -> dict[str, Any]:
    drawn = "from words alone" if row.is_t2i else "by editing picture 1"
    return {"drawn": drawn, "evaluation": row.evaluation.model_dump(mode="json"), **row.extra}


def _visible(value: str) -> str:
    """`value` with characters that a terminal obeys or hides shown by number, as ⟨U+202E⟩; lines stay lines."""
    return "".join(
        f"⟨U+{ord(c):04X}⟩" if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c != "\n" else c for c in value
    )
