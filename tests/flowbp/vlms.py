"""Tiny vision-language models of every family, with fresh weights, a byte for each token, and any reward.json."""

import json
from pathlib import Path
from typing import Any

import torch
from golden.inputs import QWEN2_VL_CHAT, byte_tokenizer
from torch import nn
from transformers import (
    AutoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from flowbp.rewards import RewardConfig
from flowbp.rewards.vlm.reward import VlmReward

TOKENS = {"vision_start_token_id": 259, "vision_end_token_id": 260, "image_token_id": 261, "video_token_id": 262}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "vocab_size": 264,
    "eos_token_id": 258,
    "pad_token_id": 256,
    "initializer_range": 0.2,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
VISION = {"depth": 2, "patch_size": 4, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
FAMILIES: dict[str, tuple[Any, Any, Any, Any, dict[str, Any]]] = {
    "qwen2_vl": (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
        {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "initializer_range": 0.2},
    ),
    "qwen2_5_vl": (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor,
        {
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.2,
        },
    ),
    "qwen3_vl": (
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
        {
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
            "initializer_range": 0.2,
        },
    ),
}
TOKEN = {"kind": "token", "token": "y", "against": ["n"]}
TEMPLATE = "<source>was: {prompt} {braces} <image> now?"


def vlm_folder(family: str, folder: Path, answer: dict[str, Any] | None = None, **settings: Any) -> Path:
    """A model whose images have between 1 and 64 tokens, with `reward.json` for a way to answer, `TOKEN` by default."""
    config_class, model_class, processor_class, video_class, vision = FAMILIES[family]
    config = config_class(
        text_config=TEXT | {"rope_parameters": ROPE}, vision_config=VISION | vision, **TOKENS, eos_token_id=258
    )
    torch.manual_seed(0)
    model = model_class(config)
    for weight in model.parameters():  # biases and norms too, so that no gradient is 0 by chance
        weight.data += 0.1 * torch.randn_like(weight) if weight.dim() == 1 else 0
    model.generation_config.eos_token_id = 258
    model.save_pretrained(folder)
    sizes = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    image = Qwen2VLImageProcessor(size={"shortest_edge": 64, "longest_edge": 64 * 64}, **sizes)
    tokenizer = Qwen2Tokenizer(tokenizer_object=byte_tokenizer(), pad_token="<|endoftext|>", eos_token="<|im_end|>")
    processor_class(image, tokenizer, video_class(), QWEN2_VL_CHAT).save_pretrained(folder)
    write_settings(folder, {"template": TEMPLATE, "answer": answer or TOKEN} | settings)
    return folder


def write_settings(folder: Path, settings: dict[str, Any]) -> Path:
    (folder / "reward.json").write_text(json.dumps(settings))
    return folder


def load_vlm(folder: Path, *, exact: bool = False) -> VlmReward:
    """The reward.  exact: in float64 throughout, where transformers takes norms in float32."""
    reward = RewardConfig(score="vlm", ref=str(folder)).load()
    assert isinstance(reward, VlmReward)
    if exact:
        reward.vlm.model.double()
        for module in reward.vlm.model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = exact_norm.__get__(module)
    return reward


def exact_norm(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def processor_of(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder)
