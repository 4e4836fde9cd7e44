"""The base class of every configuration, and what its annotations say."""

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from imgen_common.files import local_path

C = TypeVar("C", bound="Config")
Keys = tuple[str, ...]
PRESET = "preset"


def _expanded(text: str) -> str:
    return str(local_path(text)) if text.startswith("~") else text


UserPath = Annotated[str, AfterValidator(_expanded)]
"""A path in a configuration; a `~` at its beginning, which no shell expands there, is the home folder."""


class Config(BaseModel):
    """Base of every configuration: frozen, unknown keys refused, each field's docstring is its description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )
    renamed: ClassVar[Mapping[str, str]] = {}
    """Keys of earlier versions, and of a part (`trl.max_steps`), each with what to write instead."""

    @classmethod
    def with_old_keys(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """`given` with values of earlier versions under the keys of this one, where these can be told."""
        return given

    json_files: ClassVar[tuple[str, ...]] = ()
    """Keys of this configuration, with dots, whose value may be the path of a JSON file, whose object replaces it.  A
    relative one counts from the YAML file that gives it where such a file is there, so that recipes can name files
    beside them; else, as all others, from the working directory."""


@dataclass(frozen=True)
class Presets:
    """Named values of a field, as a part of its annotation: `method: Annotated[Method, Presets(METHODS)]`.

    A file or `--set` may then give a name (`method: refl`), or start from it
    (`method: {preset: refl, gap_floor: 0.1}`); what is set below merges over the named value.
    """

    values: Mapping[str, Config]


def union_members(annotation: Any) -> list[Any]:
    """The members of a union, without `Annotated` and aliases."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return union_members(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [part for member in typing.get_args(annotation) for part in union_members(member)]
    return [annotation]


def config_classes(annotation: Any) -> list[type[Config]]:
    """The configuration classes that a value of type `annotation` may have."""
    return [part for part in union_members(annotation) if isinstance(part, type) and issubclass(part, Config)]


def presets_of(annotation: Any) -> Mapping[str, Config]:
    """The named values that a value of type `annotation` may start from."""
    marks = typing.get_args(annotation)[1:] if typing.get_origin(annotation) is Annotated else ()
    return next((mark.values for mark in marks if isinstance(mark, Presets)), {})


def item_type(annotation: Any) -> Any:
    """The type of what a list, tuple or mapping of type `annotation` holds."""
    for part in union_members(annotation):
        arguments = [argument for argument in typing.get_args(part) if argument is not Ellipsis]
        if arguments and typing.get_origin(part) is not Literal:
            return arguments[-1]
    return Any


def kinds_of(model: type[Config]) -> tuple[str, ...]:
    """The values that `kind` may have in `model`."""
    kind = model.model_fields.get("kind")
    return typing.get_args(kind.annotation) if kind and typing.get_origin(kind.annotation) is Literal else ()


def class_of_mapping(annotation: Any, node: object) -> type[Config] | None:
    """The class that the mapping `node` describes, as far as its `kind` tells."""
    models = config_classes(annotation)
    if len(models) > 1 and isinstance(node, dict):
        models = [model for model in models if node.get("kind") in kinds_of(model)]
    return models[0] if len(models) == 1 else None


def type_under(annotation: Any, node: object, key: str) -> Any:
    """The type of the value under `key` of `node`."""
    if not config_classes(annotation):
        return item_type(annotation)
    found = _field(annotation, node, key)
    if found is None:
        return Any
    named = [mark for mark in found.metadata if isinstance(mark, Presets)]
    return Annotated[found.annotation, named[0]] if named else found.annotation


def default_under(annotation: Any, node: object, key: str) -> Any:
    """The default under `key` of `node` as plain data; None where there is none to merge with."""
    found = _field(annotation, node, key)
    return _plain_data(found.get_default(call_default_factory=True)) if found and has_plain_default(found) else None


def has_plain_default(found: FieldInfo) -> bool:
    return not found.is_required() and not found.default_factory_takes_validated_data


def _field(annotation: Any, node: object, key: str) -> FieldInfo | None:
    model = class_of_mapping(annotation, node)
    return model.model_fields.get(key) if model else None


def _plain_data(value: object) -> Any:
    if isinstance(value, Config):
        return value.model_dump(mode="json")
    if isinstance(value, list | tuple):
        return [_plain_data(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain_data(item) for key, item in value.items()}
    return value
