"""Reading files of other programs, and copying images beside a file."""

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError

from imgen_common.errors import UserError, one_line
from imgen_common.files import files_below, numbered_lines, read_text, write_atomic, writing
from imgen_common.images import decode
from imgen_common.tables import parse_json
from interleave.protocols import HashedImage
from interleave.storage.images import ImageStore

Model = TypeVar("Model", bound=BaseModel)
Made = TypeVar("Made")
WHITE = "white.png"
"""Name of the white image that the released code compares an image with that is made from its prompt alone."""
MAX_PARTS = 8
"""Parts of a path's longest end."""
BETWEEN = re.compile(r"[\s,]*")
"""What stands between two items of a JSON array."""
TRAIN = re.compile(r"(?<![a-z])train(?:ing)?(?![a-z])")
"""The word in the name of a file or folder of training rows."""


class RowError(UserError):
    """One row or record of a file cannot be read; those beside it may be good."""


@dataclass(frozen=True)
class ImageImporter:
    """Puts images into the store, each file once, and none from outside of `root`.

    A path of another machine, or one that counts from the folder in which a program was started, is found by its end:
    `/data/run/17_a_cat/step1_0.png` is `17_a_cat/step1_0.png` below `root`, or `step1_0.png` in `folder`.
    """

    root: Path
    images: ImageStore
    folder: Path | None = None
    """Where paths are looked for before `root`."""
    _imported: dict[Path, str] = field(default_factory=dict)
    _white: set[str] = field(default_factory=set)

    def import_image(self, given: str | Mapping[str, Any], where: str) -> str:
        """The id of an image: the file of that name, or the {"bytes", "path"} of a row of a parquet file.

        Raises RowError naming `where`.
        """
        if isinstance(given, Mapping):
            if isinstance(content := given.get("bytes"), bytes):
                return self._put(content, where)
            given = str(given.get("path"))
        path = self._find(given, where)
        if path not in self._imported:
            self._imported[path] = self._put(path, where)
        return self._imported[path]

    def white_like(self, image_id: str) -> str:
        """The id of a white image of the size of another, for files that leave out their own."""
        white = HashedImage.white(*self.images.get(image_id).image.size)
        self._white.add(white.id)
        return self.images.put(white)

    def attempt_images(self, source: str, target: str, is_first: bool, where: str) -> dict[str, Any]:
        """The image fields of an attempt; a first one with a white source was generated from its prompt alone."""
        after = self.import_image(target, where)
        before = self.import_source(source, after, is_first, where)
        is_new = is_first and before in self._white
        sources = () if is_new else (before,)
        return {"op": "t2i" if is_new else "edit", "source_ids": sources, "before_id": before, "image_id": after}

    def import_source(self, source: str, after: str, may_be_white: bool, where: str) -> str:
        """The id of the image before `after`; the white one may be missing, since the released code keeps it in the
        folder in which it is started."""
        try:
            return self.import_image(source, where)
        except RowError:
            if may_be_white and PureWindowsPath(source).name == WHITE:
                return self.white_like(after)
            raise

    def _put(self, source: Path | bytes, where: str) -> str:
        try:
            image = HashedImage.from_pil(decode(source))
        except UserError as error:
            raise RowError(f"{where}: {error}") from None
        if image.image.getextrema() == ((255, 255),) * 3:
            self._white.add(image.id)
        return self.images.put(image)

    def _find(self, name: str, where: str) -> Path:
        roots, leads_out = [self.root.resolve(), *_blobs(self.root)], False
        places = [(self.folder, 1), (self.root, 2)] if self.folder is not None else [(self.root, 2)]
        for base, shortest in places:
            for end in _ends(name, shortest):
                with contextlib.suppress(OSError, ValueError):  # no name of a file
                    path = (base / end).resolve()
                    if path.is_file() and any(map(path.is_relative_to, roots)):
                        return path
                    leads_out |= path.is_file()
        reason = "it leads out of the folder" if leads_out else "no such image"
        raise RowError(f"{where}: {one_line(name, 200)!r}: {reason}; images must lie in {self.root}")


def _blobs(folder: Path) -> Iterator[Path]:
    """Where the files of a folder in a cache of the hub are, which it links to."""
    for place in folder.absolute().parents:
        if place.name == "snapshots":
            yield place.with_name("blobs").resolve()


def _ends(name: str, shortest: int) -> Iterator[str]:
    """A path, then its ends of at least `shortest` parts, the longest first."""
    yield name
    parts = [part for part in PureWindowsPath(name).parts if part.strip("./\\") and ":" not in part][-MAX_PARTS:]
    for start in range(len(parts) - shortest + 1):
        yield "/".join(parts[start:])


def read_each(
    items: Iterable[tuple[str, Any]], make: Callable[[str, Any], Made], left_out: list[str] | None
) -> Iterator[Made]:
    """What `make` makes of each item, given its name and its value; in `left_out`, why an item is left out.

    left_out: None: the first RowError is raised instead.
    """
    for where, value in items:
        try:
            if isinstance(value, RowError):
                raise value
            made = make(where, value)
        except RowError as error:
            if left_out is None:
                raise
            left_out.append(str(error))
        else:
            yield made


def validate(model: type[Model], value: object, where: str) -> Model:
    """`value` as a `model`.  Raises RowError with the first mistake."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise RowError(f"{where}: {describe_mistake(error)}") from None


def check_json(row: Model, where: str) -> Model:
    """`row`, if a line of JSON can hold it.  Raises RowError for text that is not Unicode, or keys nested too deep."""
    try:
        type(row).model_validate_json(row.model_dump_json().encode())
    except (PydanticSerializationError, ValueError, RecursionError) as error:
        reason = one_line(str(error), 120)
        raise RowError(f"{where}: cannot be kept as JSON ({reason}); correct or remove the key that holds it") from None
    return row


def describe_mistake(error: ValidationError) -> str:
    """The first mistake in words: the key, and what is wrong with its value."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{f'{place}: ' if place else ''}{first['msg'].removeprefix('Value error, ')}"


def read_json(file: Path) -> Any:
    """The value in a JSON file.  Raises RowError."""
    try:
        return parse_json(read_text(file), str(file))
    except UserError as error:
        raise RowError(str(error)) from None


def read_items(file: Path) -> Iterator[tuple[str, Any]]:
    """The items of a JSON list, of JSON lines or of a parquet file, whatever its suffix, each with its name.

    Those of a folder are the rows of its parquet files, of those named `train` where there are any.

    A line that cannot be read is a RowError in place of its value.  Raises UserError for a file that cannot be read.
    """
    if file.is_dir():
        for shard in _shards(file):
            yield from read_items(shard)
        return
    if _starts_with(file, b"PAR1"):
        yield from ((f"{file}: row {number}", row) for number, row in enumerate(_parquet_rows(file), 1))
        return
    text = read_text(file).strip()
    if not text:
        raise UserError(f"{file}: is empty")
    if text.startswith("["):
        pieces = ((f"{file}: item {number}", item) for number, item in enumerate(_array(text, file), 1))
    else:
        pieces = ((f"{file}:{number}", line) for number, line in numbered_lines(file))
    for where, piece in pieces:
        try:
            yield where, parse_json(piece, where)
        except UserError as error:
            yield where, RowError(str(error))


def _shards(folder: Path) -> list[Path]:
    """Its parquet files, where any is or lies in what is named `train`, only those, as `datasets` reads a folder.

    Raises UserError for none, and for those of several folders, whose rows may be of other kinds.
    """
    found = files_below(folder, "*.parquet")
    shards = [file for file in found if TRAIN.search(file.relative_to(folder).as_posix().lower())] or found
    if not shards:
        raise UserError(f"{folder}: is a folder without .parquet files; give the file that holds the rows")
    places = sorted({str(file.parent) for file in shards})
    if len(places) > 1:
        raise UserError(f"{folder}: has rows in several folders ({', '.join(places[:4])}); give one folder or file")
    return shards


def _starts_with(file: Path, magic: bytes) -> bool:
    try:
        with file.open("rb") as content:
            return content.read(len(magic)) == magic
    except OSError:
        return False  # `read_text` says why


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows, without the keys that are null."""
    import pyarrow
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=64):
            for row in batch.to_pylist():
                yield {key: value for key, value in row.items() if value is not None}
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: a text that is not UTF-8
        raise UserError(f"{file}: not a parquet file that can be read ({error})") from None


def _array(text: str, file: Path) -> list[str]:
    """The items of a JSON array, each as it stands, so that one that cannot be read does not stop the others."""
    try:
        count, decoder = len(json.loads(text)), json.JSONDecoder()
    except (ValueError, RecursionError) as error:
        raise RowError(f"{file}: not JSON ({error})") from None
    items, end = list[str](), 1
    for _ in range(count):
        start = BETWEEN.match(text, end).end()  # type: ignore[union-attr]
        end = decoder.raw_decode(text, start)[1]
        items.append(text[start:end])
    return items


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
