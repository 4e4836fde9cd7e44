"""What a run is trained and evaluated on, by a hash, so that a resumed run cannot go on with other data."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from imgen_common import hub, weights
from imgen_common.errors import UserError, warn_once
from imgen_common.files import read_json, write_atomic

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
