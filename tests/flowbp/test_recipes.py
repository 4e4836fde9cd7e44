"""Every recipe is read, and would notice a misspelt key."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from flowbp.config import TrainConfig
from flowbp.plan import plan
from imgen_common.config import load
from imgen_common.errors import UserError

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "flowbp").rglob("*.yaml"))


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_its_method_can_be_planned(recipe: Path) -> None:
    config = load(TrainConfig, [recipe])
    sigmas = np.linspace(1, 0, config.num_steps + 1).tolist()
    assert plan(config.method, sigmas, np.random.default_rng(0)).num_gradient_forwards >= 1


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_misspelt_key_is_noticed(recipe: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(recipe.read_text())
    key = next(iter(tree))
    tree[key + "x"] = tree.pop(key)
    broken = tmp_path / "broken.yaml"
    broken.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=f"did you mean '{key}'"):
        load(TrainConfig, [broken])
