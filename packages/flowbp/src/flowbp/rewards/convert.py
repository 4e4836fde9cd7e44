"""From published reward checkpoints, which are pickles, to safetensors folders that `RewardConfig` loads.

Pickles are read with torch's restricted unpickler (tensors and plain containers only) and never again afterwards.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BlipConfig,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerBase,
)

from flowbp.rewards.head import HEAD, PLACES
from flowbp.rewards.image_reward import towers
from flowbp.rewards.preprocess import CLIP_MEAN, CLIP_STD
from imgen_common import hub
from imgen_common.errors import UserError
from imgen_common.runs import whole_folder

Convertible = Literal["hpsv2", "imagereward", "aesthetic"]
State = Mapping[str, Tensor]


def convert(kind: Convertible, file: Path, companion: str, out: Path) -> Path:
    """Writes the folder of a reward; returns it.

    companion: a reference to a folder with the tokenizer (hpsv2: any CLIP's; imagereward: bert-base-uncased), or for
    `aesthetic` to the CLIP ViT-L/14 that the head was trained on.
    Raises UserError if `out` exists, or the file does not hold what `kind` says.
    """
    with whole_folder(out) as fresh:
        state = read(file)
        try:
            if kind == "hpsv2":
                save_clip(open_clip(state), tokenizer_of(companion), fresh)
            elif kind == "imagereward":
                save_image_reward(state, tokenizer_of(companion), fresh)
            else:
                for part in hub.resolve(companion).iterdir():
                    if part.suffix in (".json", ".txt", ".safetensors"):
                        shutil.copy(part, fresh)
                save_file(head_weights(state, "layers."), fresh / HEAD)
        except KeyError as error:
            raise UserError(f"{file}: not a checkpoint of {kind}: {error.args[0]} is missing") from None
    return out


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without the wrappers that trainers put around them.

    Raises UserError for a missing file or one with anything but tensors in plain containers.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; download the published checkpoint first")
    if file.suffix == ".safetensors":
        return load_file(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{file}: cannot be read as tensors in plain containers, and anything else is not unpickled ({error})"
        ) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    return {key.removeprefix("module."): value for key, value in content.items() if isinstance(value, Tensor)}


def tokenizer_of(ref: str) -> PreTrainedTokenizerBase:
    """A tokenizer of a folder or of `org/name`.  Raises UserError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(ref)
    except (OSError, ValueError) as error:
        raise UserError(f"{ref}: no tokenizer there ({str(error).splitlines()[0]})") from None


# --- open_clip -------------------------------------------------------------------------------------------------------


def open_clip(state: State, *, vision_heads: int | None = None, text_heads: int | None = None) -> CLIPModel:
    """A transformers `CLIPModel` with the weights of an open_clip one (exact GELU, as ViT-H-14).

    Numbers of heads are not in the weights: 64 wide each by default, 80 in the picture tower of ViT-H.
    """
    patches = state["visual.conv1.weight"]
    width, _, patch, _ = patches.shape
    positions, (vocabulary, text_width) = state["visual.positional_embedding"], state["token_embedding.weight"].shape
    projection = state["visual.proj"].shape[1]
    config = CLIPConfig(
        projection_dim=projection,
        vision_config={
            "hidden_size": width,
            "intermediate_size": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": _depth(state, "visual.transformer.resblocks."),
            "num_attention_heads": vision_heads or (16 if width == 1280 else max(1, width // 64)),
            "image_size": round((len(positions) - 1) ** 0.5) * patch,
            "patch_size": patch,
            "projection_dim": projection,
            "hidden_act": "gelu",
        },
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": text_width,
            "intermediate_size": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": _depth(state, "transformer.resblocks."),
            "num_attention_heads": text_heads or max(1, text_width // 64),
            "max_position_embeddings": len(state["positional_embedding"]),
            "projection_dim": projection,
            "hidden_act": "gelu",
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
        },
    )
    with torch.device("meta"):
        model = CLIPModel(config)
    weights = {
        "logit_scale": state["logit_scale"],
        "visual_projection.weight": state["visual.proj"].T,
        "text_projection.weight": state["text_projection"].T,
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": patches,
        "vision_model.embeddings.position_embedding.weight": positions,
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
    }
    for old, new in (
        ("visual.ln_pre", "vision_model.pre_layrnorm"),
        ("visual.ln_post", "vision_model.post_layernorm"),
        ("ln_final", "text_model.final_layer_norm"),
    ):
        weights |= {f"{new}.{part}": state[f"{old}.{part}"] for part in ("weight", "bias")}
    weights |= _blocks(state, "visual.transformer.resblocks.", "vision_model.encoder.layers.")
    weights |= _blocks(state, "transformer.resblocks.", "text_model.encoder.layers.")
    known = {name for name, _ in model.named_parameters()}
    model.load_state_dict({k: v.float().contiguous() for k, v in weights.items() if k in known}, assign=True)
    return _with_positions(model)


def _with_positions(model: CLIPModel) -> CLIPModel:
    """Position ids, which are no weights, off the meta device."""
    for tower in (model.text_model.embeddings, model.vision_model.embeddings):
        count = tower.position_embedding.num_embeddings
        tower.register_buffer("position_ids", torch.arange(count)[None], persistent=False)
    return model


def _blocks(state: State, old: str, new: str) -> dict[str, Tensor]:
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    found = {}
    for i in range(_depth(state, old)):
        for part in ("weight", "bias"):
            for theirs, ours in names.items():
                found[f"{new}{i}.{ours}.{part}"] = state[f"{old}{i}.{theirs}.{part}"]
            fused = state[f"{old}{i}.attn.in_proj_{part}"].chunk(3)
            found |= {f"{new}{i}.self_attn.{n}_proj.{part}": x for n, x in zip("qkv", fused, strict=True)}
    return found


def _depth(state: State, prefix: str) -> int:
    """Number of layers under a prefix."""
    found = [re.match(re.escape(prefix) + r"(\d+)\.", key) for key in state]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def save_clip(model: CLIPModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A whole transformers folder of a CLIP model."""
    side = model.config.vision_config.image_size
    processor = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )
    for part in (model, processor, tokenizer):
        part.save_pretrained(folder)


# --- ImageReward -----------------------------------------------------------------------------------------------------


def save_image_reward(
    state: State, tokenizer: PreTrainedTokenizerBase, folder: Path, *, heads: int | None = None
) -> None:
    """A folder that `ImageReward.load` reads.  heads: of both towers; 64 wide each by default."""
    config = blip_config(state, heads)
    vision, text = towers(config)
    weights = {f"vision_model.{name}": state[_vit_name(name)] for name in vision.state_dict()}
    weights |= {
        f"text_encoder.{name}": state[f"blip.text_encoder.{name}"]
        for name in text.state_dict()
        if not name.endswith("position_ids")
    }
    for tower, prefix in ((vision, "vision_model."), (text, "text_encoder.")):  # shapes are compared here
        tower.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file({k: v.float().contiguous() for k, v in weights.items()}, folder / "model.safetensors")
    save_file(head_weights(state, "mlp.layers."), folder / HEAD)


def blip_config(state: State, heads: int | None) -> BlipConfig:
    """Sizes of both towers, read from the weights."""
    vit, bert = "blip.visual_encoder.", "blip.text_encoder."
    width, _, patch, _ = state[vit + "patch_embed.proj.weight"].shape
    vocabulary, text_width = state[bert + "embeddings.word_embeddings.weight"].shape
    return BlipConfig(
        vision_config={
            "hidden_size": width,
            "intermediate_size": state[vit + "blocks.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": _depth(state, vit + "blocks."),
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
            "num_hidden_layers": _depth(state, bert + "encoder.layer."),
            "num_attention_heads": heads or max(1, text_width // 64),
            "max_position_embeddings": len(state[bert + "embeddings.position_embeddings.weight"]),
        },
    )


def _vit_name(name: str) -> str:
    """The published name of a weight of transformers' BLIP picture tower."""
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


def head_weights(state: State, prefix: str) -> dict[str, Tensor]:
    """The shared head's weights under our names."""
    return {
        f"{i}.{part}": state[f"{prefix}{place}.{part}"].float().contiguous()
        for i, place in enumerate(PLACES)
        for part in ("weight", "bias")
    }
