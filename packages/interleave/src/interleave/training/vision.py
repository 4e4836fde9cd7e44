"""Which weights are trained."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from imgen_common.errors import UserError
from interleave.training.config import Vision
from interleave.training.trl_options import VISION_PARTS

if TYPE_CHECKING:
    from torch import nn

REFERENCE_FROZEN = ("patch_embed", "blocks", "merger")
"""Parts of the vision tower whose names the released code's filter matches."""


def is_vision(name: str) -> bool:
    """Whether a weight of that dotted name belongs to the vision tower or its projection."""
    return any(part in VISION_PARTS for part in name.split("."))


def is_frozen(name: str, vision: Vision) -> bool:
    """Whether a weight of that dotted name is not trained, without LoRA."""
    if vision == "train" or not is_vision(name):
        return False
    if vision == "frozen":
        return True
    parts = name.split(".")
    inside = parts[next(i for i, part in enumerate(parts) if part in VISION_PARTS) + 1 :]
    return bool(inside) and inside[0] in REFERENCE_FROZEN


def freeze(model: "nn.Module", vision: Vision) -> None:
    """Turn off the gradient of what `vision` freezes.  Raises UserError where no vision tower can be told apart."""
    named = list(model.named_parameters())
    if vision != "train" and not any(is_vision(name) for name, _ in named):
        raise UserError(
            f"vision: {vision}: no vision tower found in {type(model).__name__} (none of {', '.join(VISION_PARTS)} "
            "among its parts); set vision: train"
        )
    for name, weight in named:
        weight.requires_grad_(not is_frozen(name, vision))


def check_frozen(trained: Iterable[str], vision: Vision) -> None:
    """Raises RuntimeError if a weight is about to be trained that `vision` freezes (names may have peft's prefixes)."""
    wrong = [name for name in trained if is_frozen(name, vision)]
    if wrong:
        raise RuntimeError(f"{len(wrong)} weights of the vision tower would be trained, {wrong[0]} among them")
