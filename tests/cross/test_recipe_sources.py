"""Every recipe of both products says where its weights and prompts come from, and under which license."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path for path in CONFIGS.glob("*/**/*.yaml") if path.parent.name != "fsdp")
REPOSITORY = re.compile(r"[A-Za-z][\w-]*/[\w.-]*[A-Za-z][\w.-]*(?<!\.json)")
LICENSE = re.compile(r"Apache-2\.0|MIT|Community|non-commercial")
FILES = {"rewards/hpsv2": "HPS_v2.1_compressed.pt", "rewards/hpsv3": "HPSv3.safetensors"}
FILES |= {"rewards/imagereward": "ImageReward.pt"}
"""Published file behind each folder that a recipe expects."""


def chain(recipe: Path) -> list[Path]:
    """The recipe and what it extends."""
    parent = yaml.safe_load(recipe.read_text(encoding="utf-8")).get("extends")
    return [recipe, *(chain(recipe.parent / parent) if parent else [])]


def comment_lines(recipe: Path) -> list[str]:
    lines = [line for path in chain(recipe) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line.removeprefix("#").strip() for line in lines if line.startswith("#")]


def pairs_of_lines(recipe: Path) -> list[str]:
    """Each comment line with the next: a license may follow on it."""
    lines = comment_lines(recipe)
    return [" ".join(pair) for pair in pairwise(lines)]


def comments(recipe: Path) -> str:
    return " ".join(comment_lines(recipe))


def values(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string of a configuration with its key."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from values(value, str(name))
    elif isinstance(tree, list):
        for value in tree:
            yield from values(value, key)
    elif isinstance(tree, str):
        yield key, tree


def named(recipe: Path) -> list[tuple[str, str]]:
    return [pair for path in chain(recipe) for pair in values(yaml.safe_load(path.read_text(encoding="utf-8")))]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_says_where_its_weights_and_prompts_come_from(recipe: Path) -> None:
    said = comments(recipe)
    for key, value in named(recipe):
        if key in ("ref", "model") and value in FILES:
            assert FILES[value] in said, value
            assert f" {value} --with " in said, value
        elif key in ("ref", "model") and REPOSITORY.fullmatch(value) and not value.startswith("ckpt/"):
            assert any(LICENSE.search(line.partition(value)[2]) for line in comment_lines(recipe)), value
        elif key == "ref" and value.startswith("ckpt/"):
            assert value.removeprefix("ckpt/") in said
        elif key in ("prompts", "quick_prompts", "path") and value.endswith((".txt", ".jsonl")):
            assert re.search(rf"(?<![\w./-]){re.escape(value)}\b", said), value  # not as the end of another name
        elif (key, value) == ("kind", "service"):
            (ref,) = re.findall(r"interleave serve --set generator\.ref=(\S+)", said)
            assert any(LICENSE.search(line.partition(ref)[2]) for line in pairs_of_lines(recipe)), ref
            assert "hf auth login" in said
        elif key == "data":
            assert f"--out {value}" in said, value


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_gated_models_say_so(recipe: Path) -> None:
    refs = [value for key, value in named(recipe) if key == "ref"]
    gated = re.compile(r"stabilityai/.*|black-forest-labs/(FLUX\.1-.*dev|FLUX\.2-klein-.*9B)")
    if any(gated.fullmatch(ref) for ref in refs):
        assert "gated" in comments(recipe)
        assert "hf auth login" in comments(recipe)
