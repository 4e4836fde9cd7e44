"""What can be read of a critic's answer that `parsing` may refuse, as the reward of reinforcement learning needs it.

Source: the released code of InterleaveThinker, arXiv 2606.13679.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

from imgen_common.errors import HALF_PAIR
from imgen_common.judging.objects import ParseMode
from interleave.agents.parsing import parse_verdict
from interleave.records import Verdict

FormatRule = Literal["strict", "released"]
"""strict: `parsing` reads it.  released: as the released code, which also takes an answer without <think>, a truncated
one, and an empty prompt with a failed verdict."""
MAX_BRACES, MAX_REPAIRED = 64, 100_000
"""The time of a repair grows with the square of the nesting and of the digits of a number: what has more braces or
characters is not repaired."""


@dataclass(frozen=True)
class PartialAnswer:
    """What can be made out of an answer, readable or not: each part None where it is not there."""

    verdict: int | None
    prompt: str | None


def parse_partial_answer(answer: str) -> PartialAnswer:
    """The verdict and prompt in an answer's last <answer>; never raises.

    Of an answer that `parse_verdict` reads strictly, with or without reasoning, they are the same ones.
    """
    full = parse_verdict(answer, "direct")
    if isinstance(full, Verdict):
        return PartialAnswer(full.success, full.refined_prompt if full.refined_prompt.strip() else None)
    value: Any = None
    if (body := _last_body(answer)) is not None:
        try:
            value = json.loads(body, strict=False)
        except (ValueError, RecursionError):
            value = _repair(body)
    if not isinstance(value, dict):
        return PartialAnswer(None, None)
    verdict, prompt = value.get("previous_step_success"), value.get("refine_prompt")
    is_drawable = isinstance(prompt, str) and prompt.strip() and not HALF_PAIR.search(prompt)
    return PartialAnswer(verdict if isinstance(verdict, int) else None, prompt if is_drawable else None)


def has_format(answer: str, rule: FormatRule = "strict", mode: ParseMode = "strict") -> bool:
    """Whether the answer has the form that `rule` asks for."""
    if rule == "strict":
        return isinstance(parse_verdict(answer, mode), Verdict)
    start = answer.find("<answer>")
    end = answer.find("</answer>", start)
    if min(start, end) < 0 or answer.find("<think>") >= start:
        return False
    value = _repair(answer[start + len("<answer>") : end])
    if not isinstance(value, dict):
        return False
    return isinstance(value.get("previous_step_success"), bool) and isinstance(value.get("refine_prompt"), str)


def _last_body(answer: str) -> str | None:
    """What stands in the last pair of tags, pairs counted from the front."""
    body, position = None, 0
    while (start := answer.find("<answer>", position)) >= 0:
        end = answer.find("</answer>", start)
        if end < 0:
            break
        body, position = (start + len("<answer>"), end), end + len("</answer>")
    return None if body is None else answer[slice(*body)]


def _repair(text: str) -> Any:
    from json_repair import repair_json

    if len(text) > MAX_REPAIRED or sum(text.count(brace) for brace in "{[(") > MAX_BRACES:
        return None
    try:
        return repair_json(text, return_objects=True)
    except Exception:  # the library promises nothing on what it may raise
        return None
