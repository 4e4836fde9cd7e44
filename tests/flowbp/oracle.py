"""The papers' surrogates as they wrote them: one joint graph, one backward.  Independent of `flowbp.core.engine`.

From a plan it takes only which steps were drawn; every coefficient is computed here, from the method's settings and
the formulas of FlowBP (arXiv 2606.11075), LeapAlign (2604.15311), DRaFT (2309.17400), DRTune (2405.00760) and ReFL
(2304.05977).  Memory grows with the number of active steps: this is what the sweep replaces.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from flowbp.core.engine import Regulariser
from flowbp.core.plan import Plan
from flowbp.core.types import Loss, Velocity
from flowbp.methods import Method


@dataclass(frozen=True)
class Rollout:
    """The whole cached no-grad rollout: x_0 ... x_N, v_0 ... v_{N-1}, and a way to evaluate again."""

    velocity: Velocity
    sigmas: Tensor
    x: list[Tensor]
    v: list[Tensor]

    def h(self, start: int, stop: int | None = None) -> Tensor:
        return self.sigmas[start + 1 if stop is None else stop] - self.sigmas[start]

    def at(self, i: int, x: Tensor) -> Tensor:
        return self.velocity(x, self.sigmas[i].expand(len(x)))

    def again(self, i: int) -> Tensor:
        return self.at(i, self.x[i].detach())

    @property
    def num_steps(self) -> int:
        return len(self.v)


def roll(velocity: Velocity, x_0: Tensor, sigmas: Tensor) -> Rollout:
    run = Rollout(velocity, sigmas, [x_0], [])
    with torch.no_grad():
        for i in range(len(sigmas) - 1):
            run.v.append(run.at(i, run.x[i]))
            run.x.append(run.x[i] + run.h(i) * run.v[i])
    return run


def pin(surrogate: Tensor, value: Tensor) -> Tensor:
    return surrogate + (value - surrogate).detach()


def mix(x: Tensor, alpha: float) -> Tensor:
    return x.detach() + alpha * (x - x.detach())


def scale_gradient(v: Tensor, rho: float) -> Tensor:
    return v.detach() + rho * (v - v.detach())


@dataclass(frozen=True)
class Surrogate:
    """ys: what the reward sees, one entry per copy.  gaps: per leg, (b,)."""

    ys: list[Tensor]
    gaps: tuple[Tensor, ...] = ()


def refl(run: Rollout, method: Method, plan: Plan, noise: Tensor | None) -> Surrogate:
    i = plan.terms[0].step
    return Surrogate([run.x[i] - run.sigmas[i] * run.again(i)])


def draft_k(run: Rollout, method: Method, plan: Plan, noise: Tensor | None) -> Surrogate:
    first = run.num_steps - method.active.num_active_steps
    x = run.x[first]
    for i in range(first, run.num_steps):
        x = x + run.h(i) * run.at(i, x)
    return Surrogate([x])


def full(run: Rollout, method: Method, plan: Plan, noise: Tensor | None) -> Surrogate:
    x = run.x[0]
    for i in range(run.num_steps):
        x = x + run.h(i) * run.at(i, x)
    return Surrogate([x])


def draft_lv(run: Rollout, method: Method, plan: Plan, noise: Tensor | None) -> Surrogate:
    last = run.num_steps - 1
    sigma = run.sigmas[last]
    y = run.x[last] - sigma * run.again(last)
    ys = [y]
    for eps in noise:
        x = (1 - sigma) * y.detach() + sigma * eps
        ys.append(x - sigma * run.at(last, x))
    return Surrogate(ys)


def drtune(run: Rollout, method: Method, plan: Plan, noise: Tensor | None) -> Surrogate:
    active = {term.step for term in plan.terms}
    stop = plan.reward_step
    x = run.x[0]
    for i in range(stop + 1):
        v = run.again(i) if i in active else run.v[i]
        x = x + (run.h(i) if i < stop else -run.sigmas[stop]) * v
    return Surrogate([x])


def leapalign(run: Rollout, method: Method, plan: Plan, noise: Tensor | None) -> Surrogate:
    j, k = (term.step for term in plan.terms)
    reached = run.x[k] + run.h(k, j) * run.again(k)
    x_j = pin(reached, run.x[j])
    y = x_j - run.sigmas[j] * run.at(j, mix(x_j, method.coupling.alpha))
    return Surrogate([pin(y, run.x[-1])], (gap(reached, run.x[j]), gap(y, run.x[-1])))


def flowbp_sparse(run: Rollout, method: Method, plan: Plan, noise: Tensor | None) -> Surrogate:
    active = {term.step for term in plan.terms}
    rho = rescale(run, method, active, minimum=1)
    x = run.x[0]
    for i in range(run.num_steps):
        x = x + run.h(i) * (scale_gradient(run.again(i), rho) if i in active else run.v[i])
    return Surrogate([pin(x, run.x[-1])])


def flowbp_bridge(run: Rollout, method: Method, plan: Plan, noise: Tensor | None) -> Surrogate:
    active = {term.step for term in plan.terms}
    (j,) = (term.step for term in plan.terms if term.coupling)
    rho = rescale(run, method, active, minimum=3)
    x = run.x[0]
    for i in range(run.num_steps):
        if i == j:
            x = pin(x, run.x[j])
            v = scale_gradient(run.at(j, mix(x, method.coupling.alpha)), rho)
        else:
            v = scale_gradient(run.again(i), rho) if i in active else run.v[i]
        x = x + run.h(i) * v
    return Surrogate([pin(x, run.x[-1])])


def rescale(run: Rollout, method: Method, active: set[int], minimum: int) -> float:
    if method.quadrature.refill == "none":
        return 1.0
    num_window = max(minimum, math.ceil(run.num_steps * Fraction(str(method.tail))))
    total = sum(abs(float(run.h(i))) for i in range(run.num_steps - num_window, run.num_steps))
    rho = 1 + method.quadrature.gamma * (total / sum(abs(float(run.h(i))) for i in active) - 1)
    return rho if method.quadrature.rho_max is None else min(rho, method.quadrature.rho_max)


def flowbp_lagrange(run: Rollout, method: Method, plan: Plan, noise: Tensor | None) -> Surrogate:
    k, j, end = plan.legs[0].start, plan.legs[1].start, run.num_steps
    lam = method.quadrature.anchor
    v_k = run.again(k)
    lagrange = run.x[k] + leg_sum(run, method, k, j, v_k)
    reached = (1 - lam) * (run.x[k] + run.h(k, j) * v_k) + lam * lagrange
    x_j = pin(reached, run.x[j])
    v_j = run.at(j, mix(x_j, method.coupling.alpha))
    y = x_j + leg_sum(run, method, j, end, v_j)
    return Surrogate([pin(y, run.x[-1])], (gap(reached, run.x[j]), gap(y, run.x[-1])))


def leg_sum(run: Rollout, method: Method, start: int, stop: int, v_start: Tensor) -> Tensor:
    """Sum of w_q v_q over the nodes of a leg, with the gradient of the first `num_supports` scaled."""
    nodes = nodes_of(start, stop, method.quadrature.order)
    sigmas = [Fraction(float(s)) for s in run.sigmas]
    w = [exact_weight(q, nodes, sigmas, sigmas[start], sigmas[stop]) for q in nodes]
    active = nodes[: method.active.num_supports]
    rho = 1.0
    if method.quadrature.refill == "mass":
        rho = 1 + method.quadrature.gamma * (sum(map(abs, w)) / sum(map(abs, w[: len(active)])) - 1)
    total = torch.zeros_like(v_start)
    for q, w_q in zip(nodes, w, strict=True):
        if q == start:
            total = total + w_q * scale_gradient(v_start, rho)
        elif q in active:
            total = total + w_q * scale_gradient(run.again(q), rho * method.active.later_gain)
        else:
            total = total + w_q * run.v[q]
    return total


def nodes_of(start: int, stop: int, order: int) -> list[int]:
    count = stop - start
    if count <= order:
        return list(range(start, stop))
    if order == 1:
        return [start]
    return list(dict.fromkeys(start + p for p in torch.linspace(0, count - 1, order).round().int().tolist()))


def exact_weight(q: int, nodes: list[int], sigmas: list[Fraction], low: Fraction, high: Fraction) -> float:
    """Integral of a Lagrange basis polynomial in rational arithmetic, from its coefficients."""
    powers = [Fraction(1)]
    for other in nodes:
        if other != q:
            spread = sigmas[q] - sigmas[other]
            shifted, scaled = [Fraction(0), *powers], [*(-sigmas[other] * c for c in powers), Fraction(0)]
            powers = [(a + b) / spread for a, b in zip(shifted, scaled, strict=True)]
    return float(sum(c * (high ** (p + 1) - low ** (p + 1)) / (p + 1) for p, c in enumerate(powers)))


def gap(reached: Tensor, x: Tensor) -> Tensor:
    return (reached - x).detach().abs().flatten(1).mean(1)


def of_plan(run: Rollout, method: Method, plan: Plan, noise: Tensor | None) -> Surrogate:
    """The surrogate that the terms of a plan describe, for a method that has none of its own here."""
    if plan.copies or plan.gap_floor is not None:
        raise NotImplementedError(f"{method.name} renoises or weighs samples: write its surrogate as its paper does")
    total = torch.zeros_like(run.x[0])
    for term in reversed(plan.terms):
        x = run.x[term.step].detach() + term.coupling * (total - total.detach())
        total = total + term.weight * run.at(term.step, x)
    stop = plan.reward_step
    seen = run.x[-1] if stop == run.num_steps else run.x[stop] - run.sigmas[stop] * run.v[stop]
    return Surrogate([pin(total, seen)])


SURROGATES: dict[str, Callable[[Rollout, Method, Plan, Tensor | None], Surrogate]] = {
    function.__name__: function
    for function in (
        refl,
        draft_k,
        draft_lv,
        drtune,
        leapalign,
        flowbp_sparse,
        flowbp_bridge,
        flowbp_lagrange,
        full,
    )
}


def distance_to_base(run: Rollout, plan: Plan, base: Velocity, noise: Tensor | None) -> Tensor:
    """R of each sample, (b,), in one graph: a mean over active states, then over the sample and its renoised copies."""

    def distance(i: int, x: Tensor) -> Tensor:
        difference = run.at(i, x) - base(x, run.sigmas[i].expand(len(x))).detach()
        return difference.square().flatten(1).mean(1)

    last, sigma = run.num_steps - 1, run.sigmas[-2]
    found = [torch.stack([distance(term.step, run.x[term.step].detach()) for term in plan.terms]).mean(0)]
    found += [distance(last, (1 - sigma) * run.x[-1].detach() + sigma * noise[copy]) for copy in range(plan.copies)]
    return torch.stack(found).mean(0)


def backpropagate_jointly(
    method: Method,
    plan: Plan,
    run: Rollout,
    loss: Loss,
    noise: Tensor | None = None,
    scale: float = 1.0,
    regulariser: Regulariser | None = None,
) -> Surrogate:
    """Accumulates the gradient of  scale * mean of w loss, + weight R,  into `.grad`, through one graph."""
    surrogate = SURROGATES.get(method.name, of_plan)(run, method, plan, noise)
    weight = torch.ones(len(run.x[0]), dtype=torch.float64)
    if method.gap_floor is not None:
        weight = 1 / sum(d.clamp(min=method.gap_floor) for d in surrogate.gaps)
    losses = torch.stack([loss(y, slice(0, len(y))) for y in surrogate.ys])
    total = (weight * losses).mean()
    if regulariser is not None:
        total = total + regulariser.weight * distance_to_base(run, plan, regulariser.base, noise).mean()
    (scale * total).backward()
    return surrogate
