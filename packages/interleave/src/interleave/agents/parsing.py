"""Reads the answers of planner and critic.  Whatever the text, the result is a value or `ParseFailure`, never a raise.

An answer is `<think>...</think>` and, after it, `<answer>{...}</answer>`; the last `<answer>` counts.  Source of the
keys and of the cases: InterleaveThinker, arXiv 2606.13679, and its released checkpoints.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from imgen_common.errors import one_line
from imgen_common.http.chat import ALL_REASONING, CLOSE, split_reasoning
from imgen_common.judging.objects import (
    NO_THOUGHT,
    ParseMode,
    UnreadableAnswer,
    answer_bodies,
    load_json,
    only_object,
    read_object,
    unfenced,
)
from interleave.protocols import Reply
from interleave.records import Plan, PlanStep, Verdict

STEP_KEYS = ("step_number", "instruction", "prompt", "auxiliary_text")


@dataclass(frozen=True)
class ParseFailure:
    """An answer without a usable value, and why."""

    reason: str


def parse_plan(answer: str, mode: ParseMode = "strict") -> Plan | ParseFailure:
    """The plan in a planner's answer; its steps, whose numbers must grow, are renumbered 1, 2, ...

    An empty string, and in the tolerant mode "None", means null.  No prompt or text is altered.
    """
    try:
        reasoning, value = read_object(answer, mode)
        return _plan(value, reasoning, mode)
    except UnreadableAnswer as error:
        return ParseFailure(str(error))


def plan_from_object(value: Mapping[str, Any], reasoning: str, mode: ParseMode = "strict") -> Plan | ParseFailure:
    """The plan in the object of an answer, as `parse_plan` reads it."""
    try:
        return _plan(value, reasoning, mode)
    except UnreadableAnswer as error:
        return ParseFailure(str(error))


def parse_verdict(answer: str, mode: ParseMode = "strict") -> Verdict | ParseFailure:
    """The verdict in a critic's answer; a failed step must come with a prompt.  The prompt is not altered."""
    try:
        reasoning, value = read_object(answer, mode)
        success, prompt = value.get("previous_step_success"), value.get("refine_prompt")
        if not isinstance(success, bool):
            raise UnreadableAnswer("previous_step_success must be true or false")
        if not isinstance(prompt, str) or (mode == "tolerant" and prompt == "None"):
            raise UnreadableAnswer("refine_prompt must be text")
        if not success and not prompt.strip():
            raise UnreadableAnswer("refine_prompt is empty though the step failed")
        return Verdict(success=success, refined_prompt=prompt, reasoning=reasoning)
    except UnreadableAnswer as error:
        return ParseFailure(str(error))


def parse_json(answer: str) -> Any | ParseFailure:
    """The JSON value of an answer in free form, such as a judge's, after whatever reasoning stands before it.

    It may stand in `<answer>`, in a code fence, or alone; its strings may have raw line breaks.  An object may have
    other words around it.
    """
    reasoning, answer = split_reasoning(answer)
    if reasoning and not answer.strip():
        return ParseFailure(f"the answer is empty: {ALL_REASONING}")
    try:
        body = unfenced(next(answer_bodies(answer), "") if "<answer>" in answer else answer)
        try:
            return load_json(body)
        except ValueError:
            return only_object(body)
    except UnreadableAnswer as error:
        return ParseFailure(str(error))
    except (ValueError, RecursionError) as error:
        return ParseFailure(f"not JSON ({error})")


def _plan(value: Mapping[str, Any], reasoning: str, mode: ParseMode) -> Plan:
    items = value.get("execution_plan")
    if not isinstance(items, list) or not items:
        raise UnreadableAnswer("execution_plan must be a list of at least one step")
    numbers: list[int] = []
    steps = []
    for index, item in enumerate(items, 1):
        missing = [key for key in STEP_KEYS if not isinstance(item, dict) or key not in item]
        if missing:
            raise UnreadableAnswer(f"step {index} has no {', '.join(missing)}")
        if type(item["step_number"]) is not int or (numbers and item["step_number"] <= numbers[-1]):
            number = item["step_number"]
            shown = type(number).__name__ if isinstance(number, list | dict) else repr(number)[:40]
            raise UnreadableAnswer(f"step {index} has step_number {shown}; it must be a growing integer")
        numbers.append(item["step_number"])
        name, instruction, prompt, text = (
            _text(item.get(key), f"step {index}: {key}", mode)
            for key in ("step_name", "instruction", "prompt", "auxiliary_text")
        )
        try:
            steps.append(PlanStep(index=index, name=name or "", instruction=instruction, prompt=prompt, text=text))
        except ValueError:
            raise UnreadableAnswer(f"step {index} has no prompt and no text that can be used") from None
    return Plan(steps=tuple(steps), reasoning=reasoning)


def _text(value: object, name: str, mode: ParseMode) -> str | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        raise UnreadableAnswer(f"{name} must be text or null, not a {type(value).__name__}")
    return None if mode == "tolerant" and value == "None" else value


def describe_failure(reply: Reply, read: ParseFailure) -> str:
    """Why a reply could not be read, as records show it; with its first words where it has none of the tags asked for,
    which often say that the model will not answer, and what to do about one that was cut off or has no reasoning."""
    is_plain = not re.search("</?(think|answer)>", reply.text)
    words = f"it said {one_line(reply.text, 120)!r}" if is_plain and reply.text.strip() else ""
    remedy = ""
    if reply.truncated:
        remedy = (
            "; allow a longer answer (max_new_tokens, or max_completion_tokens in extra), or have the model think less"
        )
    elif read.reason == NO_THOUGHT and "</answer>" in reply.text:
        remedy = "; if the model answers without reasoning, set parse_mode: direct"
    elif reply.text.rstrip().endswith(CLOSE):
        remedy = f"; {ALL_REASONING}"
    return ": ".join(filter(None, (describe_ending(reply), read.reason, words))) + remedy


def describe_ending(reply: Reply) -> str:
    """How a reply ended that did not end by itself; otherwise empty."""
    if reply.truncated:
        return f"cut off after {reply.num_completion_tokens} tokens"
    unusual = reply.finish_reason not in (None, "stop")
    return f"ended by {one_line(str(reply.finish_reason), 40)}" if unusual else ""
