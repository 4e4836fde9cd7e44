"""The rooms of CONTRIBUTING.md: which may import which, and how large a room, a file and a function may be.

Everything is read from the source; nothing is imported but in the two tests of import time.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[1] / "packages"
ROOTS = {path.name: path for path in PACKAGES.glob("*/src/*") if path.is_dir()}
ROOMS = {
    "imgen_common": "shutdown terminal errors files tables streams statistics config images http console page weights "
    "prompt_limits hub devices memory run_folder doctor judging shapes",
    "flowbp": "core methods rewards config backbones data evaluation training estimate export reports cli",
    "interleave": "records protocols storage models agents loop datasets pages training benchmarks serve demo cli",
}
"""The rooms of each package, bottom up: a room imports only rooms that stand before it."""
STRANGERS = {"imgen_common": {"flowbp", "interleave"}, "flowbp": {"interleave"}, "interleave": {"flowbp"}}
"""Packages that a package may not import: the products meet on disk only."""
FORBIDDEN = {
    "flowbp.core": {"diffusers", "transformers", "accelerate", "imgen_common.files", "imgen_common.hub"},
    "flowbp.methods": {"torch", "diffusers", "transformers", "accelerate"},
    "flowbp.config": {"torch", "diffusers", "transformers", "accelerate"},
    "interleave.records": {"torch", "PIL", "transformers", "diffusers"},
    "interleave.protocols": {"torch", "transformers", "diffusers"},
}
"""Libraries that a room may not know."""
MAX_ENTRIES, MAX_LINES, MAX_FUNCTION, MAX_PARAMETERS = 12, 400, 40, 7


@cache
def modules() -> dict[str, Path]:
    """Every module of the three packages by its dotted name."""
    return {module_name(path): path for root in ROOTS.values() for path in sorted(root.rglob("*.py"))}


def module_name(path: Path) -> str:
    source = next(parent for parent in path.parents if parent.name == "src")
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Dotted names that a module imports, relative ones resolved; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")
            base = parents[: len(parents) - node.level + is_package] if node.level else []
            yield from (".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names)


def graph() -> dict[str, set[str]]:
    """What every module imports, in any of its functions too."""
    return {name: set(imports(parsed(path), name, path.name == "__init__.py")) for name, path in modules().items()}


def upward(edges: Mapping[str, set[str]], rooms: Mapping[str, str]) -> list[str]:
    """Imports of a room by one that stands below it, and modules that stand in no room."""
    found = []
    for module, names in edges.items():
        package, _, rest = module.partition(".")
        order = rooms[package].split()
        room = rest.partition(".")[0]
        if room in ("", "__main__"):
            continue
        if room not in order:
            found.append(f"{module} stands in no room")
            continue
        above = {f"{package}.{other}" for other in order[order.index(room) + 1 :]}
        found += [f"{module} imports {name}" for name in sorted(names) if ".".join(name.split(".")[:2]) in above]
    return found


def circles(edges: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other, in any number of steps, at the top of the file or in a function."""
    known = {
        module: {target for name in names for target in (name, name.rpartition(".")[0]) if target in edges} - {module}
        for module, names in edges.items()
    }
    # a package's own folder is imported with each of its modules: that is no circle
    for module, targets in known.items():
        targets -= {target for target in targets if module.startswith(f"{target}.")}
    changed = True
    while changed:
        changed = False
        for targets in known.values():
            more = set().union(*(known[target] for target in targets)) - targets if targets else set()
            changed |= bool(more)
            targets |= more
    return sorted(module for module, targets in known.items() if module in targets)


@cache
def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether it is a command: its parameters are options and its docstring is the help, with an example."""
    return "Example:" in (ast.get_docstring(function) or "")


def num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    return len([a for a in (*given.posonlyargs, *given.args, *given.kwonlyargs) if a.arg not in ("self", "cls")])


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, those of a command without its options and help."""
    start = function.lineno
    if is_command(function):
        start = (function.body[0].end_lineno or start) if ast.get_docstring(function) else function.body[0].lineno
    return (function.end_lineno or start) - start + 1


def test_rooms_import_only_rooms_below_them() -> None:
    assert upward(graph(), ROOMS) == []


def test_no_circles() -> None:
    assert circles(graph()) == []


@pytest.mark.parametrize("package", sorted(STRANGERS))
def test_products_meet_on_disk_only(package: str) -> None:
    wrong = [
        f"{module} imports {name}"
        for module, names in graph().items()
        for name in sorted(names)
        if module.partition(".")[0] == package and name.split(".")[0] in STRANGERS[package]
    ]
    assert wrong == []


def test_rooms_do_not_know_what_they_may_not() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, names in graph().items()
        for room, libraries in FORBIDDEN.items()
        if f"{module}.".startswith(f"{room}.")
        for name in sorted(names)
        if any(f"{name}.".startswith(f"{library}.") for library in libraries)
    ]
    # the mathematics of core needs torch; of the rest of core nothing does
    assert wrong == []


def test_every_package_has_its_rooms() -> None:
    for package, root in ROOTS.items():
        found = [path for path in root.iterdir() if path.suffix == ".py" or any(path.rglob("*.py"))]
        entries = {path.stem for path in found} - {"__init__", "__main__"}
        assert entries <= set(ROOMS[package].split()), package
        assert len([path for path in found if path.is_dir()]) <= MAX_ENTRIES


def test_no_room_is_crowded() -> None:
    rooms = {path.parent for path in modules().values()} - set(ROOTS.values())
    skipped = {"__init__.py", "__main__.py", "__pycache__"}
    crowded = {
        str(room.relative_to(PACKAGES)): count
        for room in rooms
        if (count := len([path for path in room.iterdir() if path.name not in skipped])) > MAX_ENTRIES
    }
    assert crowded == {}


def test_every_room_says_what_is_in_it() -> None:
    silent = [
        name for name, path in modules().items() if path.name == "__init__.py" and not ast.get_docstring(parsed(path))
    ]
    assert silent == []


def test_no_file_is_long() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_no_function_is_long() -> None:
    long = {
        f"{name}.{function.name}": num_lines(function)
        for name, path in modules().items()
        for function in functions(path)
        if num_lines(function) > MAX_FUNCTION
    }
    assert long == {}


def test_no_function_has_many_parameters() -> None:
    many = {
        f"{name}.{function.name}": num_parameters(function)
        for name, path in modules().items()
        for function in functions(path)
        if num_parameters(function) > MAX_PARAMETERS and not is_command(function)
    }
    assert many == {}


@pytest.mark.parametrize("module", ["flowbp.config", "interleave.loop.config", "interleave.training.config"])
def test_configuration_imports_no_torch(module: str) -> None:
    heavy = "{'torch', 'transformers', 'diffusers', 'accelerate', 'datasets', 'trl'}"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def unsafe_loads(tree: ast.AST) -> Iterator[str]:
    """Ways to run code that came as data that no rule of ruff sees: ruff forbids eval, exec, pickle and unsafe YAML."""
    for node in ast.walk(tree):
        match node:
            case ast.keyword(arg="trust_remote_code", value=ast.Constant(value=True)):
                yield f"line {node.lineno}: trust_remote_code=True"
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=given):
                safe = [k for k in given if k.arg == "weights_only" and isinstance(k.value, ast.Constant)]
                if not any(k.value.value is True for k in safe if isinstance(k.value, ast.Constant)):
                    yield f"line {node.lineno}: torch.load without weights_only=True"


def test_nothing_runs_code_that_came_as_data() -> None:
    found = {name: list(unsafe_loads(parsed(path))) for name, path in modules().items()}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_unsafe_loads_are_seen() -> None:
    bad = "f(trust_remote_code=True)\ntorch.load(p)\ntorch.load(p, weights_only=False)"
    assert len(list(unsafe_loads(ast.parse(bad)))) == 3
    assert list(unsafe_loads(ast.parse("torch.load(p, weights_only=True)\nf(trust_remote_code=False)"))) == []


def private_imports(edges: Mapping[str, set[str]]) -> list[str]:
    """Names with a leading underscore that one module takes from another."""
    return [
        f"{module} imports {name}"
        for module, names in edges.items()
        for name in sorted(names)
        if name.partition(".")[0] in ROOTS and name.rpartition(".")[2].startswith("_")
    ]


def test_what_is_private_stays_in_its_module() -> None:
    assert private_imports(graph()) == []


def test_upward_imports_are_seen() -> None:
    rooms = {"flowbp": "core methods training"}
    edges = {
        "flowbp.core.engine": {"flowbp.training.trainer.Trainer", "torch"},
        "flowbp.training.trainer": {"flowbp.core.engine.sweep"},
        "flowbp.loose": set(),
    }
    assert upward(edges, rooms) == [
        "flowbp.core.engine imports flowbp.training.trainer.Trainer",
        "flowbp.loose stands in no room",
    ]


def test_circles_are_seen() -> None:
    edges = {"a.x": {"a.y.f"}, "a.y": {"a.z"}, "a.z": {"a.x.g"}, "a.w": {"a.x.g"}, "a": set()}
    assert circles(edges) == ["a.x", "a.y", "a.z"]


def test_relative_imports_are_resolved() -> None:
    tree = ast.parse("from . import a\nfrom ..plan import Plan\nfrom .b.c import d")
    assert set(imports(tree, "flowbp.engine.sweep", False)) == {
        "flowbp.engine.a",
        "flowbp.plan.Plan",
        "flowbp.engine.b.c.d",
    }
    assert set(imports(ast.parse("from .a import b"), "flowbp.engine", True)) == {"flowbp.engine.a.b"}
