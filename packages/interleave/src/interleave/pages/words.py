"""Words that the pages of stories share: states, kinds of failure, numbers, and the changes between two prompts."""

import re
from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Literal, NamedTuple

from interleave.records import AttemptStatus

Change = tuple[Literal["", "del", "ins"], str]
"""Words of two texts: `del` those of the old one only, `ins` those of the new one only, "" those of both."""


class StatusWords(NamedTuple):
    """How a page shows an attempt's status: its sign, color and words."""

    sign: str
    color: str
    words: str


ATTEMPT_STATUS: Mapping[AttemptStatus, StatusWords] = {
    "accepted": StatusWords("✓", "up", "accepted"),
    "rejected": StatusWords("✗", "down", "rejected"),
    "unjudged": StatusWords("–", "same", "not judged"),
    "critic_unparsable": StatusWords("?", "same", "the critic's answers could not be parsed"),
    "critic_failed": StatusWords("!", "down", "the critic failed"),
    "generator_failed": StatusWords("!", "down", "the generator failed"),
}
STORY_STATUS = {
    "complete": "complete",
    "steps_not_accepted": "finished, but the critic accepted no image of some steps",
    "planner_failed": "ended without a plan",
    "generator_failed": "ended early: the generator failed",
    "critic_failed": "ended early: the critic failed",
    "budget_exhausted": "ended early: its budget is exhausted",
    "internal_error": "ended early: an internal error",
    "unfinished": "not finished",
    "waiting": "not started",
}
IN_PROGRESS = "in progress"
"""Status of a story that is shown while it is made."""
FAILURES = {
    "unreachable": "no connection",
    "refused": "the endpoint refused the request",
    "denied": "the endpoint takes no request (key, credit or address)",
    "rate_limited": "the endpoint was too busy after all retries",
    "server_error": "an error of the server",
    "timeout": "no answer in time",
    "malformed_response": "an answer that cannot be parsed",
    "out_of_memory": "out of memory",
    "model_error": "an error in the model's code",
}
"""Kinds of failure in plain words."""


def describe_error(error: str | None) -> str:
    """An error with its kind in plain words; "" for none."""
    return re.sub(rf"\b({'|'.join(FAILURES)})(?=: )", lambda found: FAILURES[found[0]], error or "")


_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"(?:[{_IDEOGRAPH}]|[.,;:!?、。]+|[^\s.,;:!?、。{_IDEOGRAPH}]+)\s*|\s+")


_NOTES = re.compile(
    r"before: (?P<before>[^.]+)\. after: (?P<after>[^.]+)\. want: (?P<want>[^.]+)\. (?P<finding>[a-z ]+)"
)
_THING = re.compile(r"\(([a-z ]+)\)")
_FINDINGS = {
    "as asked": "as the step asks",
    "moved": "but something else has moved",
    "wrong place": "but not where the step asks",
    "not as asked": "which does not fit the step",
}


def explain_reasoning(reasoning: str) -> str:
    """The critic's reasons in words: the miniature's critic writes notes, others write sentences, which stay as they
    are."""
    notes = _NOTES.fullmatch(reasoning)
    if notes is None:
        return reasoning if reasoning.strip() else "the critic gave no reason"
    shown = " and ".join(_THING.findall(notes["after"])) or "nothing"
    asked = " and ".join(_THING.findall(notes["want"])) or "something else"
    return f"the image shows {shown}, {_FINDINGS.get(notes['finding'], f'but the step asks for {asked}')}"


def word_changes(old: str, new: str) -> list[Change]:
    """How `new` differs from `old`, word by word."""
    before, after = _WORD.findall(old), _WORD.findall(new)
    a, b = ([word.strip() for word in words] for words in (before, after))
    changes: list[Change] = []
    for kind, i, j, k, m in SequenceMatcher(None, a, b, autojunk=len(a) + len(b) > 2000).get_opcodes():
        if kind == "equal":
            changes += [("", max(pair, key=len)) for pair in zip(before[i:j], after[k:m], strict=True)]
            continue
        removed, added = "".join(before[i:j]), "".join(after[k:m])
        changes += [("del", removed.rstrip())] if removed.strip() else []
        changes += [("", " ")] if removed.strip() and added.strip() else []
        changes += [("ins", added.rstrip())] if added.strip() else []
        changes.append(("", (added or removed)[len((added or removed).rstrip()) :]))
    return changes


def shorten(value: str, length: int = 110) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(value.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def format_seconds(seconds: float) -> str:
    """`3.1 s`, `2 min 05 s`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
