"""Keeps keys and passwords out of configurations, which are printed, written and shared."""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, ValidationInfo

from imgen_common.errors import UserError

SECRET_NAME = re.compile(
    r"(api|access|secret|private|subscription|auth)key$|(^|access|auth|api|bearer|refresh|session|hf|hub)token$|secret|"
    r"passw(or)?d$|^(key|auth|pwd)$|authorization$|credentials?$|cookie$"
)
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
NAME = re.compile(r"""(?<![\w-])([\w-]++)["']?\s*[:=]\s*""")
VALUE = re.compile(r""""[^"]*"|'[^']*'|(?:(?:Bearer|Basic|Token)\s+)?[^\s,}\]]+""", re.IGNORECASE)
"""What may follow a name: in quotes, or a word, also behind the scheme of a header."""
SECRET_VALUE = re.compile(r"(?:(?:Bearer |Basic )\S|(?:sk-|hf_)\S{9})")
"""How a key begins; names of models and parts of addresses may begin as keys do, but are shorter."""
SECRET = re.compile(rf"{SECRET_VALUE.pattern}|\w+://[^/\s@:]*:[^/\s@]+@")
"""Such a value, or an address with a password in it."""


def is_secret_name(name: str) -> bool:
    """Whether a key's name says that its value is a key or a password."""
    return bool(SECRET_NAME.search(re.sub("[^a-z]", "", name.lower())))


def mask_secrets(text: str) -> str:
    """YAML that may not be valid, with `...` in the place of what looks like a key or a password."""
    parts, start = [], 0
    for match in NAME.finditer(text):
        value = VALUE.match(text, match.end()) if match.start() >= start and is_secret_name(match[1]) else None
        if value is not None:
            parts += [text[start : match.end()], "..."]
            start = value.end()
    return re.sub(rf"{SECRET_VALUE.pattern}[^\s,}}\]]*", "...", "".join([*parts, text[start:]]))


def _secrets(value: Any, name: str) -> Iterator[str]:
    """Dotted names of what looks like a key or a password."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _secrets(item, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _secrets(item, name)
    elif isinstance(value, str) and (is_secret_name(name.rpartition(".")[2]) or SECRET.match(value)):
        yield name


def _refuse_secrets(value: Mapping[str, Any], info: ValidationInfo) -> Mapping[str, Any]:
    if name := next(_secrets(value, info.field_name or "value"), None):
        variable = "in the variable that key_env names" if info.field_name == "extra" else "such as HF_TOKEN"
        raise UserError(
            f"{name}: keys and passwords belong into the environment, {variable}; what stands in a configuration is "
            "printed and written into the run's folder"
        )
    return value


def _check_variable(name: str, info: ValidationInfo) -> str:
    if not VARIABLE.fullmatch(name):
        raise UserError(
            f"{info.field_name}: must be the name of a variable of the environment, in capital letters, digits and "
            "underscores, not the key itself; export MY_KEY=..., and give MY_KEY"
        )
    return name


def _check_model(name: str) -> str:
    if SECRET_VALUE.match(name) and "/" not in name:  # servers name models by their folders, too
        raise UserError(
            "model: is a key, not a name; keys belong into the environment, in the variable that key_env names"
        )
    return name


KeyVariable = Annotated[str, AfterValidator(_check_variable)]
"""Name of the variable that holds a key; what may be the key itself is refused with a UserError that does not show it.
"""
ServedModel = Annotated[str, AfterValidator(_check_model)]
"""Name by which a server knows a model; a key in its place is refused with a UserError that does not show it."""


def _refuse_several(extra: Mapping[str, Any]) -> Mapping[str, Any]:
    if extra.get("n", 1) not in (1, None):
        raise ValueError(f"n {extra['n']!r}: only the first of several answers would be used; leave it out")
    return extra


NO_SECRETS = AfterValidator(_refuse_secrets)
"""Of a mapping of further options: a key or a password in it is refused with a UserError that does not show it."""
ONE_ANSWER = AfterValidator(_refuse_several)
"""Of further keys of a request to a server: one that asks for several answers is refused."""
