"""One small adapter per model family; `load` picks it by what the folder says."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from imgen_common import hub
from imgen_common.errors import UserError

if TYPE_CHECKING:
    import torch

    from flowbp.backbones.flux2 import Flux2

FAMILIES = ("Flux2KleinPipeline",)


def load(ref: str, *, dtype: "torch.dtype | None" = None, device: "torch.device | str" = "cpu") -> "Flux2":
    """The backbone of a diffusers folder (`builtin:...`, a path, or `org/name@revision`).

    Raises UserError for a missing or half-downloaded model, one of another family, or a step-distilled one.
    """
    folder = _checked(ref)
    from flowbp.backbones.flux2 import Flux2

    return Flux2.load(folder, dtype=dtype, device=device)


def skeleton(ref: str) -> "Flux2":
    """The backbone that `ref` names, every weight on the meta device: `encode`, `velocity` and `decode` do not work.

    Gives noise levels, picture sizes and layer names at the cost of its JSON files.  Raises what `load` raises.
    """
    folder = _checked(ref)
    from flowbp.backbones.flux2 import Flux2

    return Flux2.skeleton(folder)


def _checked(ref: str) -> Path:
    folder = hub.resolve(ref)
    index = folder / "model_index.json"
    content = json.loads(index.read_text(encoding="utf-8")) if index.exists() else {}
    family = content.get("_class_name")
    if family not in FAMILIES:
        raise UserError(
            f"{ref}: cannot train a {family or 'folder without model_index.json'}; allowed: {', '.join(FAMILIES)}"
        )
    if content.get("is_distilled"):
        raise UserError(f"{ref}: this model is step-distilled; use the base model (klein-base) instead")
    return folder
