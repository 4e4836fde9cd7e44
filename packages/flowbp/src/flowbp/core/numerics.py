"""Pure numerics behind the axes: quadrature weights, draws without replacement, their probabilities, the tail."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

MAX_ORDER = 12


def lagrange_weights(points: Sequence[float] | NDArray[np.float64], start: float, stop: float) -> NDArray[np.float64]:
    """Integrals over [start, stop] of the Lagrange basis on `points`:  w_i = integral of l_i(s) ds.

    Exact for velocities polynomial in sigma of degree < len(points).  Units: sigma (1 noise, 0 clean).
    points: distinct noise levels, shape (n,), in any order.  Returns shape (n,), float64; sum(w) = stop - start.
    Computed on [-1, 1] with l_i as a product of ratios and Gauss-Legendre nodes: expanding l_i in powers of raw sigma
    loses every digit at order 12.
    Raises ValueError if two points coincide or there are none or more than 12.
    Source: FlowBP, arXiv 2606.11075, FlowBP-Lagrange.
    """
    nodes = np.asarray(points, dtype=np.float64)
    if not 1 <= nodes.size <= MAX_ORDER:
        raise ValueError(f"lagrange_weights takes 1 to {MAX_ORDER} points, got {nodes.size}")
    if np.unique(nodes).size != nodes.size:
        raise ValueError(f"lagrange_weights needs distinct points, got {list(points)}")
    low = min(nodes.min(), start, stop)
    half = (max(nodes.max(), start, stop) - low) / 2 or 1.0

    def scaled(value: float | NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray((value - low) / half - 1)

    abscissae, quadrature = np.polynomial.legendre.leggauss(nodes.size // 2 + 1)
    lower, upper = scaled(start), scaled(stop)
    at = lower + (upper - lower) * (abscissae + 1) / 2
    basis = _lagrange_basis(scaled(nodes), at)
    return np.asarray((stop - start) / 2 * (basis @ quadrature))


def _lagrange_basis(nodes: NDArray[np.float64], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """l_i(s) = product over q != i of (s - x_q) / (x_i - x_q); shape (len(nodes), len(at))."""
    others = ~np.eye(nodes.size, dtype=bool)
    spread = np.where(others, nodes[:, None] - nodes[None, :], 1.0)
    distance = np.where(others[:, :, None], at[None, None, :] - nodes[None, :, None], 1.0)
    return np.asarray((distance / spread[:, :, None]).prod(axis=1))


def tail_start(num_steps: int, ratio: float, minimum: int = 1) -> int:
    """First step of the tail window [a, N):  a = N - min(N, max(minimum, ceil(N * ratio))).

    ratio: share of the N steps counted from the clean end, in (0, 1], read as the decimal it was written as, so that
    0.28 of 25 steps is 7 (binary floats give 8).  minimum: fewest steps the window may hold (3 where two steps are
    drawn inside it).
    """
    share = Fraction(repr(float(ratio)))
    return num_steps - min(num_steps, max(minimum, math.ceil(num_steps * share)))


def draw_without_replacement(odds: Sequence[float], count: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Positions of `count` draws without replacement, each draw proportional to the remaining odds, ascending.

    An exponential race: the `count` smallest of independent Exp(odds_i) times have exactly that distribution.
    Uses no random numbers when nothing or everything is taken.
    Raises ValueError unless 0 <= count <= len(odds).
    """
    _check_count(odds, count)
    if count in (0, len(odds)):
        return tuple(range(count))
    times = rng.exponential(size=len(odds)) / np.asarray(odds, dtype=np.float64)
    return tuple(sorted(int(i) for i in np.argsort(times)[:count]))


def inclusion_probabilities(odds: Sequence[float], count: int) -> NDArray[np.float64]:
    """Probability of each position to be drawn by `draw_without_replacement`:

        pi_i = integral over t > 0 of w_i exp(-w_i t) P(fewer than `count` of the others finished before t) dt

    The count of others is Poisson-binomial, built by recursion; all terms are positive, so nothing cancels.
    The integral runs over log t, where the trapezoidal rule converges geometrically (absolute error < 1e-13).
    odds: positive, shape (n,).  Returns shape (n,), sum = count.  Closed forms where there are any: nothing or
    everything taken, a single draw, equal odds.  Raises ValueError unless 0 <= count <= len(odds).
    """
    _check_count(odds, count)
    w = np.asarray(odds, dtype=np.float64)
    if count in (0, w.size):
        return np.full_like(w, count > 0)
    if count == 1:
        return np.asarray(w / w.sum())
    if np.all(w == w[0]):
        return np.full_like(w, count / w.size)
    w = w / w.max()
    step = 0.125
    log_t = np.arange(math.log(1e-15), math.log(40.0 / w.min()), step)
    waits = w[:, None] * np.exp(log_t)[None, :]
    density = waits * np.exp(-waits)
    return np.asarray((density * _others_below(waits, count)).sum(axis=1) * step)


def _check_count(odds: Sequence[float], count: int) -> None:
    if not 0 <= count <= len(odds):
        raise ValueError(f"cannot draw {count} of {len(odds)}")


def _others_below(waits: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """P(fewer than `count` of the racers other than i have finished), for each racer i and time; shape of `waits`."""
    n, num_times = waits.shape
    finished = -np.expm1(-waits)
    tally = np.zeros((count, n, num_times))
    tally[0] = 1.0
    for racer in range(n):
        chance = np.broadcast_to(finished[racer], (n, num_times)).copy()
        chance[racer] = 0.0
        moved = tally[:-1] * chance
        tally *= 1 - chance
        tally[1:] += moved
    return np.asarray(tally.sum(axis=0))
