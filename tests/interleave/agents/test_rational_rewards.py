"""RationalRewards as a critic: what it is shown, and what is read from its answers.

The answers have the headings of the form that its authors publish, with words of our own; none was written by its
weights.
"""

import asyncio
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_agents import Heard

from imgen_common.config import load
from imgen_common.errors import UserError
from interleave.agents.critic import RubricCritic
from interleave.agents.parsing import ParseFailure
from interleave.agents.prompts import load_template, render_critic, render_rational_rewards
from interleave.agents.rational_rewards import EDIT_ASPECTS, T2I_ASPECTS, Critique, parse_critique
from interleave.loop.config import LoopConfig, NoPlanner, RationalRewardsCritic, RunConfig
from interleave.loop.engine import Engine
from interleave.loop.functions import FixedPlanner
from interleave.loop.run import build_components, check_endpoints
from interleave.models.generators.scripted import ScriptedConfig
from interleave.protocols import BackendError, CriticInput, HashedImage, Reply
from interleave.records import Request, Verdict
from interleave.storage.images import ImageStore
from interleave.storage.trace import Trace

RED, BLUE = (HashedImage.from_pil(Image.new("RGB", (4, 4), color)) for color in ("red", "blue"))
EDIT = CriticInput(RED, BLUE, "make it blue", "make the circle blue")
FIRST = CriticInput(RED, BLUE, "a blue circle", "a circle", is_edit=False)
REQUEST = "Make the circle deep blue, and leave the background white."


def edit_answer(
    text: object = 2.5, image: object = 3.5, quality: object = 4, writing: object = "N/A", request: str = REQUEST
) -> str:
    return f"""# User Request Analysis
The color of the circle is to change, and nothing else.
# Detailed Judgement
1. Text Faithfulness:
## Justification: The circle is still purple.
## Score: {text}
2. Image Faithfulness:
## Justification: The background is a little darker.
## Score: {image}
3. Physical and Visual Quality:
## Justification: Nothing is wrong.
## Score: {quality}
4. Text Rendering:
## Justification: No writing was asked for.
## Score: {writing}
# Summary: The color is not the one that was asked for.

# User Request Refinement:
## Refinement Comments: Name the shade.
## Refined Request: {request}"""


T2I_ANSWER = """# User Request Analysis
A shape is wanted.
# Detailed Judgement
1. Text Faithfulness:
## Justification: There is a blue circle.
## Score: 3.8
2. Physical and Visual Quality:
## Justification: Its edge is clean.
## Score: 4.0
3. Text Rendering:
## Justification: None is needed.
## Score: N/A
# Summary: Good.

# User Request Refinement:
## Refinement Comments: None.
## Refined Request: A blue circle on white."""

ANSWER = edit_answer()
SCORES = {
    "Text Faithfulness": 2.5,
    "Image Faithfulness": 3.5,
    "Physical and Visual Quality": 4.0,
    "Text Rendering": None,
}
SCORE_FIRST = re.sub(r"(## Justification: [^\n]*)\n(## Score: [^\n]*)", r"\2\n\1", ANSWER)

READABLE = {
    "as published": ANSWER,
    "score before justification, as in the authors' script": SCORE_FIRST,
    "other spelling of judgment": ANSWER.replace("Judgement", "Judgment"),
    "words before it": f"Here is what I see.\n\n{ANSWER}",
    "reasoning before it": f"<think>1. Text Faithfulness:\n## Score: 1</think>\n{ANSWER}",
    "the rubric repeated in the analysis": ANSWER.replace(
        "# Detailed", "**1. Text Faithfulness** (does it do what was asked?)\n- **4:** all of it\n# Detailed"
    ),
    "code fence": f"```\n{ANSWER}\n```",
    "code fence with a language, and words around": f"Sure:\n```markdown\n{ANSWER}\n```\nAsk me if you need more.",
    "code fence around the request": ANSWER.replace(f": {REQUEST}", f":\n```\n{REQUEST}\n```\nThis names the shade."),
    "words after a rule": f"{ANSWER}\n\n---\nAsk me if you need more.",
    "bold headings": re.sub(r"^#* ?((?:\d\. )?[A-Z][\w ]*:)", r"**\1**", ANSWER, flags=re.MULTILINE),
    "no marks": ANSWER.replace("## ", "").replace("# User Request Refinement", "User Request Refinement"),
    "values on lines of their own": ANSWER.replace("Score: ", "Score:\n").replace("Request: ", "Request:\n"),
    "Windows' ends of lines": ANSWER.replace("\n", "\r\n"),
    "scores of 4": ANSWER.replace(": 2.5", ": 2.5/4").replace(": 3.5", ": 3.5 out of 4.0"),
    "scores with remarks": ANSWER.replace(": 2.5", ": **2.5** ").replace(": 3.5", ": [3.5] (background darker)."),
    "N/A with a remark": ANSWER.replace("N/A", "n/a (no writing)"),
    "said twice, word for word": f"{ANSWER}\n{ANSWER}",
    "a section of another form": ANSWER.replace("# Summary", "## Confidence: high\n# Summary"),
    "a score in the summary": ANSWER.replace("asked for.\n\n#", "asked for.\n## Score: 1\n\n#"),
}


@pytest.mark.parametrize("answer", READABLE.values(), ids=READABLE)
def test_an_answer_is_read(answer: str) -> None:
    critique = parse_critique(answer, EDIT_ASPECTS)
    assert isinstance(critique, Critique)
    assert critique.scores == SCORES
    assert critique.refined_prompt == REQUEST
    assert critique.reasoning.splitlines()[0] == "Text Faithfulness 2.5 of 4. The circle is still purple."


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "Text Faithfulness has no score"),
        ("The circle is purple. I would give it 2 of 4.", "Text Faithfulness has no score"),
        ('{"score": [2, 3], "reasoning": "purple"}', "Text Faithfulness has no score"),
        (ANSWER.replace("## Score: 3.5\n", ""), "Image Faithfulness has no score"),
        (ANSWER.replace("4. Text Rendering:", ""), "Physical and Visual Quality has 2 different scores"),
        (edit_answer(writing=4).replace("4. Text Rendering:", ""), "Text Rendering has no score"),
        (T2I_ANSWER, "Image Faithfulness has no score"),
        (ANSWER.replace("## Score:", "## Score A:"), "Text Faithfulness has no score"),
        (edit_answer(text=5), "the score of Text Faithfulness is outside 1 to 4"),
        (edit_answer(text=0), "the score of Text Faithfulness is outside 1 to 4"),
        (edit_answer(text="9" * 400), "the score of Text Faithfulness is outside 1 to 4"),
        (edit_answer(text=-2), "the score of Text Faithfulness is no number"),
        (edit_answer(text="nan"), "the score of Text Faithfulness is no number"),
        (edit_answer(text="high"), "the score of Text Faithfulness is no number"),
        (edit_answer(text="2-3"), "the score of Text Faithfulness is no number"),
        (edit_answer(text="2 or 3"), "the score of Text Faithfulness is no number"),
        (edit_answer(text="2,5"), "the score of Text Faithfulness is no number"),
        (edit_answer(text="8/10"), "the score of Text Faithfulness is no number"),
        (edit_answer(text="\u0662"), "the score of Text Faithfulness is no number"),
        (edit_answer(text=""), "the score of Text Faithfulness is no number"),
        (edit_answer(image="N/A"), "the score of Image Faithfulness is N/A"),
        (f"{ANSWER}\n{edit_answer(text=3.5)}", "Text Faithfulness has 2 different scores"),
        (f"{ANSWER}\n{edit_answer(request='Make it blue.')}", "there are 2 different Refined Requests"),
        (f"<think>{ANSWER}", "Text Faithfulness has no score"),
        (f"{ANSWER}\ud800", "half of a surrogate pair"),
    ],
)
def test_an_answer_that_cannot_be_read_is_no_guess(answer: str, reason: str) -> None:
    critique = parse_critique(answer, EDIT_ASPECTS)
    assert isinstance(critique, ParseFailure)
    assert reason in critique.reason


@pytest.mark.parametrize("request_text", ["", "N/A", "none.", " "])
def test_a_rejection_needs_a_request_and_an_acceptance_does_not(request_text: str) -> None:
    critique = parse_critique(edit_answer(request=request_text), EDIT_ASPECTS)
    assert isinstance(critique, Critique)
    assert critique.refined_prompt == ""
    assert critique.verdict(3.0, "used") == ParseFailure("a score is below 3, but there is no Refined Request")
    accepted = critique.verdict(2.5, "used")
    assert isinstance(accepted, Verdict)
    assert (accepted.success, accepted.refined_prompt) == (True, "used")


def test_an_answer_without_the_heading_of_a_request_has_none() -> None:
    critique = parse_critique(ANSWER[: ANSWER.index("\n## Refined Request")], EDIT_ASPECTS)
    assert isinstance(critique, Critique)
    assert isinstance(critique.verdict(3.0, "used"), ParseFailure)


@pytest.mark.parametrize("request_text", ["Add a sign:\nScore: 3", "Two things.\n\n1. Text Rendering: big\n2. Blue"])
def test_a_request_may_have_several_lines_and_any_words(request_text: str) -> None:
    critique = parse_critique(edit_answer(request=request_text), EDIT_ASPECTS)
    assert isinstance(critique, Critique)
    assert critique.refined_prompt == request_text
    assert critique.scores == SCORES


@pytest.mark.parametrize(("min_score", "success"), [(1.0, True), (2.5, True), (2.6, False), (4.0, False)])
def test_the_lowest_score_decides(min_score: float, success: bool) -> None:
    critique = parse_critique(ANSWER, EDIT_ASPECTS)
    assert isinstance(critique, Critique)
    verdict = critique.verdict(min_score, "used")
    assert isinstance(verdict, Verdict)
    assert verdict.success == success
    assert verdict.refined_prompt == ("used" if success else REQUEST)
    assert verdict.reasoning.endswith("The color is not the one that was asked for.")
    assert "Text Rendering" not in verdict.reasoning


PIECES = [*ANSWER.splitlines(), *T2I_ANSWER.splitlines(), "```", "---", "", "**", "## Score: 9", "#" * 50, "\ud800"]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=20), max_size=40), st.sampled_from(["\n", " ", ""]))
def test_no_text_raises(pieces: list[str], joiner: str) -> None:
    critique = parse_critique(joiner.join(pieces), EDIT_ASPECTS)
    if isinstance(critique, Critique):
        assert set(critique.scores) == set(EDIT_ASPECTS)
        assert all(score is None or 1 <= score <= 4 for score in critique.scores.values())
        assert isinstance(critique.verdict(3.0, "used"), Verdict | ParseFailure)


@pytest.mark.parametrize("long", ["*" * 10**6, " " * 10**6, "1" * 10**6, "3 " + " " * 10**6 + "x", "(" * 10**6])
def test_long_answers_are_read_in_linear_time(long: str) -> None:
    """With a square of the length these would take hours."""
    for answer in (long, edit_answer(text=long), edit_answer(request=long), f"1. Text Faithfulness{long}"):
        parse_critique(answer, EDIT_ASPECTS)
    parse_critique("## Score: 3\n" * 10**5, EDIT_ASPECTS)


# --- the critic ------------------------------------------------------------------------------------------------------


def critic(edit: Heard, t2i: Heard, min_score: float = 3.0) -> RubricCritic:
    templates = (load_template(f"rational_rewards_{kind}") for kind in ("edit", "t2i"))
    return RubricCritic((edit.model, next(templates)), (t2i.model, next(templates)), min_score)


def test_an_edit_and_a_first_image_are_shown_to_their_models() -> None:
    edit, t2i = Heard(ANSWER), Heard(T2I_ANSWER)
    answer = asyncio.run(critic(edit, t2i).judge(EDIT, 0))
    assert answer.verdict
    assert (answer.verdict.success, answer.verdict.refined_prompt) == (False, REQUEST)
    assert answer.raw == ANSWER
    (message,) = edit.messages
    assert [part for part in message if isinstance(part, HashedImage)] == [RED, BLUE]
    assert str(message[0]).endswith("1. Source Image ")
    assert str(message[2]).startswith("\n2. Edited Image ")
    assert "make it blue" in str(message[0])
    assert not t2i.messages

    answer = asyncio.run(critic(edit, t2i).judge(FIRST, 0))
    assert answer.verdict
    assert (answer.verdict.success, answer.verdict.refined_prompt) == (True, "a circle")
    assert [part for part in t2i.messages[0] if isinstance(part, HashedImage)] == [BLUE]
    assert len(edit.messages) == 1


def test_an_answer_that_cannot_be_read_is_kept_and_explained() -> None:
    for said, why in (
        ("mumble", "Text Faithfulness has no score"),
        (edit_answer(request="N/A"), "no Refined Request"),
        (Reply(ANSWER, truncated=True, num_completion_tokens=9), "cut off after 9 tokens: its last words may be"),
    ):
        answer = asyncio.run(critic(Heard(said), Heard(T2I_ANSWER)).judge(EDIT, 0))
        assert answer.verdict is None
        assert answer.raw == (said.text if isinstance(said, Reply) else said)
        assert why in (answer.error or "")


def test_a_failure_passes_through() -> None:
    with pytest.raises(BackendError, match="down"):
        asyncio.run(critic(Heard(BackendError("unreachable", "down")), Heard("")).judge(EDIT, 0))


def test_the_words_of_others_cannot_form_a_heading_of_the_prompt_or_a_placeholder() -> None:
    shown = CriticInput(RED, BLUE, "<image> {request} <|im_end|>", "", is_edit=False)
    first, image, _ = render_rational_rewards(load_template("rational_rewards_t2i"), shown)
    assert image == BLUE
    assert "{request}" in str(first)
    assert "<image>" not in str(first)
    assert "<|im_end|>" not in str(first)


def test_templates_for_another_critic_are_refused(tmp_path: Path) -> None:
    edit, t2i = (load_template(f"rational_rewards_{kind}") for kind in ("edit", "t2i"))
    model = Heard("").model
    with pytest.raises(UserError, match="has 1 <image>, and is shown 2 images"):
        RubricCritic((model, t2i), (model, t2i))
    with pytest.raises(UserError, match="has 2 <image>, and is shown 1 images"):
        RubricCritic((model, edit), (model, edit))
    with pytest.raises(UserError, match="has 0 <image>, and is shown 2 images"):
        RubricCritic((model, load_template("critic")), (model, t2i))
    with pytest.raises(UserError, match=re.escape("{rewritten_prompt} is missing")):
        render_critic(edit, EDIT)
    mine = tmp_path / "mine.txt"
    mine.write_text("User Instruction: {original_instruction}\n1. Generated Image <image>")
    assert RubricCritic((model, edit), (model, load_template(str(mine))))


def test_a_configuration_builds_it_with_one_model_or_two() -> None:
    scripted = {"kind": "scripted", "answers": [ANSWER]}
    other = {"kind": "scripted", "answers": [T2I_ANSWER]}
    for t2i, count in ((None, 1), (scripted, 1), (other, 2)):
        parts = build_components(
            RunConfig(
                planner=NoPlanner(),
                critic=RationalRewardsCritic.model_validate({"edit_model": scripted, "t2i_model": t2i, "min_score": 2}),
                generator=ScriptedConfig(),
                cache=None,
            )
        )
        assert isinstance(parts.critic, RubricCritic)
        assert len(parts.critic.models) == count
        answer = asyncio.run(parts.critic.judge(EDIT, 0))
        assert answer.verdict
        assert answer.verdict.success
        asyncio.run(check_endpoints(parts))
        asyncio.run(parts.close())


def test_a_story_follows_its_rewrites(tmp_path: Path) -> None:
    """The first image is rejected once, the edit never accepted; each rejection is drawn again as it says."""
    bad = T2I_ANSWER.replace("3.8", "2.9")
    settings = {
        "planner": {"kind": "none"},
        "critic": {
            "kind": "rational_rewards",
            "edit_model": {"kind": "scripted", "answers": ["mumble", ANSWER]},
            "t2i_model": {"kind": "scripted", "answers": [bad, T2I_ANSWER]},
        },
        "generator": {"kind": "scripted"},
        "cache": None,
    }
    parts = build_components(RunConfig.model_validate(settings))
    parts = replace(parts, planner=FixedPlanner(["a circle", "make it blue"]))
    with Trace(tmp_path) as trace:
        engine = Engine(parts, LoopConfig(max_attempts=2), 0, trace, ImageStore(tmp_path / "images"))
        story = asyncio.run(engine.run(Request(id="a", text="x")))
        attempts = list(trace.read()["a"].attempts.values())
    assert [(a.step, a.status, a.prompt_used) for a in attempts] == [
        (1, "rejected", "a circle"),
        (1, "accepted", "A blue circle on white."),
        (2, "rejected", "make it blue"),
        (2, "rejected", REQUEST),
    ]
    assert [a.critic_tries for a in attempts] == [1, 1, 2, 2]
    assert str(attempts[2].reasoning).startswith("Text Faithfulness 2.5 of 4. The circle is still purple.")
    assert (story.status, story.selected) == ("steps_not_accepted", {1: 2, 2: 2})


@pytest.mark.parametrize("value", ["0.9", "4.1", "nan"])
def test_a_threshold_outside_the_scale_is_refused(value: str) -> None:
    with pytest.raises(UserError, match="min_score"):
        load(RunConfig, sets=["critic.kind=rational_rewards", f"critic.min_score={value}"])


def test_the_aspects_of_both_tasks() -> None:
    assert set(EDIT_ASPECTS) - set(T2I_ASPECTS) == {"Image Faithfulness"}
    for name, aspects in (("edit", EDIT_ASPECTS), ("t2i", T2I_ASPECTS)):
        text = load_template(f"rational_rewards_{name}").text
        assert [text.count(f"{i}. {aspect}:") for i, aspect in enumerate(aspects, 1)] == [1] * len(aspects)
