"""Every recipe is read, and would notice a misspelt key."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from families import FAMILIES, SOURCE, folder_of

from flowbp.config import TrainConfig
from flowbp.core.plan import draw_plan
from flowbp.training import preflight
from imgen_common.config import load
from imgen_common.errors import UserError

IN_PAPER = {"sd3_5_medium": "sd3", "flux1_dev": "flux", "flux2_klein_base_4b": "flux2", "flux2_klein_base_9b": "flux2"}
FAMILY_OF = IN_PAPER | {name: name for name in ("z_image", "krea2", "qwen_image", "qwen_image_21", "flux2_dev")}
FAMILY_OF |= {"qwen_image_edit": "qwen_edit"}
"""Families by the folder of their recipes: models of the paper's runs, or with its settings for them; and others."""
RECIPES = sorted((Path(__file__).parents[3] / "configs" / "flowbp").rglob("*.yaml"))


QUICK = ("lora_24gb", "edits_lora_24gb", "lora_48gb")
"""Recipes that are checked whole in the default tier."""


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_is_valid_and_its_method_can_be_planned(recipe: Path) -> None:
    config = load(TrainConfig, [recipe])
    sigmas = np.linspace(1, 0, config.num_inference_steps + 1).tolist()
    assert draw_plan(config.method, sigmas, np.random.default_rng(0)).num_gradient_forwards >= 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("tiny")
    return {name: folder_of(family, place) for name, family in FAMILY_OF.items()}


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(r, marks=() if r.stem in QUICK else pytest.mark.slow, id=f"{r.parent.name}/{r.stem}")
        for r in RECIPES
        if r.parent.name != "miniature"
    ],
)
def test_a_recipe_passes_every_check_before_loading(recipe: Path, tiny: dict[str, Path], tmp_path: Path) -> None:
    """With a tiny model of the same family and prompts of the miniature in the place of what is not here."""
    sets = [f"model.ref={tiny[recipe.parent.name]}", "rewards.0.ref=builtin:shapes/reward"]
    for i, _ in enumerate(load(TrainConfig, [recipe]).heldout):
        sets += [f"heldout.{i}.ref=builtin:shapes/heldout", f"heldout.{i}.score=clip"]
    prompts: object = "builtin:shapes/test"
    if FAMILIES[FAMILY_OF[recipe.parent.name]].min_sources:
        SOURCE.save(tmp_path / "source.png")
        prompts = tmp_path / "edits.jsonl"
        prompts.write_text('{"prompt": "make it red", "images": "source.png"}\n' * 8)
    sets += [f"{key}={prompts}" for key in ("data.prompts", "eval.prompts", "eval.quick_prompts")]
    job = preflight.check_run(load(TrainConfig, [recipe], sets), 1 if recipe.stem.endswith("gb") else 8)
    cost = preflight.update_arithmetic(job)
    assert cost["images_per_update"] == job.config.total_batch_size
    assert cost["updates"] == 300


PAPER = ("refl", "draft_lv", "drtune", "leapalign", "flowbp_sparse", "flowbp_bridge", "flowbp_lagrange")
"""The runs of the paper, for each model."""
WITHOUT_HPSV3 = {("flux1_dev", "flowbp_bridge"), ("flux1_dev", "flowbp_lagrange")}
"""Runs in whose evaluations the paper's code leaves HPSv3 out."""


def test_the_papers_runs_are_all_there() -> None:
    for name in IN_PAPER:
        found = {recipe.stem for recipe in RECIPES if recipe.parent.name == name}
        assert set(PAPER) <= found
        for recipe in (r for r in RECIPES if r.parent.name == name and r.stem in PAPER):
            assert load(TrainConfig, [recipe]).method.name == recipe.stem


@pytest.mark.parametrize("model", IN_PAPER)
@pytest.mark.parametrize("run", PAPER)
def test_the_papers_runs_have_its_noise_levels_lengths_and_rewards(model: str, run: str) -> None:
    config = load(TrainConfig, [next(r for r in RECIPES if (r.parent.name, r.stem) == (model, run))])
    own_length = 256 if FAMILY_OF[model] == "sd3" else 512  # of the pipelines
    assert (config.model.max_sequence_length or own_length) == 512
    assert (config.train_sigmas, config.num_inference_steps) == ("linear", 25)
    assert config.eval.every > 0
    assert [reward.score for reward in config.rewards] == ["hpsv2"]
    hpsv3 = [] if (model, run) in WITHOUT_HPSV3 else ["hpsv3"]
    assert [reward.score for reward in config.heldout] == ["clip", "clipscore", "imagereward", *hpsv3]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_misspelt_key_is_noticed(recipe: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(recipe.read_text())
    if "extends" in tree:
        tree["extends"] = str(recipe.parent / tree["extends"])
    key = next(key for key in tree if key != "extends")
    tree[key + "x"] = tree.pop(key)
    broken = tmp_path / "broken.yaml"
    broken.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=f"did you mean '{key}'"):
        load(TrainConfig, [broken])
