"""Prompts of a user's own files reach a model token by token: white space at their ends, images in place."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imgen_common.errors import UserError
from interleave.agents.prompts import (
    TemplateFile,
    TemplateRef,
    load_template,
    render_critic,
    render_planner,
    words_and_images,
)
from interleave.datasets.rows import SftRow
from interleave.loop.requests import make_interleaved_request, read_requests
from interleave.models.chat.local import to_conversation
from interleave.protocols import BackendError, CriticInput, HashedImage, Message, SystemText
from interleave.storage.images import ImageStore
from scripts.miniature.agents import models

RED, BLUE = (HashedImage.from_pil(Image.new("RGB", (32, 32), color)) for color in ("red", "blue"))
SOURCE = '''
import missing_package

PLANNER = """
plan: {text_input}
"""
CRITIC = """
was: {original_instruction} used: {rewritten_prompt}
"""
NUMBER = 3
MADE = f"{NUMBER}"
raise RuntimeError("never run")
'''


@pytest.fixture(scope="module")
def processor() -> Any:
    """The miniature's processor with the chat template of Qwen3-VL, which TRL carries."""
    made = models.processor()
    found = importlib.util.find_spec("trl")
    assert found is not None
    assert found.origin is not None
    made.chat_template = (Path(found.origin).parent / "chat_templates" / "qwen3_vl.jinja").read_text()
    return made


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "system.py").write_text(SOURCE)
    return tmp_path / "system.py"


def ids(processor: Any, message: Message) -> list[int]:
    """What the model reads, as `LocalChat` makes it."""
    conversation = to_conversation(message)
    found = processor.apply_chat_template([conversation], tokenize=True, add_generation_prompt=True, return_dict=True)
    return found["input_ids"][0]


def by_hand(processor: Any, *parts: str | None, system: str = "") -> list[int]:
    """The same, spelled out; None is an image of 32x32 pixels, which takes one token here."""
    tokenizer = processor.tokenizer
    side = 32 // processor.image_processor.patch_size // processor.image_processor.merge_size
    image = "<|vision_start|>" + "<|image_pad|>" * side**2 + "<|vision_end|>"
    text = "".join(image if part is None else part for part in parts)
    before = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return tokenizer.encode(f"{before}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("text", ["draw a red circle", " \n draw\n"])
def test_a_planner_without_images(processor: Any, source: Path, text: str) -> None:
    exact = load_template(TemplateFile(file=f"{source}:PLANNER"))
    assert ids(processor, render_planner(exact, text, ())) == by_hand(processor, f"\nplan: {text}\n")
    file = source.with_name("planner.txt")
    file.write_text("\nplan: {text_input}\n")
    trimmed, kept = load_template(str(file)), load_template(TemplateFile(file=str(file)))
    assert ids(processor, render_planner(trimmed, text, ())) == by_hand(processor, f"plan: {text}")
    assert ids(processor, render_planner(kept, text, ())) == by_hand(processor, f"\nplan: {text}\n")
    assert trimmed.hash != kept.hash == exact.hash


def test_images_of_a_planner_stand_first_or_in_their_places(processor: Any, source: Path, tmp_path: Path) -> None:
    exact = load_template(TemplateFile(file=f"{source}:PLANNER"))
    assert ids(processor, render_planner(exact, "a cat", (RED,))) == by_hand(processor, None, "\nplan: a cat\n")
    store = ImageStore(tmp_path / "images")
    request = make_interleaved_request(["make ", RED, " like ", BLUE, "\n"], store)
    assert request.text == "make [image 1] like [image 2]\n"
    message = render_planner(exact, *words_and_images(request, (RED, BLUE)))
    expected = by_hand(processor, "\nplan: make ", None, " like ", None, "\n\n")
    assert ids(processor, message) == expected
    row = SftRow.from_message(message, "answer")
    assert ids(processor, row.message(store.get)) == expected  # a training row shows what run time shows
    placed = load_template(TemplateFile(file=f"{source}:PLANNER", prefix="<image>, then <image>:"))
    two = render_planner(placed, "a cat", (RED, BLUE))
    assert ids(processor, two) == by_hand(processor, None, ", then ", None, ":\nplan: a cat\n")
    with pytest.raises(BackendError, match="has places for 2 images, and 1 are given"):
        render_planner(placed, "a cat", (RED,))


def test_a_marker_in_a_request_is_no_place(processor: Any, source: Path) -> None:
    exact = load_template(TemplateFile(file=f"{source}:PLANNER", prefix="<image>"))
    (image, text) = render_planner(exact, "an <image> of <|im_end|>", (RED,))
    assert image == RED
    assert "<image>" not in str(text)
    assert "<|im_end|>" not in str(text)


def test_a_critic_as_it_was_trained(processor: Any, source: Path) -> None:
    shown = CriticInput(RED, BLUE, "draw a cat", "draw one cat")
    words = "\nwas: draw a cat used: draw one cat\n"
    plain = load_template(TemplateFile(file=f"{source}:CRITIC"))
    assert ids(processor, render_critic(plain, shown)) == by_hand(processor, None, None, words)
    released = load_template(TemplateFile(file=f"{source}:CRITIC", prefix="<image><image>\n"))
    assert ids(processor, render_critic(released, shown)) == by_hand(processor, None, None, "\n" + words)
    between = load_template(TemplateFile(file=f"{source}:CRITIC", prefix="before <image> after <image>"))
    assert ids(processor, render_critic(between, shown)) == by_hand(processor, "before ", None, " after ", None, words)
    with pytest.raises(UserError, match="1 places for images; a critic is shown 2"):
        render_critic(load_template(TemplateFile(file=f"{source}:CRITIC", prefix="<image>")), shown)


def test_a_system_turn_stands_before_the_users(processor: Any) -> None:
    message = (SystemText("You judge.\n"), "Is this red? ", RED)
    assert ids(processor, message) == by_hand(processor, "Is this red? ", None, system="You judge.\n")


@pytest.mark.parametrize(
    ("ref", "said"),
    [
        ("none.py:PLANNER", "no such file"),
        ("system.py", r"must be the path of a \.txt file, or FILE\.py:NAME"),
        ("system.py:PLANER", "has no text named 'PLANER'; did you mean 'PLANNER'"),
        ("system.py:MADES", "has no text named 'MADES'"),
        ("system.py:NUMBER", "has no text named 'NUMBER'"),
        ("broken.py:A", "not Python that can be read"),
        ("zero.py:A", "holds a zero byte"),
        ("other.txt:A", r"must be the path of a \.txt file"),
    ],
)
def test_a_file_without_such_a_text_is_named(source: Path, ref: str, said: str) -> None:
    source.with_name("broken.py").write_text('A = """')
    source.with_name("zero.py").write_bytes(b'A = "\0"')
    source.with_name("other.txt").write_text("{text_input}")
    with pytest.raises(UserError, match=said):
        load_template(TemplateFile(file=f"{source.parent}/{ref}"))


def test_a_row_of_a_file_places_its_images(tmp_path: Path) -> None:
    RED.image.save(tmp_path / "red.png")
    store = ImageStore(tmp_path / "images")
    file = tmp_path / "requests.jsonl"
    file.write_text('{"content": ["first ", {"image": "red.png"}, {"image": "red.png"}, " last"], "id": "a"}\n')
    (request,) = read_requests(file, store)
    assert request.texts == ("first ", "", " last")
    assert request.image_ids == (RED.id, RED.id)
    for row, said in (
        ('{"content": ["a"], "text": "b"}', "give all of it in content"),
        ('{"content": [{"picture": "red.png"}]}', "content.0"),
        ('{"content": [{"image": "none.png"}, "a"]}', "none.png: cannot be read"),
        ('{"content": [" ", ""]}', "the request is empty"),
    ):
        file.write_text(row)
        with pytest.raises(UserError, match=said):
            read_requests(file, store)


def test_texts_must_stand_around_the_images(tmp_path: Path) -> None:
    store = ImageStore(tmp_path)
    request = make_interleaved_request([RED, "only"], store)
    assert request.texts == ("", "only")
    assert make_interleaved_request(["no ", "image"], store).texts == ()
    with pytest.raises(ValueError, match="texts has 2 places for 1 images"):
        type(request).model_validate(request.model_dump() | {"texts": ("a", "b", "c")})


REFS: list[TemplateRef] = ["shapes_critic", TemplateFile(file="a.txt", prefix="<image>")]


@pytest.mark.parametrize("ref", REFS)
def test_references_are_settings(ref: TemplateRef) -> None:
    from imgen_common.config import load
    from interleave.training.config import GrpoConfig

    text = ref if isinstance(ref, str) else ref.model_dump_json()
    assert load(GrpoConfig, [], [f"template={text}"]).template == ref
