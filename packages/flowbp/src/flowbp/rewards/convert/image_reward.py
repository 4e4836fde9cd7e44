"""From ImageReward's checkpoint to transformers' BLIP and a head."""

from pathlib import Path

from safetensors.torch import save_file
from transformers import BlipConfig, PreTrainedTokenizerBase

from flowbp.rewards.convert.checkpoints import StateDict, count_layers, head_weights
from flowbp.rewards.image_reward import build_towers
from imgen_common.weights import HEAD_FILE

BERT = "blip.text_encoder."
EMBEDDINGS = f"{BERT}embeddings.word_embeddings.weight"


def save_image_reward(
    state: StateDict, tokenizer: PreTrainedTokenizerBase, folder: Path, *, heads: int | None = None
) -> None:
    """Writes a folder that `ImageReward.load` reads.  heads: number in both towers; 64 wide each by default."""
    config = blip_config(state, heads)
    vision, text = build_towers(config)
    weights = {f"vision_model.{name}": state[_vit_name(name)] for name in vision.state_dict()}
    weights |= {
        f"text_encoder.{name}": state[f"blip.text_encoder.{name}"]
        for name in text.state_dict()
        if not name.endswith("position_ids")
    }
    for tower, prefix in ((vision, "vision_model."), (text, "text_encoder.")):  # this compares the shapes
        tower.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file({k: v.float().contiguous() for k, v in weights.items()}, folder / "model.safetensors")
    save_file(head_weights(state, "mlp.layers."), folder / HEAD_FILE)


def blip_config(state: StateDict, heads: int | None) -> BlipConfig:
    """The sizes of both towers, read from the weights."""
    vit, bert = "blip.visual_encoder.", BERT
    width, _, patch, _ = state[vit + "patch_embed.proj.weight"].shape
    vocabulary, text_width = state[EMBEDDINGS].shape
    return BlipConfig(
        vision_config={
            "hidden_size": width,
            "intermediate_size": state[vit + "blocks.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": count_layers(state, vit + "blocks."),
            "num_attention_heads": heads or max(1, width // 64),
            "image_size": round((state[vit + "pos_embed"].shape[1] - 1) ** 0.5) * patch,
            "patch_size": patch,
            "layer_norm_eps": 1e-6,
        },
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": text_width,
            "encoder_hidden_size": width,
            "intermediate_size": state[bert + "encoder.layer.0.intermediate.dense.weight"].shape[0],
            "num_hidden_layers": count_layers(state, bert + "encoder.layer."),
            "num_attention_heads": heads or max(1, text_width // 64),
            "max_position_embeddings": len(state[bert + "embeddings.position_embeddings.weight"]),
        },
    )


def _vit_name(name: str) -> str:
    """The published name of a weight of transformers' BLIP vision tower."""
    for ours, theirs in (
        ("embeddings.class_embedding", "cls_token"),
        ("embeddings.position_embedding", "pos_embed"),
        ("embeddings.patch_embedding", "patch_embed.proj"),
        ("encoder.layers.", "blocks."),
        ("self_attn.projection", "attn.proj"),
        ("self_attn.qkv", "attn.qkv"),
        ("post_layernorm", "norm"),
        ("layer_norm", "norm"),
    ):
        name = name.replace(ours, theirs)
    return "blip.visual_encoder." + name
