"""The sweep against the joint graph of the papers, on a small real transformer."""

import numpy as np
import pytest
import torch
from fields import (
    NUM_CHANNELS,
    NUM_SAMPLES,
    NUM_TOKENS,
    flux2_velocity,
    gradient,
    noise,
    random_loss,
    random_sigmas,
    relative,
    tiny_flux2,
)
from oracle import SURROGATES, backpropagate_jointly, distance_to_base, of_plan, roll
from torch import nn

from flowbp.core.axes.active import Dirichlet, Midpoint, MidpointJ, Uniform
from flowbp.core.engine import (
    BackwardOptions,
    Outcome,
    Regulariser,
    backpropagate,
    num_backward_passes,
    rollout,
)
from flowbp.core.guidance import guided_velocity
from flowbp.core.multi_reward import combine_gradients
from flowbp.core.plan import Plan, Term, draw_plan
from flowbp.core.settings import Guidance
from flowbp.methods import METHODS, Method, get_method

SHAPE = (NUM_SAMPLES, NUM_TOKENS, NUM_CHANNELS)
LOSS = random_loss(SHAPE)
SEEDS = [range(5), pytest.param(range(5, 50), marks=pytest.mark.exhaustive)]
"""Of the plans of a method."""


@pytest.fixture(scope="module")
def net():
    return tiny_flux2()


def swept(
    net, method_plan: Plan, velocity, x_0, sigmas, *, offload: bool = False, noise=None, **options
) -> tuple[torch.Tensor, Outcome]:
    net.zero_grad()
    trajectory = rollout(velocity, x_0, sigmas, method_plan.rollout_spec, offload=offload)
    outcome = backpropagate(method_plan, trajectory, velocity, LOSS, noise=noise, options=BackwardOptions(**options))
    return gradient(net), outcome


def vary(method: Method, num_steps: int, rng: np.random.Generator) -> Method:
    """The method with other settings, within what `num_inference_steps` allows."""
    ours, renoised = method.name.startswith("flowbp"), method.name == "draft_lv"
    samplers = [Uniform(), Uniform(cap=2), Dirichlet(), Dirichlet(cap=3), Midpoint(), MidpointJ()]
    sampler = samplers[rng.integers(len(samplers))]
    active = {
        "num_active_steps": 1 if renoised else int(rng.integers(2, 4)) if ours else int(rng.integers(1, num_steps)),
        "early_stop": float(rng.uniform(0, 1)),
        "bias": float(rng.uniform(0, 4)),
        "sampler": sampler,
        "split": (method.name == "flowbp_bridge" and sampler) or None,
        "num_supports": int(rng.integers(1, 5)),
        "later_gain": float(rng.uniform(0, 1.5)),
    }
    weights = {"order": int(rng.integers(1, 5)), "anchor": float(rng.uniform(0, 1))}
    coupling = method.coupling
    if coupling is not None and coupling.kind == "bridge":
        coupling = _with(coupling, {"alpha": float(rng.uniform(0.05, 1))})
    if ours:
        weights |= {"refill": rng.choice(["none", "mass"]), "gamma": float(rng.uniform(0, 1.5))}
    return method.model_copy(
        update={
            "reward_input": _with(method.reward_input, {"copies": int(rng.integers(1, 4))}),
            "active": _with(method.active, active),
            "weights": _with(method.quadrature, weights),
            "coupling": coupling,
            "gap_floor": method.gap_floor and float(10 ** rng.uniform(-4, -1)),
            "tail": float(rng.choice([0.6, 0.8, 1.0])) if ours or method.name == "leapalign" else 1.0,
        }
    )


def _with(config, values):
    """`config` with those of `values` that it has, validated."""
    return type(config).model_validate(dict(config) | {key: values[key] for key in values if key in dict(config)})


def test_plans_describe_the_papers_surrogates(net):
    """Of the methods without copies and gap weights, from the terms alone: what checks a method without a paper."""
    velocity, rng = flux2_velocity(net), np.random.default_rng(0)
    sigmas = random_sigmas(12, rng)
    run = roll(velocity, noise(*SHAPE, seed=0), sigmas)
    for name in SURROGATES:
        method = get_method(name)
        drawn = draw_plan(method, sigmas, rng)
        if drawn.copies or drawn.gap_floor is not None:
            continue
        gradients = []
        for surrogate in (SURROGATES[name], of_plan):
            net.zero_grad()
            (y,) = surrogate(run, method, drawn, None).ys
            LOSS(y, slice(0, len(y))).mean().backward()
            gradients.append(gradient(net))
        assert relative(*gradients) < 1e-10, name


@pytest.mark.parametrize("seeds", SEEDS, ids=["5 plans", "45 more"])
@pytest.mark.parametrize("name", METHODS)
def test_sweep_equals_joint_graph(name, seeds, net):
    velocity = flux2_velocity(net)
    worst = 0.0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        num_steps = int(rng.integers(5, 7))
        sigmas = random_sigmas(num_steps, rng)
        method = vary(get_method(name), num_steps, rng)
        drawn = draw_plan(method, sigmas, rng)
        x_0, eps = noise(*SHAPE, seed=seed), noise(max(drawn.copies, 1), *SHAPE, seed=1000 + seed)
        options = {"steps_per_forward": int(rng.integers(1, 4)), "reward_batch_size": [None, 1][rng.integers(2)]}
        got, outcome = swept(net, drawn, velocity, x_0, sigmas, noise=eps, scale=0.7, **options)
        net.zero_grad()
        surrogate = backpropagate_jointly(method, drawn, roll(velocity, x_0, sigmas), LOSS, eps, scale=0.7)
        worst = max(worst, relative(got, gradient(net)))
        torch.testing.assert_close(outcome.values, torch.stack(surrogate.ys).detach(), rtol=1e-12, atol=1e-12)
        if surrogate.gaps:
            torch.testing.assert_close(outcome.gaps, torch.stack(surrogate.gaps), rtol=1e-9, atol=1e-12)
    assert worst <= 1e-10


class Perceptron(nn.Module):
    """In float64 throughout: the transformer's rotary embeddings are float32, which rounds sums of cotangents."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(NUM_CHANNELS + 1, 16), nn.Tanh(), nn.Linear(16, NUM_CHANNELS)).double()

    def forward(self, x, sigma):
        return self.net(torch.cat([x, sigma.view(-1, 1, 1).expand_as(x[..., :1])], dim=-1))


@pytest.mark.parametrize("name", METHODS)
def test_sweep_with_a_regulariser_equals_joint_graph(name):
    """Whatever is coupled, renoised or shares a forward; the value of R too."""
    net, base = Perceptron(0), Perceptron(3)
    regulariser, rng = Regulariser(0.3, base), np.random.default_rng(7)
    for seed in range(2):
        sigmas = random_sigmas(6, rng)
        method = vary(get_method(name), 6, rng)
        drawn = draw_plan(method, sigmas, rng)
        x_0, eps = noise(*SHAPE, seed=seed), noise(max(drawn.copies, 1), *SHAPE, seed=1000 + seed)
        options = {"scale": 0.7, "steps_per_forward": 1 + 2 * seed}
        plain, outcome = swept(net, drawn, net, x_0, sigmas, noise=eps, **options)
        assert outcome.regularise is None
        got, outcome = swept(net, drawn, net, x_0, sigmas, noise=eps, regulariser=regulariser, **options)
        run = roll(net, x_0, sigmas)
        net.zero_grad()
        backpropagate_jointly(method, drawn, run, LOSS, eps, scale=0.7, regulariser=regulariser)
        assert relative(got, gradient(net)) <= 1e-10
        assert relative(got, plain) > 1e-5
        expected = distance_to_base(run, drawn, base, eps).detach()
        torch.testing.assert_close(outcome.regularise, expected, rtol=1e-10, atol=0)
        # at the base itself nothing is added, bit for bit
        itself = Regulariser(0.3, net)
        got, outcome = swept(net, drawn, net, x_0, sigmas, noise=eps, regulariser=itself, **options)
        assert not outcome.regularise.any()
        if options["steps_per_forward"] == 1:  # else forwards are shared otherwise, and rounded otherwise
            assert torch.equal(got, plain)


def test_a_regulariser_costs_one_pass_more_at_coupled_steps_alone(net):
    base, calls = flux2_velocity(net), []

    def velocity(x, sigma):
        calls.append((len(x) // NUM_SAMPLES, torch.is_grad_enabled()))
        return base(x, sigma)

    sigmas = random_sigmas(6, np.random.default_rng(0))
    terms = tuple(Term(i, -0.1, 0.5 * (i == 4)) for i in (5, 4, 2, 1))
    drawn = Plan(tuple(sigmas.tolist()), terms, 6)
    trajectory = rollout(base, noise(*SHAPE, seed=0), sigmas, drawn.rollout_spec)
    for size, expected in ((1, [(1, True)] * 5), (3, [(1, True), (1, True), (3, True)])):
        calls.clear()
        options = BackwardOptions(steps_per_forward=size, regulariser=Regulariser(1.0, velocity))
        backpropagate(drawn, trajectory, velocity, LOSS, options=options)
        assert [call for call in calls if call[1]] == expected
        assert sum(copies for copies, with_grad in calls if not with_grad) == len(terms)
        assert num_backward_passes(drawn, size, regularised=True) == len(expected)


def test_bridge_without_coupling_is_sparse_on_the_same_steps(net):
    velocity = flux2_velocity(net)
    bridge = get_method("flowbp_bridge")
    detached = bridge.model_copy(update={"coupling": bridge.coupling.model_copy(update={"alpha": 0.0})})
    for seed in range(5):
        rng = np.random.default_rng(seed)
        sigmas = random_sigmas(7, rng)
        x_0 = noise(*SHAPE, seed=seed)
        drawn = draw_plan(detached, sigmas, rng)
        assert not any(term.coupling for term in drawn.terms)
        run = roll(velocity, x_0, sigmas)
        got, _ = swept(net, drawn, velocity, x_0, sigmas)
        net.zero_grad()
        backpropagate_jointly(get_method("flowbp_sparse"), drawn, run, LOSS)
        assert relative(got, gradient(net)) <= 1e-12


def test_lagrange_of_order_one_is_leapalign(net):
    velocity = flux2_velocity(net)
    leap = get_method("leapalign")
    base = get_method("flowbp_lagrange")
    lagrange = base.model_copy(
        update={
            "active": base.active.model_copy(update={"num_supports": 1, "sampler": leap.active.sampler}),
            "quadrature": base.quadrature.model_copy(update={"order": 1, "refill": "none"}),
            "coupling": leap.coupling,
            "gap_floor": leap.gap_floor,
        }
    )
    for seed in range(5):
        sigmas = random_sigmas(6, np.random.default_rng(seed))
        a, b = (draw_plan(method, sigmas, np.random.default_rng(seed)) for method in (lagrange, leap))
        assert [t.step for t in a.terms] == [t.step for t in b.terms]
        got, one = swept(net, a, velocity, noise(*SHAPE, seed=seed), sigmas)
        want, other = swept(net, b, velocity, noise(*SHAPE, seed=seed), sigmas)
        assert relative(got, want) <= 1e-12
        torch.testing.assert_close(one.weights, other.weights, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["flowbp_sparse", "flowbp_bridge", "flowbp_lagrange", "drtune"])
def test_chunk_does_not_change_the_gradient(name, net):
    velocity = flux2_velocity(net)
    sigmas = random_sigmas(8, np.random.default_rng(0))
    drawn = draw_plan(get_method(name), sigmas, np.random.default_rng(3))
    want, _ = swept(net, drawn, velocity, noise(*SHAPE), sigmas)
    for chunk in (2, 3, 8):
        got, _ = swept(net, drawn, velocity, noise(*SHAPE), sigmas, steps_per_forward=chunk, reward_batch_size=1)
        assert relative(got, want) <= 1e-12


@pytest.mark.parametrize("name", METHODS)
def test_an_offloaded_trajectory_changes_no_bit(name, net):
    velocity, rng = flux2_velocity(net), np.random.default_rng(0)
    sigmas = random_sigmas(6, rng)
    drawn = draw_plan(vary(get_method(name), 6, rng), sigmas, rng)
    eps = noise(max(drawn.copies, 1), *SHAPE, seed=1)
    kept, outcome = swept(net, drawn, velocity, noise(*SHAPE), sigmas, noise=eps)
    again, same = swept(net, drawn, velocity, noise(*SHAPE), sigmas, noise=eps, offload=True)
    assert torch.equal(kept, again)
    assert torch.equal(outcome.gaps, same.gaps)


@pytest.mark.parametrize("regularised", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_sweep_without_the_negative_changes_no_bit(name, regularised):
    """In float32, against the sweep that evaluates both branches everywhere, and what it evaluates."""
    net, rng, evaluated = Perceptron(0).float(), np.random.default_rng(5), []

    def velocity(x, sigma, cond):
        evaluated.append((torch.is_grad_enabled(), bool(cond["text"][0] < 0)))
        return net(x + cond["text"].view(-1, 1, 1), sigma.to(x))

    guidance = Guidance(scale=3.5, batched=False)
    given = (velocity, {"text": torch.tensor([0.3, 0.7])}, {"text": torch.tensor([-1.0])}, guidance)
    whole, pulled = guided_velocity(*given), guided_velocity(*given, gradient_only=True)
    base = Perceptron(3).float()
    for _ in range(3):
        sigmas = random_sigmas(6, rng).float()
        drawn = draw_plan(vary(get_method(name), 6, rng), sigmas, rng)
        x_0, eps = noise(*SHAPE).float(), noise(max(drawn.copies, 1), *SHAPE, seed=1).float()
        options = {"noise": eps, "regulariser": Regulariser(0.3, base) if regularised else None}
        want, before = swept(net, drawn, whole, x_0, sigmas, **options)
        evaluated.clear()
        got, outcome = swept(net, drawn, whole, x_0, sigmas, gradient_velocity=pulled, **options)
        assert torch.equal(got, want)
        assert want.norm() > 0
        assert not regularised or torch.equal(outcome.regularise, before.regularise)
        with_gradient = evaluated.count((True, False))
        assert with_gradient == num_backward_passes(drawn, regularised=regularised)
        # those without gradient are pairs: of the rollout, of renoised copies, and one beside every regularised pass
        alone = evaluated.count((False, False))
        assert evaluated.count((False, True)) == alone + regularised * (len(drawn.terms) + drawn.copies)


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("name", METHODS)
def test_weighted_rewards_need_one_pass_through_what_they_share(name, size):
    """The same gradient as one pass per reward and the weighted sum of what these give."""
    net, decoder, rng, passes = Perceptron(0), Perceptron(1), np.random.default_rng(3), []
    weights = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)

    def loss(x, rows):
        image = decoder(x, torch.zeros(len(x), dtype=x.dtype))
        image.register_hook(lambda gradient: passes.append(len(gradient)))
        flat = image.flatten(1)
        return torch.stack([flat.square().mean(1), flat.sin().sum(1), flat.exp().mean(1)])

    def separately(gradients):
        return combine_gradients(gradients, weights, "weighted")

    sigmas = random_sigmas(6, rng)
    drawn = draw_plan(vary(get_method(name), 6, rng), sigmas, rng)
    trajectory = rollout(net, noise(*SHAPE), sigmas, drawn.rollout_spec)
    found, counted = [], []
    for how in ({"combine": separately}, {"reward_weights": weights}, {"reward_weights": 3 * weights}, {}):
        net.zero_grad(), passes.clear()
        eps = noise(max(drawn.copies, 1), *SHAPE, seed=1)
        options = BackwardOptions(reward_batch_size=size, **how)
        outcome = backpropagate(drawn, trajectory, net, loss, noise=eps, options=options)
        found.append((gradient(net), outcome.losses))
        counted.append(sum(passes))
        assert (outcome.agreement is None) == ("combine" not in how)
    assert counted == [3 * NUM_SAMPLES * (1 + drawn.copies)] + [NUM_SAMPLES * (1 + drawn.copies)] * 3
    assert all(torch.equal(losses, found[0][1]) for _, losses in found)
    assert relative(found[1][0], found[0][0]) < 1e-12
    assert relative(found[2][0], 3 * found[0][0]) < 1e-12
    assert relative(found[3][0], found[0][0]) > 1e-2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_offloaded_is_a_copy_on_the_host(device):
    drawn = draw_plan(get_method("leapalign"), torch.linspace(1, 0, 7), np.random.default_rng(0))
    x_0 = noise(*SHAPE).to(device)
    places = {}
    for offload in (False, True):
        found = rollout(lambda x, sigma: x, x_0, torch.linspace(1, 0, 7), drawn.rollout_spec, offload=offload)
        kept = [*found.states.values(), *found.velocities.values()]
        places[offload] = {t.data_ptr() for t in kept}
        assert {t.device.type for t in kept} == {"cpu" if offload else device}
        assert all(t.is_pinned() for t in kept if offload and device == "cuda")
    assert len(places[True]) > len(places[False])  # here a velocity is its state, one storage; copies are two


def test_coupling_all_steps_partly_is_neither_sparse_nor_full(net):
    """A damped adjoint: alpha 0 sums detached terms, alpha 1 is exact, and the oracle knows both ends."""
    velocity = flux2_velocity(net)
    sigmas = random_sigmas(5, np.random.default_rng(1))
    x_0 = noise(*SHAPE)
    run = roll(velocity, x_0, sigmas)
    full = get_method("full")
    grads = {}
    for alpha in (0.0, 0.5, 1.0):
        method = full.model_copy(update={"coupling": full.coupling.model_copy(update={"alpha": alpha})})
        grads[alpha], _ = swept(net, draw_plan(method, sigmas, np.random.default_rng(0)), velocity, x_0, sigmas)
    net.zero_grad()
    everything = Plan(tuple(sigmas.tolist()), tuple(Term(i, -1.0) for i in range(4, -1, -1)), 5)
    backpropagate_jointly(get_method("flowbp_sparse"), everything, run, LOSS)
    assert relative(grads[0.0], gradient(net)) <= 1e-12
    net.zero_grad()
    backpropagate_jointly(full, everything, run, LOSS)
    assert relative(grads[1.0], gradient(net)) <= 1e-12
    assert min(relative(grads[0.5], grads[0.0]), relative(grads[0.5], grads[1.0])) > 1e-4


def test_frozen_parameters_get_no_gradient_and_the_rest_the_same(net):
    velocity = flux2_velocity(net)
    sigmas = random_sigmas(6, np.random.default_rng(0))
    drawn = draw_plan(get_method("flowbp_bridge"), sigmas, np.random.default_rng(0))
    swept(net, drawn, velocity, noise(*SHAPE), sigmas)
    frozen = [p for name, p in net.named_parameters() if "attn" not in name]
    want = {id(p): p.grad.clone() for p in net.parameters() if p.grad is not None}
    for p in frozen:
        p.requires_grad_(False)
    try:
        net.zero_grad()
        swept(net, drawn, velocity, noise(*SHAPE), sigmas)
        assert all(p.grad is None for p in frozen)
        for p in net.parameters():
            if p.requires_grad:
                torch.testing.assert_close(p.grad, want[id(p)], rtol=1e-12, atol=1e-15)
    finally:
        for p in frozen:
            p.requires_grad_(True)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_kept_graphs_save_evaluations_and_change_no_bit(name, guided):
    """In float32: of any number of active steps, coupled ones and renoised copies too."""
    net, rng, evaluated = Perceptron(0).float(), np.random.default_rng(5), []

    def velocity(x, sigma, cond):
        evaluated.append(bool(cond["text"][0] > 0))
        return net(x + cond["text"].view(-1, 1, 1), sigma.to(x))

    guidance = Guidance(scale=3.5 if guided else 1.0, batched=False)
    given = (velocity, {"text": torch.tensor([0.3, 0.7])}, {"text": torch.tensor([-1.0])}, guidance)
    whole, pulled = guided_velocity(*given), guided_velocity(*given, gradient_only=True)
    sigmas = random_sigmas(6, rng).float()
    drawn = draw_plan(vary(get_method(name), 6, rng), sigmas, rng)
    x_0, eps = noise(*SHAPE).float(), noise(max(drawn.copies, 1), *SHAPE, seed=1).float()
    found, counts = [], []
    for number in (0, 1, 2, 9):
        net.zero_grad(), evaluated.clear()
        trajectory = rollout(whole, x_0, sigmas, drawn.keep_graphs(number))
        assert list(trajectory.graphs) == sorted(term.step for term in drawn.terms[:number])
        options = BackwardOptions(gradient_velocity=pulled)
        outcome = backpropagate(drawn, trajectory, whole, LOSS, noise=eps.clone(), options=options)
        found.append((gradient(net), outcome))
        counts.append(evaluated.count(True))
    assert all(torch.equal(got, found[0][0]) for got, _ in found)
    assert all(torch.equal(outcome.values, found[0][1].values) for _, outcome in found)
    assert [counts[0] - count for count in counts] == [min(n, len(drawn.terms)) for n in (0, 1, 2, 9)]


def test_kept_graphs_do_not_go_with_other_passes(net):
    velocity = flux2_velocity(net)
    sigmas = random_sigmas(6, np.random.default_rng(0))
    drawn = draw_plan(get_method("flowbp_sparse"), sigmas, np.random.default_rng(0))
    for options in (BackwardOptions(steps_per_forward=2), BackwardOptions(regulariser=Regulariser(1.0, velocity))):
        trajectory = rollout(velocity, noise(*SHAPE), sigmas, drawn.keep_graphs(1))
        with pytest.raises(ValueError, match="graphs of a rollout go with one step per forward"):
            backpropagate(drawn, trajectory, velocity, LOSS, options=options)
    with pytest.raises(ValueError, match="carries no gradient"):
        rollout(lambda x, sigma: -x, noise(*SHAPE), sigmas, drawn.keep_graphs(1))
