"""Networks from folders whose weights and config.json fit each other: no weight missing, unused or of coded numbers."""

from pathlib import Path
from typing import Any

from imgen_common.errors import UserError

INTEGERS = frozenset(sign + bits for sign in "IU" for bits in ("8", "16", "32", "64"))
"""Numbers, by safetensors' names, that a plain weight never has; buffers, such as position_ids, may have them."""
QUANTIZED = ("quantization_config", "compression_config")
"""What config.json calls the way in which weights are coded; libraries decode those that it describes."""
REMEDY = "copy weights and config.json from one place"


def load_whole(kind: Any, folder: Path, **options: Any) -> Any:
    """The network of class `kind` in a folder of diffusers or transformers.  No code of the folder is run.

    transformers draws a weight that the files lack at random, and both libraries drop one that config.json has no layer
    for.  What diffusers drops is an error here; transformers' classes read parts of larger published models.
    options: further arguments of its `from_pretrained`.  Raises UserError for such weights, else what the library does.
    """
    model, found = kind.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
    )
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"{folder}: {len(missing)} weights are missing, the first is {missing[0]}; {REMEDY}")
    if kind.__module__.startswith("diffusers.") and (unused := sorted(found["unexpected_keys"])):
        raise UserError(
            f"{folder}: {len(unused)} weights have no place in the network of config.json, the first is {unused[0]}; "
            f"{REMEDY}"
        )
    return model


def check_numbers(file: Path, config: dict[str, Any]) -> None:
    """Raises UserError where weights of a file are integers that nothing in `config`, of config.json, tells to decode.

    Loaded, they would be taken as they are, without their scales.
    """
    from safetensors import safe_open

    # A model of several has its text model's description within its own
    described = [config, *(part for part in config.values() if isinstance(part, dict))]
    if any(part.get(name) for part in described for name in QUANTIZED):
        return
    with safe_open(file, "np") as tensors:
        names = [name for name in tensors.keys() if name.endswith(".weight")]  # noqa: SIM118 (it is no mapping)
        coded = [(name, kind) for name in names if (kind := tensors.get_slice(name).get_dtype()) in INTEGERS]
    if coded:
        name, kind = coded[0]
        raise UserError(
            f"{file}: {len(coded)} weights are integers ({kind}), the first is {name}, and config.json has no "
            f"{QUANTIZED[0]}; {REMEDY}"
        )
