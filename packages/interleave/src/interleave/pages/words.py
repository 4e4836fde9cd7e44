"""Words and small parts that the pages of stories share."""

import re
from collections.abc import Mapping
from difflib import SequenceMatcher

from imgen_common.page import text
from interleave.records import AttemptStatus

FAILURES = {
    "unreachable": "no connection",
    "refused": "the endpoint said no for good",
    "rate_limited": "the endpoint was too busy, however often it was asked",
    "server_error": "an error of the server",
    "timeout": "too slow",
    "malformed_response": "an answer that cannot be read",
    "out_of_memory": "out of memory",
    "model_error": "an error in its own code",
}
"""Kinds of failure in plain words."""

# --- words -----------------------------------------------------------------------------------------------------------

_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"

MARKS: Mapping[AttemptStatus, tuple[str, str, str]] = {
    "accepted": ("✓", "up", "accepted"),
    "rejected": ("✗", "down", "rejected"),
    "unjudged": ("–", "same", "not judged"),
    "critic_unparsable": ("?", "same", "the critic's answers could not be read"),
    "critic_failed": ("!", "down", "the critic failed"),
    "generator_failed": ("!", "down", "the generator failed"),
}
"""Sign, colour and words of an attempt's status."""


def describe_error(error: str) -> str:
    """An error with its kind in plain words."""
    return re.sub(rf"\b({'|'.join(FAILURES)})(?=: )", lambda found: FAILURES[found[0]], error)


_WORD = re.compile(rf"(?:[{_IDEOGRAPH}]|[.,;:!?、。]+|[^\s.,;:!?、。{_IDEOGRAPH}]+)\s*|\s+")


def word_diff(old: str, new: str) -> str:
    """How `new` differs from `old`, word by word, as HTML: removed words in <del>, added ones in <ins>."""
    before, after = _WORD.findall(old), _WORD.findall(new)
    a, b = ([word.strip() for word in words] for words in (before, after))
    parts = []
    for kind, i, j, k, m in SequenceMatcher(None, a, b, autojunk=len(a) + len(b) > 2000).get_opcodes():
        if kind == "equal":
            parts += [text(max(pair, key=len)) for pair in zip(before[i:j], after[k:m], strict=True)]
            continue
        removed, added = "".join(before[i:j]), "".join(after[k:m])
        parts.append(marked("del", removed) + (" " if removed.strip() and added.strip() else ""))
        parts.append(marked("ins", added) + (added or removed)[len((added or removed).rstrip()) :])
    return "".join(parts)


def marked(tag: str, words: str) -> str:
    return f"<{tag}>{text(words.rstrip())}</{tag}>" if words.strip() else ""


def user(value: str) -> str:
    """What someone wrote, in its own direction of writing."""
    return f"<bdi>{text(value)}</bdi>"


def labeled(title: str, inside: str) -> str:
    """inside: HTML."""
    return f'<h4>{text(title)}</h4><p class="quote" dir="auto">{inside}</p>'


def fact_list(facts: Mapping[str, str]) -> str:
    """Names and values; empty ones are left out."""
    rows = (f"<div><dt>{user(name)}</dt><dd>{user(value)}</dd></div>" for name, value in facts.items() if value)
    return f"<dl>{''.join(rows)}</dl>"


def preformatted(value: str) -> str:
    return f'<pre dir="auto">{text(value)}</pre>'


def short(value: str, length: int = 110) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(value.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def format_seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
