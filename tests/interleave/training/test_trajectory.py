"""`reward: trajectory`: what is a call, what a tool's result looks like, what a trajectory is worth; it trains."""

import asyncio
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from backends import FakeGenerator, FakeJudge
from launching import lines
from sets import picture

from imgen_common.config import load
from imgen_common.errors import UserError
from interleave.agents.parsing import parse_verdict
from interleave.agents.prompts import load_template, render_critic
from interleave.models.chat.local import to_conversation
from interleave.protocols import BackendError, CriticInput, GenerationRequest, Generator, Judge
from interleave.records import Scores
from interleave.training import grpo
from interleave.training.batch_plan import plan_grpo_batches
from interleave.training.config import GrpoConfig
from interleave.training.environment import CriticEnvironment, add_regenerate_tool, join_answer
from interleave.training.reward import RecordedAttempt
from interleave.training.rows import GrpoJob, critic_prompt, read_rows
from interleave.training.scoring import ScoringThread, start_scoring
from scripts.miniature.agents import models

CONFIGS = Path(__file__).parents[3] / "configs" / "interleave"
QUICK: dict[str, Any] = {
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "steps_per_generation": 1,
    "max_steps": 6,
    "save_steps": 6,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "max_completion_length": 256,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


def caller(real: bool = False) -> Any:
    """The miniature's processor, with its own chat template or Qwen3-VL's, which TRL carries."""
    processor = models.processor()
    if real:
        found = importlib.util.find_spec("trl")
        assert found is not None
        assert found.origin is not None
        processor.chat_template = (Path(found.origin).parent / "chat_templates" / "qwen3_vl.jinja").read_text()
    return add_regenerate_tool(processor)


def rejection(prompt: str) -> str:
    return f'<think>wrong</think><answer>{{"previous_step_success": false, "refine_prompt": "{prompt}"}}</answer>'


ACCEPTED = '<think>fits</think><answer>{"previous_step_success": true, "refine_prompt": "p"}</answer>'


# --- calls -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("real", [False, True])
def test_the_prompt_is_that_of_run_time_and_so_is_what_a_tool_returns(real: bool) -> None:
    plain, processor = caller(real), caller(real)
    plain.chat_template = plain.chat_template.partition("{%- set messages = turns.all -%}\n")[2]
    look = CriticInput(picture(1), picture(2), "draw a red circle", "draw a red circle")
    (turn,) = to_conversation(render_critic(load_template("shapes_critic"), look))
    asked = plain.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    tools = [CriticEnvironment.__new__(CriticEnvironment).regenerate]
    assert processor.apply_chat_template([turn], tools=tools, tokenize=False, add_generation_prompt=True) == asked
    call = {"type": "function", "function": {"name": "regenerate", "arguments": {"answer": "x"}}}
    talk = [turn, {"role": "assistant", "content": [], "tool_calls": [call]}, turn | {"role": "tool"}]
    whole = processor.apply_chat_template(talk, tools=tools, tokenize=False, add_generation_prompt=True)
    assert whole.startswith(asked.removesuffix("<|im_start|>assistant\n"))
    assert whole.endswith("<|im_end|>\n" + asked)


@pytest.mark.parametrize(
    ("answer", "called"),
    [
        (rejection("a red circle"), '{"previous_step_success": false, "refine_prompt": "a red circle"}'),
        (rejection('say \\"no\\"'), '{"previous_step_success": false, "refine_prompt": "say \\"no\\""}'),
        (ACCEPTED + rejection("b"), '{"previous_step_success": false, "refine_prompt": "b"}'),
        (
            "<think>x</think><answer>{'refine_prompt': 'c', 'previous_step_success': False}</answer>",
            "{'refine_prompt': 'c', 'previous_step_success': False}",
        ),
        (ACCEPTED, None),
        (rejection("a") + ACCEPTED, None),
        (rejection("a").removesuffix("</answer>"), None),
        ("previous_step_success: false", None),
    ],
)
def test_a_rejection_is_a_call_and_nothing_else_is(answer: str, called: str | None) -> None:
    words = caller().tokenizer
    for end in ("<|im_end|>", ""):
        ids = words(answer + end).input_ids
        message = words.parse_response(ids, prefix="<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n")
        calls = message.get("tool_calls", [])
        assert [call["function"] for call in calls] == (
            [] if called is None else [{"name": "regenerate", "arguments": {"answer": called}}]
        )
        assert join_answer(message) == answer
        assert parse_verdict(join_answer(message), "tolerant") == parse_verdict(answer, "tolerant")


@pytest.mark.slow
@pytest.mark.parametrize("real", [False, True])
def test_trl_takes_the_processor(real: bool) -> None:
    from trl.chat_template_utils import is_chat_template_prefix_preserving, supports_tool_calling

    processor = caller(real)
    assert supports_tool_calling(processor)
    assert is_chat_template_prefix_preserving(processor)


# --- trajectories ----------------------------------------------------------------------------------------------------


def config_of(root: Path, **settings: Any) -> GrpoConfig:
    given = {"model": str(root / "model"), "data": str(root / "set"), "cache": None, "trl": QUICK}
    return GrpoConfig.model_validate({**given, "reward": "trajectory", **settings})


ROW = RecordedAttempt(
    "r", "a red circle", "red", picture(1), picture(2), is_t2i=False, success=False, semantics=2, quality=8
)


def play(
    root: Path,
    answers: Sequence[str],
    row: RecordedAttempt = ROW,
    fails: Any = lambda job: None,
    judge: Judge | None = None,
    opened: str = "",
) -> tuple[float | None, list[GenerationRequest], list[CriticInput], ScoringThread]:
    """Its reward, and what generator and judge were asked, for a trajectory in which the critic says `answers`."""
    rows = read_rows(root / "set", "critic_rl", grpo.RlRow)
    prompts = tuple(critic_prompt(one, load_template("shapes_critic")) for one in rows)
    config = config_of(root)
    job = GrpoJob(config, tuple(rows), prompts, plan_grpo_batches(config, len(rows), 4, 0, 1), opened)
    generator, words, looks = FakeGenerator(fails=fails), caller().tokenizer, []

    def score(shown: CriticInput) -> float:
        looks.append(shown)
        return 6.4

    with start_scoring(job, generator, judge or FakeJudge(score)) as scored:
        there = scored.environment_factory(config)()
        there.reset(row=row, prompt="unused")
        said: list[dict[str, Any]] = []
        for number, answer in enumerate(answers, 1):
            message = words.parse_response(words(answer).input_ids, prefix="<|im_start|>assistant\n")
            said.append(message)
            for call in message.get("tool_calls", []) if number < len(answers) else []:
                try:
                    content: Any = there.regenerate(**call["function"]["arguments"])
                except Exception as error:  # as TRL does
                    content = str({"error": str(error)})
                said.append({"role": "tool", "name": "regenerate", "content": content})
        (function,) = scored.reward_functions(config)
        (value,) = asyncio.run(function(completions=[said], environments=[there], row=[row]))
        return value, generator.jobs, looks, scored


def test_answers_begin_within_what_the_chat_template_opens(root: Path) -> None:
    answers = [rejection("one").removeprefix("<think>"), rejection("two").removeprefix("<think>")]
    assert answers[0].startswith("wrong")
    for opened, reward in (("<think>", 0.64), ("", 0.0)):
        value, jobs, *_ = play(root, answers, opened=opened)
        assert value == pytest.approx(reward)
        assert [job.prompt for job in jobs] == ["one"]


def test_the_reward_is_the_judges_score_of_the_last_image(root: Path) -> None:
    value, jobs, looks, scored = play(root, [rejection("one"), rejection("two"), rejection("three")])
    assert value == pytest.approx(0.64)
    assert [(job.prompt, [s.id for s in job.sources]) for job in jobs] == [
        ("one", [ROW.before.id]),
        ("two", [ROW.before.id]),
    ]
    assert jobs[0].seed != jobs[1].seed
    assert [(shown.original_prompt, shown.prompt_used) for shown in looks] == [("a red circle", "two")]
    assert scored.scorer.counts.images == 2
    assert scored.scorer.counts.judgments == 1


def test_where_nothing_is_generated_the_recorded_score_counts_and_nobody_is_asked(root: Path) -> None:
    value, jobs, looks, _ = play(root, [ACCEPTED])
    assert value == pytest.approx(0.4)  # sqrt(2 * 8) / 10
    assert not jobs
    assert not looks


@pytest.mark.parametrize("answers", [["nonsense"], [rejection("a"), "nonsense"], [rejection(" "), ACCEPTED]])
def test_an_answer_that_cannot_be_read_makes_it_worthless(root: Path, answers: list[str]) -> None:
    assert play(root, answers)[0] == 0.0


def test_a_generator_or_judge_that_fails_leaves_it_without_a_reward(root: Path) -> None:
    failure = BackendError("rate_limited", "busy")
    value, jobs, _, scored = play(root, [rejection("a"), rejection("b"), ACCEPTED], fails=lambda job: failure)
    assert value is None
    assert len(jobs) == 1  # it is not asked again
    assert scored.scorer.counts.reasons == {"rate_limited": 1}

    class Down:
        id = "down"

        async def score(self, shown: CriticInput) -> Scores:
            raise failure

        async def close(self) -> None:
            pass

    value, _, _, scored = play(root, [rejection("a"), ACCEPTED], judge=Down())
    assert value is None
    assert scored.scorer.unscored_rate == 1.0


def test_a_first_image_is_generated_from_its_prompt_alone(root: Path) -> None:
    assert play(root, [rejection("a"), ACCEPTED], replace(ROW, is_t2i=True))[1][0].sources == ()


# --- before it starts ------------------------------------------------------------------------------------------------


def test_calls_are_counted_over_all_attempts(root: Path) -> None:
    config = config_of(root, max_attempts=4)
    sums = plan_grpo_batches(config, 40, 10, 0, 1)
    assert (sums.completions_per_rollout, sums.rollouts) == (8, 6)
    assert (sums.images, sums.judgments) == (3 * 48, 48)


@pytest.mark.parametrize(
    "trl", [{"deepspeed": {"zero_optimization": {"stage": 3}}}, {"fsdp": "full_shard"}, {"use_vllm": True}]
)
def test_what_would_hang_on_several_processes_is_refused(root: Path, trl: dict[str, Any]) -> None:
    config = config_of(root, trl=trl)
    grpo.check_sharding(config, 1)
    grpo.check_sharding(config.model_copy(update={"reward": "released"}), 2)
    with pytest.raises(UserError, match="processes differ in how many turns they take"):
        grpo.check_sharding(config, 2)


def test_the_recipes_are_the_steps_recipes_but_for_the_loop() -> None:
    for name in ("grpo_trajectory", "grpo_trajectory_qwen3vl_lora"):
        config = load(GrpoConfig, [CONFIGS / f"{name}.yaml"])
        other = load(GrpoConfig, [CONFIGS / f"{name.replace('trajectory', 'critic')}.yaml"])
        assert (config.reward, other.reward) == ("trajectory", "released")
        assert {key for key, value in config.trl.items() if value != other.trl[key]} == {"max_completion_length"}


# --- training (slow) -------------------------------------------------------------------------------------------------


@dataclass
class Rollouts:
    """What TRL made of the trajectories: its batches, and what they decode to."""

    batches: list[tuple[Any, ...]] = field(default_factory=list)
    outputs: list[dict[str, Any]] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)


@pytest.fixture
def rollouts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rollouts]:
    import torch
    from trl import GRPOTrainer

    seen = Rollouts()
    generate, score = GRPOTrainer._generate, GRPOTrainer._generate_and_score_completions

    def generated(self: Any, prompts: Any) -> Any:
        seen.batches.append(generate(self, prompts))
        return seen.batches[-1]

    def scored(self: Any, inputs: Any) -> Any:
        made = score(self, inputs)
        seen.outputs.append(made)
        ids = torch.cat([made["prompt_ids"], made["completion_ids"]], dim=1)
        seen.differences.append(astray(self, made, ids, seen.batches[-1][6]))
        return made

    monkeypatch.setattr(GRPOTrainer, "_generate", generated)
    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", scored)
    return seen


def astray(trainer: Any, made: dict[str, Any], ids: Any, images: Any) -> float:
    """Largest difference between logits by TRL's inputs and by those of each row's own words and images."""
    import torch

    mask = torch.cat([made["prompt_mask"], made["completion_mask"]], dim=1)
    theirs = {key: made[key] for key in ("pixel_values", "image_grid_thw", "mm_token_type_ids")}
    processor, found = trainer.processing_class, []
    with torch.no_grad():
        whole = trainer.model(input_ids=ids, attention_mask=mask, **theirs).logits
        for row, on, logits, pictures in zip(ids, mask, whole, images, strict=True):
            own = row[on == 1][None]
            kinds = (own == trainer.model.config.image_token_id).int()
            ours = {"input_ids": own, "mm_token_type_ids": kinds}
            ours |= processor.image_processor(images=pictures, return_tensors="pt")
            found.append((trainer.model(**ours).logits[0] - logits[on == 1]).abs().max().item())
    return max(found)


@pytest.mark.exhaustive
def test_a_critic_trains_in_its_loop(root: Path, tmp_path: Path, rollouts: Rollouts) -> None:
    """Many looks occur; what is not the model's own is masked, and is the prompt of run time; images and tokens
    belong together; every reward is the judge's score of the last image; failed trajectories have none."""
    from interleave.training import sft
    from interleave.training.config import SftConfig

    trl = {"per_device_train_batch_size": 8, "max_steps": 150, "learning_rate": 3e-3, "gradient_checkpointing": False}
    taught = SftConfig(model=str(root / "model"), data=str(root / "set"), vision="train", trl=trl)
    model = sft.train_sft("critic", taught, ["t"], runs=tmp_path)
    failure = BackendError("rate_limited", "busy")
    drawn = FakeGenerator(fails=lambda job: failure if "blue" in job.prompt and len(drawn.jobs) > 1 else None)

    def parts(config: GrpoConfig) -> tuple[Generator, Judge]:  # the first job only tries whether the generator is up
        return drawn, FakeJudge(lambda shown: int(shown.after.id[:2], 16) / 25.5)

    config = config_of(root, model=str(model), scorer={"max_unscored": 1.0})
    trained = grpo.train_grpo(config, ["t"], runs=tmp_path, build_services=parts)
    assert (trained / "model.safetensors").is_file()
    plain = (root / "model" / "chat_template.jinja").read_text()
    assert (trained / "chat_template.jinja").read_text() == plain
    words = models.processor().tokenizer
    assert len(rollouts.batches) == 6
    turns, unscored = [], 0
    for (_, completions, masks, messages, _, _, images, _), made in zip(
        rollouts.batches, rollouts.outputs, strict=True
    ):
        for i, (ids, mask, said) in enumerate(zip(completions, masks, messages, strict=True)):
            answers = [join_answer(message) for message in said if message["role"] == "assistant"]
            own = words.decode([token for token, is_own in zip(ids, mask, strict=True) if is_own])
            assert all(answer in own for answer in answers)  # but for words after </answer>
            assert own.startswith(answers[0])
            shown = words.decode([token for token, is_own in zip(ids, mask, strict=True) if not is_own])
            assert shown.count("<|im_start|>user\n") == len(answers) - 1
            assert made["tool_mask"][i][: len(mask)].tolist() == mask
            assert "<think>" not in shown
            turns.append(len(answers))
            failed = "busy" in shown  # the others could not be read
            unscored += failed
            if failed:
                assert made["advantages"][i] == 0
            else:
                assert len(images[i]) == 2 * len(answers)
    assert max(turns) == 3
    assert len(set(turns)) > 1
    assert max(rollouts.differences) < 1e-4
    logged = lines(trained.parent)
    assert logged[-1]["scoring/unscored"] == unscored > 0
    assert logged[-1]["scoring/answers"] == 48
    assert any(line.get("reward_std", 0) > 0 for line in logged)
