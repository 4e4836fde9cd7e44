"""RISEBench's rules: what the judge is asked about an item of which kind, and what its answers are worth."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from imgen_common.judging.questions import Unreadable
from interleave.benchmarks.base import Item, Scores

CATEGORIES = tuple(f"{kind}_reasoning" for kind in ("temporal", "causal", "spatial", "logical"))
DIMENSIONS = ("consistency", "reasoning", "plausibility")
"""In the order in which the authors ask for them."""
COLUMNS = "_columns"
"""Key of a row: every key that any item of the data has."""
PROMPTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("generation", "spatial_qual", "logical_img_wo_q"), ()),
    **dict.fromkeys(("consist", "spatial_cons", "spatial_ref_img", "logical_cons", "logical_img"), ("instruct",)),
    **dict.fromkeys(("reasoning", "reasoning_w_input", "spatial_ref"), ("instruct", "reference")),
    **dict.fromkeys(("spatial_ref_w_input", "logical_cons_ans"), ("instruct", "reference")),
    "logical_txt": ("reference",),
}
"""The places of each prompt; the authors' names of prompts begin with `prompt_`."""
FINAL_SCORES = tuple(
    re.compile(rf"\*?\*?{words}\*?\*?:?\s*([\d*\s,\n]*)", re.IGNORECASE) for words in ("Final Score", "Final Scores")
)
MAX_DIGITS = 100
WEIGHTS = {"consistency": 0.3, "reasoning": 0.5, "plausibility": 0.2}
WEIGHTS_WITHOUT_CONSISTENCY = {"reasoning": 0.8, "plausibility": 0.2}
LOGICAL_WEIGHTS = {"consistency": 0.3, "reasoning": 0.7}


def is_set(row: Mapping[str, Any], key: str) -> bool:
    """Whether a key is there with a value; NaN is none, nor is null, which pandas takes for NaN."""
    value = row.get(key)
    return value is not None and not (isinstance(value, float) and math.isnan(value))


def is_logical(item: Item) -> bool:
    """Whether its dimensions are consistency and reasoning alone, each 0 or 1."""
    return item.category == "logical_reasoning"


def dimensions(item: Item) -> tuple[str, ...]:
    """What the judge is asked for."""
    skipped = {"plausibility"} if is_logical(item) else set()
    if is_set(item.row, "consistency_free"):
        skipped.add("consistency")
    return tuple(name for name in DIMENSIONS if name not in skipped)


def plan(item: Item) -> Iterator[tuple[str, str, str | None]]:
    """Dimension, prompt, and the key of the image that is shown before the result, if any."""
    row, has_image, shows_input = item.row, is_set(item.row, "reference_img"), is_set(item.row, "reasoning_img")
    match item.category:
        case "spatial_reasoning":
            first = "reference_img" if has_image else "image"  # for consistency, too
            shown = "spatial_ref_img" if has_image else "spatial_ref_w_input"
            yield "consistency", "spatial_cons", first
            yield ("reasoning", shown, first) if has_image or shows_input else ("reasoning", "spatial_ref", None)
            yield "plausibility", "spatial_qual", None
        case "logical_reasoning" if is_set(row, "reference_txt"):
            yield "consistency", "logical_cons_ans", "image"
            yield "reasoning", "logical_txt", None
        case "logical_reasoning":
            short = "reasoning_wo_ins" in row.get(COLUMNS, ())
            yield "consistency", "logical_cons", "reference_img"
            yield "reasoning", "logical_img_wo_q" if short else "logical_img", "reference_img"
        case _:
            yield "consistency", "consist", "image"
            yield ("reasoning", "reasoning_w_input", "image") if shows_input else ("reasoning", "reasoning", None)
            yield "plausibility", "generation", None


def parse_scores(answer: str) -> list[int]:
    """All numbers of the first `Final Score` that any follows.  Raises Unreadable."""
    for pattern in FINAL_SCORES:
        for found in pattern.findall(answer):
            if numbers := re.findall(r"\d+", found):
                if max(map(len, numbers)) > MAX_DIGITS:
                    raise Unreadable("a `Final Score:` with a number of very many digits")
                return [int(number) for number in numbers]
    raise Unreadable("no `Final Score:` with a number")


def parse_mark(answer: str, *, is_logical: bool) -> int:
    """The one number of an answer: from 1 to 5, of logical items any, where all but 0 say yes.  Raises Unreadable.

    Upstream an item with a number too many ends the run, or takes it for another dimension's, and no number is too
    large.
    """
    numbers = parse_scores(answer)
    if len(numbers) > 1:
        raise Unreadable(f"{len(numbers)} numbers after `Final Score:`, not one")
    if not is_logical and not 1 <= numbers[0] <= 5:
        raise Unreadable(f"the score {str(numbers[0])[:9]} is not from 1 to 5")
    return numbers[0]


def item_scores(item: Item, answers: Mapping[str, Any], as_zero: bool) -> Scores:
    """`accuracy` 0 or 1, and from 1 to 5 the dimensions, `score` and `score_upstream`; none, if answers failed."""
    marks = _marks(item, answers, as_zero)
    if marks is None:
        return {}
    scores = {"accuracy": float(all(marks[name] == 5 for name in dimensions(item))), **marks}
    is_free = is_set(item.row, "consistency_free")
    has_column = "consistency_free" in item.row.get(COLUMNS, ())
    free_upstream = has_column and (not is_free or bool(item.row["consistency_free"]))  # there, NaN counts as true
    for name, free in (("score", is_free), ("score_upstream", free_upstream)):
        if (value := _weighted(item, marks, free)) is not None:
            scores[name] = value
    return scores


def _marks(item: Item, answers: Mapping[str, Any], as_zero: bool) -> dict[str, float] | None:
    names = dimensions(item)
    if not as_zero and any(answers.get(name) is None for name in names):
        return None
    worst = 0 if is_logical(item) else 1
    marks = {name: float(worst if answers.get(name) is None else answers[name]) for name in names}
    return {name: 4 * min(mark, 1) + 1 for name, mark in marks.items()} if is_logical(item) else marks


def _weighted(item: Item, marks: Mapping[str, float], is_free: bool) -> float | None:
    """None where a dimension is missing that is not free."""
    weights = WEIGHTS_WITHOUT_CONSISTENCY if is_free else WEIGHTS
    if is_logical(item):
        weights = LOGICAL_WEIGHTS if "consistency" in marks else {"reasoning": 1.0}  # upstream has no such item
    if not weights.keys() <= marks.keys():
        return None
    score = sum(weight * marks[name] for name, weight in weights.items())
    return max(1.0, score / 2) if marks["reasoning"] == 1 else score


def percentages(rows: Sequence[tuple[Item, Scores]]) -> dict[str, float]:
    """Over all items, then by category: accuracy; 25 (s - 1) of scores and dimensions from 1 to 5."""
    found = {}
    for name in ("accuracy", "score", "score_upstream", "reasoning", "consistency", "plausibility"):
        for category in ("", *CATEGORIES):
            values = [scores[name] for item, scores in rows if name in scores and category in ("", item.category)]
            if values:
                mean = sum(values) / len(values)
                key = f"{name}_{category.removesuffix('_reasoning')}" if category else name
                found[key] = 100 * mean if name == "accuracy" else 25 * (mean - 1)
    return found
