"""YAML by the 1.2 core rules."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from imgen_common.config.schema import Config
from imgen_common.errors import UserError
from imgen_common.files import read_text


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds ({} for an empty file).

    Raises UserError if it is missing, not UTF-8, not YAML, not a mapping, larger than a configuration, or gives a key
    twice.
    """
    content = parse_yaml(read_text(path, MAX_CHARACTERS), str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        kind = {list: "list", str: "string", bool: "truth value"}.get(type(content), "number")
        raise UserError(f"{path}: must be a mapping of keys to values, got a {kind}")
    return content


def to_yaml(config: Config) -> str:
    """`config` with every value spelled out; `load` reads it back to an equal value."""
    return dump_yaml(config.model_dump(mode="json"))


def dump_yaml(value: object) -> str:
    """Plain data as YAML that `read_yaml` reads back to an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


MAX_CHARACTERS, MAX_DEPTH, MAX_SIZE = 2**19, 64, 2**18
"""Of one text: characters, values inside each other, and characters and values in all once its aliases are replaced by
what they stand for.  Reading the largest takes seconds."""
UNWRITABLE = re.compile("[\\0\ud800-\udfff]")
PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
"""A character beyond U+FFFF as JSON escapes it."""
INDENTED_ODDLY = re.compile(r"^ *\u00a0[ \u00a0]*(?:- )?[\w.]+:", re.MULTILINE)
"""A key behind a space that is none to YAML, which would be part of the key's name."""
TOO_DEEP = f"more than {MAX_DEPTH} values inside each other"
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
CORE_RULES = (
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("int", re.compile(r"[-+]?[0-9]+"), list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
    ("merge", re.compile(r"<<"), ["<"]),
)


class _Loader(yaml.SafeLoader):
    """Safe YAML by the 1.2 core rules, bounded in size and depth.

    A key given twice is an error, and so are a value that holds itself, a number of more than 64 bits, and text that no
    file can hold.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _error(TOO_DEEP, self.peek_event())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _size(node, {}) > MAX_SIZE:
            raise _error(f"more than {MAX_SIZE} characters, its aliases replaced by what they stand for", node)
        return node

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        if self.flow_level > MAX_DEPTH:  # which the scanner would reach long before a node is composed
            raise yaml.scanner.ScannerError(None, None, TOO_DEEP, self.get_mark())
        super().fetch_flow_collection_start(token)

    def construct_core_map(self, node: yaml.Node) -> dict[str, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise _error("a mapping is expected here", node)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error("a key must be a single word", key)
            if key.value in seen:
                raise _error(f"key {key.value!r} given twice", key)
            seen.add(key.value)
        self.flatten_mapping(node)
        return {_text(key): self.construct_object(value, deep=True) for key, value in node.value}

    def construct_core_list(self, node: yaml.Node) -> list[Any]:
        if not isinstance(node, yaml.SequenceNode):
            raise _error("a list is expected here", node)
        return [self.construct_object(value, deep=True) for value in node.value]


def _error(problem: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, place.start_mark)


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Characters and values in a node, each alias counted as what it stands for.

    Raises ConstructorError for a value that holds itself.
    """
    if id(node) not in known:
        known[id(node)] = -1
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = [one for part in parts for one in (part if isinstance(part, tuple) else (part,))]
        known[id(node)] = 1 + (sum(_size(one, known) for one in inner) if parts else len(node.value))
    if known[id(node)] < 0:
        raise _error("a value that holds itself", node)
    return known[id(node)]


def _text(node: yaml.Node) -> str:
    """The text of a scalar."""
    if not isinstance(node, yaml.ScalarNode):
        raise _error("a single word is expected here", node)
    text = PAIR.sub(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), node.value)
    if UNWRITABLE.search(text):
        raise _error("a zero byte, or half of a surrogate pair, which no file can hold", node)
    return text


def _scalar(kind: str, read: Callable[[str], Any]) -> Callable[[yaml.SafeLoader, yaml.Node], Any]:
    """The constructor of one kind of scalar, for text that is read as such, and for `!!int` and the like."""
    pattern = next((re.compile(rf"(?:{pattern.pattern})\Z") for name, pattern, _ in CORE_RULES if name == kind), None)

    def construct(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
        text = _text(node)
        if pattern is not None and not pattern.match(text):
            raise _error(f"{text[:40]!r} is no {kind}", node)
        try:
            return read(text)
        except ValueError:
            raise _error(f"a number of {len(text)} digits does not fit 64 bits", node) from None

    return construct


def _integer(text: str) -> int:
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise ValueError
    return value


def _float(text: str) -> float:
    return float(re.sub(r"\.(inf|nan)", r"\1", text, flags=re.IGNORECASE))


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
READERS: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": _integer,
    "float": _float,
    "str": str,
}
_Loader.yaml_constructors = {None: yaml.SafeLoader.construct_undefined}
for _name, _read in READERS.items():
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _scalar(_name, _read))
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_core_map)
_Loader.add_constructor("tag:yaml.org,2002:seq", _Loader.construct_core_list)


class _OptionLoader(_Loader):
    """Of a value on a command line, where a comment would be a part of the value that is lost."""

    def scan_to_next_token(self) -> None:
        while self.peek() == " ":
            self.forward()
        if self.peek() == "#":
            problem = (
                "a # at the beginning or after a space begins a comment; put the value in quotes, as in 'k=\"a #b\"'"
            )
            raise yaml.scanner.ScannerError(None, None, problem, self.get_mark())
        super().scan_to_next_token()


def parse_yaml(text: str, source: str, *, is_option: bool = False) -> Any:
    """The value of a YAML text.  Raises UserError, which begins with `source`, if it is none, or too large.

    is_option: of a command line, in which a comment is refused.
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{source}: {len(text)} characters; a configuration may have {MAX_CHARACTERS}")
    if match := INDENTED_ODDLY.search(text):
        line = text.count("\n", 0, match.end()) + 1
        raise UserError(
            f"{source}:{line}: indented with a no-break space (U+00A0), as web pages have; use plain spaces"
        )
    try:
        return yaml.load(text, Loader=_OptionLoader if is_option else _Loader)  # noqa: S506, SafeLoaders
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark or error.context_mark, error.problem or error.context
        if error.context == "while scanning a quoted scalar" and "end of stream" in str(problem):
            mark, problem = error.context_mark, "a quote that is not closed"
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise UserError(f"{place}: {problem}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # an escape beyond Unicode, a letter that YAML forbids
        raise UserError(f"{source}: not YAML ({str(error).splitlines()[0]})") from None
