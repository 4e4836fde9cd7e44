"""From the layout of open_clip to `CLIPModel`."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerBase

from flowbp.rewards.convert.checkpoints import StateDict, count_layers
from flowbp.rewards.preprocess import CLIP_MEAN, CLIP_STD

VISION, TEXT = "visual.transformer.resblocks.", "transformer.resblocks."
WEIGHTS = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
}
"""Weights by their name in transformers, each with its name in open_clip."""
NORMS = {
    "visual.ln_pre": "vision_model.pre_layrnorm",  # spelled so in transformers
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
LAYERS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""Modules by their name in open_clip, each with its name in transformers; those of a layer by the end of their name."""


def clip_from_open_clip(
    state: StateDict, *, vision_heads: int | None = None, text_heads: int | None = None
) -> CLIPModel:
    """A transformers `CLIPModel` with the weights of an open_clip model (exact GELU, as ViT-H-14).

    The weights do not tell the number of attention heads: 64 wide each by default, 80 in the vision tower of ViT-H.
    """
    with torch.device("meta"):
        model = CLIPModel(_clip_config(state, vision_heads, text_heads))
    weights = {new: state[old] for new, old in WEIGHTS.items()}
    weights |= {
        "logit_scale": state["logit_scale"],
        "visual_projection.weight": state["visual.proj"].T,
        "text_projection.weight": state["text_projection"].T,
    }
    for old, new in NORMS.items():
        weights |= {f"{new}.{part}": state[f"{old}.{part}"] for part in ("weight", "bias")}
    weights |= _layers(state, VISION, "vision_model.encoder.layers.")
    weights |= _layers(state, TEXT, "text_model.encoder.layers.")
    known = {name for name, _ in model.named_parameters()}
    model.load_state_dict({k: v.float().contiguous() for k, v in weights.items() if k in known}, assign=True)
    # position ids are no weights: they are still on the meta device
    for tower in (model.text_model.embeddings, model.vision_model.embeddings):
        count = tower.position_embedding.num_embeddings
        tower.register_buffer("position_ids", torch.arange(count)[None], persistent=False)
    return model


def _clip_config(state: StateDict, vision_heads: int | None, text_heads: int | None) -> CLIPConfig:
    """The sizes of both towers, read from the weights."""
    width, _, patch, _ = state["visual.conv1.weight"].shape
    vocabulary, text_width = state["token_embedding.weight"].shape
    projection = state["visual.proj"].shape[1]
    return CLIPConfig(
        projection_dim=projection,
        vision_config={
            "hidden_size": width,
            "intermediate_size": state[f"{VISION}0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": count_layers(state, VISION),
            "num_attention_heads": vision_heads or (16 if width == 1280 else max(1, width // 64)),
            "image_size": round((len(state["visual.positional_embedding"]) - 1) ** 0.5) * patch,
            "patch_size": patch,
            "projection_dim": projection,
            "hidden_act": "gelu",
        },
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": text_width,
            "intermediate_size": state[f"{TEXT}0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": count_layers(state, TEXT),
            "num_attention_heads": text_heads or max(1, text_width // 64),
            "max_position_embeddings": len(state["positional_embedding"]),
            "projection_dim": projection,
            "hidden_act": "gelu",
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
        },
    )


def _layers(state: StateDict, old: str, new: str) -> dict[str, Tensor]:
    """The weights of all transformer layers; open_clip has query, key and value in one."""
    found = {}
    for i in range(count_layers(state, old)):
        for part in ("weight", "bias"):
            for theirs, ours in LAYERS.items():
                found[f"{new}{i}.{ours}.{part}"] = state[f"{old}{i}.{theirs}.{part}"]
            fused = state[f"{old}{i}.attn.in_proj_{part}"].chunk(3)
            found |= {f"{new}{i}.self_attn.{n}_proj.{part}": x for n, x in zip("qkv", fused, strict=True)}
    return found


def save_clip(model: CLIPModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a whole transformers folder of a CLIP model."""
    side = model.config.vision_config.image_size
    processor = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
    for part in (model, processor, tokenizer):
        part.save_pretrained(folder)
