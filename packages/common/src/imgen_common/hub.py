"""Model references: `builtin:shapes/generator`, a local folder or file, or `org/name@revision`, each to a path."""

import contextlib
import importlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from imgen_common.console import quiet_libraries
from imgen_common.errors import MENDABLE, UserError, is_disk_full, nearest, one_line
from imgen_common.files import local_path
from imgen_common.weights import (
    LORA_FILES,
    check_file,
    check_files,
    check_pointer,
    check_tokenizer_files,
    components,
    describe_other_folder,
    incomplete,
    load_whole,
    loading,
    read_json,
    weight_files,
)

BUILTIN = "builtin:shapes/"
WEIGHTS = Path(__file__).parent / "shapes" / "weights"
HUB_REF = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
HUB_FILE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w.-]+))?/(?P<file>.+\.safetensors)")
"""A file of a repository, whose revision is then named without a slash."""
ADDRESS = re.compile(r"https?://[^/]*/?([\w.-]+/[\w.-]+)?|[a-zA-Z][\w+.-]*://")
WEIGHTS_FILE = re.compile(r"((?:.*/)?(?:model|diffusion_pytorch_model))(\.[\w-]+?)?(?:-\d{5}-of-\d{5})?\.safetensors")
"""Of a whole model or a shard, perhaps of a variant such as `.fp16`, of which the first is loaded (`weight_files`)."""
DESCRIPTION_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
HUB_FILES = ("*.safetensors", *DESCRIPTION_FILES)
SAMPLING_FILE = "sampling.json"
"""In a pipeline's folder: the height, width, num_inference_steps and guidance_scale to generate with, unless others are
given.  `flowbp export` writes it, the generators of `interleave` read it."""
SIZE_AND_LENGTH = ("height", "width", "max_sequence_length")
"""Of these settings those that an adapter is drawn with, whichever model it is put into."""
UNFINISHED = (".incomplete", ".aria2", ".part", ".crdownload")
"""How the files end that the hub's client, aria2 (as hfd.sh uses it) and browsers keep until a download ends."""
ADAPTER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""Adapters of PEFT and of diffusers, looked for first in a folder."""
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
    """The path of what `ref` names, downloaded if it must be, and then what to do where it is not whole.  adapter:
    whether only an adapter is wanted, of which a repository may have several."""
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
        what = f"no such {'file or ' * single_file}folder{nearest(ref, _builtins())}"
        raise UserError(f"model {ref!r}: {what}; give {places} or org/name[@revision]")
    file = match.groupdict().get("file")
    path = _download(ref, match["repo"], match["revision"], file, weights=weights, adapter=adapter) / (file or "")
    if not path.exists():
        raise UserError(f"model {ref!r}: no such file of {match['repo']} was found; {_remedy(ref)}")
    return path, _remedy(ref)


def prefetch(ref: str) -> Path:
    """Download what `ref` names, so that it resolves offline; offline, only check that it does.

    The weights of a diffusers pipeline are checked to fit its networks.  Raises UserError when that cannot be done.
    """
    if (path := resolve(ref, single_file=True)).joinpath("model_index.json").exists():
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
        chosen = path / _choose_adapter(ref, [file.name for file in path.glob("*")], remedy)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    check_file(chosen, path)
    return chosen


def _choose_adapter(ref: str, names: Sequence[str], remedy: str = "") -> str:
    """The adapter among the files of a folder or of a repository.  Raises UserError where there is none or several."""
    files = sorted(name for name in names if name.endswith(".safetensors") and not name.startswith("."))
    top = [name for name in files if "/" not in name]
    chosen = [name for name in top if name in ADAPTER_FILES] or top
    if files and len(chosen) != 1:
        shown = ", ".join(files[:4])
        raise UserError(f"{ref}: {len(files)} safetensors files ({shown}); give one of them, as {ref}/{files[0]}")
    if not chosen:
        if any(Path(name).suffix in (".bin", ".pt", ".pth", ".ckpt") for name in names):
            raise UserError(f"{ref}: only pickled weights; convert them to safetensors")
        made = remedy or "give an adapter, which `flowbp export --to diffusers` makes of a run"
        raise UserError(f"{ref}: no *.safetensors file in it; {made}")
    return chosen[0]


def model_files(folder: Path) -> tuple[Path, ...]:
    """The files of the weights that are loaded of a model's folder, which `resolve` has checked."""
    parts = [folder]
    if (folder / "model_index.json").exists():
        parts = [folder / name for name, (_, kind) in components(folder).items() if WITH_WEIGHTS.match(kind)]
    return tuple(file for part in parts for file in weight_files(part).files)


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


def _builtins() -> list[str]:
    return sorted(BUILTIN + folder.name for folder in WEIGHTS.glob("*/"))


def _check_path(path: Path, weights: bool, single_file: bool) -> Path:
    if path.is_dir():
        described = any((path / name).exists() for name in MODEL_FILES)
        files = [] if described else [file.name for file in path.glob("[!.]*.safetensors")]
        if single_file and files:
            return _check_path(path / _choose_adapter(str(path), files), weights, single_file)
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


def offline() -> str | None:
    """The variable that keeps this process from the network, if one does."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return next((name for name in names if os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}), None)


def _download(
    ref: str, repo: str, revision: str | None, file: str | None, *, weights: bool, adapter: bool = False
) -> Path:
    """The snapshot of a repository, as much of it as is needed; offline, as much of it as the cache has.  file: the
    adapter that is wanted alone, with what describes it; with `adapter`, the one that the repository has."""
    from huggingface_hub import constants, snapshot_download

    from imgen_common.http.addresses import check_proxy, proxy_of

    is_offline = offline() is not None

    def fetch(want: list[str], leave: Sequence[str] = ()) -> Path:
        options: dict[str, Any] = {"revision": revision, "local_files_only": is_offline}
        return Path(snapshot_download(repo, allow_patterns=want, ignore_patterns=[*leave], **options))

    def names() -> list[str]:
        return _names_of_files(repo, revision)

    try:
        if not is_offline and (proxy := proxy_of(constants.ENDPOINT)):
            check_proxy(proxy)
        if adapter and file is None and not is_offline:
            file = _choose_adapter(ref, names())
        if file is not None:
            place = file.rpartition("/")[0]
            return fetch([file, *(f"{place}/{name}".lstrip("/") for name in (SAMPLING_FILE, LORA_FILES[0]))])
        folder = fetch(["model_index.json"])
        if not is_offline:
            folder = fetch(*_wanted_files(folder, *((HUB_FILES, names) if weights else (DESCRIPTION_FILES, list))))
    except UserError:
        raise
    except Exception as error:  # the client's HTTP library, and with it the errors that leak, change between versions
        raise UserError(
            f"model {ref!r}: no such local {'file' if file else 'folder'}; {_hub_reason(ref, repo, revision, error)}"
        ) from error
    return folder


def _names_of_files(repo: str, revision: str | None) -> list[str]:
    """The names of a repository's files; where the hub cannot be asked, of those in the cache, as the client takes."""
    from huggingface_hub import HfApi, errors, snapshot_download

    try:
        return [one.rfilename for one in HfApi().model_info(repo, revision=revision).siblings or []]
    except Exception:
        with contextlib.suppress(errors.LocalEntryNotFoundError):
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
            return [file.relative_to(folder).as_posix() for file in folder.rglob("*")]
        raise


def _wanted_files(folder: Path, kinds: Sequence[str], names: Callable[[], list[str]]) -> tuple[list[str], list[str]]:
    """The patterns of the files to download of a model's repository, and of those to leave.  names: of all its files"""
    # What is not of a pipeline lies in its top folder; the other places often hold the same weights in other forms
    is_pipeline = (folder / "model_index.json").exists()
    places = [f"{name}/" for name in components(folder)] if is_pipeline else [""]
    wanted = [place + kind for place in places for kind in kinds]
    forms: list[tuple[str, str, str]] = []
    with contextlib.suppress(Exception):  # without a network the client takes what its cache has
        forms = sorted((match[1], match[2] or "", name) for name in names() if (match := WEIGHTS_FILE.fullmatch(name)))
    loaded: dict[str, str] = {}
    other_forms = [name for place, form, name in forms if form != loaded.setdefault(place, form)]
    return ["model_index.json", SAMPLING_FILE, *wanted], ["*/*"] * (not is_pipeline) + other_forms


def _hub_reason(ref: str, repo: str, revision: str | None, error: Exception) -> str:
    """Why the hub gave no files, and what to do."""
    from huggingface_hub import constants, errors

    from imgen_common.http.addresses import CREDENTIALS, redacted

    if variable := offline():
        return f"{variable} is set, and the cache has no complete copy of it; {_remedy(ref)}"
    hidden = constants.HF_HUB_DISABLE_IMPLICIT_TOKEN
    login = f"log in with `hf auth login` or set HF_TOKEN{' and unset HF_HUB_DISABLE_IMPLICIT_TOKEN' if hidden else ''}"
    causes = [*_causes(error)]
    kinds = [type(one) for one in causes]
    if any(map(is_disk_full, causes)):
        return f"the disk of {constants.HF_HUB_CACHE} is full; make room, or set HF_HOME to another disk"
    if broken := [one for one in causes if isinstance(one, OSError) and one.filename and one.errno in MENDABLE]:
        return f"its cache cannot be used ({one_line(str(broken[0]))}); set HF_HOME to a folder that can be written"
    said = one_line(next((words for one in causes if (words := getattr(one, "server_message", None))), ""))
    if any(issubclass(kind, errors.GatedRepoError) for kind in kinds):
        page, words = f"{redacted(constants.ENDPOINT)}/{repo}", f" (the hub says: {said})" if said else ""
        return f"the repository is gated: accept its license at {page}, {login}, then run this command again{words}"
    if any(issubclass(kind, errors.RevisionNotFoundError) for kind in kinds):
        return f"the hub has {repo}, but no revision {revision!r} of it; give a branch, tag or commit that it has"
    if any(issubclass(kind, errors.RepositoryNotFoundError) for kind in kinds):
        return f"the hub has no {repo} that you can read; check the name; if it is private, {login}"
    if any(getattr(getattr(one, "response", None), "status_code", None) == 401 for one in causes):
        return f"the hub refuses the token that it was given ({said or 'status 401'}); {login} anew"
    if UnicodeEncodeError in kinds:
        return f"the token that it would be given has characters that no token has; {login} anew"
    said = CREDENTIALS.sub("//...@", said or one_line(str(causes[-1])) or type(causes[-1]).__name__)
    if any(isinstance(one, json.JSONDecodeError) for one in causes):
        said = f"it answered something else than the hub does, as a proxy's page to log in: {said}"
    said += "; set SSL_CERT_FILE to the certificate of its authority" if "CERTIFICATE_VERIFY_FAILED" in said else ""
    return f"the hub gave none ({said}); {_remedy(ref)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _remedy(ref: str) -> str:
    if offline():
        return f"run `flowbp prefetch {ref}` or `interleave prefetch {ref}` with a network and without {offline()}"
    proxies = [name for upper in ("HTTPS_PROXY", "ALL_PROXY") for name in (upper, upper.lower())]
    settings = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "SSLKEYLOGFILE", *proxies)
    checked = ", ".join(["check the name", *(f"the variable {name}" for name in settings if name in os.environ)])
    return f"{checked} and the network, then run this command again: a download continues where it stopped"


def _check_component(folder: Path, name: str, class_name: str, weights: bool) -> None:
    part = folder / name
    if not any(part.glob("[!.]*.json")):
        raise incomplete(folder, f"{name}/ has no configuration")
    if WITH_WEIGHTS.match(class_name):
        if not (part / "config.json").exists():
            raise incomplete(folder, f"{name}/config.json is missing")
        check_files(folder, part, weights)
    check_tokenizer_files(folder, part, class_name)
