"""Texts out of a copy of the authors' repository, read as text: none of its code is run."""

import ast
from pathlib import Path

from imgen_common.errors import UserError
from imgen_common.files import read_text


def constants(file: Path) -> dict[str, str]:
    """The texts that a Python file gives to names at its top level.  Raises UserError for a file that is none."""
    return {
        target.id: node.value.value
        for node in _tree(file).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def functions(file: Path) -> dict[str, str]:
    """The template of each function that returns a text with places, by the function's name."""
    raise NotImplementedError(f"{file}: no benchmark of this branch needs it")


def text_file(file: Path) -> str:
    """The text of a file.  Raises UserError for one that is missing or no text."""
    return read_text(file)


def _tree(file: Path) -> ast.Module:
    try:
        return ast.parse(read_text(file))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not Python ({error}); give a fresh copy of the authors' repository") from None
