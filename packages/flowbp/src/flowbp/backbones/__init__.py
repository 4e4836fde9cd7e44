"""One small adapter per model family; `load` picks it by what the folder says."""

import importlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowbp.backbones.licenses import PUBLISHED, license_of, name_of
from imgen_common import hub
from imgen_common.errors import UserError
from imgen_common.hub.settings import check_autoencoder, warn_of_unknown_settings
from imgen_common.weights import QUANTIZED, read_json

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from flowbp.core.types import Backbone

FAMILIES = {
    "Flux2KleinPipeline": ("flowbp.backbones.families.flux2", "Flux2"),
    "Flux2Pipeline": ("flowbp.backbones.families.flux2", "Flux2Dev"),
    "FluxPipeline": ("flowbp.backbones.families.flux", "Flux"),
    "FluxKontextPipeline": ("flowbp.backbones.families.flux", "FluxKontext"),
    "ZImagePipeline": ("flowbp.backbones.families.z_image", "ZImage"),
    "Krea2Pipeline": ("flowbp.backbones.families.krea2", "Krea2"),
    "QwenImagePipeline": ("flowbp.backbones.families.qwen_image", "QwenImage"),
    "QwenImage21Pipeline": ("flowbp.backbones.families.qwen_image_21", "QwenImage21"),
    "QwenImageEditPipeline": ("flowbp.backbones.families.qwen_image_edit", "QwenImageEdit"),
    "QwenImageEditPlusPipeline": ("flowbp.backbones.families.qwen_image_edit", "QwenImageEditPlus"),
    "StableDiffusion3Pipeline": ("flowbp.backbones.families.sd3", "SD3"),
}
"""Adapter of each diffusers pipeline: its module, imported when it is needed, and its class."""


def families_table() -> list[dict[str, str | float | None]]:
    """One row for every published model that is known here."""
    rows: list[dict[str, str | float | None]] = []
    for model in PUBLISHED:
        module, name = FAMILIES[model.pipeline]
        adapter = getattr(importlib.import_module(module), name)
        row = {"model": model.ref, "pipeline": model.pipeline, "license": license_of(model.ref)}
        row |= {"guidance": adapter.guidance_kind, "max_source_images": adapter.max_sources}
        rows.append({**row, "billions": model.billions, "lora_gb": model.lora_gb})
    return rows


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
    step-distilled.
    Raises UserError for a missing or half-downloaded model, one of another family, a step-distilled one, one whose
    scheduler is not reproduced exactly, or an embedded guidance that the model does not take.
    """
    from flowbp.backbones import pipelines

    folder, family, adapter = _resolve_family(ref, weights=True, distilled=distilled)
    backbone = adapter(pipelines.load_pipeline(family, folder, dtype, device, net_device))
    return _with_embedded_guidance(backbone, ref, embedded_guidance)


def init_empty_weights(ref: str, *, embedded_guidance: float | None = None, distilled: bool = False) -> "Backbone":
    """The backbone that `ref` names on the meta device, as under accelerate's `init_empty_weights`.

    It needs the JSON files only, and gives noise levels, image sizes and layer names; `encode`, `velocity` and `decode`
    do not work.  Arguments as for `load`.  Raises what `load` raises, but for weights that are missing.
    """
    from flowbp.backbones import pipelines

    folder, family, adapter = _resolve_family(ref, weights=False, distilled=distilled)
    backbone = adapter(pipelines.init_empty_pipeline(family, folder))
    return _with_embedded_guidance(backbone, ref, embedded_guidance)


def _with_embedded_guidance(backbone: "Backbone", ref: str, embedded_guidance: float | None) -> "Backbone":
    if embedded_guidance is not None:
        if not backbone.pipe.transformer.config.get("guidance_embeds"):
            raise UserError(
                f"model.embedded_guidance {embedded_guidance:g}: {ref} is not guidance-distilled; set it to null and "
                "use guidance_scale"
            )
        backbone.embedded_guidance = embedded_guidance
    return backbone


def _resolve_family(
    ref: str, *, weights: bool, distilled: bool
) -> "tuple[Path, type[DiffusionPipeline], Callable[[Any], Backbone]]":
    """The folder, its pipeline class and the adapter of that."""
    import diffusers

    from flowbp.backbones import pipelines

    folder = hub.resolve(ref, weights=weights)
    content = check_family(ref, folder)
    family = str(content["_class_name"])
    said = what_says_distilled(ref, content)
    if said and not distilled:
        raise UserError(
            f"{ref}: this model is step-distilled, as {said} says: training at many steps would undo that; use the "
            "base model and merge its adapter into this one, or set model.allow_distilled=true"
        )
    if read_json(folder / "transformer" / "config.json").get(QUANTIZED[0]):
        raise UserError(
            f"{ref}: the weights of its transformer are stored quantized, and cannot be trained; give a model with "
            "plain ones; model.quantization=int8 makes them small in memory"
        )
    pipelines.check_scheduler(ref, folder, content.get("scheduler"))
    module, name = FAMILIES[family]
    adapter = getattr(importlib.import_module(module), name)
    if adapter.decode is pipelines.PipelineBackbone.decode:  # others normalize latents by numbers for each channel
        check_autoencoder(ref, folder)
    warn_of_unknown_settings(folder)
    return folder, getattr(diffusers, family), adapter


def check_family(ref: str, folder: Path) -> Mapping[str, Any]:
    """The model_index.json of a model's folder.  Raises UserError for one of a family that cannot be trained."""
    content = hub.pipeline_index(ref, folder)
    if content.get("_class_name") not in FAMILIES:
        raise UserError(f"{ref}: cannot train a {content.get('_class_name')}; allowed: {', '.join(FAMILIES)}")
    return content


def what_says_distilled(ref: str, index: Mapping[str, Any]) -> str:
    """What says that a model is step-distilled: its model_index.json, or its name, where that does not; else empty."""
    is_called_so = re.search("turbo|schnell", Path(name_of(ref)).name.lower())
    return "its model_index.json" if index.get("is_distilled") else "its name" if is_called_so else ""
