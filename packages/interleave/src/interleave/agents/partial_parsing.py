"""What can be read of a critic's answer that `parsing` may refuse, as the reward of reinforcement learning needs it.

Source: the released code of InterleaveThinker, arXiv 2606.13679.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from interleave.agents.parsing import ParseMode, parse_verdict
from interleave.records import Verdict

FormatRule = Literal["strict", "released"]
"""strict: `parsing` reads it.  released: as the released code, which also takes an answer without <think>, a truncated
one, and an empty prompt with a failed verdict."""
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
MAX_BRACES = 64
"""The time of a repair grows with the square of the nesting: what has more is not repaired."""


@dataclass(frozen=True)
class PartialAnswer:
    """What can be made out of an answer, readable or not: each part None where it is not there."""

    verdict: int | None
    prompt: str | None


def parse_partial_answer(answer: str) -> PartialAnswer:
    """The verdict and prompt in an answer's last <answer>; never raises."""
    bodies = ANSWER.findall(answer)
    value: Any = None
    if bodies:
        try:
            value = json.loads(bodies[-1], strict=False)
        except (ValueError, RecursionError):
            value = _repair(bodies[-1])
    if not isinstance(value, dict):
        return PartialAnswer(None, None)
    verdict, prompt = value.get("previous_step_success"), value.get("refine_prompt")
    return PartialAnswer(
        verdict=verdict if isinstance(verdict, int) else None,
        prompt=prompt if isinstance(prompt, str) and prompt.strip() else None,
    )


def has_format(answer: str, rule: FormatRule = "strict", mode: ParseMode = "strict") -> bool:
    """Whether the answer has the form that `rule` asks for."""
    if rule == "strict":
        return isinstance(parse_verdict(answer, mode), Verdict)
    first = ANSWER.search(answer)
    if first is None or not answer.find("<think>") < first.start():
        return False
    value = _repair(first[1])
    if not isinstance(value, dict):
        return False
    return isinstance(value.get("previous_step_success"), bool) and isinstance(value.get("refine_prompt"), str)


def _repair(text: str) -> Any:
    from json_repair import repair_json

    if sum(text.count(brace) for brace in "{[(") > MAX_BRACES:
        return None
    try:
        return repair_json(text, return_objects=True)
    except Exception:  # the library promises nothing on what it may raise
        return None
