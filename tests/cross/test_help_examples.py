"""Every example of every `--help` is a command line that its program takes."""

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import typer.main

PROGRAMS = ("flowbp", "interleave")


def program(name: str) -> Any:
    """The program as a click command, whose commands do nothing."""
    root = typer.main.get_command(import_module(f"{name}.cli").app)
    for command in commands(root):
        if not hasattr(command, "commands"):
            command.callback = lambda **given: None
    return root


def commands(command: Any) -> Iterator[Any]:
    yield command
    for inner in getattr(command, "commands", {}).values():
        yield from commands(inner)


def examples(name: str) -> list[str]:
    """The command lines below the word "Example" of all help texts of a program."""
    found = []
    for command in commands(program(name)):
        text = f"{command.help or ''}\n{command.epilog or ''}".partition("Example")[2].replace("\\\n", " ")
        lines = re.findall(rf"^:?\s*({name} .+)$", text, re.MULTILINE)
        assert lines or hasattr(command, "commands"), f"{command.name}: its help has no example"
        found += lines
    return found


def parse(line: str) -> int:
    """The exit code of a command line that is parsed and not run."""
    name, *words = shlex.split(line)
    try:
        program(name).main(words, standalone_mode=True)
    except SystemExit as ending:
        return int(ending.code or 0)
    return 0


@pytest.mark.parametrize("line", [line for name in PROGRAMS for line in examples(name)])
def test_an_example_is_understood(line: str) -> None:
    assert parse(line) == 0


@pytest.mark.parametrize(
    "line", ["flowbp train --steps 3", "interleave data make", "interleave run", "flowbp estimate --gpus many"]
)
def test_a_mistake_is_not(line: str) -> None:
    assert parse(line) == 2
