"""Reads the answers of planner and critic.  Whatever the text, the result is a value or `ParseFailure`, never a raise.

An answer is `<think>...</think>` and, after it, `<answer>{...}</answer>`; the last `<answer>` counts.  Source of the
keys and of the cases: InterleaveThinker, arXiv 2606.13679, and its released checkpoints.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from interleave.protocols import Reply
from interleave.records import Plan, PlanStep, Verdict

ParseMode = Literal["strict", "tolerant"]
"""strict: JSON, also inside a code fence or with raw line breaks in strings.  tolerant: also Python's literals and
slips that can be mended without touching a word, as in answers of the released checkpoints."""

FENCE = re.compile(r"```\w*\s(.*)```", re.DOTALL)
STEP_KEYS = ("step_number", "instruction", "prompt", "auxiliary_text")
WORDS = {"True": "true", "False": "false", "None": "null"}
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "/": "/", "\\": "\\", "'": "'", '"': '"', "\n": ""}
ESCAPE = re.compile(r"\\(?:u([\da-fA-F]{4})|U00((?:0[\da-fA-F]|10)[\da-fA-F]{4})|x([\da-fA-F]{2})|(.))", re.DOTALL)
MEMBER = re.compile(
    r"""(?P<key>['"])(?P<name>\w+)(?P=key)\s*:\s*
        (?:(?P<quote>['"])(?P<text>(?:\\.|[^\\])*?)(?P=quote)(?=\s*(?:,\s*['"]?\w+['"]?\s*:|,?\s*[}\]])))?
      | \b(?P<word>True|False|None)\b | (?P<comma>,)(?=\s*[}\]])""",
    re.DOTALL | re.VERBOSE,
)
"""A key with its string, if it is one; a word of Python's; a comma too many.  A string ends where another key or the
end of its object follows, so that an apostrophe in it does not end it."""
NEXT_KEY = {quote: re.compile(rf"""(?<!\\){quote}\s*(['"])\w+\1\s*:""") for quote in ("'", '"')}
"""The end of a string and another key, with no comma between."""
PUNCTUATION = re.compile(r"[\s{}\[\],:]*")
MAX_MENDED = 20_000
"""Characters of the longest answer that is mended, since the time of it may grow with the square."""


@dataclass(frozen=True)
class ParseFailure:
    """An answer without a usable value, and why."""

    reason: str


class _Unreadable(Exception):
    """Ends the reading; the message is the reason."""


def parse_plan(answer: str, mode: ParseMode = "strict") -> Plan | ParseFailure:
    """The plan in a planner's answer; its steps, whose numbers must grow, are renumbered 1, 2, ...

    An empty string, and in the tolerant mode "None", means null.  No prompt or text is altered.
    """
    try:
        reasoning, value = _read(answer, mode)
        return _plan(value, reasoning, mode)
    except _Unreadable as error:
        return ParseFailure(str(error))


def plan_from_object(value: Mapping[str, Any], reasoning: str, mode: ParseMode = "strict") -> Plan | ParseFailure:
    """The plan in the object of an answer, as `parse_plan` reads it."""
    try:
        return _plan(value, reasoning, mode)
    except _Unreadable as error:
        return ParseFailure(str(error))


def parse_verdict(answer: str, mode: ParseMode = "strict") -> Verdict | ParseFailure:
    """The verdict in a critic's answer; a failed step must come with a prompt.  The prompt is not altered."""
    try:
        reasoning, value = _read(answer, mode)
        success, prompt = value.get("previous_step_success"), value.get("refine_prompt")
        if not isinstance(success, bool):
            raise _Unreadable("previous_step_success must be true or false")
        if not isinstance(prompt, str) or (mode == "tolerant" and prompt == "None"):
            raise _Unreadable("refine_prompt must be text")
        if not success and not prompt.strip():
            raise _Unreadable("refine_prompt is empty though the step failed")
        return Verdict(success=success, refined_prompt=prompt, reasoning=reasoning)
    except _Unreadable as error:
        return ParseFailure(str(error))


def _read(answer: str, mode: ParseMode) -> tuple[str, Mapping[str, Any]]:
    """What was thought, and the object of the last answer."""
    _, opened, rest = answer.partition("<think>")
    reasoning, closed, tail = rest.partition("</think>")
    if not opened or not closed:
        raise _Unreadable("no <think>" if not opened else "<think> is not closed")
    reasons = []
    for body in _bodies(tail):
        fenced = FENCE.fullmatch(body.strip())
        try:
            value = _value((fenced[1] if fenced else body).strip(), mode)
            (reasoning + json.dumps(value, ensure_ascii=False)).encode()  # half a surrogate pair cannot be stored
        except (ValueError, RecursionError) as error:
            reasons.append(f"the answer is not JSON ({error})")
            continue
        if not isinstance(value, dict):
            raise _Unreadable(f"the answer is not an object but a {type(value).__name__}")
        return reasoning.strip(), value
    raise _Unreadable(reasons[0])


def _bodies(tail: str) -> list[str]:
    """What the last answer may hold, the longest first: its own words may say <answer> too."""
    before, closing, after = tail.rpartition("</answer>")
    if "<answer>" in after:
        raise _Unreadable("the last <answer> is not closed")
    starts = before.rpartition("</answer>")[2].split("<answer>")[1:]
    if not closing or not starts:
        raise _Unreadable("no <answer> after </think>")
    return ["<answer>".join(starts[index:]) for index in range(len(starts))]


def _value(body: str, mode: ParseMode) -> Any:
    """Raises ValueError or RecursionError if it cannot be read."""
    try:
        return _json(body)
    except ValueError:
        whole = body.startswith("{") and body.endswith("}")
        if mode == "strict" or not whole or len(body) > MAX_MENDED:
            raise
    mended = MEMBER.sub(_mended, body)
    try:
        return _json(mended)
    except ValueError as error:
        return _repaired(mended, error)


def _json(body: str) -> Any:
    return json.loads(body, strict=False, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key occurs twice")
    return value


def _mended(match: re.Match[str]) -> str:
    """JSON for what `MEMBER` found, or what it found where a comma is missing.  Raises ValueError for half an emoji."""
    if match["name"] is None:
        return WORDS.get(match["word"], "")
    key, text = json.dumps(match["name"]) + ": ", match["text"]
    if text is None:
        return key
    if NEXT_KEY[match["quote"]].search(text):
        return match[0]
    plain = ESCAPE.sub(_escaped, text).encode("utf-16", "surrogatepass").decode("utf-16")
    return key + json.dumps(plain, ensure_ascii=False)


def _escaped(match: re.Match[str]) -> str:
    """The character that an escape means, in JSON or Python; an unknown escape means itself, as in Python."""
    number = match[1] or match[2] or match[3]
    return chr(int(number, 16)) if number else ESCAPES.get(match[4], match[0])


def _repaired(body: str, error: ValueError) -> Any:
    """The value with commas, colons and quotes of keys mended by `json_repair`.

    Raises ValueError (`error` where nothing better is known) unless every word of `body` is in it and no bracket was
    missing, so that nothing cut short passes for whole.
    """
    import json_repair

    try:
        value = json_repair.loads(body)
    except Exception:  # of a guessing parser anything may come
        raise error from None
    position, brackets = 0, ""
    for scalar in _scalars(value):
        gap = PUNCTUATION.match(body, position)
        assert gap is not None  # it matches nothing too
        brackets, position = brackets + gap[0], gap.end()
        spelling = next((text for text in _spellings(scalar) if body.startswith(text, position)), None)
        if spelling is None:
            raise error
        position += len(spelling)
    brackets += body[position:]
    balanced = all(brackets.count(left) == brackets.count(right) for left, right in ("{}", "[]"))
    if not PUNCTUATION.fullmatch(body, position) or not balanced:
        raise error
    return value


def _scalars(value: Any) -> Iterator[Any]:
    """Keys and values, in their order."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _scalars(item)
    elif isinstance(value, list):
        for item in value:
            yield from _scalars(item)
    else:
        yield value


def _spellings(scalar: Any) -> tuple[str, ...]:
    plain = json.dumps(scalar, ensure_ascii=False)
    if not isinstance(scalar, str):
        return (plain,)
    return (plain, f"'{plain[1:-1]}'", *([scalar] if scalar.isidentifier() else []))


def _plan(value: Mapping[str, Any], reasoning: str, mode: ParseMode) -> Plan:
    items = value.get("execution_plan")
    if not isinstance(items, list) or not items:
        raise _Unreadable("execution_plan must be a list of at least one step")
    numbers: list[int] = []
    steps = []
    for index, item in enumerate(items, 1):
        missing = [key for key in STEP_KEYS if not isinstance(item, dict) or key not in item]
        if missing:
            raise _Unreadable(f"step {index} has no {', '.join(missing)}")
        if type(item["step_number"]) is not int or (numbers and item["step_number"] <= numbers[-1]):
            raise _Unreadable(f"step {index} has step_number {item['step_number']!r}; it must be a growing integer")
        numbers.append(item["step_number"])
        name, instruction, prompt, text = (
            _text(item.get(key), f"step {index}: {key}", mode)
            for key in ("step_name", "instruction", "prompt", "auxiliary_text")
        )
        try:
            steps.append(PlanStep(index=index, name=name or "", instruction=instruction, prompt=prompt, text=text))
        except ValueError:
            raise _Unreadable(f"step {index} has no prompt and no text that can be used") from None
    return Plan(steps=tuple(steps), reasoning=reasoning)


def _text(value: object, name: str, mode: ParseMode) -> str | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        raise _Unreadable(f"{name} must be text or null, not a {type(value).__name__}")
    return None if mode == "tolerant" and value == "None" else value


def describe_failure(reply: Reply, read: ParseFailure) -> str:
    """Why a reply could not be read, as records show it."""
    cut = f"cut off after {reply.num_completion_tokens} tokens: " if reply.truncated else ""
    return cut + read.reason
