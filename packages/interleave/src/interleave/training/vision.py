"""Which weights are trained."""

from typing import TYPE_CHECKING

from imgen_common.errors import UserError
from interleave.training.config import Vision
from interleave.training.trl_options import VISION_PARTS

if TYPE_CHECKING:
    from torch import nn

REFERENCE_FROZEN = ("patch_embed", "blocks", "merger")
"""Parts of the vision tower whose names the released code's filter matches."""


def is_frozen(name: str, vision: Vision) -> bool:
    """Whether a weight of that dotted name, which may have peft's prefixes, is not trained."""
    parts = name.split(".")
    tower = next((place for place, part in enumerate(parts) if part in VISION_PARTS), None)
    if vision == "train" or tower is None:
        return False
    return vision == "frozen" or any(part in REFERENCE_FROZEN for part in parts[tower + 1 : tower + 2])


def freeze_vision(model: "nn.Module", vision: Vision) -> None:
    """Turns off the gradient of what `vision` freezes.  Raises UserError where no vision tower is found, or `reference`
    would freeze none of it, since its parts have other names."""
    named = list(model.named_parameters())
    if vision != "train" and not any(is_frozen(name, "frozen") for name, _ in named):
        raise UserError(
            f"vision: {vision}: no vision tower found in {type(model).__name__} (none of {', '.join(VISION_PARTS)} "
            "among its parts); set vision: train"
        )
    if vision == "reference" and not any(is_frozen(name, vision) for name, _ in named):
        raise UserError(
            f"vision: reference is of Qwen's models, and would train the whole tower of {type(model).__name__}; set "
            "vision: frozen or train"
        )
    for name, weight in named:
        weight.requires_grad_(not is_frozen(name, vision))


def check_trainable(model: "nn.Module", vision: Vision) -> None:
    """Raises RuntimeError if a frozen weight would be trained, or if no weight would be."""
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    if not trained:
        raise RuntimeError("no weight would be trained")
    frozen = [name for name in trained if is_frozen(name, vision)]
    if frozen:
        raise RuntimeError(f"{len(frozen)} weights of the vision tower would be trained, {frozen[0]} among them")
