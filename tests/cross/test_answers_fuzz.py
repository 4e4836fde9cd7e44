"""Every reader of a model's answer against seeded rubbish: no exception, memory in proportion to the answer, and the
partial reader agrees with the full one.  Times are not measured: a quadratic reader would never end.
"""

import json
import random
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from flowbp.evaluation.vlm_judge import parse_score
from flowbp.rewards.vlm.settings import ObjectRule
from imgen_common.http import HttpError
from imgen_common.http.chat import Completion, read_completion, split_reasoning
from imgen_common.judging.questions import Unreadable
from interleave.agents.judge import parse_scores
from interleave.agents.parsing import ParseFailure, parse_plan, parse_verdict
from interleave.agents.partial_parsing import PartialAnswer, has_format, parse_partial_answer
from interleave.agents.rational_rewards import T2I_ASPECTS, Critique, parse_critique
from interleave.benchmarks.official import comm_rules, rise_rules
from interleave.benchmarks.official.ueval import parse_met
from interleave.benchmarks.official.wise import WiseLegacy, WiseVerified
from interleave.models.remote import decode_base64_image
from interleave.records import Plan, Verdict

PIECES = [
    *(
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "```json\n",
        "```",
        "```python ",
        "\n",
        "\r\n",
        " ",
        "\t",
        "\x00",
    ),
    *(
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        '"',
        "'",
        "\\",
        "\\'",
        '\\"',
        "\\n",
        "\\u",
        "\\ud83d",
        "\\ud83d\\ude00",
        "\ud800",
        "é",
    ),
    *(
        '"previous_step_success"',
        "'previous_step_success'",
        "previous_step_success",
        '"refine_prompt"',
        "refine_prompt",
    ),
    *('"execution_plan"', '"step_number"', '"instruction"', '"prompt"', '"auxiliary_text"', '"score"', "'score'"),
    *("true", "false", "null", "True", "False", "None", "0", "1", "-1", "7.5", "1e999", "NaN", "Infinity", "9" * 5000),
    *(
        "Final Score: ",
        "Final Score: 4",
        "/5",
        "it's",
        "a cat",
        "//",
        "#",
        "(",
        ")",
        "<|im_end|>",
        "</",
        "&lt;",
        "\u2028",
    ),
]
RULE = ObjectRule(key="previous_step_success", equals=True, texts=("refine_prompt",))
"""The acceptance rule of an exported critic."""
WHOLE = [
    json.dumps({"previous_step_success": False, "refine_prompt": "a <answer> of \"cats\"\n\t'so'"}),
    json.dumps({"previous_step_success": True, "refine_prompt": ""}, indent=1),
    repr({"previous_step_success": False, "refine_prompt": 'it\'s a "cat"', "more": None}),
    json.dumps(
        {"execution_plan": [{"step_number": 1, "instruction": None, "prompt": "a cat", "auxiliary_text": "one"}] * 2}
    ),
    json.dumps({"score": [7, 8.5], "reasoning": "so"}),
]


def rubbish(rng: random.Random) -> str:
    """Pieces of answers in any order, or a whole answer with some of its characters lost, doubled or replaced."""
    if rng.random() < 0.4:
        text = "".join(rng.choices(PIECES, k=rng.randrange(30)))
    else:
        text = rng.choice(WHOLE)
        for _ in range(rng.choice([0, 0, 1, 1, 2, 5])):
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice(["", rng.choice(PIECES), text[at : at + 1]]) + text[at + rng.randrange(3) :]
    if rng.random() < 0.6:
        text = f"{rng.choice(['<think>', ''])}hm{rng.choice(['</think>', ''])}<answer>{text}</answer>"
    return text


def check_readers(text: str) -> None:
    """Raises AssertionError, or whatever a reader raises, where one breaks its promise."""
    strict, tolerant, direct = parse_verdict(text), parse_verdict(text, "tolerant"), parse_verdict(text, "direct")
    assert isinstance(strict, Verdict | ParseFailure)
    if isinstance(strict, Verdict):
        assert tolerant == strict or strict.refined_prompt == "None" or "</think>" in text.partition("<think>")[0]
        assert isinstance(direct, Verdict)
        assert direct.model_copy(update={"reasoning": strict.reasoning}) == strict
    if isinstance(direct, Verdict):
        assert parse_partial_answer(text) == PartialAnswer(
            direct.success, (direct.refined_prompt.strip() and direct.refined_prompt) or None
        )
    for mode, verdict in (("strict", strict), ("tolerant", tolerant), ("direct", direct)):
        rule = RULE.model_copy(update={"parse_mode": mode})
        assert rule.accepts(text) == (isinstance(verdict, Verdict) and verdict.success)
    for plan in (parse_plan(text), parse_plan(text, "tolerant")):
        assert isinstance(plan, Plan | ParseFailure)
    for read in (strict, tolerant, direct, parse_plan(text)):
        if isinstance(read, Verdict | Plan):
            read.model_dump_json().encode()  # what is read can be stored
    assert isinstance(has_format(text, "released"), bool)
    assert isinstance(parse_critique(text, T2I_ASPECTS), Critique | ParseFailure)
    with suppress(Unreadable):
        assert all(0 <= mark <= 10 for mark in parse_scores(text))
    with suppress(Unreadable):
        assert 1 <= parse_score(text) <= 5
    reasoning, answer = split_reasoning(text)
    assert len(reasoning) + len(answer) <= len(text)


def completion_of(rng: random.Random) -> bytes:
    """The body of a chat completion, or something like it."""

    def value(depth: int = 0) -> Any:
        leaves = [None, True, 0, 429, -1.5, "", "stop", "length", "content_filter", "a</think>b", 10**400]
        if depth > 3 or rng.random() < 0.4:
            return rng.choice(leaves)
        if rng.random() < 0.4:
            return [value(depth + 1) for _ in range(rng.randrange(3))]
        names = ["choices", "message", "content", "refusal", "reasoning", "finish_reason", "error", "code", "usage"]
        names += ["logprobs", "top_logprobs", "token", "logprob", "prompt_tokens", "type", "text", "thinking", "object"]
        return {rng.choice(names): value(depth + 1) for _ in range(rng.randrange(4))}

    message = {"content": value(1), rng.choice(["refusal", "reasoning", "reasoning_content", "x"]): value(2)}
    choice = {"message": rng.choice([message, message, value(2)]), "finish_reason": value(3), "logprobs": value(1)}
    body = rng.choice([{"choices": [choice], "usage": value(2)}, {"choices": [choice]}, {"error": value(1)}, value()])
    data = json.dumps(body).encode()
    return (
        data if rng.random() < 0.8 else data[: rng.randrange(len(data) + 1)] + rng.choice([b"", b"\xff", b"[" * 9999])
    )


def outcome_of(data: bytes) -> Completion | HttpError:
    try:
        return read_completion(data)
    except HttpError as error:
        return error


def check_completion(data: bytes) -> None:
    found = outcome_of(data)
    if isinstance(found, Completion):
        assert isinstance(found.text, str)
    else:
        assert found.kind in ("refused", "rate_limited", "server_error", "malformed_response")
        assert len(str(found)) < 20_000


def check_image(rng: random.Random) -> None:
    text = "".join(rng.choices(["data:", "image/png;base64,", "iVBORw0KGgo", "AAAA", "=", "\n", "é", "-", ","], k=9))
    with pytest.raises(HttpError) as caught:
        decode_base64_image(rng.choice([text, None, 3, [text]]), 10**6)
    assert caught.value.kind == "malformed_response"


def fuzz(seed: int, num: int) -> None:
    rng = random.Random(seed)
    for _ in range(num):
        check_readers(rubbish(rng))
        check_completion(completion_of(rng))
    for _ in range(num // 10):
        check_image(rng)


def test_some_rubbish() -> None:
    fuzz(0, 300)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(1, 9))
def test_much_rubbish(seed: int) -> None:
    """8 times 5,000 answers, 5,000 completions and 500 images: 84,000 cases."""
    fuzz(seed, 5000)


# --- growth ---

OPENED = "<think></think>"
HOSTILE: dict[str, Callable[[int], str]] = {
    "answers": lambda n: OPENED + "<answer>" * (n // 8),
    "answers closed once": lambda n: OPENED + "<answer>" * (n // 8) + "</answer>",
    "answers with objects": lambda n: OPENED + '<answer>{"a": "' * (n // 15) + "</answer>",
    "answers closed": lambda n: OPENED + "<answer></answer>" * (n // 17),
    "closings": lambda n: "</answer>" * (n // 9),
    "thoughts": lambda n: "<think>" * (n // 7),
    "ends of thoughts": lambda n: "</think>" * (n // 8),
    "brackets": lambda n: f"{OPENED}<answer>{{{'[' * n}}}</answer>",
    "nested keys": lambda n: f"{OPENED}<answer>{{{QUOTED_KEY * (n // 5)}}}</answer>",
    "strings without end": lambda n: f"{OPENED}<answer>{{{OPEN_STRING * (n // 6)}}}</answer>",
    "apostrophes": lambda n: f"{OPENED}<answer>{{'a': '{APOSTROPHE * (n // 2)}}}</answer>",
    "white space": lambda n: f"{OPENED}<answer>{{'a': 'x'{' ' * n}z}}</answer>",
    "white space in fences": lambda n: f"{OPENED}<answer>```\n{{{' ' * n}```</answer>",
    "fences of JSON": lambda n: "```json {" * (n // 9),
    "ends of objects": lambda n: "```json {" + "} " * (n // 2),
    "objects with a known key": lambda n: '{"criteria_met" ' * (n // 16),
    "stars of scores": lambda n: "*" * n + "Score",
    "final scores without numbers": lambda n: "Final Score " * (n // 12),
    "names of marks": lambda n: "Consistency **" * (n // 14),
    "spaces after a mark": lambda n: "Realism" + " " * n + "x",
    "lines": lambda n: "1\n" * (n // 2),
    "blank lines": lambda n: "\n" * n + "x",
    "fences": lambda n: f"{OPENED}<answer>{'```' * (n // 3)}</answer>",
    "backslashes": lambda n: f"{OPENED}<answer>{{'a': '{BACKSLASH * n}'}}</answer>",
    "digits": lambda n: f"{OPENED}<answer>{{'a': {'1' * n}}}</answer>",
    "words": lambda n: f"{OPENED}<answer>{{'a': 'x', {'w' * n}}}</answer>",
    "commas": lambda n: f"{OPENED}<answer>{{{', ' * (n // 2)}}}</answer>",
    "Python's words": lambda n: f"{OPENED}<answer>{{{'None ' * (n // 5)}}}</answer>",
    "scores": lambda n: "Final Score: 3 " * (n // 15),
    "a score of digits": lambda n: "Final Score: 3." + "1" * n,
    "spaces in a score": lambda n: "Final Score:" + " *" * (n // 2),
    "headings": lambda n: "1. Text Faithfulness:\n## Score: 3\n" * (n // 34),
    "spaces in a heading": lambda n: f"#{' #*' * (n // 3)}Score: 3",
    "a long prompt": lambda n: (
        OPENED + f"<answer>{json.dumps({'previous_step_success': False, 'refine_prompt': 'é' * n})}</answer>"
    ),
}
QUOTED_KEY, OPEN_STRING, APOSTROPHE, BACKSLASH = "'a':[", "'a': '", "x'", "\\"


def of_judges() -> list[Callable[[str], object]]:
    """The readers of judges' answers, which refuse by Unreadable."""

    def quietly(read: Callable[[str], object], text: str) -> None:
        with suppress(Unreadable):
            read(text)

    numbers = partial(comm_rules.parse_numbers, fields=comm_rules.FIELDS)
    described = partial(comm_rules.parse_descriptions, first_image=0, num_images=2)
    parsers = [parse_met, WiseVerified().parse, WiseLegacy().parse, rise_rules.parse_scores, numbers, described]
    parsers += [parse_scores, parse_score]
    return [partial(quietly, read) for read in parsers]


READERS: list[Callable[[str], object]] = [
    *of_judges(),
    parse_verdict,
    lambda text: parse_verdict(text, "tolerant"),
    lambda text: parse_plan(text, "tolerant"),
    parse_partial_answer,
    lambda text: has_format(text, "released"),
    lambda text: parse_critique(text, T2I_ASPECTS),
    split_reasoning,
    lambda text: outcome_of(text.encode()),
    lambda text: outcome_of(json.dumps({"choices": [{"message": {"content": text}}]}).encode()),
]


def peak_memory(read: Callable[[str], object], text: str) -> int:
    tracemalloc.start()
    try:
        read(text)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def check_growth(name: str, small: int, factor: int) -> None:
    """`factor` times the answer takes about `factor` times the memory, not its square."""
    for read in READERS:
        read(HOSTILE[name](100))  # what is imported or compiled at the first use does not count
        before, after = (peak_memory(read, HOSTILE[name](size)) for size in (small, small * factor))
        assert after <= 2 * factor * before + 64 * small * factor, (name, before, after)


@pytest.mark.parametrize("name", ["answers", "answers closed once", "answers with objects"])
def test_memory_grows_with_the_answer(name: str) -> None:
    check_growth(name, 1000, 8)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", HOSTILE)
def test_memory_grows_with_every_answer(name: str) -> None:
    check_growth(name, 50_000, 8)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", HOSTILE)
def test_the_largest_answer_that_is_let_in_is_read(name: str) -> None:
    """8 MiB, as endpoints may answer; a reader whose time grows with the square would not come back."""
    text = HOSTILE[name](8 * 2**20)
    for read in READERS:
        read(text)
