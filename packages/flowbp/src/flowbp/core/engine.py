"""Executes plans: a no-grad rollout, then one discrete-adjoint sweep, the only place where autograd meets the network.

Every network evaluation has its own graph, freed before the next, so peak memory does not depend on the plan.
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
class BackwardOptions:
    """How `backpropagate` weighs and cuts up its work.

    scale: factor of the loss, for example 1 / accumulation steps, times `Guidance.backward_scale`.  combine: makes one
    gradient of several rewards', their sum by default.  reward_batch_size: samples per decode-and-reward graph, None:
    all.  steps_per_forward: uncoupled terms that share one forward.
    """

    scale: float = 1.0
    combine: Combine = lambda gradients: gradients.sum(0)
    reward_batch_size: int | None = None
    steps_per_forward: int = 1


DEFAULT_OPTIONS = BackwardOptions()


@dataclass(frozen=True)
class Outcome:
    """What `backpropagate` saw and did, all detached.

    losses: per sample, reward and copy, unweighted, (1 + copies, rewards, b).  scores: what the loss returned beside
    them, of the sample.  values: what the rewards saw, (1 + copies, b, ...).  agreement: of the rewards' gradients at
    the sample, where there are several.  gaps: mean |x_hat - x| per leg and sample in units of x, (legs, b); weights:
    sample weights, (b,); both float64.
    """

    losses: Float[Tensor, "copies rewards b"]
    scores: Mapping[str, Float[Tensor, " b"]]
    values: Float[Tensor, "copies b ..."]
    agreement: Agreement | None
    gaps: Float[Tensor, "legs b"]
    weights: Float[Tensor, " b"]


@torch.no_grad()
def rollout(velocity: Velocity, x_0: Tensor, sigmas: Tensor, spec: RolloutSpec, *, offload: bool = False) -> Trajectory:
    """Euler without gradient from noise x_0 of shape (b, ...):  x_{i+1} = x_i + (sigma_{i+1} - sigma_i) v_i.

    The state is float32 between steps whatever the network computes in (float64 if x_0 is).  sigmas: (N+1,), float32
    or float64, on any device.  Only what `spec` names is kept, in the host's memory with `offload`.  An early stop at i
    ends with the posterior mean  x_i - sigma_i v_i.  Raises ValueError if `spec` does not fit the grid.
    """
    levels = sigmas.tolist()
    num_steps = len(levels) - 1
    last = min(spec.stop, num_steps - 1)
    if not 0 <= spec.stop <= num_steps or max(spec.states | spec.velocities, default=0) > last:
        raise ValueError(f"cannot keep {spec} of a rollout of {num_steps} steps")
    sigmas = sigmas.to(x_0.device, sigmas.dtype if sigmas.dtype == torch.float64 else torch.float32)
    x = x_0 if x_0.dtype == torch.float64 else x_0.float()
    states, velocities = {}, {}
    for i in range(last + 1):
        v = velocity(x, sigmas[i].expand(len(x)))
        if i in spec.states:
            states[i] = _offload_to_host(x) if offload else x
        if i in spec.velocities:
            velocities[i] = _offload_to_host(v) if offload else v
        target = 0.0 if i == spec.stop else levels[i + 1]
        x = x + (target - levels[i]) * v.to(x.dtype)
    return Trajectory(sigmas, states, velocities, x)


def sweep(plan: Plan, trajectory: Trajectory, velocity: Velocity, cotangent: Tensor, steps_per_forward: int = 1) -> int:
    """Accumulate the plan's parameter gradient into `.grad`, given G = dL/dx at what the reward saw.

        for each term (i, c, alpha), i descending:   theta.grad += (c G)^T dv_i/dtheta;   G <- G + alpha c J_i^T G

    cotangent: shape of the state.  steps_per_forward: up to so many neighboring uncoupled terms share one forward
    (memory for speed; the sum is the same).  Frozen parameters stay untouched; the state carries gradient only at
    coupled terms.  Returns the number of forward passes.
    Raises ValueError if `steps_per_forward` < 1, the trajectory lacks a state, or the velocity depends on nothing
    trainable.
    Source: FlowBP, arXiv 2606.11075; the sweep is the adjoint of its surrogate losses.
    """
    if missing := [term.step for term in plan.terms if term.step not in trajectory.states]:
        raise ValueError(f"the trajectory kept no state at steps {missing}; roll out with plan.rollout_spec")
    num_forward_passes = 0
    for group in _groups(plan.terms, steps_per_forward):
        num_forward_passes += 1
        x = torch.cat([_on_device_of(cotangent, trajectory.states[term.step]) for term in group]).detach()
        coupling = group[0].coupling
        x.requires_grad_(coupling > 0)
        sigma = torch.cat([trajectory.sigmas[term.step].expand(len(cotangent)) for term in group])
        with torch.enable_grad():
            v = velocity(x, sigma)
        if not v.requires_grad:
            raise ValueError("the velocity carries no gradient: no parameter requires one, or it runs under no_grad")
        torch.autograd.backward(v, torch.cat([term.weight * cotangent for term in group]).to(v.dtype))
        if coupling and x.grad is not None:
            cotangent = cotangent + coupling * x.grad
    return num_forward_passes


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


def num_backward_passes(plan: Plan, steps_per_forward: int = 1) -> int:
    """Backward passes through the network that `backpropagate` makes for a plan."""
    return sum(1 for _ in _groups(plan.terms, steps_per_forward)) + plan.copies


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

        L = scale * mean over samples b and the 1 + copies of  w_b loss_b

    noise: eps of the renoised copies, (copies, b, ...) or a function of the copy.  Gradients add to `.grad`, scaled.
    Raises ValueError if copies are planned without noise, or if losses are not one per sample.
    """
    gaps = leg_gaps(plan, trajectory)
    weights = sample_weights(plan, gaps)
    share = weights * (options.scale / (1 + plan.copies) / len(weights))
    reward = _reward_stage(loss, trajectory.x_end, share, options)
    sweep(plan, trajectory, velocity, reward.cotangent, options.steps_per_forward)
    losses, values = [reward.losses], [trajectory.x_end]
    # y = x' - sigma v(x') depends on the parameters through one velocity: a sweep of one term of weight -sigma
    last = Term(plan.num_inference_steps - 1, -plan.sigmas[-2])
    of_copies = Plan(plan.sigmas, (last,), plan.num_inference_steps)
    for copy in range(plan.copies):
        x, y = _renoise(trajectory, velocity, noise, copy)
        copied = _reward_stage(loss, y, share, options)
        sweep(of_copies, Trajectory(trajectory.sigmas, {last.step: x}, {}, y), velocity, copied.cotangent)
        losses.append(copied.losses)
        values.append(y)
    return Outcome(
        losses=torch.stack(losses),
        scores=reward.scores,
        values=torch.stack(values),
        agreement=reward.agreement,
        gaps=gaps,
        weights=weights,
    )


@dataclass(frozen=True)
class _RewardGradient:
    """losses (rewards, b), and G = d(sum of share_b loss_b)/dx, (b, ...)."""

    losses: Tensor
    scores: dict[str, Tensor]
    cotangent: Tensor
    agreement: Agreement | None


def _reward_stage(loss: Loss, x: Tensor, share: Tensor, options: BackwardOptions) -> _RewardGradient:
    """One graph per `reward_batch_size` samples, freed at once; one backward pass through it per reward."""
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
            totals = per_sample.sum(1)
        # samples do not mix in a reward, so the gradient of the sum holds the gradient of every sample's own loss
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
        cotangent=scale * options.combine(by_reward),
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
