"""HPSv3 over transformers' Qwen2-VL: the model reads picture and prompt, a head scores what it has made of them."""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2VLImageProcessor, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from flowbp.rewards import preprocess
from flowbp.rewards.head import load_head
from flowbp.rewards.reading import pretrained
from imgen_common.config import Config
from imgen_common.errors import UserError

REWARD = "<|Reward|>"
"""The token at which the score is read: the last of the vocabulary, added to Qwen2-VL's."""
PIXELS = 256 * 28 * 28
"""Area of every picture the model was trained on, before its sides are rounded to whole tokens."""
PICTURE = "<|image_pad|>"
WORDS = "prompt.json"
OPENING = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"


class Words(Config):
    """What the model was trained to read around a prompt: with others, scores are not the published ones."""

    before: str
    """Between the picture and the prompt."""
    after: str
    """Between the prompt and the token at which the score is read."""

    @classmethod
    def load(cls, folder: Path) -> "Words":
        """Those of a converted folder.  Raises UserError if it has none."""
        try:
            return cls.model_validate_json((folder / WORDS).read_bytes())
        except (OSError, ValueError):
            raise UserError(
                f"{folder}: no {WORDS} in it, or another than `flowbp convert-reward hpsv3 --prompt-source FILE` "
                "writes; make the folder again with that command"
            ) from None


class HPSv3:
    """score = mu, where (mu, sigma) = ranker(hidden state at <|Reward|>); unbounded, about 10 for good generators.

    Tokens are counted 0, 1, 2, ... where Qwen2-VL would give those of a picture a row and a column: HPSv3 was trained
    with a transformers that counted so, and its published scores need it.  What follows <|Reward|> in training is left
    out; attention is causal, so it changes nothing.  The tokenizer's special tokens in a prompt are read as spaces.
    Source: HPSv3, arXiv 2508.03789, and its package 1.0.0.
    """

    def __init__(
        self,
        model: Qwen2VLModel,
        ranker: nn.Sequential,
        processor: Qwen2VLImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        words: Words,
    ) -> None:
        self.model, self.ranker, self.processor, self.tokenizer = model, ranker, processor, tokenizer
        self.words = words
        self.special = re.compile("|".join(map(re.escape, tokenizer.get_added_vocab())))

    @classmethod
    def load(cls, folder: Path, *, device: torch.device | str = "cpu") -> "HPSv3":
        """Frozen reward from a folder made by `flowbp convert-reward hpsv3`.

        Its model is float32 on the CPU and bfloat16, as published, anywhere else; its head is float32.  Layers are
        checkpointed: a picture's gradient needs the memory of one layer, not of all.
        """
        words = Words.load(folder)
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        model = pretrained(Qwen2VLModel, folder, device, dtype)
        for layer in (*model.visual.blocks, *model.language_model.layers):
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        processor = Qwen2VLImageProcessor.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        head = load_head(folder, ranker(model.config.text_config.hidden_size), device)
        return cls(model, head, processor, tokenizer, words)

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """Scores of pictures in [0, 1] for their prompts."""
        patches, grid = self.patches(images)
        picture = PICTURE * (len(patches) // len(images) // self.processor.merge_size**2)
        start, end = f"{OPENING}{picture}<|vision_end|>{self.words.before}", self.words.after + REWARD
        batch = self.tokenizer(
            [start + self.special.sub(" ", prompt) + end for prompt in prompts],
            return_tensors="pt",
            padding=True,
            padding_side="right",
        ).to(images.device)
        states = self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=torch.arange(batch.input_ids.shape[1], device=images.device).expand_as(batch.input_ids),
            pixel_values=patches,
            image_grid_thw=grid,
            use_cache=False,
        ).last_hidden_state
        ends = batch.attention_mask.sum(-1) - 1
        last = states[torch.arange(len(ends), device=ends.device), ends]
        return self.ranker(last.to(self.ranker[0].weight.dtype))[:, 0]

    def patches(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Float[Tensor, "patches values"], Int[Tensor, "b 3"]]:
        """What the picture tower sees, and (1, rows, columns) of each picture's patches: the processor's steps.

        Differs from the processor on uint8 pictures by its rounding to 1/255 only: as there, and in PIL, what a filter
        overshoots across is cut off before it is filtered down.
        """
        given = self.processor
        height, width = smart_resize(
            *images.shape[-2:],
            factor=given.patch_size * given.merge_size,
            min_pixels=given.size["shortest_edge"],
            max_pixels=given.size["longest_edge"],
        )
        pixels = preprocess.resize(images, images.shape[-2], width).clamp(0, 1)
        pixels = preprocess.resize(pixels, height, width).clamp(0, 1)
        pixels = preprocess.normalise(pixels, given.image_mean, given.image_std)
        patches, rows, columns = given.patchify(pixels, given.patch_size, given.merge_size, given.temporal_patch_size)
        grid = torch.tensor([[1, rows, columns]], device=images.device).expand(len(images), 3)
        return patches.flatten(0, 1), grid


def ranker(width: int) -> nn.Sequential:
    """Hidden states (b, width) to mu and sigma (b, 2); the identity stands where training had a dropout."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Identity(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )
