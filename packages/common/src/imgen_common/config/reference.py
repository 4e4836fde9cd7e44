"""Every key of a configuration with type, default and description."""

import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic_core import PydanticUndefined

from imgen_common.config.schema import Config, Presets, config_classes, has_plain_default, item_type, kinds_of


@dataclass(frozen=True)
class FieldRow:
    """One line of a configuration's documentation."""

    path: str
    """Dotted path; `a(leap).b` is `a.b` where `a.kind` is `leap`, `a[].b` is `b` of an item of `a`."""
    type: str
    default: str
    doc: str


def fields_table(cls: type[Config]) -> list[FieldRow]:
    """Every key of `cls` and of the configurations inside it, in the order of the source."""
    return list(_rows(cls, "", None))


def _rows(model: type[Config], prefix: str, value: Config | None) -> Iterator[FieldRow]:
    values = dict(value) if isinstance(value, model) else {}
    for name, found in model.model_fields.items():
        if name == "kind" and prefix.endswith(")."):
            continue
        own = found.get_default(call_default_factory=True) if has_plain_default(found) else PydanticUndefined
        default = values.get(name, own)
        path = f"{prefix}{name}"
        kind = _type_text(found.annotation) + _bounds_text(found.metadata)
        named = next((mark.values for mark in found.metadata if isinstance(mark, Presets)), {})
        yield FieldRow(path, kind, _default_text(default, named), " ".join((found.description or "").split()))
        inner, suffix = config_classes(found.annotation), ""
        if not inner:
            inner, suffix = config_classes(item_type(found.annotation)), "[]"
        for child in inner:
            if child is not model:
                mark = f"({'|'.join(kinds_of(child))})" if len(inner) > 1 else ""
                yield from _rows(child, f"{path}{suffix}{mark}.", default if isinstance(default, child) else None)


def _default_text(value: object, named: Mapping[str, Config] = {}) -> str:
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, Config):
        names = [name for name, preset in named.items() if preset == value]
        return names[0] if names else str(dict(value).get("kind", "..."))
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_default_text, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value.value) if isinstance(value, Enum) else str(value)


def _type_text(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type_text(arguments[0]) + _bounds_text(arguments[1:])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_type_text, arguments))
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is not None:
        inner = ", ".join("..." if argument is Ellipsis else _type_text(argument) for argument in arguments)
        return f"{origin.__name__}[{inner}]"
    if annotation is types.NoneType:
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " | ".join(str(member.value) for member in annotation)
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return "|".join(kinds_of(annotation)) or annotation.__name__
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _bounds_text(metadata: Iterable[object]) -> str:
    signs: dict[type, str] = {Ge: ">= {0.ge}", Gt: "> {0.gt}", Le: "<= {0.le}", Lt: "< {0.lt}"}
    return "".join(f" {signs[type(item)].format(item)}" for item in metadata if type(item) in signs)
