"""Prompts out of a copy of their authors' repository, which is read as text and never run."""

import ast
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from imgen_common.errors import UserError, nearest
from imgen_common.files import read_text

Text = TypeVar("Text", str, tuple[str, ...])
MAX_BYTES = 2**20
"""Size of the largest file that is read."""
MESSAGE_KEYS = ("text", "content")
"""Keys of a chat request under which its words stand."""


def find_file(repository: Path, names: tuple[str, ...], public_name: str) -> Path:
    """The first of some files that a copy of a repository has.

    public_name: what the user has to get, for the message.  Raises UserError if it has none of them.
    """
    found = next((file for name in names if (file := repository / name).is_file()), None)
    if found is None:
        given = "has no" if repository.is_dir() else "is not a folder, so it has no"
        raise UserError(f"{repository}: {given} {' or '.join(names)}; give the folder of a copy of {public_name}")
    return found


def text_file(file: Path) -> str:
    """A file that is one prompt from its beginning to its end, as it stands.

    Raises UserError if it is missing, too large, not UTF-8, or blank.
    """
    if not (text := read_text(file, MAX_BYTES)).strip():
        raise UserError(f"{file}: is empty; a prompt was expected; copy the repository again")
    return text


def constants(file: Path, *names: str) -> dict[str, str]:
    """The texts that a Python file assigns to names at its top level; of several for a name, the last.

    names: those that must be there; without any, all are returned.  A text is a literal, several that are added, or
    one that is stripped; a place of an f-string becomes `{name}`.  Raises UserError for a file that cannot be read,
    and for a name that is not there or is no such text.
    """
    found: dict[str, str] = {}
    for statement in _parse(file).body:
        match statement:
            case ast.Assign(targets=targets, value=value):
                assigned = [target.id for target in targets if isinstance(target, ast.Name)]
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                assigned = [name]
            case _:
                continue
        text = _text(value)
        for name in assigned:
            found.pop(name, None)  # what a name was before no longer counts
            if text is not None:
                found[name] = text
    return {name: _get(found, name, f"{file}: has no text named") for name in names} if names else found


def functions(file: Path, *names: str) -> dict[str, tuple[str, ...]]:
    """The texts in the functions of a Python file: what they return, and the words of the chat requests they build.

    names: those that must be there; without any, all that have a text are returned.  The texts of a function are in
    the order of the source.  A place of an f-string becomes `{name}`, where `{row['key']}` and `{row.key}` become
    `{key}`.  Raises UserError for a file that cannot be read, and for a function that is not there or has no text.
    """
    found = {
        node.name: texts
        for node in _parse(file).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (texts := tuple(_texts_in(node)))
    }
    return {name: _get(found, name, f"{file}: has no function with texts named") for name in names} if names else found


def expect_places(text: str, where: str, *names: str) -> str:
    """`text`, if it has a place for each name.  Raises UserError naming `where` and the first that is missing."""
    for name in names:
        if f"{{{name}}}" not in text:
            raise UserError(f"{where}: has no place for {name!r}; is it another version of the authors' repository?")
    return text


def _get(found: dict[str, Text], name: str, message: str) -> Text:
    if name not in found:
        hint = nearest(name, found)
        raise UserError(f"{message} {name!r}{hint}; is it another version of the authors' repository?")
    return found[name]


def _parse(file: Path) -> ast.Module:
    source = read_text(file, MAX_BYTES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes in the texts
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # MemoryError: nested too deeply
        raise UserError(f"{file}: not Python that can be read ({error}); copy the repository again") from None


def _texts_in(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """What a function returns or puts under the keys of a chat request, in the order of the source."""
    values: list[ast.expr] = []
    for node in ast.walk(function):
        match node:
            case ast.Return(value=ast.expr() as value):
                values.append(value)
            case ast.Dict(keys=keys, values=items):
                pairs = zip(keys, items, strict=True)
                values += [item for key, item in pairs if isinstance(key, ast.Constant) and key.value in MESSAGE_KEYS]
    for value in sorted(values, key=lambda value: (value.lineno, value.col_offset)):
        if (text := _text(value)) is not None:
            yield text


def _text(node: ast.expr) -> str | None:
    """The text that an expression stands for; None where it is more than literals and places."""
    try:
        return _evaluate(node)
    except RecursionError:  # thousands of pieces
        return None


def _evaluate(node: ast.expr) -> str | None:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return _join([_evaluate(part) for part in parts])
        case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
            return _place(value)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _join([_evaluate(left), _evaluate(right)])
        case ast.Call(func=ast.Attribute(value=inner, attr="strip" | "lstrip" | "rstrip" as method), args=[]):
            stripped = _evaluate(inner)
            return None if stripped is None else str(getattr(stripped, method)())
    return None


def _place(value: ast.expr) -> str | None:
    match value:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Subscript(slice=ast.Constant(value=str(name))):
            return f"{{{name}}}"
    return None


def _join(parts: list[str | None]) -> str | None:
    known = [part for part in parts if part is not None]
    return "".join(known) if len(known) == len(parts) else None
