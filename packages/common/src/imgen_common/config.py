"""Configuration: frozen pydantic models, YAML files and `--set a.b=c`.

Precedence: class defaults < files, left to right < `--set`.  A file with `extends: other.yaml` lies over that file, its
path counted from its own.  Mappings merge key by key; setting `kind` to another value replaces its mapping, so that
nothing of the old kind is left, and over a default any `kind` begins anew with what that kind has by default; lists are
replaced whole (`--set rewards.0.weight=2` reaches into one).  YAML is read by the 1.2 core rules: `1e-4` is a number,
`no` and `on` are words.
"""

import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from imgen_common.errors import UserError, nearest

C = TypeVar("C", bound="Config")
Keys = tuple[str, ...]
PRESET = "preset"
EXTENDS = "extends"


class Config(BaseModel):
    """Base of every configuration: frozen, unknown keys refused, each field's docstring is its description."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @classmethod
    def presets(cls) -> Mapping[str, "Config"]:
        """Named values of this class.

        Where the class is expected, a file or `--set` may give a name instead (`method: refl`), or start from it
        (`method: {preset: refl, gap_floor: 0.1}`); what is set below merges over the named value.
        """
        return {}


def load(cls: type[C], files: Sequence[Path] = (), sets: Sequence[str] = ()) -> C:
    """The configuration of class `cls` that `files` and then `sets` ("a.b=c", the value in YAML) describe.

    `sets` do not depend on their order, except that of two for the same key the last wins.
    Raises UserError naming the file or `--set`, the key, what was given and what is allowed.
    """
    merge = _Merge()
    tree: Any = {}
    for path, content in (layer for file in files for layer in _layers(file)):
        tree = merge.apply(cls, tree, content, (), str(path))
    for keys, value, source in sorted(map(_parse_set, sets), key=_shallow_first):
        for key in reversed(keys):
            value = {key: value}
        tree = merge.apply(cls, tree, value, (), source)
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise UserError(_describe(cls, tree, merge.origins, error)) from None


def _layers(path: Path, below: tuple[Path, ...] = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A file and, before it, those it `extends`, each with its content."""
    if path.resolve() in (file.resolve() for file in below):
        raise UserError(f"{path}: extends itself, by way of {' and '.join(map(str, below))}")
    content = read_yaml(path)
    parent = content.pop(EXTENDS, None)
    if parent is not None:
        if not isinstance(parent, str):
            raise UserError(f"{path}: {EXTENDS}: must be the path of a file, from this one, got {_short(parent)}")
        yield from _layers(path.parent / parent, (*below, path))
    yield path, content


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds ({} for an empty file).

    Raises UserError if it is missing, not UTF-8, not YAML, not a mapping, or gives a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except FileNotFoundError:
        others = [other.name for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such file{nearest(path.name, others)}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    content = _parse_yaml(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a mapping of keys to values, got a {_yaml_type(content)}")
    return content


def to_yaml(config: Config) -> str:
    """`config` with every value spelt out; `load` reads it back to an equal value."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


# --- YAML ------------------------------------------------------------------------------------------------------------

FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
CORE_RULES = (
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("int", re.compile(r"[-+]?[0-9]+"), list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
    ("merge", re.compile(r"<<"), ["<"]),
)


class _Loader(yaml.SafeLoader):
    """Safe YAML by the 1.2 core rules; a key given twice is an error, and so is a value that holds itself."""

    def construct_core_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value)

    def construct_core_map(self, node: yaml.MappingNode) -> dict[str, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a single word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} given twice", key.start_mark)
            seen.add(key.value)
        self.flatten_mapping(node)
        return {str(key.value): self.construct_object(value, deep=True) for key, value in node.value}


class _Dumper(yaml.SafeDumper):
    """Quotes every word that either YAML 1.1 or the core rules would read as something else."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # PyYAML writes Unicode's other line breaks bare and reads them back as one space
        style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Loader.yaml_implicit_resolvers = {}
for _name, _pattern, _first in CORE_RULES:
    _whole = re.compile(rf"(?:{_pattern.pattern})\Z")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _whole, _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _whole, _first)
_Dumper.add_representer(str, _Dumper.represent_text)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_core_int)
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_core_map)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise UserError(f"{place}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{source}: not YAML ({str(error).splitlines()[0]})") from None


def _yaml_type(value: object) -> str:
    names = {dict: "mapping", list: "list", str: "string", bool: "truth value", int: "number", float: "number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


# --- types -----------------------------------------------------------------------------------------------------------


def _parts(annotation: Any) -> list[Any]:
    """The members of a union, without `Annotated` and aliases."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _parts(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [part for member in typing.get_args(annotation) for part in _parts(member)]
    return [annotation]


def _models(annotation: Any) -> list[type[Config]]:
    """The configuration classes that a value of type `annotation` may have."""
    return [part for part in _parts(annotation) if isinstance(part, type) and issubclass(part, Config)]


def _items(annotation: Any) -> Any:
    """The type of what a list, tuple or mapping of type `annotation` holds."""
    for part in _parts(annotation):
        arguments = [argument for argument in typing.get_args(part) if argument is not Ellipsis]
        if arguments and typing.get_origin(part) is not Literal:
            return arguments[-1]
    return Any


def _kinds(model: type[Config]) -> tuple[str, ...]:
    """The values that `kind` may have in `model`."""
    kind = model.model_fields.get("kind")
    return typing.get_args(kind.annotation) if kind and typing.get_origin(kind.annotation) is Literal else ()


def _model_of(annotation: Any, node: object) -> type[Config] | None:
    """The class that the mapping `node` describes, as far as its `kind` tells."""
    models = _models(annotation)
    if len(models) > 1 and isinstance(node, dict):
        models = [model for model in models if node.get("kind") in _kinds(model)]
    return models[0] if len(models) == 1 else None


def _child(annotation: Any, node: object, key: str) -> Any:
    """The type of the value under `key` of `node`."""
    if not _models(annotation):
        return _items(annotation)
    model = _model_of(annotation, node)
    found = model.model_fields.get(key) if model else None
    return found.annotation if found else Any


def _default(annotation: Any, node: object, key: str) -> Any:
    """The default under `key` of `node` as plain data; None where there is none to merge with."""
    model = _model_of(annotation, node)
    found = model.model_fields.get(key) if model else None
    return _plain(found.get_default(call_default_factory=True)) if found and _has_plain_default(found) else None


def _has_plain_default(found: FieldInfo) -> bool:
    return not found.is_required() and not found.default_factory_takes_validated_data


def _plain(value: object) -> Any:
    if isinstance(value, Config):
        return value.model_dump(mode="json")
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


# --- merging ---------------------------------------------------------------------------------------------------------


def _parse_set(text: str) -> tuple[Keys, Any, str]:
    dotted, equals, value = text.partition("=")
    keys = tuple(dotted.strip().split("."))
    source = f"--set {text}"
    if not equals or not all(keys):
        raise UserError(f"{source}: write --set key=value or --set section.key=value")
    return keys, _parse_yaml(value, source), source


def _shallow_first(item: tuple[Keys, Any, str]) -> tuple[int, bool]:
    """Order in which a value comes before what lies inside it, and `kind` before its neighbours."""
    keys = item[0]
    return len(keys), keys[-1] not in ("kind", PRESET)


@dataclass
class _Merge:
    """Merges layers of plain data and remembers which one gave each value."""

    origins: dict[Keys, str] = field(default_factory=dict)

    def apply(self, annotation: Any, old: Any, new: Any, keys: Keys, source: str) -> Any:
        """`new` over `old`, both at `keys` in the whole."""
        start, new = self._start(annotation, new, keys, source)
        if start is not None:
            self._forget(keys)
            self.origins[keys] = source
            old = start
        if isinstance(new, dict) and isinstance(old, list) and new and all(key.isdigit() for key in new):
            return self._apply_items(annotation, old, new, keys, source)
        if isinstance(new, dict):
            before = old if isinstance(old, dict) else {}
            if not before or ("kind" in new and not (self._given(keys) and new["kind"] == before.get("kind"))):
                self._forget(keys)
                before = {}
            return self._apply_mapping(annotation, before, new, keys, source)
        if isinstance(new, bool) and {int, float} & set(parts := _parts(annotation)) and bool not in parts:
            # pydantic would read true as 1
            raise UserError(f"{_label(source, keys)}: must be a number, got {str(new).lower()}")
        self._forget(keys)
        if isinstance(new, list):
            items = _items(annotation)
            new = [self.apply(items, None, item, (*keys, str(i)), source) for i, item in enumerate(new)]
        self.origins[keys] = source
        return new

    def _apply_mapping(self, annotation: Any, old: dict[str, Any], new: dict[str, Any], keys: Keys, source: str) -> Any:
        merged = dict(old)
        if "kind" in new:
            merged["kind"] = new["kind"]
        if not new:
            self.origins[keys] = source
        for key, value in new.items():
            child = _child(annotation, merged, key)
            before = old[key] if key in old else _default(annotation, merged, key)
            merged[key] = self.apply(child, before, value, (*keys, key), source)
        return merged

    def _apply_items(self, annotation: Any, old: list[Any], new: dict[str, Any], keys: Keys, source: str) -> list[Any]:
        merged = list(old)
        for key, value in new.items():
            if int(key) >= len(old):
                raise UserError(f"{_label(source, (*keys, key))}: no such item; the list has {len(old)}, from 0")
            merged[int(key)] = self.apply(_items(annotation), old[int(key)], value, (*keys, key), source)
        return merged

    def _start(self, annotation: Any, new: Any, keys: Keys, source: str) -> tuple[dict[str, Any] | None, Any]:
        """The preset that `new` asks for as plain data (or None), and what `new` says beside it."""
        presets = {name: value for model in _models(annotation) for name, value in model.presets().items()}
        if not presets or not (isinstance(new, str) or (isinstance(new, dict) and PRESET in new)):
            return None, new
        name = new if isinstance(new, str) else new[PRESET]
        if name not in presets:
            known = f"{nearest(str(name), presets)}; allowed: {', '.join(presets)}"
            raise UserError(f"{_label(source, keys)}: unknown {keys[-1] if keys else PRESET} {name!r}{known}")
        rest = {} if isinstance(new, str) else {key: value for key, value in new.items() if key != PRESET}
        return presets[name].model_dump(mode="json"), rest

    def _given(self, keys: Keys) -> bool:
        """Whether an earlier layer gave the value at `keys` or something inside it, or a preset of which it comes."""
        return any(known[: len(keys)] == keys[: len(known)] for known in self.origins)

    def _forget(self, keys: Keys) -> None:
        for known in [known for known in self.origins if known[: len(keys)] == keys]:
            del self.origins[known]


# --- errors ----------------------------------------------------------------------------------------------------------


def _describe(cls: type[Config], tree: Any, origins: Mapping[Keys, str], error: ValidationError) -> str:
    """One line for the first mistake (unknown keys before others), with the number of the rest."""
    mistakes: dict[Keys, list[str]] = {}
    for detail in sorted(error.errors(include_url=False), key=lambda detail: detail["type"] != "extra_forbidden"):
        keys, text = _mistake(cls, tree, dict(detail))
        texts = mistakes.setdefault(keys, [])
        if text not in texts:
            texts.append(text)
    keys, texts = next(iter(mistakes.items()))
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    return f"{_label(_origin(cls, origins, keys), keys)}: {' or '.join(texts)}{more}"


def _label(source: str, keys: Keys) -> str:
    dotted = ".".join(keys)
    return source if not keys or source.startswith(f"--set {dotted}=") else f"{source}: {dotted}"


def _origin(cls: type[Config], origins: Mapping[Keys, str], keys: Keys) -> str:
    """Who gave the value at `keys`, something inside it or, failing that, the mapping around it."""
    for length in range(len(keys), -1, -1):
        sources = [source for known, source in origins.items() if known[:length] == keys[:length]]
        if sources:
            return ", ".join(dict.fromkeys(sources))
    return f"defaults of {cls.__name__}"


def _mistake(cls: type[Config], tree: Any, detail: dict[str, Any]) -> tuple[Keys, str]:
    """Where a validation error lies in the tree, and what to say of it."""
    annotation: Any = cls
    owner: type[Config] | None = None
    keys: Keys = ()
    node = tree
    for part in map(str, detail["loc"]):
        if not isinstance(node, dict | list):
            break
        owner = _model_of(annotation, node)
        inside = part in node if isinstance(node, dict) else part.isdigit() and int(part) < len(node)
        if not inside:
            if owner is not None and part in owner.model_fields:
                keys = (*keys, part)
                break
            continue  # pydantic puts the chosen member of a union into the path
        if isinstance(node, dict) and len(_models(annotation)) > 1 and part == node.get("kind"):
            continue
        annotation = _child(annotation, node, part)
        node = node[part] if isinstance(node, dict) else node[int(part)]
        keys = (*keys, part)
    if detail["type"].startswith("union_tag"):
        return (*keys, "kind"), _say_kind(annotation, node)
    return keys, _say(detail, owner, annotation)


def _say_kind(annotation: Any, node: object) -> str:
    kinds = [kind for model in _models(annotation) for kind in _kinds(model)]
    if not isinstance(node, dict) or "kind" not in node:
        return f"missing; allowed: {', '.join(kinds)}"
    return f"unknown kind {node['kind']!r}{nearest(str(node['kind']), kinds)}; allowed: {', '.join(kinds)}"


def _say(detail: dict[str, Any], owner: type[Config] | None, annotation: Any) -> str:
    key = str(detail["loc"][-1]) if detail["loc"] else ""
    given = f", got {_short(detail['input'])}"
    fields = list(owner.model_fields) if owner else []
    match detail["type"]:
        case "extra_forbidden":
            return f"unknown key{nearest(key, fields) or '; allowed: ' + ', '.join(fields)}"
        case "missing":
            return "missing; give it a value"
        case "model_type" | "model_attributes_type":
            allowed = [name for model in _models(annotation) for name in model.model_fields]
            return f"must be a mapping with the keys {', '.join(dict.fromkeys(allowed))}{given}"
        case "literal_error" | "enum":
            allowed = re.findall(r"'([^']*)'", str(detail["ctx"]["expected"]))
            return f"must be {detail['ctx']['expected']}{given}{nearest(str(detail['input']), allowed)}"
        case "value_error" | "assertion_error":
            return str(detail["ctx"]["error"])
        case _:
            return detail["msg"].split(", unable to parse")[0].replace("Input should be", "must be") + given


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- documentation ---------------------------------------------------------------------------------------------------


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
        default = values.get(name, _field_default(found))
        path = f"{prefix}{name}"
        kind = _type_text(found.annotation) + _bounds(found.metadata)
        yield FieldRow(path, kind, _default_text(default), " ".join((found.description or "").split()))
        inner, suffix = _models(found.annotation), ""
        if not inner:
            inner, suffix = _models(_items(found.annotation)), "[]"
        for child in inner:
            if child is not model:
                mark = f"({'|'.join(_kinds(child))})" if len(inner) > 1 else ""
                yield from _rows(child, f"{path}{suffix}{mark}.", default if isinstance(default, child) else None)


def _field_default(found: FieldInfo) -> Any:
    return found.get_default(call_default_factory=True) if _has_plain_default(found) else PydanticUndefined


def _default_text(value: object) -> str:
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, Config):
        names = [name for name, preset in type(value).presets().items() if preset == value]
        return names[0] if names else str(dict(value).get("kind", "..."))
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_default_text, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value.value) if isinstance(value, Enum) else str(value)


def _type_text(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type_text(arguments[0]) + _bounds(arguments[1:])
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
        return "|".join(_kinds(annotation)) or annotation.__name__
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _bounds(metadata: Iterable[object]) -> str:
    signs: dict[type, tuple[str, Callable[[Any], Any]]] = {
        Ge: (">=", lambda bound: bound.ge),
        Gt: (">", lambda bound: bound.gt),
        Le: ("<=", lambda bound: bound.le),
        Lt: ("<", lambda bound: bound.lt),
    }
    found = [(signs[type(item)], item) for item in metadata if type(item) in signs]
    return "".join(f" {sign} {read(item)}" for (sign, read), item in found)
