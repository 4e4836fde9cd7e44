"""Tiny Qwen3-VL checkpoints: their configuration, a tokenizer of whole words, a processor for 32x32 images."""

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgen_common.config import Config
from imgen_common.shapes.scene import CATEGORIES, COLOURS, SHAPES, SIZE, specs
from imgen_common.streams import numpy_generator
from interleave.datasets.teachers import PLACES

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer, Qwen3VLForConditionalGeneration, Qwen3VLProcessor


PATCH, MERGE = 4, 2
"""An image is 8 x 8 patches of 4 pixels, four of which make one token: 16 tokens."""
MAX_LENGTH = 512
"""Maximum length of prompt and answer together, in tokens."""

CONTROL = tuple(
    f"<|{name}|>" for name in "endoftext im_start im_end vision_start vision_end vision_pad image_pad video_pad".split()
)
PIECES = (
    "<think>",
    '</think><answer>{"execution_plan": [{"step_number": ',
    ', "step_name": "',
    '", "instruction": "',
    '", "prompt": "',
    '", "auxiliary_text": null}, {"step_number": ',
    '", "auxiliary_text": null}]}</answer>',
    '</think><answer>{"previous_step_success": ',
    ', "refine_prompt": "',
    '"}</answer>',
)
"""Parts of the format of an answer.  Each is one token, so that a plan of three steps has about 100 tokens."""
NAMES = tuple(f" ({color} {shape})" for color in (*COLOURS, "mixed") for shape in (*SHAPES, "blob"))
"""Names of things in the critic's reports after the first image, one token each.  With one token for the color and one
for the shape, the critic took a `green square` and a `red circle` for a `green circle`."""
STARTS = (
    "was", "three", "Here", "before", "user", "assistant", "true", "false", "draw", "add", "recolour", "remove", "make",
    "a", "two", "A", "The", "plan",
)  # fmt: skip
"""Words without a space before them, in an order in which the merges of no word break a later one."""
REPORT = (
    "before after want nothing mixed blob made and they keep it is as asked wrong things moved place fits not".split()
)
"""Words of the reports in `<think>` that occur in no request."""

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class ModelSize(Config):
    """Widths and depths of one checkpoint."""

    width: int = 128
    """Width of the language model."""
    layers: int = 4
    """Layers of the language model."""
    vision_width: int = 96
    """Width of the vision tower."""
    vision_layers: int = 3
    """Layers of the vision tower."""
    scale: float = 0.06
    """Standard deviation of fresh weights; transformers' 0.02 suits widths of thousands."""


PLANNER = ModelSize(vision_width=32, vision_layers=1)
CRITIC = ModelSize()


@cache
def words() -> tuple[str, ...]:
    """Every word of requests, prompts, captions and reports, in a fixed order."""
    from imgen_common.shapes.stories import sample_story

    rng = numpy_generator(0, "miniature-words")
    stories = [sample_story(rng, split, riddle=i % 2 == 1) for split in ("train", "test") for i in range(3000)]
    texts = [s.request for s in stories] + [f"{step.prompt} {step.text}" for s in stories for step in s.steps]
    texts += [spec.caption for category in CATEGORIES for spec in specs(category, "train")]
    found = {word for text in texts for word in re.findall(r"[A-Za-z]+", text)}
    return tuple(sorted(found | set(REPORT) | set(PLACES) | set(STARTS)))


def tokenizer() -> "Qwen2Tokenizer":
    """A Qwen2 tokenizer over bytes in which every word of the world, with its space, and every piece is one token."""
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    tokens, merges = sorted(ByteLevel.alphabet()), []
    for word in [*("Ġ" + word for word in words()), *STARTS]:
        for i in range(1, len(word)):
            if word[: i + 1] not in tokens:
                tokens.append(word[: i + 1])
                merges.append((word[:i], word[i]))
    vocab = {token: i for i, token in enumerate([*tokens, *CONTROL])}
    made = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(CONTROL[1:]),
        model_max_length=MAX_LENGTH,
        padding_side="left",
    )
    made.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in (*PIECES, *NAMES)])
    made.chat_template = CHAT_TEMPLATE
    return made


def processor() -> "Qwen3VLProcessor":
    """The processor, which does not resize an image of 32x32 pixels."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    pixels = {"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE}
    sizes = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": MERGE, "size": pixels}
    sizes |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer(),
        video_processor=Qwen3VLVideoProcessor(**sizes),
        chat_template=CHAT_TEMPLATE,
    )


def text_config(size: ModelSize, words: "Qwen2Tokenizer") -> dict[str, Any]:
    """Configuration of the language model."""
    return {
        "vocab_size": len(words),
        "hidden_size": size.width,
        "intermediate_size": 3 * size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.width // 32,
        "num_key_value_heads": size.width // 32,
        "head_dim": 32,
        "max_position_embeddings": MAX_LENGTH,
        "pad_token_id": words.pad_token_id,
        "eos_token_id": words.eos_token_id,
        "bos_token_id": None,
        "tie_word_embeddings": True,
        "initializer_range": size.scale,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
    }


def vision_config(size: ModelSize) -> dict[str, Any]:
    """Configuration of the vision tower."""
    return {
        "depth": size.vision_layers,
        "hidden_size": size.vision_width,
        "intermediate_size": 3 * size.vision_width,
        "num_heads": size.vision_width // 32,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": size.width,
        "num_position_embeddings": (SIZE // PATCH) ** 2,
        "deepstack_visual_indexes": list(range(size.vision_layers - 1)) or [0],
        "initializer_range": size.scale,
    }


def build_model(size: ModelSize, words: "Qwen2Tokenizer") -> "Qwen3VLForConditionalGeneration":
    """A model with fresh weights; the caller seeds torch."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from scripts.miniature.world.rewards import position_waves

    ids = dict(zip(CONTROL, words.convert_tokens_to_ids(list(CONTROL)), strict=True))
    config = Qwen3VLConfig(
        text_config=text_config(size, words),
        vision_config=vision_config(size),
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    model = Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():
        model.model.visual.pos_embed.weight.copy_(0.5 * position_waves(SIZE // PATCH, size.vision_width))
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id = words.eos_token_id, words.pad_token_id
    return model


def load_model(start: Path | None, size: ModelSize, words: "Qwen2Tokenizer") -> "Qwen3VLForConditionalGeneration":
    """The weights in the folder `start` in float32, or fresh ones where there is no folder."""
    import torch
    from transformers import AutoModelForImageTextToText

    if start is None:
        return build_model(size, words)
    return AutoModelForImageTextToText.from_pretrained(start, dtype=torch.float32, local_files_only=True)
