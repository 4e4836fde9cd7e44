"""Model references: `builtin:shapes/generator`, a local folder or file, or `org/name@revision`, each to a path."""

import re
from pathlib import Path

from imgen_common.errors import UserError, nearest
from imgen_common.files import local_path
from imgen_common.hub.adapters import ADAPTER_FILES, choose_adapter
from imgen_common.hub.download import HUB_FILES, download, how_to_download, offline
from imgen_common.hub.folders import (
    DESCRIPTION_FILES,
    MODEL_FILES,
    SAMPLING_FILE,
    SINGLE_FILE,
    SIZE_AND_LENGTH,
    check_folder,
    check_networks,
    describe_other_folder,
    load_networks,
    model_files,
    pipeline_index,
)
from imgen_common.weights import check_file

__all__ = [
    "ADAPTER_FILES",
    "BUILTIN",
    "DESCRIPTION_FILES",
    "HUB_FILES",
    "HUB_REF",
    "SAMPLING_FILE",
    "SIZE_AND_LENGTH",
    "WEIGHTS",
    "check_folder",
    "check_networks",
    "load_networks",
    "model_files",
    "offline",
    "pipeline_index",
    "prefetch",
    "resolve",
    "resolve_adapter",
]

BUILTIN = "builtin:shapes/"
WEIGHTS = Path(__file__).parents[1] / "shapes" / "weights"
HUB_REF = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
HUB_FILE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?/(?P<file>.+\.safetensors)")
"""A file of a repository, whose revision is then named without a slash."""
ADDRESS = re.compile(r"https?://[^/]*/?([\w.-]+/[\w.-]+)?|[a-zA-Z][\w+.-]*://")
MAX_REF = 4096


def resolve(ref: str, *, weights: bool = True, single_file: bool = False) -> Path:
    """The folder (or adapter file) that `ref` names, complete and without pickles.

    ref: `builtin:shapes/NAME`; a path; or `org/name[@revision]`, downloaded into the Hugging Face cache where it is
    missing, unless HF_HUB_OFFLINE is set.  A path that exists wins over a repository of that name.
    weights=False: only the description (configurations and tokenizers) is downloaded and checked.
    single_file: whether it may be one safetensors file, as adapters are, also `org/name[@revision]/FILE.safetensors`,
    or a folder with one and no description of a model.
    Raises UserError for an unknown, missing, half-downloaded or pickled model.
    """
    path, remedy = _find(ref, weights=weights, single_file=single_file)
    try:
        return _check_path(path, weights, single_file)
    except UserError as error:
        raise UserError(f"model {ref!r}: {error}; {remedy}" if remedy else str(error)) from None


def _find(ref: str, *, weights: bool, single_file: bool, adapter: bool = False) -> tuple[Path, str]:
    """The path of what `ref` names, downloaded if it must be, and then what to do where it is not whole.

    adapter: whether only an adapter is wanted, of which a repository may have several.
    """
    if ref.startswith("builtin:"):
        if ref not in _builtins():
            allowed = ", ".join(_builtins()) or "none"
            raise UserError(f"unknown model {ref!r}{nearest(ref, _builtins())}; allowed: {allowed}")
        return WEIGHTS / ref.removeprefix(BUILTIN), ""
    if len(ref) > MAX_REF:
        raise UserError(f"model {ref[:60]!r}...: longer than a path can be ({MAX_REF} characters)")
    path = local_path(ref)
    try:
        exists = ref != "" and path.exists()
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise UserError(f"model {ref!r}: cannot be read as a path ({error.strerror})") from None
    if exists:
        return path, ""
    if address := ADDRESS.match(ref):  # it may hold a password
        places = "org/name[@revision]" if ref.startswith("http") else "a folder or org/name[@revision]"
        raise UserError(f"model {address[1] or '...'}: is given as an address; give {places}")
    match = (HUB_FILE.fullmatch(ref) if single_file else None) or HUB_REF.fullmatch(ref)
    if match is None or ref.startswith((".", "/", "~")):
        places = "a safetensors file, a folder" if single_file else f"a folder, one of {', '.join(_builtins())}"
        where = f" in {Path.cwd()}" if ref and not path.is_absolute() else ""
        what = f"no such {'file or ' * single_file}folder{where}{nearest(ref, _builtins())}"
        raise UserError(f"model {ref!r}: {what}; give {places} or org/name[@revision]")
    file = match.groupdict().get("file")
    path = download(ref, match["repo"], match["revision"], file, weights=weights, adapter=adapter) / (file or "")
    if not path.exists():
        raise UserError(f"model {ref!r}: no such file of {match['repo']} was found; {how_to_download(ref)}")
    return path, how_to_download(ref)


def prefetch(ref: str) -> Path:
    """Download what `ref` names, so that it resolves offline; offline, only check that it does.

    The weights of a diffusers pipeline are checked to fit its networks.  Raises UserError when that cannot be done.
    """
    path = resolve(ref, single_file=True)
    if (path / "model_index.json").exists():
        check_networks(path)
    return path


def resolve_adapter(ref: str, key: str) -> Path:
    """The safetensors file of an adapter: `ref` itself, or the one in a folder or a repository of the hub.

    key: of the configuration, for errors.  Raises UserError where there is none, several, a pickle or a file that is
    cut short.
    """
    try:
        path, remedy = _find(ref, weights=True, single_file=True, adapter=True)
        if what := describe_other_folder(path if path.is_dir() else path.parent):
            raise UserError(f"{ref}: not an adapter{what}")
        if not path.is_dir():
            return _check_path(path, True, True)
        chosen = path / choose_adapter(ref, [file.name for file in path.glob("*")], remedy)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    check_file(chosen, path)
    return chosen


def _builtins() -> list[str]:
    return sorted(BUILTIN + folder.name for folder in WEIGHTS.glob("*/"))


def _check_path(path: Path, weights: bool, single_file: bool) -> Path:
    if path.is_dir():
        described = any((path / name).exists() for name in MODEL_FILES)
        files = [] if described else [file.name for file in path.glob("[!.]*.safetensors")]
        if single_file and files:
            return _check_path(path / choose_adapter(str(path), files), weights, single_file)
        check_folder(path, weights=weights)
        if not (single_file or any((path / name).exists() for name in ("model_index.json", "config.json"))):
            raise UserError(f"{path}: is an adapter; give the model it was trained on, or a folder with both merged")
    elif path.suffix != ".safetensors":
        folder = f"; give the folder that it is in, {path.parent}" if path.suffix == ".json" else ""
        raise UserError(f"{path}: weights are read from safetensors files and folders of models{folder}")
    elif not single_file:
        raise UserError(f"{path}: is a single file; {SINGLE_FILE}")
    else:
        check_file(path)
    return path
