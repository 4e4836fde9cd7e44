"""The benchmark that closes the loop: its jobs, its report, and all of it on the real miniature."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cross import closed_loop
from benchmarks.cross.closed_loop import ClosedLoop, list_jobs
from benchmarks.cross.closed_loop_report import (
    BASE,
    BY_CLIP,
    BY_CRITIC,
    CRITIC,
    PLANNER,
    SECOND,
    TEXT,
    Measured,
    write_report,
)
from benchmarks.quality.interleave_miniature import StoryResult
from imgen_common.config import load
from imgen_common.errors import UserError


def test_jobs_come_after_those_that_they_need() -> None:
    jobs = list_jobs(load(ClosedLoop, [], ["second_round=true"]))
    place = {job.name: number for number, job in enumerate(jobs)}
    assert len(place) == len(jobs) == 2 + 3 * 4 + (1 + 3 * 4) * 3
    assert all(place[need] < place[job.name] for job in jobs for need in job.needs)
    needs = {job.name: set(job.needs) for job in jobs}
    assert needs["edits-critic-2"] == {"reward"}
    assert needs["second-round-2"] == {"edits-critic-2"}
    assert needs["text-1-planner-critic"] == {"text-1"}
    assert needs["base-0-images"] == {"reward", "second-critic"}
    assert not any("second-round" in job.name for job in list_jobs(ClosedLoop()))


def story(right: bool, images: int = 2, judged: int = 0) -> StoryResult:
    return StoryResult(right, right, True, images, 2, 0, judged)


def images(right: list[float], critic: list[float], second: list[float]) -> dict[str, Any]:
    scores = {"verifier": right, "critic": critic, "second_critic": second}
    return {"captions": scores | {"verifier": [1.0, 1.0, 0.0, 0.0]}, "edits": scores}


def measured() -> Measured:
    """Base right in 1 of 4 stories; the critic's generator in 2 and in 4 of 4, by two training seeds."""
    one, two, four = ([story(i < n) for i in range(4)] for n in (1, 2, 4))
    judged = [story(i < 2, images=3, judged=4) for i in range(4)]
    stories = {(BASE, PLANNER): [one], (BASE, CRITIC): [judged]}
    stories |= {(BY_CRITIC, PLANNER): [two, four], (BY_CRITIC, CRITIC): [judged, judged]}
    base = images([1, 0, 0, 0], [0.5, 0.5, 0, 0.25], [1, 0, 0, 0])
    hacked = images([1, 0, 0, 0], [1, 1, 1, 0.25], [1, 0, 0, 0])
    return Measured(stories, {BASE: [base], BY_CRITIC: [hacked, hacked]}, {"reward": None, "edits-critic-0": 2.0})


ABOUT = {
    "config": ClosedLoop().model_dump(mode="json"),
    "environment": {"packages": {}, "python": "3", "hardware": "a machine"},
    "wall_seconds": None,
}


def test_the_report_says_what_was_measured(tmp_path: Path) -> None:
    text = write_report(measured(), ABOUT, tmp_path / "out.json")
    rows = {cells[1]: cells[2:] for line in text.splitlines() if len(cells := [c.strip() for c in line.split("|")]) > 2}
    assert rows["planner, base"][0].startswith("25.0 [")
    assert rows["planner, edits, critic"][0].startswith("75.0 [")
    assert rows["planner, edits, critic"][1].startswith("+50.0 [")
    assert rows["planner, edits, critic"][2] == "50.0, 100.0"
    assert rows["planner + critic, base"][3:5] == ["3.00", "4.00"]
    # edits: base right 25 %; accepts (.5 + .5 + 0 + .25) / 4 = 31.25 %, of the right one 50 %, of the others 25 %
    assert rows["base"][2].startswith("25.0 [")
    assert rows["base"][4:7] == ["31.2", "50.0", "25.0"]
    assert rows["edits, critic"][4:] == ["81.2", "100.0", "75.0", "25.0", "100.0", "0.0", ""]
    assert "reward - s, edits-critic-0 2 s" in text
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["changes"][BY_CRITIC]["stories, planner"][0] == 0.5
    assert content["changes"][BY_CRITIC]["edits"] == [0, 0, 0]
    assert (tmp_path / "out.svg").read_text().count("<circle") == 2 + 2 * (2 + 3)
    assert text in (tmp_path / "out.md").read_text()


def test_without_training_seeds_nothing_is_aligned() -> None:
    with pytest.raises(UserError, match="training_seeds"):
        load(ClosedLoop, [], ["training_seeds=[]"])


@pytest.mark.exhaustive
def test_the_loop_is_closed_on_the_real_miniature(tmp_path: Path) -> None:
    quick = "max_train_steps=1, total_batch_size=2, num_inference_steps=5, eval.every=0, eval.num_prompts=2"
    quick += ", eval.num_inference_steps=2"
    sets = ["num_stories=2", "num_images=3", "training_seeds=[0]", "second_round=true"]
    sets += [f"recipes.{arm}.sets=[{quick}]" for arm in ("text", "clip", "critic")]
    sets += ["recipes.data.sets=[prompts.count=6, filters.rl_share=0, filters.balance=null, filters.low=null]"]
    sets += ["recipes.sft.sets=[trl.max_steps=1]"]
    work, output = tmp_path / "work", tmp_path / "out.json"
    config = load(ClosedLoop, [], sets)
    text = closed_loop.run_closed_loop(config, work, 2, ["closed_loop"], output)
    content = json.loads(output.read_text())
    assert set(content["changes"]) == {TEXT, BY_CLIP, BY_CRITIC, SECOND}
    assert all(seconds > 0 for seconds in content["training_seconds"].values())
    again = closed_loop.run_closed_loop(config, work, 2, ["closed_loop"], output)
    assert again.split("the whole command")[0] == text.split("the whole command")[0]
    assert "in several runs" in again
