"""What all benchmarks read in one way: items of data files, and our own judge prompts."""

import re
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from imgen_common.errors import UserError
from imgen_common.weights import check_pointer
from interleave.benchmarks.base import Item, Prompts
from interleave.datasets.files import RowError, read_items


def builtin_prompts(benchmark: str) -> Prompts:
    """Our own words for a benchmark, by the names of their files, without white space at the ends."""
    folder = resources.files("interleave.benchmarks.official") / "prompts" / benchmark
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    return Prompts({file.name.removesuffix(".txt"): file.read_text(encoding="utf-8").strip() for file in files})


def fill(template: str, **values: str) -> str:
    """A template with its places `{name}` filled, in one pass; all other braces, and those in values, stay."""
    places = re.compile(r"\{(" + "|".join(map(re.escape, values)) + r")\}")
    return places.sub(lambda place: values[place[1]], template)


def unique_items(files: Sequence[Path], make: Callable[[str, Any], Item], hint: str) -> list[Item]:
    """The items of JSON, JSON lines, parquet or arrow files, in their order.

    make: an item of its place and its value; raises UserError.  hint: what the user can do about bad data.
    Raises UserError for a file or an item that cannot be read, for an id that is there twice, and without any item.
    """
    items: dict[str, tuple[str, Item]] = {}
    try:
        for file in files:
            for where, value in read_rows(file):
                if isinstance(value, RowError):
                    raise value
                item = make(where, value)
                if item.id in items:
                    raise UserError(f"{where}: the id {item.id!r} is there twice, first in {items[item.id][0]}")
                items[item.id] = where, item
        if not items:
            raise UserError(f"{', '.join(map(str, files))}: no item in it")
    except UserError as error:
        raise UserError(f"{error}; {hint}") from None
    return [item for _, item in items.values()]


def read_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a data file with their places, those of a table with the columns that are null.

    A line that cannot be read is a RowError in place of its value.  Raises UserError for a file that cannot be read.
    """
    if file.suffix not in (".parquet", ".arrow"):
        yield from read_items(file)
        return
    import pyarrow
    from pyarrow import ipc, parquet

    check_pointer(file)
    try:
        batches = parquet.ParquetFile(file).iter_batches(64) if file.suffix == ".parquet" else ipc.open_stream(file)
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from ((f"{file}: row {number}", row) for number, row in enumerate(rows, 1))
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: a text that is not UTF-8
        raise UserError(f"{file}: not a {file.suffix[1:]} file that can be read ({error}); get it again") from None


def find_files(data: Path, patterns: Sequence[str], source: str) -> list[Path]:
    """A file itself; of a folder, the files of the first pattern that has any, by name.

    source: where the data comes from.  Raises UserError if there is none.
    """
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise UserError(f"{data}: no such file or folder; get {source} and give the folder that it is in")
    found = next((files for pattern in patterns if (files := sorted(data.glob(pattern)))), None)
    if found is None:
        raise UserError(f"{data}: has none of {', '.join(patterns)}; get {source} and give the folder that it is in")
    return found
