"""A backbone without its weights: noise levels, picture sizes and layer names of a model, at the cost of its JSON."""

import json

from flowbp.backbones import FAMILIES
from flowbp.types import Backbone
from imgen_common import hub
from imgen_common.errors import UserError


def skeleton(ref: str) -> Backbone:
    """The backbone that `ref` names, every weight on the meta device: `encode`, `velocity` and `decode` do not work.

    Raises UserError for a missing, half-downloaded or unknown model, as loading it would.
    """
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
    import torch
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
    from transformers import AutoConfig, AutoTokenizer, Qwen3ForCausalLM

    from flowbp.backbones.flux2 import Flux2

    with torch.device("meta"):
        net = Flux2Transformer2DModel.from_config(Flux2Transformer2DModel.load_config(folder / "transformer"))
        vae = AutoencoderKLFlux2.from_config(AutoencoderKLFlux2.load_config(folder / "vae"))
        text_encoder = Qwen3ForCausalLM(AutoConfig.from_pretrained(folder / "text_encoder"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    return Flux2(net, vae, text_encoder, tokenizer, scheduler)
