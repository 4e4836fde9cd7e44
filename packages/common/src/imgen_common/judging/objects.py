"""The object in a chat model's answer, such as a critic's verdict, and what was thought before it.

An answer is `<think>...</think>` and, after it, `<answer>{...}</answer>`; the last `<answer>` counts.  Source of the
form and of the cases: InterleaveThinker, arXiv 2606.13679, and its released checkpoints.
"""

import bisect
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

ParseMode = Literal["strict", "tolerant", "direct"]
"""strict: as the paper's reward asks: `<think>` is opened and closed, the answer is JSON, also inside a code fence or
with raw line breaks in strings.  tolerant: `<think>` need not be opened, since chat templates may open it; the answer
may have Python's literals and slips that can be mended without touching a word, as in the released checkpoints'.
direct: as strict, and `<answer>` may stand without `<think>`, for models that answer without reasoning."""

START = re.compile("<answer>")
FENCE = re.compile(r"```\w*\s")
BOX = "<|begin_of_box|>", "<|end_of_box|>"
"""What GLM's models write around an answer."""
WORDS = {"True": "true", "False": "false", "None": "null"}
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "/": "/", "\\": "\\", "'": "'", '"': '"', "\n": ""}
ESCAPE = re.compile(r"\\(?:u([\da-fA-F]{4})|U00((?:0[\da-fA-F]|10)[\da-fA-F]{4})|x([\da-fA-F]{2})|(.))", re.DOTALL)
TOKEN = re.compile(
    r"""(?P<key>['"])(?P<name>\w+)(?P=key)\s*:\s*(?P<quote>['"])? | \b(?P<bare>[A-Za-z_]\w*+)\s*+:\s*+(?P<open>['"])
        | \b(?P<word>True|False|None)\b | (?P<comma>,)(?=\s*[}\]])""",
    re.VERBOSE,
)
"""A key, with the quote of its string if it is one, or without quotes before a string; a word of Python's; a comma too
many."""
STRING_END = re.compile(r"""(?<!\\)(?:\\\\)*(?P<quote>['"])(?=\s*(?:,\s*['"]?\w+['"]?\s*:|(?:,\s*)?[}\]]))""")
"""A string ends where another key or the end of its object follows, so that an apostrophe in it does not end it."""
NEXT_KEY = {quote: re.compile(rf"""(?<!\\){quote}\s*(['"])\w+\1\s*:""") for quote in ("'", '"')}
"""The end of a string and another key, with no comma between."""
PUNCTUATION = re.compile(r"[\s{}\[\],:]*")
MAX_REPAIRED = 20_000
"""Characters of the longest answer that `json_repair` mends, since the time of it may grow with the square."""
MAX_STARTS = 8
"""How many of the first and of the last `<answer>` of an answer are tried: its own words seldom hold more."""


NO_THOUGHT = "no <think>"
"""Why an answer is unreadable that has no reasoning, where some is asked for."""


class UnreadableAnswer(Exception):
    """Ends the reading; the message is the reason."""


def read_object(answer: str, mode: ParseMode) -> tuple[str, Mapping[str, Any]]:
    """What was thought, and the object of the last answer."""
    before, _, tail = answer.partition("</think>")
    if mode == "tolerant" and tail and "<think>" not in before:
        reasoning = before
    elif mode == "direct" and "<think>" not in answer.partition("<answer>")[0]:
        reasoning, tail = "", answer
    else:
        _, opened, rest = answer.partition("<think>")
        reasoning, closed, tail = rest.partition("</think>")
        if not opened or not closed:
            raise UnreadableAnswer(NO_THOUGHT if not opened else "<think> is not closed")
    first_error = None
    for body in answer_bodies(tail):
        try:
            value = _value(unfenced(body), mode)
            (reasoning + json.dumps(value, ensure_ascii=False)).encode()  # half a surrogate pair cannot be stored
        except (ValueError, RecursionError) as error:
            first_error = first_error or f"the answer is not JSON ({error})"
            continue
        if not isinstance(value, dict):
            raise UnreadableAnswer(f"the answer is not an object but a {type(value).__name__}")
        return reasoning.strip(), value
    raise UnreadableAnswer(first_error or ("no <answer>" if mode == "direct" else "no <answer> after </think>"))


def answer_bodies(tail: str) -> Iterator[str]:
    """What the last answer may hold, the longest first: its own words may say <answer> too."""
    end = tail.rfind("</answer>")
    if tail.find("<answer>", end + 1) >= 0:
        raise UnreadableAnswer("the last <answer> is not closed")
    begin = max(tail.rfind("</answer>", 0, max(end, 0)), 0)
    starts = [match.end() for match in START.finditer(tail, begin, max(end, 0))]
    if len(starts) > 2 * MAX_STARTS:
        starts = starts[:MAX_STARTS] + starts[-MAX_STARTS:]
    return (tail[start:end] for start in starts)


def unfenced(text: str) -> str:
    """The content of a text that is one code fence; another text as it is, without white space around it."""
    text = text.strip()
    opening = FENCE.match(text) if text.endswith("```") else None
    return text[opening.end() : -3].strip() if opening and opening.end() <= len(text) - 3 else text


def _value(body: str, mode: ParseMode) -> Any:
    """Raises ValueError or RecursionError if it cannot be read."""
    if mode == "tolerant":
        body = body.removeprefix(BOX[0]).removesuffix(BOX[1]).strip()
    try:
        return load_json(body)
    except ValueError:
        if mode != "tolerant" or not (body.startswith("{") and body.endswith("}")):
            raise
    mended = _mend(body)
    try:
        return load_json(mended)
    except ValueError as error:
        if len(mended) > MAX_REPAIRED:
            raise
        return _repaired(mended, error)


def load_json(body: str) -> Any:
    return json.loads(body, strict=False, object_pairs_hook=_unique)


def only_object(text: str) -> Any:
    """The one JSON object among other words, as before and after a code fence; alone, slips in it are mended.

    Raises ValueError where there is none, or a second one may begin.
    """
    try:
        value, end = json.JSONDecoder(strict=False, object_pairs_hook=_unique).raw_decode(text, max(text.find("{"), 0))
    except json.JSONDecodeError:
        return _value(text, "tolerant")
    if "{" in text[end:]:
        raise ValueError("more than one object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key occurs twice")
    return value


def _mend(body: str) -> str:
    """JSON for the strings of a mapping in Python's or mixed style, its literals, and without commas too many.

    Raises ValueError for half an emoji.  Time and memory are linear in the length.
    """
    ends: dict[str, list[int]] = {"'": [], '"': []}
    for match in STRING_END.finditer(body):
        ends[match["quote"]].append(match.end() - 1)
    parts, position = [], 0
    while (token := TOKEN.search(body, position)) is not None:
        parts.append(body[position : token.start()])
        position, quote = token.end(), token["quote"] or token["open"]
        if (name := token["name"] or token["bare"]) is None:
            parts.append(WORDS.get(token["word"], ""))
            continue
        key = json.dumps(name) + ": "
        index = bisect.bisect_left(ends[quote], position) if quote else 0
        if quote and index < len(ends[quote]):
            end = ends[quote][index]
            text, position = body[position:end], end + 1
            key = body[token.start() : position] if NEXT_KEY[quote].search(text) else key + _json_string(text)
        elif quote:
            position -= 1  # its string has no end
        parts.append(key)
    return "".join([*parts, body[position:]])


def _json_string(text: str) -> str:
    """A string in JSON, from its words with escapes of JSON or Python."""
    plain = ESCAPE.sub(_escaped, text).encode("utf-16", "surrogatepass").decode("utf-16")
    return json.dumps(plain, ensure_ascii=False)


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
