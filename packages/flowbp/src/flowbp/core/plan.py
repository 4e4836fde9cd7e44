"""A plan: one realization of a method on a grid of noise levels, as integers and floats that check themselves.

G = dL/dx at what the reward saw
for each term (i, c, alpha), i descending:      parameter gradient += (c G)^T dv_i/dtheta
                                                G <- G + alpha c J_i^T G
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from flowbp.core.axes.grid import Grid, Leg, StoppedSteps
from flowbp.core.axes.reward_input import PosteriorMean, SampleRenoised
from flowbp.core.method import Method
from flowbp.core.numerics import tail_start
from imgen_common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Term:
    """Step `step` receives `weight` (sigma units, signed) times G and passes on `coupling` of its Jacobian."""

    step: int
    weight: float
    coupling: float = 0.0


@dataclass(frozen=True)
class RolloutSpec:
    """What a rollout must keep: states x_i and velocities v_i of these steps, and where it ends.

    stop: N for the sample x_N; i < N for the posterior mean  x_i - sigma_i v_i,  with no step after i.
    graphs: terms at whose steps the velocity is evaluated with gradient and its graph kept.
    """

    states: frozenset[int]
    velocities: frozenset[int]
    stop: int
    graphs: tuple[Term, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything about one update that is decided before any tensor exists; equal on every rank.

    sigmas: noise levels, N+1 of them, descending to 0.  terms: by step, descending.  legs: connectors from the noisy
    to the clean end, contiguous, the last one ending at N; they give the gaps and the sample weights.
    reward_step: N where the reward sees the sample, i where it sees the posterior mean at step i.
    copies: renoised copies the reward also sees.  gap_floor: see `Method`.
    Raises ValueError on construction if any of it contradicts itself.
    """

    sigmas: tuple[float, ...]
    terms: tuple[Term, ...]
    reward_step: int
    legs: tuple[Leg, ...] = ()
    copies: int = 0
    gap_floor: float | None = None
    name: str = "custom"

    def __post_init__(self) -> None:
        check_sigmas(self.sigmas)
        self._check_reward()
        self._check_terms()
        self._check_legs()

    @property
    def num_inference_steps(self) -> int:
        """N."""
        return len(self.sigmas) - 1

    @property
    def rollout_spec(self) -> RolloutSpec:
        """What the rollout must keep."""
        ends = {end for leg in self.legs for end in (leg.start, leg.stop) if end < self.num_inference_steps}
        nodes = {q for leg in self.legs for q, _ in leg.nodes}
        return RolloutSpec(frozenset(ends | {term.step for term in self.terms}), frozenset(nodes), self.reward_step)

    def keep_graphs(self, count: int) -> RolloutSpec:
        """`rollout_spec` with the graphs of up to `count` active steps, the cleanest: they are swept first, so that
        they are gone when others are evaluated again."""
        return replace(self.rollout_spec, graphs=self.terms[:count])

    @property
    def num_gradient_forwards(self) -> int:
        """Network evaluations with gradient, per sample."""
        return len(self.terms) + self.copies

    @property
    def num_plain_forwards(self) -> int:
        """Network evaluations without gradient, per sample."""
        return min(self.reward_step + 1, self.num_inference_steps) + self.copies

    def table(self) -> list[dict[str, float | int]]:
        """One row per term, from the clean end: step, sigma, weight, the weight in Euler steps, coupling."""
        return [
            {
                "step": term.step,
                "sigma": self.sigmas[term.step],
                "weight": term.weight,
                "euler_steps": term.weight / (self.sigmas[term.step + 1] - self.sigmas[term.step]),
                "coupling": term.coupling,
            }
            for term in self.terms
        ]

    def _check_reward(self) -> None:
        if not 0 <= self.reward_step <= self.num_inference_steps:
            raise ValueError(f"reward_step {self.reward_step} is not in 0..{self.num_inference_steps}")
        if self.reward_step < self.num_inference_steps and (self.copies or self.legs):
            raise ValueError("a posterior mean has neither renoised copies nor legs")
        if self.copies < 0:
            raise ValueError(f"copies must be >= 0, got {self.copies}")
        if self.gap_floor is not None and not (self.legs and 0 < self.gap_floor < math.inf):
            raise ValueError(f"gap_floor must be positive and needs legs, got {self.gap_floor} with {len(self.legs)}")

    def _check_terms(self) -> None:
        steps = [term.step for term in self.terms]
        if not steps:
            raise ValueError("a plan needs at least one term")
        last = min(self.reward_step, self.num_inference_steps - 1)
        if any(a <= b for a, b in pairwise(steps)) or steps[-1] < 0 or steps[0] > last:
            raise ValueError(f"terms must descend within 0..{last}, got {steps}")
        for term in self.terms:
            if not (math.isfinite(term.weight) and term.weight != 0 and 0 <= term.coupling <= 1):
                raise ValueError(f"a weight must be finite and not 0, a coupling in [0, 1]: {term}")
        if self.terms[-1].coupling:
            raise ValueError("the noisiest term cannot be coupled: nothing comes before it")

    def _check_legs(self) -> None:
        ends = [end for leg in self.legs for end in (leg.start, leg.stop)]
        if ends and (ends[0] < 0 or ends[-1] != self.num_inference_steps or ends[1:-1:2] != ends[2::2]):
            raise ValueError(f"legs must follow each other up to step {self.num_inference_steps}, got {self.legs}")
        for leg in self.legs:
            if leg.start >= leg.stop or not all(leg.start <= q < leg.stop for q, _ in leg.nodes):
                raise ValueError(f"a leg must advance and hold its nodes: {leg}")
            width = self.sigmas[leg.stop] - self.sigmas[leg.start]
            size = sum(abs(w) for _, w in leg.nodes)
            if not abs(sum(w for _, w in leg.nodes) - width) <= 1e-12 + 1e-9 * size:
                raise ValueError(f"the weights of a leg must add up to sigma_stop - sigma_start = {width}: {leg}")


def check_sigmas(sigmas: Sequence[float]) -> None:
    """Raises ValueError unless `sigmas` descend strictly, within [0, 1], to exactly 0."""
    if len(sigmas) < 2:
        raise ValueError(f"a trajectory needs at least one step, that is two noise levels; got {len(sigmas)}")
    if not all(a > b for a, b in pairwise(sigmas)) or sigmas[0] > 1 or sigmas[-1] != 0:
        raise ValueError(f"noise levels must descend strictly from at most 1 to 0, got {list(sigmas)}")


def draw_plan(method: Method, sigmas: "Sequence[float] | Tensor", rng: np.random.Generator) -> Plan:
    """Draw one plan of `method` on the grid `sigmas`, shape (N+1,), descending to 0.

    Pure: equal methods, grids and generator states give equal plans, on every rank and device.
    Raises UserError if the method asks for more steps than there are, ValueError if `sigmas` is no grid.
    """
    levels = tuple(float(sigma) for sigma in sigmas)
    check_sigmas(levels)
    num_steps = len(levels) - 1
    reward_step, grid = num_steps, Grid(levels, tail_start(num_steps, method.tail, 3 if method.draws_split else 1))
    active = method.active.draw(grid, rng)
    if isinstance(method.reward_input, PosteriorMean) and isinstance(active, StoppedSteps):
        # the grid of a posterior mean ends at its step with one leap to 0
        reward_step, grid = active.stop, Grid((*levels[: active.stop + 1], 0.0), grid.first)
    coefficients, legs = method.quadrature.integrate(grid, active)
    steps = sorted((i for i, c in coefficients.items() if c != 0), reverse=True)
    if not steps:
        raise UserError(f"method {method.name!r} gives every step the weight 0; nothing would be trained")
    coupling = method.coupling.couple(steps[:-1], active) if method.coupling else {}
    return Plan(
        sigmas=levels,
        terms=tuple(Term(i, coefficients[i], coupling.get(i, 0.0)) for i in steps),
        reward_step=reward_step,
        legs=legs if reward_step == num_steps else (),
        copies=method.reward_input.copies if isinstance(method.reward_input, SampleRenoised) else 0,
        gap_floor=method.gap_floor,
        name=method.name,
    )
