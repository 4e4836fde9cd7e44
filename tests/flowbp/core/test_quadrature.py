"""Lagrange weights, draws without replacement, the tail window: closed forms and the papers' numbers."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from fields import GRIDS, linear_grid
from hypothesis import given
from hypothesis import strategies as st
from oracle import exact_weight

from flowbp.core.axes.quadrature import leg_nodes
from flowbp.core.numerics import draw_without_replacement, inclusion_probabilities, lagrange_weights, tail_start

GOLDEN_GRIDS = {
    "sd3": ".986301 .971831 .956522 .940299 .923077 .904762 .885246 .864407 .842105 .818182 .792453 .764706 .734694"
    " .702128 .666667 .627907 .585366 .538462 .486486 .428571 .363636 .290323 .206897 .111111",
    "flux1": ".97829 .955738 .932291 .907897 .882497 .856027 .828419 .799596 .769478 .737974 .704987 .670411 .634126"
    " .596003 .555899 .513656 .469096 .422026 .372226 .319451 .263428 .203846 .140355 .072557",
    "flux2": ".993686 .986913 .979629 .971773 .963276 .954056 .944016 .933042 .920998 .907718 .893002 .876604 .858219"
    " .837461 .813839 .786717 .755256 .718322 .674352 .621124 .555369 .472075 .363147 .214596",
}


@pytest.mark.parametrize("name", GRIDS)
def test_grids_are_those_of_the_papers(name):
    golden = [1.0, *map(float, GOLDEN_GRIDS[name].split()), 0.0]
    np.testing.assert_allclose(GRIDS[name], golden, atol=6e-7)


@pytest.mark.parametrize(
    ("grid", "start", "stop", "nodes", "weights"),
    [
        ("flux1", 4, 18, (4, 10, 17), (-0.0350056, -0.2968074, -0.1540584)),
        ("flux1", 18, 25, (18, 21, 24), (-0.0577552, -0.2003888, -0.1638821)),
        ("flux2", 8, 20, (8, 14, 19), (-0.0240330, -0.1583397, -0.1295455)),
        ("sd3", 4, 18, (4, 10, 17), (-0.0122331, -0.2471768, -0.1424272)),
        ("sd3", 18, 25, (18, 21, 24), (-0.0665539, -0.2245302, -0.2473775)),
    ],
)
def test_weights_are_those_of_the_papers(grid, start, stop, nodes, weights):
    sigmas = GRIDS[grid]
    assert leg_nodes(start, stop, 3) == nodes
    got = lagrange_weights([sigmas[q] for q in nodes], sigmas[start], sigmas[stop])
    np.testing.assert_allclose(got, weights, atol=2e-7)


@pytest.mark.parametrize(
    ("order", "count", "nodes"),
    [
        (3, 4, {0, 2, 3}), (3, 5, {0, 2, 4}), (3, 6, {0, 2, 5}), (3, 7, {0, 3, 6}), (3, 8, {0, 4, 7}),
        (3, 10, {0, 4, 9}), (3, 12, {0, 6, 11}), (3, 15, {0, 7, 14}), (3, 20, {0, 10, 19}), (3, 25, {0, 12, 24}),
        (4, 6, {0, 2, 3, 5}), (4, 8, {0, 2, 5, 7}), (4, 10, {0, 3, 6, 9}), (4, 25, {0, 8, 16, 24}), (1, 9, {0}),
    ],
)  # fmt: skip
def test_supports_are_those_of_the_papers(order, count, nodes):
    assert leg_nodes(5, 5 + count, order) == tuple(5 + q for q in sorted(nodes))


@pytest.mark.parametrize("grid", [*GRIDS, "linear"])
@pytest.mark.parametrize("order", range(1, 13))
def test_weights_are_exact_for_polynomials(grid, order):
    """Degree < order, in coordinates scaled to [-1, 1]; no better than rounding the weights allows, which are large
    where a high order extrapolates an uneven grid (sum of |w| up to 1e8)."""
    sigmas = GRIDS.get(grid) or linear_grid(25)
    for start, stop in itertools.combinations(range(0, 26, 3), 2):
        nodes = [sigmas[q] for q in leg_nodes(start, stop, order)]
        w = lagrange_weights(nodes, sigmas[start], sigmas[stop])
        center, half = (sigmas[start] + sigmas[stop]) / 2, (sigmas[start] - sigmas[stop]) / 2
        for degree in range(len(nodes)):
            values = ((np.array(nodes) - center) / half) ** degree
            exact = -half * (1 - (-1) ** (degree + 1)) / (degree + 1)
            tolerance = 1e-12 if order <= 5 or grid in ("linear", "flux1") else 1e-14 * np.abs(w).sum()
            assert abs(values @ w - exact) <= max(1e-12, tolerance)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("order", [3, 6, 9, 12])
def test_weights_equal_rational_arithmetic(grid, order):
    sigmas = [Fraction(s) for s in GRIDS[grid]]
    for start, stop in [(0, 25), (0, 13), (12, 25), (4, 20)]:
        nodes = leg_nodes(start, stop, order)
        exact = [exact_weight(q, list(nodes), sigmas, sigmas[start], sigmas[stop]) for q in nodes]
        got = lagrange_weights([GRIDS[grid][q] for q in nodes], GRIDS[grid][start], GRIDS[grid][stop])
        np.testing.assert_allclose(got, exact, rtol=0, atol=1e-12 * np.abs(exact).max())


@given(st.integers(0, 10_000), st.integers(1, 12), st.floats(0.1, 100), st.floats(-5, 5))
def test_weights_add_up_ignore_order_and_scale_with_sigma(seed, order, factor, shift):
    rng = np.random.default_rng(seed)
    points = (np.arange(order) + rng.uniform(0, 0.6, order)) / order
    w = lagrange_weights(points, 1.0, 0.0)
    size = np.abs(w).sum()
    assert w.sum() == pytest.approx(-1, abs=1e-12 * size)
    mixed = rng.permutation(order)
    np.testing.assert_allclose(lagrange_weights(points[mixed], 1.0, 0.0), w[mixed], atol=1e-11 * size)
    moved = lagrange_weights(factor * points + shift, factor + shift, shift)
    np.testing.assert_allclose(moved, factor * w, rtol=0, atol=1e-9 * size * factor)


def test_one_point_is_a_leap():
    assert lagrange_weights([0.7], 0.7, 0.2) == pytest.approx([-0.5])


@pytest.mark.parametrize("points", [[], [0.5, 0.5], list(np.linspace(0, 1, 13))])
def test_bad_points_are_refused(points):
    with pytest.raises(ValueError, match="lagrange_weights"):
        lagrange_weights(points, 1.0, 0.0)


def enumerated_inclusion(odds, count):
    """Sum of the probabilities of every ordered draw."""
    total = np.zeros(len(odds))
    for order in itertools.permutations(range(len(odds)), count):
        left, chance = sum(odds), 1.0
        for i in order:
            chance *= odds[i] / left
            left -= odds[i]
        total[list(order)] += chance
    return total


@pytest.mark.parametrize("bias", [0.0, 0.5, 2.0, 10.0])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_inclusion_equals_enumeration(bias, count):
    odds = [float(i + 1) ** bias for i in range(6)]
    np.testing.assert_allclose(inclusion_probabilities(odds, count), enumerated_inclusion(odds, count), rtol=1e-12)


@pytest.mark.parametrize(
    ("count", "bias", "first", "middle", "last", "mean"),
    [(3, 2, 0.000, 0.097, 0.317, 17.9), (4, 1, 0.013, 0.165, 0.291, 15.8)],
)
def test_inclusion_agrees_with_the_measured_table(count, bias, first, middle, last, mean):
    p = inclusion_probabilities([float(i + 1) ** bias for i in range(25)], count)
    assert p[[0, 12, 24]] == pytest.approx([first, middle, last], abs=0.006)
    assert p @ np.arange(25) / count == pytest.approx(mean, abs=0.05)
    assert p.sum() == pytest.approx(count, abs=1e-12)
    assert np.all(np.diff(p) > 0)


def test_race_draws_with_these_probabilities():
    rng = np.random.default_rng(0)
    odds, num = [(i + 1.0) ** 2 for i in range(10)], 20_000
    hits = np.zeros(10)
    for _ in range(num):
        drawn = draw_without_replacement(odds, 3, rng)
        assert list(drawn) == sorted(set(drawn))
        hits[list(drawn)] += 1
    p = inclusion_probabilities(odds, 3)
    assert np.all(np.abs(hits / num - p) < 4.5 * np.sqrt(p * (1 - p) / num) + 1e-9)


def test_race_for_nothing_or_everything_uses_no_random_numbers():
    rng = np.random.default_rng(0)
    assert draw_without_replacement([1.0, 2.0], 2, rng) == (0, 1)
    assert draw_without_replacement([1.0, 2.0], 0, rng) == ()
    assert inclusion_probabilities([1.0, 2.0], 0).tolist() == [0, 0]
    assert rng.random() == np.random.default_rng(0).random()


def test_race_refuses_more_than_there_is():
    with pytest.raises(ValueError, match="cannot draw 3 of 2"):
        draw_without_replacement([1.0, 2.0], 3, np.random.default_rng(0))
    with pytest.raises(ValueError, match="cannot draw 3 of 2"):
        inclusion_probabilities([1.0, 2.0], 3)


@pytest.mark.parametrize(
    ("ratio", "minimum", "start"),
    [(0.28, 1, 18), (0.56, 1, 11), (0.7, 3, 7), (1.0, 1, 0), (0.01, 3, 22), (1e-9, 1, 24)],
)
def test_tail_of_25_steps(ratio, minimum, start):
    assert tail_start(25, ratio, minimum) == start


@given(st.integers(1, 200), st.integers(1, 1000), st.sampled_from([1, 3]))
def test_tail_rounds_up_in_decimal(num_steps, thousandths, minimum):
    kept = num_steps - tail_start(num_steps, thousandths / 1000, minimum)
    assert kept == min(num_steps, max(minimum, math.ceil(num_steps * thousandths / 1000 - 1e-9)))


def test_linear_grid_needs_no_extrapolation_to_keep_its_sign():
    sigmas = linear_grid(25)
    for start, stop in itertools.combinations(range(26), 2):
        w = lagrange_weights([sigmas[q] for q in leg_nodes(start, stop, 3)], sigmas[start], sigmas[stop])
        assert np.all(w <= 1e-12)
