"""Rows with source images: where they come from, what is refused, and what rewards see of them."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, LargeList, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from flowbp.config import DataConfig, TrainConfig
from flowbp.data.edits import Edit, caption_of, describe_row, score_images, source_thumbnails, sources_of
from flowbp.data.prompts import load_prompts
from flowbp.training.preflight import all_prompts, unread_prompts
from flowbp.training.trainer import Trainer
from imgen_common.errors import UserError
from imgen_common.images import content_hash, from_pil
from imgen_common.shapes.edits import verify_edits


def picture(name: Path, seed: int = 0) -> Image.Image:
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 10, 3), np.uint8))
    image.save(name)
    return image


def row_file(folder: Path, *rows: object) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


@pytest.mark.parametrize("names", [("make it red",) * 3, ("make it red", "make it blue", "make it red")])
def test_edits_with_equal_words_are_all_trained_on(tmp_path: Path, names: Sequence[str]) -> None:
    for number in range(3):
        picture(tmp_path / f"{number}.png", number)
    file = row_file(tmp_path, *({"prompt": name, "images": f"{i}.png"} for i, name in enumerate(names)))
    config = TrainConfig(max_train_steps=2, total_batch_size=3)
    run: Any = SimpleNamespace(
        config=config,
        batch=SimpleNamespace(per_process=3),
        models=SimpleNamespace(prompts=load_prompts(file)),
        accelerator=SimpleNamespace(process_index=0),
    )
    used = Trainer.training_prompts(run)
    assert len({sources_of(prompt)[0].digest for prompt in used}) == len(used) == 3


@pytest.mark.parametrize("captions", [["", "a red house", ""], ["a red house"] * 3])
def test_edits_without_captions_or_evaluation_are_said(tmp_path: Path, captions: Sequence[str]) -> None:
    picture(tmp_path / "a.png")
    rows = ({"prompt": "a red circle", "images": "a.png"} | ({"caption": c} if c else {}) for c in captions)
    file = row_file(tmp_path, *rows)
    config = TrainConfig(data=DataConfig(prompts=file))
    missing = captions.count("")
    notes = " ".join(unread_prompts(config))
    assert (f"{missing} of 3 edits have no caption (data.caption); reward, heldout will score" in notes) == bool(
        missing
    )
    assert "data.prompts has edits; set eval.prompts and eval.quick_prompts" in notes
    for others in ({"quick_prompts": file}, {"every": 0, "quick_prompts": "none.txt"}):  # not read where none is made
        evaluation = config.eval.model_copy(update={"prompts": file, **others})
        assert "eval.prompts" not in " ".join(unread_prompts(config.model_copy(update={"eval": evaluation})))


def test_rows_of_a_file_may_have_images(tmp_path: Path) -> None:
    a, b = picture(tmp_path / "a.png"), picture(tmp_path / "b.png", 1)
    given = [
        {"prompt": " make it red ", "images": "a.png", "caption": "a red house"},
        {"prompt": "join them", "images": ["a.png", str(tmp_path / "b.png")]},
        {"prompt": "a cat", "images": [], "caption": "is not read"},
        "a dog",
    ]
    found = load_prompts(row_file(tmp_path, *given))
    assert found == ["make it red", "join them", "a cat", "a dog"]
    assert [caption_of(prompt) for prompt in found] == ["a red house", "join them", "a cat", "a dog"]
    digests = [[source.digest for source in sources_of(prompt)] for prompt in found]
    assert digests == [[content_hash(a)], [content_hash(a), content_hash(b)], [], []]
    assert sources_of(found[0])[0].size == (12, 10)
    assert sources_of(found[1])[1].load().tobytes() == b.tobytes()
    assert len({describe_row(prompt) for prompt in found}) == 4


def test_a_column_named_images_may_be_left_unread(tmp_path: Path) -> None:
    data = DataConfig(
        prompts=row_file(tmp_path, {"prompt": "a cat", "images": "https://example.org/a.png"}), images=None
    )
    Dataset.from_dict({"prompt": ["a dog"], "images": [3]}).save_to_disk(str(tmp_path / "data"))
    found = [*all_prompts(TrainConfig(data=data)).data, *load_prompts(str(tmp_path / "data"), data)]
    assert found == ["a cat", "a dog"]
    assert not any(map(sources_of, found))
    with pytest.raises(UserError, match=r"is an address, .*; data\.images=null reads no images"):
        load_prompts(data.prompts)


def test_a_table_may_name_an_image(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "rows.csv").write_text("text,source\nmake it red,a.png\na cat,\n")
    found = load_prompts(str(tmp_path / "rows.csv"), DataConfig(key="text", images="source"))
    assert [len(sources_of(prompt)) for prompt in found] == [1, 0]


FEATURES: dict[str, Any] = {
    "image": ImageFeature(),
    "list": List(ImageFeature()),
    "large list": LargeList(ImageFeature()),
    "path": Value("string"),
}


@pytest.mark.parametrize("kind", FEATURES)
def test_a_dataset_may_hold_images(kind: str, tmp_path: Path) -> None:
    image = picture(tmp_path / "a.png")
    value = {"image": image, "path": str(tmp_path / "a.png")}.get(kind, [image])
    rows = {"prompt": ["make it red", "make it blue"], "images": [value, value], "caption": ["a red house", None]}
    features = Features({"prompt": Value("string"), "images": FEATURES[kind], "caption": Value("string")})
    Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
    found = load_prompts(str(tmp_path / "set"), limit=2)
    assert [caption_of(prompt) for prompt in found] == ["a red house", "make it blue"]
    assert all(sources_of(prompt)[0].load().tobytes() == image.tobytes() for prompt in found)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ("none.png", r"rows\.jsonl:2: images: .*none\.png: cannot be read \(No such file"),
        ("cut.png", r"rows\.jsonl:2: images: .*cut\.png: .*(cut short|damaged)"),
        ("text.png", r"rows\.jsonl:2: images: .*text\.png: not an image of an allowed format"),
        (3, r"rows\.jsonl:2: images: must be the path of an image or a list, got a number"),
        ({"bytes": "iVBO", "path": None}, r"rows\.jsonl:2: images: has the bytes of an image as a text; give its path"),
        ([3], r"rows\.jsonl:2: images: must be the path of an image, got a number"),
        ("", r"rows\.jsonl:2: images: must be the path of an image, got a text without a name in it"),
        (["a.png", None], r"rows\.jsonl:2: images: must be the path of an image, got null"),
        ("['a.png', 'b.png']", r"rows\.jsonl:2: images: a cell of images has one path; write the rows as \.jsonl"),
        ("https" + "://a.b/c.png?token=SECRET", r"https://\.\.\.: is an address, not a file; download it"),
        ("data:image/png;base64,AAAA", r"data:\.\.\.: is the content of a file, not its path; write it into a file"),
        ("A" * 5000, r"A{9,}\.\.\.: cannot be read"),
    ],
)
def test_an_image_that_cannot_be_read_is_named_with_its_row(tmp_path: Path, images: object, said: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    (tmp_path / "text.png").write_text("a picture")
    with pytest.raises(UserError, match=said) as error:
        load_prompts(row_file(tmp_path, {"prompt": "a", "images": "a.png"}, {"prompt": "b", "images": images}))
    assert "SECRET" not in str(error.value)


def test_a_caption_holds_no_control_token(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: caption holds <\|im_end\|>, which a chat model reads"):
        load_prompts(row_file(tmp_path, {"prompt": "a", "images": "a.png", "caption": "b<|im_end|>"}))


def test_a_caption_is_a_text(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: caption: must be a text, got a list"):
        load_prompts(row_file(tmp_path, {"prompt": "a", "images": "a.png", "caption": ["b"]}))


@pytest.mark.parametrize(
    ("column", "cell"), [("caption", "NA"), ("caption", " nan"), ("source_caption", "#N/A"), ("answer", "NA")]
)
def test_a_cell_without_a_value_is_no_caption(tmp_path: Path, column: str, cell: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "edits.csv").write_text(f"prompt,images,{column}\nmake it red,a.png,a house\nb,a.png,{cell}\n")
    said = rf"edits\.csv:3: {column} is {cell.strip()}, as programs write .* or around rows; leave the cell empty"
    with pytest.raises(UserError, match=said):
        load_prompts(str(tmp_path / "edits.csv"), DataConfig(answer="answer"))


def test_rows_may_bring_answers_and_what_their_sources_show(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    rows = [
        {"prompt": "make it red", "images": "a.png", "source_caption": "a blue house", "said": "It is red."},
        {"prompt": "a cat", "said": "A cat."},
        {"prompt": "a dog", "said": None, "answer": ["is not read"]},
    ]
    found = load_prompts(row_file(tmp_path, *rows), DataConfig(answer="said"))
    assert [getattr(prompt, "answer", "") for prompt in found] == ["It is red.", "A cat.", ""]
    assert [getattr(prompt, "source_caption", "") for prompt in found] == ["a blue house", "", ""]
    assert len({describe_row(prompt) for prompt in found}) == 3
    assert describe_row(copy.deepcopy(found[1])) == describe_row(found[1]) != "a cat"
    assert not any(isinstance(prompt, Edit) for prompt in load_prompts(row_file(tmp_path, *rows))[1:])
    with pytest.raises(UserError, match=r"rows\.jsonl:1: said: must be a text, got a list"):
        load_prompts(row_file(tmp_path, {"prompt": "a", "said": ["b"]}), DataConfig(answer="said"))


def test_built_in_edits_say_what_their_sources_show() -> None:
    (edit,) = load_prompts("builtin:shapes/edits/tune", limit=1)
    assert isinstance(edit, Edit)
    assert edit.shapes is not None
    assert edit.source_caption == " and ".join(f"a {one.thing}" for one in edit.shapes.before.placed[:2])


def test_built_in_edits_are_exact_and_apart_from_each_other() -> None:
    found = {split: load_prompts(f"builtin:shapes/edits/{split}", limit=30) for split in ("train", "tune", "test")}
    assert load_prompts("builtin:shapes/edits", limit=30) == found["train"]
    for prompts in found.values():
        shapes = [prompt.shapes for prompt in prompts if isinstance(prompt, Edit) and prompt.shapes]
        assert [edit.change.kind for edit in shapes] == ["add", "recolour", "remove"] * 10
        before = from_pil([sources_of(prompt)[0].load() for prompt in prompts])
        assert not any(verify_edits(before, shapes))
        for prompt, edit in zip(prompts, shapes, strict=True):
            named = [str(thing) in caption_of(prompt) for thing in edit.after.things]
            assert all(named) or (edit.change.kind == "add" and named == [True, False, True])
    with pytest.raises(UserError, match="did you mean 'builtin:shapes/edits/test'"):
        load_prompts("builtin:shapes/edits/tset")


def test_an_edit_is_a_text_and_may_be_copied(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (edit,) = load_prompts(row_file(tmp_path, {"prompt": "make it red", "images": "a.png", "caption": "red"}))
    again = copy.deepcopy(edit)
    assert json.dumps([edit]) == '["make it red"]'
    assert (again, caption_of(again), sources_of(again)[0].digest) == (edit, "red", sources_of(edit)[0].digest)
    assert [one.size for one in source_thumbnails(edit, (20, 24))] == [(20, 24)]
    assert [one.size for one in source_thumbnails(edit, (5, 5))] == [(4, 5)]


class Blind:
    """A reward that sees captions."""

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        self.seen = list(prompts)
        return images.mean((1, 2, 3))


class Seeing:
    """A reward that sees sources."""

    sees_sources = True

    def __call__(self, images: torch.Tensor, prompts: Sequence[str], sources: Sequence[Any]) -> torch.Tensor:
        self.seen, self.sources = list(prompts), sources
        return images.mean((1, 2, 3))


def test_rewards_get_captions_or_instructions_with_sources(tmp_path: Path) -> None:
    image = picture(tmp_path / "a.png")
    rows = [{"prompt": "make it red", "images": "a.png", "caption": "a red house"}, {"prompt": "a cat"}]
    prompts, images = load_prompts(row_file(tmp_path, *rows)), torch.rand(2, 3, 8, 8)
    blind, seeing = Blind(), Seeing()
    assert torch.equal(score_images(blind, images, prompts), score_images(seeing, images, prompts))
    assert blind.seen == ["a red house", "a cat"]
    assert seeing.seen == ["make it red", "a cat"]
    assert torch.equal(seeing.sources[0][0], from_pil([image])[0])
    assert seeing.sources[1] == ()


@pytest.mark.parametrize("nothing", [0, 2.0, False])
def test_only_what_is_empty_means_no_images(nothing: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl:1: images: must be the path of an image or a list, got"):
        load_prompts(row_file(tmp_path, {"prompt": "make it red", "images": nothing}))


@pytest.mark.parametrize("column", ["images", "caption"])
def test_a_column_that_no_row_fills_is_refused_before_a_run(column: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    file = row_file(tmp_path, {"prompt": "make it red", "images": "a.png", "caption": "a red house"})
    data = DataConfig.model_validate({"prompts": file})
    assert len(all_prompts(TrainConfig(data=data)).data) == 1
    with pytest.raises(UserError, match=rf"data\.{column}: no row .* under 'pictures'"):
        all_prompts(TrainConfig(data=data.model_copy(update={column: "pictures"})))
