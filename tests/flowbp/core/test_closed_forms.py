"""The sweep on linear fields, where every gradient is a product of matrices; rollouts; what the engine refuses."""

import numpy as np
import pytest
import torch
from fields import noise, random_sigmas, relative
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flowbp.core.axes.grid import Leg
from flowbp.core.engine import BackwardOptions, Regulariser, backpropagate, leg_gaps, rollout, sample_weights, sweep
from flowbp.core.plan import Plan, RolloutSpec, Term, draw_plan
from flowbp.core.types import Trajectory
from flowbp.methods import METHODS, get_method

DIM = 3


class Linear(nn.Module):
    """v = M x + (1 + sigma) b, M fixed, b trained: J = M, dv/db = 1 + sigma."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("m", noise(DIM, DIM, seed=5) / 2)
        self.b = nn.Parameter(noise(DIM, seed=6))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x @ self.m.T + (1 + sigma)[:, None] * self.b


def mean_square(x: Tensor, rows: slice) -> Tensor:
    return x.square().mean(1)


def by_matrices(drawn: Plan, field: Linear, cotangent: Tensor) -> Tensor:
    """Sum over terms of (1 + sigma_i) c_i G, with G <- (1 + alpha c M^T) G at coupled terms."""
    total = torch.zeros(DIM, dtype=torch.float64)
    for term in drawn.terms:
        total = total + (1 + drawn.sigmas[term.step]) * term.weight * cotangent.sum(0)
        cotangent = cotangent @ (torch.eye(DIM, dtype=torch.float64) + term.coupling * term.weight * field.m)
    return total


@given(st.sampled_from(sorted(METHODS)), st.integers(11, 20), st.integers(0, 2**32), st.integers(1, 4))
def test_every_method_is_a_product_of_matrices(name, num_steps, seed, chunk):
    field, rng = Linear(), np.random.default_rng(seed)
    sigmas = random_sigmas(num_steps, rng)
    drawn = draw_plan(get_method(name), sigmas, rng)
    trajectory = rollout(field, noise(2, DIM), sigmas, drawn.rollout_spec)
    cotangent = noise(2, DIM, seed=9)
    coupled: list[bool] = []

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        coupled.append(x.requires_grad)
        return field(x, sigma)

    num_passes = sweep(drawn, trajectory, velocity, cotangent, chunk)
    assert relative(field.b.grad, by_matrices(drawn, field, cotangent)) <= 1e-12
    assert num_passes == len(coupled) <= len(drawn.terms)
    assert sum(coupled) == sum(term.coupling > 0 for term in drawn.terms)


@given(st.sampled_from(sorted(METHODS)), st.integers(0, 2**32), st.integers(1, 4), st.floats(1e-3, 1e3))
def test_a_regulariser_of_a_linear_field_is_a_quadratic(name, seed, chunk, weight):
    """v - v_base = (1 + sigma) (b - b_base), whatever the state."""
    field, base, rng = Linear(), Linear(), np.random.default_rng(seed)
    apart = noise(DIM, seed=seed)
    base.b.data = field.b.data - apart
    sigmas = random_sigmas(12, rng)
    drawn = draw_plan(get_method(name), sigmas, rng)
    trajectory = rollout(field, noise(2, DIM), sigmas, drawn.rollout_spec)
    gradients = []
    for regulariser in (None, Regulariser(weight, base)):
        field.b.grad = None
        options = BackwardOptions(scale=0.5, steps_per_forward=chunk, regulariser=regulariser)
        eps = noise(max(1, drawn.copies), 2, DIM, seed=3)
        outcome = backpropagate(drawn, trajectory, field, mean_square, noise=eps, options=options)
        gradients.append(field.b.grad)
    squares = [np.mean([(1 + sigmas[term.step].item()) ** 2 for term in drawn.terms])]
    squares += [(1 + sigmas[-2].item()) ** 2] * drawn.copies
    added = weight * 0.5 * 2 / DIM * np.mean(squares) * apart
    torch.testing.assert_close(gradients[1], gradients[0] + added, rtol=1e-10, atol=1e-10 * weight)
    assert outcome.regularise.tolist() == pytest.approx([np.mean(squares) * apart.square().mean().item()] * 2)


def test_chunks_share_forwards():
    field, sigmas = Linear(), random_sigmas(9, np.random.default_rng(0))
    drawn = Plan(tuple(sigmas.tolist()), tuple(Term(i, -0.1, 0.5 * (i == 5)) for i in range(8, -1, -1)), 9)
    trajectory = rollout(field, noise(2, DIM), sigmas, drawn.rollout_spec)
    batches = {chunk: sweep(drawn, trajectory, field, noise(2, DIM), chunk) for chunk in (1, 2, 3, 9)}
    assert batches == {1: 9, 2: 2 + 1 + 3, 3: 1 + 1 + 2, 9: 1 + 1 + 1}


def test_constant_fields_have_no_gaps():
    field = Linear()
    field.m.zero_()
    sigmas = random_sigmas(12, np.random.default_rng(0))

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return field(x, torch.zeros_like(sigma))

    for name, floor in (("leapalign", 0.1), ("flowbp_lagrange", 0.2)):
        drawn = draw_plan(get_method(name), sigmas, np.random.default_rng(0))
        outcome = backpropagate(
            drawn, rollout(velocity, noise(2, DIM), sigmas, drawn.rollout_spec), velocity, mean_square
        )
        assert outcome.gaps.shape == (2, 2)
        assert outcome.gaps.max() < 1e-14
        assert outcome.weights.tolist() == pytest.approx([1 / (2 * floor)] * 2)


def test_gaps_are_mean_absolute_differences_per_sample():
    sigmas = (1.0, 0.5, 0.0)
    drawn = Plan(sigmas, (Term(0, -0.5),), 2, (Leg(0, 1, ((0, -0.5),)), Leg(1, 2, ((1, -0.5),))), gap_floor=0.75)
    states = {0: torch.tensor([[1.0, 1.0], [0.0, 0.0]]), 1: torch.tensor([[0.5, 0.5], [0.0, 0.0]])}
    velocities = {0: torch.zeros(2, 2), 1: torch.ones(2, 2)}
    trajectory = Trajectory(torch.tensor(sigmas), states, velocities, torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
    gaps = leg_gaps(drawn, trajectory)
    assert gaps.tolist() == [[0.5, 0.0], [2.0, 0.5]]
    assert sample_weights(drawn, gaps).tolist() == [1 / 2.75, 1 / 1.5]


def test_weights_and_scale_multiply_the_gradient_not_the_losses():
    field, sigmas = Linear(), random_sigmas(12, np.random.default_rng(0))
    drawn = draw_plan(get_method("leapalign"), sigmas, np.random.default_rng(0))
    trajectory = rollout(field, noise(2, DIM), sigmas, drawn.rollout_spec)
    one = backpropagate(drawn, trajectory, field, mean_square)
    whole = field.b.grad.clone()
    field.b.grad = None
    half = backpropagate(drawn, trajectory, field, mean_square, options=BackwardOptions(scale=0.5))
    torch.testing.assert_close(field.b.grad, whole / 2)
    assert torch.equal(one.losses, half.losses)
    field.b.grad = None
    cotangent = one.weights[:, None] * 2 * trajectory.x_end / DIM / 2
    torch.testing.assert_close(whole, by_matrices(drawn, field, cotangent))


def test_micro_batches_add_up():
    """Four times one sample, twice two and once four, by the scale."""
    field, sigmas = Linear(), random_sigmas(12, np.random.default_rng(0))
    x_0, grads = noise(4, DIM), []
    eps = noise(2, 4, DIM, seed=3)
    for name in METHODS:
        drawn = draw_plan(get_method(name), sigmas, np.random.default_rng(1))
        for size in (1, 2, 4):
            field.b.grad = None
            for rows in (slice(start, start + size) for start in range(0, 4, size)):
                trajectory = rollout(field, x_0[rows], sigmas, drawn.rollout_spec)
                backpropagate(
                    drawn, trajectory, field, mean_square, noise=eps[:, rows], options=BackwardOptions(scale=size / 4)
                )
            grads.append(field.b.grad)
        assert max(relative(grads[-1], grads[-2]), relative(grads[-1], grads[-3])) <= 1e-12


def test_renoised_copies_stay_at_the_last_noise_level():
    field, sigmas = Linear(), random_sigmas(6, np.random.default_rng(0))
    drawn = draw_plan(get_method("draft_lv"), sigmas, np.random.default_rng(0))
    trajectory = rollout(field, torch.zeros(1, DIM, dtype=torch.float64), sigmas, drawn.rollout_spec)
    seen: list[Tensor] = []

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(x.detach())
        assert sigma.tolist() == [float(sigmas[5])]
        return field(x, sigma)

    eps = noise(2, 1, DIM, seed=4)
    outcome = backpropagate(drawn, trajectory, velocity, mean_square, noise=lambda copy: eps[copy])
    assert len(seen) == drawn.num_gradient_forwards + drawn.copies == 3 + 2
    assert outcome.losses.shape == (3, 1, 1)
    assert outcome.values.shape == (3, 1, DIM)
    s = float(sigmas[5])
    torch.testing.assert_close(seen[1], (1 - s) * trajectory.x_end + s * eps[0])
    assert torch.equal(seen[1], seen[2])


def test_an_early_stop_ends_with_the_posterior_mean_and_keeps_no_more_than_asked():
    field, sigmas = Linear(), random_sigmas(6, np.random.default_rng(0))
    full = rollout(field, noise(2, DIM), sigmas, RolloutSpec(frozenset(range(6)), frozenset(range(6)), 6))
    calls = []

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(float(sigma[0]))
        return field(x, sigma)

    part = rollout(counted, noise(2, DIM), sigmas, RolloutSpec(frozenset({1}), frozenset(), 3))
    assert len(calls) == 4
    assert set(part.states) == {1}
    assert not part.velocities
    torch.testing.assert_close(part.x_end, full.states[3] - sigmas[3] * full.velocities[3])


def test_the_state_stays_float32_around_a_bfloat16_network():
    field, sigmas = Linear().bfloat16(), random_sigmas(12, np.random.default_rng(0)).float()

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        assert x.dtype == sigma.dtype == torch.float32
        return field(x.bfloat16(), sigma.bfloat16())

    drawn = draw_plan(get_method("flowbp_lagrange"), sigmas, np.random.default_rng(0))
    trajectory = rollout(velocity, noise(2, DIM).bfloat16(), sigmas, drawn.rollout_spec)
    assert trajectory.x_end.dtype == torch.float32
    assert all(x.dtype == torch.float32 for x in trajectory.states.values())
    outcome = backpropagate(drawn, trajectory, velocity, mean_square)
    assert outcome.losses.dtype == torch.float32
    assert field.b.grad.isfinite().all()


def test_a_trajectory_holds_no_graph():
    field, sigmas = Linear(), random_sigmas(6, np.random.default_rng(0))
    trajectory = rollout(field, noise(2, DIM), sigmas, RolloutSpec(frozenset({2}), frozenset({2}), 6))
    held = [trajectory.x_end, *trajectory.states.values(), *trajectory.velocities.values()]
    assert not any(tensor.requires_grad for tensor in held)


def test_one_graph_at_a_time():
    """The input of every earlier evaluation is gone when the next begins."""
    field, sigmas = Linear(), random_sigmas(8, np.random.default_rng(0))
    alive = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            alive.append(1)
            return v.clone()

        @staticmethod
        def backward(ctx, grad):
            alive.pop()
            return grad

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        v = field(x, sigma)
        if v.requires_grad:
            assert not alive
            v = Watched.apply(v)
        return v

    drawn = draw_plan(get_method("full"), sigmas, np.random.default_rng(0))
    backpropagate(drawn, rollout(velocity, noise(2, DIM), sigmas, drawn.rollout_spec), velocity, mean_square)


def test_the_engine_says_what_it_lacks():
    field, sigmas = Linear(), random_sigmas(12, np.random.default_rng(0))
    drawn = draw_plan(get_method("draft_lv"), sigmas, np.random.default_rng(0))
    trajectory = rollout(field, noise(2, DIM), sigmas, drawn.rollout_spec)
    with pytest.raises(ValueError, match="pass noise"):
        backpropagate(drawn, trajectory, field, mean_square)
    with pytest.raises(ValueError, match="noise of a copy"):
        backpropagate(drawn, trajectory, field, mean_square, noise=torch.zeros(2, 1, DIM))
    with pytest.raises(ValueError, match="one value per sample"):
        backpropagate(drawn, trajectory, field, lambda x, rows: x.sum())
    with pytest.raises(ValueError, match="steps_per_forward must be >= 1"):
        sweep(drawn, trajectory, field, trajectory.x_end, steps_per_forward=0)
    with pytest.raises(ValueError, match="reward_batch_size must be >= 1"):
        backpropagate(drawn, trajectory, field, mean_square, options=BackwardOptions(reward_batch_size=0))
    other = draw_plan(get_method("draft_k"), sigmas, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"kept no state at steps \[11, 10, 9\]"):
        sweep(other, Trajectory(sigmas, {}, {}, trajectory.x_end), field, trajectory.x_end)
    with pytest.raises(ValueError, match="cannot keep"):
        rollout(field, noise(2, DIM), sigmas, RolloutSpec(frozenset({5}), frozenset(), 4))
    field.b.requires_grad_(False)
    with pytest.raises(ValueError, match="carries no gradient"):
        sweep(drawn, trajectory, field, trajectory.x_end)
