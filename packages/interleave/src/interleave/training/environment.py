"""Reinforcement of the critic in the loop it will run in, through TRL's `environment_factory`.  Experimental.

A trajectory begins at a recorded attempt.  While the critic rejects, its new prompt is drawn and it looks again; once
it accepts, or `max_attempts` pictures were seen, the last picture is judged.  All answers share the reward

    R = sqrt(semantics quality) / 10, in [0, 1];  0 if one of the answers cannot be read

In TRL's terms a rejection is a call of the tool `regenerate`, whose result is the critic's next turn.  The critic needs
to know nothing of tools: `as_caller` teaches the processor to read a verdict as a call and to show a tool's result as
the user turn of run time.
"""

import asyncio
import math
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from interleave.agents.parsing import ParseMode, parse_verdict
from interleave.agents.prompts import Template, render_critic
from interleave.models.chat.conversation import to_conversation
from interleave.protocols import BackendError, CriticInput, HashedImage
from interleave.records import Verdict
from interleave.training.reward import CriticRow, CriticScorer

AS_TURNS = """\
{%- set tools = none -%}
{%- set turns = namespace(all=[]) -%}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{%- set turns.all = turns.all + [{'role': 'user', 'content': m.content}] -%}
{%- elif m.tool_calls -%}
{%- set turns.all = turns.all + [{'role': m.role, 'content': [{'type': 'text', 'text': m.tool_calls | tojson}]}] -%}
{%- else -%}
{%- set turns.all = turns.all + [m] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = turns.all -%}
"""
"""Before a chat template: tools are not spoken of, and what one returns is a turn of the user.  The words of a call are
never read by the model, whose own tokens stay; TRL asks that a template can write them."""
REJECTION = r"<answer>(?!.*<answer>)(?=(?:(?!</answer>).)*previous_step_success[\"']\s*:\s*[fF]alse)(?=.*</answer>)"
"""The start of the last answer, where it rejects."""


def as_caller(processor: Any) -> Any:
    """`processor`, of which TRL's trainer learns what is a call, and in which a tool's result is a user turn."""
    hello = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    asked, begun = (
        processor.apply_chat_template(hello, tokenize=False, add_generation_prompt=begin) for begin in (False, True)
    )
    call = {"type": "function", "function": {"name": "regenerate", "arguments": {"answer": "{content}"}}}
    processor.chat_template = AS_TURNS + processor.chat_template
    processor.tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": begun.removeprefix(asked),
        "fields": {
            "tool_calls": {
                "open_pattern": REJECTION,
                "close_pattern": "</answer>.*",
                "repeats": True,
                "content": "text",
                "transform": call,
            },
            "content": {"close_pattern": re.escape(processor.tokenizer.eos_token) + r"\s*", "content": "text"},
        },
    }
    return processor


def answer_of(message: Mapping[str, Any]) -> str:
    """The words of an assistant's message, put together again where they were read as a call."""
    calls = message.get("tool_calls") or []
    said = [f"<answer>{call['function']['arguments']['answer']}</answer>" for call in calls]
    return "".join([message.get("content") or "", *said])


@dataclass(frozen=True)
class Trajectories:
    """What trajectories share.  wait: runs a coroutine where generator and judge live, and waits for it."""

    scorer: CriticScorer
    template: Template
    parse_mode: ParseMode
    wait: Callable[[Any], Any]

    def new(self) -> "Trajectory":
        """TRL's `environment_factory`."""
        return Trajectory(self)

    def reward_function(self) -> Callable[..., Coroutine[Any, Any, list[float | None]]]:
        """A reward function for TRL: R of each trajectory; None where generator or judge failed in it."""

        async def trajectory(
            completions: Sequence[Sequence[Mapping[str, Any]]], environments: Sequence[Trajectory], **columns: Any
        ) -> list[float | None]:
            return await asyncio.gather(
                *(self._score(said, there) for said, there in zip(completions, environments, strict=True))
            )

        return trajectory

    async def _score(self, said: Sequence[Mapping[str, Any]], there: "Trajectory") -> float | None:
        self.scorer.counts.answers += 1
        state = there._state
        if state.failure is not None:
            self.scorer.tally(state.failure)
            return None
        answers = [answer_of(message) for message in said if message["role"] == "assistant"]
        if not all(isinstance(parse_verdict(answer, self.parse_mode), Verdict) for answer in answers):
            return 0.0
        semantics, quality = state.row.semantics, state.row.quality
        if state.drawn:
            try:
                async with self.scorer.limits():
                    scores = await self.scorer.judge(state.prompt, state.after, state.row)
            except (BackendError, TimeoutError) as failure:
                self.scorer.tally(failure)
                return None
            semantics, quality = scores.semantics, scores.quality
        self.scorer.tally(None)
        return math.sqrt(semantics * quality) / 10


@dataclass
class _State:
    """Where a trajectory stands: its latest picture, the prompt of it, and how many were drawn."""

    row: CriticRow
    prompt: str
    after: HashedImage
    drawn: int = 0
    failure: BackendError | TimeoutError | None = None


class Trajectory:
    """One trajectory, as TRL knows an environment: every public method but `reset` is a tool."""

    def __init__(self, shared: Trajectories) -> None:
        self._shared = shared
        self._state: _State

    def reset(self, row: CriticRow, **columns: Any) -> None:
        """Begin at a recorded attempt."""
        self._state = _State(row, row.prompt_used or row.original_prompt, row.after)

    def regenerate(self, answer: str) -> list[dict[str, Any]]:
        """Draw the picture anew and look at it again.

        Args:
            answer: The verdict that rejected the picture, with the prompt to draw with.
        """
        state, shared = self._state, self._shared
        verdict = parse_verdict(f"<think></think><answer>{answer}</answer>", shared.parse_mode)
        if not isinstance(verdict, Verdict) or verdict.success:
            raise ValueError("unreadable")
        if state.failure is not None:
            raise state.failure
        prompt = verdict.refined_prompt or state.prompt

        async def drawn() -> HashedImage:
            async with shared.scorer.limits():
                return await shared.scorer.draw(prompt, state.row, state.drawn)

        try:
            after = shared.wait(drawn())
        except (BackendError, TimeoutError) as failure:
            state.failure = failure
            raise
        state.prompt, state.after, state.drawn = prompt, after, state.drawn + 1
        look = CriticInput(state.row.before, after, state.row.original_prompt, prompt)
        parts: list[dict[str, Any]] = to_conversation(render_critic(shared.template, look))[0]["content"]
        return parts
