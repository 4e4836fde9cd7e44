"""What judges' answers are taken apart with: as the expressions of the authors' scorers, in linear time."""

import re

SPACES = re.compile(r"\s*")


def from_to(text: str, before: str, end: str) -> str:
    """What stands between the first match of `before` and the first one of `end` after it, with that; empty: none."""
    first = re.search(before, text)
    last = re.compile(end).search(text, first.end()) if first else None
    return text[first.end() : last.end()] if first and last else ""


def without_thinking(answer: str) -> str:
    """As `<think>.*?</think>\\s*` is taken out, whose time is quadratic."""
    kept, place = [], 0
    while (start := answer.find("<think>", place)) >= 0 and (end := answer.find("</think>", start)) >= 0:
        kept.append(answer[place:start])
        place = SPACES.match(answer, end + len("</think>")).end()  # type: ignore[union-attr]
    return "".join((*kept, answer[place:]))


def lone_digits(answer: str, digits: str) -> list[str]:
    """The lines that are one of the digits alone."""
    lines = (line.strip() for line in answer.split("\n"))
    return [line for line in lines if len(line) == 1 and line in digits]
