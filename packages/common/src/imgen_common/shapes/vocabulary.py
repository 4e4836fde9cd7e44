"""Whole-word tokenizers of the miniature, built without any download: Qwen2 (generator) and CLIP (rewards)."""

from typing import TYPE_CHECKING

from imgen_common.shapes.scene import COLOURS, SHAPES, plural

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, Qwen2Tokenizer

WORDS = (
    *"a and of on the left right top bottom above below one two three add make remove".split(),
    *COLOURS,
    *SHAPES,
    *map(plural, SHAPES),
)
MAX_TOKENS = 12
"""Longest text in tokens, the end token included; longer ones are cut as the real tokenizers do."""


def _byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def qwen_tokenizer() -> "Qwen2Tokenizer":
    """A Qwen2 tokenizer over bytes, the words of the world (each with its leading space) and the ends.

    Its chat template is the bare content with a leading space and the end token: a caption of n words is n + 1 tokens.
    """
    from transformers import Qwen2Tokenizer

    alphabet = _byte_alphabet()
    tokens, merges = list(alphabet), []
    for word in WORDS:
        for i in range(1, len(word) + 1):
            left, right = "Ġ" + word[: i - 1], word[i - 1]
            if left + right not in tokens:
                tokens.append(left + right)
                merges.append((left, right))
    vocab = {t: i for i, t in enumerate([*tokens, "<|endoftext|>", "<|im_end|>"])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=MAX_TOKENS
    )
    tokenizer.chat_template = "{% for m in messages %} {{ m.content }}<|im_end|>{% endfor %}"
    return tokenizer


def clip_tokenizer() -> "CLIPTokenizer":
    """A CLIP tokenizer over bytes, the words of the world and the ends."""
    from transformers import CLIPTokenizer

    alphabet = _byte_alphabet()
    tokens, merges = [*alphabet, *(c + "</w>" for c in alphabet)], []
    for word in WORDS:
        for i in range(len(word) - 2, -1, -1):  # from the end, whose marker no other place in a word can have
            left, right = word[i], word[i + 1 :] + "</w>"
            if left + right not in tokens:
                tokens.append(left + right)
                merges.append((left, right))
    vocab = {t: i for i, t in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS + 1)
