"""Planner and critic over a chat model: what they show it, and what they make of its answers."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from PIL import Image

from imgen_common.config import load
from imgen_common.errors import UserError
from interleave.agents.critic import ChatCritic, success_probability
from interleave.agents.planner import ChatPlanner
from interleave.agents.prompts import load_template, render_critic, render_plan, render_planner, render_verdict
from interleave.loop.config import RunConfig
from interleave.models.chat.scripted import ScriptedChat, ScriptedChatConfig
from interleave.protocols import BackendError, CriticInput, HashedImage, Message, Reply
from interleave.records import Plan, PlanStep, Request, Verdict

RED, BLUE = (HashedImage.from_pil(Image.new("RGB", (4, 4), colour)) for colour in ("red", "blue"))
PLAN = Plan(steps=(PlanStep(index=1, prompt="a cat"),), reasoning="easy")
LOOK = CriticInput(RED, BLUE, "a cat", "a big cat", "the request", (("words", RED),))


class Heard:
    def __init__(self, answer: Any) -> None:
        self.messages: list[Message] = []
        self.answer = answer
        self.model = ScriptedChat(self.say)

    def say(self, message: Message, seed: int) -> Any:
        self.messages.append(message)
        return self.answer


def planner(heard: Heard, mode: Any = "strict") -> ChatPlanner:
    return ChatPlanner(heard.model, load_template("planner_text"), load_template("planner_images"), mode)


def test_a_plan() -> None:
    heard = Heard(render_plan(PLAN))
    answer = asyncio.run(planner(heard).plan(Request(id="a", text="draw {text_input}"), [], 0))
    assert answer.plan == PLAN
    assert (answer.template, answer.template_hash) == ("planner_text", load_template("planner_text").hash)
    assert heard.messages == [render_planner(load_template("planner_text"), "draw {text_input}", [])]
    answer = asyncio.run(planner(heard).plan(Request(id="a", text="go on", image_ids=(RED.id,)), [RED], 0))
    assert answer.template == "planner_images"
    assert heard.messages[1][0] == RED


def test_an_answer_that_cannot_be_read_is_kept_and_explained() -> None:
    answer = asyncio.run(
        planner(Heard(Reply("mumble", truncated=True, num_completion_tokens=9))).plan(Request(id="a", text="x"), [], 0)
    )
    assert (answer.plan, answer.raw) == (None, "mumble")
    assert "cut off after 9 tokens" in (answer.error or "")
    python = render_plan(PLAN).replace("null", "None").replace('"', "'")
    assert asyncio.run(planner(Heard(python)).plan(Request(id="a", text="x"), [], 0)).plan is None
    tolerant = asyncio.run(planner(Heard(python), "tolerant").plan(Request(id="a", text="x"), [], 0)).plan
    assert tolerant
    assert tolerant.steps == PLAN.steps


@pytest.mark.parametrize("context", ["pair", "story"])
def test_a_critic_sees_what_its_context_says(context: Any) -> None:
    verdict = Verdict(success=False, refined_prompt="a better cat", reasoning="too small")
    heard = Heard(render_verdict(verdict))
    name = "critic" if context == "pair" else "critic_story"
    answer = asyncio.run(ChatCritic(heard.model, load_template(name), context).judge(LOOK, 0))
    assert answer.verdict == verdict
    assert answer.success_probability is None
    assert heard.messages[0][:2] == (RED, BLUE)
    words = "".join(part for part in heard.messages[0] if isinstance(part, str))
    assert ("the request" in words) == (context == "story")
    shown = LOOK if context == "story" else CriticInput(RED, BLUE, "a cat", "a big cat")
    assert heard.messages[0] == render_critic(load_template(name), shown)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (['{"previous_step_success": ', "false", ', "refine_prompt": "true"}'], 0.25),
        (['{"', "previous", "_step_success", '":', " false", ', "refine_prompt": "true"}'], 0.25),
        (['{"previous_step_success"', ":", " ", "false", ', "refine_prompt": "true"}'], 0.25),
        (["{'previous_step_success':", " False", ", 'refine_prompt': 'True'}"], 0.25),
        (['{"previous_step_success":', "Ġfalse", "}"], 0.25),
        (['previous_step_success": true, no, {"previous_step_success": ', "f", "alse}"], 0.25),
        (['{"previous_step_success": ', "maybe"], None),
        (["mumble", "false"], None),
        (['{"previous_step_success": '], None),
        ([], None),
    ],
)
def test_the_probability_of_success(tokens: list[str], expected: float | None) -> None:
    """Tokens as tokenizers cut them: false, or what it begins with, got 0.6 and true 0.2; other tokens do not count."""
    said = {token: 0.6 for token in tokens if token.strip(" Ġ").lower() in ("f", "false")}
    true = {token: {token: 0.6, "t" if token == "f" else " true": 0.2, "null": 0.1} for token in said}
    reply = Reply("".join(tokens), token_probabilities=tuple((t, true.get(t, {t: 0.9, "x": 0.1})) for t in tokens))
    assert success_probability(reply) == (None if expected is None else pytest.approx(expected))


def test_the_critic_tells_how_sure_it_was() -> None:
    verdict = render_verdict(Verdict(success=True, refined_prompt="a cat", reasoning="fine"))
    before, _, after = verdict.partition("true")
    tokens = ((before, {before: 1.0}), ("true", {"true": 0.9, "false": 0.1}), (after, {after: 1.0}))
    heard = Heard(Reply(verdict, token_probabilities=tokens))
    answer = asyncio.run(ChatCritic(heard.model, load_template("critic")).judge(LOOK, 0))
    assert answer.success_probability == pytest.approx(0.9)


def said(success: bool) -> str:
    return render_verdict(Verdict(success=success, refined_prompt="a cat" if success else "a better cat", reasoning=""))


def counted(answers: Sequence[str | BackendError], seeds: list[int]) -> ScriptedChat:
    def say(message: Message, seed: int) -> str | BackendError:
        seeds.append(seed)
        return answers[len(seeds) - 1]

    return ScriptedChat(say)


@pytest.mark.parametrize(
    ("answers", "share", "success"),
    [
        ("+++-", 0.75, True),
        ("-+++", 0.75, True),
        ("++--", 0.75, False),
        ("++--", 0.5, True),
        ("+++-", 1.0, False),
        ("++++", 1.0, True),
        ("+??+", 1.0, True),
        ("???-", 0.5, False),
        ("!++-", 0.5, True),
        ("!?-!", 0.5, False),
        ("+#+-", 0.6, True),
        ("#!?-", 0.5, False),
        ("-----------------------------+", 0.01, True),
    ],
)
def test_a_share_of_the_critics_answers_decides(answers: str, share: float, success: bool) -> None:
    """+ accepts, - does not, ? cannot be read, # not even as an answer of a server, ! is refused."""
    seeds: list[int] = []
    words = {"+": said(True), "-": said(False), "?": "mumble", "!": BackendError("refused", "a filter")}
    words["#"] = BackendError("malformed_response", "not a chat completion")
    model = counted([words[a] for a in answers], seeds)
    critic = ChatCritic(model, load_template("critic"), num_samples=len(answers), acceptance_threshold=share)
    answer = asyncio.run(critic.judge(LOOK, 7))
    assert answer.verdict == Verdict(success=success, refined_prompt="a cat" if success else "a better cat")
    assert answer.raw == said(success)
    assert answer.success_probability == pytest.approx(answers.count("+") / sum(a in "+-" for a in answers))
    assert len(set(seeds)) == len(answers)
    assert seeds[0] == 7


def test_samples_that_none_can_read_are_one_unreadable_answer() -> None:
    critic = ChatCritic(counted(["mumble", "murmur"], []), load_template("critic"), num_samples=2)
    answer = asyncio.run(critic.judge(LOOK, 0))
    assert (answer.verdict, answer.raw) == (None, "mumble")
    assert answer.error


@pytest.mark.parametrize(
    ("answers", "kind"),
    [(["refused", "refused"], "refused"), (["timeout", "+"], "timeout"), (["refused", "unreachable"], "unreachable")],
)
def test_a_critic_fails_with_its_service_or_where_every_answer_is_refused(answers: list[Any], kind: str) -> None:
    given = [said(True) if one == "+" else BackendError(one, "words") for one in answers]
    critic = ChatCritic(counted(given, []), load_template("critic"), num_samples=2)
    with pytest.raises(BackendError, match="words") as error:
        asyncio.run(critic.judge(LOOK, 0))
    assert error.value.kind == kind


def test_samples_of_a_greedy_model_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"num_samples 8: at model.temperature 0 all answers are the same; set it above"
    ):
        load(RunConfig, sets=["critic.model.temperature=0"])
    assert load(RunConfig, sets=["critic.model.temperature=0", "critic.num_samples=1"])


def test_templates_for_another_agent_are_refused_at_once() -> None:
    model = Heard("").model
    with pytest.raises(UserError, match="not a template for this agent"):
        ChatPlanner(model, load_template("planner_text"), load_template("critic"))
    with pytest.raises(UserError, match="not a template for this agent"):
        ChatCritic(model, load_template("planner_text"))
    with pytest.raises(UserError, match="critic_story shows the request or the story; set context to story"):
        ChatCritic(model, load_template("critic_story"))
    with pytest.raises(UserError, match=r"critic has neither .* set context to pair"):
        ChatCritic(model, load_template("critic"), "story")


def test_a_failure_passes_through() -> None:
    heard = Heard(BackendError("unreachable", "down"))
    with pytest.raises(BackendError, match="down"):
        asyncio.run(ChatCritic(heard.model, load_template("critic")).judge(LOOK, 0))


def test_scripted_answers_come_in_turn() -> None:
    model = ScriptedChatConfig(answers=("a", "b")).build()

    async def ask() -> list[str]:
        return [(await model.chat(("x",), 0)).text for _ in range(3)]

    assert asyncio.run(ask()) == ["a", "b", "a"]
