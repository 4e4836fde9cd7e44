"""From published reward checkpoints, most of them pickles, to safetensors folders that `RewardConfig` loads.

Pickles are read with torch's restricted unpickler (tensors and plain containers only) and never again afterwards.
"""

import ast
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from string import Formatter
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AddedToken,
    AutoConfig,
    AutoTokenizer,
    BlipConfig,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerBase,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLModel,
)

from flowbp.rewards.head import HEAD, PLACES
from flowbp.rewards.hpsv3 import PIXELS, REWARD, WORDS, Words, ranker
from flowbp.rewards.image_reward import towers
from flowbp.rewards.preprocess import CLIP_MEAN, CLIP_STD
from imgen_common import hub
from imgen_common.errors import UserError
from imgen_common.runs import whole_folder

Convertible = Literal["hpsv2", "hpsv3", "imagereward", "aesthetic"]
PUBLISHED: dict[Convertible, str] = {
    "hpsv2": "HPS_v2.1_compressed.pt",
    "hpsv3": "HPSv3.safetensors of MizzenAI/HPSv3",
    "imagereward": "ImageReward.pt",
    "aesthetic": "sac+logos+ava1-l14-linearMSE.pth",
}
"""The file that each is published as."""
PROMPT_SOURCE = "hpsv3/dataset/data_collator_qwen.py of the published package hpsv3 1.0.0"
MAX_SOURCE = 2**18
State = Mapping[str, Tensor]


def convert(kind: Convertible, file: Path, companion: str, out: Path, prompt_source: Path | None = None) -> Path:
    """Writes the folder of a reward; returns it.

    companion: a reference to a folder with the tokenizer (hpsv2: any CLIP's; imagereward: bert-base-uncased; hpsv3:
    Qwen2-VL-7B-Instruct, whose configuration is read too), or for `aesthetic` to the CLIP ViT-L/14 that the head was
    trained on.
    prompt_source: of hpsv3 only, see `words_of`.
    Raises UserError if `out` exists, or a file does not hold what `kind` says.
    """
    if prompt_source is not None and kind != "hpsv3":
        raise UserError(f"--prompt-source: is for hpsv3; {kind} reads prompts without words around them")
    if prompt_source is None and kind == "hpsv3":
        raise UserError(f"hpsv3: needs --prompt-source FILE, {PROMPT_SOURCE}")
    words = None if prompt_source is None else words_of(prompt_source)
    with whole_folder(out) as fresh:
        state = read(file, PUBLISHED[kind])
        try:
            if kind == "hpsv2":
                save_clip(open_clip(state), tokenizer_of(companion), fresh)
            elif words is not None:
                save_hpsv3(state, qwen2_vl_of(companion), tokenizer_of(companion), words, fresh)
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


def read(file: Path, published: str = "the published checkpoint") -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without the wrappers that trainers put around them.

    Raises UserError for a missing file or one with anything but tensors in plain containers.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; download {published} first")
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
    return _found(AutoTokenizer, "tokenizer", ref)


def qwen2_vl_of(ref: str) -> Qwen2VLConfig:
    """The sizes of a Qwen2-VL, a folder or `org/name`.  Raises UserError if there is another model, or none."""
    config = _found(AutoConfig, "configuration", ref)
    if not isinstance(config, Qwen2VLConfig):
        raise UserError(f"{ref}: holds a {config.model_type!r}; hpsv3 is made of Qwen2-VL-7B-Instruct")
    return config


def _found(kind: Any, what: str, ref: str) -> Any:
    try:
        return kind.from_pretrained(ref)
    except (OSError, ValueError) as error:
        raise UserError(f"{ref}: no {what} there ({str(error).splitlines()[0]})") from None


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


# --- HPSv3 -----------------------------------------------------------------------------------------------------------


def words_of(source: Path) -> Words:
    """What the published package puts around a prompt, from its file that says so, which is parsed and never run.

    Raises UserError if the file does not hold it.
    """
    strings = _strings(source)
    try:
        before, after = _around("text_prompt", strings["INSTRUCTION"])
        ending, _ = strings["prompt_with_special_token"].split(REWARD)
        return Words(before=before, after=after + ending)
    except (KeyError, ValueError):
        raise UserError(
            f"{source}: must set INSTRUCTION to a plain string with {{text_prompt}} in it once, and "
            f"prompt_with_special_token to one with {REWARD}; give {PROMPT_SOURCE}"
        ) from None


def _strings(source: Path) -> dict[str, str]:
    """The plain strings that names of a Python file are set to, outside functions and classes."""
    if not source.is_file():
        raise UserError(f"{source}: no such file; give {PROMPT_SOURCE}")
    with source.open("rb") as file:
        content = file.read(MAX_SOURCE + 1)
    if len(content) > MAX_SOURCE:
        raise UserError(f"{source}: is larger than {MAX_SOURCE} bytes; give {PROMPT_SOURCE}")
    try:
        body = ast.parse(content).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{source}: cannot be read as Python ({error}); give {PROMPT_SOURCE}") from None
    assigned = [(target, one.value) for one in body if isinstance(one, ast.Assign) for target in one.targets]
    last = {target.id: value for target, value in assigned if isinstance(target, ast.Name)}
    constants = {name: value.value for name, value in last.items() if isinstance(value, ast.Constant)}
    return {name: value for name, value in constants.items() if isinstance(value, str)}


def _around(field: str, template: str) -> tuple[str, str]:
    """What a template of `str.format` puts before and after its only field.  Raises ValueError if it has others."""
    pieces = list(Formatter().parse(template))
    places = [i for i, (_, name, _, _) in enumerate(pieces) if name is not None]
    if [pieces[i][1:] for i in places] != [(field, "", None)]:
        raise ValueError(template)
    texts, end = [piece[0] for piece in pieces], places[0] + 1
    return "".join(texts[:end]), "".join(texts[end:])


def save_hpsv3(
    state: State, config: Qwen2VLConfig, tokenizer: PreTrainedTokenizerBase, words: Words, folder: Path
) -> None:
    """A folder that `HPSv3.load` reads, in the checkpoint's precision.  Raises UserError if the parts do not fit."""
    rows, width = state["model.embed_tokens.weight"].shape
    tokenizer.add_tokens([AddedToken(REWARD, special=True, normalized=False)], special_tokens=True)
    if (config.text_config.hidden_size, tokenizer.convert_tokens_to_ids(REWARD)) != (width, rows - 1):
        raise UserError(
            f"the checkpoint has {rows} tokens, {width} wide; the model it is to be completed from has "
            f"{len(tokenizer)}, {config.text_config.hidden_size} wide: give Qwen2-VL-7B-Instruct"
        )
    config.text_config.vocab_size = rows
    with torch.device("meta"):
        model, top = Qwen2VLModel(config), ranker(width)
    model.load_state_dict({name: state[_qwen_name(name)] for name in model.state_dict()}, assign=True)
    processor = Qwen2VLImageProcessor(
        patch_size=config.vision_config.patch_size,
        temporal_patch_size=config.vision_config.temporal_patch_size,
        merge_size=config.vision_config.spatial_merge_size,
        size={"shortest_edge": PIXELS, "longest_edge": PIXELS},
    )
    for part in (model, processor, tokenizer):
        part.save_pretrained(folder)
    save_file({name: state[f"rm_head.{name}"].float().contiguous() for name in top.state_dict()}, folder / HEAD)
    (folder / WORDS).write_text(words.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _qwen_name(name: str) -> str:
    """The published name, of older transformers, of a weight of transformers' Qwen2-VL."""
    return name.replace("language_model.", "model.", 1) if name.startswith("language_model.") else name
