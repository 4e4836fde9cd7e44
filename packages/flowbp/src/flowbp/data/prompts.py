"""Prompts: where they come from and in which order they are used."""

import json
from pathlib import Path
from typing import get_args

from imgen_common.errors import UserError, nearest
from imgen_common.files import numbered_lines
from imgen_common.streams import numpy_generator

BUILTIN = "builtin:shapes/"
BUILTIN_COUNT = 3000


def is_shapes_source(source: str) -> bool:
    """Whether a source's prompts are captions of the shapes world, which its verifier can judge."""
    return source.startswith(BUILTIN)


def load_prompts(source: str, key: str = "prompt", limit: int | None = None) -> list[str]:
    """The prompts of a source (see `DataConfig.prompts`), in order, at most `limit`.

    `builtin:shapes/SPLIT` gives captions with the categories in turn, 3000 unless `limit` says otherwise.
    Raises UserError if the source is missing, empty, not UTF-8 or without the named column.
    """
    if source.startswith("builtin:"):
        prompts = _builtin(source, limit or BUILTIN_COUNT)
    else:
        path = Path(source)
        if not path.exists():
            raise UserError(f"{source}: no such prompt file or dataset folder; give .txt, .jsonl or a dataset folder")
        prompts = _dataset(path, key) if path.is_dir() else _file(path, key)
    if not prompts:
        raise UserError(f"{source}: holds no prompt; give at least one")
    return prompts[:limit]


def _builtin(source: str, count: int) -> list[str]:
    from imgen_common.shapes.scene import Split, balanced_specs

    splits: dict[str, Split] = {BUILTIN + split: split for split in get_args(Split)}
    if source not in splits:
        raise UserError(f"{source}: unknown prompts{nearest(source, splits)}; allowed: {', '.join(splits)}")
    split = splits[source]
    return [spec.caption for spec in balanced_specs(count, numpy_generator(0, f"prompts-{split}"), split)]


def _file(path: Path, key: str) -> list[str]:
    found = numbered_lines(path)
    if path.suffix != ".jsonl":
        return [line for _, line in found]
    return [text for text in (_row(path, number, line, key) for number, line in found) if text]


def _row(path: Path, number: int, line: str, key: str) -> str:
    try:
        row = json.loads(line)
    except ValueError:
        raise UserError(f"{path}:{number}: not JSON; each line must be an object with {key!r}") from None
    if not isinstance(row, dict) or not isinstance(row.get(key), str):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{path}:{number}: no text under {key!r} (there is: {found}); set data.key")
    return row[key].strip()


def _dataset(path: Path, key: str) -> list[str]:
    from datasets import Dataset, DatasetDict, load_from_disk

    try:
        dataset: Dataset | DatasetDict = load_from_disk(str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: not a dataset folder (made by datasets' save_to_disk); give one, or a file") from None
    if isinstance(dataset, DatasetDict):
        raise UserError(f"{path}: holds several splits ({', '.join(dataset)}); give the folder of one of them")
    if key not in dataset.column_names:
        raise UserError(
            f"{path}: no column {key!r}{nearest(key, dataset.column_names)}; there are: "
            f"{', '.join(dataset.column_names)}; set data.key"
        )
    return [str(value).strip() for value in dataset[key] if str(value).strip()]


def prompt_indices(count: int, seed: int, first: int, number: int) -> list[int]:
    """Prompts of samples `first` ... `first + number - 1`: endless epochs over `count` prompts, each reshuffled."""
    samples = range(first, first + number)
    epochs = {sample // count for sample in samples}
    orders = {epoch: numpy_generator(seed, "prompt-order", epoch).permutation(count).tolist() for epoch in epochs}
    return [orders[sample // count][sample % count] for sample in samples]
