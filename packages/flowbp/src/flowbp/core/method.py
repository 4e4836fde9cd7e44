"""A method of direct reward backpropagation as a value on four axes, which is also its configuration."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from annotated_types import Gt, Le
from pydantic import model_validator

from flowbp.core.axes.active import (
    Active,
    Dirichlet,
    FirstSupports,
    LateBiased,
    OneOfTail,
    Pair,
    SpacedPrefix,
    Stratified,
)
from flowbp.core.axes.coupling import Bridge, Coupling
from flowbp.core.axes.quadrature import Euler, Lagrange, Quadrature
from flowbp.core.axes.reward_input import PosteriorMean, RewardInput, Sample
from imgen_common.config import Config


class Method(Config):
    """Which velocities receive which multiple of the reward gradient.

        G = dL/dx at what the reward saw;  for each active step i from the clean end:
            parameter gradient += (c_i G)^T dv_i/dtheta,   G <- G + alpha_i c_i J_i^T G

    Sample weight 1 / (sum over legs of max(d_leg, gap_floor)), d_leg = mean |x_hat - x| at the end of a leg, in units
    of x.  Raises ValueError, with the remedy, where the axes contradict each other.
    Source: FlowBP, arXiv 2606.11075 (the axes); LeapAlign, arXiv 2604.15311 (the sample weight).
    """

    renamed: ClassVar = {"weights": "quadrature"}

    name: str = "custom"
    """Label in tables and logs; to start from a named method use `preset`."""
    reward_input: RewardInput = Sample()
    """What the reward sees."""
    active: Active
    """Which steps are evaluated with gradient."""
    quadrature: Quadrature = Euler()
    """How much of the trajectory each active step stands for."""
    coupling: Coupling | None = None
    """Where the state itself carries gradient; null: nowhere."""
    gap_floor: Annotated[float, Gt(0), Le(1000)] | None = None
    """Floor tau under the gaps of a sample weight, in units of x, > 0; null: all samples weigh 1."""
    tail: Annotated[float, Gt(0), Le(1)] = 1.0
    """Share of the steps, from the clean end, that may carry gradient, in (0, 1]."""

    @model_validator(mode="before")
    @classmethod
    def _has_active(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "active" not in data:
            name = data.get("name", "NAME")
            raise ValueError(
                f"no active set; start from a named method with preset: {name} (`flowbp methods` lists them), or give "
                "`active`"
            )
        return data

    @property
    def draws_split(self) -> bool:
        """Whether a step j is drawn that a bridge can couple, with a step k before it."""
        if isinstance(self.active, LateBiased):
            return self.active.split is not None
        return isinstance(self.active, Pair | FirstSupports)

    @model_validator(mode="after")
    def _axes_agree(self) -> "Method":
        active, quadrature = self.active, self.quadrature
        posterior = isinstance(self.reward_input, PosteriorMean)
        includes = isinstance(quadrature, Euler) and quadrature.refill == "inclusion"
        contradictions = {
            "a bridge needs a step j to couple: use active.kind pair or first_supports, or give active.split"
            " (late_biased); coupling.kind every needs none": isinstance(self.coupling, Bridge)
            and not self.draws_split,
            "a posterior mean needs an active set that stops the rollout: use active.kind one_of_tail or spaced_prefix,"
            " or reward_input.kind sample": posterior and not isinstance(active, OneOfTail | SpacedPrefix),
            "first_supports are nodes of a quadrature: use quadrature.kind lagrange, or active.kind pair": isinstance(
                active, FirstSupports
            )
            and not isinstance(quadrature, Lagrange),
            "refill inclusion needs steps drawn from the whole window: use active.kind late_biased, stratified or"
            " one_of_tail, or refill mass": includes and not isinstance(active, LateBiased | Stratified | OneOfTail),
            "refill inclusion needs the probability of each split, which a Dirichlet sampler does not give: use"
            " active.split.kind uniform, midpoint or midpoint_j, or refill mass": includes
            and isinstance(active, LateBiased)
            and isinstance(active.split, Dirichlet),
            "gap_floor weighs samples by the gaps of legs, and Euler weights have no legs: use quadrature.kind leap or"
            " lagrange, or gap_floor null": self.gap_floor is not None and isinstance(quadrature, Euler),
            "gap_floor compares with the sampled image, but the reward sees a posterior mean: use"
            " reward_input.kind sample, or gap_floor null": self.gap_floor is not None and posterior,
        }
        if found := [remedy for remedy, wrong in contradictions.items() if wrong]:
            raise ValueError(found[0])
        return self
