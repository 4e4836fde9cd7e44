"""Folders of models: whether they are whole, what is in them, and their networks."""

import importlib
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from imgen_common.console import quiet_libraries
from imgen_common.errors import UserError, quoted
from imgen_common.weights import (
    LORA_FILES,
    check_files,
    check_pointer,
    check_tokenizer_files,
    incomplete,
    is_plain_name,
    load_whole,
    loading,
    read_json,
    weight_files,
)

DESCRIPTION_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
SAMPLING_FILE = "sampling.json"
"""In a pipeline's folder: the height, width, num_inference_steps and guidance_scale to generate with, unless others are
given.  `flowbp export` writes it, the generators of `interleave` read it."""
SIZE_AND_LENGTH = ("height", "width", "max_sequence_length")
"""Of these settings those that an adapter is drawn with, whichever model it is put into."""
UNFINISHED = (".incomplete", ".aria2", ".part", ".crdownload")
"""How the files end that the hub's client, aria2 (as hfd.sh uses it) and browsers keep until a download ends."""
MODEL_FILES = ("model_index.json", "config.json", *LORA_FILES)
"""One of these says what is in a folder: a pipeline, a model or an adapter."""
SINGLE_FILE = (
    "give a model folder; diffusers converts a checkpoint to one: "
    "DiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
)
WITH_WEIGHTS = re.compile(r"(?!.*(Tokenizer|Scheduler|Processor|Extractor))")
"""Classes of components that are no networks do not match."""
LIBRARIES = ("diffusers", "transformers")
"""Where the classes that a model_index.json names may come from; nothing else is imported for a folder."""
REQUIRED_PARTS = (
    *("scheduler", "transformer", "vae"),
    *(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")),
)
"""Components of a pipeline that it has, where its model_index.json names them at all; others may be null there."""


def check_folder(folder: Path, *, weights: bool = True) -> None:
    """Raise UserError unless `folder` is a whole diffusers, transformers or LoRA folder.

    diffusers: every component that model_index.json names has its configuration and weights; transformers: config.json
    and weights.  A tokenizer has its vocabulary.  Weights are safetensors files with a valid header and the length that
    it promises, and every shard of an index; with weights=False they are not looked at.
    """
    index = folder / "model_index.json"
    if not any((folder / name).exists() for name in MODEL_FILES):
        if link := next((folder / name for name in MODEL_FILES if (folder / name).is_symlink()), None):
            raise UserError(
                f"{link}: is a link to a file that is not there; copy the folder with what it links (cp -rL)"
            )
        file = next(folder.glob("[!.]*.safetensors"), None)
        remedy = "" if file is None else f"; the model in the one file {file.name} is not read: {SINGLE_FILE}"
        what = describe_other_folder(folder) or remedy
        raise UserError(f"{folder}: not a model folder (none of {', '.join(MODEL_FILES)} in it){what}")
    for file in sorted(folder.rglob("*")):
        if weights and file.name.endswith(UNFINISHED):
            raise incomplete(folder, f"{file.relative_to(folder)} is an unfinished download")
        if any(map(file.match, DESCRIPTION_FILES)):
            check_pointer(file)
    if index.exists():
        for name, (library, class_name) in components(folder).items():
            if library not in LIBRARIES:
                raise UserError(f"{folder}: {name} is a {class_name} of {library!r}; allowed: {', '.join(LIBRARIES)}")
            _check_component(folder, name, class_name, weights)
    else:
        check_files(folder, folder, weights)
        if (folder / "config.json").exists():
            check_tokenizer_files(folder, folder, "")


def _check_component(folder: Path, name: str, class_name: str, weights: bool) -> None:
    part = folder / name
    if not any(part.glob("[!.]*.json")):
        raise incomplete(folder, f"{name}/ has no configuration")
    if WITH_WEIGHTS.match(class_name):
        if not (part / "config.json").exists():
            raise incomplete(folder, f"{name}/config.json is missing")
        check_files(folder, part, weights)
    check_tokenizer_files(folder, part, class_name)


def components(folder: Path) -> dict[str, tuple[str, str]]:
    """Component name to library and class name, from model_index.json; components that are null there are left out."""
    found = {}
    for name, entry in read_json(folder / "model_index.json").items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2:
            continue
        if all(isinstance(part, str) for part in entry):
            if not all(map(is_plain_name, (name, *entry))):
                raise UserError(f"{folder}: model_index.json has a component {name!r} of {entry}; names must be plain")
            found[name] = (entry[0], entry[1])
    return found


def describe_other_folder(folder: Path) -> str:
    """What a folder is that is no model's, and what to do, as the end of a message; empty where that is not known."""
    is_checkpoint = (folder / "manifest.json").is_file() and folder.parent.name == "checkpoints"
    is_run = (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()
    # other trainers put their adapters beside these
    if is_checkpoint or (is_run and not any(folder.glob("*.safetensors"))):
        run = quoted(folder.parents[1] if is_checkpoint else folder)
        what = f"of a {'checkpoint' if is_checkpoint else 'run'} of flowbp"
        return f"; {what} `flowbp export {run}` makes a model or an adapter"
    if (folder / "snapshots").is_dir() and (found := sorted((folder / "snapshots").glob("[!.]*"))):
        return f"; it is a cache of the hub: give the model in it, {found[-1]}"
    return ""


def pipeline_index(ref: str, folder: Path) -> dict[str, Any]:
    """The model_index.json of a diffusers folder.  Raises UserError for another folder, or without a required part."""
    index = folder / "model_index.json"
    if not index.exists():
        raise UserError(f"{ref}: not a diffusers pipeline: the folder has no {index.name}")
    content = read_json(index)
    for name in REQUIRED_PARTS:
        entry = content.get(name, ["", ""])
        if entry in (None, [None, None]):
            raise UserError(f"{ref}: model_index.json {name}: is null, but is needed here; save the pipeline with it")
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
            given = json.dumps(entry)[:60]
            raise UserError(
                f"{ref}: model_index.json {name}: is {given}; must be the library and the class of a component; copy "
                "the folder again"
            )
    return content


def model_files(folder: Path) -> tuple[Path, ...]:
    """The files of the weights that are loaded of a model's folder, which `resolve` has checked."""
    parts = [folder]
    if (folder / "model_index.json").exists():
        parts = [folder / name for name, (_, kind) in components(folder).items() if WITH_WEIGHTS.match(kind)]
    return tuple(file for part in parts for file in weight_files(part).files)


def load_networks(folder: Path, *, skip: Collection[str] = (), **options: Any) -> dict[str, Any]:
    """The components of a diffusers folder that have weights, loaded, by name.

    `from_pretrained` of a pipeline would not say what weights are missing, and would look for one variant in all.
    skip: components that are not wanted.  options: further arguments of the components' own `from_pretrained`.
    """
    given = {}
    for name, (library, class_name) in components(folder).items():
        if WITH_WEIGHTS.match(class_name) and name not in skip:
            kind = getattr(importlib.import_module(library), class_name)
            given[name] = load_whole(kind, folder / name, **options)
    return given


def check_networks(folder: Path) -> None:
    """Raises UserError unless the weights of a diffusers folder fit its networks; only headers of files are read."""
    quiet_libraries()
    with loading(f"{folder}: cannot be loaded"):
        load_networks(folder, device_map="meta")
