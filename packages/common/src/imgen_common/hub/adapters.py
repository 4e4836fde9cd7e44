"""Adapters: which file is one, how its tensors are named, and from which weights its training began."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from imgen_common.errors import UserError, one_line

T = TypeVar("T")
ADAPTER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""Adapters of PEFT and of diffusers, looked for first in a folder."""
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")
"""Ways in which PEFT draws the first A and B of an adapter and leaves the weights of the model alone."""
ADAPTER_KEY = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<part>A|B|down|up)(?:\.default)?\.weight|lora\.(?P<old>down|up)\.weight|(?P<alpha>alpha))"
)
ADAPTER_PREFIXES = ("", "transformer_", "base_model_model_", "lora_unet_", "lora_transformer_", "diffusion_model_")
"""What stands before the name of a layer, dots as underscores: nothing, diffusers, PEFT, kohya twice, ComfyUI."""


def choose_adapter(ref: str, names: Sequence[str], remedy: str = "") -> str:
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


def check_plain_start(options: Mapping[str, Any], what: str) -> None:
    """Raises UserError where PEFT's description of an adapter, `what` in messages, says that training began from
    changed weights of the model, as PiSSA does: the adapter alone is not the difference to the published ones."""
    begun = options.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower() not in PLAIN_STARTS:
        raise UserError(
            f"{what}: its init_lora_weights {one_line(begun, 40)} changes the weights of the model that it belongs to; "
            "convert it to a plain LoRA (path_initial_model_for_weight_conversion of PEFT)"
        )


def parse_adapter_key(key: str, targets: Mapping[str, T]) -> tuple[str, str, T | None] | None:
    """The module of an adapter's tensor, its part of that (down, up or alpha), and what the module stands for among
    `targets`, by names with underscores for dots; None for a tensor that is no part of a plain LoRA."""
    match = ADAPTER_KEY.fullmatch(key)
    if match is None:
        return None
    part = "alpha" if match["alpha"] else "down" if (match["part"] or match["old"]) in ("A", "down") else "up"
    flat = match["module"].replace(".", "_")
    names = (flat.removeprefix(prefix) for prefix in ADAPTER_PREFIXES if flat.startswith(prefix))
    return match["module"], part, next((targets[name] for name in names if name in targets), None)
