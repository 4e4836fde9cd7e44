"""Reading what others wrote, and writing pictures beside a file."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from imgen_common.errors import UserError
from imgen_common.files import numbered_lines, read_text, write_atomic, writing
from imgen_common.images import decode
from interleave.protocols import HashedImage
from interleave.storage.images import ImageStore

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Reader:
    """Takes pictures into the store, each file once, none from outside of `root`."""

    root: Path
    pictures: ImageStore
    folder: Path | None = None
    """Where paths are looked for before `root`."""
    _taken: dict[Path, str] = field(default_factory=dict)
    _white: set[str] = field(default_factory=set)

    def take(self, name: str, where: str) -> str:
        """The id of the picture in the file of that name.  Raises UserError naming `where`."""
        path = self._find(name, where)
        if path not in self._taken:
            try:
                picture = HashedImage.from_pil(decode(path))
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            self._taken[path] = self.pictures.put(picture)
            if picture.image.getextrema() == ((255, 255),) * 3:
                self._white.add(picture.id)
        return self._taken[path]

    def edit(self, source: str, target: str, is_first: bool, where: str) -> dict[str, Any]:
        """What an attempt says of its pictures; the first one of a white canvas was made from nothing."""
        before, after = self.take(source, where), self.take(target, where)
        is_new = is_first and before in self._white
        sources = () if is_new else (before,)
        return {"op": "t2i" if is_new else "edit", "source_ids": sources, "before_id": before, "image_id": after}

    def _find(self, name: str, where: str) -> Path:
        root = self.root.resolve()
        for base in (self.folder, self.root):
            try:
                path = ((base or self.root) / name).resolve()
                inside, there = path.is_relative_to(root), path.is_file()
            except (OSError, ValueError):
                inside, there = True, False  # no name of a file
            if inside and there:
                return path
        reason = "there is no such picture" if inside else "it leads out of the folder"
        raise UserError(f"{where}: {name!r}: {reason}; pictures must lie in {self.root}")


def checked(model: type[Model], value: object, where: str) -> Model:
    """`value` as a `model`.  Raises UserError with the first mistake."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}: {f'{place}: ' if place else ''}{first['msg']}") from None


def json_file(file: Path) -> Any:
    """The value in a JSON file.  Raises UserError."""
    return _parsed(read_text(file), str(file))


def json_list(file: Path) -> Iterator[tuple[str, object]]:
    """The items of a JSON list, each with how to call it.  Raises UserError."""
    value = json_file(file)
    if not isinstance(value, list):
        raise UserError(f"{file}: must be a JSON list, got a {type(value).__name__}")
    return ((f"{file}: item {number}", item) for number, item in enumerate(value, 1))


def json_lines(file: Path) -> Iterator[tuple[str, object]]:
    """The values of a file of JSON lines, each with how to call it.  Raises UserError."""
    for number, line in numbered_lines(file):
        yield f"{file}:{number}", _parsed(line, f"{file}:{number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None


def write_json(file: Path, value: Mapping[str, Any] | Sequence[Any]) -> Path:
    """Write a JSON file, whole or not at all; its path."""
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json_text(value, indent=1))
    return file


def json_text(value: Mapping[str, Any] | Sequence[Any], indent: int | None = None) -> str:
    """`value` as JSON, with a line's end; half a surrogate pair is written as its escape."""
    text = json.dumps(value, ensure_ascii=False, indent=indent) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()


def beside(file: Path, name: str, image_id: str, pictures: ImageStore) -> str:
    """`name`, once the picture is there, seen from the file's folder."""
    pictures.copy(image_id, file.parent / name)
    return name
