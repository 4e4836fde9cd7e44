"""Two evaluations of the same prompts side by side: differences and their intervals, in neutral words."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from imgen_common.files import finite_or_none
from imgen_common.statistics import bootstrap_interval, paired_bootstrap_interval

if TYPE_CHECKING:
    from flowbp.evaluation.evaluate import Evaluation, ScoredPrompts

SCORE_TITLES = {"verifier": "Verifier", "reward": "Reward", "heldout": "Held-out reward"}
"""Names of the scores as people read them, in the order in which they are shown."""
SMALL = 1e-5
"""Scores below it are shown with their power of ten."""
MIN_PROMPTS = 10
"""Number of prompts below which there is no verdict."""


@dataclass(frozen=True)
class Change:
    """A score before and after: means over `num` prompts, and a 95 % interval of the mean paired difference."""

    before: float
    after: float
    difference: float
    low: float
    high: float
    num: int

    @property
    def verdict(self) -> str:
        """What the interval allows to say."""
        if not math.isfinite(self.difference):
            return "not finite"
        if self.num < MIN_PROMPTS:
            return "too few prompts"
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "no clear change"


@dataclass(frozen=True)
class MeanScore:
    """The mean of a score over `num` prompts, and a 95 % bootstrap interval of that mean."""

    mean: float
    low: float
    high: float
    num: int


def mean_score(*strata: Sequence[float]) -> MeanScore:
    """The mean of a score; of several strata, the mean of their means."""
    return MeanScore(*bootstrap_interval(strata), num=sum(map(len, strata)))


def paired_change(before: Sequence[float], after: Sequence[float]) -> Change:
    """The paired difference of two scores of the same prompts."""
    with np.errstate(invalid="ignore"):
        difference, low, high = paired_bootstrap_interval(before, after)
    return Change(float(np.mean(before)), float(np.mean(after)), difference, low, high, len(before))


def describe_not_finite(evaluations: Iterable["EvaluationsByScale"]) -> list[str]:
    """A sentence that names the scores of which some are NaN or infinite, if there are any."""
    scores = [one.scores.items() for by_scale in evaluations for one in by_scale.values()]
    names = {name for found in scores for name, values in found if not all(map(math.isfinite, values))}
    return [
        f"not finite: scores of {name}; `flowbp sample` says whether the model's images are finite, else check the "
        "weights of that reward"
        for name in sort_scores(names)
    ]


def score_title(name: str) -> str:
    """The name of a score as people read it."""
    return SCORE_TITLES.get(name, name)


def sort_scores(names: Iterable[str], titles: Mapping[str, str] = SCORE_TITLES) -> list[str]:
    """Names of scores in the order of `titles`, others last."""
    known = list(titles)
    return sorted(names, key=lambda name: known.index(name) if name in known else len(known))


def paired_changes(before: "ScoredPrompts", after: "ScoredPrompts") -> dict[str, Change]:
    """The change of every score that both evaluations have."""
    names = sort_scores(name for name in before.scores if name in after.scores)
    return {name: paired_change(before.scores[name], after.scores[name]) for name in names}


def verdicts_by_category(one: "ScoredPrompts") -> dict[str, list[float]]:
    """The scores of the verifier by category, in the order of first appearance; {} without verifier or categories."""
    found: dict[str, list[float]] = {}
    for group, value in zip(one.groups or [], one.scores.get("verifier", []), strict=False):
        found.setdefault(group, []).append(value)
    return found


def paired_changes_by_category(before: "ScoredPrompts", after: "ScoredPrompts") -> dict[str, Change]:
    """The change of the verifier's score by category."""
    old, new = verdicts_by_category(before), verdicts_by_category(after)
    return {group: paired_change(old[group], values) for group, values in new.items() if group in old}


def format_score(name: str, value: float, *others: float) -> str:
    """A score as people read it: that of the verifier in percent, others with four significant digits.

    others: numbers shown beside it.  The largest sets the number of decimals, so that they line up: two for rewards
    around 20 (CLIP, PickScore), four for those around 0.3 (HPSv2, cosines).
    """
    text = f"{100 * value:.1f} %" if name == "verifier" else f"{value:{_format_of(value, *others)}}"
    return text.replace("-", "\N{MINUS SIGN}")


def format_change(name: str, value: float, *others: float) -> str:
    """A difference as people read it: that of the verifier in percentage points.  others: as of `format_score`."""
    text = f"{100 * value:+.1f}" if name == "verifier" else f"{value:+{_format_of(value, *others)}}"
    return text.replace("-", "\N{MINUS SIGN}")


def _format_of(*values: float) -> str:
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0)
    if 0 < largest < SMALL:
        return ".2e"
    return f".{min(6, max(2, 3 - math.floor(math.log10(largest)))) if largest else 2}f"


class ChangeText(NamedTuple):
    """A change as people read it."""

    before: str
    after: str
    difference: str
    interval: str
    verdict: str


def describe_change(name: str, change: Change) -> ChangeText:
    """The texts of a table row about the change of a score."""
    scale = change.before, change.after, change.difference
    before, after = (format_score(name, value, *scale) for value in (change.before, change.after))
    if not math.isfinite(change.difference):
        return ChangeText(before, after, "-", "-", change.verdict)
    difference, low, high = (format_change(name, v, *scale) for v in (change.difference, change.low, change.high))
    return ChangeText(before, after, difference, f"{low} to {high}", change.verdict)


def scores_as_json(found: Mapping[str, Change | MeanScore]) -> dict[str, Any]:
    """Means, or changes and their verdicts, as plain data; what is not finite is None."""
    return {
        name: {key: finite_or_none(value) for key, value in asdict(one).items()}
        | ({"verdict": one.verdict} if isinstance(one, Change) else {})
        for name, one in found.items()
    }


EvaluationsByScale = Mapping[float, "Evaluation"]
"""Evaluations of one model by guidance scale."""
T = TypeVar("T", bound=Change | MeanScore)
ScoresAndCategories = tuple[dict[float, dict[str, T]], dict[float, dict[str, T]]]
"""Every score by guidance scale, and that of the verifier by scale and category."""


def mean_scores(found: EvaluationsByScale) -> ScoresAndCategories[MeanScore]:
    """The means of one model."""
    scores = {
        scale: {name: mean_score(one.scores[name]) for name in sort_scores(one.scores)} for scale, one in found.items()
    }
    groups = {
        scale: {group: mean_score(values) for group, values in verdicts_by_category(one).items()}
        for scale, one in found.items()
    }
    return scores, groups


def compare_evaluations(before: EvaluationsByScale, after: EvaluationsByScale) -> ScoresAndCategories[Change]:
    """The changes between two models."""
    scores = {scale: paired_changes(before[scale], after[scale]) for scale in after}
    return scores, {scale: paired_changes_by_category(before[scale], after[scale]) for scale in after}


def results_as_json(labels: Sequence[str], found: Sequence[EvaluationsByScale]) -> list[dict[str, Any]]:
    """Mean scores of one model, or changes between two, as plain data; one entry per guidance scale."""
    scores: Mapping[float, Mapping[str, Change | MeanScore]]
    groups: Mapping[float, Mapping[str, Change | MeanScore]]
    scores, groups = mean_scores(found[0]) if len(found) == 1 else compare_evaluations(*found)
    heads = dict(zip(("model",) if len(found) == 1 else ("before", "after"), labels, strict=True))
    return [
        {"guidance": scale} | heads | {"scores": scores_as_json(one), "categories": scores_as_json(groups[scale])}
        for scale, one in scores.items()
    ]
