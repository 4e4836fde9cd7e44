"""Networks from folders whose weights and config.json fit each other: no weight missing, unused or of coded numbers."""

import contextlib
import json
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, NamedTuple

from imgen_common.errors import UserError, one_line

INTEGERS = frozenset(sign + bits for sign in "IU" for bits in ("8", "16", "32", "64"))
"""Numbers, by safetensors' names, that a plain weight never has; buffers, such as position_ids, may have them."""
FLOAT8 = "F8_"
"""How the names of 8-bit floating-point numbers begin; some checkpoints have a scale beside each weight of them."""
SCALES = ("weight_scale", "weight_scale_inv", "scale_weight")
QUANTIZED = ("quantization_config", "compression_config")
"""What config.json calls the way in which weights are coded; libraries decode those that it describes."""
REMEDY = "copy weights and config.json from one place"
STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
"""How each library names the file of a whole model's weights."""
WEIGHT_FILE = r"{stem}(\.(?P<file>(?!.*-\d{{5}}-of-\d{{5}})[\w-]+))?\.safetensors(\.index(\.(?P<index>[\w-]+))?\.json)?"
"""That file or the index of its shards, no shard, with their variant (fp16, bf16, ...) if they are of one."""
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",), ("*.model",), ("tekken.json",))
"""Files of a tokenizer, one of these sets; without any, transformers makes one that drops every word."""
NO_VOCABULARY = "ByT5"
"""Tokenizers of bytes, which need no such file."""
ADAPTER_CONFIG = "adapter_config.json"
"""PEFT's description of an adapter."""
LORA_FILES = (ADAPTER_CONFIG, "pytorch_lora_weights.safetensors")
"""One of these is in the folder of an adapter."""
HEAD_FILE = "head.safetensors"
"""What scores the features of a model, beside it in the folder of a reward."""
MAX_JSON = 10**8
"""Bytes of the largest JSON file that is read; tokenizers have 30 million."""


class WeightFiles(NamedTuple):
    """The weights of a model that `from_pretrained` reads; variant: its argument, None for the plain weights."""

    variant: str | None
    files: tuple[Path, ...]


def load_whole(kind: Any, folder: Path, **options: Any) -> Any:
    """The network of class `kind` in a folder of diffusers or transformers.  No code of the folder is run.

    transformers draws a weight that the files lack at random, and both libraries drop one that config.json has no layer
    for.  What diffusers drops is an error here; transformers' classes read parts of larger published models.
    options: further arguments of its `from_pretrained`; with device_map="meta" only the headers of files are read.
    Raises UserError for such weights, else what the library does.
    """
    model, found = kind.from_pretrained(
        folder,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        variant=weight_files(folder).variant,
        **options,
    )
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{folder}: {len(missing)} weights are missing, the first is {missing[0]}; {REMEDY}")
    if kind.__module__.startswith("diffusers.") and (unused := sorted(found["unexpected_keys"])):
        raise UserError(
            f"{folder}: {len(unused)} weights have no place in the network of config.json, the first is {unused[0]}; "
            f"{REMEDY}"
        )
    return model


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Turns what diffusers and transformers raise for files that do not hold what they say into a UserError: `what`,
    and their words."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # what a folder that others made can lead to changes between versions
        if type(error).__name__ == "OutOfMemoryError":
            raise
        reason = one_line(str(error) or type(error).__name__)
        if isinstance(error, PackageNotFoundError):  # of what decodes quantized weights
            reason = f"its weights are quantized, which needs {error.name}; install it, or give plain weights"
        if "ignore_mismatched_sizes" in reason:  # transformers' and diffusers' advice for calls that no user makes
            shape = re.search(r"\S+ expected shape .*?, but got .*?\)", reason)
            reason = f"weights do not fit its config.json{': ' + shape[0] if shape else ''}; copy both from one place"
        if "Unrecognized image processor" in reason:  # of a name that transformers had for a few weeks, among others
            reason = (
                "the installed transformers does not know the image_processor_type in its preprocessor_config.json; "
                "for a Qwen2.5-VL write Qwen2VLImageProcessor"
            )
        # transformers goes on with what to do about names on the hub
        if part := re.search(r"Can't load (?:the )?([a-z ]+?) (?:for|of) '", reason):
            reason = f"files of its {part[1]} are missing or damaged; copy them from the model that it was made of"
        raise UserError(f"{what} ({reason})") from error


def check_file(file: Path, folder: Path | None = None) -> None:
    """Raise UserError unless `file` is whole: its header is valid, and the tensors in it fill the file exactly.

    Only the header is read (by safetensors itself, which bounds it).  folder: of the model that the file belongs to.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if not file.is_file():
            raise OSError("not a file")
        with safe_open(file, "np"):
            return
    except (OSError, SafetensorError) as error:
        check_pointer(file)
        if "os error 19" in str(error):  # ENODEV
            raise UserError(
                f"{file}: its file system cannot map files into memory ({one_line(str(error), 60)}); copy the model to "
                "a local disk"
            ) from None
        reason = f"is cut short or not a safetensors file ({one_line(str(error), 120)})"
        raise incomplete(folder or file.parent, f"{file.relative_to(folder or file.parent)} {reason}") from None


def check_pointer(file: Path) -> None:
    """Raise UserError for a file in whose place Git has left a pointer to it, or a download a web page."""
    if file.is_file():
        with file.open("rb") as content:
            start = content.read(64)
        if b"git-lfs" in start:
            raise UserError(f"{file}: is a pointer of Git LFS, not the file itself; run `git lfs pull` there")
        if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
            raise UserError(f"{file}: is a web page, not the file itself; download it again")


def check_numbers(file: Path, config: dict[str, Any]) -> None:
    """Raises UserError where weights of a file are integers, or 8-bit floating-point numbers with scales, that nothing
    in `config`, of config.json, tells to decode.

    Loaded, they would be taken as they are, without their scales.
    """
    from safetensors import safe_open

    # A model of several has its text model's description within its own
    described = [config, *(part for part in config.values() if isinstance(part, dict))]
    if any(part.get(name) for part in described for name in QUANTIZED):
        return
    with safe_open(file, "np") as tensors:
        names = frozenset(tensors.keys())
        kinds = {n: tensors.get_slice(n).get_dtype() for n in sorted(names) if n.endswith(".weight")}
    for name, kind in kinds.items():
        module = name.removesuffix("weight")
        has_scale = kind.startswith(FLOAT8) and any(module + scale in names for scale in SCALES)
        if kind in INTEGERS or has_scale:
            count = sum(other == kind for other in kinds.values())
            what = f"8-bit numbers with scales ({kind})" if has_scale else f"integers ({kind})"
            raise UserError(
                f"{file}: {count} weights are {what}, the first is {name}, and config.json has no {QUANTIZED[0]}; "
                f"{REMEDY}"
            )


def weight_files(folder: Path) -> WeightFiles:
    """The weights of a transformers folder or of a diffusers component: the plain ones, or else those of a variant.

    Raises UserError where there are none of a name that the library of its config.json loads, or shards are missing,
    or there are both a whole file and the index of shards, or a model and an adapter.
    """
    config = folder / "config.json"
    library = "diffusers" if config.exists() and "_class_name" in read_json(config) else "transformers"
    pattern = re.compile(WEIGHT_FILE.format(stem=STEMS[library]))
    found: dict[str | None, list[Path]] = {}
    for file in sorted(folder.glob("[!.]*")):
        match = pattern.fullmatch(file.name)
        if match is not None:
            found.setdefault(match["file"] or match["index"], []).append(file)
    if not found:
        raise _no_weights(folder, library)
    choices = [(name, _shards(found[name][0])) for name in sorted(found, key=lambda name: name or "")]
    variant, files = next((choice for choice in choices if any(file.exists() for file in choice[1])), choices[0])
    if len(found[variant]) > 1:  # diffusers would read the shards, transformers the whole file
        both = " and ".join(file.name for file in found[variant])
        raise UserError(f"{folder}: holds weights twice ({both}); remove those that are not meant")
    if library == "transformers" and (folder / ADAPTER_CONFIG).exists():  # transformers would put it on the weights
        raise UserError(
            f"{folder}: holds a model and an adapter ({ADAPTER_CONFIG}); move the adapter's files out of it if it is "
            "merged into the weights already, and merge it if not"
        )
    missing = next((file for file in files if not file.exists()), None)
    if missing is not None:
        raise incomplete(folder, f"{missing.name} is missing")
    return WeightFiles(variant, files)


def read_json(path: Path, folder: Path | None = None, *, may_be_list: bool = False) -> dict[str, Any]:
    """The JSON object in a file of a model.  Raises UserError where there is none.

    may_be_list: whether it may hold a list, as files of other libraries do, and results; that is read as no object.
    """
    why = ""
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError("it is too large")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        content, why = None, f" ({one_line(str(error), 100)})"
    if may_be_list and isinstance(content, list):
        return {}
    if not isinstance(content, dict):
        folder = folder or path.parent
        raise incomplete(folder, f"{path.relative_to(folder)} is not a JSON object{why}")
    return content


def check_files(folder: Path, part: Path, weights: bool) -> None:
    """Raises UserError unless the JSON files of a model, or of a part of one, and with `weights` its weights, are
    whole."""
    for path in part.glob("[!.]*.json"):
        read_json(path, folder, may_be_list="config" not in path.name)
    if weights:
        files = sorted(part.glob("[!.]*.safetensors"))
        has_model = any(file.name.startswith(("model.", "model-")) for file in files)
        if not files or has_model or not any((part / name).exists() for name in LORA_FILES):
            weight_files(part)
        config = read_json(part / "config.json", folder) if (part / "config.json").exists() else {}
        for file in files:
            check_file(file, folder)
            check_numbers(file, config)


def check_tokenizer_files(folder: Path, part: Path, class_name: str) -> None:
    """Raises UserError for a tokenizer without its words, or of a length that is none: one of that class, or what a
    tokenizer_config.json is of."""
    config = part / "tokenizer_config.json"
    if config.exists():
        settings = read_json(config, folder)
        class_name = f"{class_name} Tokenizer {settings.get('tokenizer_class')}"
        length = settings.get("model_max_length")
        if length is not None and (not isinstance(length, int | float) or isinstance(length, bool) or not length >= 1):
            given = one_line(json.dumps(length), 40)
            raise UserError(f"{config}: model_max_length {given}: must be a number of tokens; copy that file again")
    if "Tokenizer" not in class_name or NO_VOCABULARY in class_name:
        return
    if not any(all(_is_filled(part, name) for name in names) for names in VOCABULARIES):
        where = "the tokenizer" if part == folder else f"{part.name}/"
        allowed = " or ".join(" and ".join(names) for names in VOCABULARIES)
        raise incomplete(folder, f"{where} has no vocabulary ({allowed})")


def _is_filled(part: Path, pattern: str) -> bool:  # a full disk leaves empty files
    least = 1 if pattern == "merges.txt" else len('{"a": 0, "b": 1}')
    return any(file.stat().st_size >= least for file in part.glob(pattern))


def incomplete(folder: Path, what: str) -> UserError:
    return UserError(f"{folder}: half-downloaded model: {what}; download or copy it again")


def is_plain_name(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]*", name) is not None


def _shards(file: Path) -> tuple[Path, ...]:
    """The files of an index, or the file itself."""
    if file.suffix != ".json":
        return (file,)
    names = read_json(file).get("weight_map")
    if not isinstance(names, dict) or not names or not all(map(is_plain_name, names.values())):
        raise incomplete(file.parent, f"{file.name} has no weight_map of file names")
    return tuple(file.with_name(name) for name in sorted(set(names.values())))


def _no_weights(folder: Path, library: str) -> UserError:
    if any(file.suffix in (".bin", ".pt", ".pth", ".ckpt") for file in folder.glob("*")):
        return UserError(f"{folder}: only pickled weights; convert them to safetensors")
    wanted = f"no {STEMS[library]}.safetensors"
    if (other := next(folder.glob("[!.]*.safetensors"), None)) is None:
        return incomplete(folder, wanted)
    if re.fullmatch(rf"{STEMS[library]}-\d{{5}}-of-\d{{5}}\.safetensors", other.name):
        return incomplete(folder, f"the index of its shards, {STEMS[library]}.safetensors.index.json, is missing")
    what = f"{wanted} (there is {other.name}, which {library} does not load)"
    return UserError(
        f"{folder}: {what}; give it that name if {library} wrote it, download what is missing, or convert it"
    )
