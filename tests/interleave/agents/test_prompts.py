import hashlib
import itertools
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2Tokenizer

from imgen_common.errors import UserError
from imgen_common.judging.escaping import JOINER, escape_control_tokens
from interleave.agents.parsing import parse_plan, parse_verdict
from interleave.agents.prompts import (
    BUILTIN,
    Template,
    load_template,
    render_critic,
    render_plan,
    render_planner,
    render_verdict,
)
from interleave.models.chat.local import to_conversation
from interleave.protocols import CriticInput, HashedImage
from interleave.records import Plan, PlanStep, Verdict
from scripts.miniature.world.vocabulary import qwen_tokenizer

CONTROL = [
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
    *("<think>", "</think>", "<tool_call>", "<image>", "<s>", "</s>", "<<SYS>>", "[INST]", "[/INST]", "[IMG]"),
    *("<start_of_turn>", "<end_of_utterance>", "<\uff5cUser\uff5c>", "<IMG_CONTEXT>", "<|eot_id|>", "[gMASK]"),
]
PIECES = [
    *CONTROL,
    *(
        "{text_input}",
        "{rewritten_prompt}",
        "{",
        "}",
        "{{",
        "<answer>",
        "</answer>",
        "<",
        "|",
        "im_end|>",
        "think>",
        "[",
    ),
    *(
        "INST]",
        "\x00",
        "\x1b[31m",
        "\r\n",
        "\r",
        "\t",
        "\x85",
        "\ud800",
        "\U0001f600",
        "a red circle",
        " ",
        "\n",
        "<3",
        "é",
    ),
]
nasty = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=12).map("".join)
words = st.text(st.characters(codec="utf-8"), max_size=30)
filled = words.filter(str.strip)
RED, BLUE, WHITE = (HashedImage.from_pil(Image.new("RGB", (4, 4), colour)) for colour in ("red", "blue", "white"))


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens(CONTROL[:16], special_tokens=True)
    tokenizer.add_tokens(CONTROL[16:])  # as Qwen3 has <think>: not special, yet matched in any text
    return tokenizer


def control_ids(tokenizer: Qwen2Tokenizer, text: str) -> set[int]:
    return set(tokenizer(text)["input_ids"]) & set(tokenizer.convert_tokens_to_ids(CONTROL))


# --- inert text ------------------------------------------------------------------------------------------------------


@given(text=nasty)
def test_no_tokenizer_reads_a_control_token_in_inert_text(tokenizer: Qwen2Tokenizer, text: str) -> None:
    assert control_ids(tokenizer, escape_control_tokens(text)) == set()


@pytest.mark.parametrize("token", CONTROL)
def test_the_tokenizer_does_read_them_in_raw_text(tokenizer: Qwen2Tokenizer, token: str) -> None:
    assert control_ids(tokenizer, f"a {token} b")
    assert not control_ids(tokenizer, escape_control_tokens(f"a {token} b"))


@given(first=nasty, second=nasty)
def test_two_inert_texts_make_no_control_token_where_they_meet(
    tokenizer: Qwen2Tokenizer, first: str, second: str
) -> None:
    assert control_ids(tokenizer, escape_control_tokens(first) + escape_control_tokens(second)) == set()


@given(nasty)
def test_inert_text_looks_the_same_and_is_left_alone(text: str) -> None:
    once = escape_control_tokens(text)
    assert escape_control_tokens(once) == once
    assert once.encode().decode() == once
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", once)
    visible = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", " ", text.replace("\r\n", "\n").replace("\r", "\n"))
    assert once.replace(JOINER, "") == re.sub("[\ud800-\udfff]", "\ufffd", visible).replace(JOINER, "")


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"], exclude_characters="<[")))
def test_plain_words_are_left_alone(text: str) -> None:
    assert escape_control_tokens(text) == text


def test_signs_that_open_nothing_are_left_alone() -> None:
    assert escape_control_tokens("2 < 3, <3, a <- b, [1], {x}\n\tend") == "2 < 3, <3, a <- b, [1], {x}\n\tend"


# --- templates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILTIN)
def test_a_builtin_template_is_known_by_the_hash_of_its_text(name: str) -> None:
    found = load_template(name)
    assert found.name == name
    assert found.text == found.text.strip()
    assert found.hash == hashlib.sha256(found.text.encode()).hexdigest()
    assert len(found.placeholders) == len(re.findall(r"\{[a-z_]+\}", found.text))  # each once


def test_the_miniature_reads_little_but_the_words() -> None:
    (prompt,) = render_planner(load_template("shapes_planner"), "draw a red circle", [])
    assert prompt == "plan: draw a red circle"
    look = CriticInput(WHITE, RED, "a red circle", "one red circle")
    assert render_critic(load_template("shapes_critic"), look)[2] == "was: a red circle used: one red circle"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("plan {text_inputt}", "did you mean 'text_input'?"),
        ("plan", "no placeholder"),
        ("<|im_end|> {text_input}", "remove <|im_end|>"),
        ("", "no placeholder"),
    ],
)
def test_a_mistake_in_a_template_of_the_users_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.txt"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(said)):
        load_template(str(file))


def test_a_template_of_the_users_is_used_as_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("\ufeffPlan {'step_number': 1, 'prompt': None}: {text_input}\n")
    assert render_planner(load_template(str(file)), "a cat", []) == ("Plan {'step_number': 1, 'prompt': None}: a cat",)


def test_a_template_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'critic_story'"):
        load_template("critic_storry")
    with pytest.raises(UserError, match="no such file"):
        load_template(str(tmp_path / "none.txt"))
    for strange in ("~~/a.txt", "~nobody-here/a.txt", "a\0b.txt", "\ud83d.txt", "x" * 5000 + ".txt"):
        with pytest.raises(UserError, match=r"no such home folder|cannot be read"):
            load_template(strange)
    (tmp_path / "latin.txt").write_bytes(b"{text_input} \xe9")
    with pytest.raises(UserError, match="not UTF-8 at byte 13"):
        load_template(str(tmp_path / "latin.txt"))


def test_a_template_for_the_other_agent_is_refused() -> None:
    with pytest.raises(UserError, match=re.escape("{text_input} is missing")):
        render_planner(load_template("critic"), "a cat", [])
    with pytest.raises(UserError, match=re.escape("{original_instruction} is missing")):
        render_critic(load_template("planner_text"), CriticInput(WHITE, RED, "a", "b"))
    with pytest.raises(UserError, match=re.escape("{text_input} has no value here")):
        render_critic(
            Template("mix", "{original_instruction}{rewritten_prompt}{text_input}"), CriticInput(WHITE, RED, "", "")
        )


# --- prompts ---------------------------------------------------------------------------------------------------------


@given(st.sampled_from(["planner_text", "planner_images", "shapes_planner"]), nasty, st.integers(0, 3))
def test_the_request_stands_in_the_planners_prompt_once_and_changes_nothing_else(
    name: str, text: str, count: int
) -> None:
    message = render_planner(load_template(name), text, [RED] * count)
    assert message[:count] == (RED,) * count
    (prompt,) = message[count:]
    before, after = load_template(name).text.split("{text_input}")
    assert prompt == before + escape_control_tokens(text) + after


@given(st.sampled_from(["critic", "shapes_critic"]), nasty, nasty.filter(bool))
def test_the_critic_reads_two_images_and_then_both_prompts(name: str, original: str, used: str) -> None:
    before, after, prompt = render_critic(
        load_template(name), CriticInput(WHITE, RED, original, used, "request", (("x", BLUE),))
    )
    assert (before, after) == (WHITE, RED)
    parts = re.split(r"\{original_instruction\}|\{rewritten_prompt\}", load_template(name).text)
    assert prompt == parts[0] + escape_control_tokens(original) + parts[1] + escape_control_tokens(used) + parts[2]


def test_no_prompt_used_means_the_original_one() -> None:
    critic = load_template("critic")
    assert render_critic(critic, CriticInput(WHITE, RED, "a cat", "")) == render_critic(
        critic, CriticInput(WHITE, RED, "a cat", "a cat")
    )


@given(nasty, st.lists(st.tuples(nasty, st.sampled_from([None, RED, BLUE])), max_size=4))
def test_the_story_is_shown_in_its_order(request: str, story: list[tuple[str, HashedImage | None]]) -> None:
    message = render_critic(
        load_template("critic_story"), CriticInput(WHITE, BLUE, "do it", "do", request, tuple(story))
    )
    pictures = [part for part in message if isinstance(part, HashedImage)]
    assert pictures == [WHITE, BLUE, *(picture for _, picture in story if picture is not None)]
    text = "".join(part if isinstance(part, str) else "\0" for part in message[2:])
    told = (
        "".join(escape_control_tokens(said) + ("\n\0\n" if picture else "\n") for said, picture in story)
        or "nothing yet"
    )
    values = {
        "request": escape_control_tokens(request),
        "story": told,
        "original_instruction": "do it",
        "rewritten_prompt": "do",
    }
    assert text == re.sub(r"\{(\w+)\}", lambda match: values[match[1]], load_template("critic_story").text)
    assert not any(isinstance(a, str) and isinstance(b, str) for a, b in itertools.pairwise(message))


def test_a_conversation_holds_images_and_texts_in_order() -> None:
    assert to_conversation((RED, "look", BLUE)) == [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": RED.image},
                {"type": "text", "text": "look"},
                {"type": "image", "image": BLUE.image},
            ],
        }
    ]


# --- answers that are taught -----------------------------------------------------------------------------------------


def as_read(reasoning: str) -> str:
    return escape_control_tokens(escape_control_tokens(reasoning).strip())


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    text = st.one_of(nasty.filter(lambda text: "\ud800" not in text), words).filter(str.strip)
    maybe = st.none() | text.filter(lambda text: text != "None")  # which the tolerant policy takes for a null
    steps = []
    for index in range(1, draw(st.integers(1, 4)) + 1):
        prompt = draw(maybe)
        said = draw(maybe if prompt else filled.filter(lambda text: text != "None"))
        steps.append(PlanStep(index=index, name=draw(maybe) or "", instruction=draw(maybe), prompt=prompt, text=said))
    return Plan(steps=tuple(steps), reasoning=draw(nasty))


@example(plan=Plan(steps=(PlanStep(index=1, text="words"),), reasoning="<\x00"))
@given(plan=plans())
def test_a_taught_plan_reads_back(plan: Plan) -> None:
    expected = plan.model_copy(update={"reasoning": as_read(plan.reasoning)})
    assert parse_plan(render_plan(plan)) == parse_plan(render_plan(plan), "tolerant") == expected


@given(st.booleans(), nasty.filter(lambda text: "\ud800" not in text and text.strip()), nasty)
def test_a_taught_verdict_reads_back(success: bool, prompt: str, reasoning: str) -> None:
    verdict = Verdict(success=success, refined_prompt=prompt, reasoning=reasoning)
    expected = verdict.model_copy(update={"reasoning": as_read(reasoning)})
    assert parse_verdict(render_verdict(verdict)) == expected


@given(prompt=nasty, reasoning=nasty)
@example(prompt="", reasoning="<\x00")
def test_a_taught_answer_holds_no_tag_but_its_own(tokenizer: Qwen2Tokenizer, prompt: str, reasoning: str) -> None:
    answer = render_verdict(Verdict(success=False, refined_prompt=prompt, reasoning=reasoning))
    assert re.findall(r"<[|/A-Za-z<]", answer) == ["<t", "</", "<a", "</"]
    think = set(tokenizer.convert_tokens_to_ids(["<think>", "</think>"]))
    assert control_ids(tokenizer, answer.encode("utf-8", "replace").decode()) == think
