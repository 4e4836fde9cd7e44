"""Model references: `builtin:shapes/generator`, a local folder or file, or `org/name@revision`, each to a path."""

import json
import os
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgen_common.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import Qwen3Config

BUILTIN = "builtin:shapes/"
WEIGHTS = Path(__file__).parent / "shapes" / "weights"
HUB_REF = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
DESCRIPTION_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
HUB_FILES = ("*.safetensors", *DESCRIPTION_FILES)
LORA_FILES = ("adapter_config.json", "pytorch_lora_weights.safetensors")
NO_WEIGHTS = ("Tokenizer", "Scheduler", "Processor", "Extractor")


def resolve(ref: str, *, weights: bool = True) -> Path:
    """The folder (or LoRA file) that `ref` names, complete and without pickles.

    ref: `builtin:shapes/NAME`; a path; or `org/name[@revision]`, downloaded into the Hugging Face cache where it is
    missing, unless HF_HUB_OFFLINE is set.  A path that exists wins over a repository of that name.
    weights=False: only the description (configurations and tokenizers) is downloaded and checked.
    Raises UserError for an unknown, missing, half-downloaded or pickled model.
    """
    if ref.startswith("builtin:"):
        if ref not in _builtins():
            allowed = ", ".join(_builtins()) or "none"
            raise UserError(f"unknown model {ref!r}{nearest(ref, _builtins())}; allowed: {allowed}")
        return _check_path(WEIGHTS / ref.removeprefix(BUILTIN), weights)
    path = Path(ref).expanduser()
    if path.exists():
        return _check_path(path, weights)
    match = HUB_REF.fullmatch(ref)
    if match is None or ref.startswith((".", "/", "~")):
        allowed = f"a folder, org/name[@revision] or one of {', '.join(_builtins()) or 'no builtin models'}"
        raise UserError(f"model {ref!r}: no such folder{nearest(ref, _builtins())}; give {allowed}")
    return _download(ref, match["repo"], match["revision"], offline=_offline(), weights=weights)


def prefetch(ref: str) -> Path:
    """Download what `ref` names, so that it resolves offline.  Raises UserError when that cannot be done."""
    if _offline() and not ref.startswith("builtin:") and not Path(ref).expanduser().exists():
        raise UserError(f"model {ref!r}: HF_HUB_OFFLINE is set, so nothing can be downloaded; unset it and try again")
    return resolve(ref)


def check_folder(folder: Path, *, weights: bool = True) -> None:
    """Raise UserError unless `folder` is a whole diffusers, transformers or LoRA folder.

    diffusers: every component that model_index.json names has its configuration and weights; transformers: config.json
    and weights.  Weights are safetensors files whose length agrees with their header, and every shard of an index; with
    weights=False they are not looked at.
    """
    index = folder / "model_index.json"
    if not any((folder / name).exists() for name in (index.name, "config.json", *LORA_FILES)):
        raise UserError(
            f"{folder}: not a model folder (none of {index.name}, config.json, {', '.join(LORA_FILES)} in it)"
        )
    unfinished = next(folder.rglob("*.incomplete"), None)
    if weights and unfinished is not None:
        raise _incomplete(folder, f"{unfinished.relative_to(folder)} is an unfinished download")
    if index.exists():
        for name, class_name in _components(index).items():
            _check_component(folder, name, class_name, weights)
    else:
        _check_files(folder, folder, weights)


def _builtins() -> list[str]:
    return sorted(BUILTIN + folder.name for folder in WEIGHTS.glob("*/"))


def _check_path(path: Path, weights: bool) -> Path:
    if path.is_dir():
        check_folder(path, weights=weights)
    elif path.suffix == ".safetensors":
        _check_file(path.parent, path)
    else:
        raise UserError(f"{path}: weights are read from safetensors files and model folders only")
    return path


def _offline() -> bool:
    return any(
        os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def _download(ref: str, repo: str, revision: str | None, offline: bool, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    def fetch(patterns: list[str]) -> Path:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=offline))

    try:
        folder = fetch(["model_index.json"])
        index = folder / "model_index.json"
        # A diffusers repository often holds the same weights again as single files beside its component folders.
        places = [f"{name}/" for name in _components(index)] if index.exists() else [""]
        files = HUB_FILES if weights else DESCRIPTION_FILES
        folder = fetch(["model_index.json", *(place + pattern for place in places for pattern in files)])
        check_folder(folder, weights=weights)
    except Exception as error:  # the client's HTTP library, and with it the errors that leak, change between versions
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        remedy = f"run `flowbp prefetch {ref}` with a network and without HF_HUB_OFFLINE"
        if not offline:
            remedy = f"check the name, your access and the network, then run `flowbp prefetch {ref}`"
        raise UserError(f"model {ref!r}: no such local folder, and the hub gave none ({reason}); {remedy}") from error
    return folder


def _incomplete(folder: Path, what: str) -> UserError:
    return UserError(f"{folder}: half-downloaded model: {what}; download or copy it again")


def _json(folder: Path, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise _incomplete(folder, f"{path.relative_to(folder)} is not a JSON object")
    return content


def _components(index: Path) -> dict[str, str]:
    """Component name to class name, from a model_index.json; components that are null there are left out."""
    entries = _json(index.parent, index).items()
    return {name: entry[1] for name, entry in entries if isinstance(entry, list) and len(entry) == 2 and entry[1]}


def _check_component(folder: Path, name: str, class_name: str, weights: bool) -> None:
    part = folder / name
    if not any(part.glob("*.json")):
        raise _incomplete(folder, f"{name}/ has no configuration")
    if any(word in class_name for word in NO_WEIGHTS):
        return
    if not (part / "config.json").exists():
        raise _incomplete(folder, f"{name}/config.json is missing")
    _check_files(folder, part, weights)


def _check_files(folder: Path, part: Path, weights: bool) -> None:
    for path in part.glob("*.json"):
        _json(folder, path)
    if not weights:
        return
    for index in part.glob("*.safetensors.index*.json"):
        shards = _json(folder, index).get("weight_map", {})
        for shard in sorted(set(shards.values())):
            if not (part / shard).exists():
                raise _incomplete(folder, f"{(part / shard).relative_to(folder)} is missing")
    files = sorted(part.glob("*.safetensors"))
    if not files:
        place = "" if part == folder else f" in {part.name}/"
        if any(part.glob("*.bin")) or any(part.glob("*.pt")):
            raise UserError(f"{folder}: only pickled weights{place}; convert them to safetensors")
        raise _incomplete(folder, f"no *.safetensors weights{place}")
    for file in files:
        _check_file(folder, file)


def _check_file(folder: Path, file: Path) -> None:
    """Compare the length of a safetensors file with what its header promises, reading the header only."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError
            header = json.loads(stream.read(length))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        whole = 8 + length + end == size
    except (OSError, ValueError, struct.error, TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise _incomplete(folder, f"{file.relative_to(folder)} is cut short or not a safetensors file")


def text_layers(config: "Qwen3Config", joint_dim: int) -> tuple[int, ...]:
    """Which hidden states of its text encoder FLUX.2-klein reads: evenly spaced, 9, 18, 27 of 36 layers.

    Its pipeline does not derive them.  Their number follows from the transformer's text width.
    Raises UserError if the two models do not fit.
    """
    count, rest = divmod(joint_dim, config.hidden_size)
    if rest or not 0 < count < config.num_hidden_layers:
        raise UserError(
            f"a text encoder of {config.num_hidden_layers} layers of width {config.hidden_size} does not fit a "
            f"transformer that reads {joint_dim} numbers per token; take both from one folder"
        )
    return tuple(config.num_hidden_layers * k // (count + 1) for k in range(1, count + 1))
