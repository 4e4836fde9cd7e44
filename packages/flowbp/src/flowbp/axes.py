"""The axes: what a method is made of, each a union of frozen values discriminated on `kind`.

    reward input   what the reward sees
    active set     which steps are evaluated with gradient
    weights        how much of the trajectory each of them stands for
    coupling       where the state itself carries gradient

Steps are forward indices: 0 is the noisy end, N-1 the last step before the picture, x_N the picture.
A choice a new paper needs is one class here; every method can then use it.
Source of formulas and samplers: FlowBP, arXiv 2606.11075, and facts 3.1-3.9.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Le
from pydantic import Field, model_validator

from flowbp.numerics import MAX_ORDER, inclusion_probabilities, lagrange_weights, race
from imgen_common.config import Config
from imgen_common.errors import UserError

Share = Annotated[float, Ge(0), Le(1)]
Count = Annotated[int, Ge(1)]
Concentration = Annotated[float, Gt(0), Le(1000)]
Strength = Annotated[float, Ge(0), Le(100)]
RhoMax = Annotated[float, Ge(1)]


# What the axes hand to each other -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """`count` of `steps` are drawn without replacement, each draw proportional to the remaining `odds`."""

    steps: tuple[int, ...]
    odds: tuple[float, ...]
    count: int

    def draw(self, rng: np.random.Generator) -> tuple[int, ...]:
        """The drawn steps, ascending."""
        return tuple(self.steps[i] for i in race(self.odds, self.count, rng))

    def inclusion(self) -> dict[int, float]:
        """Probability of each step to be drawn."""
        return dict(zip(self.steps, inclusion_probabilities(self.odds, self.count).tolist(), strict=True))


@dataclass(frozen=True)
class Draw:
    """One realisation of an active set.

    steps: active steps, ascending; for leaps, where each leg starts.  pools: what they were drawn from.
    coverage: probability of each step to be in a pool that draws at all, where not 1.
    split: the step j a bridge couples.  stop: the step whose posterior mean the reward sees, if it wants one.
    per_leg, later_gain: see `FirstSupports`.
    """

    steps: tuple[int, ...]
    pools: tuple[Pool, ...] = ()
    coverage: Mapping[int, float] = field(default_factory=dict)
    split: int | None = None
    stop: int | None = None
    per_leg: int = 1
    later_gain: float = 1.0


@dataclass(frozen=True)
class Grid:
    """Noise levels of a trajectory, shape (N+1,), and the first step that may carry gradient."""

    sigmas: tuple[float, ...]
    first: int = 0

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.sigmas) - 1

    @property
    def window(self) -> tuple[int, ...]:
        """Steps that may carry gradient: first ... N-1."""
        return tuple(range(self.first, self.num_steps))

    def width(self, start: int, stop: int | None = None) -> float:
        """sigma_stop - sigma_start (negative), of the one step from `start` by default."""
        return self.sigmas[start + 1 if stop is None else stop] - self.sigmas[start]


@dataclass(frozen=True)
class Leg:
    """Connector  x_hat_stop = x_start + sum of w_q v_q  over cached velocities; `nodes` are the pairs (q, w_q)."""

    start: int
    stop: int
    nodes: tuple[tuple[int, float], ...]


def _require(count: int, available: int, what: str) -> None:
    if count > available:
        raise UserError(
            f"{what} asks for {count} of {available} steps; lower {what}, or use more sampling steps"
            " (or a larger method.tail)"
        )


# Reward input ---------------------------------------------------------------------------------------------------------


class Sample(Config):
    """The sampled picture x_N itself."""

    kind: Literal["sample"] = "sample"


class SampleRenoised(Config):
    """The sample, and `copies` one-step restorations of it:

        x'_m = (1 - sigma) x_N + sigma eps_m,   y_m = x'_m - sigma v(x'_m, sigma),   sigma = sigma_{N-1}

    The loss is the mean over all 1 + copies; each restoration costs one gradient evaluation at step N-1.
    Source: DRaFT-LV, arXiv 2309.17400; facts 3.2.
    """

    kind: Literal["sample_renoised"] = "sample_renoised"
    copies: Count = 2
    """Renoised copies per sample, >= 1."""


class PosteriorMean(Config):
    """The one-step estimate  x_i - sigma_i v_i  at the step where the active set stops the rollout.

    That is the end of an Euler rollout on the grid sigma_0 ... sigma_i, 0, and all weights refer to that grid.
    """

    kind: Literal["posterior_mean"] = "posterior_mean"


RewardInput = Annotated[Sample | SampleRenoised | PosteriorMean, Field(discriminator="kind")]


# Samplers of two steps k < j ------------------------------------------------------------------------------------------
# Papers count them from the clean end: r_j = N - j, r_k = N - k, 1 <= r_j < r_k <= n, n the length of the window.


class Uniform(Config):
    """Two distinct steps of the window, uniformly; with `cap`, r_j ~ U{1..cap} and then r_k ~ U{r_j+1..n}."""

    kind: Literal["uniform"] = "uniform"
    cap: Count | None = None
    """Largest distance of j from the clean end, in steps; none: no limit."""

    def draw(self, first: int, num_steps: int, rng: np.random.Generator) -> tuple[int, int]:
        """(k, j) with first <= k < j < num_steps."""
        length = num_steps - first
        if self.cap is None:
            k, j = sorted(rng.choice(length, size=2, replace=False).tolist())
            return first + k, first + j
        reverse_j = int(rng.integers(1, min(self.cap, length - 1), endpoint=True))
        reverse_k = int(rng.integers(reverse_j + 1, length, endpoint=True))
        return num_steps - reverse_k, num_steps - reverse_j

    def pmf(self, first: int, num_steps: int) -> dict[int, float] | None:
        """Probability of each j."""
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
        """(k, j) with first <= k < j < num_steps."""
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
        """None: rounded Dirichlet lengths have no closed form."""
        return None


class Midpoint(Config):
    """k uniform in the window (not its last step), j halfway between k and the clean end."""

    kind: Literal["midpoint"] = "midpoint"

    def draw(self, first: int, num_steps: int, rng: np.random.Generator) -> tuple[int, int]:
        """(k, j) with first <= k < j < num_steps."""
        k = int(rng.integers(first, num_steps - 1))
        return k, (k + num_steps) // 2

    def pmf(self, first: int, num_steps: int) -> dict[int, float] | None:
        """Probability of each j."""
        hits = Counter((k + num_steps) // 2 for k in range(first, num_steps - 1))
        return {j: count / hits.total() for j, count in hits.items()}


class MidpointJ(Config):
    """j uniform in the window (not its first step), k halfway between the start of the window and j."""

    kind: Literal["midpoint_j"] = "midpoint_j"

    def draw(self, first: int, num_steps: int, rng: np.random.Generator) -> tuple[int, int]:
        """(k, j) with first <= k < j < num_steps."""
        j = int(rng.integers(first + 1, num_steps))
        return (first + j) // 2, j

    def pmf(self, first: int, num_steps: int) -> dict[int, float] | None:
        """Probability of each j."""
        return dict.fromkeys(range(first + 1, num_steps), 1 / (num_steps - 1 - first))


PairSampler = Annotated[Uniform | Dirichlet | Midpoint | MidpointJ, Field(discriminator="kind")]


# Active sets ----------------------------------------------------------------------------------------------------------


class OneOfTail(Config):
    """One step, uniform over the last `num_steps`; a posterior mean is taken there (ReFL)."""

    kind: Literal["one_of_tail"] = "one_of_tail"
    num_steps: Count = 11
    """Number of last steps to draw from, >= 1."""

    @property
    def min_window(self) -> int:
        """Fewest steps the tail window may hold."""
        return 1

    def draw(self, grid: Grid, rng: np.random.Generator) -> Draw:
        """One step of the last `num_steps`."""
        _require(self.num_steps, len(grid.window), "method.active.num_steps")
        steps = grid.window[-self.num_steps :]
        pool = Pool(steps, (1.0,) * len(steps), 1)
        active = pool.draw(rng)
        return Draw(active, (pool,), stop=active[0])


class LastSteps(Config):
    """The last `num_steps` steps (DRaFT-K)."""

    kind: Literal["last_steps"] = "last_steps"
    num_steps: Count = 1
    """Number of active steps K, >= 1."""

    @property
    def min_window(self) -> int:
        """Fewest steps the tail window may hold."""
        return 1

    def draw(self, grid: Grid, rng: np.random.Generator) -> Draw:
        """Always the same steps."""
        _require(self.num_steps, len(grid.window), "method.active.num_steps")
        return Draw(grid.window[-self.num_steps :])


class SpacedPrefix(Config):
    """`num_steps` equally spaced steps, random phase, of a rollout stopped early at a random step e (DRTune).

    e = N - U{1..m},  m = round(early_stop N);  stride = floor(P / K) on the P steps up to e.
    """

    kind: Literal["spaced_prefix"] = "spaced_prefix"
    num_steps: Count = 3
    """Number of active steps K, >= 1; fewer where the prefix is shorter."""
    early_stop: Share = 0.4
    """Share of the steps, from the clean end, among which the stop is drawn; 0: always the last step."""

    @property
    def min_window(self) -> int:
        """Fewest steps the tail window may hold."""
        return 1

    def draw(self, grid: Grid, rng: np.random.Generator) -> Draw:
        """The stop first, then the phase."""
        _require(self.num_steps, len(grid.window), "method.active.num_steps")
        latest = min(round(self.early_stop * grid.num_steps), len(grid.window))
        stop = grid.num_steps - (int(rng.integers(1, latest, endpoint=True)) if latest else 1)
        length = stop + 1 - grid.first
        count = min(self.num_steps, length)
        stride = length // count
        phases = length - (count - 1) * stride
        start = grid.first + (int(rng.integers(phases)) if count < length else 0)
        return Draw(tuple(start + q * stride for q in range(count)), stop=stop)


class Pair(Config):
    """Two steps k < j; a bridge couples j (LeapAlign)."""

    kind: Literal["pair"] = "pair"
    sampler: PairSampler = Uniform()
    """How k and j are drawn."""

    @property
    def min_window(self) -> int:
        """Fewest steps the tail window may hold."""
        return 3

    def draw(self, grid: Grid, rng: np.random.Generator) -> Draw:
        """k and j."""
        _require(3, len(grid.window), "a pair of steps (k, j)")
        k, j = self.sampler.draw(grid.first, grid.num_steps, rng)
        return Draw((k, j), split=j)


class FirstSupports(Config):
    """Two legs [k, j) and [j, N); the first `num_supports` quadrature nodes of each are active (FlowBP-Lagrange)."""

    kind: Literal["first_supports"] = "first_supports"
    sampler: PairSampler = Dirichlet()
    """How k and j are drawn."""
    num_supports: Count = 2
    """Active nodes per leg, >= 1, its start first; 1 is the papers' mode "start", 2 "midpoint", the order "all"."""
    later_gain: Strength = 0.25
    """Factor on the gradient of active nodes other than the start of a leg, 0 to 100."""

    @property
    def min_window(self) -> int:
        """Fewest steps the tail window may hold."""
        return 3

    def draw(self, grid: Grid, rng: np.random.Generator) -> Draw:
        """k and j; the nodes follow from the weights."""
        _require(3, len(grid.window), "a pair of steps (k, j)")
        k, j = self.sampler.draw(grid.first, grid.num_steps, rng)
        return Draw((k, j), split=j, per_leg=self.num_supports, later_gain=self.later_gain)


class LateBiased(Config):
    """`num_steps` distinct steps, each draw proportional to (i + 1)^bias (FlowBP-Sparse, FlowBP-Bridge).

    Without `split`, i is the step itself.  With it a step j is drawn and always active; the budget is shared between
    [first, j) and [j, N) in proportion to their lengths, and i counts from the start of each part.
    """

    kind: Literal["late_biased"] = "late_biased"
    num_steps: Count = 4
    """Number of active steps K, >= 1; >= 2 with `split`."""
    bias: Annotated[float, Ge(0), Le(10)] = 2.0
    """Exponent, 0 (uniform) to 10; larger prefers clean steps."""
    split: PairSampler | None = None
    """Where a bridge splits the trajectory: j of this sampler (its k is dropped); none: no bridge."""

    @model_validator(mode="after")
    def _both_sides(self) -> "LateBiased":
        if self.split is not None and self.num_steps < 2:
            raise ValueError("a split shares the steps between two sides: use num_steps >= 2, or split null")
        return self

    @property
    def min_window(self) -> int:
        """Fewest steps the tail window may hold."""
        return 1 if self.split is None else 3

    def draw(self, grid: Grid, rng: np.random.Generator) -> Draw:
        """The split first, then the steps, noisy part first."""
        _require(self.num_steps, len(grid.window), "method.active.num_steps")
        if self.split is None:
            pools: tuple[Pool, ...] = (self._pool(grid.window, grid.first, self.num_steps),)
            return Draw(_drawn(pools, rng), pools)
        _require(3, len(grid.window), "method.active.split")
        _, j = self.split.draw(grid.first, grid.num_steps, rng)
        before, after = range(grid.first, j), range(j + 1, grid.num_steps)
        num_before, num_after = self._budget(grid, j)
        pools = (self._pool(before, 0, num_before), Pool((j,), (1.0,), 1), self._pool(after, 0, num_after))
        return Draw(_drawn(pools, rng), pools, self._coverage(grid), split=j)

    def _budget(self, grid: Grid, j: int) -> tuple[int, int]:
        """Steps to draw from [first, j) and from (j, N)."""
        num_before = share_budget(self.num_steps, j - grid.first, grid.num_steps - j)
        return num_before, self.num_steps - num_before - 1

    def _coverage(self, grid: Grid) -> dict[int, float]:
        """1 - P(i lies after a j that used up the budget of its side)."""
        chances = self.split.pmf(grid.first, grid.num_steps) if self.split else None
        if chances is None:
            return {}
        starved = {j: p for j, p in chances.items() if not self._budget(grid, j)[1]}
        return {i: 1.0 - sum(p for j, p in starved.items() if j < i) for i in grid.window}

    def _pool(self, steps: Sequence[int], offset: int, count: int) -> Pool:
        return Pool(tuple(steps), tuple(float(offset + i + 1) ** self.bias for i in range(len(steps))), count)


def share_budget(budget: int, before: int, after: int) -> int:
    """Active steps before the split: budget * before / (before + after), rounded half to even, both sides >= 1.

    Raises ValueError unless 2 <= budget <= before + after.  Source: facts 3.6.
    """
    if not 2 <= budget <= before + after:
        raise ValueError(f"cannot share {budget} active steps between parts of {before} and {after} steps")
    share = round(budget * before / (before + after))
    return min(max(share, 1, budget - after), before, budget - 1)


class Stratified(Config):
    """One step in each of `num_steps` consecutive parts of nearly equal sigma span, uniform in sigma within a part.

    Parts are runs of whole steps, none empty.  With `refill: inclusion` every drawn step stands for its whole part:
    a one-point Monte-Carlo quadrature per part.  Ours, not from a paper.
    """

    kind: Literal["stratified"] = "stratified"
    num_steps: Count = 4
    """Number of active steps K, >= 1."""

    @property
    def min_window(self) -> int:
        """Fewest steps the tail window may hold."""
        return 1

    def draw(self, grid: Grid, rng: np.random.Generator) -> Draw:
        """One step per part, noisy part first."""
        _require(self.num_steps, len(grid.window), "method.active.num_steps")
        bounds = self._bounds(grid)
        parts = [tuple(range(start, stop)) for start, stop in pairwise(bounds)]
        pools = tuple(Pool(part, tuple(-grid.width(i) for i in part), 1) for part in parts)
        return Draw(_drawn(pools, rng), pools)

    def _bounds(self, grid: Grid) -> list[int]:
        top, bottom = grid.sigmas[grid.first], grid.sigmas[-1]
        bounds = [grid.first]
        for part in range(1, self.num_steps):
            target = top + (bottom - top) * part / self.num_steps
            allowed = range(bounds[-1] + 1, grid.num_steps - (self.num_steps - part) + 1)
            bounds.append(min(allowed, key=lambda i: abs(grid.sigmas[i] - target)))
        return [*bounds, grid.num_steps]


class All(Config):
    """Every step (of the tail window)."""

    kind: Literal["all"] = "all"

    @property
    def min_window(self) -> int:
        """Fewest steps the tail window may hold."""
        return 1

    def draw(self, grid: Grid, rng: np.random.Generator) -> Draw:
        """Always the same steps."""
        return Draw(grid.window)


def _drawn(pools: Sequence[Pool], rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(step for pool in pools for step in pool.draw(rng))


Active = Annotated[
    OneOfTail | LastSteps | SpacedPrefix | Pair | LateBiased | Stratified | FirstSupports | All,
    Field(discriminator="kind"),
]


# Weights --------------------------------------------------------------------------------------------------------------


class Leap(Config):
    """Each active step leaps to the next one, the last to the clean end:  c_i = sigma_next - sigma_i."""

    kind: Literal["leap"] = "leap"

    def integrate(self, grid: Grid, draw: Draw) -> tuple[dict[int, float], tuple[Leg, ...]]:
        """Coefficients by step, and one leg per active step."""
        ends = [*draw.steps[1:], grid.num_steps]
        coefficients = {i: grid.width(i, end) for i, end in zip(draw.steps, ends, strict=True)}
        legs = [Leg(i, end, ((i, coefficients[i]),)) for i, end in zip(draw.steps, ends, strict=True)]
        return coefficients, tuple(legs)


class Euler(Config):
    """Each active step keeps its own Euler weight, made up for the inactive ones by `refill`:

    c_i = rho_i h_i,   rho_i = 1 + gamma (r_i - 1), at most rho_max
    mass:       r = (sum of |h| over the window) / (sum of |h| over the active steps)   the papers' rescale
    inclusion:  r_i = 1 / P(i is active)   the expected gradient is the sum over all steps
    """

    kind: Literal["euler"] = "euler"
    refill: Literal["none", "mass", "inclusion"] = "none"
    """How active steps make up for the inactive ones."""
    gamma: Strength = 1.0
    """Strength of the refill, 0 (none) to 100; 1 is the whole of it."""
    rho_max: RhoMax | None = None
    """Largest factor a refill may apply, >= 1; none: no limit."""

    def integrate(self, grid: Grid, draw: Draw) -> tuple[dict[int, float], tuple[Leg, ...]]:
        """Coefficients by step; no legs, the Euler sum is the trajectory itself."""
        ratio = self._ratio(grid, draw)
        rho = {i: _refilled(ratio[i], self.gamma, self.rho_max) for i in draw.steps}
        return {i: rho[i] * grid.width(i) for i in draw.steps}, ()

    def _ratio(self, grid: Grid, draw: Draw) -> dict[int, float]:
        if self.refill == "none":
            return dict.fromkeys(draw.steps, 1.0)
        if self.refill == "mass":
            total = grid.width(grid.first, grid.num_steps)
            return dict.fromkeys(draw.steps, total / sum(grid.width(i) for i in draw.steps))
        inclusion = {i: p for pool in draw.pools for i, p in pool.inclusion().items()}
        return {i: 1 / (inclusion[i] * draw.coverage.get(i, 1.0)) for i in draw.steps}


class Lagrange(Config):
    """Each leg integrates the polynomial through `order` of its velocities; its first nodes are active.

        w_q = integral of l_q over the leg,   c_q = rho w_q s_q,   s_q = 1 at the start, later_gain elsewhere
        rho = 1 + gamma (sum of |w| / sum of |w| over active nodes - 1), at most rho_max   with refill `mass`

    `anchor` blends every leg but the last with the plain leap.  Nodes never include the end of a leg, so uneven grids
    extrapolate and some weights may be positive.  Exact for velocities of degree < order in sigma.
    """

    kind: Literal["lagrange"] = "lagrange"
    order: Annotated[int, Ge(1), Le(MAX_ORDER)] = 3
    """Velocities per leg, 1 (a leap) to 12; fewer where the leg is shorter.

    On uneven grids high orders extrapolate wildly: on FLUX.2's of 25 steps the sum of |w| over a leg reaches 2.7 times
    its width at order 3, 7 times at 4 and 340 times at 6.
    """
    refill: Literal["none", "mass"] = "none"
    """Whether active nodes make up for the inactive ones of their leg (they are never drawn: no `inclusion`)."""
    gamma: Strength = 1.0
    """Strength of the refill, 0 (none) to 100; 1 is the whole of it."""
    rho_max: RhoMax | None = None
    """Largest factor a refill may apply, >= 1; none: no limit."""
    anchor: Share = 1.0
    """Weight lambda of the quadrature against the leap, 0 (leap) to 1 (quadrature), on all legs but the last."""

    def integrate(self, grid: Grid, draw: Draw) -> tuple[dict[int, float], tuple[Leg, ...]]:
        """Coefficients by step, and one leg per start."""
        coefficients: dict[int, float] = {}
        legs = []
        for start, stop in zip(draw.steps, [*draw.steps[1:], grid.num_steps], strict=True):
            blend = 1.0 if stop == grid.num_steps else self.anchor
            nodes = supports(start, stop, self.order)
            w = lagrange_weights([grid.sigmas[q] for q in nodes], grid.sigmas[start], grid.sigmas[stop])
            leap = np.zeros_like(w)
            leap[0] = (1 - blend) * grid.width(start, stop)
            legs.append(Leg(start, stop, tuple(zip(nodes, (blend * w + leap).tolist(), strict=True))))
            gain = np.where(np.arange(w.size) == 0, 1.0, draw.later_gain)
            c = self._rho(w, draw.per_leg) * blend * w * gain + leap
            coefficients |= dict(zip(nodes[: draw.per_leg], c.tolist(), strict=False))
        return coefficients, tuple(legs)

    def _rho(self, w: np.ndarray, num_active: int) -> float:
        active = float(np.abs(w[:num_active]).sum())
        if self.refill == "none" or active <= 1e-8:
            return 1.0
        return _refilled(float(np.abs(w).sum()) / active, self.gamma, self.rho_max)


def _refilled(ratio: float, gamma: float, rho_max: float | None) -> float:
    rho = 1 + gamma * (ratio - 1)
    return rho if rho_max is None else min(rho, rho_max)


def supports(start: int, stop: int, order: int) -> tuple[int, ...]:
    """Quadrature nodes of the leg [start, stop): all its steps, or `order` of them evenly spaced, `start` first.

    Source: facts 3.7.
    """
    count = stop - start
    if count <= order:
        return tuple(range(start, stop))
    if order == 1:
        return (start,)
    return tuple(dict.fromkeys(start + round(q * (count - 1) / (order - 1)) for q in range(order)))


Weights = Annotated[Leap | Euler | Lagrange, Field(discriminator="kind")]


# Coupling -------------------------------------------------------------------------------------------------------------


class Bridge(Config):
    """The state at the split j carries gradient:  G <- G + alpha c_j J_j^T G  for the steps before j."""

    kind: Literal["bridge"] = "bridge"
    alpha: Share = 0.3
    """Share of the Jacobian that is kept, 0 (none) to 1."""

    def couple(self, steps: Iterable[int], split: int | None) -> dict[int, float]:
        """Coupling by step; `steps` are the active ones, `split` the step j."""
        return {i: self.alpha for i in steps if i == split}


class Every(Config):
    """The state at every active step carries gradient; alpha 1 on all steps is full backpropagation."""

    kind: Literal["every"] = "every"
    alpha: Share = 1.0
    """Share of each Jacobian that is kept, 0 (none) to 1."""

    def couple(self, steps: Iterable[int], split: int | None) -> dict[int, float]:
        """Coupling by step; `steps` are the active ones, `split` the step j."""
        return dict.fromkeys(steps, self.alpha)


Coupling = Annotated[Bridge | Every, Field(discriminator="kind")]
