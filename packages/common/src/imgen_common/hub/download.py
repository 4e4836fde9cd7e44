"""Downloads from the Hugging Face Hub into its cache, and why there are none."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from imgen_common.errors import MENDABLE, UserError, is_disk_full, one_line
from imgen_common.hub.adapters import choose_adapter
from imgen_common.hub.folders import DESCRIPTION_FILES, SAMPLING_FILE, components
from imgen_common.weights import LORA_FILES

INDEX = "model_index.json"
WEIGHTS_FILE = re.compile(r"((?:.*/)?(?:model|diffusion_pytorch_model))(\.[\w-]+?)?(?:-\d{5}-of-\d{5})?\.safetensors")
"""Of a whole model or a shard, perhaps of a variant such as `.fp16`, of which the first is loaded (`weight_files`)."""
HUB_FILES = ("*.safetensors", *DESCRIPTION_FILES)


def offline() -> str | None:
    """The variable that keeps this process from the network, if one does."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return next((name for name in names if os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}), None)


def download(
    ref: str, repo: str, revision: str | None, file: str | None, *, weights: bool, adapter: bool = False
) -> Path:
    """The snapshot of a repository, as much of it as is needed; offline, as much of it as the cache has.

    file: the adapter that is wanted alone, with what describes it; with `adapter`, the one that the repository has.
    """
    from huggingface_hub import constants, snapshot_download

    from imgen_common.http.addresses import check_proxy, proxy_of

    is_offline, names = offline() is not None, list[str]()

    def fetch(want: list[str], leave: Sequence[str] = ()) -> Path:
        options: dict[str, Any] = {"revision": revision, "local_files_only": is_offline}
        return Path(snapshot_download(repo, allow_patterns=want, ignore_patterns=[*leave], **options))

    try:
        if not is_offline:
            if proxy := proxy_of(constants.ENDPOINT):
                check_proxy(proxy)
            names, is_offline = _names_of_files(repo, revision)
        if adapter and file is None and names:
            file = choose_adapter(ref, names)
        if file is not None:
            place = file.rpartition("/")[0]
            return fetch([file, *(f"{place}/{name}".lstrip("/") for name in (SAMPLING_FILE, LORA_FILES[0]))])
        if is_offline:
            return fetch([INDEX])  # the whole folder, whatever is asked for
        pipeline = fetch([INDEX]) if INDEX in names else None
        wanted, left = _patterns(pipeline, HUB_FILES if weights else DESCRIPTION_FILES)
        return fetch(wanted, [*left, *(_other_forms(names) if weights else [])])
    except UserError:
        raise
    except Exception as error:  # the client's HTTP library, and with it the errors that leak, change between versions
        raise UserError(
            f"model {ref!r}: no such local {'file' if file else 'folder'}; {_hub_reason(ref, repo, revision, error)}"
        ) from error


def _names_of_files(repo: str, revision: str | None) -> tuple[list[str], bool]:
    """The names of a repository's files, and whether they are those in the cache, since the hub cannot be asked."""
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    try:  # the client itself would wait without end for a hub that does not answer
        info = HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        return [one.rfilename for one in info.siblings or []], False
    except Exception:
        with contextlib.suppress(errors.LocalEntryNotFoundError):
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
            return [file.relative_to(folder).as_posix() for file in folder.rglob("*")], True
        raise


def _patterns(pipeline: Path | None, kinds: Sequence[str]) -> tuple[list[str], list[str]]:
    """The patterns of the files to download of a model's repository, and of those to leave.  pipeline: the folder with
    its model_index.json, if it has one."""
    # beside a pipeline's components, and below the top folder of another model, are often the same weights once more
    places = [""] if pipeline is None else [f"{name}/" for name in components(pipeline)]
    wanted = [place + kind for place in places for kind in kinds]
    return [INDEX, SAMPLING_FILE, *wanted], ["*/*"] if pipeline is None else []


def _other_forms(names: Sequence[str]) -> list[str]:
    """Of a repository's files weights in other precisions than those that are loaded."""
    forms = sorted((match[1], match[2] or "", name) for name in names if (match := WEIGHTS_FILE.fullmatch(name)))
    loaded: dict[str, str] = {}
    return [name for place, form, name in forms if form != loaded.setdefault(place, form)]


def _hub_reason(ref: str, repo: str, revision: str | None, error: Exception) -> str:
    """Why the hub gave no files, and what to do."""
    from huggingface_hub import constants, errors

    from imgen_common.http.addresses import CREDENTIALS, redacted

    if variable := offline():
        return f"{variable} is set, and the cache has no complete copy of it; {how_to_download(ref)}"
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
    return f"the hub gave none ({said}); {how_to_download(ref)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def how_to_download(ref: str) -> str:
    if offline():
        return f"run `flowbp prefetch {ref}` or `interleave prefetch {ref}` with a network and without {offline()}"
    proxies = [name for upper in ("HTTPS_PROXY", "ALL_PROXY") for name in (upper, upper.lower())]
    settings = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "SSLKEYLOGFILE", *proxies)
    checked = ", ".join(["check the name", *(f"the variable {name}" for name in settings if name in os.environ)])
    return f"{checked} and the network, then run this command again: a download continues where it stopped"
