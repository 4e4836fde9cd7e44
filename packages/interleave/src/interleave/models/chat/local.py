"""A vision-language model of transformers on this machine: what is waiting is answered in one batch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from imgen_common import hub
from imgen_common.config import Config
from imgen_common.console import quiet_libraries
from imgen_common.devices import device_of, dtype_of
from imgen_common.errors import UserError
from imgen_common.http.chat import MARK_TOKENS, in_think_marks
from imgen_common.hub.settings import check_patches
from imgen_common.prompt_limits import check_vocabulary
from imgen_common.run_folder.data import fingerprint
from imgen_common.weights import load_whole, loading
from interleave.models.concurrency import Batcher, FittingBatches
from interleave.protocols import BackendError, Message, Reply, split_system

Asked = tuple[Message, int]


def to_conversation(message: Message) -> list[dict[str, Any]]:
    """A message in the chat format of transformers, with `PIL` images: perhaps a system turn, and a user turn."""
    system, turn = split_system(message)
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part.image}
        for part in turn
    ]
    before = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    return [*before, {"role": "user", "content": content}]


def bound_pixels(processor: Any, most: int, ref: str) -> None:
    """Makes the processor of the model `ref` scale larger images down.

    Raises UserError where it bounds something else, such as the edges, or asks for more pixels.
    """
    size = dict(processor.image_processor.size)
    least = size.get("shortest_edge")
    if set(size) != {"shortest_edge", "longest_edge"} or least is None or least > most:
        raise UserError(f"max_pixels {most}: the processor of {ref} takes {size}; give more, or null")
    processor.image_processor.size = size | {"longest_edge": most}


def check_processor(processor: Any, folder: Path, ref: str) -> None:
    """Raises UserError unless a chat template renders a user turn, and images are cut as the vision tower reads."""
    check_patches(processor.image_processor, folder, ref)
    with loading(f"{ref}: its chat template cannot be used; take a model for chat, or copy chat_template.jinja again"):
        said = processor.apply_chat_template(to_conversation(("hello",)), tokenize=False, add_generation_prompt=True)
        if "{'type': 'text'" in said:
            raise ValueError("it prints the parts of a turn as Python does")


class LocalChatConfig(Config):
    """A vision-language model folder of transformers."""

    kind: Literal["local"] = "local"
    ref: str
    """The model: `builtin:shapes/critic`, a folder, or `org/name@revision`; safetensors only."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; auto: the first GPU, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic; auto: bfloat16 on a GPU, float32 on a CPU."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"
    """Implementation of attention; the flash ones need their packages."""
    max_new_tokens: Annotated[int, Ge(1)] = 4096
    """Longest answer in tokens; also bounded by the model's positions."""
    temperature: Annotated[float, Ge(0), Le(2)] = 0.0
    """0: the most probable answer, always the same."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """Share of the probability mass that is sampled from."""
    top_k: Annotated[int, Ge(0)] = 0
    """How many of the most probable tokens are sampled from; 0: all."""
    top_logprobs: Annotated[int, Ge(0), Le(20)] = 5
    """How many alternatives per token are kept, for the critic's probability of success."""
    max_pixels: Annotated[int, Ge(1)] | None = None
    """Largest image in pixels, a larger one is scaled down by the model's processor; null: as it says."""
    max_batch: Annotated[int, Ge(1), Le(1024)] = 16
    """Most messages answered at once; halved where memory runs out."""

    def build(self) -> "LocalChat":
        """The model, loaded.  Raises UserError where it cannot be had."""
        return LocalChat(self)


class LocalChat:
    """Answers to equal messages and seeds are equal, whatever else is in the batch, up to the rounding of batched
    arithmetic."""

    def __init__(self, config: LocalChatConfig) -> None:
        """Load model and processor.  Raises UserError where they cannot be had."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        quiet_libraries()
        self.config = c = config
        # what is kept of its answers is found by it, so that other weights of the same name are asked anew
        weights = fingerprint(c.ref)
        seen = f" px={c.max_pixels}" * (c.max_pixels is not None) + f" {c.dtype}" * (c.dtype != "auto")
        self.id = f"{c.ref} t={c.temperature:g} p={c.top_p:g} k={c.top_k} n={c.max_new_tokens}{seen} w={weights}"
        self._device = device_of(config.device)
        folder = hub.resolve(config.ref)
        with loading(f"{config.ref}: not a vision-language model that can be loaded"):
            self._processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            self._model = load_whole(
                AutoModelForImageTextToText,
                folder,
                trust_remote_code=False,
                dtype=dtype_of(config.dtype, self._device),
                attn_implementation=config.attention,
            )
        check_processor(self._processor, folder, c.ref)
        check_vocabulary(self._processor.tokenizer, self._model, c.ref)
        self._model.eval().requires_grad_(False).to(self._device)
        self._processor.tokenizer.padding_side = "left"
        if config.max_pixels is not None:
            bound_pixels(self._processor, config.max_pixels, config.ref)
        ends = self._model.generation_config.eos_token_id
        ends = self._processor.tokenizer.eos_token_id if ends is None else ends
        self._ends: list[int] = [ends] if isinstance(ends, int) else [*(ends or ())]
        self._context = self._model.config.get_text_config().max_position_embeddings
        # Answers to some messages, in batches that fit into memory; where one fails, the others are still answered
        self.answer: FittingBatches[Asked, Reply] = FittingBatches(
            lambda asked: self._generate(asked), config.max_batch, config.ref
        )
        self._batcher: Batcher[Asked, Reply] = Batcher(self.answer, config.max_batch)

    async def chat(self, message: Message, seed: int) -> Reply:
        """The answer.  Raises BackendError: refused (a prompt too long), out_of_memory, model_error."""
        return await self._batcher((message, seed))

    async def close(self) -> None:
        """Release the model, once it is idle."""
        await self._batcher.close()
        self._model = None

    def _generate(self, asked: Sequence[Asked]) -> list[Reply]:
        import torch
        from transformers import LogitsProcessorList

        from interleave.models.chat.sampling import GumbelSampler

        inputs = self._inputs([message for message, _ in asked])
        prompts = inputs["attention_mask"].sum(1).tolist()
        limits = [min(self.config.max_new_tokens, self._context - length) for length in prompts]
        if min(limits) < 1:
            raise BackendError(
                "refused", f"a prompt of {max(prompts)} tokens; {self.config.ref} takes {self._context - 1}"
            )
        settings = self.config.model_dump(include={"temperature", "top_p", "top_k", "top_logprobs"})
        settings["repetition_penalty"] = self._model.generation_config.repetition_penalty or 1.0
        sampler = GumbelSampler([seed for _, seed in asked], self._device, **settings)
        with torch.inference_mode():
            out = self._model.generate(
                **inputs,
                max_new_tokens=max(limits),
                eos_token_id=self._ends or None,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=1.0,  # the sampler's, which keeps the probabilities before it
                logits_processor=LogitsProcessorList([sampler]),
            )
        start = inputs["input_ids"].shape[1]
        # a chat template may open <think> for the model, which then does not say it
        end = self._processor.tokenizer.decode(inputs["input_ids"][0][-8:]).rstrip()
        opened = "<think>" if end.endswith("<think>") else ""
        return [
            self._reply(opened, out[row, start:][: limits[row]].tolist(), prompts[row], sampler.alternatives(row))
            for row in range(len(asked))
        ]

    def _inputs(self, messages: Sequence[Message]) -> Mapping[str, Any]:
        return self._processor.apply_chat_template(
            [to_conversation(message) for message in messages],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self._device)

    def _reply(
        self, opened: str, tokens: Sequence[int], num_prompt: int, alternatives: Sequence[Mapping[int, float]]
    ) -> Reply:
        tokenizer = self._processor.tokenizer
        num = next((i for i, token in enumerate(tokens) if token in self._ends), len(tokens))
        ids, ended = tokens[:num], num < len(tokens)
        shown = alternatives[:num]
        special = {token: one.content for token, one in tokenizer.added_tokens_decoder.items() if one.special}
        said = tokenizer.decode([token for token in ids if token not in special or special[token] in MARK_TOKENS])
        words = {token: tokenizer.decode([token]) for token in {*ids, *(token for step in shown for token in step)}}
        return Reply(
            text=opened + in_think_marks(said),
            num_prompt_tokens=num_prompt,
            num_completion_tokens=num + ended,
            truncated=not ended,
            token_probabilities=tuple(
                (words[token], {words[other]: p for other, p in step.items()})
                for token, step in zip(ids, shown, strict=False)
            ),
        )
