"""Prompts of a user's own files reach a model token by token: white space at their ends, images in place."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imgen_common.errors import UserError
from interleave.agents.prompts import (
    IMAGE_MARKER,
    Template,
    TemplateFile,
    TemplateRef,
    load_template,
    nearest_prompt,
    render_critic,
    render_plan,
    render_planner,
    words_and_images,
)
from interleave.cli import main
from interleave.datasets.check import PromptCounts, SetChecker
from interleave.datasets.importing import import_set
from interleave.datasets.rows import SftRow, parse_row, read_lines
from interleave.loop.config import ModelPlanner, RunConfig
from interleave.loop.requests import make_interleaved_request, read_requests
from interleave.models.chat.local import to_conversation
from interleave.protocols import BackendError, CriticInput, HashedImage, Message, SystemText
from interleave.records import Plan, PlanStep
from interleave.storage.images import ImageStore
from interleave.training.rows import chat_turns
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
        (
            "none.py:PLANNER",
            r"none.py: no such file; did you mean .broken\.py.\?; put it there, as the first lines of the recipe say",
        ),
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


# --- rows of others ----------------------------------------------------------------------------------------------


def flat(message: Message) -> str:
    """A prompt with `<image>` in the place of each image."""
    return IMAGE_MARKER.join(SftRow.from_message(message, "answer").texts)


WORDS = st.text(st.sampled_from("ab \n<>[]{}|_/\u2060") | st.characters(codec="utf-8"), max_size=12)


@settings(max_examples=60)
@given(WORDS, WORDS, WORDS, st.sampled_from(["", "<image><image>", "a <image> b <image>"]))
def test_every_prompt_of_run_time_is_known_as_one(first: str, second: str, third: str, prefix: str) -> None:
    shown = CriticInput(RED, BLUE, first, second, third, ((first, RED), (third, None), (second, BLUE)))
    for text in ("was: {original_instruction} used: {rewritten_prompt}\n", "{original_instruction}.{rewritten_prompt}"):
        template = Template("critic", prefix + text)
        assert nearest_prompt(template, rendered := flat(render_critic(template, shown))) == rendered
    template = Template("critic", "{request} of\n{story}now {original_instruction}\n{rewritten_prompt}\nend")
    if second.strip() and "\n" not in first + third:  # what stands between them is not among the words
        assert nearest_prompt(template, rendered := flat(render_critic(template, shown))) == rendered
    for template in (Template("planner", "plan: {text_input}\n"), Template("planner", "{text_input}")):
        for words, images in ((first, ()), (first, (RED, BLUE)), ((first, RED, second, BLUE, third), ())):
            rendered = flat(render_planner(template, words, images))
            assert nearest_prompt(template, rendered) == rendered
    template = Template("planner", prefix + " plan: {text_input}")
    rendered = flat(render_planner(template, first, (RED, BLUE)))
    assert nearest_prompt(template, rendered) == rendered


CRITIC, PLANNER = "\nwas: {original_instruction} used: {rewritten_prompt}\n", "\nplan: {text_input}\n"
TWO = "<image><image>"
OTHER = [
    (PLANNER, "\nplan: draw a cat", "", "\n"),  # white space at an end was trimmed
    (PLANNER, "plan: draw a cat\n", "plan: draw a cat\n", "\nplan: "),
    (PLANNER, "\nplan: draw a cat\n\n\n.", ".", ""),
    (PLANNER, "\nplan it: draw a cat\n", " it: draw a cat\n", ": "),
    (PLANNER, "\nplan: draw <b>a cat\n", "b>a cat\n", "\u2060b>a cat\n"),
    (PLANNER, "<image>\nplan: draw <image> cat\n", "image> cat\n", "\u2060image> cat\n"),
    (PLANNER, "\n<image>plan: draw a cat\n", "<image>plan: draw a cat\n", "plan: "),
    (CRITIC, TWO + "\nwas: a cat used: \n", "\n", "a cat\n"),
    (CRITIC, "<image>\nwas: a cat used: a cat<image>\n", "\nwas: a cat used: a cat<image>\n", "<image>" + CRITIC[:6]),
    (CRITIC, TWO + "\nwas: a cat used a cat\n", " a cat\n", ": "),
    (CRITIC, TWO + "\n\nwas: a cat used: a cat\n", "\nwas: a cat used: a cat\n", "was: "),
    (TWO + "\n" + CRITIC, TWO + "\nwas: a cat used: a cat\n", "was: a cat used: a cat\n", "\nwas: "),
]


@pytest.mark.parametrize(("text", "shown", "has", "expected"), OTHER)
def test_what_run_time_cannot_show_differs_from_where_it_cannot(
    text: str, shown: str, has: str, expected: str, processor: Any
) -> None:
    template = Template("mine", text)
    counts = PromptCounts("critic.template", (template, template))
    image_ids = ("a", "b")[: shown.count(IMAGE_MARKER)]
    counts.add(SftRow(texts=tuple(shown.split(IMAGE_MARKER)), image_ids=image_ids, completion="x"), 7)
    assert (counts.same, counts.different, counts.first) == (0, 1, (7, has, expected))
    encode = processor.tokenizer.encode
    assert encode(nearest_prompt(template, shown)) != encode(shown)


def write_critic_rows(file: Path, template: Template, *more: str) -> None:
    """Rows of a critic's prompts, then of other texts, as the released code writes them."""
    RED.image.save(file.with_name("red.png")), BLUE.image.save(file.with_name("blue.png"))
    asked = [CriticInput(RED, BLUE, "draw a cat", used) for used in ("draw one cat", "")]
    texts = [*(flat(render_critic(template, one)) for one in asked), *more]
    answer = '<think>no cat</think><answer>{"previous_step_success": false, "refine_prompt": "a cat"}</answer>'
    rows = [
        {
            "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}],
            "images": ["red.png", "blue.png"],
        }
        for text in texts
    ]
    file.write_text(json.dumps(rows))


def test_a_check_says_whether_imported_rows_are_what_run_time_shows(
    processor: Any, source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = f"{source}:CRITIC"
    template = load_template(TemplateFile(file=ref, prefix="<image><image>\n"))
    unused = flat((RED, BLUE, "\n\nwas: draw a cat used: \n"))
    write_critic_rows(source.with_name("rows.json"), template, unused)
    made = source.with_name("set")
    import_set("sharegpt", source.with_name("rows.json"), made, role="critic")

    def check(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["interleave", "data", "check", str(made), *words])
        with pytest.raises(SystemExit) as stop:
            main()
        output = capsys.readouterr()
        return int(stop.value.code or 0), output.out + output.err

    code, told = check()
    assert code == 0  # the rows are as they should be for some template
    assert (
        "warning: critic_sft.jsonl: 3 of 3 prompts are not what run time shows with shapes_critic: line 1 has" in told
    )
    assert "critic.template: {file: PATH.txt}" in told
    assert told.splitlines()[-1] == "no problems"
    recipe = source.with_name("recipe.yaml")
    recipe.write_text(f'critic: {{template: {{file: "{ref}", prefix: "<image><image>\\n"}}}}')
    code, told = check("--run-config", str(recipe))
    assert (code, "1 of 3 prompts are not" in told) == (0, True)
    assert r"line 3 has '\n' where run time has 'draw a cat\n'" in told
    code, told = check("--run-config", str(recipe), "--json")
    (found,) = json.loads(told.splitlines()[-1])["prompts"].values()
    assert (found["same"], found["different"], found["templates"]) == (2, 1, [ref])
    assert found["first"] == {"line": 3, "row": "\n", "run_time": "draw a cat\n"}
    assert found["warning"].startswith("1 of 3 prompts are not")
    # the rows that are said to be the same are the same tokens, in training and at run time
    rows = [parse_row(line, SftRow) for _, line in read_lines(made / "critic_sft.jsonl")]
    store = ImageStore(made / "images")
    for row, used in zip(rows, ("draw one cat", "", ""), strict=True):
        trained = processor.apply_chat_template(chat_turns(row)[:1], tokenize=False, add_generation_prompt=True)
        message = render_critic(template, CriticInput(RED, BLUE, "draw a cat", used))
        run_time = processor.apply_chat_template(to_conversation(message), tokenize=False, add_generation_prompt=True)
        assert (trained == run_time) == (row is not rows[2])
        assert (ids(processor, row.message(store.get)) == ids(processor, message)) == (row is not rows[2])

    write_critic_rows(source.with_name("rows.json"), template)
    made = source.with_name("exact")
    import_set("sharegpt", source.with_name("rows.json"), made, role="critic")
    code, told = check("--run-config", str(recipe))
    assert (code, f"critic_sft.jsonl: all 2 prompts are what run time shows with {ref}" in told) == (0, True)
    assert "warning" not in told
    assert json.loads(check("--run-config", str(recipe), "--json")[1].splitlines()[-1])["prompts"][
        "critic_sft.jsonl"
    ] == {"templates": [ref], "same": 2, "different": 0, "first": None, "warning": None}
    for words, said in (
        (["--set", "critic.kind=none"], "critic.kind none: has no template for the rows of critic_sft"),
        (["--set", "critic.template=none.txt"], "none.txt"),
        (["--run-config", "none.yaml"], "none.yaml: no such file"),
    ):
        code, told = check(*words)
        assert (code, told.count("\n"), said in told) == (2, 1, True), told


def test_a_check_of_other_sets_compares_prompts_where_a_recipe_is_given(source: Path) -> None:
    """A planner's, of rows with and without images; its templates are two."""
    text, images = TemplateFile(file=f"{source}:PLANNER"), TemplateFile(file=f"{source}:PLANNER", prefix="<image>: ")
    made = source.with_name("set")
    made.mkdir()
    store = ImageStore(made / "images")
    store.put(RED)
    plan = Plan(reasoning="", steps=(PlanStep(index=1, prompt="a cat"),))
    rows = [
        SftRow.from_message(render_planner(load_template(ref), "a cat", given), render_plan(plan))
        for ref, given in ((text, ()), (images, (RED,)))
    ]
    (made / "planner_sft.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in rows))
    checker = SetChecker(made / "planner_sft.jsonl")
    assert list(checker.problems()) == []
    assert checker.prompts == {}
    for second, same in ((images, 2), (text, 1)):
        planner = ModelPlanner(text_template=text, images_template=second)
        checker = SetChecker(made / "planner_sft.jsonl", run=RunConfig(planner=planner))
        assert list(checker.problems()) == []
        assert checker.prompts["planner_sft.jsonl"].same == same
