"""The first benchmark of both products: jobs, resuming, refusals, and the report."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.cross import jobs, report, two_by_two
from benchmarks.cross.two_by_two import BenchmarkJob, TwoByTwo
from imgen_common.config import load
from imgen_common.errors import UserError
from imgen_common.images import to_pil
from imgen_common.shapes.render import render
from imgen_common.shapes.scene import compose, parse_caption
from imgen_common.shapes.steps import Story
from interleave.agents.miniature import VerifierCritic
from interleave.protocols import Components, GenerationRequest, HashedImage, PlannerAnswer
from interleave.records import Plan, PlanStep, Request

GIVEN = [
    "generators.aligned.ref=builtin:shapes/generator",
    "generators.aligned.num_inference_steps=4",
    "agents.grpo.model.ref=builtin:shapes/critic",
]
TINY = load(TwoByTwo, [], [*GIVEN, "num_requests=6", "num_captions=4"])


@dataclass
class Captions:
    """Generates the image of every caption if it is sound, otherwise always the same."""

    sound: bool
    id: str = "captions"
    max_sources: int = 1
    params: dict[str, Any] = field(default_factory=dict)

    async def generate(self, job: GenerationRequest) -> HashedImage:
        try:
            spec = parse_caption(job.prompt if self.sound else "a red circle")
        except KeyError:
            spec = parse_caption("a red circle")
        scene = render(compose(spec, np.random.default_rng(job.seed)))
        return HashedImage.from_pil(to_pil(torch.as_tensor(np.asarray(scene))[None])[0])

    async def close(self) -> None:
        pass


@dataclass
class Knowing:
    """Knows the plans of stories."""

    stories: Sequence[Story]
    id: str = "knowing"

    async def plan(self, request: Request, pictures: Sequence[HashedImage], seed: int) -> PlannerAnswer:
        (story,) = [story for story in self.stories if story.request == request.text]
        steps = [PlanStep(index=i, prompt=prompt) for i, prompt in enumerate(story.prompts, 1)]
        return PlannerAnswer(Plan(steps=tuple(steps)), "", template="knowing", template_hash="0")

    async def close(self) -> None:
        pass


def scripted(config: TwoByTwo, folder: Path, generator: str, agents: str) -> Components:
    stories = [story for kind in ("stories", "riddles") for story in two_by_two.load_requests(config, kind)]
    planner = None if agents == report.SINGLE else Knowing(stories)
    critic = VerifierCritic() if agents in (report.SFT, report.GRPO) else None
    return Components(planner, critic, Captions(generator == report.ALIGNED))


def read_output(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out.json").read_text())


def run(folder: Path, config: TwoByTwo = TINY) -> str:
    return two_by_two.run_two_by_two(config, folder / "work", 1, ["two_by_two"], folder / "out.json")


@pytest.mark.exhaustive
def test_the_whole_benchmark_goes_on_from_its_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_by_two, "build_cell_components", scripted)
    whole, done = two_by_two.run_job, []

    def work(config: TwoByTwo, folder: Path, job: BenchmarkJob) -> str:
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(job.name)
        return whole(config, folder, job)

    with monkeypatch.context() as stopped:
        stopped.setattr(two_by_two, "run_job", work)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert not (tmp_path / "out.json").exists()
    cells = {file: file.stat().st_mtime_ns for file in (tmp_path / "work" / "done").iterdir()}
    assert len(cells) == 7
    text = run(tmp_path)
    assert all(file.stat().st_mtime_ns == time for file, time in cells.items())

    found = read_output(tmp_path)
    rows = {(r["generator"], r["arm"], r["kind"]): r for r in found["rows"]}
    assert len(rows) == 2 * (4 * 2 + 1)
    assert rows["aligned", report.SINGLE, "captions"]["right"] == [1, 1, 1]
    assert rows["base", report.SINGLE, "captions"]["right"][0] < 1
    one_step = [len(s.steps) == 1 for s in two_by_two.load_requests(TINY, "riddles")]
    assert 0 < sum(one_step) < len(one_step)
    assert [t["right"] for t in found["per_request"][f"aligned/{report.PLANNER}/riddles"]] == one_step
    assert rows["base", report.SFT, "riddles"]["images"] > rows["base", report.PLANNER, "riddles"]["images"]
    effects = {(e["what"], e["at"]): e for e in found["effects"]}
    difference = np.mean(one_step) - rows["base", report.PLANNER, "riddles"]["right"][0]
    assert effects["aligned less base", report.PLANNER]["riddles"][0] == pytest.approx(difference)
    assert len(effects) == 4 + 2 * 3
    assert found["wall_seconds"] is None
    assert "in several runs" in text
    assert text.count("\n| ") == 1 + 8 + 1 + 10 + 1
    assert text in (tmp_path / "out.md").read_text()
    plot = (tmp_path / "out.svg").read_text()
    assert plot.count("<circle") == 2 + 2 * (1 + 4 + 4)


def test_another_configuration_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "run_jobs", lambda *given: pytest.fail("not to be run") if done else None)
    done: list[str] = []
    with pytest.raises(UserError, match=r"captions\.json: No such file"):
        run(tmp_path)
    done.append("begun")
    with pytest.raises(UserError, match=r"config\.seed = 0, now 1"):
        run(tmp_path, TINY.model_copy(update={"seed": 1}))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generators: {aligned: {reff: x}}", "generators.aligned.reff: unknown key; did you mean 'ref'"),
        ("agents: {grop: {}}", "agents.grop: unknown key; did you mean 'grpo'"),
        ("agents: {sft: {model: {kind: endpoint, url: 'http://127.0.0.1:1/v1', model: m}}}", "cannot be trained here"),
    ],
)
def test_mistakes_in_a_file_are_refused(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(line)
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        load(TwoByTwo, [file])


def test_what_is_named_is_not_trained() -> None:
    everything = two_by_two.list_jobs(TwoByTwo())
    assert [job.name for job in everything if job.cell is None] == ["align", "data", "grpo"]
    position = {job.name: number for number, job in enumerate(everything)}
    assert all(position[need] < position[job.name] for job in everything for need in job.needs)
    cells = {job.cell: job for job in everything if job.cell}
    assert cells["aligned", report.GRPO, "riddles"].needs == ("align", "grpo")
    assert cells["base", report.SFT, "stories"].needs == ()
    assert [job.cell for job in two_by_two.list_jobs(TINY)] == list(cells)
    assert not any(job.needs for job in two_by_two.list_jobs(TINY))


def test_both_generators_sample_with_the_same_settings() -> None:
    base, aligned = (two_by_two.generator_config(TINY, Path(), name) for name in ("base", "aligned"))
    assert base == TINY.generators.base
    assert (aligned.guidance_scale, aligned.height, aligned.num_inference_steps) == (2, 32, 4)


@pytest.mark.slow
def test_a_training_that_fails_says_why(tmp_path: Path) -> None:
    config = load(TwoByTwo, [], ["recipes.align.sets=[max_train_step=3]"])
    with pytest.raises(UserError, match=r"align failed .*unknown key; did you mean 'max_train_steps'.*align\.log"):
        two_by_two.run_job(config, tmp_path, two_by_two.list_jobs(config)[0])


@pytest.mark.exhaustive
def test_trained_and_measured_on_the_real_miniature(tmp_path: Path) -> None:
    sets = ["num_requests=2", "num_captions=2"]
    sets += ["recipes.align.sets=[max_train_steps=1, eval.every=0, eval.num_prompts=2, eval.num_inference_steps=2]"]
    sets += ["recipes.data.sets=[prompts.count=6, filters.rl_share=1, filters.balance=null, filters.low=null]"]
    small = "trl.num_generations=2, trl.per_device_train_batch_size=4, trl.steps_per_generation=1"
    sets += [f"recipes.grpo.sets=[trl.max_steps=1, trl.save_steps=1, trl.gradient_accumulation_steps=1, {small}]"]
    config = load(TwoByTwo, [], sets)
    text = two_by_two.run_two_by_two(config, tmp_path / "work", 2, ["two_by_two"], tmp_path / "out.json")
    assert "the whole command: in" not in text
    assert set(read_output(tmp_path)["training_seconds"]) == {"align", "data", "grpo"}
    assert all(seconds > 0 for seconds in read_output(tmp_path)["training_seconds"].values())
    for made in ("aligned/transformer", "runs/grpo/model"):
        assert list((tmp_path / "work" / made).glob("*.safetensors"))
