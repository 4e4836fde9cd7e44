"""Sizes of memory as users write them."""

import re

from imgen_common.errors import UserError


def parse_memory_size(text: str) -> int:
    """Bytes of `24GiB`, `80GB`, `80g` or a plain number.  Raises UserError for anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(?:([MG]I?)B?)?", text.upper())
    if match is None or not float(match[1]):
        raise UserError(f"--memory {text!r}: give a number of bytes, or one with a unit, such as 24GiB or 80GB")
    if match[2] is None and float(match[1]) < 2**20:
        raise UserError(f"--memory {text}: would be {text} bytes; give it with a unit, such as {text}GiB")
    return int(float(match[1]) * {None: 1, "M": 10**6, "MI": 2**20, "G": 10**9, "GI": 2**30}[match[2]])
