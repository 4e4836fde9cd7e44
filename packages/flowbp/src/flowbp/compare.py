"""Two evaluations of the same prompts side by side: differences with their intervals, in neutral words."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from flowbp.evaluate import interval as bootstrap
from flowbp.evaluate import paired_interval

LABELS = {"verifier": "Verifier", "reward": "Reward", "heldout": "Held-out reward"}
"""Names of the scores as people read them, in the order in which they are shown."""
FEWEST = 10
"""Prompts below which no verdict is given."""


@runtime_checkable
class Scored(Protocol):
    """What an `Evaluation` and one read back from disk have in common."""

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
        if self.num < FEWEST:
            return "too few prompts"
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "no clear change"


@dataclass(frozen=True)
class Level:
    """One score by itself: its mean over `num` prompts and a 95 % bootstrap interval of that mean."""

    mean: float
    low: float
    high: float
    num: int


def level(*strata: Sequence[float]) -> Level:
    """The mean of one evaluation's score; of several strata, the mean of their means."""
    return Level(*bootstrap(strata), num=sum(map(len, strata)))


def change(before: Sequence[float], after: Sequence[float]) -> Change:
    """The paired difference of two scores of the same prompts."""
    difference, low, high = paired_interval(before, after)
    return Change(float(np.mean(before)), float(np.mean(after)), difference, low, high, len(before))


def title(name: str) -> str:
    """What people call a score."""
    return LABELS.get(name, name)


def ordered(names: Sequence[str]) -> list[str]:
    """Names of scores in the order of `LABELS`, unknown ones last."""
    known = list(LABELS)
    return sorted(names, key=lambda name: known.index(name) if name in known else len(known))


def comparable(before: Scored | None, after: Scored | None) -> bool:
    """Whether both are there and of the same prompts, so that they can be paired."""
    return before is not None and after is not None and before.prompts == after.prompts


def changes(before: Scored, after: Scored) -> dict[str, Change]:
    """Every score that both have."""
    names = ordered([name for name in before.scores if name in after.scores])
    return {name: change(before.scores[name], after.scores[name]) for name in names}


def category_changes(before: Scored, after: Scored, name: str) -> dict[str, Change]:
    """One score by category, in the order of first appearance; {} without categories."""
    groups = after.groups or []
    found = {}
    for group in dict.fromkeys(groups):
        rows = [i for i, g in enumerate(groups) if g == group]
        found[group] = change([before.scores[name][i] for i in rows], [after.scores[name][i] for i in rows])
    return found


def number(name: str, value: float) -> str:
    """A score for people: a verifier's as per cent, others with two decimals."""
    text = f"{100 * value:.1f} %" if name == "verifier" else f"{value:.2f}"
    return text.replace("-", "\N{MINUS SIGN}")


def signed(name: str, value: float) -> str:
    """A difference for people: a verifier's in percentage points."""
    text = f"{100 * value:+.1f}" if name == "verifier" else f"{value:+.2f}"
    return text.replace("-", "\N{MINUS SIGN}")


def interval(name: str, found: Change) -> str:
    """`+1.2 to +3.4`, in percentage points for a verifier."""
    return f"{signed(name, found.low)} to {signed(name, found.high)}"


def as_json(found: Mapping[str, Change]) -> dict[str, Any]:
    """Changes as plain data, verdicts included."""
    return {name: asdict(one) | {"verdict": one.verdict} for name, one in found.items()}
