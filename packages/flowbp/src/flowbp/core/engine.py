"""Executes plans: a no-grad rollout, then one discrete-adjoint sweep, the only place where autograd meets the network.

Every network evaluation has its own graph, freed before the next, so peak memory does not depend on the plan; unless
graphs of the rollout are kept, which saves their second evaluation.
Knows callables only: no backbone, no reward, no shape of latents.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flowbp.core.multi_reward import Agreement, gradient_agreement
from flowbp.core.plan import Plan, RolloutSpec, Term
from flowbp.core.types import Loss, Noise, ScoredLosses, Trajectory, Velocity

Combine = Callable[[Tensor], Tensor]
"""combine(gradients (rewards, b, ...)) -> one gradient (b, ...), sample by sample, linear in their common scale."""


@dataclass(frozen=True)
class Regulariser:
    """An anchor to a base velocity:  the loss gets  + weight R,  up to the options' scale.

        R = mean over samples b, elements of x_i, active steps i and the 1 + copies of  (v_i - v_i^base)^2

    Up to a factor at each noise level it is the KL divergence between the paths of two samplers with noise.  base: the
    base velocity at a state, of the same guidance and conditioning as the trained one, so that both are what a sampler
    uses.  The states are constants of R, at coupled steps too: a state's gradient through v_i alone, without that
    through v_i^base, would be of first order in their difference, where the gradient of both is of second.

        theta.grad += (c_i G + r_i)^T dv_i/dtheta,  r_i = weight dR/dv_i;   G as without it

    That is one more evaluation without gradient per active step, before its graph.  At a coupled step, whose backward
    pass gives J_i^T c_i G too, r_i has a forward and a backward pass of its own.
    """

    weight: float
    base: Velocity


@dataclass(frozen=True)
class BackwardOptions:
    """How `backpropagate` weighs and cuts up its work.

    scale: factor of the loss, for example 1 / accumulation steps, times `Guidance.backward_scale`.  reward_weights: of
    the rewards' losses in their sum, (rewards,); None: 1 each.  combine: makes one gradient of several rewards' in
    place of that sum, with a backward pass per reward through what they share; None: one pass.  reward_batch_size:
    samples per decode-and-reward graph, None: all.  steps_per_forward: uncoupled terms that share one forward.
    regulariser: None: no anchor to a base.  gradient_velocity: is evaluated in place of the velocity where only the
    gradient is used, which must be the same, whatever its values; None: the velocity itself.  `guided_velocity(...,
    gradient_only=True)` is one.
    """

    scale: float = 1.0
    reward_weights: Float[Tensor, " rewards"] | None = None
    combine: Combine | None = None
    reward_batch_size: int | None = None
    steps_per_forward: int = 1
    regulariser: Regulariser | None = None
    gradient_velocity: Velocity | None = None


DEFAULT_OPTIONS = BackwardOptions()


@dataclass(frozen=True)
class Outcome:
    """What `backpropagate` saw and did, all detached.

    losses: per sample, reward and copy, unweighted, (1 + copies, rewards, b).  scores: what the loss returned beside
    them, of the sample.  values: what the rewards saw, (1 + copies, b, ...).  agreement: of the rewards' gradients at
    the sample, where several are combined by `combine`.  gaps: mean |x_hat - x| per leg and sample in units of x,
    (legs, b); weights: sample weights, (b,); both float64.  regularise: R of each sample, (b,), without its weight;
    None without it.
    """

    losses: Float[Tensor, "copies rewards b"]
    scores: Mapping[str, Float[Tensor, " b"]]
    values: Float[Tensor, "copies b ..."]
    agreement: Agreement | None
    gaps: Float[Tensor, "legs b"]
    weights: Float[Tensor, " b"]
    regularise: Float[Tensor, " b"] | None = None


@torch.no_grad()
def rollout(velocity: Velocity, x_0: Tensor, sigmas: Tensor, spec: RolloutSpec, *, offload: bool = False) -> Trajectory:
    """Euler without gradient from noise x_0 of shape (b, ...):  x_{i+1} = x_i + (sigma_{i+1} - sigma_i) v_i.

    At the steps of `spec.graphs` the velocity has a graph, in its parameters and at a coupled term in the state; no
    graph leads from one step to the next.

    The state is float32 between steps whatever the network computes in (float64 if x_0 is).  sigmas: (N+1,), float32
    or float64, on any device.  Only what `spec` names is kept, in the host's memory with `offload`.  An early stop at i
    ends with the posterior mean  x_i - sigma_i v_i.  Raises ValueError if `spec` does not fit the grid, or if a
    velocity whose graph is wanted depends on nothing trainable.
    """
    levels = sigmas.tolist()
    num_steps = len(levels) - 1
    last = min(spec.stop, num_steps - 1)
    if not 0 <= spec.stop <= num_steps or max(spec.states | spec.velocities, default=0) > last:
        raise ValueError(f"cannot keep {spec} of a rollout of {num_steps} steps")
    sigmas = sigmas.to(x_0.device, sigmas.dtype if sigmas.dtype == torch.float64 else torch.float32)
    x = x_0 if x_0.dtype == torch.float64 else x_0.float()
    states, velocities, graphs = {}, {}, {}
    needs_state = {term.step: term.coupling > 0 for term in spec.graphs}
    for i in range(last + 1):
        sigma = sigmas[i].expand(len(x))
        if i in needs_state:
            leaf = x.detach().requires_grad_(needs_state[i])
            graphs[i] = leaf, _with_graph(velocity, leaf, sigma)
            v = graphs[i][1].detach()
        else:
            v = velocity(x, sigma)
        if i in spec.states:
            states[i] = _offload_to_host(x) if offload else x
        if i in spec.velocities:
            velocities[i] = _offload_to_host(v) if offload else v
        target = 0.0 if i == spec.stop else levels[i + 1]
        x = x + (target - levels[i]) * v.to(x.dtype)
    return Trajectory(sigmas, states, velocities, x, graphs)


def _with_graph(velocity: Velocity, x: Tensor, sigma: Tensor) -> Tensor:
    with torch.enable_grad():
        v = velocity(x, sigma)
    if not v.requires_grad:
        raise ValueError("the velocity carries no gradient: no parameter requires one, or it runs under no_grad")
    return v


class _Penalty:
    """The regulariser in the sweep of one plan: its cotangents, and R of each sample, (b,), as far as it was swept."""

    def __init__(self, regulariser: Regulariser, factor: float, num_states: int, like: Tensor) -> None:
        """factor: of `weight`, for this plan.  num_states: active states of the plan.  like: the states' shape."""
        self.base, self.num_states = regulariser.base, num_states
        self.scale = 2 * factor * regulariser.weight / (num_states * like.numel())
        self.values = like.new_zeros(len(like), dtype=torch.promote_types(like.dtype, torch.float32))

    def pull(self, v: Tensor, base: Tensor) -> Tensor:
        """r = d(factor weight R)/dv at velocities of one or more states of the samples, state-major."""
        difference = v.detach().to(self.values.dtype) - base.to(self.values.dtype)
        self.values += difference.square().flatten(1).mean(1).view(-1, len(self.values)).sum(0) / self.num_states
        return self.scale * difference


def sweep(
    plan: Plan,
    trajectory: Trajectory,
    velocity: Velocity,
    cotangent: Tensor,
    steps_per_forward: int = 1,
    penalty: _Penalty | None = None,
    gradient_velocity: Velocity | None = None,
) -> int:
    """Accumulate the plan's parameter gradient into `.grad`, given G = dL/dx at what the reward saw.

        for each term (i, c, alpha), i descending:   theta.grad += (c G)^T dv_i/dtheta;   G <- G + alpha c J_i^T G

    cotangent: shape of the state.  steps_per_forward: up to so many neighboring uncoupled terms share one forward
    (memory for speed; the sum is the same).  gradient_velocity: as in `BackwardOptions`.  Frozen parameters stay
    untouched; the state carries gradient only at coupled terms.  Steps whose graph the trajectory kept are not
    evaluated again; a trajectory with graphs can be swept once.  Returns the number of backward passes.
    Raises ValueError if `steps_per_forward` < 1, the trajectory lacks a state, the velocity depends on nothing
    trainable, or graphs were kept where several steps share a forward or a regulariser asks for other passes.
    Source: FlowBP, arXiv 2606.11075; the sweep is the adjoint of its surrogate losses.
    """
    _check_trajectory(plan, trajectory, alone=steps_per_forward == 1 and penalty is None)
    num_backward_passes = 0
    for group in _groups(_passes(plan, penalty is not None), steps_per_forward):
        num_backward_passes += 1
        if kept := trajectory.graphs.get(group[0].step):
            cotangent = _sweep_kept(group[0], *kept, cotangent)
            continue
        x = torch.cat([_on_device_of(cotangent, trajectory.states[term.step]) for term in group]).detach()
        coupling = group[0].coupling
        sigma = torch.cat([trajectory.sigmas[term.step].expand(len(cotangent)) for term in group])
        given = torch.cat([term.weight * cotangent for term in group])
        pulls = None if coupling else penalty
        # the cotangent of a penalty is made of the velocity's value; another one is given, and the value not looked at
        called = velocity if pulls is not None else gradient_velocity or velocity
        _backward(called, x.requires_grad_(coupling > 0), sigma, given, pulls)
        if coupling and x.grad is not None:
            cotangent = cotangent + coupling * x.grad
    return num_backward_passes


def _check_trajectory(plan: Plan, trajectory: Trajectory, *, alone: bool) -> None:
    """Raises ValueError where states are missing, or where graphs were kept of steps that are not swept alone."""
    if missing := [term.step for term in plan.terms if term.step not in trajectory.states]:
        raise ValueError(f"the trajectory kept no state at steps {missing}; roll out with plan.rollout_spec")
    if trajectory.graphs and not alone:
        raise ValueError("graphs of a rollout go with one step per forward and without a regulariser")


def _sweep_kept(term: Term, x: Tensor, v: Tensor, cotangent: Tensor) -> Tensor:
    """One term whose graph the rollout kept, freed here; returns G for the terms before it."""
    torch.autograd.backward(v, (term.weight * cotangent).to(v.dtype))
    return cotangent + term.coupling * x.grad if term.coupling and x.grad is not None else cotangent


def _backward(velocity: Velocity, x: Tensor, sigma: Tensor, cotangent: Tensor, penalty: _Penalty | None) -> None:
    """One graph of the network, freed at once; before it, without a graph, the base of a regulariser."""
    with torch.no_grad():
        base = None if penalty is None else penalty.base(x, sigma)
    v = _with_graph(velocity, x, sigma)
    if penalty is not None and base is not None:
        cotangent = cotangent + penalty.pull(v, base)
    torch.autograd.backward(v, cotangent.to(v.dtype))


def _passes(plan: Plan, regularised: bool) -> list[Term]:
    """The terms that are swept.  A regulariser adds one of weight 0, uncoupled, at the step of each coupled one."""
    return [
        one
        for term in plan.terms
        for one in ([term, Term(term.step, 0.0)] if regularised and term.coupling else [term])
    ]


def _groups(terms: Sequence[Term], steps_per_forward: int) -> Iterator[list[Term]]:
    """Runs of at most `steps_per_forward` uncoupled terms; a coupled term changes G and so stands alone."""
    if steps_per_forward < 1:
        raise ValueError(f"steps_per_forward must be >= 1, got {steps_per_forward}")
    group: list[Term] = []
    for term in terms:
        if group and (term.coupling or group[-1].coupling or len(group) == steps_per_forward):
            yield group
            group = []
        group.append(term)
    if group:
        yield group


def num_backward_passes(plan: Plan, steps_per_forward: int = 1, *, regularised: bool = False) -> int:
    """Backward passes through the network that `backpropagate` makes for a plan."""
    return sum(1 for _ in _groups(_passes(plan, regularised), steps_per_forward)) + plan.copies


def leg_gaps(plan: Plan, trajectory: Trajectory) -> Float[Tensor, "legs b"]:
    """d = mean over all but the batch of |x_start + sum of w_q v_q - x_stop|, per leg and sample, float64.

    Units of x.  Shape (0, b) for a plan without legs.  Source: LeapAlign, arXiv 2604.15311.
    """
    gaps, end = [], trajectory.x_end
    for leg in plan.legs:
        x = _on_device_of(end, trajectory.states[leg.start]).double()
        for q, w in leg.nodes:
            x = x + w * _on_device_of(end, trajectory.velocities[q]).double()
        stop = end if leg.stop == plan.num_inference_steps else trajectory.states[leg.stop]
        gaps.append((x - _on_device_of(end, stop).double()).abs().flatten(1).mean(1))
    return torch.stack(gaps) if gaps else end.new_zeros(0, len(end), dtype=torch.float64)


def sample_weights(plan: Plan, gaps: Float[Tensor, "legs b"]) -> Float[Tensor, " b"]:
    """w = 1 / (sum over legs of max(d, gap_floor)), float64; 1 without a gap floor."""
    if plan.gap_floor is None:
        return gaps.new_ones(gaps.shape[1])
    return 1 / gaps.clamp(min=plan.gap_floor).sum(0)


def backpropagate(
    plan: Plan,
    trajectory: Trajectory,
    velocity: Velocity,
    loss: Loss,
    *,
    noise: Noise | Tensor | None = None,
    options: BackwardOptions = DEFAULT_OPTIONS,
) -> Outcome:
    """One micro-batch of an update: reward stage, then sweep, for the sample and for each renoised copy in turn.

        L = scale * (mean over samples b and the 1 + copies of  w_b loss_b,  + weight R with a `Regulariser`)

    noise: eps of the renoised copies, (copies, b, ...) or a function of the copy.  Gradients add to `.grad`, scaled.
    Raises ValueError if copies are planned without noise, or if losses are not one per sample.
    """
    gaps = leg_gaps(plan, trajectory)
    weights = sample_weights(plan, gaps)
    share = weights * (options.scale / (1 + plan.copies) / len(weights))
    reward = _reward_stage(loss, trajectory.x_end, share, options)
    penalties = _penalties(plan, trajectory.x_end, options)
    pulled, steps = options.gradient_velocity, options.steps_per_forward
    sweep(plan, trajectory, velocity, reward.cotangent, steps, penalties[0], pulled)
    losses, values = [reward.losses], [trajectory.x_end]
    # y = x' - sigma v(x') depends on the parameters through one velocity: a sweep of one term of weight -sigma
    last = Term(plan.num_inference_steps - 1, -plan.sigmas[-2])
    of_copies = Plan(plan.sigmas, (last,), plan.num_inference_steps)
    for copy in range(plan.copies):
        x, y = _renoise(trajectory, velocity, noise, copy)
        copied = _reward_stage(loss, y, share, options)
        renoised = Trajectory(trajectory.sigmas, {last.step: x}, {}, y)
        sweep(of_copies, renoised, velocity, copied.cotangent, 1, penalties[1 + copy], pulled)
        losses.append(copied.losses)
        values.append(y)
    anchored = [penalty.values for penalty in penalties if penalty is not None]
    distance = torch.stack(anchored).mean(0) if anchored else None
    found = torch.stack(losses), reward.scores, torch.stack(values), reward.agreement
    return Outcome(*found, gaps=gaps, weights=weights, regularise=distance)


def _penalties(plan: Plan, like: Tensor, options: BackwardOptions) -> list[_Penalty | None]:
    """The regulariser in the sweep of the plan, and in that of each renoised copy, which has one active state."""
    share, states = options.scale / (1 + plan.copies), (len(plan.terms), *(1,) * plan.copies)
    given = options.regulariser
    return [None if given is None else _Penalty(given, share, number, like) for number in states]


@dataclass(frozen=True)
class _RewardGradient:
    """losses (rewards, b), and G = d(sum of share_b loss_b)/dx, (b, ...)."""

    losses: Tensor
    scores: dict[str, Tensor]
    cotangent: Tensor
    agreement: Agreement | None


def _reward_stage(loss: Loss, x: Tensor, share: Tensor, options: BackwardOptions) -> _RewardGradient:
    """One graph per `reward_batch_size` samples, freed at once."""
    size = len(x) if options.reward_batch_size is None else options.reward_batch_size
    if size < 1:
        raise ValueError(f"reward_batch_size must be >= 1, got {size}")
    losses, scores, gradients = [], [], []
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        leaf = x[rows].detach().requires_grad_()
        with torch.enable_grad():
            found = loss(leaf, rows)
            found = ScoredLosses(found, {}) if isinstance(found, Tensor) else found
            per_sample = found.losses if found.losses.dim() == 2 else found.losses[None]
            if per_sample.shape[1:] != leaf.shape[:1]:
                raise ValueError(f"loss must return one value per sample, {len(leaf)}; got {tuple(per_sample.shape)}")
            # samples do not mix in a reward, so the gradient of the sum holds the gradient of every sample's own loss
            totals = per_sample.sum(1)
            if options.combine is None:
                weights = torch.ones(len(totals)) if options.reward_weights is None else options.reward_weights
                totals = (weights.to(totals) @ totals)[None]
        last = len(totals) - 1
        parts = [torch.autograd.grad(total, leaf, retain_graph=i < last)[0] for i, total in enumerate(totals)]
        gradients.append(torch.stack(parts))
        losses.append(per_sample.detach())
        scores.append(found.scores)
    by_reward = torch.cat(gradients, dim=1)
    scale = share.to(by_reward.dtype).view(-1, *(1,) * (x.dim() - 1))
    return _RewardGradient(
        losses=torch.cat(losses, dim=1),
        scores={name: torch.cat([part[name] for part in scores]) for name in scores[0]},
        cotangent=scale * (by_reward[0] if options.combine is None else options.combine(by_reward)),
        agreement=gradient_agreement(by_reward) if len(by_reward) > 1 else None,
    )


@torch.no_grad()
def _renoise(
    trajectory: Trajectory, velocity: Velocity, noise: Noise | Tensor | None, copy: int
) -> tuple[Tensor, Tensor]:
    """x' = (1 - sigma) x_N + sigma eps at the last noise level, and its restoration x' - sigma v(x')."""
    if noise is None:
        raise ValueError("the plan renoises the sample: pass noise=")
    sigma, end = trajectory.sigmas[-2], trajectory.x_end
    eps = noise[copy] if isinstance(noise, Tensor) else noise(copy)
    if eps.shape != end.shape:
        raise ValueError(f"noise of a copy must have the shape {tuple(end.shape)}, got {tuple(eps.shape)}")
    x = (1 - sigma) * end + sigma * eps.to(end)
    v = velocity(x, sigma.expand(len(x)))
    return x, x - sigma * v.to(x.dtype)


def _offload_to_host(x: Tensor) -> Tensor:
    """A copy in the host's memory, pinned where `x` is on a GPU.  It is not waited for: read it on the same stream."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda).copy_(x, non_blocking=True)


def _on_device_of(like: Tensor, kept: Tensor) -> Tensor:
    """What a rollout kept, on the device of `like`."""
    return kept.to(like.device, non_blocking=True)
