"""Text of users and models made inert, so that it can stand inside a prompt.

No tokenizer reads a control token out of it, no template a placeholder, no reader of an answer a tag.
"""

import re

from imgen_common.errors import HALF_PAIR

JOINER = "\u2060"
"""WORD JOINER: no width, no line break, in no tokenizer's control tokens."""
OPENING = re.compile(r"(?:<(?=[<|/_A-Za-z\uff5c]|\Z)|\[(?=[/A-Za-z]|\Z))")
"""Where a control token may begin: <|im_end|>, <think>, </s>, <<SYS>>, <image>, [INST], [/INST]; also at the very end,
where the next piece of text may complete it."""
UNREADABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def escape_control_tokens(text: str) -> str:
    """`text` without control tokens for any tokenizer; it reads the same, and escaping it again changes nothing.

    - A zero-width WORD JOINER follows each `<` or `[` that may open a control token or tag, so that `<|im_end|>`,
      `<|image_pad|>`, `<image>`, `</think>` or `[INST]` are spelled out letter by letter.
    - Control characters but tab and line feed become spaces, other ends of lines line feeds, and halves of surrogate
      pairs, which no UTF-8 text can hold, U+FFFD.
    Braces need no care, since placeholders are filled in one pass.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = HALF_PAIR.sub("\ufffd", UNREADABLE.sub(" ", text))
    return OPENING.sub(lambda match: match[0] + JOINER, text)
