"""Prompts from rows of data, with their source images where rows have some."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from flowbp.config import DataConfig
from flowbp.data.edits import Edit, Source
from imgen_common.errors import UserError, is_blank, nearest, one_line
from imgen_common.images import content_hash, decode
from imgen_common.streams import numpy_generator
from imgen_common.tables import check_cell, check_no_table, check_no_token, check_texts, describe_type, image_path

if TYPE_CHECKING:
    from datasets import Dataset

    from imgen_common.shapes.edits import Edit as ShapesEdit
    from imgen_common.shapes.scene import Split


def read_prompts(rows: Sequence[tuple[str, Mapping[str, Any]]], data: DataConfig, folder: Path) -> list[str]:
    """The prompts of rows, each with its place for messages; paths of images count from `folder`.

    Every image is read once, to know that it can be.  Raises UserError naming the row otherwise.
    """
    if not any(data.images in row or data.answer in row for _, row in rows):
        return [row[data.key].strip() for _, row in rows]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda row: _prompt(row[0], row[1], data, folder), rows))


def _prompt(where: str, row: Mapping[str, Any], data: DataConfig, folder: Path) -> str:
    text, given = row[data.key].strip(), None if data.images is None else row.get(data.images)
    try:
        files = [_stored(value, folder) for value in _values(given)]
        sources = [Source(*_measure(file), partial(_load, given, k, folder)) for k, file in enumerate(files)]
    except UserError as error:
        raise UserError(f"{where}: {data.images}: {error}; data.images=null reads no images") from None
    answer = "" if data.answer is None else _said(where, row, data.answer)
    if answer.lower() != "none":  # which is an answer
        check_cell(answer, f"{where}: {data.answer}", "leave the cell empty")
    if not sources:
        return Edit(text, [], answer=answer) if answer else text
    captions = [_said(where, row, column) for column in (data.caption, data.source_caption)]
    for column, caption in zip((data.caption, data.source_caption), captions, strict=True):
        check_cell(caption, f"{where}: {column}", "leave the cell empty")
        check_no_token(caption, f"{where}: {column}")
    return Edit(text, sources, captions[0], captions[1], answer)


def _said(where: str, row: Mapping[str, Any], column: str) -> str:
    """The text in a column; empty where there is none."""
    text = row.get(column)
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: {column}: must be a text, got {describe_type(text)}")
    return "" if text is None or is_blank(text) else text.strip()


def _values(given: Any) -> list[Any]:
    """What a row has in its column of images; read anew where a dataset holds it, so that none is kept in memory."""
    found = given() if callable(given) else given
    found = [found] if isinstance(found, str | dict) else found
    if found is None:
        return []
    if not isinstance(found, list):
        raise UserError(f"must be the path of an image or a list, got {describe_type(found)}")
    return found


def _stored(value: object, folder: Path) -> bytes | Path:
    """The file of an image, at a path or as `datasets` stores it."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):
        return bytes(value["bytes"])
    if isinstance(value, dict) and isinstance(value.get("bytes"), str):
        raise UserError("has the bytes of an image as a text; give its path, or a folder of datasets' save_to_disk")
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str) or is_blank(path):
        what = "a text without a name in it" if isinstance(path, str) else describe_type(path)
        raise UserError(f"must be the path of an image, got {what}")
    return image_path(folder, path)


def _load(given: Any, index: int, folder: Path) -> Image.Image:
    return decode(_stored(_values(given)[index], folder))


def edits_of_files(instructions: Sequence[str], images: Sequence[Path]) -> list[str]:
    """Edits of the same image files; the instructions themselves where there are none.

    Raises UserError for an empty instruction, one that is the name of a file of prompts, and a file that is no image.
    """
    if blank := [number for number, text in enumerate(instructions, 1) if is_blank(text)]:
        raise UserError(f"prompt {blank[0]} of {len(instructions)} is empty; say what to draw")
    for text in instructions:
        check_no_table(text, "give its prompts one by one, or take flowbp benchmark --prompts")
    sources = [Source(*_measure(image), partial(decode, image)) for image in images]
    return [Edit(text, sources) if sources else text for text in instructions]


def _measure(stored: bytes | Path) -> tuple[str, tuple[int, int]]:
    """Digest and (height, width) of an image; of a file that has not changed they are known."""
    try:
        about = stored.stat() if isinstance(stored, Path) else None
    except (OSError, ValueError):  # `decode` says what is wrong
        about = None
    if about is None or isinstance(stored, bytes):
        return _describe(decode(stored))
    return _measure_file(stored, about.st_mtime_ns, about.st_size)


@cache
def _measure_file(path: Path, mtime_ns: int, size: int) -> tuple[str, tuple[int, int]]:
    return _describe(decode(path))


def _describe(image: Image.Image) -> tuple[str, tuple[int, int]]:
    return content_hash(image), (image.height, image.width)


def read_dataset(path: Path, data: DataConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a folder of datasets' save_to_disk; images are functions that read them.

    Raises UserError for another or a damaged folder, or one without the column of prompts.
    """
    from datasets import Dataset, DatasetDict, load_from_disk

    try:
        dataset: Dataset | DatasetDict = load_from_disk(str(path)).with_format(None)
    except FileNotFoundError as error:
        what = "not a dataset folder (made by datasets' save_to_disk); give one, or a file"
        if (path / "state.json").is_file():
            what = f"damaged dataset folder: {Path(error.filename or 'a file').name} is missing; copy it again"
        raise UserError(f"{path}: {what}") from None
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{path}: empty or damaged dataset folder ({one_line(str(error))}); save it again") from None
    if isinstance(dataset, DatasetDict):
        raise UserError(f"{path}: holds several splits ({', '.join(dataset)}); give the folder of one of them")
    names = dataset.column_names
    if data.key not in names:
        raise UserError(
            f"{path}: no column {data.key!r}{nearest(data.key, names)}; there are: {', '.join(names)}; "
            + set_key(data.key)
        )
    texts = (data.key, data.caption, data.source_caption, data.answer)
    columns = {name: _column(dataset, path, name) for name in texts if name is not None and name in names}
    if data.images is not None and data.images in names:
        stored = _without_decoding(dataset.select_columns([data.images]), data.images)
        columns[data.images] = [partial(_read_images, stored, path, data.images, i) for i in range(len(stored))]
    rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    return check_texts(((f"{path}: row {number}", row) for number, row in enumerate(rows, 1)), data.key)


def set_key(key: str) -> str:
    """What helps where a file has no such column; where it was set, perhaps for another file, that all must have it."""
    if key == DataConfig().key:
        return "set data.key"
    return "set data.key, which counts for all files of prompts, or rename the column"


def _column(dataset: "Dataset", path: Path, name: str) -> list[Any]:
    try:
        return list(dataset[name])
    except (OSError, ValueError) as error:  # a text that is not UTF-8
        raise UserError(f"{path}: damaged column {name!r} ({one_line(str(error))}); save the dataset again") from None


def _without_decoding(dataset: "Dataset", name: str) -> "Dataset":
    """The dataset with images as they are stored: our own bounded reader decodes them."""
    from datasets import Image as ImageFeature
    from datasets import LargeList, List

    kind = dataset.features[name]
    if isinstance(kind, ImageFeature):
        return dataset.cast_column(name, ImageFeature(decode=False))
    if isinstance(kind, List | LargeList) and isinstance(kind.feature, ImageFeature):
        return dataset.cast_column(name, type(kind)(ImageFeature(decode=False)))
    return dataset


def _read_images(dataset: "Dataset", path: Path, name: str, row: int) -> Any:
    try:
        return dataset[row][name]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged column {name!r} ({one_line(str(error))}); save the dataset again") from None


@cache
def shapes_edits(split: "Split", count: int) -> tuple[Edit, ...]:
    """Edits of the shapes world, whose results belong to the split, their kinds in turn."""
    from imgen_common.shapes.edits import sample_edit
    from imgen_common.shapes.steps import EDIT_KINDS

    rng = numpy_generator(0, f"edits-{split}")
    found = (sample_edit(rng, split, kind) for kind in islice(cycle(EDIT_KINDS), count))
    return tuple(Edit(one.instruction, [_drawn(one)], one.caption, one.source_caption, shapes=one) for one in found)


def _drawn(edit: "ShapesEdit") -> Source:
    return Source(*_describe(_draw_before(edit)), partial(_draw_before, edit))


def _draw_before(edit: "ShapesEdit") -> Image.Image:
    import numpy as np

    from imgen_common.shapes.render import render

    return Image.fromarray((render(edit.before) * 255).round().astype(np.uint8).transpose(1, 2, 0))
