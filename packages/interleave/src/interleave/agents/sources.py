"""Texts in Python files of others, which are parsed and never run."""

import ast
from pathlib import Path

from imgen_common.errors import UserError
from imgen_common.files import read_text

MAX_BYTES = 2**20
"""Of a file that is parsed."""


def read_constants(file: Path) -> dict[str, str]:
    """The texts that are assigned to names at the top of a Python file.  Raises UserError if it cannot be parsed."""
    try:
        tree = ast.parse(read_text(file, MAX_BYTES))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{file}: cannot be read as Python ({error})") from None
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
