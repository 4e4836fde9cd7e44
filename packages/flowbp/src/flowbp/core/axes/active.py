"""Second axis, the active set: which steps are evaluated with gradient."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Le
from pydantic import Field, model_validator

from flowbp.core.axes.grid import (
    ActiveSteps,
    Concentration,
    Count,
    Grid,
    Pool,
    Share,
    SplitSteps,
    StoppedSteps,
    Strength,
    SupportedLegs,
    draw_from_pools,
    require_steps,
)
from imgen_common.config import Config

RENAMED = {"num_steps": "num_active_steps"}

# Samplers of two steps k < j ------------------------------------------------------------------------------------------
# draw: (k, j) with first <= k < j < num_steps.  pmf: probability of each j; None where it has no closed form.
# Papers count them from the clean end: r_j = N - j, r_k = N - k, 1 <= r_j < r_k <= n, n the length of the window.


class Uniform(Config):
    """Two distinct steps of the window, uniformly; with `cap`, r_j ~ U{1..cap} and then r_k ~ U{r_j+1..n}."""

    kind: Literal["uniform"] = "uniform"
    cap: Count | None = None
    """Largest distance of j from the clean end, in steps; none: no limit."""

    def draw(self, first: int, num_steps: int, rng: np.random.Generator) -> tuple[int, int]:
        length = num_steps - first
        if self.cap is None:
            k, j = sorted(rng.choice(length, size=2, replace=False).tolist())
            return first + k, first + j
        reverse_j = int(rng.integers(1, min(self.cap, length - 1), endpoint=True))
        reverse_k = int(rng.integers(reverse_j + 1, length, endpoint=True))
        return num_steps - reverse_k, num_steps - reverse_j

    def pmf(self, first: int, num_steps: int) -> dict[int, float] | None:
        length = num_steps - first
        if self.cap is None:
            return {first + m: 2 * m / (length * (length - 1)) for m in range(1, length)}
        count = min(self.cap, length - 1)
        return {num_steps - reverse_j: 1 / count for reverse_j in range(1, count + 1)}


class Dirichlet(Config):
    """Lengths of [j, N), [k, j) and [first, k) in Dirichlet proportions, each at least one step; j is never N-1."""

    kind: Literal["dirichlet"] = "dirichlet"
    clean: Concentration = 2.5
    """Concentration of the part between j and the clean end, > 0."""
    gap: Concentration = 6.0
    """Concentration of the part between k and j, > 0."""
    noisy: Concentration = 2.0
    """Concentration of the part before k, > 0."""
    cap: Annotated[int, Ge(2)] | None = None
    """Largest distance of j from the clean end, in steps, >= 2; overflow goes to the noisy part, the gap stays."""

    def draw(self, first: int, num_steps: int, rng: np.random.Generator) -> tuple[int, int]:
        length = num_steps - first
        shares = rng.dirichlet([self.clean, self.gap, self.noisy])
        parts = [round(share * length) for share in shares.tolist()]
        parts[int(shares.argmax())] += length - sum(parts)
        parts = [max(1, part) for part in parts]
        parts[parts.index(max(parts))] += length - sum(parts)
        clean, gap, _ = parts
        if self.cap is not None:
            clean = min(clean, self.cap - 1)
        return num_steps - 1 - clean - gap, num_steps - 1 - clean

    def pmf(self, first: int, num_steps: int) -> dict[int, float] | None:
        return None


class Midpoint(Config):
    """k uniform in the window (not its last step), j halfway between k and the clean end."""

    kind: Literal["midpoint"] = "midpoint"

    def draw(self, first: int, num_steps: int, rng: np.random.Generator) -> tuple[int, int]:
        k = int(rng.integers(first, num_steps - 1))
        return k, (k + num_steps) // 2

    def pmf(self, first: int, num_steps: int) -> dict[int, float] | None:
        hits = Counter((k + num_steps) // 2 for k in range(first, num_steps - 1))
        return {j: count / hits.total() for j, count in hits.items()}


class MidpointJ(Config):
    """j uniform in the window (not its first step), k halfway between the start of the window and j."""

    kind: Literal["midpoint_j"] = "midpoint_j"

    def draw(self, first: int, num_steps: int, rng: np.random.Generator) -> tuple[int, int]:
        j = int(rng.integers(first + 1, num_steps))
        return (first + j) // 2, j

    def pmf(self, first: int, num_steps: int) -> dict[int, float] | None:
        return dict.fromkeys(range(first + 1, num_steps), 1 / (num_steps - 1 - first))


PairSampler = Annotated[Uniform | Dirichlet | Midpoint | MidpointJ, Field(discriminator="kind")]


# Active sets ----------------------------------------------------------------------------------------------------------


class OneOfTail(Config):
    """One step, uniform over the last `num_active_steps`; a posterior mean is taken there (ReFL)."""

    kind: Literal["one_of_tail"] = "one_of_tail"
    renamed: ClassVar = RENAMED
    num_active_steps: Count = 11
    """Number of last steps to draw from, >= 1."""

    def draw(self, grid: Grid, rng: np.random.Generator) -> StoppedSteps:
        require_steps(self.num_active_steps, len(grid.window), "method.active.num_active_steps")
        steps = grid.window[-self.num_active_steps :]
        pool = Pool(steps, (1.0,) * len(steps), 1)
        active = pool.draw(rng)
        return StoppedSteps(active, (pool,), stop=active[0])


class LastSteps(Config):
    """The last `num_active_steps` steps (DRaFT-K)."""

    kind: Literal["last_steps"] = "last_steps"
    renamed: ClassVar = RENAMED
    num_active_steps: Count = 1
    """Number of active steps K, >= 1."""

    def draw(self, grid: Grid, rng: np.random.Generator) -> ActiveSteps:
        require_steps(self.num_active_steps, len(grid.window), "method.active.num_active_steps")
        return ActiveSteps(grid.window[-self.num_active_steps :])


class SpacedPrefix(Config):
    """`num_active_steps` equally spaced steps, random phase, of a rollout stopped early at a random step e (DRTune).

    e = N - U{1..m},  m = round(early_stop N);  stride = floor(P / K) on the P steps up to e.
    """

    kind: Literal["spaced_prefix"] = "spaced_prefix"
    renamed: ClassVar = RENAMED
    num_active_steps: Count = 3
    """Number of active steps K, >= 1; fewer where the prefix is shorter."""
    early_stop: Share = 0.4
    """Share of the steps, from the clean end, among which the stop is drawn; 0: always the last step."""

    def draw(self, grid: Grid, rng: np.random.Generator) -> StoppedSteps:
        require_steps(self.num_active_steps, len(grid.window), "method.active.num_active_steps")
        latest = min(round(self.early_stop * grid.num_inference_steps), len(grid.window))
        stop = grid.num_inference_steps - (int(rng.integers(1, latest, endpoint=True)) if latest else 1)
        length = stop + 1 - grid.first
        count = min(self.num_active_steps, length)
        stride = length // count
        phases = length - (count - 1) * stride
        start = grid.first + (int(rng.integers(phases)) if count < length else 0)
        return StoppedSteps(tuple(start + q * stride for q in range(count)), stop=stop)


class Pair(Config):
    """Two steps k < j; a bridge couples j (LeapAlign)."""

    kind: Literal["pair"] = "pair"
    sampler: PairSampler = Uniform()
    """How k and j are drawn."""

    def draw(self, grid: Grid, rng: np.random.Generator) -> SplitSteps:
        require_steps(3, len(grid.window), "a pair of steps (k, j)")
        k, j = self.sampler.draw(grid.first, grid.num_inference_steps, rng)
        return SplitSteps((k, j), split=j)


class FirstSupports(Config):
    """Two legs [k, j) and [j, N); the first `num_supports` quadrature nodes of each are active (FlowBP-Lagrange)."""

    kind: Literal["first_supports"] = "first_supports"
    sampler: PairSampler = Dirichlet()
    """How k and j are drawn."""
    num_supports: Count = 2
    """Active nodes per leg, >= 1, its start first; 1 is the papers' mode "start", 2 "midpoint", the order "all"."""
    later_gain: Strength = 0.25
    """Factor on the gradient of active nodes other than the start of a leg, 0 to 100."""

    def draw(self, grid: Grid, rng: np.random.Generator) -> SupportedLegs:
        require_steps(3, len(grid.window), "a pair of steps (k, j)")
        k, j = self.sampler.draw(grid.first, grid.num_inference_steps, rng)
        return SupportedLegs((k, j), split=j, num_supports=self.num_supports, later_gain=self.later_gain)


class LateBiased(Config):
    """`num_active_steps` distinct steps, each draw proportional to (i + 1)^bias (FlowBP-Sparse, FlowBP-Bridge).

    Without `split`, i is the step itself.  With it a step j is drawn and always active; the budget is shared between
    [first, j) and [j, N) in proportion to their lengths, and i counts from the start of each part.
    """

    kind: Literal["late_biased"] = "late_biased"
    renamed: ClassVar = RENAMED
    num_active_steps: Count = 4
    """Number of active steps K, >= 1; >= 2 with `split`."""
    bias: Annotated[float, Ge(0), Le(10)] = 2.0
    """Exponent, 0 (uniform) to 10; larger prefers clean steps."""
    split: PairSampler | None = None
    """Where a bridge splits the trajectory: j of this sampler (its k is dropped); none: no bridge."""

    @model_validator(mode="after")
    def _both_sides(self) -> "LateBiased":
        if self.split is not None and self.num_active_steps < 2:
            raise ValueError("a split shares the steps between two sides: use num_active_steps >= 2, or split null")
        return self

    def draw(self, grid: Grid, rng: np.random.Generator) -> ActiveSteps:
        require_steps(self.num_active_steps, len(grid.window), "method.active.num_active_steps")
        if self.split is None:
            pools: tuple[Pool, ...] = (self._pool(grid.window, grid.first, self.num_active_steps),)
            return ActiveSteps(draw_from_pools(pools, rng), pools)
        require_steps(3, len(grid.window), "method.active.split")
        _, j = self.split.draw(grid.first, grid.num_inference_steps, rng)
        before, after = range(grid.first, j), range(j + 1, grid.num_inference_steps)
        num_before, num_after = self._budget(grid, j)
        pools = (self._pool(before, 0, num_before), Pool((j,), (1.0,), 1), self._pool(after, 0, num_after))
        return SplitSteps(draw_from_pools(pools, rng), pools, split=j, coverage=self._coverage(grid))

    def _budget(self, grid: Grid, j: int) -> tuple[int, int]:
        """Steps to draw from [first, j) and from (j, N)."""
        num_before = share_budget(self.num_active_steps, j - grid.first, grid.num_inference_steps - j)
        return num_before, self.num_active_steps - num_before - 1

    def _coverage(self, grid: Grid) -> dict[int, float]:
        """1 - P(i lies after a j that used up the budget of its side)."""
        chances = self.split.pmf(grid.first, grid.num_inference_steps) if self.split else None
        if chances is None:
            return {}
        starved = {j: p for j, p in chances.items() if not self._budget(grid, j)[1]}
        return {i: 1.0 - sum(p for j, p in starved.items() if j < i) for i in grid.window}

    def _pool(self, steps: Sequence[int], offset: int, count: int) -> Pool:
        return Pool(tuple(steps), tuple(float(offset + i + 1) ** self.bias for i in range(len(steps))), count)


def share_budget(budget: int, before: int, after: int) -> int:
    """Active steps before the split: budget * before / (before + after), rounded half to even, both sides >= 1.

    Raises ValueError unless 2 <= budget <= before + after.  Source: FlowBP-Bridge, arXiv 2606.11075.
    """
    if not 2 <= budget <= before + after:
        raise ValueError(f"cannot share {budget} active steps between parts of {before} and {after} steps")
    share = round(budget * before / (before + after))
    return min(max(share, 1, budget - after), before, budget - 1)


class Stratified(Config):
    """One step in each of `num_active_steps` consecutive parts of nearly equal sigma span, uniform in sigma within
    a part.

    Parts are runs of whole steps, none empty.  With `refill: inclusion` every drawn step stands for its whole part:
    a one-point Monte-Carlo quadrature per part.  Ours, not from a paper.
    """

    kind: Literal["stratified"] = "stratified"
    renamed: ClassVar = RENAMED
    num_active_steps: Count = 4
    """Number of active steps K, >= 1."""

    def draw(self, grid: Grid, rng: np.random.Generator) -> ActiveSteps:
        require_steps(self.num_active_steps, len(grid.window), "method.active.num_active_steps")
        top, bottom, num_steps = grid.sigmas[grid.first], grid.sigmas[-1], grid.num_inference_steps
        bounds = [grid.first]
        for part in range(1, self.num_active_steps):
            target = top + (bottom - top) * part / self.num_active_steps
            allowed = range(bounds[-1] + 1, num_steps - (self.num_active_steps - part) + 1)
            bounds.append(min(allowed, key=lambda i: abs(grid.sigmas[i] - target)))
        parts = [range(start, stop) for start, stop in pairwise([*bounds, num_steps])]
        pools = tuple(Pool(tuple(part), tuple(-grid.width(i) for i in part), 1) for part in parts)
        return ActiveSteps(draw_from_pools(pools, rng), pools)


class All(Config):
    """Every step (of the tail window)."""

    kind: Literal["all"] = "all"

    def draw(self, grid: Grid, rng: np.random.Generator) -> ActiveSteps:
        return ActiveSteps(grid.window)


Active = Annotated[
    OneOfTail | LastSteps | SpacedPrefix | Pair | LateBiased | Stratified | FirstSupports | All,
    Field(discriminator="kind"),
]
