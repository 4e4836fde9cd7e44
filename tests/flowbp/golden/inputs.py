"""Weights and pictures that anyone can make again from their names alone, whatever the library."""

import zlib

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers


def weights(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 numbers for a weight of this name: norms near one, matrices that keep the size of what goes through."""
    draws = np.random.Generator(np.random.Philox(zlib.crc32(key.encode()))).standard_normal(shape)
    if len(shape) == 1 and key.endswith("weight"):
        return np.asarray(1 + 0.1 * draws, dtype=np.float32)
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 16
    return np.asarray(draws / np.sqrt(fan_in), dtype=np.float32)


def pictures(height: int, width: int) -> np.ndarray:
    """Two pictures of waves, (2, 3, height, width) float32 in whole 1/255."""
    n, c, y, x = np.meshgrid(*(np.arange(k) for k in (2, 3, height, width)), indexing="ij")
    waves = np.sin(0.31 * (n + 1) * y + 0.7 * c) * np.cos(0.23 * x * (1 + 0.2 * c) - n)
    return (np.round(255 * (0.5 + 0.5 * waves)) / 255).astype(np.float32)


TOKENS = [[2, 7, 9, 4, 3], [2, 11, 5, 6, 3]]
"""Ids of two prompts of equal length, the last one the end."""

QWEN2_VL = {
    "model_type": "qwen2_vl",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "vocab_size": 300,
    "bos_token_id": 256,
    "eos_token_id": 258,
    "vision_start_token_id": 259,
    "vision_end_token_id": 260,
    "image_token_id": 261,
    "video_token_id": 262,
    "vision_config": {"depth": 2, "embed_dim": 32, "mlp_ratio": 2, "num_heads": 2, "hidden_size": 32, "in_chans": 3},
}
"""A tiny Qwen2-VL in the flat form that Qwen2-VL-7B-Instruct is published in."""

QWEN2_VL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
"""Ids 256, 257, ...: those below are bytes."""

QWEN2_VL_CHAT = """\
{%- for m in messages %}{% if loop.first %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ m.role }}
{% for c in m.content %}{{ c.text if c.type == 'text' else '<|vision_start|><|image_pad|><|vision_end|>' }}\
{%- endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""What the published chat template makes of one user's picture and text."""

HPSV3_WORDS = {
    "INSTRUCTION": "\nHow good is it {{0 to 10}}?  \nWanted - {text_prompt}\n\n",
    "prompt_with_special_token": "\nMarks: <|Reward|>\n\nThanks\n",
}
"""Words of our own under the names of HPSv3's constants."""


def byte_tokenizer() -> Tokenizer:
    """A token for every byte, and Qwen2-VL's special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(list(QWEN2_VL_TOKENS))
    return tokenizer
