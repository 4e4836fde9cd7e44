"""`interleave grpo`: sums, prompts as at run time, rewards off the trainer's loop, refusals; and that a run goes on."""

import asyncio
import contextlib
import hashlib
import shutil
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from backends import FakeGenerator
from killed_training import assert_kills_change_nothing
from launching import SHARDS, forked, lines
from safetensors.torch import save
from sets import write
from tiers import tiers
from transformers import TrainerState

from imgen_common import hub
from imgen_common.config import load, to_yaml
from imgen_common.devices import LaunchedProcess
from imgen_common.errors import UserError
from imgen_common.run_folder.folder import RunFolder
from interleave.agents.prompts import load_template, render_critic
from interleave.datasets.rows import RlRow
from interleave.models.chat.local import to_conversation
from interleave.models.generators.scripted import ScriptedConfig
from interleave.models.hashes import hash_models
from interleave.protocols import BackendError, CriticInput, GenerationRequest, Generator, HashedImage, Judge
from interleave.records import Scores
from interleave.storage.images import ImageStore
from interleave.training import grpo
from interleave.training.batch_plan import GrpoBatchPlan, plan_grpo_batches
from interleave.training.config import GrpoConfig, PricesConfig, ScorerConfig
from interleave.training.reward import (
    PAPER_WEIGHTS,
    REWARD_WEIGHTS,
    RecordedAttempt,
    RewardFunction,
    RewardParts,
    paper_parts,
    reward_weights,
)
from interleave.training.rows import GrpoJob, critic_prompt, image_store, read_rows
from interleave.training.run import MAY_DIFFER, bind_data, build_run_callback
from interleave.training.scoring import (
    check_image_tokens,
    concurrency_per_process,
    gather_scoring_metrics,
    start_scoring,
)
from scripts.miniature.agents import models

CONFIGS = Path(__file__).parents[3] / "configs" / "interleave"


@pytest.fixture(scope="module")
def rows(root: Path) -> list[RlRow]:
    return read_rows(root / "set", "critic_rl", RlRow)


@pytest.mark.parametrize("words", ["", "  ", " \u200b\ufeff"])
def test_a_row_without_words_is_refused(rows: list[RlRow], tmp_path: Path, words: str) -> None:
    row = rows[0].model_copy(update={"original_prompt": words})
    (tmp_path / "critic_rl.jsonl").write_text(row.model_dump_json() + "\n")
    with pytest.raises(UserError, match=r"critic_rl\.jsonl:1: original_prompt is empty; fix or remove the row"):
        read_rows(tmp_path, "critic_rl", RlRow)


@dataclass
class LengthJudge:
    """Scores by the prompt's length, so that answers differ; fails on demand."""

    fails: bool = False
    id: str = "length"
    looks: list[CriticInput] = field(default_factory=list)

    async def score(self, shown: CriticInput) -> Scores:
        self.looks.append(shown)
        if self.fails:
            raise BackendError("unreachable", "nobody there")
        return Scores(semantics=len(shown.prompt_used) % 11, quality=5, judge_id=self.id)

    async def close(self) -> None:
        pass


# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_the_released_recipe() -> None:
    config = load(GrpoConfig, [CONFIGS / "grpo_critic_qwen3vl.yaml"])
    config = config.model_copy(update={"prices": PricesConfig(image=0.01, judgment=0.02)})
    sums = plan_grpo_batches(config, rows=13_000, failed=6_500, left_out=1, processes=8)
    assert (sums.prompts_per_rollout, sums.completions_per_rollout, sums.completions_per_update) == (16, 128, 64)
    assert (sums.updates_per_rollout, sums.rollouts, sums.updates) == (2, 812, 1624)
    assert sums.updates_per_epoch == 1624
    assert "one update: 64 answers to 8 prompts" in sums.lines()
    assert "updates: 1624 per epoch, 1624 in total, in 812 rollouts" in sums.lines()
    assert (sums.images, sums.judgments, sums.questions) == (51_968, 51_968, 103_936)
    assert sums.cost == pytest.approx(51_968 * 0.03)


def of(**trl: Any) -> GrpoBatchPlan:
    return plan_grpo_batches(GrpoConfig(trl={"save_steps": 120} | trl), rows=40, failed=20, left_out=0, processes=2)


@pytest.mark.parametrize(
    ("trl", "said"),
    [
        (
            {"num_generations": 8, "per_device_train_batch_size": 3},
            "2 processes x 3 per_device_train_batch_size x 1 steps_per_generation = 6",
        ),
        ({"num_generations": 1}, "at least 2 answers"),
        ({"num_generations": 2, "per_device_train_batch_size": 64}, "40 rows do not fill a rollout of 64 prompts"),
        ({"generation_batch_size": 24, "per_device_train_batch_size": 8}, "multiple of 2 processes x 8"),
        ({"generation_batch_size": 16, "steps_per_generation": 1}, "give one of the two"),
        (
            {"steps_per_generation": 3, "gradient_accumulation_steps": 2},
            "3 steps_per_generation x 1 num_iterations = 3",
        ),
        ({"steps_per_generation": 4, "save_steps": 6}, "multiple of the 4 updates of a rollout"),
        ({"steps_per_generation": 4, "save_steps": 0.2, "max_steps": 50}, "multiple of the 4 updates of a rollout"),
        ({"num_generations": True}, "must be a positive whole number, got True"),
        ({"save_strategy": "epoch"}, "save_strategy: epoch: all passes count as one epoch"),
        ({"save_strategy": "best", "num_train_epochs": 1}, "save_strategy: best: nothing is evaluated"),
    ],
)
def test_numbers_that_do_not_go_together_are_shown(trl: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        of(**trl)
    assert said in str(error.value)


def test_sums_of_other_layouts() -> None:
    assert of(generation_batch_size=32, per_device_train_batch_size=8).updates_per_rollout == 2
    assert of(num_iterations=3, num_generations=4).updates_per_rollout == 3
    assert of(save_steps=0.1).updates_per_rollout == 1
    assert of(max_steps=7, save_strategy="epoch").updates == 7
    assert "2 prompts x 8 answers = 16 over 2 processes" in "\n".join(of().lines())


@pytest.mark.parametrize(("num_rows", "steps"), [(6, 14), (5, 14), (4, 3)])
def test_passes_are_laid_out_one_after_the_other_each_in_its_order(
    root: Path, rows: list[RlRow], num_rows: int, steps: int
) -> None:
    job = job_of(root, rows[:num_rows])
    job = replace(job, batch_plan=replace(job.batch_plan, prompts_per_rollout=2, rollouts=steps))
    found = grpo.row_order(job)
    assert len(found) == 2 * steps
    size = num_rows // 2 * 2
    passes = [found[start : start + size] for start in range(0, len(found), size)]
    assert all(len(set(numbers)) == len(numbers) for numbers in passes)
    assert len(passes) < 3 or len({tuple(numbers) for numbers in passes}) > 1
    longer = grpo.row_order(replace(job, batch_plan=replace(job.batch_plan, rollouts=steps + 5)))
    assert longer[: len(found)] == found


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shapes_critic", "critic"])
def test_the_prompt_is_that_of_run_time_byte_by_byte(root: Path, rows: list[RlRow], name: str) -> None:
    store = ImageStore(root / "set" / "images")
    processor = models.processor()
    job = job_of(root, rows[:2], template=name)
    for number, row in enumerate(job.rows):
        item = job.example(number, store.get)
        talk = to_conversation(render_critic(load_template(name), row.critic_input(store.get)))
        text, again = (
            processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for messages in (talk, item["prompt"])
        )
        assert text == again
        assert [part["image"] for part in talk[0]["content"] if part["type"] == "image"] == item["images"]
        assert item["row"].before.id == row.before_id
        assert item["row"].after.image == item["images"][1]


def test_rows_of_another_world_need_another_generator_and_judge(rows: list[RlRow]) -> None:
    others = [row.model_copy(update={"original_prompt": "a photo of a cat"}) for row in rows[:2]]
    grpo.check_world(GrpoConfig(), [*others, rows[0]])
    with pytest.raises(UserError, match=r"^generator: no row .*shapes/generator knows .*; configure another generator"):
        grpo.check_world(GrpoConfig(), others)
    with pytest.raises(UserError, match=r"^judge: no row .*shapes/verifier knows .*; configure another judge"):
        grpo.check_world(GrpoConfig(generator=ScriptedConfig()), others)


def test_a_template_with_the_story_is_refused() -> None:
    with pytest.raises(UserError, match=r"critic_story: \{request\} is not in rows of single steps"):
        grpo.load_single_step_template("critic_story")


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_the_papers_form_of_the_reward() -> None:
    row = RecordedAttempt("r", "a", "", *[None] * 2, is_t2i=True, success=False, semantics=4, quality=9)  # type: ignore[arg-type]
    assert paper_parts(RewardParts(1, 1, 0.5, 0.5), row) == {"format": 1, "accuracy": 0, "step": 0}
    better = paper_parts(RewardParts(1, 0, (9 - 4) / 20 + 0.5, 0.5), row)  # 4 -> 9, 9 -> 9
    assert better == {"format": 1, "accuracy": -1, "step": pytest.approx((9 - 6) / 10)}
    worse = paper_parts(RewardParts(0, 0, (0 - 4) / 20 + 0.5, (0 - 9) / 20 + 0.5), row)
    assert worse["step"] == pytest.approx(-0.6)
    assert sum(PAPER_WEIGHTS.values()) == pytest.approx(1)


def job_of(root: Path, rows: Sequence[RlRow], **settings: Any) -> GrpoJob:
    config = GrpoConfig(model=str(root / "model"), data=str(root / "set"), trl=QUICK, **settings)
    prompts = tuple(critic_prompt(row, load_template(config.template)) for row in rows)
    return GrpoJob(config, tuple(rows), prompts, plan_grpo_batches(config, len(rows), 4, 0, 1))


def test_rewards_are_made_on_their_own_loop_and_parts_are_closed_there(root: Path, rows: list[RlRow]) -> None:
    closed = []

    class Closing(FakeGenerator):
        async def close(self) -> None:
            closed.append(asyncio.get_running_loop())

    job = job_of(root, rows)
    answers = [[{"role": "assistant", "content": "x"}]] * 2
    recorded = [job.example(number, image_store(job.config).get)["row"] for number in range(2)]
    columns = {"row": recorded, "prompts": ["p"] * 2, "completions": answers}
    with start_scoring(job, Closing(limit=1), LengthJudge()) as scored:
        for reward, names in (("released", 4), ("paper", 3)):
            functions = scored.reward_functions(quick(root, reward=reward))
            assert [function.__name__ for function in functions] == list(REWARD_WEIGHTS[reward])
            assert len(functions) == names

            async def ask(functions: Sequence[RewardFunction] = tuple(functions)) -> list[list[float | None]]:
                return await asyncio.gather(*(function(**columns) for function in functions))

            values = [asyncio.run(ask()) for _ in range(2)]
            assert values[0] == values[1]
            assert all(None not in value for value in values[0])
        loop = scored.loop
        counters = gather_scoring_metrics(scored)
        assert counters["scoring/images"] == 1  # of two rows one succeeded, and equal answers are scored once
        assert counters["scoring/answers"] == 2
    assert closed == [loop]


def test_an_answer_without_a_reward_is_scored_again_in_the_next_rollout(root: Path, rows: list[RlRow]) -> None:
    down = [True]
    generator = FakeGenerator(fails=lambda request: BackendError("unreachable", "x") if down[0] else None)
    job = job_of(root, rows)
    failed = next(number for number, row in enumerate(job.rows) if not row.evaluation.success)
    recorded = job.example(failed, image_store(job.config).get)["row"]
    with start_scoring(job, generator, LengthJudge()) as scored:
        callback = grpo.build_scoring_callback(scored, job)
        assert scored.run(scored.scorer.score("x", recorded)) is None
        down[0] = False
        assert scored.run(scored.scorer.score("x", recorded)) is None  # as all parts of its reward in this rollout
        state = SimpleNamespace(global_step=job.batch_plan.updates_per_rollout)
        callback.on_step_end(None, state, SimpleNamespace())
        assert scored.run(scored.scorer.score("x", recorded)) is not None


def test_a_chat_template_that_opens_the_thoughts_costs_no_reward(root: Path, tmp_path: Path) -> None:
    """Of Qwen3-VL-Thinking each answer begins behind `<think>`, which the model then does not say."""
    model = Path(shutil.copytree(root / "model", tmp_path / "model"))
    (template,) = model.glob("chat_template*")
    template.write_text(template.read_text() + "{%- if add_generation_prompt %}<think>\n{% endif -%}")
    jobs = {
        name: grpo.check_grpo(quick(root, model=str(path)), 1)
        for name, path in (("plain", root / "model"), ("opens", model))
    }
    assert {name: job.opened for name, job in jobs.items()} == {"plain": "", "opens": "<think>"}
    template.write_text(template.read_text().replace("%- if add", "%- if enable_thinking is not false and add"))
    trl = QUICK | {"chat_template_kwargs": {"enable_thinking": False}}
    assert grpo.check_grpo(quick(root, model=str(model), trl=trl), 1).opened == ""
    verdict = '{"previous_step_success": true, "refine_prompt": "a red circle"}'
    said = [[{"role": "assistant", "content": f"it is there</think><answer>{verdict}</answer>"}]]
    for name, expected in (("plain", 0.0), ("opens", 1.0)):
        recorded = [jobs[name].example(0, image_store(jobs[name].config).get)["row"]]
        with start_scoring(jobs[name], FakeGenerator(), LengthJudge()) as scored:
            function = scored.reward_functions(quick(root))[0]
            assert asyncio.run(function(row=recorded, prompts=["p"], completions=said)) == [expected]  # type: ignore[arg-type]


def test_answers_that_are_scored_when_training_ends_are_cancelled(root: Path, rows: list[RlRow]) -> None:
    begun, ended = threading.Event(), []

    class Slow(FakeGenerator):
        async def generate(self, request: GenerationRequest) -> HashedImage:
            begun.set()
            try:
                return await asyncio.sleep(30, HashedImage.white(32, 32))
            finally:
                ended.append("request")

        async def close(self) -> None:
            ended.append("generator")

    job = job_of(root, rows)
    number = next(number for number, row in enumerate(rows) if not row.evaluation.success)
    row = job.example(number, image_store(job.config).get)["row"]
    answer = '<think>x</think><answer>{"previous_step_success": false, "refine_prompt": "a cat"}</answer>'
    with start_scoring(job, Slow(), LengthJudge()) as thread:
        scored = asyncio.run_coroutine_threadsafe(thread.scorer.score(answer, row), thread.loop)
        assert begun.wait(30)
    assert scored.cancelled()
    assert ended == ["request", "generator"]


def test_parts_of_the_reward_are_weighed_by_name() -> None:
    config = load(GrpoConfig, [], ["reward_weights={accuracy: 1.0}"])
    assert reward_weights(config) == {"format": 0.5, "accuracy": 1.0, "semantics": 0.3, "quality": 0.1}
    for weights, said in (
        ("{accurracy: 1.0}", "reward_weights.accurracy: unknown option of reward: released; did you mean 'accuracy'"),
        ("{format: 0, accuracy: 0, semantics: 0, quality: 0}", "all are 0"),
        ("{accuracy: -1}", "reward_weights"),
        ("{accuracy: .inf}", "reward_weights"),
    ):
        with pytest.raises(UserError) as error:
            reward_weights(load(GrpoConfig, [], [f"reward_weights={weights}"]))
        assert said in str(error.value)


@pytest.mark.parametrize("down", ["generator", "judge"])
def test_a_part_that_is_down_is_reported_before_anything_starts(root: Path, rows: list[RlRow], down: str) -> None:
    failure = BackendError("unreachable", "no connection")
    generator = FakeGenerator(fails=lambda job: failure if down == "generator" else None)
    job = job_of(root, rows)
    with (
        start_scoring(job, generator, LengthJudge(fails=down == "judge")) as scored,
        pytest.raises(UserError, match=rf"{down} failed on the first row \(unreachable: .*; training was not started"),
    ):
        scored.check_services(job)


def test_a_part_that_hangs_is_reported(root: Path, rows: list[RlRow]) -> None:
    job = job_of(root, rows, scorer=ScorerConfig(deadline=0.05))
    with (
        start_scoring(job, FakeGenerator(latency=30), LengthJudge()) as scored,
        pytest.raises(UserError, match="no answer within the deadline"),
    ):
        scored.check_services(job)


@pytest.mark.parametrize(("processes", "each"), [(1, 12), (5, 2), (100, 1)])
def test_concurrency_is_shared_out(processes: int, each: int) -> None:
    assert concurrency_per_process(12, processes) == each


def test_vllm_that_expands_images_twice_is_stopped() -> None:
    def generate(prompts: Sequence[Sequence[int]], images: Any) -> tuple[Any, str]:
        return [[9, *ids] if len(ids) > 3 else ids for ids in prompts], images

    checked = check_image_tokens(generate, image_token=9)
    assert checked(prompts=[[1, 9, 2]], images="i") == ([[1, 9, 2]], "i")
    with pytest.raises(UserError, match="vLLM read 3 image tokens where the prompt has 2"):
        checked(prompts=[[1, 9, 9, 2]], images="i")


def test_images_that_vllm_would_not_scale_are_refused(root: Path, rows: list[RlRow]) -> None:
    store = ImageStore(root / "set" / "images")
    grpo.check_image_sizes(rows, store, 32 * 32)
    with pytest.raises(UserError, match="32x32 is more than max_pixels 1000"):
        grpo.check_image_sizes(rows, store, 1000)


def test_how_services_are_reached_may_change_when_a_run_is_resumed(tmp_path: Path) -> None:
    services = ["generator.kind=images_api", "judge.kind=model"]
    RunFolder.create(tmp_path / "run", load(GrpoConfig, [], services)).close()
    recorded = tmp_path / "run" / "config.yaml"
    for part in ("generator", "judge.model"):
        for change in ("retry.timeout=900", "concurrency=2", "key_env=OTHER", "url=http://other/v1"):
            config = load(GrpoConfig, [recorded], [f"{part}.{change}"])
            RunFolder.open(tmp_path / "run", config, may_differ=MAY_DIFFER).close()
        other = load(GrpoConfig, [recorded], [f"{part}.model=other"])
        with pytest.raises(UserError, match=rf"has {part}.model = "):
            RunFolder.open(tmp_path / "run", other, may_differ=MAY_DIFFER)
    for change in ("ddp_timeout=7200", "per_device_eval_batch_size=1", "vllm_server_port=8001"):
        config = load(GrpoConfig, [recorded], [f"trl.{change}"])
        RunFolder.open(tmp_path / "run", config, may_differ=MAY_DIFFER).close()


# --- training (slow) -------------------------------------------------------------------------------------------------

QUICK: dict[str, Any] = {
    "num_generations": 2,
    "per_device_train_batch_size": 2,
    "steps_per_generation": 2,
    "max_steps": 6,
    "save_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "max_completion_length": 6,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


def quick(root: Path, **settings: Any) -> GrpoConfig:
    given: dict[str, Any] = {"model": str(root / "model"), "data": str(root / "set"), "cache": None, "trl": QUICK}
    return GrpoConfig(**(given | settings))


def parts_of(judge: Judge) -> Any:
    def make(config: GrpoConfig) -> tuple[Generator, Judge]:
        return FakeGenerator(), judge

    return make


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def at_step(step: int, do: Any) -> Any:
    """A callback that does something after an update."""
    from transformers import TrainerCallback

    class At(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                do()

    return At()


def kill() -> None:
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def taught(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny critic that has learned to answer well enough for its answers to differ in what they are worth."""
    from interleave.training import sft
    from interleave.training.config import SftConfig

    trl = {"per_device_train_batch_size": 8, "max_steps": 150, "learning_rate": 3e-3, "gradient_checkpointing": False}
    config = SftConfig(model=str(root / "model"), data=str(root / "set"), vision="train", trl=trl)
    return sft.train_sft("critic", config, ["t"], runs=tmp_path_factory.mktemp("taught"))


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(root: Path, taught: Path, tmp_path: Path) -> None:
    trl = QUICK | {"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 48}
    trl |= {"max_steps": 14}  # in the third pass over the rows
    config, make = quick(root, model=str(taught), trl=trl), parts_of(LengthJudge())
    straight = grpo.train_grpo(config, ["t"], runs=tmp_path, name="straight", build_services=make)
    assert max(line.get("rewards/format/mean", 0) for line in lines(straight.parent)) > 0.5
    assert max(line.get("reward_std", 0) for line in lines(straight.parent)) > 0
    assert digest(straight) != digest(taught)
    for moment in (1, 9):
        name = f"k{moment}"
        with pytest.raises(KeyboardInterrupt):
            grpo.train_grpo(
                config, ["t"], runs=tmp_path, name=name, build_services=make, callbacks=[at_step(moment, kill)]
            )
        again = grpo.train_grpo(config, ["t"], resume=tmp_path / name, build_services=make)
        assert digest(again) == digest(straight)
    logged = lines(tmp_path / "straight")
    for part in ("format", "accuracy", "semantics", "quality"):
        assert any(f"rewards/{part}/mean" in line for line in logged)
    assert logged[-1]["scoring/answers"] > 0
    assert logged[-1]["scoring/unscored"] == 0


@pytest.mark.parametrize(
    ("updates_per_rollout", "stops"), [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (3, [3, 6]), (7, [])]
)
def test_a_run_that_is_to_stop_ends_its_rollout_first(
    updates_per_rollout: int, stops: list[int], tmp_path: Path
) -> None:
    callback = build_run_callback(RunFolder(tmp_path, is_main=False), updates_per_rollout=updates_per_rollout)
    arguments, found = SimpleNamespace(device=torch.device("cpu")), list[int]()
    for requested in (False, True):
        callback.shutdown.requested = requested
        for step in range(1, 8):
            control = SimpleNamespace(should_save=False, should_training_stop=False)
            callback.on_step_end(arguments, SimpleNamespace(global_step=step, max_steps=7), control)
            assert control.should_save == control.should_training_stop
            found += [step] if control.should_save else []
    assert found == stops
    assert callback.stopped == bool(stops)


def test_older_checkpoints_go_once_the_new_one_is_whole_and_steps_are_those_of_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(folder: Path) -> None:
        raise KeyboardInterrupt

    callback = build_run_callback(RunFolder(tmp_path, is_main=False))
    steps = {"logging_steps": 1, "eval_steps": None, "save_steps": 0.5}
    arguments = SimpleNamespace(output_dir=str(tmp_path), save_total_limit=1, **steps)
    state = TrainerState(max_steps=9, global_step=2, logging_steps=4)
    callback.on_train_begin(arguments, state, None)
    assert (state.logging_steps, state.save_steps, arguments.save_total_limit) == (1, 5, None)
    for state.global_step in (2, 4):
        (tmp_path / f"checkpoint-{state.global_step}").mkdir()
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr("interleave.training.run.write_manifest", kill)
            callback.on_save(arguments, state, None)
        assert (tmp_path / "checkpoint-2").exists()
        callback.on_save(arguments, state, None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


@pytest.mark.exhaustive
def test_a_signal_stops_between_two_rollouts(root: Path, taught: Path, tmp_path: Path) -> None:
    trl = QUICK | {"num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 48}
    trl |= {"max_steps": 8, "save_steps": 100, "num_iterations": 2, "steps_per_generation": 2}
    config, make = quick(root, model=str(taught), trl=trl), parts_of(LengthJudge())
    straight = grpo.train_grpo(config, ["t"], runs=tmp_path, name="straight", build_services=make)
    callbacks = [at_step(1, lambda: signal.raise_signal(signal.SIGTERM))]
    with pytest.raises(KeyboardInterrupt):
        grpo.train_grpo(config, ["t"], runs=tmp_path, name="stopped", build_services=make, callbacks=callbacks)
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-4"]
    again = grpo.train_grpo(config, ["t"], resume=tmp_path / "stopped", build_services=make)
    assert digest(again) == digest(straight)


@pytest.mark.exhaustive
@pytest.mark.parametrize("reward", ["released", "trajectory"])
def test_processes_killed_at_random_moments_lose_nothing_and_do_nothing_twice(
    root: Path, taught: Path, tmp_path: Path, reward: Any
) -> None:
    trl = QUICK | {"num_generations": 4, "per_device_train_batch_size": 4, "max_steps": 24}
    config = quick(
        root,
        model=str(taught),
        generator=ScriptedConfig(width=32, height=32),
        cache=str(tmp_path / "cache"),
        reward=reward,
        trl=trl | {"max_completion_length": 256 if reward == "trajectory" else 48},
    )
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    straight = assert_kills_change_nothing(tmp_path / "runs", ["grpo", str(tmp_path / "c.yaml")], num_updates=24)
    assert sum(line.get("reward_std", 0) > 0 for line in lines(straight)) > 4
    assert digest(straight / "model") != digest(taught)


@pytest.mark.slow
def test_a_judge_that_goes_down_stops_the_run_with_a_checkpoint_from_which_it_goes_on(
    root: Path, tmp_path: Path
) -> None:
    judge = LengthJudge()
    failed = root / "failed"
    failed.mkdir()
    (failed / "images").symlink_to(root / "set" / "images")
    rows = read_rows(root / "set", "critic_rl", RlRow)
    write(failed / "critic_rl.jsonl", [row for row in rows if not row.evaluation.success])
    config = quick(root, data=str(failed), scorer=ScorerConfig(window=4, max_unscored=0.25))

    def down() -> None:
        judge.fails = True

    with pytest.raises(
        UserError, match=r"failed on \d+% of the last answers \(unreachable \d+\); update 4 is saved.*--resume"
    ):
        grpo.train_grpo(config, ["t"], runs=tmp_path, build_services=parts_of(judge), callbacks=[at_step(2, down)])
    run = tmp_path / "grpo_critic"
    assert not (run / "model").exists()
    with pytest.raises(UserError, match="the judge failed on the first row"):
        grpo.train_grpo(config, ["t"], resume=run, build_services=parts_of(judge))
    judge.fails = False
    assert grpo.train_grpo(config, ["t"], resume=run, build_services=parts_of(judge)).is_dir()
    assert [line["step"] for line in lines(run) if "loss" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_an_adapter_the_papers_reward_and_a_scripted_generator_from_the_configuration(
    root: Path, tmp_path: Path
) -> None:
    trl = QUICK | {"max_steps": 2, "scale_rewards": "none", "loss_type": "dr_grpo"}
    config = quick(
        root,
        lora={"r": 2},
        reward="paper",
        generator=ScriptedConfig(width=32, height=32),
        cache=str(tmp_path / "c"),
        trl=trl,
    )
    model = grpo.train_grpo(config, ["t"], runs=tmp_path / "runs")
    assert (model / "model.safetensors").is_file()
    logged = lines(model.parent)
    assert any("rewards/step/mean" in line for line in logged)
    assert logged[-1]["scoring/images_from_cache"] + logged[-1]["scoring/images"] > 0
    assert any((tmp_path / "c" / "images").rglob("*.png"))


@pytest.mark.slow
def test_a_plan_starts_nothing(root: Path, tmp_path: Path) -> None:
    sums, held, first = grpo.plan_grpo(quick(root), processes=2)
    assert first.lines()[1].strip().startswith("<|im_start|>user")
    assert "the answer that is learned:" not in first.lines()
    assert (sums.processes, sums.prompts_per_rollout, sums.failed_rows) == (2, 4, 4)
    assert held.num_trainable < held.num_parameters
    assert held.reference == 0
    assert grpo.plan_grpo(quick(root, trl=QUICK | {"beta": 0.1}), processes=2)[1].reference == held.weights
    sampled = sums.completions_per_rollout // 2 * held.length
    assert held.kv_cache == sampled * 2 * 2 * 64 * 4  # keys and values of two layers, in float32
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_trainers_prompt_tokens_are_those_of_the_chat_model(root: Path, tmp_path: Path) -> None:
    from trl import GRPOTrainer

    from interleave.models.chat.local import LocalChat, LocalChatConfig

    seen: list[list[int]] = []
    real = GRPOTrainer._tokenize_prompts

    def watched(self: Any, prompts: Any) -> Any:
        found = real(self, prompts)
        seen.extend(list(map(int, ids)) for ids in found[0])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOTrainer, "_tokenize_prompts", watched)
        config = quick(root, trl=QUICK | {"max_steps": 2})
        grpo.train_grpo(config, ["t"], runs=tmp_path, build_services=parts_of(LengthJudge()))
    chat = LocalChat(LocalChatConfig(ref=str(root / "model"), device="cpu"))
    store = ImageStore(root / "set" / "images")
    known = []
    for row in read_rows(root / "set", "critic_rl", RlRow):
        inputs = chat._inputs([render_critic(load_template("shapes_critic"), row.critic_input(store.get))])
        known.append(inputs["input_ids"][0].tolist())
    assert seen
    assert all(ids in known for ids in seen)


REPLAYED = 6
"""Updates on given answers, which do not depend on how many processes share out the rows."""
SHARED = QUICK | {
    "num_generations": 4,
    "num_iterations": 2,
    "max_completion_length": 48,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "constant",
}
"""Two updates a rollout, in the second of which the loss depends on what the first has done to the weights."""


@pytest.fixture(scope="module")
def alone(root: Path, taught: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The updates of one process on given answers."""
    runs = tmp_path_factory.mktemp("alone")
    trl = SHARED | {"per_device_train_batch_size": 4, "max_steps": REPLAYED}
    config = quick(root, model=str(taught), generator=ScriptedConfig(width=32, height=32), trl=trl)
    (runs / "c.yaml").write_text(to_yaml(config))
    forked(1, "grpo", str(runs / "c.yaml"), "--runs", str(runs), log=runs / "log", replay=REPLAYED)
    return updates(runs / "grpo_critic")


def updates(run: Path) -> dict[str, list[float]]:
    """What was logged of every update, or of every rollout, by name."""
    found = [line for line in lines(run) if "loss" in line]
    names = ("step", "loss", "grad_norm", "reward", "reward_std")
    return {name: [line[name] for line in found if name in line] for name in names}


@pytest.mark.parametrize("shard", tiers(SHARDS, slow=["zero3"]))
def test_two_processes_give_the_losses_of_one_and_go_on_exactly(
    root: Path, taught: Path, alone: dict[str, list[float]], tmp_path: Path, shard: str
) -> None:
    """On given answers, and then on sampled ones, which depend on the process: those are the same after a resume."""
    from interleave.models.chat.local import LocalChat, LocalChatConfig

    trl = {**SHARED, "max_steps": REPLAYED + 4, **SHARDS[shard]}
    config = quick(root, model=str(taught), generator=ScriptedConfig(width=32, height=32), trl=trl)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    how: dict[str, Any] = {"log": tmp_path / "log", "shard": shard, "replay": REPLAYED}
    forked(2, "grpo", str(tmp_path / "c.yaml"), "--runs", str(tmp_path), **how)
    run = tmp_path / "grpo_critic"
    found = updates(run)
    assert alone["step"] == [*range(1, REPLAYED + 1)]
    for name, numbers in alone.items():
        assert found[name][: len(numbers)] == pytest.approx(numbers, abs=1e-3, rel=1e-3), name
    assert max(abs(a - b) for a, b in pairwise(alone["loss"])) > 0.01
    assert min(alone["reward_std"]) > 0
    straight = digest(run / "model")
    assert straight != digest(taught)
    LocalChat(LocalChatConfig(ref=str(run / "model"), device="cpu"))
    shutil.rmtree(run / "model")
    for step in (REPLAYED + 2, REPLAYED + 4):
        # as if killed while the first was written
        (run / "checkpoints" / f"checkpoint-{step}" / "manifest.json").unlink()
    forked(2, "grpo", "--resume", str(run), **how)
    assert digest(run / "model") == straight
    assert updates(run) == found


def test_models_behind_the_rewards_and_number_of_processes_are_part_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, lora = tmp_path / "generator", tmp_path / "lora.safetensors"
    shutil.copytree(hub.resolve("builtin:shapes/generator"), folder)
    lora.write_bytes(save({"a.lora_A.weight": torch.zeros(1, 1)}))
    judge = "judge={kind: model, model: {kind: local, ref: builtin:shapes/critic}}"
    config = load(GrpoConfig, [], [f"generator.ref={folder}", f"generator.lora={lora}", judge])
    opened = RunFolder(tmp_path, is_main=True)
    job = GrpoJob(config, (), (), None)  # type: ignore[arg-type]
    bind = partial(bind_data, opened, config.models)
    bind(grpo._bound(job))  # also of a run that was stopped before
    bind(grpo._bound(job))
    with monkeypatch.context() as patch:
        patch.setattr("interleave.training.run.launched_process", lambda environment: LaunchedProcess(0, 2))
        with pytest.raises(UserError, match="the number of processes has changed since the run was started"):
            bind(grpo._bound(job))
    lora.write_bytes(save({"a.lora_A.weight": torch.ones(1, 1)}))
    with pytest.raises(UserError, match=r"generator\.lora has changed since the run was started"):
        bind(grpo._bound(job))
    lora.write_bytes(save({"a.lora_A.weight": torch.zeros(1, 1)}))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    with pytest.raises(UserError, match="generator has changed since the run was started"):
        bind(grpo._bound(job))
    service = load(GrpoConfig, [], ["generator={kind: service}"])
    assert set(hash_models(service.models)) == {"model", "the configuration of model"}


def test_the_questions_of_the_judge_are_part_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("Was {rewritten_prompt} done?\n<image><image>")
    sets = ["judge={kind: model, model: {kind: scripted, answers: [x]}}", f"judge.semantics_template={file}"]
    job = GrpoJob(load(GrpoConfig, [], sets), (), (), None)  # type: ignore[arg-type]
    before = grpo._bound(job)
    assert before == grpo._bound(job)
    file.write_text("Was {rewritten_prompt} done well?\n<image><image>")
    assert before != grpo._bound(job)
    assert grpo._bound(GrpoJob(GrpoConfig(), (), (), None))["the templates of judge"] == []  # type: ignore[arg-type]
