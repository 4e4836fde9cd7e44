import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imgen_common.errors import UserError
from imgen_common.images import content_hash, decode
from interleave.agents.parsing import parse_plan, parse_verdict
from interleave.agents.prompts import load_template, render_critic, render_planner
from interleave.datasets.formats.execution import read_execution_record, write_execution_record
from interleave.datasets.formats.sequences import write_interleaved
from interleave.datasets.formats.training import read_rl, read_sft, write_rl, write_sft
from interleave.datasets.formats.ueval import (
    UevalAnswer,
    read_ueval,
    read_ueval_record,
    ueval_answer,
    write_ueval,
    write_ueval_record,
)
from interleave.datasets.rows import (
    Evaluation,
    FinishedStory,
    RlRow,
    SftRow,
    make_critic_row,
    make_planner_row,
    make_rl_row,
)
from interleave.protocols import CriticInput, HashedImage
from interleave.records import (
    Attempt,
    GeneratorInfo,
    Plan,
    PlannerRecord,
    PlanStep,
    Request,
    Scores,
    Spent,
    Trajectory,
    Verdict,
)
from interleave.storage.images import ImageStore


def noise(seed: int) -> HashedImage:
    return HashedImage.from_pil(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)))


WHITE = HashedImage.from_pil(Image.new("RGB", (4, 3), "white"))
A, B, C, D = (noise(seed) for seed in range(4))
texts = st.text(max_size=20).filter(lambda text: text != "None")  # which stands for null in these files
plain = texts.filter(lambda text: "<image>" not in text)
values = st.recursive(st.none() | st.booleans() | st.integers() | texts, lambda inner: st.lists(inner, max_size=2))


@pytest.fixture(autouse=True, scope="module")
def unsynced() -> Iterator[None]:
    """Waiting for the disk a thousand times is slow, and no test here cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    store = ImageStore(tmp_path_factory.mktemp("store"))
    for picture in (WHITE, A, B, C, D):
        store.put(picture)
    return store


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """A new folder at each call."""
    return lambda: tmp_path_factory.mktemp("files")


def save(picture: HashedImage, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.image.save(path)
    return str(path)


def with_pixels(value: Any, base: Path) -> Any:
    """A file's content with the hash of its pixels instead of every image's name."""
    if isinstance(value, list):
        return [with_pixels(item, base) for item in value]
    if isinstance(value, dict):
        return {key: with_pixels(item, base) for key, item in value.items()}
    if isinstance(value, str) and value.endswith(".png") and (base / value).is_file():
        return content_hash(decode(base / value))
    return value


def load(file: Path) -> Any:
    return with_pixels(json.loads(file.read_text()), file.parent)


def load_lines(file: Path) -> Any:
    return [with_pixels(json.loads(line), file.parent) for line in file.read_text().splitlines()]


# --- a story of ours -------------------------------------------------------------------------------------------------


def attempt(
    step: int, number: int, seed: int, before: HashedImage, after: HashedImage, verdict: bool, **more: Any
) -> Attempt:
    used = more.pop("used", f"prompt {step}")
    return Attempt(
        **{
            "trajectory_id": "../s 1",
            "step": step,
            "attempt": number,
            "op": "t2i" if before is WHITE else "edit",
            "source_ids": () if before is WHITE else (before.id,),
            "before_id": before.id,
            "original_prompt": f"prompt {step}",
            "prompt_used": used,
            "seed": seed,
            "generator": GeneratorInfo(id="imported"),
            "image_id": after.id,
            "verdict": verdict,
            "refined_prompt": used if verdict else f"{used}, better",
            "reasoning": f"why {step}.{number} </think>",
            "critic_tries": 1,
            "status": "accepted" if verdict else "rejected",
        }
        | more
    )


SCORES = Scores(semantics=7, quality=8.5, judge_id="judge", num_samples=2)


def our_story() -> FinishedStory:
    plan = Plan(
        steps=(
            PlanStep(index=1, name="one", instruction="do one", prompt="prompt 1", text="Once."),
            PlanStep(index=2, name="words", text="Then <plan> nothing."),
            PlanStep(index=3, name="two", prompt="prompt 3"),
        ),
        reasoning="three steps </gthink>",
    )
    attempts = (
        attempt(1, 1, 100, WHITE, A, False, scores=SCORES),
        attempt(1, 2, 200, WHITE, B, True, used="prompt 1, better", scores=SCORES),
        attempt(3, 1, 300, B, C, True),
    )
    trajectory = Trajectory(
        id="../s 1",
        request=Request(id="../s 1", text="Tell a <image> story, Käse!"),
        planner=PlannerRecord(model="qwen", template="t", template_hash="h", raw="<think></think>"),
        plan=plan,
        selected={1: 2, 3: 1},
        status="complete",
    )
    return FinishedStory(trajectory, attempts)


def story_with_image() -> FinishedStory:
    """A story that begins with an image of the user's."""
    story = our_story()
    first = attempt(1, 1, 100, D, A, True)
    request = story.trajectory.request.model_copy(update={"image_ids": (D.id,)})
    selected = {1: 1, 3: 1}
    trajectory = story.trajectory.model_copy(update={"request": request, "selected": selected})
    return FinishedStory(trajectory, (first, attempt(3, 1, 300, A, C, True)))


# --- supervised rows -------------------------------------------------------------------------------------------------


def test_supervised_rows_are_what_runs_read_and_answer(store: ImageStore) -> None:
    story = story_with_image()
    row = make_planner_row(story, load_template("planner_text"), load_template("planner_images"))
    assert row is not None
    assert row.message(store.get) == render_planner(load_template("planner_images"), story.trajectory.request.text, [D])
    plan = parse_plan(row.completion)
    assert isinstance(plan, Plan)
    assert plan.steps == story.trajectory.plan.steps  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["critic", "critic_story", "shapes_critic"])
def test_critic_rows_show_what_the_critic_saw(store: ImageStore, name: str) -> None:
    story = our_story()
    made = (make_critic_row(story, attempt, load_template(name)) for attempt in story.judged_attempts())
    rows = [row for row in made if row is not None]
    text, once, nothing = story.trajectory.request.text, ("Once.", B), ("Then <plan> nothing.", None)
    looks = [
        CriticInput(WHITE, A, "prompt 1", "prompt 1", text),
        CriticInput(WHITE, B, "prompt 1", "prompt 1, better", text),
        CriticInput(B, C, "prompt 3", "prompt 3", text, (once, nothing)),
    ]
    assert [row.message(store.get) for row in rows] == [render_critic(load_template(name), look) for look in looks]
    verdicts = [parse_verdict(row.completion) for row in rows]
    assert all(isinstance(verdict, Verdict) for verdict in verdicts)
    assert [(v.success, v.refined_prompt) for v in verdicts if isinstance(v, Verdict)] == [
        (False, "prompt 1, better"),
        (True, "prompt 1, better"),
        (True, "prompt 3"),
    ]


def test_a_failure_without_a_new_prompt_teaches_nothing() -> None:
    story = our_story()
    mute = story.attempts[0].model_copy(update={"refined_prompt": " "})
    changed = FinishedStory(story.trajectory, (mute, *story.attempts[1:]))
    rows = [make_critic_row(changed, attempt, load_template("critic")) for attempt in changed.judged_attempts()]
    assert [row is None for row in rows] == [True, False, False]


def test_a_story_without_a_plan_gives_no_planner_row() -> None:
    story = our_story()
    failed = FinishedStory(story.trajectory.model_copy(update={"plan": None, "status": "planner_failed"}), ())
    assert make_planner_row(failed, load_template("planner_text"), load_template("planner_images")) is None


def test_files_of_supervised_rows_lose_nothing(tmp_path: Path, store: ImageStore) -> None:
    items = [
        {
            "messages": [{"role": "user", "content": "plan <x>"}, {"role": "assistant", "content": "<think>"}],
            "images": [],
        },
        {
            "messages": [
                {"role": "user", "content": "<image><image>\nlook\n"},
                {"role": "assistant", "content": "Käse <image>"},
            ],
            "images": ["data/a.png", save(B, tmp_path / "b.png")],
            "source": {"id": [1, None]},
        },
        {
            "messages": [{"role": "user", "content": "x<image>y"}, {"role": "assistant", "content": ""}],
            "images": ["b.png"],
        },
    ]
    save(A, tmp_path / "data" / "a.png")
    file, again = tmp_path / "planner_sft.json", tmp_path / "out" / "again.json"
    file.write_text(json.dumps(items))
    rows = list(read_sft(file, tmp_path, store))
    assert rows[1].message(store.get) == (A, B, "\nlook\n")
    assert rows[2].message(store.get) == ("x", B, "y")
    write_sft(rows, again, store)
    assert load(again) == load(file)
    assert list(read_sft(again, again.parent, store)) == rows


def test_the_older_form_of_sharegpt_is_read(tmp_path: Path, store: ImageStore) -> None:
    turns = [{"from": "human", "value": "x<image>y"}, {"from": "gpt", "value": "z"}]
    (tmp_path / "f.json").write_text(json.dumps([{"conversations": turns, "images": [save(A, tmp_path / "a.png")]}]))
    (row,) = read_sft(tmp_path / "f.json", tmp_path, store)
    assert (row.texts, row.image_ids, row.completion) == (("x", "y"), (A.id,), "z")


@pytest.mark.parametrize("images", [{"image": "a.png"}, {"image": ["a.png"]}, {"images": "a.png"}])
def test_the_one_image_of_llavas_items_is_read(images: dict[str, Any], tmp_path: Path, store: ImageStore) -> None:
    save(A, tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nx"}, {"from": "gpt", "value": "z"}]
    words = {"conversations": [{"from": "human", "value": "x"}, turns[1]], "image": ""}
    (tmp_path / "f.json").write_text(json.dumps([{"id": "1", "conversations": turns, **images}, words]))
    row, other = read_sft(tmp_path / "f.json", tmp_path, store)
    assert (row.texts, row.image_ids, other.image_ids) == (("", "\nx"), (A.id,), ())


@settings(max_examples=25)
@given(
    st.lists(plain, min_size=1, max_size=3), texts, st.none() | texts, st.dictionaries(st.sampled_from("xyz"), values)
)
def test_our_supervised_rows_survive_a_file(
    fresh: Callable[[], Path],
    store: ImageStore,
    around: list[str],
    completion: str,
    trajectory_id: str | None,
    extra: dict[str, Any],
) -> None:
    image_ids = tuple(picture.id for picture in (A, B)[: len(around) - 1])
    row = SftRow(
        texts=tuple(around), image_ids=image_ids, completion=completion, trajectory_id=trajectory_id, extra=extra
    )
    file = fresh() / "rows.json"
    write_sft([row], file, store)
    assert list(read_sft(file, file.parent, store)) == [row]


# --- reinforcement rows ----------------------------------------------------------------------------------------------


def test_files_of_reinforcement_rows_lose_nothing(tmp_path: Path, store: ImageStore) -> None:
    lines = [
        {
            "origin_prompt": "a cat",
            "rewritten_prompt": None,
            "origin_image_path": save(WHITE, tmp_path / "data" / "interleave" / "white.png"),
            "edited_image_path": "a.png",
            "evaluation": {"success": True, "semantics": 10, "quality": 0.5, "note": "n"},
        },
        {
            "origin_prompt": "Käse",
            "rewritten_prompt": "better",
            "origin_image_path": "a.png",
            "edited_image_path": save(B, tmp_path / "b.png"),
            "evaluation": {"success": False, "semantics": 0, "quality": 3},
            "split": ["x"],
        },
    ]
    save(A, tmp_path / "a.png")
    file, again = tmp_path / "rl.jsonl", tmp_path / "out" / "again.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    rows = list(read_rl(file, tmp_path, store))
    assert [row.is_t2i for row in rows] == [True, False]
    write_rl(rows, again, store)
    lines[0]["rewritten_prompt"] = ""
    expected = [with_pixels(line, tmp_path) for line in lines]
    assert load_lines(again) == expected
    paths = [json.loads(line)["origin_image_path"] for line in again.read_text().splitlines()]
    assert ["data/interleave/white.png" in path for path in paths] == [True, False]
    assert list(read_rl(again, again.parent, store)) == rows


def test_scored_attempts_become_reinforcement_rows(tmp_path: Path, store: ImageStore) -> None:
    made = map(make_rl_row, our_story().judged_attempts())
    rows = [row for row in made if row is not None]
    assert [(r.prompt_used, r.is_t2i, r.evaluation.success, r.evaluation.semantics) for r in rows] == [
        ("prompt 1", True, False, 7),
        ("prompt 1, better", True, True, 7),
    ]
    file = tmp_path / "rl.jsonl"
    write_rl(rows, file, store)
    again = list(read_rl(file, tmp_path, store))
    assert again == rows
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    table = [line | {"evaluation": json.dumps(line["evaluation"])} for line in lines]  # without nested columns
    file.write_text("".join(json.dumps(line) + "\n" for line in table))
    assert list(read_rl(file, tmp_path, store)) == rows
    look = CriticInput(WHITE, A, "prompt 1", "prompt 1")
    assert render_critic(load_template("critic"), again[0].critic_input(store.get)) == render_critic(
        load_template("critic"), look
    )


@settings(max_examples=25)
@given(texts, texts, st.booleans(), st.booleans(), st.floats(0, 10), st.dictionaries(st.sampled_from("xyz"), values))
def test_our_reinforcement_rows_survive_a_file(
    fresh: Callable[[], Path],
    store: ImageStore,
    prompt: str,
    used: str,
    is_t2i: bool,
    success: bool,
    score: float,
    extra: dict[str, Any],
) -> None:
    row = RlRow(
        original_prompt=prompt,
        prompt_used=used,
        before_id=(WHITE if is_t2i else A).id,
        after_id=B.id,
        is_t2i=is_t2i,
        evaluation=Evaluation(success=success, semantics=score, quality=10 - score),
        extra=extra,
    )
    file = fresh() / "rl.jsonl"
    write_rl([row], file, store)
    assert list(read_rl(file, file.parent, store)) == [row]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"semantics": 15}, "evaluation.semantics"),
        ({"semantics": "7"}, "evaluation.semantics"),
        ({"quality": -1}, "evaluation.quality"),
        ({"quality": True}, "evaluation.quality"),
        ({"success": 1}, "evaluation.success"),
    ],
)
def test_an_impossible_evaluation_is_named(
    tmp_path: Path, store: ImageStore, change: dict[str, Any], said: str
) -> None:
    save(A, tmp_path / "a.png")
    evaluation = {"success": True, "semantics": 1, "quality": 1}
    good = {"origin_prompt": "", "rewritten_prompt": "", "origin_image_path": "a.png", "edited_image_path": "a.png"}
    lines = [good | {"evaluation": evaluation}, good | {"evaluation": evaluation | change}]
    file = tmp_path / "rl.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=rf"rl\.jsonl:2: {said}"):
        list(read_rl(file, tmp_path, store))


# --- execution records -----------------------------------------------------------------------------------------------


@st.composite
def execution_records(draw: st.DrawFn) -> tuple[dict[str, Any], list[tuple[str, HashedImage]]]:
    """A record as the reference's data construction writes it, and its images; the last step may be unfinished."""
    start, count = draw(st.integers(0, 3)), draw(st.integers(1, 3))
    plan = [
        {
            "step_number": start + index,
            "step_name": draw(texts),
            "instruction": draw(st.none() | texts),
            "prompt": draw(texts.filter(str.strip)),
            "auxiliary_text": draw(st.sampled_from([None, "None", "caption"])),
        }
        | draw(st.sampled_from([{}, {"hint": 3}]))
        for index in range(count)
    ]
    context = {"execution_plan": plan} | draw(st.sampled_from([{}, {"reasoning": "r"}, {"reasoning": ""}, {"x": [1]}]))
    pictures: list[tuple[str, HashedImage]] = [("white.png", draw(st.sampled_from([WHITE, D])))]
    source, flag, steps = "white.png", 0, []
    for index, item in enumerate(plan, 1):
        num_failures = draw(st.integers(0, 2))
        finished = index < count or draw(st.booleans())
        for number in range(num_failures + finished):
            success = number == num_failures
            target = f"step{index}_{flag}.png"
            pictures.append((target, noise(draw(st.integers(10, 10**6)))))
            steps.append(
                {
                    "step": index,
                    "prompt": item["prompt"],
                    "refine_prompt": "" if success else draw(texts),
                    "source_img": source,
                    "target_img": target,
                    "success": success,
                    "reasoning": draw(texts),
                }
            )
            flag += 2 * draw(st.integers(1, 2))
        source = steps[-1]["target_img"] if finished else source
    return {"user_input": draw(texts), "global_context": context, "steps": steps}, pictures


@pytest.mark.slow
@settings(max_examples=40)
@given(execution_records())
def test_execution_records_lose_nothing(
    fresh: Callable[[], Path], written: tuple[dict[str, Any], list[tuple[str, HashedImage]]]
) -> None:
    record, pictures = written
    folder, store = fresh() / "12_some_story", ImageStore(fresh())
    for name, picture in pictures:
        save(picture, folder / name)
    file = folder / "execution_record.json"
    file.write_text(json.dumps(record))
    story = read_execution_record(file, folder.parent, store)
    again = write_execution_record(story, fresh(), store)
    assert load(again) == load(file)
    assert [step["target_img"] for step in json.loads(again.read_text())["steps"]] == [
        step["target_img"] for step in record["steps"]
    ]
    assert read_execution_record(again, again.parent, store) == story


def test_the_prompt_used_is_the_one_proposed_before(tmp_path: Path) -> None:
    record = {
        "user_input": "Tell it!",
        "global_context": {"execution_plan": [plan_item(1), plan_item(2)], "reasoning": "r"},
        "steps": [
            judged(1, 0, "white.png", False, "p1b"),
            judged(1, 2, "white.png", False, ""),
            judged(1, 4, "white.png", True, ""),
            judged(2, 6, "step1_4.png", False, "p2b"),
        ],
    }
    folder = tmp_path / "7_Tell_it_"
    for name, picture in {"white": WHITE, "step1_0": A, "step1_2": B, "step1_4": C, "step2_6": D}.items():
        save(picture, folder / f"{name}.png")
    (folder / "execution_record.json").write_text(json.dumps(record))
    story = read_execution_record(folder / "execution_record.json", tmp_path, ImageStore(tmp_path / "s"))
    assert [(a.step, a.attempt, a.op, a.prompt_used, a.refined_prompt, a.seed) for a in story.attempts] == [
        (1, 1, "t2i", "p1", "p1b", 0),
        (1, 2, "t2i", "p1b", "", 2),
        (1, 3, "t2i", "p1", "p1", 4),
        (2, 1, "edit", "p2", "p2b", 6),
    ]
    assert story.trajectory.id == "7"
    assert story.trajectory.selected == {1: 3}
    assert story.trajectory.status == "budget_exhausted"
    assert story.trajectory.request == Request(id="7", text="Tell it!")
    assert story.attempts[3].source_ids == (C.id,)


def plan_item(number: int) -> dict[str, Any]:
    return {
        "step_number": number,
        "step_name": "",
        "instruction": None,
        "prompt": f"p{number}",
        "auxiliary_text": None,
    }


def judged(step: int, flag: int, source: str, success: bool, refined: str) -> dict[str, Any]:
    return {
        "step": step,
        "prompt": f"p{step}",
        "refine_prompt": refined,
        "source_img": source,
        "target_img": f"step{step}_{flag}.png",
        "success": success,
        "reasoning": "",
    }


def story_with_long_words() -> FinishedStory:
    """80 of its letters, as the names of folders have them, are 240 bytes."""
    story, name = our_story(), "storybook-zh-000017"
    request = story.trajectory.request.model_copy(update={"id": name, "text": "步" * 90})
    trajectory = story.trajectory.model_copy(update={"id": name, "request": request})
    return FinishedStory(trajectory, tuple(a.model_copy(update={"trajectory_id": name}) for a in story.attempts))


@pytest.mark.parametrize("make", [our_story, story_with_image, story_with_long_words])
def test_our_stories_survive_an_execution_record(
    tmp_path: Path, store: ImageStore, make: Callable[[], FinishedStory]
) -> None:
    story = make()
    file = write_execution_record(story, tmp_path / "records", store)
    assert file.parent.parent == tmp_path / "records"
    again = read_execution_record(file, tmp_path, store)
    assert again.attempts == tuple(a.model_copy(update={"scores": None}) for a in story.attempts)
    kept = {"planner", "spent"}
    assert again.trajectory.model_dump(exclude=kept) == story.trajectory.model_dump(exclude=kept)
    assert again.trajectory.spent == Spent(
        generations=len(story.attempts), critic_calls=len(story.attempts), planner_calls=1
    )


def test_what_an_execution_record_would_tell_wrong_is_refused(tmp_path: Path, store: ImageStore) -> None:
    story = our_story()
    other = story.attempts[1].model_copy(update={"prompt_used": "prompt 1"})
    with pytest.raises(UserError, match="step 1, attempt 2: not generated with the prompt proposed before it"):
        write_execution_record(FinishedStory(story.trajectory, (story.attempts[0], other)), tmp_path, store)
    same = story.attempts[1].model_copy(update={"seed": 100})
    with pytest.raises(UserError, match="two attempts of step 1 have the seed 100"):
        write_execution_record(FinishedStory(story.trajectory, (story.attempts[0], same)), tmp_path, store)
    unplanned = story.trajectory.model_copy(update={"plan": None})
    with pytest.raises(UserError, match="has no plan"):
        write_execution_record(FinishedStory(unplanned, ()), tmp_path, store)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": 3}, "step record 1: the plan has no step 3"),
        ({"target_img": "white.png"}, "step record 1: target_img must be named"),
        ({"success": "True"}, "steps.0.success"),
        ({"step": 0}, "step record 1: the plan has no step 0"),
        ({"source_img": "gone.png"}, "step record 1: 'gone.png': no such image"),
    ],
)
def test_a_mistake_in_an_execution_record_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    save(WHITE, tmp_path / "white.png")
    save(A, tmp_path / "step1_0.png")
    step = judged(1, 0, "white.png", True, "") | change
    record = {"user_input": "x", "global_context": {"execution_plan": [plan_item(1)]}, "steps": [step]}
    file = tmp_path / "execution_record.json"
    file.write_text(json.dumps(record))
    with pytest.raises(UserError, match=re.escape(said)):
        read_execution_record(file, tmp_path, ImageStore(tmp_path / "s"))


@pytest.mark.parametrize(
    ("folder", "request_text", "name"),
    [
        ("17_Tell_it__please", "Tell it, please", "17"),
        ("a_b_Käse-Rad_", "Käse-Rad!", "a_b"),
        ("9_Show_a_cat", "Show a cat both visually and textually", "9"),
        ("9_Show_a_cat_both_visually_and_textually", "Show a cat both visually and textually", "9"),
        ("3_" + "x" * 80, "x" * 100, "3"),
        ("4_sample", "", "4"),
        ("renamed", "Tell it", "renamed"),
        ("50%25", "Tell it", "50%25"),
    ],
)
def test_the_id_is_in_the_name_of_the_folder(
    tmp_path: Path, folder: str, request_text: str, name: str, store: ImageStore
) -> None:
    record = {"user_input": request_text, "global_context": {"execution_plan": [plan_item(1)]}, "steps": []}
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "execution_record.json").write_text(json.dumps(record))
    assert read_execution_record(tmp_path / folder / "execution_record.json", tmp_path, store).trajectory.id == name


def test_a_record_of_the_released_scripts_is_read_wherever_it_lies_now(tmp_path: Path, store: ImageStore) -> None:
    """The numbers of its plan mean nothing, its steps are counted, its paths are those of another machine."""
    plan = [{"prompt": "p1"}, {**plan_item(0), "step_number": "2nd", "prompt": "p2"}]
    there = "YOUR_PATH/klein/17_Tell"
    steps = [
        judged(1, 0, "white.png", False, "p1b") | {"target_img": f"{there}/step1_0.png", "seed": 0},
        judged(1, 2, "white.png", True, "") | {"target_img": f"{there}/step1_2.png", "reasoning": None},
        judged(2, 4, f"/elsewhere/{there}/step1_2.png", True, "") | {"target_img": f"/elsewhere/{there}/step2_4.png"},
    ]
    folder = tmp_path / "data" / "17_Tell"
    for name, picture in {"step1_0": A, "step1_2": B, "step2_4": C}.items():
        save(picture, folder / f"{name}.png")
    record = {"user_input": "Tell", "global_context": {"execution_plan": plan}, "steps": steps, "model": "klein"}
    (folder / "execution_record.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(record).encode())
    story = read_execution_record(folder / "execution_record.json", tmp_path, store)
    assert (story.trajectory.id, story.trajectory.status) == ("17", "complete")
    assert [(a.step, a.op, a.before_id, a.image_id, a.prompt_used) for a in story.attempts] == [
        (1, "t2i", WHITE.id, A.id, "p1"),
        (1, "t2i", WHITE.id, B.id, "p1b"),
        (2, "edit", B.id, C.id, "p2"),
    ]


# --- UEval -----------------------------------------------------------------------------------------------------------


def test_ueval_files_lose_nothing(tmp_path: Path, store: ImageStore) -> None:
    images = tmp_path / "images" / "17"
    items = [
        {
            "id": "17",
            "prompt": "Explain.",
            "task": "art",
            "image_answer": [save(A, images / "step1.png"), "images/17/step2.png"],
            "text_answer": "Once.Then.",
            "rank": 3,
        },
        {"id": "18", "prompt": "Say.", "task": "life", "image_answer": [], "text_answer": ""},
    ]
    record = {
        "1": {"prompt": "p1", "refine_prompt": "", "source_img": "white.png", "target_img": "step1.png"},
        "2": {
            "prompt": "p2",
            "refine_prompt": "p2b",
            "source_img": "step1.png",
            "target_img": str(images / "step2.png"),
        },
    }
    save(B, images / "step2.png")
    save(WHITE, images / "white.png")
    file = tmp_path / "test_rank0.json"
    file.write_text(json.dumps(items))
    (images / "execution_record.json").write_text(json.dumps(record))
    answers = list(read_ueval(file, tmp_path, store))
    story = read_ueval_record(answers[0], tmp_path / "images", store)
    assert ueval_answer(story, "art") == answers[0].model_copy(update={"extra": {}})
    assert [(a.op, a.prompt_used, a.seed, a.verdict, a.status) for a in story.attempts] == [
        ("t2i", "p1", -1, None, "unjudged"),
        ("edit", "p2b", -1, None, "unjudged"),
    ]
    write_ueval(answers, tmp_path / "out" / "again.json", store)
    assert load(tmp_path / "out" / "again.json") == load(file)
    again = write_ueval_record(story, tmp_path / "out" / "images", store)
    assert again == tmp_path / "out" / "images" / "17" / "execution_record.json"
    assert load(again) == load(images / "execution_record.json")
    assert read_ueval_record(answers[0], tmp_path / "out" / "images", store) == story


def test_our_stories_answer_ueval(tmp_path: Path, store: ImageStore) -> None:
    answer = ueval_answer(our_story(), "art")
    assert answer == UevalAnswer(
        id="../s 1",
        prompt="Tell a <image> story, Käse!",
        task="art",
        image_ids=(B.id, C.id),
        text="Once.Then <plan> nothing.",
    )
    file = tmp_path / "out" / "answers.json"
    write_ueval([answer], file, store)
    write_ueval_record(our_story(), file.parent / "images", store)
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")} == {"out"}
    assert list(read_ueval(file, file.parent, store)) == [answer]
    again = read_ueval_record(answer, file.parent / "images", store)
    assert [(a.original_prompt, a.prompt_used, a.before_id, a.image_id) for a in again.attempts] == [
        ("prompt 1", "prompt 1, better", WHITE.id, B.id),
        ("prompt 3", "prompt 3", B.id, C.id),
    ]
    assert ueval_answer(again, "art") == answer


def test_predictions_that_the_official_scorer_takes_are_read(tmp_path: Path, store: ImageStore) -> None:
    save(A, tmp_path / "out" / "17" / "step1.png")
    file = tmp_path / "predictions.json"
    items = [
        {"id": 17, "image_answer": "out/17/step1.png", "text_answer": "old"},
        {"id": "18", "image_answer": None, "text_answer": None, "prompt": None},
        {"id": 17, "image_answer": ["/data/run/out/17/step1.png", "", None, "out/17/gone.png"], "text_answer": "new"},
        {"id": 2.5},
        {"id": True},
    ]
    file.write_text(json.dumps(items))
    left_out: list[str] = []
    answers = list(read_ueval(file, tmp_path, store, left_out))
    assert [(a.id, a.task, a.image_ids, a.text) for a in answers] == [("17", "", (A.id,), "new"), ("18", "", (), "")]
    assert [re.sub(r".*: item", "item", reason).split(":")[0] for reason in left_out] == ["item 3", "item 4", "item 5"]
    with pytest.raises(UserError, match=r"item 3: 'out/17/gone\.png': no such image"):
        list(read_ueval(file, tmp_path, store))


@pytest.mark.parametrize("name", ["17", "exercise.3", "a b"])
def test_a_ueval_record_of_the_released_code_is_read(tmp_path: Path, store: ImageStore, name: str) -> None:
    """Its paths count from the folder in which it was started, where its white image was left, too."""
    folder = tmp_path / "moved" / name
    save(A, folder / "step1.png")
    save(B, folder / "step2.png")
    step = {"prompt": "p", "refine_prompt": "", "source_img": "white.png", "target_img": f"result/img/{name}/step1.png"}
    edit = {**step, "source_img": step["target_img"], "target_img": f"C:\\img\\{name}\\step2.png", "seed": 200}
    (folder / "execution_record.json").write_text(json.dumps({"2": edit, "1": step}))
    answer = UevalAnswer(id=name, prompt="", task="", image_ids=(), text="")
    story = read_ueval_record(answer, tmp_path / "moved", store)
    assert [(a.op, a.before_id, a.image_id) for a in story.attempts] == [
        ("t2i", WHITE.id, A.id),
        ("edit", A.id, B.id),
    ]


def test_a_ueval_record_must_count_its_steps(tmp_path: Path, store: ImageStore) -> None:
    answer = UevalAnswer(id="1", prompt="", task="", image_ids=(), text="")
    (tmp_path / "1").mkdir()
    for value in ({}, [], {"2": {}}, {"1": {}, "3": {}}):
        (tmp_path / "1" / "execution_record.json").write_text(json.dumps(value))
        with pytest.raises(UserError, match="must be an object with the steps"):
            read_ueval_record(answer, tmp_path, store)


# --- interleaved sequences -------------------------------------------------------------------------------------------

IMAGE = "<image><img_token></image>"


def test_a_sequence_of_accepted_images(tmp_path: Path, store: ImageStore) -> None:
    file = tmp_path / "easy.json"
    assert write_interleaved([our_story()], file, store) == 1
    (item,) = load(file)
    assert item["images"] == [B.id, C.id]
    user, assistant = item["messages"]
    assert user == {"role": "user", "content": "Tell a <\u2060image> story, Käse!"}
    assert assistant["content"] == (
        "<gthink>three steps <\u2060/gthink></gthink>"
        f"<plan>prompt 1</plan>{IMAGE}<info>Once.</info>"
        "<info>Then <\u2060plan> nothing.</info>"
        f"<plan>prompt 3</plan>{IMAGE}"
    )


def test_a_sequence_with_its_rejected_images(tmp_path: Path, store: ImageStore) -> None:
    file = tmp_path / "reflection.json"
    assert write_interleaved([our_story()], file, store, reflection=True) == 1
    (item,) = load(file)
    assert item["images"] == [A.id, B.id, C.id]
    text = item["messages"][1]["content"]
    assert text.count(IMAGE) == 3
    critics = re.findall(r"<critic><think>(.*?)</think>(.*?)</critic>", text)
    assert [json.loads(said) for _, said in critics] == [
        {"success": False, "refine_prompt": "prompt 1, better"},
        {"success": True, "refine_prompt": ""},
        {"success": True, "refine_prompt": ""},
    ]


@pytest.mark.parametrize("reflection", [False, True])
def test_every_tag_is_closed(tmp_path: Path, store: ImageStore, reflection: bool) -> None:
    write_interleaved([our_story()], tmp_path / "x.json", store, reflection)
    text = load(tmp_path / "x.json")[0]["messages"][1]["content"].replace(IMAGE, "")
    open_tags = []
    for slash, name in re.findall(r"<(/?)([a-z]+)>", text):
        if slash:
            assert open_tags.pop() == name
        else:
            open_tags.append(name)
    assert open_tags == []


def test_a_story_with_an_unfinished_step_is_left_out(tmp_path: Path, store: ImageStore) -> None:
    story = our_story()
    unfinished = story.trajectory.model_copy(update={"selected": {1: 2}})
    failed = story.trajectory.model_copy(update={"selected": {1: 1, 3: 1}})
    stories = [FinishedStory(unfinished, story.attempts), FinishedStory(failed, story.attempts), story_with_image()]
    assert write_interleaved(stories, tmp_path / "x.json", store) == 1
    (item,) = load(tmp_path / "x.json")
    assert item["messages"][0]["content"].startswith(IMAGE)
    assert item["images"] == [D.id, A.id, C.id]


# --- what others wrote -----------------------------------------------------------------------------------------------

READERS: dict[str, Callable[[str, Path, ImageStore], object]] = {}


def reader(function: Callable[[str, Path, ImageStore], object]) -> Callable[[str, Path, ImageStore], object]:
    READERS[function.__name__] = function
    return function


@reader
def sft(name: str, root: Path, store: ImageStore) -> object:
    messages = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": ""}]
    (root / "f.json").write_text(json.dumps([{"messages": messages, "images": [name]}]))
    return list(read_sft(root / "f.json", root, store))


@reader
def rl(name: str, root: Path, store: ImageStore) -> object:
    line = {"origin_prompt": "", "rewritten_prompt": "", "origin_image_path": "good.png", "edited_image_path": name}
    (root / "f.jsonl").write_text(json.dumps(line | {"evaluation": {"success": True, "semantics": 1, "quality": 1}}))
    return list(read_rl(root / "f.jsonl", root, store))


@reader
def execution(name: str, root: Path, store: ImageStore) -> object:
    record = {"user_input": "x", "global_context": {"execution_plan": [plan_item(1)]}, "steps": []}
    record["steps"] = [judged(1, 0, name, True, "") | {"target_img": "step1_0.png"}]
    (root / "execution_record.json").write_text(json.dumps(record))
    return read_execution_record(root / "execution_record.json", root, store)


@reader
def ueval(name: str, root: Path, store: ImageStore) -> object:
    item = {"id": "1", "prompt": "", "task": "", "image_answer": [name], "text_answer": ""}
    (root / "f.json").write_text(json.dumps([item]))
    return list(read_ueval(root / "f.json", root, store))


@reader
def ueval_record(name: str, root: Path, store: ImageStore) -> object:
    (root / "1").mkdir(exist_ok=True)
    step = {"prompt": "p", "refine_prompt": "", "source_img": name, "target_img": "good.png"}
    (root / "1" / "execution_record.json").write_text(json.dumps({"1": step}))
    return read_ueval_record(UevalAnswer(id="1", prompt="", task="", image_ids=(), text=""), root, store)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    save(A, root / "good.png")
    save(A, root / "step1_0.png")
    save(B, tmp_path / "secret.png")
    os.symlink(tmp_path / "secret.png", root / "link.png")
    os.symlink(tmp_path, root / "up")
    (root / "text.png").write_text("no picture")
    (root / "folder.png").mkdir()
    return root


@pytest.mark.parametrize("kind", READERS)
def test_a_good_image_is_taken(root: Path, kind: str, store: ImageStore) -> None:
    assert READERS[kind]("good.png", root, store)
    assert READERS[kind](str(root / "good.png"), root, store)
    snapshot = root / "cache" / "snapshots" / "0a1b"  # of the hub, which links to its files
    snapshot.mkdir(parents=True)
    save(A, root / "cache" / "blobs" / "1.png")
    for name in ("good.png", "step1_0.png"):
        (snapshot / name).symlink_to("../../blobs/1.png")
    assert READERS[kind]("good.png", snapshot, store)


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../secret.png", "leads out of the folder"),
        ("link.png", "leads out of the folder"),
        ("up/secret.png", "leads out of the folder"),
        ("{parent}/secret.png", "leads out of the folder"),
        ("gone.png", "no such image"),
        ("folder.png", "no such image"),
        ("", "no such image"),
        ("x" * 5000, "no such image"),
        ("a\0b.png", "no such image"),
        ("text.png", "not an image"),
    ],
)
def test_no_path_leads_out_and_a_missing_image_is_named(
    root: Path, kind: str, name: str, said: str, store: ImageStore
) -> None:
    if (kind, name) == ("ueval", ""):
        return  # the benchmark's scorer drops empty names
    with pytest.raises(UserError, match=r"(item 1|jsonl:1|record 1|step 1): .*" + said) as error:
        READERS[kind](name.replace("{parent}", str(root.parent)), root, store)
    assert len(str(error.value)) < 1000  # an image in base64, in the place of its path, is not shown


@pytest.mark.parametrize("content", [b"", b"{", b"3", b"[3]", b'[{"messages": 3}]', b"\xff", b"[" * 100_000, b'"x"'])
def test_a_file_of_another_kind_is_named(tmp_path: Path, content: bytes, store: ImageStore) -> None:
    file = tmp_path / "f.json"
    file.write_bytes(content)
    for read in (read_sft, read_ueval):
        with pytest.raises(UserError, match=r"f\.json"):
            list(read(file, tmp_path, store))
    with pytest.raises(UserError, match=r"f\.json"):
        read_execution_record(file, tmp_path, store)
    with pytest.raises(UserError, match="no such file"):
        list(read_rl(tmp_path / "none.jsonl", tmp_path, store))


SPOKEN = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def test_empty_keys_of_other_programs_are_no_mistake(tmp_path: Path, store: ImageStore) -> None:
    item = SPOKEN | {"system": "", "tools": "[]", "videos": [], "audios": None}
    item["messages"] = [turn | {"tool_calls": None, "name": None} for turn in SPOKEN["messages"]]
    (tmp_path / "f.json").write_text(json.dumps([item, SPOKEN], indent=1))
    assert [row.completion for row in read_sft(tmp_path / "f.json", tmp_path, store)] == ["b", "b"]


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"messages": [], "images": []}, "one of the user and one of the assistant"),
        ({"messages": [{"role": "system", "content": ""}]}, "messages.0.role"),
        (
            {"messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": ""}]},
            "1 <image> markers for 0 images",
        ),
        (SPOKEN | {"system": "You judge images."}, "has system beside its messages, for which rows have no place"),
        (SPOKEN | {"tools": '[{"name": "draw"}]', "videos": ["a.mp4"]}, "has tools, videos beside its messages"),
        (SPOKEN | {"video": "a.mp4"}, "has video beside its messages"),
        (SPOKEN | {"image": "a.png"}, "0 <image> markers for 1 images"),
        (SPOKEN | {"images": [], "image": "a.png"}, "has image beside its messages"),
        ('{"messages": [], "images": ["a"], "images": []}', "the key 'images' occurs twice"),
    ],
)
def test_a_mistake_in_a_supervised_row_is_named(
    tmp_path: Path, store: ImageStore, item: dict[str, Any] | str, said: str
) -> None:
    (tmp_path / "f.json").write_text(f"[ {item if isinstance(item, str) else json.dumps(item)} ]\n")
    with pytest.raises(UserError, match=rf"f\.json: item 1: .*{re.escape(said)}"):
        list(read_sft(tmp_path / "f.json", tmp_path, store))
