"""What the four axes hand to each other: the noise grid, active steps and legs.

Steps are forward indices: 0 is the noisy end, N-1 the last step before the image, x_N the image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le

from flowbp.core.numerics import draw_without_replacement, inclusion_probabilities
from imgen_common.errors import UserError

Share = Annotated[float, Ge(0), Le(1)]
Count = Annotated[int, Ge(1)]
Concentration = Annotated[float, Gt(0), Le(1000)]
Strength = Annotated[float, Ge(0), Le(100)]
RhoMax = Annotated[float, Ge(1)]


@dataclass(frozen=True)
class Pool:
    """`count` of `steps` are drawn without replacement, each draw proportional to the remaining `odds`."""

    steps: tuple[int, ...]
    odds: tuple[float, ...]
    count: int

    def draw(self, rng: np.random.Generator) -> tuple[int, ...]:
        """The drawn steps, ascending."""
        return tuple(self.steps[i] for i in draw_without_replacement(self.odds, self.count, rng))

    def inclusion(self) -> dict[int, float]:
        """Probability of each step to be drawn."""
        return dict(zip(self.steps, inclusion_probabilities(self.odds, self.count).tolist(), strict=True))


@dataclass(frozen=True)
class ActiveSteps:
    """One realization of an active set.

    steps: active steps, ascending; for leaps, where each leg starts.  pools: what they were drawn from, disjoint;
    empty where steps are not drawn one by one.
    """

    steps: tuple[int, ...]
    pools: tuple[Pool, ...] = ()

    def inclusion(self) -> dict[int, float]:
        """Probability of each step of the pools to be active."""
        return {i: p for pool in self.pools for i, p in pool.inclusion().items()}


@dataclass(frozen=True, kw_only=True)
class StoppedSteps(ActiveSteps):
    """Steps of a rollout that may end early.  stop: the step whose posterior mean a reward can see."""

    stop: int


@dataclass(frozen=True, kw_only=True)
class SplitSteps(ActiveSteps):
    """Steps on both sides of `split`, the step j that a bridge couples.

    coverage: probability of each step to be in a pool that draws at all, over all splits, where it is not 1.
    """

    split: int
    coverage: Mapping[int, float] = field(default_factory=dict)

    def inclusion(self) -> dict[int, float]:
        """Probability of each step of the pools to be active, over all splits."""
        return {i: p * self.coverage.get(i, 1.0) for i, p in super().inclusion().items()}


@dataclass(frozen=True, kw_only=True)
class SupportedLegs(SplitSteps):
    """Starts of two legs whose first `num_supports` quadrature nodes are active, all but the starts times `later_gain`.

    The nodes themselves follow from the quadrature.
    """

    num_supports: int
    later_gain: float


@dataclass(frozen=True)
class Grid:
    """Noise levels of a trajectory, shape (N+1,), and the first step that may carry gradient."""

    sigmas: tuple[float, ...]
    first: int = 0

    @property
    def num_inference_steps(self) -> int:
        """N."""
        return len(self.sigmas) - 1

    @property
    def window(self) -> tuple[int, ...]:
        """Steps that may carry gradient: first ... N-1."""
        return tuple(range(self.first, self.num_inference_steps))

    def width(self, start: int, stop: int | None = None) -> float:
        """sigma_stop - sigma_start (negative), of the one step from `start` by default."""
        return self.sigmas[start + 1 if stop is None else stop] - self.sigmas[start]


@dataclass(frozen=True)
class Leg:
    """Connector  x_hat_stop = x_start + sum of w_q v_q  over cached velocities; `nodes` are the pairs (q, w_q)."""

    start: int
    stop: int
    nodes: tuple[tuple[int, float], ...]


def require_steps(count: int, available: int, what: str) -> None:
    """Raises UserError, which names the setting `what`, unless `count` steps are available."""
    if count > available:
        raise UserError(
            f"{what} asks for {count} of {available} steps; lower {what}, or raise num_inference_steps or method.tail"
        )


def draw_from_pools(pools: Sequence[Pool], rng: np.random.Generator) -> tuple[int, ...]:
    """The drawn steps of all pools, in the order of the pools."""
    return tuple(step for pool in pools for step in pool.draw(rng))
