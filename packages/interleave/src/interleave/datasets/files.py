"""Reading files of other programs, and copying images beside a file."""

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
class ImageImporter:
    """Puts images into the store, each file once, and none from outside of `root`."""

    root: Path
    images: ImageStore
    folder: Path | None = None
    """Where paths are looked for before `root`."""
    _imported: dict[Path, str] = field(default_factory=dict)
    _white: set[str] = field(default_factory=set)

    def import_image(self, name: str, where: str) -> str:
        """The id of the image in the file of that name.  Raises UserError naming `where`."""
        path = self._find(name, where)
        if path not in self._imported:
            try:
                image = HashedImage.from_pil(decode(path))
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            self._imported[path] = self.images.put(image)
            if image.image.getextrema() == ((255, 255),) * 3:
                self._white.add(image.id)
        return self._imported[path]

    def attempt_images(self, source: str, target: str, is_first: bool, where: str) -> dict[str, Any]:
        """The image fields of an attempt; a first one with a white source was generated from its prompt alone."""
        before, after = self.import_image(source, where), self.import_image(target, where)
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
        reason = "no such image" if inside else "it leads out of the folder"
        raise UserError(f"{where}: {name!r}: {reason}; images must lie in {self.root}")


def validate(model: type[Model], value: object, where: str) -> Model:
    """`value` as a `model`.  Raises UserError with the first mistake."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}: {f'{place}: ' if place else ''}{first['msg']}") from None


def read_json(file: Path) -> Any:
    """The value in a JSON file.  Raises UserError."""
    return _parse_json(read_text(file), str(file))


def read_json_list(file: Path) -> Iterator[tuple[str, object]]:
    """The items of a JSON list, each with its name for messages.  Raises UserError."""
    value = read_json(file)
    if not isinstance(value, list):
        raise UserError(f"{file}: must be a JSON list, got a {type(value).__name__}")
    return ((f"{file}: item {number}", item) for number, item in enumerate(value, 1))


def read_json_lines(file: Path) -> Iterator[tuple[str, object]]:
    """The values of a file of JSON lines, each with its name for messages.  Raises UserError."""
    for number, line in numbered_lines(file):
        yield f"{file}:{number}", _parse_json(line, f"{file}:{number}")


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from None


def write_json(file: Path, value: Mapping[str, Any] | Sequence[Any]) -> Path:
    """Writes a JSON file atomically; returns its path."""
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, to_json(value, indent=1))
    return file


def to_json(value: Mapping[str, Any] | Sequence[Any], indent: int | None = None) -> str:
    """`value` as JSON, with a line's end; half a surrogate pair is written as its escape."""
    text = json.dumps(value, ensure_ascii=False, indent=indent) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()


def copy_image(file: Path, name: str, image_id: str, images: ImageStore) -> str:
    """Copies an image to `name` beside `file`; returns `name`."""
    images.copy(image_id, file.parent / name)
    return name
