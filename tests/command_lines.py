"""Command lines of both programs: parsed without being run, and what makes one small."""

import shlex
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any

import typer.main

PROGRAMS = ("flowbp", "interleave")


@cache
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


def parse(line: str) -> int:
    """The exit code of a command line that is parsed and not run."""
    name, *words = shlex.split(line)
    try:
        program(name).main(words, standalone_mode=True)
    except SystemExit as ending:
        return int(ending.code or 0)
    return 0


FEW = "--set max_train_steps=2 --set total_batch_size=2 --set eval.num_prompts=6 --set eval.quick_num_prompts=4"
ONE = "--set trl.max_steps=1 --set trl.per_device_train_batch_size=4 --set trl.gradient_accumulation_steps=1"
ROLLOUT = f"{ONE} --set trl.num_generations=4 --set trl.steps_per_generation=1"
