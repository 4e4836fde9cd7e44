"""Writes the pages of docs/reference from the code: every configuration key, every command, the Python API, licenses.

python scripts/reference.py            write them
python scripts/reference.py --check    exit 1 if one is out of date
"""

import argparse
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import Distribution, distribution
from pathlib import Path
from textwrap import indent
from typing import Any

import typer.main
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from flowbp.config import TrainConfig
from imgen_common.config import Config, FieldRow, fields_table
from interleave.benchmarks.config import BenchmarkConfig
from interleave.datasets.config import DataConfig
from interleave.loop.config import RunConfig
from interleave.serve.config import ServeConfig
from interleave.training.config import GrpoConfig, SftConfig

FOLDER = Path(__file__).parents[1] / "docs" / "reference"
NOTE = "This page is written by `scripts/reference.py` from the code.\n"
HEAD = """A configuration is what the defaults below, then YAML files from left to right, then `--set key=value` say:

    {example}

- `a(leap).b` is the key `a.b` where `a.kind` is `leap`; `a[].b` is the key `b` of an entry of the list `a`, set as
  `a.0.b`. Setting `kind` to another value, or over a default, begins its section anew.
- A file with `extends: other.yaml` lies over that file; lists are replaced whole, and `rewards.0.weight` reaches into
  one.
"""
FLOWBP_HEAD = """- `method` also takes a name (`flowbp methods` lists them), or a name and changes:
  `{preset: refl, tail: 0.5}`.
- Defaults below `method` are those of the default method, where it has the key.
- `flowbp train --dry-run` prints the resolved configuration and what it costs.
"""
MAX_SIGNATURE = 90
PACKAGES = ("flowbp", "interleave", "imgen-common")
LICENSES_HEAD = """Everything that `pip install` of the three packages brings on Linux, at the versions of `uv.lock`.
The libraries of NVIDIA are needed on a GPU only. A bill of materials in CycloneDX's form is written by
`uv export --format cyclonedx1.5 --all-packages --no-dev`. Models and data have licenses of their own: `flowbp families`
lists those of the families, and each recipe those of its models and prompts. The miniature was made here, under the
license of this repository.
"""
AGENTS: Mapping[str, tuple[type[Config], str]] = {
    "stories": (RunConfig, "`interleave run`, `batch`, `plan`, `export-reward` and `demo`"),
    "data": (DataConfig, "`interleave data build`"),
    "sft": (SftConfig, "`interleave sft`"),
    "grpo": (GrpoConfig, "`interleave grpo`"),
    "serve": (ServeConfig, "`interleave serve`"),
    "benchmark": (BenchmarkConfig, "`interleave benchmark`"),
}


def escape_cell(text: str) -> str:
    """Text with the characters escaped that end a table cell."""
    return text.replace("|", "\\|")


def format_table(rows: Sequence[FieldRow]) -> str:
    """The rows as a Markdown table."""
    lines = ["| key | type | default | |", "| --- | --- | --- | --- |"]
    for row in rows:
        default = row.default or '""'
        lines.append(f"| `{row.path}` | {escape_cell(row.type)} | `{default}` | {escape_cell(row.doc)} |")
    return "\n".join(lines)


def format_keys(config: type[Config], level: int = 2) -> str:
    """Every key: first those without inner keys, then a section for each of the others."""
    sections: dict[str, list[FieldRow]] = {}
    for row in fields_table(config):
        sections.setdefault(row.path.replace("(", ".").replace("[]", "").split(".")[0], []).append(row)
    single = [group[0] for group in sections.values() if len(group) == 1]
    parts = [f"{format_table(single)}\n"] if single else []
    for name, (own, *inner) in sections.items():
        if inner:
            default = f" Default: `{own.default}`." if own.default != "..." else ""
            parts.append(f"{'#' * level} `{name}`\n\n{own.doc}{default}\n\n{format_table(inner)}\n")
    return "\n".join(parts)


def train_page() -> str:
    """The configuration of `flowbp train`."""
    example = (
        "flowbp train my.yaml --set optim.learning_rate=3e-5 --set method=flowbp_bridge --set method.coupling.alpha=0.3"
    )
    head = f"# Configuration of `flowbp train`\n\n{NOTE}\n{HEAD.format(example=example)}{FLOWBP_HEAD}"
    return f"{head}\n{format_keys(TrainConfig)}"


def agents_page(name: str) -> str:
    """The configuration of one of the commands of interleave."""
    config, commands = AGENTS[name]
    example = {
        "stories": 'interleave run "draw a red circle" my.yaml --set loop.max_attempts=3',
        "data": "interleave data build my.yaml --out sets/mine --set prompts.count=100",
        "sft": "interleave sft critic my.yaml --set trl.max_steps=100",
        "grpo": "interleave grpo my.yaml --set trl.max_steps=100",
        "serve": "interleave serve my.yaml --set port=8001",
        "benchmark": "interleave benchmark wise my.yaml --out results/wise --set max_generations=20",
    }[name]
    return f"# Configuration of {commands}\n\n{NOTE}\n{HEAD.format(example=example)}\n{format_keys(config)}"


def commands_page() -> str:
    """Every command of both programs with its arguments and options."""
    parts = [f"# Commands\n\n{NOTE}"]
    for program in ("flowbp", "interleave"):
        root = typer.main.get_command(import_module(f"{program}.cli").app)
        parts += [format_command(path, command) for path, command in leaves(program, root)]
    return "\n".join(parts)


def leaves(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Every command that has no commands of its own, with the words that call it."""
    inner = {name: one for name, one in getattr(command, "commands", {}).items() if not one.hidden}
    if not inner:
        yield path, command
    for name, one in inner.items():
        yield from leaves(f"{path} {name}", one)


def format_command(path: str, command: Any) -> str:
    """A section: the help, its examples, and a table of arguments and options."""
    text = inspect.cleandoc(command.help or "").replace("\f", "").replace("\b\n", "")
    text = re.sub(r"[ \t]*\\\n[ \t]*", " ", text)
    words, _, examples = text.partition("Example")
    examples = examples.partition(":")[2] if examples else ""
    parts = [f"## `{path}`\n\n{words.strip()}\n"]
    if examples.strip():
        parts.append("\n".join(f"    {line.strip()}" for line in examples.strip().splitlines() if line.strip()) + "\n")
    lines = ["| argument or option | |", "| --- | --- |"]
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        is_option = parameter.param_type_name == "option"
        name = ", ".join((*parameter.opts, *parameter.secondary_opts)) if is_option else parameter.name.upper()
        default = parameter.default if is_option and not callable(parameter.default) else None
        shown = f" Default: `{default}`." if default not in (None, (), [], False, ...) else ""
        lines.append(f"| `{name}` | {escape_cell(' '.join((parameter.help or '').split()))}{shown} |")
    return "\n".join([*parts, *lines, ""])


def python_page() -> str:
    """Every public name of both packages with its signature and its documentation."""
    parts = [f"# Python API\n\n{NOTE}\n[The Python tutorial](../tutorials/python.md) shows these names at work.\n"]
    for package in ("flowbp", "interleave"):
        module = import_module(package)
        parts.append(f"## `{package}`\n\n{inspect.cleandoc(module.__doc__ or '')}\n")
        parts += [format_name(package, name, getattr(module, name)) for name in module.__all__]
    return "\n".join(parts)


def format_name(package: str, name: str, value: Any) -> str:
    """A section of one public name."""
    head = f"### `{package}.{name}`\n"
    if isinstance(value, Mapping):
        return f"{head}\nNames: {', '.join(f'`{key}`' for key in value)}.\n"
    text = inspect.getdoc(value) or ""
    if inspect.isclass(value) and issubclass(value, Config):
        page = "flowbp_configuration.md" if package == "flowbp" else "stories_configuration.md"
        return f"{head}\n{text}\n\nA [configuration class](../reference/{page}); its fields are the keys.\n"
    signature = format_signature(value)
    names = "|".join(re.findall(r"(\w+):", signature))
    text = re.sub(rf"(^|  )({names}):(?=\s)", r"\1`\2`:", text, flags=re.MULTILINE) if names else text
    return f"{head}\n{indent(name + signature, '    ')}\n\n{text}\n"


def format_signature(value: Any) -> str:
    """The parameters, one a line where they are many; empty where none are known."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    parameters = [shorten(str(one)) for one in signature.parameters.values()]
    keywords = [one.kind is one.KEYWORD_ONLY for one in signature.parameters.values()]
    if any(keywords):
        parameters.insert(keywords.index(True), "*")
    returned = shorten(str(signature.replace(parameters=[])).removeprefix("()"))
    whole = f"({', '.join(parameters)}){returned}"
    lines = ["(", *(f"    {one}," for one in parameters), f"){returned}"]
    return whole if len(whole) < MAX_SIGNATURE else "\n".join(lines)


def shorten(parameter: str) -> str:
    """A parameter with the last names of its types, and without what is in a default that is an object."""
    kind, equals, default = parameter.partition(" = ")
    kind = re.sub(r"(: |-> )'([^']*)'", r"\1\2", kind)
    kind = re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_~])", "", kind).replace("~", "")
    for inside in (r"<lambda>", r"<[^<>]*>", r"(?<=\w\().+(?=\)$)"):
        default = re.sub(inside, "...", default)
    return f"{kind}{equals}{default}"


def licenses_page() -> str:
    """The license of every package that an installation brings on Linux, as its own metadata gives it."""
    rows = [f"| {name} | {one.version} | {license_of(one)} |" for name, one in sorted(installed_packages().items())]
    table = "\n".join(["| package | version | license |", "| --- | --- | --- |", *rows])
    return f"# Licenses\n\n{NOTE}\n{LICENSES_HEAD}\n{table}\n"


def installed_packages() -> dict[str, Distribution]:
    """Our packages and all that they require here, by name."""
    found: dict[str, Distribution] = {}
    todo, seen = [Requirement(name) for name in PACKAGES], set[str]()
    while todo:
        wanted = todo.pop()
        if (key := f"{canonicalize_name(wanted.name)} {sorted(wanted.extras)}") in seen:
            continue
        seen.add(key)
        found[canonicalize_name(wanted.name)] = one = distribution(wanted.name)
        for needed in map(Requirement, one.requires or ()):
            extras = wanted.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(needed)
    return found


def license_of(package: Distribution) -> str:
    """The expression, classifier or words with which a package states its license."""
    about = package.metadata
    classifiers = [text for text in about.get_all("Classifier", []) if text.startswith("License :: OSI Approved :: ")]
    words = [text.rpartition(" :: ")[2] for text in classifiers] or (about.get("License") or "").splitlines()[:1]
    return about.get("License-Expression") or ", ".join(words) or "not stated in its metadata"


def pages() -> dict[str, str]:
    """{file name: text} of all pages."""
    found = {"flowbp_configuration.md": train_page(), "commands.md": commands_page(), "python.md": python_page()}
    found["licenses.md"] = licenses_page()
    return found | {f"{name}_configuration.md": agents_page(name) for name in AGENTS}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the pages of docs/reference.")
    parser.add_argument("--check", action="store_true", help="only check whether they are up to date")
    options, late = parser.parse_args(), []
    for name, text in pages().items():
        file = FOLDER / name
        if not options.check:
            file.write_text(text, encoding="utf-8")
        elif not file.exists() or file.read_text(encoding="utf-8") != text:
            late.append(name)
    if late:
        sys.exit(f"docs/reference: {', '.join(late)} out of date; run `python scripts/reference.py`")


if __name__ == "__main__":
    main()
