"""GenEval (shapes): right images score full marks and broken ones do not, whoever draws them; kills and resumes."""

import itertools
import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from forking import command, finish, start
from PIL import Image

from flowbp.evaluation.benchmarks.geneval import Tag
from flowbp.evaluation.benchmarks.geneval_shapes import (
    TASKS_PER_TAG,
    ShapesTask,
    find_mistakes_by_verifier,
    shapes_tasks,
)
from flowbp.evaluation.benchmarks.run import image_file
from flowbp.evaluation.benchmarks.settings import read_scores
from flowbp.evaluation.benchmarks.tables import table_markdown, write_table
from imgen_common.errors import UserError
from imgen_common.shapes.render import render
from imgen_common.shapes.scene import Placed, Scene, Thing, compose, parse_caption, split_of

SOURCE = "builtin:shapes/test"
Edit = Callable[[tuple[Placed, ...]], Iterable[Placed]]


def scene(task: ShapesTask, rng: np.random.Generator) -> Scene:
    """A scene that the prompt describes; of a relation one that is seen from within 30 degrees of its axis."""
    spec = parse_caption(task.prompt)
    while True:
        made = compose(spec, rng)
        if spec.category != "relation":
            return made
        a, b = made.placed
        along, across = (b.x - a.x, b.y - a.y) if spec.place in ("left of", "right of") else (b.y - a.y, b.x - a.x)
        if abs(across) < 0.57 * abs(along):
            return made


def picture(made: Scene) -> Image.Image:
    return Image.fromarray((render(made).transpose(1, 2, 0) * 255).round().astype(np.uint8))


def mistakes(task: ShapesTask, edit: Edit = tuple) -> list[list[str]]:
    """Of three images of a task whose things were edited."""
    rng = np.random.default_rng(0)
    scenes = [scene(task, rng) for _ in range(3)]
    return find_mistakes_by_verifier([picture(Scene(s.background, tuple(edit(s.placed)))) for s in scenes], [task] * 3)


TASKS = shapes_tasks(SOURCE)


def tagged(tag: Tag) -> list[ShapesTask]:
    return [task for task in TASKS if task.tag == tag]


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_tasks_of_every_kind_stand_in_turn_and_are_of_the_split() -> None:
    assert [task.tag for task in TASKS[:12]] == [*get_args(Tag)] * 2
    assert Counter(task.tag for task in TASKS).most_common(3) == [
        (tag, TASKS_PER_TAG) for tag in ("two_object", "position", "color_attr")
    ]
    assert len({(task.tag, task.prompt) for task in TASKS}) == len(TASKS)
    assert {split_of(parse_caption(task.prompt).things) for task in TASKS} == {"test"}
    assert TASKS[:5] == shapes_tasks(SOURCE, 5)
    assert {task.prompt for task in shapes_tasks("builtin:shapes/tune")}.isdisjoint(task.prompt for task in TASKS)
    with pytest.raises(UserError, match="did you mean 'builtin:shapes/test'"):
        shapes_tasks("builtin:shapes/tset")


def test_what_a_task_asks_for_is_what_its_prompt_says() -> None:
    (position,) = (task for task in TASKS if task.prompt == "a green square right of a blue cross")
    assert json.loads(position.model_dump_json(by_alias=True, exclude_defaults=True)) == {
        "tag": "position",
        "prompt": "a green square right of a blue cross",
        "include": [{"class": "cross", "count": 1}, {"class": "square", "count": 1, "position": ["right of", 0]}],
    }
    for task in TASKS:
        things = parse_caption(task.prompt).things
        assert sum(clause.count for clause in task.include) == len(things)
        assert {clause.name for clause in task.include} == {thing.shape for thing in things}
        colors = {clause.color for clause in task.include}
        assert colors == ({thing.colour for thing in things} if task.tag in ("colors", "color_attr") else {None})
        assert [clause.count for clause in task.exclude] == ([len(things) + 1] if task.tag == "counting" else [])


# --- the verifier under GenEval's rules ------------------------------------------------------------------------------


def test_right_images_have_no_mistakes() -> None:
    rng = np.random.default_rng(1)
    images = [picture(scene(task, rng)) for task in TASKS]
    assert find_mistakes_by_verifier(images, TASKS) == [[]] * len(TASKS)


def recolored(placed: tuple[Placed, ...]) -> Iterable[Placed]:
    """All things in another color, yellow or blue."""
    for one in placed:
        color, rgb = ("yellow", (0.9, 0.85, 0.2)) if one.thing.colour != "yellow" else ("blue", (0.2, 0.3, 0.9))
        yield replace(one, thing=Thing(color, one.thing.shape), rgb=rgb)


def reshaped(placed: tuple[Placed, ...]) -> Iterable[Placed]:
    """The first thing has another shape."""
    other = "circle" if all(one.thing.shape != "circle" for one in placed) else "triangle"
    yield replace(placed[0], thing=Thing(placed[0].thing.colour, other))
    yield from placed[1:]


def exchanged(placed: tuple[Placed, ...]) -> Iterable[Placed]:
    """Two things in each other's place."""
    first, second = placed
    yield replace(first, x=second.x, y=second.y)
    yield replace(second, x=first.x, y=first.y)


def swapped_colors(placed: tuple[Placed, ...]) -> Iterable[Placed]:
    first, second = placed
    yield replace(first, rgb=second.rgb)
    yield replace(second, rgb=first.rgb)


def one_less(placed: tuple[Placed, ...]) -> Iterable[Placed]:
    return placed[1:]


def one_more(placed: tuple[Placed, ...]) -> Iterable[Placed]:
    """Another thing of the first's kind, as far from all as can be."""
    places = itertools.product(range(5, 27), range(5, 27))
    x, y = max(places, key=lambda at: min(np.hypot(at[0] - one.x, at[1] - one.y) for one in placed))
    return (*placed, replace(placed[0], x=x, y=y, radius=4.0))


def nothing(placed: tuple[Placed, ...]) -> Iterable[Placed]:
    return ()


BROKEN: list[tuple[Tag, Edit]] = [
    *((tag, edit) for tag in get_args(Tag) for edit in (nothing, one_less, reshaped)),
    ("counting", one_more),
    ("colors", recolored),
    ("color_attr", recolored),
    ("color_attr", swapped_colors),
    ("position", exchanged),
]


@pytest.mark.parametrize(("tag", "edit"), BROKEN)
def test_broken_images_have_mistakes(tag: Tag, edit: Edit) -> None:
    for task in tagged(tag)[:4]:
        assert all(mistakes(task, edit)), task.prompt


@pytest.mark.parametrize(
    ("tag", "edit"),
    [("single_object", recolored), ("single_object", one_more), ("counting", recolored), ("two_object", exchanged)],
)
def test_what_genevals_rules_do_not_ask_for_is_no_mistake(tag: Tag, edit: Edit) -> None:
    for task in tagged(tag)[:4]:
        assert not any(mistakes(task, edit)), task.prompt


def test_a_mistake_says_what_was_seen() -> None:
    red_square, count = tagged("colors")[0], tagged("counting")[0]
    (thing,) = parse_caption(red_square.prompt).things
    assert mistakes(red_square, recolored)[0] == [f"0 of 1 {thing.shape} {thing.colour}; found: yellow"]
    assert mistakes(count, one_less)[0] == ["1 of 2 triangle found"]


# --- the command -----------------------------------------------------------------------------------------------------

Call = Callable[..., tuple[int, str, str]]


def words(out: Path) -> list[object]:
    """Six prompts, one of each kind, two images each."""
    few = ["--num-prompts", 6, "--images", 2, "--num-inference-steps", 2, "--batch-size", 2]
    chosen = ["--protocol", "geneval_shapes", "--prompts", SOURCE, "--score", "geneval_shapes=builtin:shapes/verifier"]
    return ["benchmark", "builtin:shapes/generator", *chosen, *few, "--out", out]


def means(output: str) -> dict[str, float]:
    (row,) = json.loads(output)
    assert row["protocol"] == "geneval_shapes"
    return {name: one["mean"] for name, one in row["means"].items()}


@pytest.mark.slow
def test_a_benchmark_of_right_and_of_broken_images(flowbp: Call, tmp_path: Path) -> None:
    out, rng = tmp_path / "out", np.random.default_rng(0)
    code, output, errors = flowbp(*words(out), "--json")
    assert code == 0, errors
    base = means(output)
    assert list(base) == ["shapes_overall", *(f"shapes_{tag}" for tag in get_args(Tag))]
    assert base["shapes_overall"] < 100  # two steps are too few
    drawn = {
        number: json.loads(file.read_text())["prompt"]
        for number, file in enumerate(sorted(out.glob("images/*/metadata.jsonl")))
    }
    assert list(drawn.values()) == [task.prompt for task in TASKS[:6]]

    def again(number: int, image: int, picture: Image.Image) -> None:
        picture.save(image_file(out, (number, image)))
        (out / "scores" / "geneval_shapes.rank0.jsonl").unlink(missing_ok=True)

    for number, task in enumerate(TASKS[:6]):
        for image in range(2):
            again(number, image, picture(scene(task, rng)))
    code, output, _ = flowbp(*words(out), "--json")
    assert (code, set(means(output).values())) == (0, {100.0})
    again(0, 0, Image.new("RGB", (32, 32)))
    again(5, 0, Image.new("RGB", (32, 32), "white"))
    again(5, 1, Image.new("RGB", (32, 32), "red"))
    code, output, _ = flowbp(*words(out), "--json")
    expected = dict.fromkeys(base, 100.0) | {"shapes_single_object": 50.0, "shapes_color_attr": 0.0}
    expected["shapes_overall"] = pytest.approx(450 / 6)
    assert (code, means(output)) == (0, expected)


def test_no_table_calls_it_geneval(flowbp: Call, tmp_path: Path) -> None:
    code, output, errors = flowbp(*words(tmp_path / "out"))
    assert code == 0, errors
    assert "cannot be compared" in " ".join(output.split())
    assert "protocol: geneval_shapes" in (tmp_path / "out" / "config.yaml").read_text()
    page = table_markdown([write_table(tmp_path / "out")])
    titles = [cell.strip() for cell in page.splitlines()[0].strip("|").split("|")][1:]
    assert len(titles) == 7
    assert all(title.endswith("(shapes)") for title in titles)
    assert "cannot be compared with published ones of GenEval" in page


@pytest.mark.slow
def test_a_killed_benchmark_goes_on(tmp_path: Path) -> None:
    log, whole, killed = tmp_path / "log", tmp_path / "whole", tmp_path / "killed"
    finish(start(command, "flowbp", *map(str, words(whole)), log=log), log)
    process = start(command, "flowbp", *map(str, words(killed)), log=log)
    until = time.monotonic() + 200
    while not (list(killed.glob("images/*/samples/*.png")) or not process.is_alive() or time.monotonic() > until):
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, log.read_text()
    assert not (killed / "table.json").exists()
    finish(start(command, "flowbp", *map(str, words(killed)), log=log), log)
    assert read_scores(killed, "geneval_shapes") == read_scores(whole, "geneval_shapes")
    for number, image in itertools.product(range(6), range(2)):
        ours, theirs = (np.asarray(Image.open(image_file(out, (number, image))), int) for out in (killed, whole))
        assert np.abs(ours - theirs).max() <= 1  # images of other batches, to rounding
