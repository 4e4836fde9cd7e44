"""Third axis, the integration weights: how much of the trajectory each active step stands for."""

from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Le
from pydantic import Field

from flowbp.core.axes.grid import ActiveSteps, Grid, Leg, RhoMax, Share, Strength, SupportedLegs
from flowbp.core.numerics import MAX_ORDER, lagrange_weights
from imgen_common.config import Config


class Leap(Config):
    """Each active step leaps to the next one, the last to the clean end:  c_i = sigma_next - sigma_i."""

    kind: Literal["leap"] = "leap"

    def integrate(self, grid: Grid, active: ActiveSteps) -> tuple[dict[int, float], tuple[Leg, ...]]:
        """Coefficients by step, and one leg per active step."""
        ends = [*active.steps[1:], grid.num_inference_steps]
        coefficients = {i: grid.width(i, end) for i, end in zip(active.steps, ends, strict=True)}
        legs = [Leg(i, end, ((i, coefficients[i]),)) for i, end in zip(active.steps, ends, strict=True)]
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

    def integrate(self, grid: Grid, active: ActiveSteps) -> tuple[dict[int, float], tuple[Leg, ...]]:
        # no legs: the Euler sum is the trajectory itself
        ratio = dict.fromkeys(active.steps, 1.0)
        if self.refill == "mass":
            total = grid.width(grid.first, grid.num_inference_steps)
            ratio = dict.fromkeys(active.steps, total / sum(grid.width(i) for i in active.steps))
        elif self.refill == "inclusion":
            inclusion = active.inclusion()
            ratio = {i: 1 / inclusion[i] for i in active.steps}
        return {i: _refilled(ratio[i], self.gamma, self.rho_max) * grid.width(i) for i in active.steps}, ()


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

    def integrate(self, grid: Grid, active: ActiveSteps) -> tuple[dict[int, float], tuple[Leg, ...]]:
        num_supports, later_gain = 1, 1.0
        if isinstance(active, SupportedLegs):
            num_supports, later_gain = active.num_supports, active.later_gain
        coefficients: dict[int, float] = {}
        legs = []
        for start, stop in zip(active.steps, [*active.steps[1:], grid.num_inference_steps], strict=True):
            blend = 1.0 if stop == grid.num_inference_steps else self.anchor
            nodes = leg_nodes(start, stop, self.order)
            w = lagrange_weights([grid.sigmas[q] for q in nodes], grid.sigmas[start], grid.sigmas[stop])
            leap = np.zeros_like(w)
            leap[0] = (1 - blend) * grid.width(start, stop)
            legs.append(Leg(start, stop, tuple(zip(nodes, (blend * w + leap).tolist(), strict=True))))
            gain = np.where(np.arange(w.size) == 0, 1.0, later_gain)
            c = self._rho(w, num_supports) * blend * w * gain + leap
            coefficients |= dict(zip(nodes[:num_supports], c.tolist(), strict=False))
        return coefficients, tuple(legs)

    def _rho(self, w: np.ndarray, num_active: int) -> float:
        active = float(np.abs(w[:num_active]).sum())
        if self.refill == "none" or active <= 1e-8:
            return 1.0
        return _refilled(float(np.abs(w).sum()) / active, self.gamma, self.rho_max)


def _refilled(ratio: float, gamma: float, rho_max: float | None) -> float:
    rho = 1 + gamma * (ratio - 1)
    return rho if rho_max is None else min(rho, rho_max)


def leg_nodes(start: int, stop: int, order: int) -> tuple[int, ...]:
    """Quadrature nodes of the leg [start, stop): all its steps, or `order` of them evenly spaced, `start` first.

    Source: FlowBP-Lagrange, arXiv 2606.11075.
    """
    count = stop - start
    if count <= order:
        return tuple(range(start, stop))
    if order == 1:
        return (start,)
    return tuple(dict.fromkeys(start + round(q * (count - 1) / (order - 1)) for q in range(order)))


Quadrature = Annotated[Leap | Euler | Lagrange, Field(discriminator="kind")]
