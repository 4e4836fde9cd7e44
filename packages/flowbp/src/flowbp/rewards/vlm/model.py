"""A vision-language model of the Qwen-VL family, differentiable from pixels to the probabilities of tokens."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
)

from flowbp.rewards import preprocess
from flowbp.rewards.loading import checkpoint_layers, load_frozen, load_part
from imgen_common.errors import UserError
from imgen_common.hub.settings import check_patches
from imgen_common.prompt_limits import check_vocabulary
from imgen_common.weights import read_json

FAMILIES: dict[str, type[PreTrainedModel]] = {
    "qwen2_vl": Qwen2VLForConditionalGeneration,
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": Qwen3VLForConditionalGeneration,
}
"""Classes of models by the `model_type` of their config.json."""
TOKENS_AT_ONCE = 512
"""Tokens of answers whose probabilities are computed at once."""
ONCE_MORE: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
"""How what is not kept is computed again in the backward pass."""
Content = Sequence[str | None]
"""A user's turn: its texts, and None for each image."""


@dataclass(frozen=True)
class EncodedImage:
    """What the language model reads of an image.

    grid: (1, rows, columns) of its patches.  states: (tokens, width) each: what stands in its place, and what is added
    there after the first layers (Qwen3-VL).
    """

    grid: Int[Tensor, " 3"]
    states: tuple[Float[Tensor, "tokens width"], ...]


@dataclass(frozen=True)
class PromptBatch:
    """Prompts as tokens, padded on the left; images: of each prompt, in the order of their places.

    positions: in time, height and width.  next_positions: of the token that follows.
    """

    ids: Int[Tensor, "b length"]
    mask: Int[Tensor, "b length"]
    positions: Int[Tensor, "3 b length"]
    next_positions: Int[Tensor, " b"]
    images: Sequence[Sequence[EncodedImage]]

    def select(self, rows: Sequence[int]) -> "PromptBatch":
        """The prompts of these rows, which may be repeated."""
        tensors = (self.ids[rows], self.mask[rows], self.positions[:, rows], self.next_positions[rows])
        return PromptBatch(*tensors, [self.images[row] for row in rows])


@dataclass(frozen=True)
class AnswerBatch:
    """Answers as tokens, padded on the right; mask: which tokens belong to them, an end of turn included."""

    ids: Int[Tensor, "b length"]
    mask: Bool[Tensor, "b length"]


class VisionLanguageModel:
    """The model, frozen, and its processor."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        check_vocabulary(self.tokenizer, model, model.name_or_path)
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        self.special = re.compile("|".join(map(re.escape, sorted(special | {processor.image_token}))))
        ends = model.generation_config.eos_token_id
        self.ends: list[int] = [ends] if isinstance(ends, int) else [*(ends or [self.tokenizer.eos_token_id])]

    @classmethod
    def load(cls, folder: Path, device: torch.device | str) -> "VisionLanguageModel":
        """float32 on a CPU and bfloat16 elsewhere, with checkpointed layers.

        Raises UserError for an image processor that is not reproduced or of another model, and without a chat template.
        """
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        family = FAMILIES[read_json(folder / "config.json")["model_type"]]
        model = load_frozen(family, folder, device, dtype)
        checkpoint_layers((*model.model.visual.blocks, *model.model.language_model.layers))
        processor = load_part(AutoProcessor, folder)
        if not isinstance(processor, ProcessorMixin) or not processor.chat_template:
            raise UserError(f"{folder}: has no processor with a chat template; copy all files of the model")
        preprocess.require_fields(processor.image_processor, folder, preprocess.QWEN_FIELDS)
        check_patches(processor.image_processor, folder, str(folder))
        return cls(model, processor)

    def encode_images(self, batches: Sequence[Float[Tensor, "_ 3 _ _"]]) -> list[EncodedImage]:
        """What is read of images in [0, 1]; those of a batch have one size."""
        parts = [preprocess.extract_patches(batch, self.processor.image_processor) for batch in batches]
        grid = torch.cat([grid for _, grid in parts])
        found = self.model.model.get_image_features(torch.cat([patches for patches, _ in parts]), grid)
        layers = (found.pooler_output, *(getattr(found, "deepstack_features", None) or ()))
        return [EncodedImage(*each) for each in zip(grid, zip(*layers, strict=True), strict=True)]

    def render(self, content: Content) -> str:
        """The conversation of one user's turn up to the answer, by the model's chat template."""
        parts = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in content]
        conversation = [{"role": "user", "content": parts}]
        text: str = self.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        return text

    def tokenize(self, texts: Sequence[str], images: Sequence[Sequence[EncodedImage]]) -> PromptBatch:
        """Rendered conversations as tokens, with as many for each image as it has states."""
        token, expanded = self.processor.image_token, []
        for text, shown in zip(texts, images, strict=True):
            first, *rest = text.split(token)
            lengths = [len(image.states[0]) for image in shown]
            expanded.append(first + "".join(token * n + part for n, part in zip(lengths, rest, strict=True)))
        device = self.model.device
        batch = self.tokenizer(expanded, return_tensors="pt", padding=True, padding_side="left").to(device)
        positions, deltas = self.model.model.get_rope_index(
            input_ids=batch.input_ids,
            mm_token_type_ids=(batch.input_ids == self.model.config.image_token_id).int(),
            image_grid_thw=torch.stack([image.grid for shown in images for image in shown]),
            attention_mask=batch.attention_mask,
        )
        after = batch.attention_mask.sum(-1) + deltas[:, 0]
        return PromptBatch(batch.input_ids, batch.attention_mask, positions, after, images)

    def next_logits(self, prompts: PromptBatch) -> Float[Tensor, "b vocabulary"]:
        """Of the token after each prompt, in float32 or more."""
        return precise(self.model.lm_head(self._read(prompts).last_hidden_state[:, -1]))

    def log_likelihoods(
        self, prompts: PromptBatch, answers: AnswerBatch, temperature: float = 1.0
    ) -> Float[Tensor, " b"]:
        """log p(answer | prompt), summed over its tokens, differentiable in the states of images.

        p is the distribution of `sample`, which gives tokens of images no probability.
        """
        length = answers.ids.shape[1]
        followed = prompts.next_positions[:, None] + torch.arange(length, device=answers.ids.device)
        whole = replace(
            prompts,
            ids=torch.cat([prompts.ids, answers.ids], 1),
            mask=torch.cat([prompts.mask, answers.mask.to(prompts.mask.dtype)], 1),
            positions=torch.cat([prompts.positions, followed.expand(3, -1, -1)], 2),
        )
        states = self._read(whole).last_hidden_state[:, -length - 1 : -1][answers.mask]
        # of a large vocabulary the probabilities of all tokens at once would be most of the memory
        parts = zip(states.split(TOKENS_AT_ONCE), answers.ids[answers.mask].split(TOKENS_AT_ONCE), strict=True)
        found = torch.cat([checkpoint(self._token_log_likelihoods, *part, temperature, **ONCE_MORE) for part in parts])
        return found.new_zeros(answers.ids.shape).masked_scatter(answers.mask, found).sum(-1)

    def _token_log_likelihoods(
        self, states: Float[Tensor, "tokens width"], ids: Int[Tensor, " tokens"], temperature: float
    ) -> Float[Tensor, " tokens"]:
        """Of the token that follows each state."""
        scaled = self._without_images(precise(self.model.lm_head(states))) / temperature
        return scaled.log_softmax(-1).gather(-1, ids[:, None])[:, 0]

    @torch.no_grad()
    def sample(self, prompts: PromptBatch, uniforms: Float[Tensor, "answers steps"], temperature: float) -> AnswerBatch:
        """Answers, as many to each prompt, those to the first prompt first.

        Token t is the inverse of the distribution function at its number in [0, 1), so that an answer depends on its
        numbers alone, not on the batch.
        """
        num_answers = len(uniforms) // len(prompts.ids)
        room = self._room(prompts).repeat_interleave(num_answers)
        # the prompt is read once, and its keys and values are shared by its answers
        out = self._read(prompts, use_cache=True)
        cache, logits = out.past_key_values, self.model.lm_head(out.last_hidden_state[:, -1])
        cache.batch_repeat_interleave(num_answers)
        logits, mask, position = (
            one.repeat_interleave(num_answers, 0) for one in (logits, prompts.mask, prompts.next_positions)
        )
        steps, ends = min(uniforms.shape[1], int(room.max())), torch.tensor(self.ends, device=mask.device)
        ids = torch.zeros(len(uniforms), steps, dtype=mask.dtype, device=mask.device)
        said = torch.zeros_like(ids, dtype=torch.bool)
        going = torch.arange(len(uniforms), device=mask.device)  # answers that have not ended
        for step in range(steps):
            token = self._draw(logits, uniforms[going, step], temperature)
            ids[going, step], said[going, step] = token, True
            left = (~torch.isin(token, ends) & (room[going] > step + 1)).nonzero()[:, 0]
            if step + 1 == steps or not len(left):
                break
            if len(left) < len(going):
                cache.batch_select_indices(left)
                going, mask, token = going[left], mask[left], token[left]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            logits = self.model(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=(position[going] + step).expand(3, -1)[..., None],
                past_key_values=cache,
            ).logits[:, -1]
        length = int(said.sum(-1).max())
        return AnswerBatch(ids[:, :length], said[:, :length])

    def _draw(
        self, logits: Float[Tensor, "b vocabulary"], uniforms: Float[Tensor, " b"], temperature: float
    ) -> Int[Tensor, " b"]:
        """Tokens by the inverse of their distribution function."""
        below = (self._without_images(logits.double()) / temperature).softmax(-1).cumsum(-1)
        token = torch.searchsorted(below, uniforms[:, None] * below[:, -1:], right=True)[:, 0]
        return token.clamp(max=below.shape[-1] - 1)

    def _room(self, prompts: PromptBatch) -> Int[Tensor, " b"]:
        """Tokens that an answer may have.  Raises UserError where there are none."""
        context = self.model.config.get_text_config().max_position_embeddings
        lengths = prompts.mask.sum(-1)
        if (longest := int(lengths.max())) >= context:
            raise UserError(
                f"{self.model.name_or_path}: a prompt has {longest} tokens with its images, and the model reads "
                f"{context}; give shorter prompts or smaller images"
            )
        return context - lengths

    def decode(self, answers: AnswerBatch) -> list[str]:
        """The words of each answer, up to its end of turn."""
        rows = zip(answers.ids.tolist(), answers.mask.tolist(), strict=True)
        kept = [[t for t, is_said in zip(*row, strict=True) if is_said and t not in self.ends] for row in rows]
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in kept]

    def token_ids(self, text: str) -> list[int]:
        """The tokens of a text in the middle of a turn; special tokens in it are read as spaces."""
        ids: list[int] = self.tokenizer(self.special.sub(" ", text), add_special_tokens=False).input_ids
        return ids

    def _without_images(self, logits: Tensor) -> Tensor:
        """No answer has the token in whose place an image would be expected."""
        config = self.model.config
        banned = torch.tensor([config.image_token_id, config.video_token_id], device=logits.device)
        return logits.index_fill(-1, banned, -torch.inf)

    def _read(self, prompts: PromptBatch, *, use_cache: bool = False) -> Any:
        """The last hidden states of prompts, and their keys and values."""
        images = [image.states for shown in prompts.images for image in shown]
        first, *layers = zip(*images, strict=True)
        return self.model.model(
            input_ids=prompts.ids,
            attention_mask=prompts.mask,
            position_ids=prompts.positions,
            mm_encoder_outputs={"image": SimpleNamespace(pooler_output=first, deepstack_features=layers)},
            use_cache=use_cache,
        )


def precise(values: Tensor) -> Tensor:
    """In float32, or in what is more."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
