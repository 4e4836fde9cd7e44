"""Two evaluations of the same prompts side by side: differences and their intervals, in neutral words."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from flowbp.evaluation.evaluate import Evaluation
from imgen_common.statistics import bootstrap_interval, paired_bootstrap_interval

SCORE_TITLES = {"verifier": "Verifier", "reward": "Reward", "heldout": "Held-out reward"}
"""Names of the scores as people read them, in the order in which they are shown."""
MIN_PROMPTS = 10
"""Number of prompts below which there is no verdict."""


@runtime_checkable
class ScoredPrompts(Protocol):
    """What an `Evaluation` and a `SavedEvaluation` have in common."""

    @property
    def prompts(self) -> list[str]: ...
    @property
    def scores(self) -> dict[str, list[float]]: ...
    @property
    def groups(self) -> list[str] | None: ...


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
    difference, low, high = paired_bootstrap_interval(before, after)
    return Change(float(np.mean(before)), float(np.mean(after)), difference, low, high, len(before))


def score_title(name: str) -> str:
    """The name of a score as people read it."""
    return SCORE_TITLES.get(name, name)


def sort_scores(names: Sequence[str]) -> list[str]:
    """Names of scores in the order of `SCORE_TITLES`, others last."""
    known = list(SCORE_TITLES)
    return sorted(names, key=lambda name: known.index(name) if name in known else len(known))


def have_same_prompts(before: ScoredPrompts | None, after: ScoredPrompts | None) -> bool:
    """Whether both evaluations exist and are of the same prompts, so that they can be paired."""
    return before is not None and after is not None and before.prompts == after.prompts


def paired_changes(before: ScoredPrompts, after: ScoredPrompts) -> dict[str, Change]:
    """The change of every score that both evaluations have."""
    names = sort_scores([name for name in before.scores if name in after.scores])
    return {name: paired_change(before.scores[name], after.scores[name]) for name in names}


def paired_changes_by_category(before: ScoredPrompts, after: ScoredPrompts, name: str) -> dict[str, Change]:
    """The change of one score by category, in the order of first appearance; {} without categories."""
    groups = after.groups or []
    found = {}
    for group in dict.fromkeys(groups):
        rows = [i for i, g in enumerate(groups) if g == group]
        found[group] = paired_change([before.scores[name][i] for i in rows], [after.scores[name][i] for i in rows])
    return found


def format_score(name: str, value: float) -> str:
    """A score as people read it: that of the verifier in percent, others with two decimals."""
    text = f"{100 * value:.1f} %" if name == "verifier" else f"{value:.2f}"
    return text.replace("-", "\N{MINUS SIGN}")


def format_change(name: str, value: float) -> str:
    """A difference as people read it: that of the verifier in percentage points."""
    text = f"{100 * value:+.1f}" if name == "verifier" else f"{value:+.2f}"
    return text.replace("-", "\N{MINUS SIGN}")


def format_interval(name: str, found: Change) -> str:
    """The interval of a change, `+1.2 to +3.4`; that of the verifier in percentage points."""
    return f"{format_change(name, found.low)} to {format_change(name, found.high)}"


class ChangeText(NamedTuple):
    """A change as people read it."""

    before: str
    after: str
    difference: str
    interval: str
    verdict: str


def describe_change(name: str, change: Change) -> ChangeText:
    """The texts of a table row about the change of a score."""
    return ChangeText(
        format_score(name, change.before),
        format_score(name, change.after),
        format_change(name, change.difference),
        format_interval(name, change),
        change.verdict,
    )


def changes_as_json(found: Mapping[str, Change]) -> dict[str, Any]:
    """Changes and their verdicts as plain data."""
    return {name: asdict(one) | {"verdict": one.verdict} for name, one in found.items()}


# --- whole models ----------------------------------------------------------------------------------------------------

EvaluationsByScale = Mapping[float, Evaluation]
"""Evaluations of one model by guidance scale."""


def mean_scores(
    found: EvaluationsByScale,
) -> tuple[dict[float, dict[str, MeanScore]], dict[float, dict[str, MeanScore]]]:
    """The mean of every score by guidance scale, and that of the verifier by scale and category."""
    scores = {
        scale: {name: mean_score(one.scores[name]) for name in sort_scores(list(one.scores))}
        for scale, one in found.items()
    }
    groups = {}
    for scale, one in found.items():
        rows: dict[str, list[float]] = {}
        for group, value in zip(one.groups or [], one.scores.get("verifier", []), strict=True):
            rows.setdefault(group, []).append(value)
        groups[scale] = {group: mean_score(values) for group, values in rows.items()}
    return scores, groups


def compare_evaluations(
    before: EvaluationsByScale, after: EvaluationsByScale
) -> tuple[dict[float, dict[str, Change]], dict[float, dict[str, Change]]]:
    """The change of every score by guidance scale, and that of the verifier by scale and category."""
    scores = {scale: paired_changes(before[scale], after[scale]) for scale in after}
    return scores, {
        scale: paired_changes_by_category(before[scale], after[scale], "verifier")
        if "verifier" in scores[scale]
        else {}
        for scale in after
    }


def results_as_json(labels: Sequence[str], found: Sequence[EvaluationsByScale]) -> list[dict[str, Any]]:
    """Mean scores of one model, or changes between two, as plain data; one entry per guidance scale."""
    if len(found) == 1:
        scores, groups = mean_scores(found[0])
        return [
            {
                "guidance": scale,
                "model": labels[0],
                "scores": {name: asdict(one) for name, one in scores[scale].items()},
                "categories": {group: asdict(one) for group, one in groups[scale].items()},
            }
            for scale in scores
        ]
    changes, changes_by_category = compare_evaluations(*found)
    return [
        {
            "guidance": scale,
            "before": labels[0],
            "after": labels[1],
            "scores": changes_as_json(changes[scale]),
            "categories": changes_as_json(changes_by_category[scale]),
        }
        for scale in changes
    ]
