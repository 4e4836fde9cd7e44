"""Training sets: what the filters keep, builds that are stopped and go on, and mistakes that are named."""

import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from backends import FakeCritic, FakeGenerator, FakeJudge, FakePlanner, plan_of
from browser import CHROMIUM, find_faults, open_browser
from hypothesis import given
from hypothesis import strategies as st
from killed_build import build as go_on_building
from killed_build import mark, parts
from pages import Page
from PIL import Image

from imgen_common import hub
from imgen_common.config import load
from imgen_common.errors import UserError
from imgen_common.files import read_json
from imgen_common.run_folder.data import DATA, DataHashes, hash_rows, record_data
from interleave.agents.parsing import parse_plan, parse_verdict
from interleave.agents.prompts import load_template, render_plan, render_planner, render_verdict
from interleave.benchmarks.official import reading
from interleave.cli import main
from interleave.datasets import build as building
from interleave.datasets import requests as prompts
from interleave.datasets.agreement import JudgeComparison, compare_judges
from interleave.datasets.build import BuildProgress, write_rows
from interleave.datasets.check import SetChecker, parse_set_row, read_set_info
from interleave.datasets.config import (
    BudgetConfig,
    DataConfig,
    FilePrompts,
    FiltersConfig,
    ShapesPrompts,
    TemplatesConfig,
)
from interleave.datasets.files import read_items
from interleave.datasets.filters import SetInfo, select_rows
from interleave.datasets.formats.execution import write_execution_record
from interleave.datasets.formats.training import write_rl, write_sft
from interleave.datasets.importing import import_set
from interleave.datasets.inspect import read_row
from interleave.datasets.rows import Evaluation, FinishedStory, RlRow, SftRow
from interleave.loop.config import LoopConfig, ModelPlanner, NoCritic, RunConfig
from interleave.loop.requests import load_requests
from interleave.loop.shards import merge_shards
from interleave.models.chat.endpoint import EndpointChatConfig
from interleave.models.generators.pipeline import PipelineConfig
from interleave.pages.dataset import write_page
from interleave.protocols import BackendError, Components, CriticInput, GenerationRequest, HashedImage
from interleave.records import (
    Attempt,
    GeneratorInfo,
    Plan,
    PlannerRecord,
    PlanStep,
    Request,
    Scores,
    Trajectory,
    Verdict,
)
from interleave.storage.images import ImageStore
from interleave.storage.trace import read_trace
from interleave.training.rows import read_rows

ROOT = Path(__file__).parents[3]
YES = render_verdict(Verdict(success=True, refined_prompt="same", reasoning="good"))
NO = render_verdict(Verdict(success=False, refined_prompt="better", reasoning="bad"))
PLAN = Plan(steps=(PlanStep(index=1, prompt="a cat"),), reasoning="because")
A, B = (HashedImage.from_pil(Image.new("RGB", (8, 8), colour)) for colour in ("red", "blue"))
WIDE, TALL = (HashedImage.white(*size) for size in ((201, 1), (1, 300)))


# --- filters ---------------------------------------------------------------------------------------------------------


def tale(name: str, steps: list[list[tuple[bool, float | None]]], text: str | None = None) -> FinishedStory:
    """A story of judged attempts: (verdict, score)."""
    attempts = tuple(
        Attempt(
            trajectory_id=name,
            step=step,
            attempt=number,
            op="edit",
            source_ids=(A.id,),
            before_id=A.id,
            image_id=hashlib.sha256(f"{name} {step} {number}".encode()).hexdigest(),
            original_prompt=f"{name} {step}",
            prompt_used=f"{name} {step} {number}",
            seed=0,
            generator=GeneratorInfo(id="g"),
            verdict=verdict,
            refined_prompt="next",
            status="accepted" if verdict else "rejected",
            scores=None if score is None else Scores(semantics=score, quality=score, judge_id="j"),
        )
        for step, tried in enumerate(steps, 1)
        for number, (verdict, score) in enumerate(tried, 1)
    )
    plan = Plan(steps=tuple(PlanStep(index=i, prompt=f"{name} {i}") for i in range(1, len(steps) + 1)))
    planner = PlannerRecord(model="p", template="t", template_hash="0")
    request = Request(id=name, text=text or name)
    selected = {step: len(tried) for step, tried in enumerate(steps, 1)}
    trajectory = Trajectory(id=name, request=request, planner=planner, plan=plan, selected=selected, status="complete")
    return FinishedStory(trajectory, attempts)


OPEN = FiltersConfig(degrading=None, low=None, rl_share=None, balance=None, dedupe=False, val=0)


def places(examples: Any) -> list[tuple[str, int, int]]:
    return [(*e.step, e.attempt.attempt) for part in examples.values() for e in part]


def test_steps_that_fall_or_stay_low_are_left_out() -> None:
    steps = [[(False, 5.0), (True, 9.0)], [(False, 6.0), (False, 7.0), (False, 5.5)], [(False, 1.0), (False, 2.0)]]
    story = tale("t", [*steps, [(True, None)]])
    for change, left in [
        ({}, {1, 2, 3, 4}),
        ({"degrading": 0.0}, {1, 3, 4}),
        ({"degrading": 0.5}, {1, 2, 3, 4}),
        ({"low": 3.0}, {1, 2, 4}),
        ({"low": 2.0}, {1, 2, 3, 4}),
    ]:
        chosen = select_rows([story], OPEN.model_copy(update=change), 0)
        assert {step for _, step, _ in places(chosen.critic_sft)} == left, change
        dropped = sum(one.dropped for one in chosen.filters if one.of == "critic")
        assert dropped == 8 - len(places(chosen.critic_sft))
        assert {step for _, step, _ in places(chosen.critic_rl)} == left - {4}


def test_steps_that_vary_most_go_to_reinforcement() -> None:
    swings = {"calm": 0.5, "wild": 6.0, "none": 0.0, "some": 2.0}
    stories = [tale(name, [[(False, 3.0), (True, 3.0 + swing)]]) for name, swing in swings.items()]
    for share, names in [(0.0, set()), (0.25, {"wild"}), (0.5, {"wild", "some"}), (1.0, set(swings))]:
        chosen = select_rows(stories, OPEN.model_copy(update={"rl_share": share}), 0)
        assert {name for name, _, _ in places(chosen.critic_rl)} == names
        assert {name for name, _, _ in places(chosen.critic_sft)} == set(swings) - names


def test_a_question_is_asked_once_and_plans_may_have_to_succeed() -> None:
    stories = [tale("a", [[(False, 5.0)]], "same"), tale("b", [[(True, 5.0)]], "same")]
    twin = FinishedStory(stories[0].trajectory.model_copy(update={"id": "twin"}), stories[0].attempts)
    chosen = select_rows([*stories, twin], OPEN.model_copy(update={"dedupe": True}), 0)
    assert len(places(chosen.critic_sft)) == 2
    assert [story.trajectory.id for story in chosen.planner_sft["train"]] == ["a"]
    for rule, names in [("plan", ["a", "b"]), ("complete", ["a", "b"]), ("accepted", ["b"])]:
        chosen = select_rows(stories, OPEN.model_copy(update={"planner": rule}), 0)
        assert [story.trajectory.id for story in chosen.planner_sft["train"]] == names


def test_one_verdict_alone_cannot_be_balanced_and_that_is_said() -> None:
    chosen = select_rows([tale("a", [[(True, 5.0)], [(True, 6.0)]])], OPEN.model_copy(update={"balance": 1.0}), 0)
    assert len(chosen.critic_sft["train"]) == 2
    assert [note for note in chosen.notes if "critic_sft.jsonl: every verdict is success" in note]


attempts = st.lists(st.tuples(st.booleans(), st.none() | st.floats(0, 10)), min_size=1, max_size=4)
tales = st.lists(st.lists(attempts, min_size=1, max_size=3), min_size=1, max_size=12)
settings_of = st.builds(
    FiltersConfig,
    degrading=st.none() | st.floats(0, 10),
    low=st.none() | st.floats(0, 10),
    rl_share=st.none() | st.floats(0, 1),
    balance=st.none() | st.floats(1, 3),
    dedupe=st.booleans(),
    val=st.floats(0, 0.9),
)


@given(tales, settings_of, st.integers(0, 9))
def test_nothing_is_lost_without_being_counted(
    many: list[list[list[tuple[bool, float | None]]]], filters: FiltersConfig, seed: int
) -> None:
    stories = [tale(f"t{i}", steps, text=f"request {i // 2}") for i, steps in enumerate(many)]
    chosen = select_rows(stories, filters, seed)
    sft, rl = places(chosen.critic_sft), places(chosen.critic_rl)
    assert len({*sft}) == len(sft)
    assert len({*rl}) == len(rl)

    def dropped(*of: str) -> int:
        return sum(one.dropped for one in chosen.filters if one.of.partition(".")[0] in of)

    judged = sum(len(story.judged_attempts()) for story in stories)
    if filters.rl_share is None:
        assert len(sft) == judged - dropped("critic", "critic_sft")
        assert len(rl) == judged - dropped("critic", "critic_rl")
    else:
        assert len(sft) + len(rl) == judged - dropped("critic", "critic_sft", "critic_rl")
        assert not {p[:2] for p in sft} & {p[:2] for p in rl}
    assert sum(map(len, chosen.planner_sft.values())) == len(stories) - dropped("planner")
    requests: dict[str, set[str]] = {"train": set(), "val": set()}
    for split in ("train", "val"):
        for examples in (chosen.critic_sft[split], chosen.critic_rl[split]):
            requests[split] |= {e.story.trajectory.request.text for e in examples}
            verdicts = Counter(e.success for e in examples)
            if filters.balance is not None and len(verdicts) == 2:
                assert max(verdicts.values()) <= filters.balance * min(verdicts.values())
        requests[split] |= {story.trajectory.request.text for story in chosen.planner_sft[split]}
    assert not requests["train"] & requests["val"]
    again = select_rows(stories, filters, seed)
    assert (places(again.critic_sft), places(again.critic_rl)) == (sft, rl)


# --- builds ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """A file of twelve requests in two categories."""
    file = tmp_path / "prompts.jsonl"
    lines = [{"text": f"story {i}", "id": f"r{i}", "category": ("cats", "hats <b>")[i % 2]} for i in range(12)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


SCORING = FakeJudge(mark)


def build(out: Path, asked: Path, made: Components | None = None, idle: bool = False, **changes: Any) -> SetInfo:
    """A build with fresh parts, unless it is `idle` and has none, and a judge that scores by the image."""
    return go_on_building(out, asked, None if idle else made or parts(), **{"judge": SCORING, **changes})


def files(out: Path) -> dict[str, bytes]:
    """What a build made, byte for byte."""
    return {path.name: path.read_bytes() for path in sorted([*out.glob("*_*.jsonl"), out / "set.json"])}


@pytest.mark.slow
def test_categories_and_trajectories_count_alike(asked: Path, tmp_path: Path) -> None:
    """A story with steps that were never accepted is not complete in either."""
    critic = FakeCritic(lambda shown, seed: (shown.original_prompt.startswith(("r1 ", "r2 ")), shown.prompt_used))
    made = Components(FakePlanner(lambda request, seed: plan_of(f"{request.id} one")), critic, FakeGenerator())
    info = build(tmp_path / "set", asked, made)
    ends = sum((Counter(one) for one in info.categories.values()), Counter[str]())
    assert ends == {"complete": 2, "not complete": 10}
    assert info.trajectories == {"complete": 2, "steps_not_accepted": 10}


def test_a_build_makes_sets_that_pass_the_check(tmp_path: Path, asked: Path) -> None:
    out = tmp_path / "set"
    info = build(out, asked)
    checker = SetChecker(out)
    assert list(checker.problems()) == []
    assert info.judge == "fake judge"
    assert info.trajectories == {"complete": 12}
    assert info.categories == {"cats": {"complete": 6}, "hats <b>": {"complete": 6}}
    assert {name: one.rows for name, one in checker.counts.items()} == {
        f"{name}.jsonl" if split == "train" else f"{name}.{split}.jsonl": count
        for name, splits in info.rows.items()
        for split, count in splits.items()
        if count
    }
    plans = [parse_set_row(line, "planner_sft") for line in (out / "planner_sft.jsonl").read_bytes().splitlines()]
    first = plans[0]
    assert isinstance(first, SftRow)
    story = read_trace(out)[first.trajectory_id or ""].trajectory
    assert story is not None
    asked_for = render_planner(load_template("planner_text"), story.request.text, ())
    assert first.message(ImageStore(out / "images").get) == asked_for
    read = parse_plan(first.completion)
    assert isinstance(read, Plan)
    assert story.plan is not None
    assert read.steps == story.plan.steps
    for line in (out / "critic_rl.jsonl").read_bytes().splitlines():
        row = parse_set_row(line, "critic_rl")
        assert isinstance(row, RlRow)
        shown = row.critic_input(ImageStore(out / "images").get)
        assert row.evaluation.semantics == pytest.approx(mark(shown))
        assert row.evaluation.model_extra == {"judge_id": "fake judge", "num_samples": 1}


def test_a_finished_build_calls_nobody_and_can_be_filtered_anew(tmp_path: Path, asked: Path) -> None:
    out = tmp_path / "set"
    build(out, asked)
    before = files(out)
    trace = (out / "trace.jsonl").read_bytes()

    def refuse(shown: CriticInput) -> float:
        raise AssertionError("asked again")

    assert build(out, asked, idle=True, judge=FakeJudge(refuse)) == SetInfo.model_validate_json(before["set.json"])
    assert files(out) == before
    info = build(out, asked, idle=True, judge=FakeJudge(refuse), filters=OPEN)
    assert info.rows["critic_rl"]["train"] == info.rows["critic_sft"]["train"] == info.scored
    assert not (out / "critic_rl.val.jsonl").exists()
    assert (out / "trace.jsonl").read_bytes() == trace
    assert list(SetChecker(out).problems()) == []
    with (
        pytest.raises(UserError, match=r"run\.seed"),
        building.open_build(out, load(DataConfig, [out / "config.yaml"], ["run.seed=5"]), []),
    ):
        pass


class Stop(BaseException):
    """Ends a build at a moment of its own choosing, as Ctrl-C would."""


@pytest.mark.parametrize("moment", [4, 30])
def test_stopped_anywhere_a_build_ends_as_if_it_were_not(tmp_path: Path, asked: Path, moment: int) -> None:
    build(tmp_path / "whole", asked)
    out, jobs = tmp_path / "cut", list[GenerationRequest]()
    left = moment

    def stop(*_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Stop

    telling = BuildProgress(stop, stop)
    stops = 0
    while stops < 4:
        left, made = moment, parts()
        try:
            build(out, asked, made=made, telling=telling if stops < 3 else BuildProgress())
            break
        except Stop:
            stops += 1
        finally:
            jobs += made.generator.jobs if isinstance(made.generator, FakeGenerator) else []
    assert stops >= 1
    assert files(out) == files(tmp_path / "whole")
    lines = [json.loads(line) for line in (out / "trace.jsonl").read_text().splitlines()]
    written = Counter((line["trajectory_id"], line["step"], line["attempt"]) for line in lines if "attempt" in line)
    assert max(written.values()) == 1
    assert len(jobs) <= len(written) + 16 * stops


@pytest.mark.parametrize("count", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_a_build_of_many_machines_is_that_of_one(tmp_path: Path, asked: Path, count: int) -> None:
    """The last part was stopped, and what it left is done after merging."""
    whole = build(tmp_path / "whole", asked)
    parts_ = [tmp_path / f"part-{number}" for number in range(1, count + 1)]
    for number, part in enumerate(parts_, 1):
        budget = BudgetConfig(max_images=1 if number == count else None)
        build(part, asked, shard=f"{number}/{count}", budget=budget)
        assert len(load_requests(part)) in (12 // count, 12 // count + 1)
    with pytest.raises(UserError, match=rf"part-1 is 1/{count}.*; give all {count} parts of one batch or build"):
        merge_shards(parts_[:-1], tmp_path / "all")
    image = next((parts_[0] / "images").rglob("*.png"))
    content = image.read_bytes()
    image.write_bytes(content[:-20])
    with pytest.raises(UserError, match=rf"{image}: the image is cut short; copy its part of the batch again"):
        merge_shards(parts_, tmp_path / "all")
    image.write_bytes(content)
    assert merge_shards(sorted(parts_, reverse=True), tmp_path / "all") == 12
    again = build(tmp_path / "all", asked)
    assert again.rows == whole.rows
    assert files(tmp_path / "all") == files(tmp_path / "whole")
    judged = [line for part in parts_ for line in (part / "scores").rglob("answers.jsonl")]
    assert len(judged) == count


def test_a_part_is_built_further_as_that_part(tmp_path: Path, asked: Path) -> None:
    out = tmp_path / "part"
    config = DataConfig(prompts=FilePrompts(path=str(asked)), shard="2/5")
    for _ in range(2):  # nothing was recorded the first time
        with building.open_build(out, config, ["test"]) as requests:
            assert [request.id for request in requests] == ["r1", "r6", "r11"]


def test_a_request_that_the_miniature_cannot_answer_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    A.image.save(tmp_path / "a.png")
    file = tmp_path / "requests.jsonl"
    others = RunConfig(planner=ModelPlanner(model=EndpointChatConfig()), critic=NoCritic())
    for row, said, run in (
        (
            {"text": "make the circle green", "images": ["a.png"]},
            r"takes no images; --set run\.planner\.kind=none",
            RunConfig(),
        ),
        ({"text": "a cat"}, "does not know the word 'cat'", RunConfig()),
        ({"text": "a cat"}, r"verifier knows .*'cat'; .*configure another judge, or none \(judge: null\)", others),
    ):
        file.write_text(json.dumps(row) + "\n")
        with pytest.raises(UserError, match=said):
            building.build_sets(
                tmp_path / "out",
                DataConfig(prompts=FilePrompts(path=str(file)), run=run),
                ["test"],
                lambda left: BuildProgress(),
            )


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path, asked: Path) -> None:
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    run = RunConfig(generator=PipelineConfig(device="cuda:1"), loop=LoopConfig(max_generations=9))
    of_a_machine = {"shard": "2/2", "max_unscored": 0.5, "confirm_calls": 9, "run": run}
    for out, changes in ((one, {"shard": "1/2"}), (two, of_a_machine), (other, {"max_unscored": 0.5, "judge": None})):
        with building.open_build(out, DataConfig(prompts=FilePrompts(path=str(asked)), **changes), ["test"]):
            pass
    for shards, message in [
        ([one, two, one], "request 'r0' is in two of the folders; give every part once"),
        ([one, other], "other: another configuration in judge than .*one; merge parts of one"),
        ([one, tmp_path], "no config.yaml or no requests.jsonl in it"),
    ]:
        with pytest.raises(UserError, match=message):
            merge_shards(shards, tmp_path / "all")
    assert not (tmp_path / "all").exists()
    hashes = read_json(two / DATA, DataHashes).data
    record_data(two, hashes | {"run.generator": hash_rows(["other weights"])})
    with pytest.raises(UserError, match=r"two: another run\.generator than .*one; merge parts of one"):
        merge_shards([one, two], tmp_path / "all")
    record_data(two, hashes)
    # on another machine the file of requests lies elsewhere; and each part may have a GPU of its own
    text = (two / "config.yaml").read_text().replace(str(asked), "requests/asked.jsonl")
    (two / "config.yaml").write_text(text.replace("device: auto", "device: cuda:1"))
    merge_shards([two, one], tmp_path / "all")
    assert read_json(tmp_path / "all" / DATA, DataHashes).data == hashes  # by which a resumed build knows its models
    with pytest.raises(UserError, match=r"--shard 13/13: there are only 12 items"):
        build(tmp_path / "none", asked, shard="13/13")


@pytest.mark.exhaustive
def test_killed_at_many_moments_a_build_ends_as_if_it_were_not(tmp_path: Path, asked: Path) -> None:
    """A process of its own, SIGKILL at moments spread over its time."""
    script = Path(__file__).parents[1] / "killed_build.py"

    def start(folder: Path) -> subprocess.Popen[bytes]:
        env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        return subprocess.Popen([sys.executable, str(script), str(folder), str(asked)], env=env, stdout=subprocess.PIPE)

    whole = start(tmp_path / "whole")
    assert whole.stdout
    whole.stdout.readline()
    began = time.monotonic()
    assert whole.wait() == 0
    seconds = time.monotonic() - began
    killed = 0
    for moment in range(12):
        process = start(tmp_path / "cut")
        assert process.stdout
        process.stdout.readline()
        time.sleep(seconds * (moment * 5 % 12) / 40)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 6
    assert start(tmp_path / "cut").wait() == 0
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_a_budget_ends_a_build_and_a_larger_one_goes_on(tmp_path: Path, asked: Path) -> None:
    out = tmp_path / "set"
    loop = {"loop": {"concurrency": 2}}
    config = load(DataConfig, [], []).run.model_validate(loop)
    info = build(out, asked, run=config, budget=BudgetConfig(max_images=10))
    drawn = sum(info.attempts.values())
    assert 10 <= drawn < 10 + 2 * 6
    waiting = info.trajectories["not finished"]
    assert waiting + info.trajectories["complete"] == 12
    assert any(f"{waiting} requests have no trajectory yet" in note for note in info.notes)
    assert build(out, asked, run=config).trajectories == {"complete": 12}
    build(tmp_path / "whole", asked)
    assert files(out) == files(tmp_path / "whole")


def test_other_folders_trajectories_are_taken_in(tmp_path: Path, asked: Path) -> None:
    build(tmp_path / "one", asked)
    again = {"prompts": None, "trajectories": (str(tmp_path / "one"),)}
    info = build(tmp_path / "two", asked, idle=True, **again)
    first = SetInfo.model_validate_json((tmp_path / "one" / "set.json").read_text())
    assert sum(info.rows["critic_sft"].values()) == sum(first.rows["critic_sft"].values())
    assert list(SetChecker(tmp_path / "two").problems()) == []
    both = build(tmp_path / "three", asked, trajectories=(str(tmp_path / "one"),))
    assert both.trajectories == {"complete": 24}
    assert both.rows == first.rows  # equal questions are asked once
    assert list(SetChecker(tmp_path / "three").problems()) == []
    with pytest.raises(UserError, match=r"no trace\.jsonl in it"):
        build(tmp_path / "four", asked, idle=True, prompts=None, trajectories=(str(tmp_path),))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("one", "one"), "one: is given twice"),
        (("one", "two", "two/../one/"), "one: is given twice"),
        (("one", "link"), "link: is given twice"),
        (("new",), "new: is the build itself"),
        (("one", "none"), r"none: no trace\.jsonl in it"),
    ],
)
def test_folders_that_would_count_twice_are_refused_before_anything_is_made(
    tmp_path: Path, asked: Path, given: tuple[str, ...], said: str
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trace.jsonl").touch()
    (tmp_path / "link").symlink_to("one")
    with pytest.raises(UserError, match=f"^trajectories: .*{said}"):
        build(tmp_path / "new", asked, trajectories=tuple(str(tmp_path / name) for name in given))
    assert not (tmp_path / "new").exists()


# --- judges that fail ------------------------------------------------------------------------------------------------


def failing(kind: Any, when: Callable[[CriticInput], bool]) -> FakeJudge:
    """A judge that fails on some images."""

    def score(shown: CriticInput) -> float:
        if when(shown):
            raise BackendError(kind, "no luck")
        return mark(shown)

    return FakeJudge(score)


def test_a_judge_that_is_down_from_the_start_is_refused(tmp_path: Path, asked: Path) -> None:
    made = parts()
    with pytest.raises(UserError, match=r"does not answer \(unreachable: no luck"):
        build(tmp_path / "set", asked, made=made, judge=failing("unreachable", lambda shown: True))
    assert read_trace(tmp_path / "set") == {}
    with pytest.raises(UserError, match=r"none\.jsonl"):
        build(tmp_path / "set", tmp_path / "none.jsonl")
    assert build(tmp_path / "set", asked).trajectories == {"complete": 12}


def test_a_judge_that_goes_down_stops_the_build_and_nothing_is_lost(tmp_path: Path, asked: Path) -> None:
    build(tmp_path / "whole", asked)
    out, down = tmp_path / "set", failing("rate_limited", lambda shown: shown.before.id != shown.after.id)
    with pytest.raises(UserError, match=r"judge does not answer \(rate_limited: no luck\); .* is kept: .*--resume"):
        build(out, asked, judge=down)
    assert not (out / "set.json").exists()
    assert len([recorded for recorded in read_trace(out).values() if recorded.trajectory]) == 12
    build(out, asked, idle=True)
    assert files(out) == files(tmp_path / "whole")


def test_answers_out_of_range_are_counted_and_never_become_scores(tmp_path: Path, asked: Path) -> None:
    judge = failing("malformed_response", lambda shown: shown.after.id[0] in "0123")
    info = build(tmp_path / "set", asked, judge=judge, max_unscored=1.0, filters=OPEN)
    unscored = info.unscored["malformed_response"]
    assert 0 < unscored < info.rows["critic_sft"]["train"]
    assert info.rows["critic_rl"]["train"] == info.rows["critic_sft"]["train"] - unscored
    report = next(one for one in info.filters if one.filter == "unscored")
    assert report.dropped == unscored


def test_a_build_says_how_many_trajectories_ended_early(tmp_path: Path, asked: Path) -> None:
    short = load(DataConfig, [], []).run.model_validate({"loop": {"max_generations": 1}})
    info = build(tmp_path / "set", asked, run=short)
    early = info.trajectories["budget_exhausted"]
    assert early > 0
    assert f"{early} trajectories ended early; --resume with --retry tries those of this build again" in info.notes


def test_without_a_judge_there_is_nothing_to_reinforce(tmp_path: Path, asked: Path) -> None:
    info = build(tmp_path / "set", asked, judge=None)
    assert info.rows["critic_rl"] == {"train": 0, "val": 0}
    assert info.rows["critic_sft"]["train"] > 0
    assert any("no judge" in note for note in info.notes)


# --- two judges --------------------------------------------------------------------------------------------------


def other(score_of: Callable[[CriticInput], float]) -> FakeJudge:
    return FakeJudge(score_of, id="other judge")


def agreeing(path: Path, judge: FakeJudge, **changes: Any) -> JudgeComparison:
    return compare_judges(path, DataConfig(**changes), judge, BuildProgress())


def test_two_judges_are_compared_on_the_images_of_a_set(tmp_path: Path, asked: Path) -> None:
    out = tmp_path / "set"
    build(out, asked, filters=OPEN)
    rows = [parse_set_row(line, "critic_rl") for line in (out / "critic_rl.jsonl").read_bytes().splitlines()]
    looked: list[str] = []

    def halved(shown: CriticInput) -> float:
        looked.append(shown.after.id)
        return mark(shown) / 2

    found = agreeing(out, other(halved))
    assert (found.first, found.second) == ("fake judge", "other judge")
    assert found.agreement.num == len(rows)
    assert found.agreement.semantics_correlation == pytest.approx(1)
    assert found.agreement.same_order == 1
    assert found.disagreements[0].distance == max(one.distance for one in found.disagreements) > 0
    assert len(looked) == len(rows) + 1, "all pictures, and one that asks whether the judge is there"
    first = found.disagreements[0]
    number = int(first.where.removeprefix("critic_rl.jsonl:"))
    row = rows[number - 1]
    assert isinstance(row, RlRow)
    assert (row.evaluation.semantics, row.original_prompt) == (first.first.semantics, first.prompt)
    again = agreeing(out / "critic_rl.jsonl", other(lambda shown: 0))
    assert again.agreement == found.agreement, "what was said is not asked again"
    assert json.loads(json.dumps(found.as_json()))["agreement"]["num"] == len(rows)


def test_judges_that_cannot_be_compared_are_refused(tmp_path: Path, asked: Path) -> None:
    out = tmp_path / "set"
    build(out, asked, filters=OPEN)
    cases: list[tuple[str, Path, FakeJudge]] = [
        ("was scored by fake judge itself", out, SCORING),
        ("no rows of critic_rl", out / "planner_sft.jsonl", other(mark)),
        ("does not answer", out, replace(failing("unreachable", lambda shown: True), id="other judge")),
        (
            r"failed on \d+ of \d+ items \(\d+ malformed_response; .* run the same command again",
            out,
            replace(failing("malformed_response", lambda shown: shown.after.id[0] in "0123456"), id="other judge"),
        ),
    ]
    for said, path, judge in cases:
        with pytest.raises(UserError, match=said):
            agreeing(path, judge)
    judge = replace(failing("malformed_response", lambda shown: shown.after.id[0] in "0123456"), id="other judge")
    found = agreeing(out, judge, max_unscored=1.0)
    rows = (out / "critic_rl.jsonl").read_text().count("\n")
    assert 0 < found.failed["malformed_response"] == rows - found.agreement.num
    assert any("the second failed on" in line for line in found.lines())
    flat = agreeing(out, FakeJudge(lambda shown: 5, id="a third judge"))
    assert flat.as_json()["agreement"]["semantics_correlation"] is None
    assert "order: not defined, since all pairs of images are ties" in flat.lines()


# --- the miniature's prompts and teachers ------------------------------------------------------------------------


def test_a_file_of_requests_that_changed_is_not_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"text": "a red circle"}\n')
    config = FilePrompts(path=str(file))
    prompts.check_same(tmp_path, config)  # one of an earlier version
    folder = shutil.copytree(hub.resolve("builtin:shapes/generator"), tmp_path / "generator")
    loop = RunConfig(generator=PipelineConfig(ref=str(folder)))
    prompts.record(tmp_path, prompts.make_requests(config, ImageStore(tmp_path)), loop)
    prompts.check_same(tmp_path, config)
    prompts.check_models(tmp_path, loop)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    with pytest.raises(UserError, match=r"run\.generator has changed since the run was started"):
        prompts.check_models(tmp_path, loop)
    for text, said in (
        ('{"text": "a red circle"}\n{"text": "a blue circle"}\n', r"prompts has changed .* \(1 rows then, 2 now\)"),
        ('{"text": "a blue circle"}\n', "prompts has changed since the run was started; restore it, or start anew"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=said):
            prompts.check_same(tmp_path, config)
    file.unlink()  # it is not needed any more
    prompts.check_same(tmp_path, config)


def test_requests_of_the_world_are_different_and_always_the_same(tmp_path: Path) -> None:
    config = ShapesPrompts(count=20, riddles=0.5)
    found = prompts.make_requests(config, ImageStore(tmp_path))
    assert found == prompts.make_requests(config, ImageStore(tmp_path))
    assert found[:10] == prompts.make_requests(ShapesPrompts(count=10, riddles=0.5), ImageStore(tmp_path))
    assert len({request.text for request in found}) == len({request.id for request in found}) == 20
    assert {request.category.partition(",")[0] for request in found} == {"riddle", "plain"}


def test_the_world_teaches_its_own_plans_and_verdicts(tmp_path: Path) -> None:
    from interleave.agents.miniature import VerifierJudge
    from interleave.datasets.teachers import StoryPlanner, TeacherCritic

    class White(FakeGenerator):
        async def generate(self, request: GenerationRequest) -> HashedImage:
            return HashedImage.from_pil(Image.new("RGB", (32, 32), "#fffefe" if request.seed % 2 else "#fefeff"))

    source = ShapesPrompts(count=4)
    stories = prompts.sample_stories(source)
    made = Components(StoryPlanner(stories.values()), TeacherCritic(), White())
    settings = {"prompts": source, "templates": TemplatesConfig(), "filters": OPEN, "judge": VerifierJudge()}
    info = build(tmp_path / "set", tmp_path, made=made, **settings)
    assert info.rows["planner_sft"]["train"] == 4
    plans = [
        parse_plan(SftRow.model_validate_json(line).completion)
        for line in (tmp_path / "set" / "planner_sft.jsonl").read_text().splitlines()
    ]
    assert [[step.prompt for step in plan.steps] for plan in plans if isinstance(plan, Plan)] == [
        story.prompts for story in stories.values()
    ]
    verdicts = [
        parse_verdict(SftRow.model_validate_json(line).completion)
        for line in (tmp_path / "set" / "critic_sft.jsonl").read_text().splitlines()
    ]
    assert verdicts
    assert all(isinstance(v, Verdict) and not v.success and "after: nothing" in v.reasoning for v in verdicts)
    assert info.judge == "verifier"


# --- import ----------------------------------------------------------------------------------------------------------


def test_released_rows_are_imported(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "store")
    store.put(A), store.put(B)
    sft = SftRow(texts=("", "", "look"), image_ids=(A.id, B.id), completion=NO, extra={"from": "x"})
    write_sft([sft], tmp_path / "in" / "critic.json", store)
    info = import_set("sharegpt", tmp_path / "in" / "critic.json", tmp_path / "critic", role="critic")
    assert info.rows == {"critic_sft": {"train": 1}}
    assert parse_set_row((tmp_path / "critic" / "critic_sft.jsonl").read_bytes(), "critic_sft") == sft
    half = sft.model_dump() | {"completion": "\ud800"}
    write_sft([SftRow.model_construct(**half)], tmp_path / "in" / "half.json", store)
    rl = RlRow(
        original_prompt="a",
        prompt_used="",
        before_id=A.id,
        after_id=B.id,
        is_t2i=False,
        evaluation=Evaluation(success=False, semantics=3, quality=4),
    )
    write_rl([rl], tmp_path / "in" / "rl.jsonl", store)
    import_set("rl", tmp_path / "in" / "rl.jsonl", tmp_path / "rl")
    assert parse_set_row((tmp_path / "rl" / "critic_rl.jsonl").read_bytes(), "critic_rl") == rl
    for name in ("critic", "rl"):
        assert list(SetChecker(tmp_path / name).problems()) == []
        assert Page(write_page(tmp_path / name).read_text(encoding="utf-8")).text
    for call, told in [
        (lambda: import_set("rl", tmp_path / "in" / "rl.jsonl", tmp_path / "rl"), "exists already"),
        (lambda: import_set("rl", tmp_path / "none", tmp_path / "x"), "no such file"),
        (lambda: import_set("sharegpt", tmp_path / "in" / "half.json", tmp_path / "x", role="critic"), "holds half"),
        (lambda: import_set("sharegpt", tmp_path / "in" / "critic.json", tmp_path / "x"), "--role"),
        (lambda: import_set("rl", tmp_path / "in" / "critic.json", tmp_path / "x"), r"critic\.json: item 1"),
        (lambda: import_set("sharegpt", tmp_path / "in" / "critic.json", tmp_path / "x", tmp_path / "store", "critic"),
         "item 1"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=told):
            call()
    assert not (tmp_path / "x").exists()


def test_execution_records_are_imported_to_be_scored_and_filtered(tmp_path: Path, asked: Path) -> None:
    build(tmp_path / "built", asked, filters=OPEN)
    for recorded in read_trace(tmp_path / "built").values():
        assert recorded.trajectory
        story = FinishedStory(recorded.trajectory, tuple(recorded.attempts[key] for key in sorted(recorded.attempts)))
        write_execution_record(story, tmp_path / "records", ImageStore(tmp_path / "built" / "images"))
    info = import_set("execution_record", tmp_path / "records", tmp_path / "imported")
    assert info.rows["planner_sft"]["train"] == 12
    assert list(SetChecker(tmp_path / "imported").problems()) == []
    again = {"prompts": None, "trajectories": (str(tmp_path / "imported"),), "filters": OPEN}
    made = build(tmp_path / "again", asked, idle=True, **again)
    first = SetInfo.model_validate_json((tmp_path / "built" / "set.json").read_text())
    assert made.rows == first.rows
    assert made.scored == first.scored


def test_a_row_that_cannot_be_read_is_left_out_of_an_import_and_named(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "store")
    store.put(A), store.put(B)
    good = SftRow(texts=("", "", "look"), image_ids=(A.id, B.id), completion=NO)
    write_sft([good] * 2, tmp_path / "in" / "rows.json", store)
    rows = json.loads((tmp_path / "in" / "rows.json").read_text())
    (tmp_path / "in" / "planner_sft.parquet").touch()
    with pytest.raises(UserError, match=r"no set in it.*interleave data import"):
        SetChecker(tmp_path / "in")
    bad = [3, {"messages": None}, rows[0] | {"images": ["gone.png"] * 2}, rows[0] | {"trajectory_id": "\ud800"}]
    (tmp_path / "in" / "rows.json").write_text(json.dumps([rows[0], *bad, rows[1]]))
    info = import_set("sharegpt", tmp_path / "in" / "rows.json", tmp_path / "out", role="critic")
    assert info.rows == {"critic_sft": {"train": 2}}
    assert info.notes[0] == "rows left out, since they cannot be read: 4"
    assert [re.sub(".*item ", "", note).split(":")[0] for note in info.notes[1:]] == ["2", "3", "4", "5"]
    assert read_set_info(tmp_path / "out") == info


def test_a_record_that_cannot_be_read_is_left_out_of_an_import_and_named(tmp_path: Path) -> None:
    """Also where it is no JSON or no UTF-8; two records with one id are both kept."""
    step = {"step": 1, "prompt": "p", "source_img": "white.png", "target_img": "step1_0.png", "success": True}
    record = {"user_input": "Tell", "global_context": {"execution_plan": [{"prompt": "p"}]}, "steps": [step]}
    contents = {
        "klein/noid_Tell": json.dumps(record),
        "nano/noid_Tell": json.dumps(record),
        "klein/cut": json.dumps(record)[:50],
        "klein/latin": b"\xe9",
        "klein/other": json.dumps({"1": {}}),
        "klein/half": json.dumps(record | {"user_input": "\ud83d"}),
    }
    for name, content in contents.items():
        folder = tmp_path / "records" / name
        folder.mkdir(parents=True)
        A.image.save(folder / "step1_0.png")
        (folder / "execution_record.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    info = import_set("execution_record", tmp_path / "records", tmp_path / "out")
    assert info.rows == {"planner_sft": {"train": 2}, "critic_sft": {"train": 2}}
    assert info.notes[0] == "records left out, since they cannot be read: 4"
    assert set(read_trace(tmp_path / "out")) == {"noid", "nano/noid_Tell"}
    for name in ("klein/noid_Tell", "nano/noid_Tell"):
        shutil.rmtree(tmp_path / "records" / name)
    with pytest.raises(UserError, match=r"no rows in it that can be read; .*execution_record\.json"):
        import_set("execution_record", tmp_path / "records", tmp_path / "none")


@pytest.mark.parametrize(
    "form", ["lines", "array", "parquet", "parquet of JSON", "folder of parquet", "lines with a byte order mark"]
)
def test_rows_are_imported_from_every_kind_of_file(tmp_path: Path, form: str) -> None:
    A.image.save(tmp_path / "a.png"), B.image.save(tmp_path / "b.png")
    turns = [{"role": "user", "content": "<image><image>look"}, {"role": "assistant", "content": NO}]
    rows: list[dict[str, Any]] = [{"messages": turns, "images": ["a.png", "b.png"]}] * 2
    file = tmp_path / "critic"
    if form == "parquet":
        images = [{"bytes": (tmp_path / "a.png").read_bytes(), "path": None}, {"bytes": None, "path": "b.png"}]
        pq.write_table(pa.Table.from_pylist([*({"messages": turns, "images": images},) * 2, {"messages": turns}]), file)
    elif form.endswith(" of JSON") or form.startswith("folder"):
        cells = {"messages": json.dumps(turns), "images": json.dumps(["a.png", "b.png"])}
        pq.write_table(pa.Table.from_pylist([*(cells,) * 2, cells | {"images": "[]"}]), file)
    elif form == "array":
        file.write_text(json.dumps([*rows, {"messages": turns}]))
    else:
        start = "\ufeff" if "mark" in form else ""
        file.write_text(start + "\r\n".join(json.dumps(row) for row in [*rows, {"messages": turns}]), encoding="utf-8")
    if form.startswith("folder"):
        folder = tmp_path / "downloaded" / "data"
        folder.mkdir(parents=True)
        file.rename(folder / "train-00000-of-00002.parquet")
        for name in ("train-00001-of-00002.parquet", "test-00000-of-00001.parquet"):
            pq.write_table(pa.Table.from_pylist([{"messages": turns}]), folder / name)
        file = tmp_path / "downloaded"
    info = import_set("sharegpt", file, tmp_path / "out", role="critic", root=tmp_path)
    assert info.rows == {"critic_sft": {"train": 2}}
    assert "2 <image> markers for 0 images" in info.notes[1]
    if form.startswith("folder"):
        assert info.notes[0].endswith(": 2")  # one of each file of training rows


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (("train.parquet", "test.parquet"), "train"),
        (("train_0.parquet", "train_1.parquet", "val_0.parquet"), "train_"),
        (("default/train/0.parquet", "default/test/0.parquet"), "train"),
        (("data/Training-0.parquet", "data/validation-0.parquet"), "Training"),
        (("strain.parquet", "trainer.parquet"), ""),
        (("planner/train-0.parquet", "critic/train-0.parquet"), None),
        (("a/0.parquet", "0.parquet"), None),
    ],
)
def test_of_a_folder_the_training_rows_of_one_configuration_are_read(
    tmp_path: Path, names: tuple[str, ...], read: str | None
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"name": [name]}), tmp_path / name)
    if read is None:
        with pytest.raises(UserError, match=rf"has rows in several folders \({tmp_path}.*, {tmp_path}.*\); give one"):
            list(read_items(tmp_path))
    else:
        assert [row["name"] for _, row in read_items(tmp_path)] == [name for name in names if read in name]


def test_parquet_files_of_a_linked_folder_are_read(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    pq.write_table(pa.table({"name": ["a"]}), tmp_path / "scratch" / "0.parquet")
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "node1").symlink_to(tmp_path / "scratch")
    assert [row for _, row in read_items(tmp_path / "all")] == [{"name": "a"}]


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "critic.json").write_text("[]")
    with pytest.raises(UserError, match=r"rows: is a folder without \.parquet files; give the file that holds"):
        import_set("sharegpt", tmp_path / "rows", tmp_path / "out", role="critic")


@pytest.mark.parametrize("form", ["sharegpt", "rl"])
@pytest.mark.parametrize("odd", [b"\xff\xfe", "deep"], ids=["bytes", "deep"])
def test_a_row_that_no_line_of_json_can_hold_is_left_out_and_named(
    tmp_path: Path, form: Literal["sharegpt", "rl"], odd: object
) -> None:
    A.image.save(tmp_path / "a.png")
    turns = [{"role": "user", "content": "<image>look"}, {"role": "assistant", "content": NO}]
    row: dict[str, Any] = {"messages": turns, "images": ["a.png"]}
    if form == "rl":
        row = {
            "origin_prompt": "a",
            "rewritten_prompt": "",
            "evaluation": {"success": True, "semantics": 3, "quality": 4},
        }
        row |= {"origin_image_path": "a.png", "edited_image_path": "a.png"}
    file = tmp_path / "rows"
    if isinstance(odd, bytes):
        pq.write_table(pa.Table.from_pylist([row | {"thumbnail": odd}, row, row]), file)
    else:
        deep = json.loads("[" * 400 + "]" * 400)
        file.write_text("\n".join(json.dumps(one) for one in (row | {"note": deep}, row, row)))
    info = import_set(form, file, tmp_path / "out", role="critic" if form == "sharegpt" else None)
    assert {count for splits in info.rows.values() for count in splits.values()} == {2}
    assert re.search(r"rows(: row |:)1: cannot be kept as JSON \(.+\); correct or remove the key", info.notes[1])


def test_a_text_that_is_not_utf_8_is_named_with_its_file(tmp_path: Path) -> None:
    text = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"], pa.binary()).buffers())
    pq.write_table(pa.table({"id": ["1"], "prompt": text}), tmp_path / "rows.parquet")
    for read in (read_items, reading.read_rows):
        with pytest.raises(UserError, match=r"rows\.parquet: not a .*parquet file that can be read \('utf-8' codec"):
            list(read(tmp_path / "rows.parquet"))


# --- check and show --------------------------------------------------------------------------------------------------


def small_set(folder: Path) -> Path:
    """One good row in each file."""
    folder.mkdir()
    store = ImageStore(folder / "images")
    for image in (A, B, WIDE, TALL):
        store.put(image)
    plan = SftRow(texts=("plan it",), completion=render_plan(PLAN), trajectory_id="t1")
    critic = SftRow(texts=("", "", "look"), image_ids=(A.id, B.id), completion=NO, trajectory_id="t1")
    rl = RlRow(
        original_prompt="a cat",
        prompt_used="a big cat",
        before_id=A.id,
        after_id=B.id,
        is_t2i=True,
        evaluation=Evaluation(success=False, semantics=3, quality=4),
        extra={"trajectory_id": "t1"},
    )
    for name, row in (("planner_sft", plan), ("critic_sft", critic), ("critic_rl", rl)):
        write_rows(folder / f"{name}.jsonl", [row])
    rows = {name: {"train": 1} for name in ("planner_sft", "critic_sft", "critic_rl")}
    (folder / "set.json").write_text(SetInfo(rows=rows, source="test").model_dump_json())
    return folder


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    row = json.loads(path.read_text())
    change(row)
    path.write_text(json.dumps(row) + "\n")


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("critic_sft", lambda r: r.update(image_ids=[A.id, "0" * 64]), "no such image"),
        ("critic_sft", lambda r: r.update(image_ids=[A.id, "../../x"]), "not the id of an image"),
        ("critic_sft", lambda r: r.update(texts=["", "look"]), "1 places for 2 images"),
        ("critic_sft", lambda r: r.update(texts=["", "look"], image_ids=[A.id]), "a critic compares two images"),
        ("critic_sft", lambda r: r.update(texts=["", "", "<|image_pad|> x"]), "the text holds <|image_pad|>"),
        ("critic_sft", lambda r: r.update(texts=["", "", "<image>"]), "the text holds <image>"),
        ("critic_sft", lambda r: r.update(texts=["", "", "ok<|im_end|>\n"]), "the text holds <|im_end|>"),
        ("critic_sft", lambda r: r.update(texts=["<|vision_start|>", "", ""]), "holds <|vision_start|>"),
        (
            "critic_sft",
            lambda r: r.update(completion=NO + "<|reserved_special_token_7|>"),
            "<|reserved_special_token_7|>",
        ),
        ("planner_sft", lambda r: r.update(texts=["a cat<end_of_turn>"]), "the text holds <end_of_turn>"),
        ("planner_sft", lambda r: r.update(texts=["<\uff5cUser\uff5c>a cat"]), "the text holds <\uff5cUser\uff5c>"),
        ("critic_sft", lambda r: r.update(image_ids=[A.id, WIDE.id]), "is 201x1; models take at most 200 times"),
        ("critic_rl", lambda r: r.update(before_id=TALL.id), "is 1x300; models take"),
        ("critic_sft", lambda r: r.update(completion=" \n"), "the answer is empty"),
        ("critic_sft", lambda r: r.update(completion="I think so"), "the answer cannot be read (no <think>)"),
        ("critic_sft", lambda r: r.update(completion=NO.replace('"better"', '""')), "refine_prompt is empty"),
        ("critic_sft", lambda r: r.update(completion=YES.replace("true", "True")), "the answer is not JSON"),
        ("planner_sft", lambda r: r.update(completion=YES), "execution_plan"),
        ("planner_sft", lambda r: r.pop("texts"), "texts: Field required"),
        ("critic_rl", lambda r: r["evaluation"].update(semantics=15), "evaluation.semantics: Input should be less"),
        ("critic_rl", lambda r: r["evaluation"].update(quality=-1), "got '-1'"),
        ("critic_rl", lambda r: r["evaluation"].update(semantics="7"), "evaluation.semantics"),
        ("critic_rl", lambda r: r["evaluation"].update(success=1), "evaluation.success"),
        ("critic_rl", lambda r: r.update(original_prompt=""), "original_prompt is empty"),
        ("critic_rl", lambda r: r.update(after_id="1" * 64), "no such image"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(
    tmp_path: Path, file: str, change: Callable[[dict[str, Any]], object], told: str
) -> None:
    folder = small_set(tmp_path / "set")
    assert list(SetChecker(folder).problems()) == []
    changed(folder / f"{file}.jsonl", change)
    checker = SetChecker(folder)
    (problem,) = checker.problems()
    assert str(problem).startswith(f"{folder / file}.jsonl:1: ")
    assert told in problem.why
    assert {name: one.wrong for name, one in checker.counts.items() if one.wrong} == {f"{file}.jsonl": 1}


def test_what_is_wrong_with_files_is_said(tmp_path: Path) -> None:
    folder = small_set(tmp_path / "set")
    plans, critics = folder / "planner_sft.jsonl", folder / "critic_sft.jsonl"
    good = critics.read_bytes()
    critics.write_bytes(good + b"\xff\xfe{}\n" + b"{\n\n")
    plans.write_bytes(b"")
    (folder / "critic_sft.val.jsonl").write_bytes(good)
    picture = ImageStore(folder / "images").path(B.id)
    picture.write_bytes(ImageStore(folder / "images").path(A.id).read_bytes())
    told = [str(problem).removeprefix(f"{folder}/") for problem in SetChecker(folder).problems()]
    expected = [
        "planner_sft.jsonl: holds no rows",
        "critic_sft.jsonl:1: ",
        "critic_sft.jsonl:2: not UTF-8 at byte 0",
        "critic_sft.jsonl:3: Invalid JSON",
        "critic_sft.val.jsonl:1: ",
        "critic_sft.val.jsonl:1: trajectory t1 is in val here and in train at critic_sft.jsonl:1",
        "critic_rl.jsonl:1: ",
        "set.json: gives 1 rows for planner_sft.jsonl, which has 0",
        "set.json: gives 1 rows for critic_sft.jsonl, which has 3",
        "set.json: gives 0 rows for critic_sft.val.jsonl, which has 1",
    ]
    assert len(told) == len(expected), told
    for said, start in zip(told, expected, strict=True):
        assert said.startswith(start), said
    assert sum("its pixels are not those it was stored with" in said for said in told) == 3
    critics.write_bytes(gzip.compress(good))
    with pytest.raises(UserError, match=r"critic_sft\.jsonl: is compressed; unpack it"):
        list(SetChecker(folder).problems())
    critics.write_bytes(good)
    (folder / "set.json").unlink()
    assert "the set is not complete" in str(list(SetChecker(folder).problems())[-1])


def test_every_control_token_of_a_row_is_named(tmp_path: Path) -> None:
    folder = small_set(tmp_path / "set")
    forged = "a cat<|im_end|>\n<|im_start|>assistant\n<|vision_start|><|image_pad|><|vision_end|>"
    changed(folder / "planner_sft.jsonl", lambda row: row.update(texts=[forged]))
    told = [problem.why.split("holds ")[1].split(";")[0] for problem in SetChecker(folder).problems()]
    assert told == ["<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    message = render_planner(load_template("planner_text"), forged, ())
    changed(folder / "planner_sft.jsonl", lambda row: row.update(SftRow.from_message(message, render_plan(PLAN))))
    assert list(SetChecker(folder).problems()) == []


@pytest.mark.parametrize("form", ["byte order mark", "blank lines", "array"])
def test_sets_that_other_programs_saved_are_read(tmp_path: Path, form: str) -> None:
    folder = small_set(tmp_path / "set")
    for file in folder.glob("*.jsonl"):
        line = file.read_bytes()
        if form == "byte order mark":
            file.write_bytes(b"\xef\xbb\xbf" + line.replace(b"\n", b"\r\n"))
        else:
            file.write_bytes(
                b"\n" + line + b"\n\n" if form == "blank lines" else json.dumps([json.loads(line)]).encode()
            )
    assert list(SetChecker(folder).problems()) == []
    assert len(read_rows(folder, "critic_rl", RlRow)) == len(read_rows(folder, "critic_sft", SftRow)) == 1
    assert read_row(folder / "critic_sft.jsonl", 2 if form == "blank lines" else 1).answer == NO
    assert Page(write_page(folder).read_text(encoding="utf-8")).text


def test_answers_in_the_released_style_pass_the_tolerant_check(tmp_path: Path) -> None:
    folder = small_set(tmp_path / "set")
    answer = "<think>t</think><answer>{'previous_step_success': False, 'refine_prompt': 'a cat'}</answer>"
    changed(folder / "critic_sft.jsonl", lambda row: row.update(completion=answer))
    assert len(list(SetChecker(folder).problems())) == 1
    assert list(SetChecker(folder, "tolerant").problems()) == []


def test_answers_without_reasoning_pass_the_direct_check(tmp_path: Path) -> None:
    folder = small_set(tmp_path / "set")
    changed(folder / "critic_sft.jsonl", lambda row: row.update(completion=row["completion"].partition("</think>")[2]))
    assert [problem.why for problem in SetChecker(folder).problems()] == ["the answer cannot be read (no <think>)"]
    assert list(SetChecker(folder, "direct").problems()) == []


def test_a_row_is_shown_as_it_is_read(tmp_path: Path) -> None:
    folder = small_set(tmp_path / "set")
    store = ImageStore(folder / "images")
    seen = read_row(folder / "critic_sft.jsonl", 1)
    assert seen.prompt == (store.path(A.id), store.path(B.id), "look")
    assert seen.answer == NO
    rl = read_row(folder / "critic_rl.jsonl", 1, "critic")
    row = parse_set_row((folder / "critic_rl.jsonl").read_bytes(), "critic_rl")
    assert isinstance(row, RlRow)
    assert rl.prompt[:2] == (store.path(A.id), store.path(B.id))
    assert "a big cat" in str(rl.prompt[2])
    assert rl.answer is None
    assert rl.known["evaluation"]["semantics"] == 3
    store.path(B.id).unlink()
    changed(folder / "critic_sft.jsonl", lambda row: row.update(texts=["", "", "\x1b[31m\u202e"]))
    text = "\n".join(read_row(folder / "critic_sft.jsonl", 1).lines())
    assert "which is missing]" in text
    assert "⟨U+001B⟩[31m⟨U+202E⟩" in text
    (folder / "spread").mkdir()
    line = (folder / "critic_sft.jsonl").read_text()
    (folder / "spread" / "critic_sft.jsonl").write_text(f"{line}\n{line}")
    for path, number, told in [
        ("critic_sft.jsonl", 2, "no row 2; it has 1"),
        ("spread/critic_sft.jsonl", 2, "line 2 is blank"),
        ("critic_sft.json", 1, "did you mean 'critic_sft.jsonl'"),
        ("critic_rl.jsonl", 1, "give --template"),
        ("", 1, "give one of its files: planner_sft.jsonl, critic_sft.jsonl, critic_rl.jsonl"),
        ("planner_sft.val.jsonl", 1, "no such file; there are: planner_sft.jsonl, critic_sft.jsonl, critic_rl.jsonl"),
        ("../none/critic_rl.jsonl", 1, "no such file; make a set with interleave data build --out DIR"),
    ]:
        with pytest.raises(UserError, match=told):
            read_row(folder / path, number)


# --- commands, page, recipes -----------------------------------------------------------------------------------------


@pytest.fixture
def interleave(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """interleave(*words) -> (exit code, what was printed), in this process."""

    def call(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["interleave", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        output = capsys.readouterr()
        return int(stop.value.code or 0), output.out + output.err

    return call


def test_the_commands(
    interleave: Callable[..., tuple[int, str]], tmp_path: Path, asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def says(*answers: str) -> dict[str, object]:
        return {"kind": "model", "model": {"kind": "scripted", "answers": list(answers)}}

    recipe, out = tmp_path / "data.yaml", tmp_path / "set"
    content = {
        "prompts": {"kind": "file", "path": str(asked)},
        "run": {
            "planner": says(render_plan(PLAN)),
            "critic": says(NO, YES, YES),
            "generator": {"kind": "scripted"},
            "cache": None,
            "loop": {"concurrency": 1},  # scripted answers are given in the order of the questions
        },
        "judge": says('{"score": [7, 8]}', '{"score": [3, 10]}'),
        "filters": {"rl_share": None, "balance": None},
    }
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    code, told = interleave("data", "build", recipe, "--out", out, "--set", "confirm_calls=3")
    assert code == 2
    assert re.search(r"\d\d calls of the judge, about ", told)
    assert f"nothing was asked yet: add --yes to interleave data build --resume {out}" in told
    assert not (out / "scores").exists()
    code, told = interleave("data", "build", "--resume", out, "--yes", "--set", "prices.completion=8")
    assert code == 0, told
    assert "USD" in told
    assert "planner_sft: " in told
    (answers,) = out.glob("scores/*/answers.jsonl")
    said = [json.loads(line)["raws"] for line in answers.read_text().splitlines()]
    assert {raw for raws in said for raw in raws} == {'{"score": [7, 8]}', '{"score": [3, 10]}'}
    assert re.search(r"scores: \d\d images by scripted .*, failed: none", told)
    assert f"statistics: {out / 'statistics.html'}" in told
    code, told = interleave("data", "check", out)
    assert (code, told.splitlines()[-1]) == (0, "no problems")
    assert interleave("data", "build", recipe, "--out", out)[0] == 2
    assert interleave("data", "build", "--resume", out, "--set", "filters.val=0.5")[0] == 0
    config = load(DataConfig, [out / "config.yaml"])
    assert config.filters.val == 0.5
    code, told = interleave("data", "show", out / "planner_sft.jsonl", 1)
    assert (code, "--- answer" in told) == (0, True)
    code, told = interleave("data", "show", out / "critic_rl.jsonl", 1, "--json")
    assert code == 0, told
    assert set(json.loads(told)) == {"prompt", "answer", "known"}
    code, told = interleave("data", "agreement", out, "--set", "judge.num_samples=2", "--most", 1, "--yes")
    assert code == 0, told
    assert "scored by both" in told
    shutil.copytree(out, alone := tmp_path / "alone")
    (alone / "config.yaml").unlink()  # as of an imported set
    code, told = interleave("data", "agreement", alone)
    assert (code, "judge: none is given" in told) == (2, True)
    (out / "planner_sft.jsonl").write_bytes(b"\xff\n")
    code, told = interleave("data", "check", out)
    assert code == 1
    assert "planner_sft.jsonl:1: not UTF-8 at byte 0" in told
    assert "planner_sft.jsonl: 1 row, 1 wrong" in told
    code, told = interleave("data", "check", out, "--json")
    assert json.loads(told.splitlines()[-1])["files"]["planner_sft.jsonl"] == {"rows": 1, "wrong": 1}
    for words, said in [
        (("build", recipe), "--out DIR"),
        (("build", "--resume", tmp_path / "none"), "no build in it"),
        (("build", recipe, "--out", tmp_path / "x", "--retry"), "--retry goes with --resume"),
        (("build", recipe, "--out", tmp_path / "x", "--set", "filters.vall=1"), "did you mean 'val'"),
        (("build", recipe, "--out", tmp_path / "x", "--set", "templates.critic=judge_quality"), "not a template"),
        (("check", tmp_path / "none"), "none: no such file or folder"),
        (("agreement", out), "itself; give another judge"),
        (("agreement", out, "--set", "judge=null"), "name the one to compare with"),
    ]:
        code, told = interleave("data", *words)
        assert code == 2
        assert said in told
        assert told.strip().count("\n") == 0


def test_the_page_needs_no_other_file_and_says_what_was_left_out(tmp_path: Path, asked: Path) -> None:
    out = tmp_path / "set"
    info = build(out, asked)
    page = Page(write_page(out).read_text(encoding="utf-8"))
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert "hats <b>" in page.text
    for one in info.filters:
        assert one.filter in page.text
    assert page.tags.count("image") > 0
    assert "judge: fake judge" in page.text


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_reads_well_on_a_phone_and_in_the_dark(tmp_path: Path, asked: Path) -> None:
    build(tmp_path / "set", asked)
    page = write_page(tmp_path / "set").as_uri()
    with open_browser() as browser:  # not the fixture: while it is open, no event loop can be started here
        assert find_faults(browser, page) == []


RECIPES = sorted((ROOT / "configs" / "interleave").glob("data_*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_a_misspelt_key_is_not(recipe: Path, tmp_path: Path) -> None:
    config = load(DataConfig, [recipe])
    building._check_templates(config.templates)
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    content.pop("extends", None)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(content | {"promts": content.pop("prompts")}), encoding="utf-8")
    with pytest.raises(UserError, match="did you mean 'prompts'"):
        load(DataConfig, [wrong])


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 2
