"""How much of a prompt text encoders and rewards read; the rest of a longer one they cut off."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imgen_common.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

VISION = "<|vision_start|><|image_pad|><|vision_end|>"
"""Stands for an image in the text of a Qwen-VL; its second token is repeated for each of the image's."""
MARK = "mark"
"""A prompt by which a template's end is found."""
MAX_LENGTH = 10**9
"""Tokens from which on a length is none: transformers' own where a tokenizer says none."""


@dataclass(frozen=True)
class PromptLimit:
    """The longest prompt that a reader takes whole.

    tokenizer: of transformers.  max_length: tokens that are read, special ones included.  template(prompt): the text
    that is tokenized; where only its end, behind the prompt, is cut, the prompt is read whole.
    """

    tokenizer: Any
    max_length: int
    template: Callable[[str], str] = str

    @property
    def max_tokens(self) -> int:
        """Tokens of a prompt that are read, without special ones and those of the template."""
        empty, letter = self._lengths(["", "a"])
        return max(0, self.max_length - min(empty, letter - 1))  # a space of the template may be one token with a word

    def num_longer(self, prompts: Sequence[str]) -> int:
        """How many of the prompts are cut."""
        # a token has at least one character of ASCII, so most prompts need no tokenizer
        shortest = self.max_tokens
        long = [prompt for prompt in prompts if not prompt.isascii() or len(prompt) >= shortest]
        return sum(length > self.max_length for length in self._lengths(long)) if long else 0

    def _lengths(self, prompts: Sequence[str]) -> list[int]:
        end = self.template(MARK).rpartition(MARK)[2]
        texts = [self.template(prompt).removesuffix(end) for prompt in prompts]
        ids = self.tokenizer(texts, padding=False, truncation=False, verbose=False).input_ids
        return [len(one) for one in ids]


def text_encoder_names(pipe: Any) -> list[str]:
    """Names of the text encoders among a pipeline's components; diffusers numbers them text_encoder, text_encoder_2."""
    return [name for name in pipe.components if name.startswith("text_encoder")]


def prompt_limits(pipe: Any, max_tokens: int) -> dict[str, PromptLimit]:
    """How much of a prompt each text encoder of a diffusers pipeline reads, by its name.

    max_tokens: what the last of them reads, beside the pipeline's template; the others read what its first tokenizer
    takes.  Those of the Qwen-Image editors and of Qwen-Image-2.1 read all of a prompt, unless they are held to a limit.
    """
    if (limit := _templated_limit(pipe, max_tokens)) is not None:
        return {"text_encoder": limit}
    names = text_encoder_names(pipe)
    return {
        name: PromptLimit(
            getattr(pipe, name.replace("text_encoder", "tokenizer")),
            max_tokens if name == max(names) else pipe.tokenizer_max_length,
        )
        for name in names
        if getattr(pipe, name) is not None
    }


def _templated_limit(pipe: Any, max_tokens: int) -> PromptLimit | None:
    """The limit of a pipeline whose only text encoder reads a prompt in a template, most of which is hidden later."""
    match type(pipe).__name__:
        case "Flux2KleinPipeline":
            return PromptLimit(pipe.tokenizer, max_tokens, lambda prompt: _chat(pipe, prompt, thinking=False))
        case "ZImagePipeline":
            return PromptLimit(pipe.tokenizer, max_tokens, lambda prompt: _chat(pipe, prompt, thinking=True))
        case "Flux2Pipeline":
            return PromptLimit(pipe.tokenizer.tokenizer, max_tokens, lambda prompt: _flux2_dev(pipe, prompt))
        case "QwenImagePipeline":
            hidden = pipe.prompt_template_encode_start_idx
            return PromptLimit(pipe.tokenizer, hidden + max_tokens, pipe.prompt_template_encode.format)
        case "QwenImageEditPipeline" | "QwenImageEditPlusPipeline":
            hidden, template = pipe.prompt_template_encode_start_idx, pipe.prompt_template_encode.replace(VISION, "")
            return PromptLimit(pipe.tokenizer, hidden + max_tokens, template.format)
        case "QwenImage21Pipeline":
            template = pipe.prompt_template_t2i
            return PromptLimit(
                pipe.processor.tokenizer, pipe._drop_idx + max_tokens, lambda prompt: template.format(prompt or " ")
            )
        case "Krea2Pipeline":
            hidden = pipe.prompt_template_encode_start_idx - pipe.prompt_template_encode_num_suffix_tokens
            return PromptLimit(pipe.tokenizer, hidden + max_tokens, pipe.prompt_template_encode_prefix.__add__)
    return None


def _chat(pipe: Any, prompt: str, *, thinking: bool) -> str:
    turns = [{"role": "user", "content": prompt}]
    given = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
    return str(pipe.tokenizer.apply_chat_template(turns, **given))


def _flux2_dev(pipe: Any, prompt: str) -> str:
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input

    (text,) = pipe.tokenizer.apply_chat_template(format_input([prompt], pipe.system_message), tokenize=False)
    return str(text).removeprefix(pipe.tokenizer.tokenizer.bos_token or "")  # the tokenizer adds it


def check_vocabulary(tokenizer: Any, model: Any, ref: str) -> None:
    """Raises UserError for a tokenizer with more words than the model has embeddings: words were added to it alone.

    Special tokens that no text gets may go beyond, as that for images does in Gemma 3's models of text.
    """
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added - {
        getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "unk", "cls", "sep")
    }
    words = 1 + max((number for number in tokenizer.get_vocab().values() if number not in special), default=-1)
    rows = model.get_input_embeddings().weight.shape[0]
    if words > rows:
        raise UserError(
            f"{ref}: its tokenizer has {words} words, its {type(model).__name__} embeddings of {rows}; copy both from "
            "one place, or take out what was added to the tokenizer"
        )


def check_vocabularies(components: Mapping[str, Any], ref: str) -> None:
    """`check_vocabulary` of a pipeline's text encoders, each with the tokenizer of the same number, and that CLIP's
    reads as much as that says: pipelines ask the tokenizer."""
    for name, part in components.items():
        tokenizer: Any = components.get(name.replace("text_encoder", "tokenizer"))
        if name.startswith("text_encoder") and part is not None and hasattr(tokenizer, "get_vocab"):
            check_vocabulary(tokenizer, part, f"{ref}: {name}")
            given, most = tokenizer.model_max_length, getattr(part.config, "max_position_embeddings", None)
            if type(part).__name__.startswith("CLIP") and most is not None and given > most:
                says = f"says {given} tokens" if given < MAX_LENGTH else "says no model_max_length"
                file = f"{name.replace('text_encoder', 'tokenizer')}/tokenizer_config.json"
                raise UserError(
                    f"{ref}: {file} {says}, and {name} reads {most}; set model_max_length to {most}, or copy that file "
                    "again"
                )


def text_layers(config: "PretrainedConfig", joint_dim: int) -> tuple[int, ...]:
    """Which hidden states of its text encoder FLUX.2 reads: evenly spaced, 9, 18, 27 of 36 layers.

    Its pipeline does not derive them.  Their number follows from the transformer's text width.
    Raises UserError if the two models do not fit.
    """
    count, rest = divmod(joint_dim, config.hidden_size)
    if rest or not 0 < count < config.num_hidden_layers:
        raise UserError(
            f"a text encoder of {config.num_hidden_layers} layers of width {config.hidden_size} does not fit a "
            f"transformer that reads {joint_dim} numbers per token; take both from one folder"
        )
    return tuple(config.num_hidden_layers * k // (count + 1) for k in range(1, count + 1))
