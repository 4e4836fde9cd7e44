"""What a resumed run has in common with the one that was started: its configuration, and its data and models by their
hashes."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from imgen_common import hub, weights
from imgen_common.config import Config, read_yaml, with_json_files
from imgen_common.errors import UserError, warn_once
from imgen_common.files import read_json, write_atomic
from imgen_common.run_folder.find import CONFIG

FIRST_CONFIG = "config-at-start.yaml"
"""File of a run folder with the configuration that it was started with, by which an edit of the other is noticed."""
DATA = "data.json"
WHOLE_FILE, BLOCK, STRIDE = 2**26, 2**16, 2**22
"""Bytes of the largest file that `sample_file` reads whole, of one reading, and from one to the next in larger files: a
layer is larger, so that none can differ unseen."""


class DataHash(BaseModel):
    """Number of rows, and a hash of them in their order."""

    rows: int
    sha256: str


class DataHashes(BaseModel):
    """The content of `data.json`: what each key of the configuration named."""

    data: dict[str, DataHash]


def hash_rows(rows: Iterable[str]) -> DataHash:
    """The hash of rows given as texts."""
    digests = [hashlib.sha256(row.encode("utf-8", "surrogatepass")).digest() for row in rows]
    return DataHash(rows=len(digests), sha256=hashlib.sha256(b"".join(digests)).hexdigest())


def hash_file(path: Path) -> DataHash:
    """The hash of a file, such as an adapter, as one row."""
    with path.open("rb") as file:
        return DataHash(rows=1, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def hash_weights(files: Iterable[Path]) -> DataHash:
    """The hash of a model's files, as one row: of their names, their sizes and what `sample_file` reads of each."""
    found = hash_rows(f"{file.name} {file.stat().st_size} {sample_file(file)}" for file in files)
    return found.model_copy(update={"rows": 1})


def hash_model(name: str, ref: str) -> dict[str, DataHash]:
    """Hashes of the model that `ref` names: of its weights, of what describes it and its tokenizers, and of the head of
    a reward, by `name`."""
    folder = hub.resolve(ref)
    index = folder / "model_index.json"
    parts = [folder / part for part in sorted(weights.read_json(index))] if index.exists() else [folder]
    described = [file for part in parts for kind in hub.DESCRIPTION_FILES for file in sorted(part.glob(f"[!.]{kind}"))]
    described += [index] if index.exists() else []
    found = {name: hash_weights(hub.model_files(folder)), f"the configuration of {name}": hash_weights(described)}
    head = folder / weights.HEAD_FILE
    return found | ({f"the head of {name}": hash_file(head)} if head.exists() else {})


def hash_adapter(name: str, file: Path) -> dict[str, DataHash]:
    """Hashes of an adapter, and of PEFT's description beside it, by `name`."""
    described = file.with_name(weights.ADAPTER_CONFIG)
    return {name: hash_file(file)} | (
        {f"the configuration of {name}": hash_file(described)} if described.exists() else {}
    )


def fingerprint(ref: str, adapters: Sequence[Path] = ()) -> str:
    """Of the files of a model and of adapters: changes where they change, and is the same on every machine."""
    hashes = [*hash_model("model", ref).values(), *map(hash_file, adapters)]
    return hashlib.sha256(" ".join(found.sha256 for found in hashes).encode()).hexdigest()[:16]


def sample_file(file: Path) -> str:
    """A hash of a file: of all of it, or of `BLOCK` bytes in every `STRIDE` and the last ones of a large one."""
    size, found = file.stat().st_size, hashlib.blake2b()
    stride = STRIDE if size > WHOLE_FILE else BLOCK
    with file.open("rb") as stream:
        for start in (*range(0, size, stride), max(0, size - BLOCK)):
            stream.seek(start)
            found.update(stream.read(BLOCK))
    return found.hexdigest()


def record_data(run: Path, data: Mapping[str, DataHash]) -> None:
    """Keeps the hashes with the run."""
    write_atomic(run / DATA, DataHashes(data=dict(data)).model_dump_json(indent=1) + "\n")


def recorded_data(run: Path) -> Mapping[str, DataHash]:
    """The hashes that are kept with the run; none with one of an earlier version."""
    return read_json(run / DATA, DataHashes).data if (run / DATA).exists() else {}


def check_data(run: Path, data: Mapping[str, DataHash]) -> None:
    """Raises UserError if the data is not that which the run was started with.

    A run of an earlier version, which recorded none, passes with a warning.
    """
    if not (run / DATA).exists():
        warn_once(f"{run}: has no {DATA} (made by an earlier version), so it is not checked that its data is the same")
        return
    recorded = recorded_data(run)
    for key, now in data.items():
        if (before := recorded.get(key)) is not None and before != now:
            counts = f" ({before.rows} rows then, {now.rows} now)" if before.rows != now.rows else ""
            raise UserError(f"{run}: {key} has changed since the run was started{counts}; restore it, or start anew")


def extend_data(run: Path, data: Mapping[str, DataHash]) -> None:
    """As `check_data`, and keeps the hashes under new keys with the run."""
    check_data(run, data)
    if (run / DATA).exists():
        record_data(run, {**data, **recorded_data(run)})


def check_config(run: Path, config: Config, may_differ: Collection[str]) -> None:
    """Raises UserError unless a run has `config`, and the run's file was not edited but in keys that may differ."""
    _compare(run / CONFIG, config, may_differ)
    if (run / FIRST_CONFIG).exists():  # a run of an earlier version has none
        try:
            _compare(run / FIRST_CONFIG, config, may_differ)
        except UserError as error:
            raise UserError(f"{run / CONFIG}: edited since the run was started, by {FIRST_CONFIG}: {error}") from None


def moved_models(run: Path, config: Config, names: Mapping[str, str]) -> list[str]:
    """Keys of models and other files that lie elsewhere than a run says, and of which it has hashes (`check_data`).

    names: what the hashes are called, by the keys.
    """
    now, recorded = leaves(config.model_dump(mode="json")), recorded_data(run)
    sides = [leaves(read_yaml(file)) for file in (run / CONFIG, run / FIRST_CONFIG) if file.exists()]
    hashed = [key for key, name in names.items() if name in recorded and now.get(key) is not None]
    return [key for key in hashed if any(was.get(key) not in (None, now[key]) for was in sides)]


def _compare(file: Path, config: Config, may_differ: Collection[str]) -> None:
    """Raises UserError unless a file has `config`; a key that it lacks is of a later version, and was default."""
    old, new = leaves(with_json_files(type(config), read_yaml(file))), leaves(config.model_dump(mode="json"))
    changed = leaves(config.model_dump(mode="json", exclude_defaults=True))
    given = {prefix for key in old for prefix in _prefixes(key)}
    sections = {above for key in (*old, *new) for above in _prefixes(key)[:-1]}  # also of one that was empty
    for key in (key for key in {**new, **old} if key not in sections):
        added = [prefix for prefix in _prefixes(key) if prefix not in given]
        is_item = any(prefix.rpartition(".")[2].isdigit() for prefix in added)
        is_later = added and not is_item and not any(prefix in old or prefix in changed for prefix in _prefixes(key))
        allowed = is_later or any(key == free or key.startswith(f"{free}.") for free in may_differ)
        if not allowed and old.get(key) != new.get(key):
            was, now = (json.dumps(side.get(key)) for side in (old, new))
            raise UserError(
                f"{file.parent}: the run has {key} = {was}, now {now} was given; "
                f"go on with the configuration of the run, or choose another name or folder"
            )


def _prefixes(key: str) -> list[str]:
    """`a`, `a.b`, `a.b.c` of `a.b.c`."""
    return list(accumulate(key.split("."), "{}.{}".format))


def leaves(node: object, prefix: str = "") -> dict[str, Any]:
    """Nested data as dotted keys."""
    inner: Any = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    if not (items := list(inner)):
        return {prefix: node}
    return {
        key: value
        for name, child in items
        for key, value in leaves(child, f"{prefix}.{name}" if prefix else str(name)).items()
    }
