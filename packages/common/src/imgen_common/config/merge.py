"""Layers of configuration, one over the other, each value with its origin."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from imgen_common.config.messages import MAX_SHOWN, describe_errors, label, shortened
from imgen_common.config.schema import (
    PRESET,
    C,
    Config,
    Keys,
    class_of_mapping,
    default_under,
    item_type,
    presets_of,
    type_under,
    union_members,
)
from imgen_common.config.secrets import mask_secrets
from imgen_common.config.yaml_files import parse_yaml, read_yaml
from imgen_common.errors import UserError, nearest
from imgen_common.files import local_path

EXTENDS = "extends"
MAX_FILES, MAX_KEYS = 20, 64
"""Files that extend each other; keys of `--set`."""


def load(cls: type[C], files: Sequence[Path | str] | Path = (), sets: Sequence[str] = ()) -> C:
    """The configuration of class `cls` that `files` and then `sets` ("a.b=c", the value in YAML) describe.

    One file, or one of `sets`, may be given alone.  `sets` do not depend on their order, except that of two for the
    same key the last wins.
    Raises UserError naming the file or `--set`, the key, what was given and what is allowed.
    """
    files = [files] if isinstance(files, str | Path) else files
    sets = [sets] if isinstance(sets, str) else sets
    # a value comes before what lies inside it, and `kind` before its neighbors
    given = sorted(map(_parse_set, sets), key=lambda item: (len(item[0]), item[0][-1] not in ("kind", PRESET)))
    merge = _Merge(frozenset(tuple(key.split(".")) for key in cls.json_files))
    tree: Any = {}
    for path, content in (layer for file in files for layer in read_layers(Path(file))):
        _find_beside(cls, path, content)
        tree = with_json_files(cls, merge.apply(cls, tree, content, (), str(path)))
    for keys, value, source in given:
        for key in reversed(keys):
            value = {key: value}
        tree = with_json_files(cls, merge.apply(cls, tree, value, (), source))
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise UserError(describe_errors(cls, tree, merge.origins, error)) from None


def read_layers(path: Path, below: tuple[Path, ...] = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A file and, before it, those it `extends`, each with its content as plain data.

    Raises UserError if one cannot be read, or extends itself.
    """
    if "=" in str(path) and not below and not path.exists():
        raise UserError(f"{mask_secrets(str(path))}: no such file; if it is a setting, write --set before it")
    if len(below) > MAX_FILES:
        raise UserError(f"{path}: more than {MAX_FILES} files that extend each other; write fewer")
    content = read_yaml(path)
    if path.resolve() in (file.resolve() for file in below):
        raise UserError(f"{path}: extends itself, by way of {' and '.join(map(str, below))}")
    parent = content.pop(EXTENDS, None)
    if parent is not None:
        if not isinstance(parent, str):
            raise UserError(f"{path}: {EXTENDS}: must be the path of a file, from this one, got {shortened(parent)}")
        yield from read_layers(path.parent / local_path(parent), (*below, path))
    yield path, content


def _find_beside(cls: type[Config], file: Path, content: Any) -> None:
    """Makes the path of a JSON file beside `file` an absolute one."""
    for holder, key in _json_paths(cls, content):
        with contextlib.suppress(OSError, ValueError):  # no name of a file
            if (found := file.parent / local_path(holder[key])).is_file():
                holder[key] = str(found.resolve())


def with_json_files(cls: type[Config], tree: Any) -> Any:
    """`tree`, in which objects replace the paths of JSON files that hold them; a path that cannot be read stays."""
    for holder, key in _json_paths(cls, tree):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            if isinstance(value := json.loads(local_path(holder[key]).read_text(encoding="utf-8-sig")), dict):
                holder[key] = value
    return tree


def _json_paths(cls: type[Config], tree: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Where `tree` gives a text at one of `json_files`: the mapping that holds it, and its key there."""
    for *sections, last in (key.split(".") for key in cls.json_files):
        holder = tree
        for section in sections:
            holder = holder.get(section) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and isinstance(holder.get(last), str):
            yield holder, last


def _parse_set(text: str) -> tuple[Keys, Any, str]:
    dotted, equals, value = text.partition("=")
    keys = tuple(dotted.strip().split("."))
    shown = mask_secrets(text)
    source = f"--set {shown}" if len(shown) <= MAX_SHOWN else f"--set {shown[:MAX_SHOWN]}..."
    if not equals or not all(keys) or len(keys) > MAX_KEYS:
        raise UserError(f"{source}: write --set key=value or --set section.key=value")
    return keys, parse_yaml(value, source, is_option=True), source


@dataclass
class _Merge:
    """Merges layers of plain data and remembers which one gave each value.

    json_files: keys at which a path that is a text still is one that could not be read (`with_json_files`).
    """

    json_files: frozenset[Keys]
    origins: dict[Keys, str] = field(default_factory=dict)

    def apply(self, annotation: Any, old: Any, new: Any, keys: Keys, source: str) -> Any:
        """`new` over `old`, both at `keys` in the whole."""
        start, new = self._start(annotation, new, keys, source)
        if start is not None:
            self._forget(keys)
            self.origins[keys] = source
            old = start
        if isinstance(new, dict) and isinstance(old, str) and keys in self.json_files:
            raise UserError(
                f"{label(source, keys)}: changes a part of the JSON file {old}, which cannot be read; correct its path"
            )
        if isinstance(new, dict) and isinstance(old, list) and new and all(key.isdigit() for key in new):
            return self._apply_items(annotation, old, new, keys, source)
        if isinstance(new, dict):
            before = old if isinstance(old, dict) else {}
            was_given = any(known[: len(keys)] == keys[: len(known)] for known in self.origins)  # or a preset around it
            if not before or ("kind" in new and not (was_given and new["kind"] == before.get("kind"))):
                self._forget(keys)
                before = {}
            return self._apply_mapping(annotation, before, new, keys, source)
        if isinstance(new, bool) and {int, float} & set(parts := union_members(annotation)) and bool not in parts:
            # pydantic would read true as 1
            raise UserError(f"{label(source, keys)}: must be a number, got {str(new).lower()}")
        self._forget(keys)
        if isinstance(new, list):
            items = item_type(annotation)
            new = [self.apply(items, None, item, (*keys, str(i)), source) for i, item in enumerate(new)]
        self.origins[keys] = source
        return new

    def _apply_mapping(self, annotation: Any, old: dict[str, Any], new: dict[str, Any], keys: Keys, source: str) -> Any:
        model = class_of_mapping(annotation, {**old, **new})
        new = dict(model.with_old_keys(new)) if model else new
        merged = dict(old)
        if "kind" in new:
            merged["kind"] = new["kind"]
        if not new:
            self.origins[keys] = source
        for key, value in new.items():
            child = type_under(annotation, merged, key)
            before = old[key] if key in old else default_under(annotation, merged, key)
            merged[key] = self.apply(child, before, value, (*keys, key), source)
        return merged

    def _apply_items(self, annotation: Any, old: list[Any], new: dict[str, Any], keys: Keys, source: str) -> list[Any]:
        merged = list(old)
        for key, value in new.items():
            if int(key) >= len(old):
                raise UserError(f"{label(source, (*keys, key))}: no such item; the list has {len(old)}, from 0")
            merged[int(key)] = self.apply(item_type(annotation), old[int(key)], value, (*keys, key), source)
        return merged

    def _start(self, annotation: Any, new: Any, keys: Keys, source: str) -> tuple[dict[str, Any] | None, Any]:
        """The preset that `new` asks for as plain data (or None), and what `new` says beside it."""
        presets = presets_of(annotation)
        if not presets or not (isinstance(new, str) or (isinstance(new, dict) and PRESET in new)):
            return None, new
        name = new if isinstance(new, str) else new[PRESET]
        if not isinstance(name, str) or name not in presets:
            known = f"{nearest(str(name), presets)}; allowed: {', '.join(presets)}"
            raise UserError(f"{label(source, keys)}: unknown {keys[-1] if keys else PRESET} {shortened(name)}{known}")
        rest = {} if isinstance(new, str) else {key: value for key, value in new.items() if key != PRESET}
        return presets[name].model_dump(mode="json"), rest

    def _forget(self, keys: Keys) -> None:
        for known in [known for known in self.origins if known[: len(keys)] == keys]:
            del self.origins[known]
