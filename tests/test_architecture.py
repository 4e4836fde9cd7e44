"""Which package may import which, and what no file of ours may call; read from the source, nothing is imported."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parents[1] / "packages"
ROOTS = {path.name: path for path in PACKAGES.glob("*/src/*") if path.is_dir()}
SOURCES = sorted(PACKAGES.rglob("*.py"))
NEVER = {"imgen_common": {"flowbp", "interleave"}, "flowbp": {"interleave"}, "interleave": {"flowbp"}}
LADDER = ("axes", "methods", "plan", "engine", "train", "cli")
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Dotted names that a module imports, relative ones resolved; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")
            base = parents[: len(parents) - node.level + is_package] if node.level else []
            yield from (".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names)


def module_name(path: Path) -> str:
    source = next(parent for parent in path.parents if parent.name == "src")
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return set(imports(tree, module_name(path), path.name == "__init__.py"))


def parts_graph(edges: Mapping[str, set[str]], package: str, known: set[str]) -> dict[str, set[str]]:
    """What each part of `package` (a module or folder right under it) imports of the others, in any number of steps."""
    graph: dict[str, set[str]] = {part: set() for part in known}
    for module, names in edges.items():
        part = [*module.split("."), ""][1]
        targets = {name.split(".")[1] for name in names if name.startswith(f"{package}.")}
        graph.setdefault(part, set()).update(targets & known - {part})
    for middle in list(graph):
        for part, targets in graph.items():
            if middle in targets:
                targets |= graph[middle] - {part}
    return graph


def broken_rungs(graph: Mapping[str, set[str]]) -> list[str]:
    """Imports that go up the ladder, and those by which the engine reaches a network or a reward."""
    up = [
        f"{low} imports {high}"
        for rank, low in enumerate(LADDER)
        for high in LADDER[rank + 1 :]
        if high in graph.get(low, set())
    ]
    kinds = [f"engine imports {part}" for part in ("backbones", "rewards") if part in graph.get("engine", set())]
    return up + kinds


def dangers(tree: ast.AST) -> Iterator[str]:
    """Ways to run code that came as data."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
                yield f"line {node.lineno}: {name}()"
            case ast.keyword(arg="trust_remote_code", value=ast.Constant(value=True)):
                yield f"line {node.lineno}: trust_remote_code=True"
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load")):
                if not any(
                    k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value
                    for k in node.keywords
                ):
                    yield f"line {node.lineno}: torch.load without weights_only=True"
            case ast.Import() | ast.ImportFrom():
                names = {name.split(".")[0] for name in imports(node, "", False)}
                yield from (f"line {node.lineno}: {name}" for name in sorted(names & PICKLES))


@pytest.mark.parametrize("package", sorted(NEVER))
def test_products_meet_on_disk_only(package: str) -> None:
    wrong = [
        f"{module_name(path)} imports {name}"
        for path in sorted(ROOTS[package].rglob("*.py"))
        for name in sorted(imports_of(path))
        if name.split(".")[0] in NEVER[package]
    ]
    assert wrong == []


def test_flowbp_imports_go_down_the_ladder() -> None:
    edges = {module_name(path): imports_of(path) for path in ROOTS["flowbp"].rglob("*.py")}
    known = {path.stem for path in ROOTS["flowbp"].iterdir()} - {"__init__", "__pycache__"}
    assert broken_rungs(parts_graph(edges, "flowbp", known)) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGES)))
def test_nothing_runs_code_that_came_as_data(path: Path) -> None:
    assert list(dangers(ast.parse(path.read_text(encoding="utf-8")))) == []


def test_the_rules_see_what_they_forbid() -> None:
    bad = "import pickle\nfrom dill import load\neval('1')\nf(trust_remote_code=True)\ntorch.load(p)\nexec(s)"
    assert len(list(dangers(ast.parse(bad)))) == 6
    good = "model.eval()\ntorch.load(p, weights_only=True)\nf(trust_remote_code=False)\n'pickle'"
    assert list(dangers(ast.parse(good))) == []


def test_the_ladder_sees_imports_through_other_modules() -> None:
    edges = {
        "flowbp.engine.sweep": {"flowbp.guidance.Guided", "flowbp.plan.Plan"},
        "flowbp.guidance": {"flowbp.backbones.flux2.velocity", "flowbp.train"},
        "flowbp.plan": {"flowbp.methods"},
        "flowbp.train": {"flowbp.engine.sweep"},
    }
    known = {"engine", "guidance", "plan", "methods", "train", "backbones"}
    assert broken_rungs(parts_graph(edges, "flowbp", known)) == ["engine imports train", "engine imports backbones"]


def test_relative_imports_are_resolved() -> None:
    tree = ast.parse("from . import a\nfrom ..plan import Plan\nfrom .b.c import d")
    assert set(imports(tree, "flowbp.engine.sweep", False)) == {
        "flowbp.engine.a",
        "flowbp.plan.Plan",
        "flowbp.engine.b.c.d",
    }
    assert set(imports(ast.parse("from .a import b"), "flowbp.engine", True)) == {"flowbp.engine.a.b"}
