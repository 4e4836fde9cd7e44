"""A session tells stories record by record, for the demo and whoever else watches."""

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from backends import FakeCritic, FakeGenerator, FakePlanner, plan_of
from PIL import Image

from imgen_common import hub
from imgen_common.config import load
from imgen_common.errors import UserError
from imgen_common.run_folder.find import find_run
from interleave import demo
from interleave.cli.run import batch, report
from interleave.loop.config import ModelCritic, NoPlanner, RunConfig
from interleave.loop.functions import tell_story
from interleave.loop.requests import make_request
from interleave.loop.run import StoryStream, create_run, run_requests
from interleave.models.generators.pipeline import PipelineConfig
from interleave.pages.run import write_report
from interleave.protocols import BackendError, Components, HashedImage
from interleave.records import Attempt, Record, Trajectory


def test_a_session_tells_its_records_with_their_images(tmp_path: Path) -> None:
    planner = FakePlanner(lambda request, seed: plan_of("a red circle", None, "a blue square"))
    parts = Components(planner, FakeCritic(lambda shown, seed: (True, shown.prompt_used)), FakeGenerator())
    given = HashedImage.from_pil(Image.new("RGB", (4, 4), "green"))

    async def told() -> list[tuple[Record, HashedImage | None]]:
        stories: demo.StoryStreamer = StoryStream(RunConfig(planner=NoPlanner()), parts, tmp_path)
        return [one async for one in stories.stream("two squares", [given], 3)]

    records = asyncio.run(told())
    assert [type(record).__name__ for record, _ in records] == ["PlanRecord", "Attempt", "Attempt", "Trajectory"]
    for record, picture in records:
        assert (picture.id if picture else None) == (record.image_id if isinstance(record, Attempt) else None)
    assert (tmp_path / "two_squares" / "trace.jsonl").read_text().count("\n") == 4
    with pytest.raises(UserError, match="a run of `interleave demo`, not of `flowbp train`"):
        find_run("two_squares", tmp_path, "flowbp train")


@pytest.mark.parametrize("refused", ["", "\ud83d"])
def test_a_story_from_python_that_is_refused_leaves_no_folder(refused: str, tmp_path: Path) -> None:
    def generate(prompt: str, sources: object, seed: int) -> Image.Image:
        return Image.new("RGB", (4, 4), "red")

    with pytest.raises(UserError, match="the request"):
        tell_story(refused, generate, folder=tmp_path / "story")
    assert list(tmp_path.iterdir()) == []
    assert tell_story("a square", generate, folder=str(tmp_path / "story")).trajectory.status == "complete"
    assert (tmp_path / "story" / "trace.jsonl").is_file()


def test_a_template_or_a_model_that_changed_is_not_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("Is {original_instruction} in <image><image>?")
    model = shutil.copytree(hub.resolve("builtin:shapes/generator"), tmp_path / "model")
    config = RunConfig(
        planner=NoPlanner(), critic=ModelCritic(template=str(file)), generator=PipelineConfig(ref=str(model))
    )
    parts = Components(None, FakeCritic(lambda shown, seed: (True, shown.prompt_used)), FakeGenerator())
    create_run(tmp_path / "run", config, lambda store: [make_request("a red circle", [], store)])

    def go_on() -> list[Trajectory]:
        return asyncio.run(run_requests(tmp_path / "run", parts, config, ["test"], lambda record: None))

    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(UserError, match="generator has changed since the run was started; restore it"):
        go_on()
    weights.write_bytes(kept)
    file.write_text("Is {original_instruction} really in <image><image>?")
    with pytest.raises(UserError, match="the text of a template has changed since the run was started; restore it"):
        go_on()
    file.write_text("Is {original_instruction} in <image><image>?")
    # both may lie elsewhere, but nothing else of the configuration was edited
    written, places = (tmp_path / "run" / "config.yaml").read_text(), {model: tmp_path / "b", file: tmp_path / "c.txt"}
    for before, after in places.items():
        before.rename(after)
        written = written.replace(str(before), str(after))
    (tmp_path / "run" / "config.yaml").write_text(written.replace("seed: 0", "seed: 1"))
    config = load(RunConfig, [tmp_path / "run" / "config.yaml"])
    with pytest.raises(UserError, match=r"config.yaml: edited .*: the run has seed = 0, now 1 was given"):
        go_on()
    (tmp_path / "run" / "config.yaml").write_text(written)
    config = load(RunConfig, [tmp_path / "run" / "config.yaml"])
    assert [story.status for story in go_on()] == ["complete"]


def test_a_story_from_python_is_not_gone_on_with_by_a_command(tmp_path: Path) -> None:
    """Which does not know the functions, and would use the miniature in their place."""

    def fail(prompt: str, sources: object, seed: int) -> Image.Image:
        raise BackendError("unreachable", "down")

    assert tell_story("a cat", fail, folder=tmp_path / "run").trajectory.status == "generator_failed"
    assert "interleave batch" not in write_report(tmp_path / "run").read_text()
    report(str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"a run of `interleave\.tell_story`, not of `interleave batch`"):
        batch(resume=str(tmp_path / "run"), retry=True)


def test_one_prompt_of_a_story_may_stand_for_a_list(tmp_path: Path) -> None:
    def draw(prompt: str, sources: Sequence[Image.Image], seed: int) -> Image.Image:
        return Image.new("RGB", (8, 8), "red")

    told = tell_story("a story", draw, prompts="a cat", folder=str(tmp_path / "run"))
    assert told.trajectory.plan is not None
    assert [step.prompt for step in told.trajectory.plan.steps] == ["a cat"]
    assert (tmp_path / "run" / "trace.jsonl").is_file()
    for prompts, said in ((["a cat", " "], "step 2 of 2 is empty"), (["\ud83d"], "step 1: holds half of a surrogate")):
        with pytest.raises(UserError, match=f"prompts: {said}"):
            tell_story("a story", draw, prompts=prompts)
