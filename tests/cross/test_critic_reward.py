"""What interleave exports of a critic, flowbp trains on: the same tokens, the same rule, a gradient."""

import asyncio
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sets
import torch
from typer.testing import CliRunner

from flowbp.rewards import REWARDS, RewardConfig
from flowbp.rewards.preprocess import extract_patches
from flowbp.rewards.vlm.model import FAMILIES
from flowbp.rewards.vlm.reward import VlmReward
from flowbp.rewards.vlm.settings import SampledAnswer, TokenAnswer
from imgen_common import hub
from imgen_common.config import load, to_yaml
from imgen_common.errors import UserError
from imgen_common.images import from_pil, to_pil
from imgen_common.run_folder.data import hash_rows, record_data
from imgen_common.shapes.edits import sample_edit, verify_edits
from imgen_common.streams import numpy_generator
from interleave.agents.critic import ChatCritic
from interleave.agents.parsing import parse_verdict
from interleave.agents.prompts import load_template, render_critic
from interleave.cli import app
from interleave.loop.config import ModelCritic, RunConfig
from interleave.loop.reward_folder import MODEL_TYPES, export_reward
from interleave.models.chat.local import LocalChatConfig, to_conversation
from interleave.protocols import CriticInput, HashedImage
from interleave.records import Verdict
from interleave.training.config import GrpoConfig, SftConfig
from interleave.training.sft import train_sft
from scripts.miniature.world.generator import render_edits

CRITIC = "builtin:shapes/critic"
PROMPTS = [
    "make the circle red",
    "add a {prompt} <image> <source> <|im_end|> [INST] a<b </think> <|image_pad|>",
    " two  lines\r\nand {original_instruction}\x00 ",
]


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> VlmReward:
    return load_reward(export_reward(CRITIC, RunConfig(), tmp_path_factory.mktemp("reward") / "critic"))


def load_reward(folder: Path) -> VlmReward:
    found = RewardConfig(score="vlm", ref=str(folder)).load()
    assert isinstance(found, VlmReward)
    return found


def picture(height: int, width: int, seed: int) -> torch.Tensor:
    return torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(seed)) / 255


def hashed(image: torch.Tensor) -> HashedImage:
    return HashedImage.from_pil(to_pil(image[None])[0])


def write_templates(folder: Path) -> dict[str, Any]:
    words = "Asked {original_instruction} {x y} <image>\nused {rewritten_prompt} <image>, and { }.\n"
    (folder / "own.txt").write_text(words)
    (folder / "exact.txt").write_text("Asked {original_instruction}, used {rewritten_prompt}\n")
    exact = {"file": str(folder / "exact.txt"), "prefix": "<image><image>\n"}
    return {"shapes": "shapes_critic", "builtin": "critic", "own": str(folder / "own.txt"), "exact": exact}


def template_of(config: RunConfig) -> Any:
    assert isinstance(config.critic, ModelCritic)
    return config.critic.template


@pytest.mark.parametrize("name", ["shapes", "builtin", "own", "exact"])
@pytest.mark.parametrize("num_sources", [0, 1, 2])
def test_the_reward_shows_what_the_critic_sees(name: str, num_sources: int, tmp_path: Path) -> None:
    template = write_templates(tmp_path)[name]
    config = load(RunConfig, [], [f"critic.template={json.dumps(template)}"])
    reward = load_reward(export_reward(CRITIC, config, tmp_path / "reward"))
    processor = reward.vlm.processor
    image, sources = picture(32, 32, 0), [picture(32, 32, 1 + i) for i in range(num_sources)]
    shown = reward._shown_sources(0, image[None], [sources])
    for prompt in PROMPTS:
        before = hashed(sources[-1]) if sources else HashedImage.white(32, 32)
        message = render_critic(
            load_template(config.critic.template), CriticInput(before, hashed(image), prompt, prompt)
        )
        expected = processor.apply_chat_template(
            [to_conversation(message)],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        encoded = reward.vlm.encode_images([one[None] for one in (*shown, image)])
        prompts = reward.vlm.tokenize([reward._render(prompt, len(shown))], [encoded])
        assert prompts.ids.tolist() == expected.input_ids.tolist()
        patches = torch.cat([extract_patches(one[None], processor.image_processor)[0] for one in (*shown, image)])
        assert (patches - expected.pixel_values).abs().max() < 1e-6


@pytest.mark.slow
def test_its_rate_is_that_of_the_critics_answers(reward: VlmReward) -> None:
    """Edits that the verifier accepts, and the same images for other instructions; their gradients are finite."""
    rng = numpy_generator(3, "critic-reward")
    edits = [sample_edit(rng, "test") for _ in range(6)]
    before, after = render_edits(edits)
    others = [replace(edit, change=edits[i - 1].change) for i, edit in enumerate(edits)]
    right = torch.tensor([*verify_edits(after, edits), *verify_edits(after, others)])
    images = torch.cat([after, after]).requires_grad_()
    prompts = [edit.instruction for edit in (*edits, *others)]
    rates = reward(images, prompts, [(source,) for source in (*before, *before)])
    (gradient,) = torch.autograd.grad(rates.sum(), images)
    assert right.tolist() == [True] * 6 + [False] * 6
    assert rates[right].mean() > 0.7
    assert rates[~right].mean() < 0.3
    assert gradient.isfinite().all()
    is_mixed = (rates > 0) & (rates < 1)
    assert is_mixed.any()
    assert torch.equal(gradient.abs().amax((1, 2, 3)) > 0, is_mixed)


def test_both_name_the_same_models() -> None:
    assert tuple(FAMILIES) == REWARDS["vlm"].model_type == MODEL_TYPES


def test_its_settings_are_those_of_the_critic(tmp_path: Path) -> None:
    sets = [
        "critic.model.temperature=0.8",
        "critic.num_samples=5",
        "critic.parse_mode=tolerant",
        "critic.model.max_new_tokens=77",
        "critic.model.max_pixels=2048",
    ]
    reward = load_reward(export_reward(CRITIC, load(RunConfig, [], sets), tmp_path / "reward"))
    answer = reward.settings.answer
    assert isinstance(answer, SampledAnswer)
    assert (answer.temperature, answer.num_answers, answer.max_new_tokens) == (0.8, 5, 77)
    assert answer.accept.model_dump()["parse_mode"] == "tolerant"
    assert dict(reward.vlm.processor.image_processor.size)["longest_edge"] == 2048
    greedy = load(RunConfig, [], ["critic.kind=model", "critic.model.temperature=0"])
    answer = load_reward(export_reward(CRITIC, greedy, tmp_path / "greedy")).settings.answer
    assert isinstance(answer, SampledAnswer)
    assert (answer.temperature, answer.num_answers) == (1.0, 8)


def test_a_critic_that_does_not_reason_is_read_at_its_verdict(tmp_path: Path) -> None:
    direct = load(RunConfig, [], ["critic.parse_mode=direct"])
    answer = load_reward(export_reward(CRITIC, direct, tmp_path / "reward")).settings.answer
    assert isinstance(answer, TokenAnswer)
    for verdict in (answer.token, *answer.against):
        found = parse_verdict(f'{answer.prefix}{verdict}, "refine_prompt": "a"}}</answer>', "direct")
        assert isinstance(found, Verdict)
        assert found.success == (verdict == answer.token)


@pytest.mark.exhaustive
def test_its_log_odds_are_those_of_its_verdicts(tmp_path: Path) -> None:
    """A critic is trained not to reason, exported by the name of its run, and judges as in a story."""
    sets.make_set(tmp_path / "set")
    (tmp_path / "set" / "set.json").write_text(
        json.dumps({"rows": {}, "source": "x", "templates": {"critic": "shapes_critic"}})
    )
    trl = {"max_steps": 120, "learning_rate": 3e-3, "per_device_train_batch_size": 4, "gradient_checkpointing": False}
    config = SftConfig(
        data=str(tmp_path / "set"), reasoning=False, max_length=512, trl=trl | {"lr_scheduler_type": "constant"}
    )
    model = train_sft("critic", config, [], runs=tmp_path / "runs", name="direct")
    done = CliRunner().invoke(
        app,
        ["export-reward", "direct", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "reward")],
        catch_exceptions=False,
    )
    assert done.exit_code == 0
    reward = load_reward(tmp_path / "reward")
    critic = ChatCritic(LocalChatConfig(ref=str(model)).build(), load_template("shapes_critic"), parse_mode="direct")
    after = [sets.picture(number) for number in range(6)]
    prompts = [f"draw a {color} circle" for color in sets.COLOURS]
    scores = reward(from_pil([one.image for one in after]), prompts).tolist()
    for image, prompt, score in zip(after, prompts, scores, strict=True):
        shown = CriticInput(sets.WHITE, image, prompt, prompt)
        answer = asyncio.run(critic.judge(shown, 0))
        assert answer.verdict is not None, answer.raw
        assert answer.success_probability is not None
        assert answer.verdict.success == (score > 0)
        assert math.log(answer.success_probability / (1 - answer.success_probability)) == pytest.approx(score, abs=1e-3)
    assert max(scores) - min(scores) > 0.01


@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_a_run_is_exported_with_the_template_of_its_rows(kind: str, tmp_path: Path) -> None:
    run, out = tmp_path / "runs" / "mine", tmp_path / "out"
    shutil.copytree(hub.resolve(CRITIC), run / "model")
    data = tmp_path / "set"
    data.mkdir()
    config = GrpoConfig(template="critic", data=str(data)) if kind == "grpo" else SftConfig(data=str(data))
    (run / "config.yaml").write_text(to_yaml(config))
    if kind == "sft":
        done = CliRunner().invoke(app, ["export-reward", "mine", "--runs", str(run.parent), "--out", str(out)])
        assert isinstance(done.exception, UserError)
        assert "the template of its rows is not known (no set.json in" in str(done.exception)
        (data / "set.json").write_text(json.dumps({"rows": {}, "source": "x", "templates": {"critic": "critic"}}))
    arguments = ["export-reward", "mine", "--runs", str(run.parent), "--out", str(out), "--json"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert json.loads(done.stdout) == {"type": "Reward", "path": str(out)}
    written = json.loads((out / "reward.json").read_text())["template"]
    text = load_template("critic").text
    assert written == f"<source><image>{text}".replace("{original_instruction}", "{prompt}").replace(
        "{rewritten_prompt}", "{prompt}"
    )
    assert {file.suffix for file in out.iterdir()} <= {".json", ".safetensors", ".jinja", ".txt"}
    chosen = [*arguments[:-3], "--out", str(tmp_path / "other"), "--set", "critic.template=shapes_critic"]
    record_data(run, {"planner_sft": hash_rows([])})
    assert f"{run}: trained a planner; name a run of a critic" in str(CliRunner().invoke(app, chosen).exception)
    (run / "data.json").unlink()
    CliRunner().invoke(app, chosen, catch_exceptions=False)
    assert "was: {prompt} used" in json.loads((tmp_path / "other" / "reward.json").read_text())["template"]


@pytest.mark.parametrize(
    ("ref", "sets", "said"),
    [
        (CRITIC, ["critic.context=story", "critic.template=critic_story"], "critic.context: story: a reward is shown"),
        (CRITIC, ["critic.kind=rational_rewards"], "critic.kind: rational_rewards: is not a chat model"),
        (CRITIC, ["critic.kind=none"], "critic.kind: none: is not a chat model"),
        (CRITIC, ["critic.kind=self", "planner.kind=none"], "the critic has no model that samples answers"),
        (CRITIC, ["critic.kind=model", "critic.model={kind: scripted, answers: [a]}"], "has no model that samples"),
        (CRITIC, ["critic.template=planner_text"], "template planner_text: {original_instruction} is missing"),
        ("builtin:shapes/heldout", [], "a 'clip' model cannot be a reward; allowed: qwen2_vl, qwen2_5_vl, qwen3_vl"),
        ("builtin:shapes/generator", [], "a None model cannot be a reward"),
    ],
)
def test_what_is_no_such_critic_is_refused(ref: str, sets: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        export_reward(ref, load(RunConfig, [], sets), tmp_path / "reward")
    assert said in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_place_of_a_reward_in_a_template_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("<source> {original_instruction} {rewritten_prompt}")
    config = load(RunConfig, [], [f"critic.template={tmp_path / 'own.txt'}"])
    with pytest.raises(UserError, match=r"remove <source>, which is a place in the template of a reward"):
        export_reward(CRITIC, config, tmp_path / "reward")


def test_a_name_alone_is_not_enough(tmp_path: Path) -> None:
    copied = shutil.copytree(hub.resolve(CRITIC), tmp_path / "critic")
    done = CliRunner().invoke(app, ["export-reward", str(copied), "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, UserError)
    assert "a model alone does not say with which template it judges" in str(done.exception)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(SftConfig()))
    done = CliRunner().invoke(app, ["export-reward", str(run), "--out", str(tmp_path / "out")])
    assert "has no model yet; finish it with --resume" in str(done.exception)


def test_an_image_of_any_size_is_judged(reward: VlmReward) -> None:
    image, source = picture(48, 40, 0), picture(20, 30, 1)
    edited = reward.vlm.encode_images([image[None], source[None]])
    assert [one.grid.tolist() for one in edited] == [[1, 8, 6], [1, 8, 10]]  # sides of whole tokens near 1024 pixels
