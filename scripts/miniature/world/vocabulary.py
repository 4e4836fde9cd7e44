"""Whole-word tokenizers of the miniature, built without any download: Qwen2 (generator) and CLIP (rewards)."""

from collections.abc import Iterable, Sequence

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, Qwen2Tokenizer

from imgen_common.shapes.scene import COLOURS, SHAPES, plural

WORDS = (
    *"a and of on the left right top bottom above below one two three add make remove".split(),
    *COLOURS,
    *SHAPES,
    *map(plural, SHAPES),
)
MAX_TOKENS = 12
"""Longest text in tokens, the end token included; longer ones are cut as the real tokenizers do."""


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A Qwen2 tokenizer over bytes, the words of the world (each with its leading space) and the ends.

    Its chat template is the bare content with a leading space and the end token: a caption of n words is n + 1 tokens.
    """
    parts = (("Ġ" + word[: i - 1], word[i - 1]) for word in WORDS for i in range(1, len(word) + 1))
    vocab, merges = _vocabulary(sorted(ByteLevel.alphabet()), parts, ["<|endoftext|>", "<|im_end|>"])
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=MAX_TOKENS
    )
    tokenizer.chat_template = "{% for m in messages %} {{ m.content }}<|im_end|>{% endfor %}"
    return tokenizer


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer over bytes, the words of the world and the ends."""
    alphabet = sorted(ByteLevel.alphabet())
    start = [*alphabet, *(c + "</w>" for c in alphabet)]
    # from the end, whose marker no other place in a word can have
    parts = ((word[i], word[i + 1 :] + "</w>") for word in WORDS for i in range(len(word) - 2, -1, -1))
    vocab, merges = _vocabulary(start, parts, ["<|startoftext|>", "<|endoftext|>"])
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS + 1)


def _vocabulary(
    start: Sequence[str], parts: Iterable[tuple[str, str]], ends: Sequence[str]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token numbers, and the merges that make every word of `parts` one token."""
    tokens, merges = list(start), []
    for left, right in parts:
        if left + right not in tokens:
            tokens.append(left + right)
            merges.append((left, right))
    return {token: i for i, token in enumerate([*tokens, *ends])}, merges
