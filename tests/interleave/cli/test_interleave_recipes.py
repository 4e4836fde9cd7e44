"""Every recipe of interleave is read, and would notice a misspelt key."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from imgen_common.config import Config, load
from imgen_common.errors import UserError
from interleave.agents.critic import RubricCritic
from interleave.agents.prompts import load_template
from interleave.cli.data import RECIPES as MINIATURE
from interleave.loop.config import ModelCritic, ModelPlanner, RationalRewardsCritic, RunConfig, SelfCritic
from interleave.models.chat.scripted import ScriptedChatConfig

RECIPES = sorted((Path(__file__).parents[3] / "configs" / "interleave").glob("*.yaml"))
RUNS = [recipe for recipe in RECIPES if not recipe.stem.startswith(("sft", "grpo", "data", "serve", "benchmark"))]


def test_there_are_recipes() -> None:
    assert len(RUNS) >= 8


@pytest.mark.parametrize("recipe", RUNS, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_its_templates_fit(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of the authors' own are stood in for by ours under the names that the recipe gives."""
    monkeypatch.chdir(tmp_path)
    checkout = tmp_path / "InterleaveThinker" / "UEval"
    checkout.mkdir(parents=True)
    names = {"NARRATIVE_PROMPT_JSON": "{text_input}", "GUIDANCE_GLOBAL_PROMPT_JSON": "{text_input}"}
    names["Iterative_T2I_PROMPT_QWEN"] = "{original_instruction} {rewritten_prompt}"
    (checkout / "system.py").write_text("".join(f'{name} = """\n{text}\n"""\n' for name, text in names.items()))
    config = load(RunConfig, [recipe])
    if isinstance(config.planner, ModelPlanner):
        for name in (config.planner.text_template, config.planner.images_template):
            assert "text_input" in load_template(name).placeholders
    if isinstance(config.critic, ModelCritic | SelfCritic):
        found = load_template(config.critic.template)
        assert {"original_instruction", "rewritten_prompt"} <= found.placeholders
        assert ("story" in found.placeholders) == (config.critic.context == "story")
    if isinstance(config.critic, RationalRewardsCritic):
        model = ScriptedChatConfig(answers=("",)).build()
        edit, t2i = load_template(config.critic.edit_template), load_template(config.critic.t2i_template)
        assert RubricCritic((model, edit), (model, t2i), config.critic.min_score)


@pytest.mark.parametrize("recipe", [r for r in RUNS if "miniature" not in r.stem], ids=lambda path: path.stem)
def test_a_critic_that_costs_is_asked_once(recipe: Path) -> None:
    critic = load(RunConfig, [recipe]).critic
    assert isinstance(critic, SelfCritic | RationalRewardsCritic) or (
        isinstance(critic, ModelCritic) and critic.num_samples == 1
    )


def test_the_miniatures_recipe_is_the_default() -> None:
    recipe = next(path for path in RUNS if path.stem == "miniature")
    assert load(RunConfig, [recipe]) == RunConfig()


def test_the_recipes_that_training_runs_without_a_configuration_are_those_of_configs() -> None:
    assert {path.name: path.read_text(encoding="utf-8") for path in MINIATURE.glob("*.yaml")} == {
        f"{name}.yaml": (RECIPES[0].parent / f"{name}.yaml").read_text(encoding="utf-8")
        for name in ("data_miniature", "sft_critic", "sft_planner", "grpo_critic")
    }


@pytest.mark.parametrize("recipe", RUNS, ids=lambda path: path.stem)
def test_a_misspelt_key_is_refused_with_the_nearest(recipe: Path, tmp_path: Path) -> None:
    content: dict[str, Any] = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    content.pop("extends", None)
    config: type[Config] = RunConfig
    name = next(key for key in content if key in RunConfig.model_fields)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump({name[:-1] + "x" + name[-1]: content[name]}), encoding="utf-8")
    with pytest.raises(UserError, match=f"did you mean '{name}'"):
        load(config, [wrong])


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://localhost:8000/v1/chat/completions", "give the address before it: http://localhost:8000/v1"),
        ("http://localhost:8000/v1/models/", "give the address before it: http://localhost:8000/v1"),
        ("localhost:8000", "must be like http://HOST:PORT/v1"),
        ("ftp://localhost/v1", "must be like http://HOST:PORT/v1"),
    ],
)
def test_an_address_that_cannot_serve_is_refused_with_the_configuration(url: str, said: str) -> None:
    recipe = next(path for path in RUNS if path.stem == "endpoints")
    for key in ("planner.model.url", "critic.model.url"):
        with pytest.raises(UserError, match=re.escape(said)):
            load(RunConfig, [recipe], [f"{key}={url}"])
