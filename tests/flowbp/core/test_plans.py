"""Plans: what holds for every method, grid and seed; what a plan refuses."""

import math

import numpy as np
import pytest
import torch
from fields import GRIDS, linear_grid, random_sigmas
from hypothesis import given
from hypothesis import strategies as st

from flowbp.core.axes.active import Stratified
from flowbp.core.axes.grid import Leg
from flowbp.core.plan import Plan, Term, draw_plan
from flowbp.methods import METHODS, Method, get_method
from imgen_common.errors import UserError

GRID = (1.0, 0.6, 0.3, 0.0)


@given(st.sampled_from(sorted(METHODS)), st.integers(11, 60), st.integers(0, 2**32))
def test_every_plan_is_sound_and_reproducible(name, num_steps, seed):
    sigmas = random_sigmas(num_steps, np.random.default_rng(seed))
    drawn = draw_plan(get_method(name), sigmas, np.random.default_rng(seed))
    assert drawn == draw_plan(get_method(name), sigmas.tolist(), np.random.default_rng(seed))
    assert drawn.num_inference_steps == num_steps
    keep = drawn.rollout_spec
    assert {term.step for term in drawn.terms} <= keep.states
    assert max(keep.states | keep.velocities) <= keep.stop <= num_steps
    assert drawn.num_gradient_forwards == len(drawn.table()) + drawn.copies
    assert drawn.num_plain_forwards <= num_steps + drawn.copies
    if name in ("flowbp_sparse", "flowbp_bridge"):
        assert sum(term.weight for term in drawn.terms) == pytest.approx(-1)


FORWARDS = {"refl": 1, "draft_k": 3, "draft_lv": 3, "drtune": 3, "leapalign": 2, "flowbp_sparse": 3,
            "flowbp_bridge": 5, "flowbp_lagrange": 4, "full": 25}  # fmt: skip


@pytest.mark.parametrize("name", FORWARDS)
def test_what_each_method_keeps_and_costs(name):
    drawn = draw_plan(get_method(name), linear_grid(25), np.random.default_rng(0))
    assert drawn.num_gradient_forwards == FORWARDS[name]
    stops_early = name in ("refl", "drtune")
    assert (drawn.rollout_spec.stop < 25) == stops_early
    assert drawn.num_plain_forwards == (drawn.reward_step + 1 if stops_early else 25) + drawn.copies
    couplings = [term.coupling for term in drawn.terms if term.coupling]
    assert couplings == {
        "draft_k": [1.0] * 2, "leapalign": [0.3], "flowbp_bridge": [0.1], "flowbp_lagrange": [0.1], "full": [1.0] * 24,
    }.get(name, [])  # fmt: skip


def test_refl_and_drtune_weigh_the_stop_by_its_leap():
    sigmas = linear_grid(25)
    refl = draw_plan(get_method("refl"), sigmas, np.random.default_rng(0))
    assert refl.terms == (Term(refl.reward_step, -sigmas[refl.reward_step]),)
    for seed in range(40):
        drtune = draw_plan(get_method("drtune"), sigmas, np.random.default_rng(seed))
        for term in drtune.terms:
            step = sigmas[term.step] if term.step == drtune.reward_step else sigmas[term.step] - sigmas[term.step + 1]
            assert term.weight == pytest.approx(-step)


def test_refl_draws_uniformly_from_the_last_eleven():
    rng = np.random.default_rng(0)
    steps = np.bincount(
        [draw_plan(get_method("refl"), linear_grid(25), rng).reward_step for _ in range(3000)], minlength=25
    )
    assert not steps[:14].any()
    assert np.all(np.abs(steps[14:] - 3000 / 11) < 75)


def test_tail_keeps_gradient_out_of_the_noisy_part():
    for name in ("flowbp_sparse", "flowbp_bridge", "flowbp_lagrange", "leapalign"):
        for seed in range(30):
            method = get_method(name).model_copy(update={"tail": 0.7})
            drawn = draw_plan(method, GRIDS["flux2"], np.random.default_rng(seed))
            assert min(drawn.rollout_spec.states) >= 7


def test_anchor_zero_leaves_only_the_leap_before_j():
    base = get_method("flowbp_lagrange")
    method = base.model_copy(update={"quadrature": base.quadrature.model_copy(update={"anchor": 0.0})})
    drawn = draw_plan(method, linear_grid(25), np.random.default_rng(0))
    k, j = drawn.legs[0].start, drawn.legs[1].start
    assert [term for term in drawn.terms if term.step < j] == [Term(k, drawn.sigmas[j] - drawn.sigmas[k])]


def test_a_method_of_ones_own():
    method = Method(active=Stratified(num_active_steps=2), coupling={"kind": "every", "alpha": 0.5})
    drawn = draw_plan(method, linear_grid(8), np.random.default_rng(0))
    assert [term.coupling for term in drawn.terms] == [0.5, 0.0]


def test_a_plan_takes_tensors_of_noise_levels():
    sigmas = torch.tensor(linear_grid(12))
    assert draw_plan(get_method("leapalign"), sigmas, np.random.default_rng(0)).sigmas == tuple(sigmas.tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigmas": (1.0, 0.5, 0.6, 0.0)}, "descend"),
        ({"sigmas": (1.0, 0.5, 0.2, 0.1)}, "descend"),
        ({"sigmas": (1.5, 0.6, 0.3, 0.0)}, "descend"),
        ({"sigmas": (1.0, math.nan, 0.3, 0.0)}, "descend"),
        ({"sigmas": (0.0,)}, "at least one step"),
        ({"terms": ()}, "at least one term"),
        ({"terms": (Term(0, -0.4), Term(1, -0.3))}, "descend"),
        ({"terms": (Term(1, -0.4), Term(1, -0.3))}, "descend"),
        ({"terms": (Term(3, -0.3),)}, "descend"),
        ({"terms": (Term(-1, -0.3),)}, "descend"),
        ({"terms": (Term(2, -0.3),), "reward_step": 1, "legs": ()}, "descend"),
        ({"terms": (Term(2, math.inf),)}, "finite"),
        ({"terms": (Term(2, 0.0),)}, "not 0"),
        ({"terms": (Term(2, -0.3, 1.1), Term(0, -0.3))}, "coupling"),
        ({"terms": (Term(2, -0.3, 0.5),)}, "noisiest"),
        ({"reward_step": 4}, "reward_step"),
        ({"reward_step": 1, "terms": (Term(0, -0.4),)}, "legs"),
        ({"legs": (), "copies": 2, "reward_step": 2}, "copies"),
        ({"copies": -1}, "copies"),
        ({"gap_floor": 0.0}, "gap_floor"),
        ({"legs": (), "gap_floor": 0.1}, "gap_floor"),
        ({"legs": (Leg(0, 2, ((0, -0.7),)),)}, "up to step 3"),
        ({"legs": (Leg(0, 1, ((0, -0.4),)), Leg(2, 3, ((2, -0.3),)))}, "follow"),
        ({"legs": (Leg(1, 3, ((0, -0.6),)),)}, "hold its nodes"),
        ({"legs": (Leg(1, 3, ((1, -0.5),)),)}, "add up"),
    ],
)
def test_a_plan_refuses_what_contradicts_itself(change, message):
    sound = {"sigmas": GRID, "terms": (Term(2, -0.3),), "reward_step": 3, "legs": (Leg(1, 3, ((1, -0.6),)),)}
    Plan(**sound)
    with pytest.raises(ValueError, match=message):
        Plan(**(sound | change))


def test_nothing_to_train_is_a_user_error():
    base = get_method("flowbp_lagrange")
    idle = base.model_copy(update={"active": base.active.model_copy(update={"later_gain": 0.0})})
    assert draw_plan(idle, linear_grid(9), np.random.default_rng(0)).num_gradient_forwards == 2
    with pytest.raises(UserError, match="11 of 8 steps"):
        draw_plan(get_method("refl"), linear_grid(8), np.random.default_rng(0))
