"""Samplers and active sets: ranges, moments, unbiasedness."""

from itertools import pairwise

import numpy as np
import pytest
from fields import GRIDS, linear_grid
from hypothesis import given
from hypothesis import strategies as st

from flowbp.core.axes.active import (
    All,
    Dirichlet,
    LateBiased,
    Midpoint,
    MidpointJ,
    OneOfTail,
    SpacedPrefix,
    Stratified,
    Uniform,
    share_budget,
)
from flowbp.core.axes.grid import Grid, SplitSteps
from flowbp.core.axes.quadrature import Euler
from flowbp.core.numerics import tail_start
from imgen_common.errors import UserError

SAMPLERS = [
    Uniform(),
    Uniform(cap=3),
    Dirichlet(),
    Dirichlet(clean=0.05, gap=0.05, noisy=0.05),
    Midpoint(),
    MidpointJ(),
]


@pytest.mark.parametrize("sampler", [*SAMPLERS, Dirichlet(cap=3)], ids=repr)
@given(num_steps=st.integers(3, 40), percent=st.integers(1, 100), seed=st.integers(0, 2**32))
def test_pairs_lie_in_the_tail_window(sampler, num_steps, percent, seed):
    first = tail_start(num_steps, percent / 100, 3)
    k, j = sampler.draw(first, num_steps, np.random.default_rng(seed))
    assert first <= k < j < num_steps
    if not isinstance(sampler, Midpoint | MidpointJ) and sampler.cap is not None:
        assert num_steps - j <= sampler.cap


@pytest.mark.parametrize("sampler", [Uniform(), Uniform(cap=4), Midpoint(), MidpointJ()], ids=repr)
def test_splits_have_the_probabilities_they_claim(sampler):
    rng, num = np.random.default_rng(0), 4000
    hits = np.bincount([sampler.draw(3, 15, rng)[1] for _ in range(num)], minlength=15) / num
    p = np.array([sampler.pmf(3, 15).get(j, 0.0) for j in range(15)])
    assert p.sum() == pytest.approx(1)
    assert np.all(np.abs(hits - p) <= 4.5 * np.sqrt(p * (1 - p) / num))


@pytest.mark.parametrize(
    ("sampler", "first", "k", "j", "gap"),
    [
        (Uniform(), 0, (7.69, 5.78), (16.33, 5.77), (8.65, 5.77)),
        (Dirichlet(), 0, (3.78, 2.88), (18.02, 3.17), (14.24, 3.64)),
        (Dirichlet(), 7, (9.46, 2.07), (19.70, 2.28), (10.23, 2.62)),
        (Dirichlet(cap=10), 0, (4.15, None), (18.39, 2.51), (14.24, 3.64)),
        (Midpoint(), 0, (11.49, 6.94), (18.0, 3.5), None),
        (MidpointJ(), 0, (6.0, 3.5), (12.5, 6.9), None),
    ],
    ids=repr,
)
def test_pairs_have_the_moments_of_the_reference(sampler, first, k, j, gap):
    rng = np.random.default_rng(0)
    pairs = np.array([sampler.draw(first, 25, rng) for _ in range(8000)])
    for values, moments in ((pairs[:, 0], k), (pairs[:, 1], j), (pairs[:, 1] - pairs[:, 0], gap)):
        if moments is not None:
            assert values.mean() == pytest.approx(moments[0], abs=0.25)
            assert moments[1] is None or values.std() == pytest.approx(moments[1], abs=0.2)


def test_dirichlet_cap_keeps_the_gap_and_moves_the_overflow_to_the_noisy_side():
    for seed in range(200):
        k, j = Dirichlet().draw(0, 25, np.random.default_rng(seed))
        k_capped, j_capped = Dirichlet(cap=10).draw(0, 25, np.random.default_rng(seed))
        assert j_capped - k_capped == j - k
        assert j_capped == max(j, 15)


@pytest.mark.parametrize(
    ("budget", "splits", "before"),
    [(5, range(1, 6), 1), (5, range(8, 13), 2), (5, range(13, 16), 3), (5, range(18, 25), 4), (3, range(1, 13), 1),
     (3, range(13, 25), 2)],
)  # fmt: skip
def test_budget_is_shared_as_in_the_reference(budget, splits, before):
    assert {share_budget(budget, j, 25 - j) for j in splits} == {before}


@given(st.integers(1, 30), st.integers(1, 30), st.data())
def test_budget_fits_both_sides(before, after, data):
    budget = data.draw(st.integers(2, before + after))
    share = share_budget(budget, before, after)
    assert 1 <= share <= before
    assert 1 <= budget - share <= after


def test_budget_out_of_range_is_refused():
    with pytest.raises(ValueError, match="share"):
        share_budget(1, 3, 3)


@given(st.integers(5, 30), st.integers(0, 2**32), st.sampled_from(["sparse", "bridge", "stratified"]))
def test_active_sets_spend_exactly_their_budget(num_steps, seed, which):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, num_steps + 1))
    active = {
        "sparse": LateBiased(num_active_steps=count),
        "bridge": LateBiased(num_active_steps=count, split=Uniform()),
        "stratified": Stratified(num_active_steps=count),
    }[which]
    grid = Grid(tuple(linear_grid(num_steps)))
    draw = active.draw(grid, rng)
    assert len(draw.steps) == count
    assert list(draw.steps) == sorted(set(draw.steps))
    assert set(draw.steps) <= set(grid.window)
    assert sorted(i for pool in draw.pools for i in pool.steps) == list(grid.window)
    assert not isinstance(draw, SplitSteps) or draw.split in draw.steps


def test_late_bias_counts_from_the_trajectory_without_split_and_from_each_side_with_it():
    grid = Grid(tuple(linear_grid(10)), first=4)
    (pool,) = LateBiased(num_active_steps=2, bias=1.0).draw(grid, np.random.default_rng(0)).pools
    assert pool.odds == (5, 6, 7, 8, 9, 10)
    draw = LateBiased(num_active_steps=3, bias=1.0, split=Uniform()).draw(grid, np.random.default_rng(0))
    before, at, after = draw.pools
    assert at.steps == (draw.split,)
    assert before.odds[0] == 1
    assert not after.odds or after.odds[0] == 1


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("count", [1, 3, 4, 8, 25])
def test_strata_are_runs_of_nearly_equal_span(grid, count):
    sigmas = tuple(GRIDS[grid])
    draw = Stratified(num_active_steps=count).draw(Grid(sigmas), np.random.default_rng(0))
    assert [i for pool in draw.pools for i in pool.steps] == list(range(25))
    widest = max(a - b for a, b in pairwise(sigmas))
    if count <= 4:
        for pool in draw.pools:
            assert sum(pool.odds) == pytest.approx(1 / count, abs=widest + 1e-9)


def test_a_stratified_step_stands_for_its_whole_part():
    grid = Grid(tuple(GRIDS["flux1"]))
    draw = Stratified(num_active_steps=4).draw(grid, np.random.default_rng(1))
    coefficients, _ = Euler(refill="inclusion").integrate(grid, draw)
    spans = [sum(pool.odds) for pool in draw.pools]
    assert list(coefficients.values()) == pytest.approx([-span for span in spans], rel=1e-12)
    assert sum(coefficients.values()) == pytest.approx(-1)


@pytest.mark.parametrize(
    "active",
    [
        LateBiased(num_active_steps=3, bias=1.0),
        LateBiased(num_active_steps=3, bias=0.0),
        LateBiased(num_active_steps=4, bias=1.0, split=Uniform()),
        LateBiased(num_active_steps=2, bias=1.0, split=Uniform(cap=12)),
        LateBiased(num_active_steps=3, bias=1.0, split=Midpoint()),
        LateBiased(num_active_steps=5, bias=0.0, split=MidpointJ()),
        Stratified(num_active_steps=4),
    ],
    ids=repr,
)
@pytest.mark.parametrize("num", [500, pytest.param(2500, marks=pytest.mark.exhaustive)])
def test_inclusion_refill_is_unbiased(active, num):
    """The mean coefficient of every step is its Euler weight, so the mean gradient is the full detached sum."""
    grid = Grid(tuple(GRIDS["flux1"]), first=5)
    rng = np.random.default_rng(0)
    samples = np.zeros((num, 25))
    for row in samples:
        coefficients, _ = Euler(refill="inclusion").integrate(grid, active.draw(grid, rng))
        row[list(coefficients)] = list(coefficients.values())
    error = samples.mean(0) - np.array([grid.width(i) if i >= 5 else 0.0 for i in range(25)])
    assert np.all(np.abs(error) <= 4.5 * samples.std(0) / np.sqrt(num) + 1e-12)


def test_one_of_tail_with_inclusion_stands_for_the_tail():
    grid = Grid(tuple(linear_grid(10)))
    draw = OneOfTail(num_active_steps=4).draw(grid, np.random.default_rng(0))
    coefficients, _ = Euler(refill="inclusion").integrate(grid, draw)
    assert list(coefficients.values()) == pytest.approx([-0.4])


@given(st.integers(0, 2**32), st.integers(3, 25), st.floats(0, 2))
def test_mass_refill_never_shrinks_and_is_one_without_need(seed, count, gamma):
    grid = Grid(tuple(GRIDS["flux1"]))
    draw = LateBiased(num_active_steps=count).draw(grid, np.random.default_rng(seed))
    coefficients, _ = Euler(refill="mass", gamma=gamma).integrate(grid, draw)
    rho = [c / grid.width(i) for i, c in coefficients.items()]
    assert max(rho) == pytest.approx(min(rho))
    assert rho[0] >= 1 - 1e-12
    if gamma == 0 or count == 25:
        assert rho[0] == pytest.approx(1)
    capped, _ = Euler(refill="mass", gamma=gamma, rho_max=1.5).integrate(grid, draw)
    assert next(iter(capped.values())) / grid.width(draw.steps[0]) == pytest.approx(min(rho[0], 1.5))


@pytest.mark.parametrize(("grid", "count", "bias", "gamma", "mean", "low", "high"), [
    ("flux1", 3, 2.0, 1.0, 6.5, 4.9, 11.9),
    ("sd3", 4, 1.0, 0.5, 3.0, 1.9, 8.2),
])  # fmt: skip
def test_mass_refill_has_the_measured_range(grid, count, bias, gamma, mean, low, high):
    levels, rng = Grid(tuple(GRIDS[grid])), np.random.default_rng(0)
    rho = []
    for _ in range(1500):
        draw = LateBiased(num_active_steps=count, bias=bias).draw(levels, rng)
        coefficients, _ = Euler(refill="mass", gamma=gamma).integrate(levels, draw)
        rho.append(coefficients[draw.steps[0]] / levels.width(draw.steps[0]))
    assert np.mean(rho) == pytest.approx(mean, abs=0.25)
    assert min(rho) == pytest.approx(low, abs=0.15)
    assert max(rho) <= high * 1.35


@given(st.integers(3, 40), st.integers(0, 2**32), st.integers(1, 5), st.floats(0, 1))
def test_spaced_prefix_is_spaced_and_ends_before_its_stop(num_steps, seed, count, early_stop):
    active = SpacedPrefix(num_active_steps=min(count, num_steps), early_stop=early_stop)
    draw = active.draw(Grid(tuple(linear_grid(num_steps))), np.random.default_rng(seed))
    assert draw.stop is not None
    assert num_steps - max(1, round(early_stop * num_steps)) <= draw.stop < num_steps
    assert 0 <= draw.steps[0] <= draw.steps[-1] <= draw.stop
    assert len(set(np.diff(draw.steps))) <= 1


def test_spaced_prefix_reaches_every_phase():
    """N = 25, K = 3, early stop 0.4: e is uniform over the last ten steps."""
    rng, grid = np.random.default_rng(0), Grid(tuple(linear_grid(25)))
    draws = [SpacedPrefix().draw(grid, rng) for _ in range(4000)]
    stops = np.bincount([draw.stop for draw in draws], minlength=25)
    assert not stops[:15].any()
    assert np.all(np.abs(stops[15:] - 400) < 100)
    at_last = {draw.steps for draw in draws if draw.stop == 24}
    assert at_last == {(s, s + 8, s + 16) for s in range(9)}


@pytest.mark.parametrize(
    "active", [LateBiased(num_active_steps=9), Stratified(num_active_steps=9), OneOfTail(num_active_steps=9)], ids=repr
)
def test_more_steps_than_there_are_is_a_user_error(active):
    with pytest.raises(UserError, match=r"num_active_steps asks for 9 of 8"):
        active.draw(Grid(tuple(linear_grid(8))), np.random.default_rng(0))


def test_a_pair_needs_three_steps():
    with pytest.raises(UserError, match="3 of 2"):
        LateBiased(num_active_steps=2, split=Uniform()).draw(Grid((1.0, 0.5, 0.0)), np.random.default_rng(0))


def test_all_takes_the_tail():
    assert All().draw(Grid(tuple(linear_grid(6)), first=2), np.random.default_rng(0)).steps == (2, 3, 4, 5)
