"""pydantic's errors in words: the file or option, the key, what was given and what is allowed."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from imgen_common.config.schema import Config, Keys, class_of_mapping, config_classes, kinds_of, type_under
from imgen_common.config.secrets import is_secret_name, mask_secrets
from imgen_common.errors import nearest

MAX_SHOWN = 200
"""Characters of a key or of `--set` that a message repeats."""


def describe_errors(cls: type[Config], tree: Any, origins: Mapping[Keys, str], error: ValidationError) -> str:
    """One line for the first mistake (unknown keys before others), with the number of the rest."""
    mistakes: dict[Keys, list[str]] = {}
    for detail in sorted(error.errors(include_url=False), key=lambda detail: detail["type"] != "extra_forbidden"):
        keys, text = _mistake(cls, tree, dict(detail))
        texts = mistakes.setdefault(keys, [])
        if text not in texts:
            texts.append(text)
    keys, texts = next(iter(mistakes.items()))
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    return f"{label(_origin(cls, origins, keys), keys)}: {' or '.join(texts)}{more}"


def label(source: str, keys: Keys) -> str:
    dotted = ".".join(keys)
    if keys and is_secret_name(keys[-1]) and source.startswith("--set "):
        source = f"--set {dotted}=..."  # whoever gave a key to the wrong setting need not see it in a log
    if len(dotted) > MAX_SHOWN:
        dotted = f"{dotted[:MAX_SHOWN]}..."
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
    around: Any = cls
    owner: type[Config] | None = None
    keys: Keys = ()
    node, tag_seen = tree, False  # a tag may be spelled as the key that follows it: critic.model (kind) .model (key)
    for part in map(str, detail["loc"]):
        if not isinstance(node, dict | list):
            break
        owner, around = class_of_mapping(annotation, node), annotation
        inside = part in node if isinstance(node, dict) else part.isdigit() and int(part) < len(node)
        if not inside:
            if owner is not None and part in owner.model_fields:
                keys = (*keys, part)
                break
            continue  # pydantic puts the chosen member of a union into the path
        is_tag = isinstance(node, dict) and part == node.get("kind") and len(config_classes(annotation)) > 1
        if is_tag and not tag_seen:
            tag_seen = True
            continue
        annotation = type_under(annotation, node, part)
        node = node[part] if isinstance(node, dict) else node[int(part)]
        keys, tag_seen = (*keys, part), False
    if detail["type"].startswith("union_tag"):
        return (*keys, "kind"), _say_kind(annotation, node)
    return keys, _say(detail, owner, around if detail["type"] == "extra_forbidden" else annotation)


def _say_kind(annotation: Any, node: object) -> str:
    kinds = [kind for model in config_classes(annotation) for kind in kinds_of(model)]
    if not isinstance(node, dict) or "kind" not in node:
        return f"missing; allowed: {', '.join(kinds)}"
    return f"unknown kind {node['kind']!r}{nearest(str(node['kind']), kinds)}; allowed: {', '.join(kinds)}"


def _say(detail: dict[str, Any], owner: type[Config] | None, annotation: Any) -> str:
    """annotation: of the value that is wrong; of an unknown key, of the mapping that has it."""
    key = str(detail["loc"][-1]) if detail["loc"] else ""
    given = f", got {shortened(detail['input'])}"
    fields = list(owner.model_fields) if owner else []
    match detail["type"]:
        case "extra_forbidden" if owner is not None and key in owner.renamed:
            now = owner.renamed[key]
            return f"{'no key here' if now.endswith(f'.{key}') else 'renamed'}; write {now}"
        case "extra_forbidden":
            if element := re.fullmatch(r"(\w+)\[(\d+)\]", key):
                return f"unknown key; write {element[1]}.{element[2]} for an element of a list"
            others = [
                kind for model in config_classes(annotation) if key in model.model_fields for kind in kinds_of(model)
            ]
            of_others = f"; it is one of kind: {' or '.join(others)}" if others else ""
            return f"unknown key{nearest(key, fields) or of_others or '; allowed: ' + ', '.join(fields)}"
        case "missing":
            return "missing; give it a value"
        case "model_type" | "model_attributes_type":
            allowed = [name for model in config_classes(annotation) for name in model.model_fields]
            return f"must be a mapping with the keys {', '.join(dict.fromkeys(allowed))}{given}"
        case "literal_error" | "enum":
            allowed = re.findall(r"'([^']*)'", str(detail["ctx"]["expected"]))
            return f"must be {detail['ctx']['expected']}{given}{nearest(str(detail['input']), allowed)}"
        case "string_type" if isinstance(detail["input"], list | tuple):
            return f"must be one text, not a list{given}"
        case "tuple_type" | "list_type":
            return f"must be a list, such as [a, b]{given}"
        case "value_error" | "assertion_error":
            return str(detail["ctx"]["error"])
        case _:
            return detail["msg"].split(", unable to parse")[0].replace("Input should be", "must be") + given


def shortened(value: object) -> str:
    """A given value for a message, in which no key or password is shown."""
    text = "null" if value is None else repr(value)
    return mask_secrets(text if len(text) <= 60 else f"{text[:57]}...")
