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

    Raises UserError for a folder of another family.
    """
    folder = hub.resolve(ref)
    family = _pipeline_class(folder)
    if family not in FAMILIES:
        raise UserError(
            f"{ref}: cannot train a {family or 'folder without model_index.json'}; allowed: {', '.join(FAMILIES)}"
        )
    from flowbp.backbones.flux2 import Flux2

    return Flux2.load(folder, dtype=dtype, device=device)


def _pipeline_class(folder: Path) -> str | None:
    index = folder / "model_index.json"
    return json.loads(index.read_text())["_class_name"] if index.exists() else None
