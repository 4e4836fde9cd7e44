"""One small adapter per model family; `load` picks it by what the folder says."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgen_common import hub
from imgen_common.errors import UserError

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from flowbp.core.types import Backbone

FAMILIES = {
    "Flux2KleinPipeline": ("flowbp.backbones.flux2", "Flux2"),
    "FluxPipeline": ("flowbp.backbones.flux", "Flux"),
    "FluxKontextPipeline": ("flowbp.backbones.flux", "FluxKontext"),
    "StableDiffusion3Pipeline": ("flowbp.backbones.sd3", "SD3"),
}
"""Adapter of each diffusers pipeline: its module, imported when it is needed, and its class."""


def load(
    ref: str,
    *,
    dtype: "torch.dtype | None" = None,
    device: "torch.device | str" = "cpu",
    net_device: "torch.device | str | None" = None,
    embedded_guidance: float | None = None,
    distilled: bool = False,
) -> "Backbone":
    """The backbone of a diffusers folder (`builtin:...`, a path, or `org/name@revision`), frozen, float32 by default.

    net_device: where the transformer goes, if not to `device`; on "meta" its weights are not read.
    embedded_guidance: guidance input of a guidance-distilled model; None: its default.  distilled: whether it may be
    step-distilled, as nothing is trained.
    Raises UserError for a missing or half-downloaded model, one of another family, a step-distilled one, one whose
    scheduler is not reproduced exactly, or an embedded guidance that the model does not take.
    """
    from flowbp.backbones import pipelines

    folder, family, adapter = _resolve_family(ref, weights=True, distilled=distilled)
    backbone = adapter(pipelines.load_pipeline(family, folder, dtype, device, net_device))
    return with_embedded_guidance(backbone, ref, embedded_guidance)


def with_embedded_guidance(backbone: "Backbone", ref: str, embedded_guidance: float | None) -> "Backbone":
    """The backbone with its guidance input set, unless that is None.  Raises UserError where it has no such input."""
    if embedded_guidance is not None:
        from flowbp.backbones.flux import Flux

        if not (isinstance(backbone, Flux) and backbone.pipe.transformer.config.guidance_embeds):
            raise UserError(
                f"model.embedded_guidance {embedded_guidance:g}: {ref} is not guidance-distilled; set it to null and "
                "use guidance_scale"
            )
        backbone.guidance = embedded_guidance
    return backbone


def init_empty_weights(ref: str, *, distilled: bool = False) -> "Backbone":
    """The backbone that `ref` names on the meta device, as under accelerate's `init_empty_weights`.

    It needs the JSON files only, and gives noise levels, image sizes and layer names; `encode`, `velocity` and `decode`
    do not work.  distilled: as for `load`.  Raises what `load` raises, but for weights that are missing.
    """
    from flowbp.backbones import pipelines

    folder, family, adapter = _resolve_family(ref, weights=False, distilled=distilled)
    return adapter(pipelines.init_empty_pipeline(family, folder))


def _resolve_family(
    ref: str, *, weights: bool, distilled: bool
) -> "tuple[Path, type[DiffusionPipeline], Callable[[Any], Backbone]]":
    """The folder, its pipeline class and the adapter of that."""
    import diffusers

    from flowbp.backbones import pipelines

    folder = hub.resolve(ref, weights=weights)
    content = hub.pipeline_index(ref, folder)
    family = str(content.get("_class_name"))
    if family not in FAMILIES:
        raise UserError(f"{ref}: cannot train a {family}; allowed: {', '.join(FAMILIES)}")
    if content.get("is_distilled") and not distilled:
        raise UserError(f"{ref}: this model is step-distilled; use the base model (klein-base) instead")
    pipelines.check_scheduler(ref, folder, content.get("scheduler"))
    if family != "Flux2KleinPipeline":  # its latents are normalized by statistics among the weights
        pipelines.check_autoencoder(ref, folder)
    module, name = FAMILIES[family]
    return folder, getattr(diffusers, family), getattr(importlib.import_module(module), name)
