"""How far two judges agree on the same answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from imgen_common.judging.answers import Answer, by_item

Pair = tuple[str, float, float]
"""An item and what each of the two judges said of it."""


@dataclass(frozen=True)
class Agreement:
    """Two judges' values of one kind of question.

    same: share of items on which they say the same.  kappa: Cohen's, with squared distances as weights where there
    are more than two values; nan where either judge always says the same.  correlation: Spearman's of ranks, nan
    likewise.  difference: mean of the second judge's values minus the first's.  differing: items on which they differ,
    the largest difference first.
    """

    name: str
    num: int
    same: float
    kappa: float
    correlation: float
    difference: float
    differing: tuple[Pair, ...]


def compare_judges(first: Sequence[Answer], second: Sequence[Answer]) -> list[Agreement]:
    """The agreement on each kind of question that both have answered; numbers in a question's name do not count.

    A value is a truth value, a number, or an object or list of such, each of which is compared by its own name.
    """
    pairs: dict[str, list[Pair]] = {}
    left, right = by_item(first), by_item(second)
    for item in sorted(left.keys() & right.keys()):
        for question in left[item].keys() & right[item].keys():
            a, b = (dict(_numbers(side[item][question].value, _kind(question))) for side in (left, right))
            for name in a.keys() & b.keys():
                pairs.setdefault(name, []).append((f"{item} ({question})", a[name], b[name]))
    return [_agreement(name, found) for name, found in sorted(pairs.items())]


def differently_shown(first: Sequence[Answer], second: Sequence[Answer]) -> list[str]:
    """The items of which two judges answered questions of the same names, but not one with the same words and images.

    A question that depends on an answer of the judge itself differs, even though the item is the same.
    """
    left, right = by_item(first), by_item(second)
    common = {item: left[item].keys() & right[item].keys() for item in sorted(left.keys() & right.keys())}
    return [
        item
        for item, names in common.items()
        if names and all(left[item][name].shown != right[item][name].shown for name in names)
    ]


def _kind(question: str) -> str:
    return question.rstrip("0123456789 ")


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, bool | int | float):
        yield name, float(value)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _numbers(part, f"{name} {key}")
    elif isinstance(value, list):
        for number, part in enumerate(value, 1):
            yield from _numbers(part, f"{name} {number}")


def _agreement(name: str, pairs: Sequence[Pair]) -> Agreement:
    a, b = np.array([[left, right] for _, left, right in pairs]).T
    differing = sorted((pair for pair in pairs if pair[1] != pair[2]), key=lambda pair: -abs(pair[1] - pair[2]))
    return Agreement(
        name=name,
        num=len(pairs),
        same=float((a == b).mean()),
        kappa=weighted_kappa(a, b),
        correlation=rank_correlation(a, b),
        difference=float((b - a).mean()),
        differing=tuple(differing),
    )


def weighted_kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Cohen's kappa with squared weights: 1 - mean_i (a_i - b_i)^2 / mean_ij (a_i - b_j)^2.

    For two values it is the plain kappa.  nan where both judges always say one and the same value.
    """
    expected = a.var() + b.var() + (a.mean() - b.mean()) ** 2  # of all pairs
    return float(1 - ((a - b) ** 2).mean() / expected) if expected else float("nan")


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: the correlation of ranks, equal values with their mean rank; nan where either is constant."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1]) if len(a) > 1 else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[inverse]
