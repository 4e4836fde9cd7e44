"""How much of a prompt text encoders and rewards read; the rest of a longer one they cut off."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

MARK = "mark"
"""A prompt by which a template's end is found."""


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
