"""HPSv3 on transformers' Qwen2-VL: the model reads image and prompt, and a head scores its last hidden state."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2VLImageProcessor, Qwen2VLModel

from flowbp.rewards import preprocess
from flowbp.rewards.loading import checkpoint_layers, load_frozen, load_head, load_part, load_tokenizer, prompt_of_each
from imgen_common.config import Config
from imgen_common.errors import UserError

REWARD_TOKEN = "<|Reward|>"
"""The token at whose position the score is read; the last of the vocabulary, added to Qwen2-VL's."""
IMAGE_AREA = 256 * 28 * 28
"""Area in pixels to which images were resized in training, before their sides are rounded to whole tokens."""
IMAGE_TOKEN = "<|image_pad|>"
TEMPLATE_FILE = "prompt.json"
PROMPT_START = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"


class PromptTemplate(Config):
    """The text that surrounded prompts in training.  With another text, scores are not the published ones."""

    before: str
    """Between the image and the prompt."""
    after: str
    """Between the prompt and the token at which the score is read."""

    @classmethod
    def load(cls, folder: Path) -> "PromptTemplate":
        """The template of a converted folder.  Raises UserError if it has none."""
        try:
            return cls.model_validate_json((folder / TEMPLATE_FILE).read_bytes())
        except (OSError, ValueError):
            raise UserError(
                f"{folder}: no {TEMPLATE_FILE} in it, or one that `flowbp convert-reward hpsv3 --prompt-source FILE` "
                "did not write; make the folder again with that command"
            ) from None


class HPSv3:
    """score = mu, where (mu, sigma) = head(hidden state at <|Reward|>); unbounded, about 10 for good generators.

    Positions are 0, 1, 2, ... where Qwen2-VL would give the tokens of an image a row and a column: HPSv3 was trained
    with a version of transformers that numbered them so, and its published scores need it.  The text that follows
    <|Reward|> in training is left out; attention is causal, so this changes nothing.  Special tokens of the tokenizer
    in a prompt are read as spaces.  Source: HPSv3, arXiv 2508.03789, and its package 1.0.0.
    """

    def __init__(
        self,
        model: Qwen2VLModel,
        head: nn.Sequential,
        processor: Qwen2VLImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate,
    ) -> None:
        self.model, self.head, self.processor, self.tokenizer = model, head, processor, tokenizer
        self.template = template
        self.special = re.compile("|".join(map(re.escape, tokenizer.get_added_vocab())))

    @classmethod
    def load(cls, folder: Path, *, device: torch.device | str = "cpu") -> "HPSv3":
        """The frozen reward of a folder made by `flowbp convert-reward hpsv3`.

        The model is float32 on a CPU and bfloat16, as published, elsewhere; the head is float32.  Layers are
        checkpointed, so that the gradient of an image needs the memory of one layer, not of all.
        """
        template = PromptTemplate.load(folder)
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        model = load_frozen(Qwen2VLModel, folder, device, dtype)
        checkpoint_layers((*model.visual.blocks, *model.language_model.layers))
        processor = load_part(Qwen2VLImageProcessor, folder)
        preprocess.require_fields(processor, folder, preprocess.QWEN_FIELDS)
        tokenizer = load_tokenizer(folder, model)
        head = load_head(folder, ranking_head(model.config.text_config.hidden_size), device)
        return cls(model, head, processor, tokenizer, template)

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """Scores of images in [0, 1] for their prompts."""
        patches, grid = preprocess.extract_patches(images, self.processor)
        image_tokens = IMAGE_TOKEN * (len(patches) // len(images) // self.processor.merge_size**2)
        start = f"{PROMPT_START}{image_tokens}<|vision_end|>{self.template.before}"
        end = self.template.after + REWARD_TOKEN
        batch = self.tokenizer(
            [start + self.special.sub(" ", prompt) + end for prompt in prompt_of_each(prompts, images)],
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
        return self.head(last.to(self.head[0].weight.dtype))[:, 0]


def ranking_head(width: int) -> nn.Sequential:
    """Maps hidden states (b, width) to mu and sigma (b, 2); the identity takes the place of a dropout in training."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Identity(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )
