"""Every message in docs/errors.md is one that the source raises."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = re.compile(r"    (?:flowbp|interleave): error: ")
LEAST_WORDS = 3
"""Fixed words that a message of the source needs to be told from others."""


def messages() -> list[str]:
    """The messages of the page, each joined from its indented lines, without the name of the program."""
    found: list[str] = []
    inside = False
    for line in (ROOT / "docs" / "errors.md").read_text(encoding="utf-8").splitlines():
        if start := PROGRAM.match(line):
            found.append(line[start.end() :])
            inside = True
        elif inside and line.startswith("    "):
            found[-1] += f" {line.strip()}"
        else:
            inside = False
    return found


def fixed_parts(node: ast.AST) -> list[str]:
    """The text of an expression between the values that are put into it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.split(r"\{\w*\}", node.value)
    if isinstance(node, ast.JoinedStr):
        pieces = [fixed_parts(value) for value in node.values]
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        pieces = [fixed_parts(node.left), fixed_parts(node.right)]
    else:
        return ["", ""]
    joined = [""]
    for first, *rest in pieces:
        joined[-1] += first
        joined += rest
    return joined


def whole_texts(node: ast.AST) -> Iterator[ast.AST]:
    """The text expressions below a node; not the parts of one, but the values that are put into it."""
    for child in ast.iter_child_nodes(node):
        is_part = isinstance(node, ast.JoinedStr | ast.BinOp) and isinstance(child, ast.Constant)
        if isinstance(child, ast.Constant | ast.JoinedStr | ast.BinOp) and not is_part:
            yield child
        yield from whole_texts(child)


@cache
def templates() -> list[list[str]]:
    """The fixed parts of every text of the packages that has enough words."""
    files = [file for source in (ROOT / "packages").glob("*/src") for file in source.rglob("*.py")]
    texts = [fixed_parts(node) for file in files for node in whole_texts(ast.parse(file.read_bytes()))]
    return [parts for parts in texts if len(re.findall(r"\w+", " ".join(parts))) >= LEAST_WORDS]


def ends_with(message: str, parts: list[str]) -> bool:
    """Whether the fixed parts follow each other in a message, the last one at its end."""
    place = message.find(parts[0])
    for part in parts[1:-1]:
        if place < 0:
            return False
        place = message.find(part, place)
    if len(parts) == 1:
        return message.endswith(parts[0])
    return place >= 0 and message.find(parts[-1], place) >= 0 and message.endswith(parts[-1])


def is_raised(message: str) -> bool:
    """Whether a text of the source, whatever its values, is the end of the message."""
    return any(ends_with(message, parts) for parts in templates())


def test_page_has_messages() -> None:
    assert len(set(messages())) == len(messages()) >= 50


@pytest.mark.parametrize("message", messages())
def test_message_is_in_the_source(message: str) -> None:
    assert is_raised(message), message


def test_other_messages_are_not() -> None:
    assert not is_raised("runs/mine: is held by a run; carry on by --resume runs/mine or take some other name")
    assert not is_raised("total_batch_size 15 cannot be divided by 4 processes; choose a multiple")
