import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgen_common.http.chat import ALL_REASONING
from imgen_common.judging.objects import ParseMode
from interleave.agents.parsing import ParseFailure, describe_failure, parse_plan, parse_verdict
from interleave.protocols import Reply
from interleave.records import Plan, PlanStep, Verdict

MODES: tuple[ParseMode, ...] = ("strict", "tolerant", "direct")
NOTHING = None


def wrapped(content: str, think: str = "<think>I looked.</think>") -> str:
    return f"{think}<answer>{content}</answer>"


def verdict_json(success: object = False, prompt: object = "a red cat") -> str:
    return json.dumps({"previous_step_success": success, "refine_prompt": prompt})


# The vectors that were observed on the reference: the content of the answer, and the prompt that the strict and the
# tolerant mode read from it; NOTHING where it is unreadable.
CONTENTS = {
    "strict JSON": (verdict_json(), "a red cat", "a red cat"),
    "Python literal": ("{'previous_step_success': False, 'refine_prompt': 'a red cat'}", NOTHING, "a red cat"),
    "apostrophe in single quotes": (
        "{'previous_step_success': False, 'refine_prompt': 'the cat's hat, the dogs' bowl'}",
        NOTHING,
        "the cat's hat, the dogs' bowl",
    ),
    "escaped apostrophe": (r"{'previous_step_success': False, 'refine_prompt': 'the cat\'s'}", NOTHING, "the cat's"),
    "doubled apostrophe": ("{'previous_step_success': False, 'refine_prompt': 'it''s'}", NOTHING, "it''s"),
    "apostrophe in double quotes": (
        "{'previous_step_success': False, 'refine_prompt': \"the cat's\"}",
        NOTHING,
        "the cat's",
    ),
    "inner double quotes": (
        '{"previous_step_success": false, "refine_prompt": "a sign "OPEN" here"}',
        NOTHING,
        'a sign "OPEN" here',
    ),
    "code fence": (f"\n```json\n{verdict_json()}\n```\n", "a red cat", "a red cat"),
    "code fence without a language": (f"```\n{verdict_json()}\n```", "a red cat", "a red cat"),
    "verdict 0": (verdict_json(0), NOTHING, NOTHING),
    "verdict 1": (verdict_json(1), NOTHING, NOTHING),
    "verdict as string": (verdict_json("True"), NOTHING, NOTHING),
    "verdict as list": (verdict_json([True]), NOTHING, NOTHING),
    "verdict missing": ('{"refine_prompt": "x"}', NOTHING, NOTHING),
    "prompt null": (verdict_json(False, None), NOTHING, NOTHING),
    "prompt null, success": (verdict_json(True, None), NOTHING, NOTHING),
    "prompt None in words": (verdict_json(True, "None"), "None", NOTHING),
    "prompt missing": ('{"previous_step_success": false}', NOTHING, NOTHING),
    "prompt a number": (verdict_json(False, 3), NOTHING, NOTHING),
    "prompt empty, failed": (verdict_json(False, " "), NOTHING, NOTHING),
    "prompt empty, success": (verdict_json(True, ""), "", ""),
    "extra keys": (
        '{"score": 3, "previous_step_success": false, "refine_prompt": "a red cat", "why": {"x": [1, null]}}',
        "a red cat",
        "a red cat",
    ),
    "truncated object": ('{"previous_step_success": false, "refine_prompt": "a red', NOTHING, NOTHING),
    "truncated after a brace": ('{"previous_step_success": false, "refine_prompt": "a {red}', NOTHING, NOTHING),
    "truncated Python": ("{'previous_step_success': False, 'refine_prompt': 'a red", NOTHING, NOTHING),
    "newline in the string": (
        '{"previous_step_success": false, "refine_prompt": "a red\ncat"}',
        "a red\ncat",
        "a red\ncat",
    ),
    "newline in a Python string": (
        "{'previous_step_success': False, 'refine_prompt': 'a red\ncat'}",
        NOTHING,
        "a red\ncat",
    ),
    "signs with spaces": (verdict_json(False, "3 / 4, size < 5 > 2"), "3 / 4, size < 5 > 2", "3 / 4, size < 5 > 2"),
    "JSON list": (f"[{verdict_json()}]", NOTHING, NOTHING),
    "plain word": ("error", NOTHING, NOTHING),
    "quoted string": (json.dumps(verdict_json()), NOTHING, NOTHING),
    "number": ("3", NOTHING, NOTHING),
    "empty": ("", NOTHING, NOTHING),
    "blank": (" \n", NOTHING, NOTHING),
    "key twice": (
        '{"previous_step_success": false, "previous_step_success": true, "refine_prompt": "x"}',
        NOTHING,
        NOTHING,
    ),
    "key twice in Python": (
        "{'previous_step_success': False, 'previous_step_success': True, 'refine_prompt': 'x'}",
        NOTHING,
        NOTHING,
    ),
    "comma too many": ('{"previous_step_success": false, "refine_prompt": "x",}', NOTHING, "x"),
    "comma missing": ("{'refine_prompt': 'x' 'previous_step_success': False}", NOTHING, "x"),
    "keys without quotes": ("{previous_step_success: false, refine_prompt: 'x'}", NOTHING, "x"),
    "keys without quotes, and words of Python's in a text": (
        '{previous_step_success: false, refine_prompt: "None of the signs says True, [1, 2, ]"}',
        NOTHING,
        "None of the signs says True, [1, 2, ]",
    ),
    "both styles": ("{'previous_step_success': false, 'refine_prompt': 'x'}", NOTHING, "x"),
    "words after the object": (verdict_json() + " done", NOTHING, NOTHING),
    "words before the object": ("Here: " + verdict_json(), NOTHING, NOTHING),
    "comment": ('{"previous_step_success": false, // no\n "refine_prompt": "x"}', NOTHING, NOTHING),
    "any script": (verdict_json(False, "赤い猫 \u0642\u0637\u0629 \U0001f408"),)
    + ("赤い猫 \u0642\u0637\u0629 \U0001f408",) * 2,
    "half an emoji": (r'{"previous_step_success": false, "refine_prompt": "\ud83d"}', NOTHING, NOTHING),
    "an emoji in escapes": (
        r"{'previous_step_success': False, 'refine_prompt': '\ud83d\ude00\x41\d\n'}",
        NOTHING,
        "\U0001f600A\\d\n",
    ),
    "nested braces": (verdict_json(False, "a {red} [cat]: {'a': 1}"),) + ("a {red} [cat]: {'a': 1}",) * 2,
    "tags in the prompt": (verdict_json(False, "say <answer> loud"),) + ("say <answer> loud",) * 2,
    "another answer in the prompt": (
        json.dumps({"previous_step_success": False, "refine_prompt": "<answer>" + verdict_json(True, "y")}),
        "<answer>" + verdict_json(True, "y"),
        "<answer>" + verdict_json(True, "y"),
    ),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONTENTS)
def test_contents_of_the_answer(name: str, mode: ParseMode) -> None:
    content, strict, tolerant = CONTENTS[name]
    expected = tolerant if mode == "tolerant" else strict
    for answer in (wrapped(content), *([wrapped(content, "")] if mode == "direct" else [])):
        found = parse_verdict(answer, mode)
        assert (found.refined_prompt if isinstance(found, Verdict) else NOTHING) == expected, found


GOOD = verdict_json(False, "good")
ENVELOPES = {
    "as asked": (wrapped(GOOD), True),
    "words around": (f"Sure. <think>a</think> So: <answer> {GOOD} </answer> Done.", True),
    "no think": (wrapped(GOOD, ""), False),
    "think not closed": (wrapped(GOOD, "<think>hm"), False),
    "think empty": (wrapped(GOOD, "<think></think>"), True),
    "think after the answer": (f"<answer>{GOOD}</answer><think>a</think>", False),
    "no answer": ("<think>a</think>" + GOOD, False),
    "answer inside think only": (f"<think><answer>{GOOD}</answer></think>", False),
    "answer inside think first": (wrapped(GOOD, "<think>maybe <answer>x</answer></think>"), True),
    "two answers": (wrapped(verdict_json(True, "bad")) + f"<answer>{GOOD}</answer>", True),
    "second answer broken": (wrapped(GOOD) + "<answer>x</answer>", False),
    "second answer cut short": (wrapped(GOOD) + "<answer>{", False),
    "answer opened twice": (f"<think>a</think><answer>hm, <answer>{GOOD}</answer>", True),
    "answer not closed": ("<think>a</think><answer>" + GOOD, False),
    "answer closed only": ("<think>a</think></answer>", False),
    "upper case": (f"<THINK>a</THINK><ANSWER>{GOOD}</ANSWER>", False),
    "nothing": ("", False),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ENVELOPES)
def test_the_last_answer_after_the_thought_counts(name: str, mode: ParseMode) -> None:
    answer, is_readable = ENVELOPES[name]
    if mode == "direct" and name in ("no think", "think after the answer"):
        is_readable = True
    found = parse_verdict(answer, mode)
    assert isinstance(found, Verdict) == is_readable, found
    assert not isinstance(found, Verdict) or found.refined_prompt == "good"


@pytest.mark.parametrize("thought", ["hm", "", "I see <answer>x</answer>", "\n<b> \n"])
def test_a_thought_that_the_chat_template_opened_is_read_by_the_tolerant_mode_only(thought: str) -> None:
    answer = wrapped(GOOD, f"{thought}</think>")
    assert parse_verdict(answer, "strict") == ParseFailure("no <think>")
    assert parse_verdict(answer, "tolerant") == Verdict(success=False, refined_prompt="good", reasoning=thought.strip())


@pytest.mark.parametrize("body", ["<|begin_of_box|>{}<|end_of_box|>", " <|begin_of_box|>\n{}\n<|end_of_box|>\n"])
def test_the_box_of_glm_is_taken_off_in_the_tolerant_mode(body: str) -> None:
    answer = f"<think>why</think><answer>{body.format(GOOD)}</answer>"
    assert parse_verdict(answer, "tolerant") == Verdict(success=False, refined_prompt="good", reasoning="why")
    assert isinstance(parse_verdict(answer, "strict"), ParseFailure)


def test_an_answer_without_any_tag_is_quoted() -> None:
    sorry = "I'm sorry,\nbut I can't help with that. " * 9
    said = describe_failure(Reply(sorry), ParseFailure("no <think>"))
    assert said.startswith("no <think>: it said \"I'm sorry, but I can't help with that. ")
    assert len(said) < 150
    for text in ("", "  ", "<think>hm"):
        assert describe_failure(Reply(text), ParseFailure("no <answer>")) == "no <answer>"
    split_off = Reply("<think>the plan: <answer>{}</answer></think>", finish_reason="stop")
    assert describe_failure(split_off, ParseFailure("no <answer>")).endswith(ALL_REASONING)


def test_an_answer_without_reasoning_is_told_its_mode() -> None:
    answer = f"<answer>{GOOD}</answer>"
    why = parse_verdict(answer, "strict")
    assert isinstance(why, ParseFailure)
    assert describe_failure(Reply(answer), why).endswith(
        "no <think>; if the model answers without reasoning, set parse_mode: direct"
    )
    assert isinstance(parse_verdict(answer, "direct"), Verdict)


def test_the_thought_is_kept() -> None:
    assert parse_verdict(wrapped(GOOD, "<think>\nwhy <b>\n</think>\n")) == Verdict(
        success=False, refined_prompt="good", reasoning="why <b>"
    )


def step(number: object = 1, prompt: object = "a cat", **more: object) -> dict[str, object]:
    return {
        "step_number": number,
        "step_name": "n",
        "instruction": None,
        "prompt": prompt,
        "auxiliary_text": None,
    } | more


def plan_answer(*steps: object) -> str:
    return wrapped(json.dumps({"execution_plan": steps}))


def test_a_plan_of_images_and_texts() -> None:
    answer = plan_answer(step(1, "a cat", instruction="draw"), step(2, None, auxiliary_text="The end."))
    assert parse_plan(answer) == Plan(
        steps=(
            PlanStep(index=1, name="n", instruction="draw", prompt="a cat"),
            PlanStep(index=2, name="n", text="The end."),
        ),
        reasoning="I looked.",
    )


@pytest.mark.parametrize("numbers", [[1, 2, 3], [4, 5, 6], [0, 2, 9]])
def test_steps_are_counted_from_one(numbers: list[int]) -> None:
    found = parse_plan(plan_answer(*map(step, numbers)))
    assert isinstance(found, Plan)
    assert [s.index for s in found.steps] == [1, 2, 3]


def test_any_number_of_steps_is_read() -> None:
    found = parse_plan(plan_answer(*(step(n) for n in range(1, 501))))
    assert isinstance(found, Plan)
    assert len(found.steps) == 500


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([], "at least one step"),
        (["a cat"], "step 1 has no step_number"),
        ([step(), {"step_number": 2, "prompt": "x", "instruction": None}], "step 2 has no auxiliary_text"),
        ([step(1), step(1)], "step 2 has step_number 1"),
        ([step(2), step(1)], "step 2 has step_number 1"),
        ([step("1")], "step 1 has step_number '1'"),
        ([step(True)], "step 1 has step_number True"),
        ([step(1.0)], "step 1 has step_number 1.0"),
        ([step(1, None)], "step 1 has no prompt and no text"),
        ([step(1, " ", auxiliary_text="")], "step 1 has no prompt and no text"),
        ([step(1, None, instruction="only this")], "step 1 has no prompt and no text"),
        ([step(1, 5)], "step 1: prompt must be text or null"),
        ([step(1, "a cat", step_name=[])], "step 1: step_name must be text"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_a_plan_that_is_none_says_why(steps: list[object], reason: str, mode: ParseMode) -> None:
    found = parse_plan(plan_answer(*steps), mode)
    assert isinstance(found, ParseFailure)
    assert reason in found.reason


@pytest.mark.parametrize("content", ["{}", '{"execution_plan": {}}', '{"execution_plan": null}', "[]", "null"])
def test_an_object_without_a_plan_says_so(content: str) -> None:
    assert isinstance(parse_plan(wrapped(content)), ParseFailure)


def test_none_in_words_is_null_for_the_tolerant_only() -> None:
    answer = plan_answer(step(1, "a cat", auxiliary_text="None"))
    strict, tolerant = parse_plan(answer), parse_plan(answer, "tolerant")
    assert isinstance(strict, Plan)
    assert isinstance(tolerant, Plan)
    assert (strict.steps[0].text, tolerant.steps[0].text) == ("None", None)


def test_a_plan_that_lost_a_bracket_is_cut_short() -> None:
    body = json.dumps({"execution_plan": [step(1), step(2)]})
    for lost in (body[:-2] + "}", body[:-3] + "}", body[:-3], body[: body.rindex("{")] + "}"):
        assert isinstance(parse_plan(wrapped(lost), "tolerant"), ParseFailure)


@pytest.mark.parametrize("prompt", ["a cat", "it's", 'a "cat"'])
def test_a_step_without_a_comma_does_not_swallow_the_next(prompt: str) -> None:
    """In the reference's parser a text could swallow the step after it."""
    steps = f"{step(1, prompt)!r} {step(2, prompt)!r}".replace(", 'prompt'", " 'prompt'")
    found = parse_plan(wrapped("{'execution_plan': [" + steps + "]}"), "tolerant")
    assert isinstance(found, Plan)
    assert [s.prompt for s in found.steps] == [prompt, prompt]


# --- properties ------------------------------------------------------------------------------------------------------

TOKENS = [
    *(
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "{",
        "}",
        "[",
        "]",
        "'",
        '"',
        ":",
        ",",
        "\\",
        "\n",
        "```json\n",
        "```",
    ),
    *(
        "True",
        "false",
        "None",
        "null",
        "'previous_step_success'",
        '"refine_prompt"',
        "execution_plan",
        "1",
        "-",
        "\x00",
    ),
    *("\\u", "\\ud800", "\ud800", "'s ", "NaN", "1e999", "9" * 5000, "step_number", "//", "#", "("),
]
rubbish = st.lists(st.one_of(st.sampled_from(TOKENS), st.text(max_size=4)), max_size=25).map("".join)


@given(rubbish, st.sampled_from(MODES), st.booleans())
def test_nothing_is_ever_raised(text: str, mode: ParseMode, is_wrapped: bool) -> None:
    answer = wrapped(f"{{{text}}}") if is_wrapped else text
    assert isinstance(parse_verdict(answer, mode), Verdict | ParseFailure)
    assert isinstance(parse_plan(answer, mode), Plan | ParseFailure)


@pytest.mark.parametrize(
    "content",
    [
        *(
            "[" * 100_000,
            "{" + "[" * 19_000 + "}",
            "{'a':" * 3_900 + "}",
            "{" + "(" * 4_000 + "}",
            "{" + "-" * 19_000 + "1}",
        ),
        *("{" + "'a': '" * 3_000 + "}", '{"a": "' + '\\"a": "' * 2_000 + "}", "{'a': '" + "x'" * 500_000 + "}"),
    ],
    ids=lambda content: content[:12],
)
def test_hostile_answers_are_refused(content: str) -> None:
    assert isinstance(parse_verdict(wrapped(content), "tolerant"), ParseFailure)


@pytest.mark.parametrize("number", [[[]], {"a": 1}, "x" * 9999])
def test_a_wrong_number_of_a_step_is_shown_cut_short(number: object) -> None:
    found = parse_plan(plan_answer(step(number)))
    assert isinstance(found, ParseFailure)
    assert "step 1 has step_number" in found.reason
    assert len(found.reason) < 120


@pytest.mark.parametrize(("num", "is_read"), [(1, True), (16, True), (4000, True)])
def test_of_many_openings_the_last_one_counts(num: int, is_read: bool) -> None:
    found = parse_verdict("<think></think>" + "<answer>hm " * num + f"<answer>{GOOD}</answer>")
    assert isinstance(found, Verdict) == is_read


any_text = st.text(st.characters(codec="utf-8"), max_size=40)
quoting = st.lists(
    st.sampled_from(["'", '"', "\\", "\n", ", ", "it's", "a", " ", "}", "é", "': ", "None", "\t", "{x}"])
)
prompts = (any_text | quoting.map("".join)).filter(lambda text: text.strip() and text != "None")


@given(prompts, st.booleans())
def test_the_prompt_is_what_json_says(prompt: str, ascii_only: bool) -> None:
    content = json.dumps({"previous_step_success": False, "refine_prompt": prompt}, ensure_ascii=ascii_only)
    if "</answer>" not in prompt and "<answer>" not in prompt:
        for mode in MODES:
            assert parse_verdict(wrapped(content), mode) == Verdict(
                success=False, refined_prompt=prompt, reasoning="I looked."
            )


@given(prompts, prompts, st.booleans())
def test_the_prompt_is_what_pythons_repr_says(first: str, second: str, success: bool) -> None:
    """As the released checkpoints answer; where it cannot be told apart it is refused, never altered."""
    plan = parse_plan(
        wrapped(repr({"execution_plan": [step(1, first), step(2, second, instruction=first)]})), "tolerant"
    )
    verdict = parse_verdict(wrapped(repr({"previous_step_success": success, "refine_prompt": first})), "tolerant")
    assert isinstance(plan, Plan)
    assert [s.prompt for s in plan.steps] == [first, second]
    assert isinstance(verdict, Verdict)
    assert (verdict.success, verdict.refined_prompt) == (success, first)


@given(
    st.text(st.characters(codec="ascii", exclude_characters='\\<{}[],:"`')).filter(lambda t: t.strip() and t != "None")
)
def test_unescaped_apostrophes_stay_in_the_prompt(prompt: str) -> None:
    found = parse_verdict(wrapped(f"{{'previous_step_success': False, 'refine_prompt': '{prompt}'}}"), "tolerant")
    assert isinstance(found, Verdict)
    assert found.refined_prompt == prompt
