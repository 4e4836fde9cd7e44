"""GenEval: the official rules on hand-made detections, the metadata, and the detector with its colors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectors import saved_mask2former, tiny_mask2former
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from flowbp.config import DataConfig
from flowbp.evaluation.benchmarks import detector as detectors
from flowbp.evaluation.benchmarks.detector import Detector, GenEval, check_detector
from flowbp.evaluation.benchmarks.geneval import (
    CLASSES,
    Detection,
    GenEvalTask,
    filter_detections,
    find_mistakes,
    read_tasks,
    spatial_relations,
)
from flowbp.evaluation.benchmarks.settings import BenchmarkRequest, read_prompts
from flowbp.rewards.clip import ClipReward
from imgen_common.errors import UserError


def at(name: str, x: float, y: float, score: float = 0.95, side: float = 20) -> Detection:
    """A square object around (x, y)."""
    return Detection(name, score, (x - side / 2, y - side / 2, x + side / 2, y + side / 2))


def task(tag: str, *include: dict[str, Any], **more: Any) -> GenEvalTask:
    return GenEvalTask.model_validate({"tag": tag, "prompt": "a photo", "include": include, **more})


def wrong(asked: GenEvalTask, *detections: Detection, colors: dict[float, str] | None = None) -> list[str]:
    """The mistakes; colors: of objects by the x of their center."""

    def seen(objects: Any, name: str) -> list[str]:
        return [(colors or {})[(one.box[0] + one.box[2]) / 2] for one in objects]

    return find_mistakes(asked, filter_detections(detections, asked.tag), seen)


CAT, DOG = {"class": "cat", "count": 1}, {"class": "dog", "count": 1}
RED_CAT, BLUE_DOG = CAT | {"color": "red"}, DOG | {"color": "blue"}
THREE = task("counting", {"class": "cat", "count": 3}, exclude=[{"class": "cat", "count": 4}])
DOG_LEFT = task("position", CAT, DOG | {"position": ["left of", 0]})
BOTH = task("color_attr", RED_CAT, BLUE_DOG)


# --- the rules -------------------------------------------------------------------------------------------------------


def test_one_object() -> None:
    one = task("single_object", CAT)
    assert wrong(one, at("cat", 10, 10)) == []
    assert wrong(one, at("cat", 10, 10), at("cat", 50, 50)) == []  # at least
    assert wrong(one) == wrong(one, at("dog", 10, 10)) == ["0 of 1 cat found"]


def test_two_objects() -> None:
    two = task("two_object", CAT, DOG)
    assert wrong(two, at("cat", 10, 10), at("dog", 10, 10)) == []  # they may overlap
    assert wrong(two, at("cat", 10, 10), at("cat", 50, 10)) == ["0 of 1 dog found"]


def test_counting_is_exact_by_its_exclude_clause() -> None:
    def cats(number: int, score: float = 0.95) -> list[Detection]:
        return [at("cat", 30 * i, 0, score) for i in range(number)]

    assert wrong(THREE, *cats(3)) == []
    assert wrong(THREE, *cats(2)) == ["2 of 3 cat found"]
    assert wrong(THREE, *cats(4)) == ["4 cat found, fewer than 4 wanted"]
    assert wrong(THREE, *cats(3), *cats(2, score=0.8)) == []  # only sure ones are counted
    assert wrong(THREE, *cats(3, score=0.8)) == ["0 of 3 cat found"]
    assert wrong(task("counting", {"class": "cat", "count": 3}), *cats(5)) == []  # without exclude: at least


def test_thresholds_are_exclusive_and_classes_are_cut_at_sixteen() -> None:
    assert (
        filter_detections([at("cat", 0, 0, 0.3)], "colors")
        == filter_detections([at("cat", 0, 0, 0.9)], "counting")
        == {}
    )
    found = filter_detections([at("cat", i, 0, 0.4 + i / 100) for i in range(20)], "colors")
    assert [one.score for one in found["cat"]] == sorted((0.4 + i / 100 for i in range(4, 20)), reverse=True)


def test_colors_are_asked_of_the_surest_objects_only() -> None:
    red = task("colors", RED_CAT)
    assert wrong(red, at("cat", 10, 0), colors={10: "red"}) == []
    assert wrong(red, at("cat", 10, 0), colors={10: "blue"}) == ["0 of 1 cat red; found: blue"]
    pair = (at("cat", 10, 0, 0.9), at("cat", 90, 0, 0.8))
    assert wrong(red, *pair, colors={10: "red", 90: "blue"}) == []
    assert wrong(red, *pair, colors={10: "blue", 90: "red"}) != []
    two = task("colors", {"class": "cat", "count": 2, "color": "red"})
    assert wrong(two, *pair, colors={10: "red", 90: "blue"}) == ["1 of 2 cat red; found: red, blue"]


def test_attributes_must_not_be_swapped() -> None:
    objects = (at("cat", 10, 0), at("dog", 90, 0))
    assert wrong(BOTH, *objects, colors={10: "red", 90: "blue"}) == []
    assert len(wrong(BOTH, *objects, colors={10: "blue", 90: "red"})) == 2
    assert wrong(BOTH, objects[0], colors={10: "red"}) == ["0 of 1 dog found"]


def test_positions() -> None:
    assert wrong(DOG_LEFT, at("cat", 90, 50), at("dog", 10, 50)) == []
    assert wrong(DOG_LEFT, at("cat", 10, 50), at("dog", 90, 50)) == ["dog not left of cat"]
    assert wrong(DOG_LEFT, at("dog", 10, 50)) == ["0 of 1 cat found", "nothing found that dog could be left of"]
    pair = task("position", {"class": "cat", "count": 2}, DOG | {"position": ["left of", 0]})
    assert wrong(pair, at("cat", 90, 50), at("cat", 70, 50), at("dog", 30, 50)) == []
    assert wrong(pair, at("cat", 90, 50), at("cat", 5, 50), at("dog", 30, 50)) != []  # of all of them


def test_a_wrong_color_leaves_no_target() -> None:
    red_left = task("position", RED_CAT, DOG | {"position": ["left of", 0]})
    said = wrong(red_left, at("cat", 90, 0), at("dog", 10, 0), colors={90: "blue"})
    assert said[1] == "nothing found that dog could be left of"


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((-50, 0), {"left of"}),
        ((50, 0), {"right of"}),
        ((0, -50), {"above"}),
        ((0, 50), {"below"}),
        ((50, 50), {"right of", "below"}),
        ((0, 0), set()),
        ((-4, 0), set()),  # the margin, 0.1 of both widths together
        ((-9, 0), {"left of"}),  # (9 - 4) / 9 > 0.5
        ((-7, 0), set()),  # (7 - 4) / 7 < 0.5
        ((-100, 30), {"left of"}),
    ],
)
def test_relations_have_a_margin(offset: tuple[float, float], expected: set[str]) -> None:
    assert spatial_relations(at("cat", *offset).box, at("dog", 0, 0).box) == expected


@given(st.tuples(*[st.floats(0, 100)] * 4), st.floats(1, 50), st.floats(1, 50))
def test_relations_turn_round(place: tuple[float, float, float, float], a: float, b: float) -> None:
    turned = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    one, other = at("cat", *place[:2], side=a).box, at("dog", *place[2:], side=b).box
    assert {turned[name] for name in spatial_relations(one, other)} == spatial_relations(other, one)


# --- metadata --------------------------------------------------------------------------------------------------------


def test_metadata_is_read_and_written_as_it_was(tmp_path: Path) -> None:
    rows = [
        {"tag": "position", "prompt": "a dog", "include": [CAT, DOG | {"position": ["left of", 0]}]},
        {"tag": "counting", "prompt": "cats", "include": [CAT], "exclude": [CAT]},
    ]
    file = tmp_path / "metadata.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert [json.loads(t.model_dump_json(by_alias=True, exclude_defaults=True)) for t in read_tasks(file)] == rows
    assert len(read_tasks(file, limit=1)) == 1
    (tmp_path / "metadata.JSON").write_text("\ufeff" + json.dumps(rows))
    assert read_tasks(tmp_path / "metadata.JSON") == read_tasks(file)
    assert len(set(CLASSES)) == 80


GOOD = {"tag": "colors", "prompt": "a red cat", "include": [RED_CAT]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tag": "colours"}, "must be 'single_object', 'two_object'"),
        ({"prompt": ""}, "prompt: is empty; say what to draw"),
        ({"prompt": " \u200b "}, "prompt: is empty; say what to draw"),
        ({"include": []}, "include: "),
        ({"exlude": []}, "exlude: Extra inputs are not permitted"),
        ({"include": [CAT | {"class": "caat"}]}, "unknown class 'caat'; did you mean 'cat'?"),
        ({"include": [CAT | {"count": 0}]}, "include.0.count: must be greater than or equal to 1, got 0"),
        ({"include": [CAT | {"color": "teal"}]}, "unknown color 'teal'; allowed: red, orange"),
        ({"include": [CAT | {"position": ["left of", 0]}]}, "must refer to an earlier clause"),
        ({"include": [{"count": 1}]}, "include.0.class: Field required"),
    ],
)
def test_wrong_rows_are_reported_with_their_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    file = tmp_path / "metadata.jsonl"
    file.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | change) + "\n")
    with pytest.raises(UserError) as error:
        read_tasks(file)
    assert str(error.value).startswith(f"{file}:3: ")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "holds no row"), (b"a cat\n", ":1: not JSON"), (b"[1]\n", ":1: "), (b"caf\xe9\n", "not UTF-8 at byte 3")],
)
def test_files_that_are_no_metadata(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "metadata.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_tasks(tmp_path / "metadata.jsonl")


def test_metadata_below_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metadata.jsonl").write_text(json.dumps(GOOD) + "\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = read_prompts(BenchmarkRequest("geneval", "~/metadata.jsonl"), DataConfig())
    assert [prompt.text for prompt in found] == ["a red cat"]


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_tasks(tmp_path / "none.jsonl")


# --- detector and colors --------------------------------------------------------------------------------------------


def test_the_detector_is_transformers_own(tmp_path: Path) -> None:
    theirs = tiny_mask2former()
    ref = saved_mask2former(tmp_path)
    check_detector(ref)
    pixels = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(pixel_values=pixels)
    classes, masks = Detector.load(ref).model(pixels)
    assert torch.allclose(classes, expected.class_queries_logits, atol=1e-5)
    assert torch.allclose(masks, expected.masks_queries_logits, atol=1e-4)


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a 'mask2former' of 80 classes"):
        check_detector("builtin:shapes/reward")
    saved_mask2former(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"decoder_layers": 4}))
    with pytest.raises(UserError, match="weights are missing"):
        Detector.load(str(tmp_path))


def planted(box: tuple[int, int, int, int], size: tuple[int, int], logit: float = 4.0) -> Tensor:
    """Logits of one mask that is on inside a box of its own, coarse pixels."""
    mask = torch.full(size, -logit)
    left, top, right, bottom = box
    mask[top:bottom, left:right] = logit
    return mask


def test_instances_keep_place_and_score_without_the_padding() -> None:
    """An image of 100 x 200 seen at 200 x 400, padded to 224 x 416, masks at a quarter of that."""
    logits = torch.zeros(3, len(CLASSES) + 1)
    logits[0, CLASSES.index("dog")] = 8
    logits[1, CLASSES.index("cat")] = 8
    logits[2, -1] = 20  # nothing
    masks = torch.stack(
        [planted((0, 0, 20, 20), (56, 104)), planted((50, 25, 104, 56), (56, 104)), torch.ones(56, 104)]
    )
    found = {one.name: one for one in detectors._instances(logits, masks, (224, 416), (200, 400), (100, 200))}
    assert set(found) == {"dog", "cat"}
    assert found["dog"].box == (0, 0, 40, 40)
    assert found["cat"].box == (100, 50, 200, 100)
    for one in found.values():
        left, top, right, bottom = map(int, one.box)
        assert one.mask is not None
        assert one.mask.shape == (100, 200)
        assert one.mask[top:bottom, left:right].all()
        assert one.mask.sum() == (right - left) * (bottom - top)
        probability = logits.softmax(-1).max(-1).values[0].item()
        assert 0.85 * probability < one.score < torch.tensor(4.0).sigmoid().item() * probability


def test_a_mask_that_is_nowhere_on_is_no_object() -> None:
    logits = torch.zeros(1, len(CLASSES) + 1)
    logits[0, 0] = 20
    assert detectors._instances(logits, torch.full((1, 8, 8), -3.0), (32, 32), (32, 32), (16, 16)) == []


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (40, 24)])
def test_the_whole_chain(tmp_path: Path, size: tuple[int, int]) -> None:
    rules = GenEval(Detector(Detector.load(saved_mask2former(tmp_path)).model, short=64, long=96), ByColor())
    red = Image.new("RGB", size[::-1], (230, 20, 20))
    tasks = [task("colors", RED_CAT), task("colors", CAT | {"color": "blue"}), task("single_object", DOG)]
    assert rules([red] * 3, tasks) == [[], ["0 of 1 cat blue; found: red"], ["0 of 1 dog found"]]
    assert rules([red], tasks[:1]) == [[]]


WORDS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}


class ByColor(ClipReward):
    """Instead of CLIP: features are mean colors, of images and of the colors that words name."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def image_features(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        return images.mean((2, 3))

    def text_features(self, prompts: Any) -> Tensor:
        return torch.stack([torch.tensor(self.color(text)).float() for text in prompts])

    def color(self, text: str) -> tuple[int, int, int]:
        return next((rgb for word, rgb in WORDS.items() if f" {word}" in text), (0, 0, 0))


def test_colors_see_the_object_alone_on_gray(tmp_path: Path) -> None:
    image = torch.zeros(3, 10, 10)
    image[2] = 1
    image[:, 2:4, 2:6] = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    mask = np.zeros((10, 10), bool)
    mask[2:4, 2:6] = True
    mask[8, 8] = True
    by_color = ByColor()
    rules = GenEval(Detector.load(saved_mask2former(tmp_path)), by_color)
    assert rules.classify_colors(image, [Detection("cat", 1.0, (2, 2, 9, 9), mask)], "cat") == ["red"]
    (crop,) = by_color.seen
    assert crop.shape == (1, 3, 7, 7)
    assert crop[0, :, 0, 0].tolist() == [1, 0, 0]
    assert crop[0, :, 6, 6].tolist() == [0, 0, 1]
    assert crop[0, :, 3, 3].tolist() == pytest.approx([0.6] * 3)
