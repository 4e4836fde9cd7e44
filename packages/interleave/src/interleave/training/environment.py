"""Reinforcement learning of the critic in its loop, through TRL's `environment_factory`.  Experimental.

A trajectory begins at a recorded attempt.  While the critic rejects, an image is generated with its new prompt and it
sees the result; once it accepts, or has seen `max_attempts` images, the judge scores the last one.  All answers share
the reward

    R = sqrt(semantics quality) / 10, in [0, 1];  0 if one of the answers cannot be read

In TRL's terms a rejection is a call of the tool `regenerate`, whose result is the critic's next user turn.  The critic
knows nothing of tools: `add_regenerate_tool` makes the processor read a verdict as a call and render the result of a
tool as the user turn of run time.
"""

import asyncio
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from imgen_common.judging.objects import ParseMode
from interleave.agents.parsing import parse_verdict
from interleave.agents.prompts import Template, render_critic
from interleave.models.chat.local import to_conversation
from interleave.protocols import BackendError, CriticInput, HashedImage
from interleave.records import Verdict
from interleave.training.reward import CriticScorer, RecordedAttempt

TOOL_RESULTS_AS_USER_TURNS = """\
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
"""Prepended to a chat template: it lists no tools, and the result of a tool becomes a user turn.  TRL asks that a
template can render a call; the model never reads that, since its own tokens are kept."""
REJECTED = r"<answer>(?!.*<answer>)(?=(?:(?!</answer>).)*previous_step_success[\"']\s*:\s*[fF]alse)(?=.*</answer>)"
"""Matches the start of the last answer if it rejects."""


def add_regenerate_tool(processor: Any) -> Any:
    """Makes `processor` parse a rejection as a call of `regenerate` and render its result as a user turn."""
    hello = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    without, begun = (
        processor.apply_chat_template(hello, tokenize=False, add_generation_prompt=begin) for begin in (False, True)
    )
    call = {"type": "function", "function": {"name": "regenerate", "arguments": {"answer": "{content}"}}}
    processor.chat_template = TOOL_RESULTS_AS_USER_TURNS + processor.chat_template
    processor.tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": begun.removeprefix(without),
        "fields": {
            "tool_calls": {
                "open_pattern": REJECTED,
                "close_pattern": "</answer>.*",
                "repeats": True,
                "content": "text",
                "transform": call,
            },
            "content": {"close_pattern": re.escape(processor.tokenizer.eos_token) + r"\s*", "content": "text"},
        },
    }
    return processor


def join_answer(message: Mapping[str, Any]) -> str:
    """The text of an assistant's message, with the part that was parsed as a call put back."""
    calls = message.get("tool_calls") or []
    answers = [f"<answer>{call['function']['arguments']['answer']}</answer>" for call in calls]
    return "".join([message.get("content") or "", *answers])


class CriticEnvironment:
    """One trajectory as an environment of TRL: every public method but `reset` is a tool.

    wait: runs a coroutine on the loop of generator and judge, and waits for it.
    """

    def __init__(
        self, scorer: CriticScorer, template: Template, parse_mode: ParseMode, wait: Callable[[Any], Any]
    ) -> None:
        self._scorer, self._template, self._parse_mode, self._wait = scorer, template, parse_mode, wait

    def reset(self, row: RecordedAttempt, **columns: Any) -> None:
        """Begins at a recorded attempt."""
        self._row, self._prompt, self._after = row, row.prompt_used or row.original_prompt, row.after
        self._num_generated = 0
        self._failure: BackendError | TimeoutError | None = None

    def regenerate(self, answer: str) -> list[dict[str, Any]]:
        """Generate the image again and look at the result.

        Args:
            answer: The verdict that rejected the image, with the prompt to generate with.
        """
        verdict = parse_verdict(f"<think></think><answer>{answer}</answer>", self._parse_mode)
        if not isinstance(verdict, Verdict) or verdict.success:
            raise ValueError("unreadable")
        if self._failure is not None:
            raise self._failure
        prompt = verdict.refined_prompt or self._prompt

        async def generate() -> HashedImage:
            async with self._scorer.limit():
                return await self._scorer.generate_image(prompt, self._row, self._num_generated)

        try:
            self._after = self._wait(generate())
        except (BackendError, TimeoutError) as failure:
            self._failure = failure
            raise
        self._prompt, self._num_generated = prompt, self._num_generated + 1
        shown = CriticInput(self._row.before, self._after, self._row.original_prompt, prompt)
        parts: list[dict[str, Any]] = to_conversation(render_critic(self._template, shown))[0]["content"]
        return parts

    async def _score(self, messages: Sequence[Mapping[str, Any]]) -> float | None:
        scorer = self._scorer
        scorer.counts.answers += 1
        if self._failure is not None:
            scorer.count_result(self._failure)
            return None
        answers = [scorer.opened + join_answer(message) for message in messages if message["role"] == "assistant"]
        if not all(isinstance(parse_verdict(answer, self._parse_mode), Verdict) for answer in answers):
            return 0.0
        semantics, quality = self._row.semantics, self._row.quality
        if self._num_generated:
            try:
                async with scorer.limit():
                    scores = await scorer.score_image(self._prompt, self._after, self._row)
            except (BackendError, TimeoutError) as failure:
                scorer.count_result(failure)
                return None
            semantics, quality = scores.semantics, scores.quality
        scorer.count_result(None)
        return math.sqrt(semantics * quality) / 10


async def trajectory(
    completions: Sequence[Sequence[Mapping[str, Any]]], environments: Sequence[CriticEnvironment], **columns: Any
) -> list[float | None]:
    """A reward function for TRL: R of each trajectory; None where the generator or the judge failed in it."""
    scores = (one._score(messages) for one, messages in zip(environments, completions, strict=True))
    return await asyncio.gather(*scores)
