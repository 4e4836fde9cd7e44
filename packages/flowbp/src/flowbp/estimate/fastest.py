"""The fastest setting that fits into a memory, over what is kept and what is computed again."""

import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from flowbp.config import Recompute, TrainConfig
from flowbp.estimate.memory import Estimate, TracedRun, estimate_traced
from flowbp.training.preflight import check_run
from imgen_common.errors import UserError

SELECTIVE_TIME = 1.03
"""Time of an update that recomputes selectively, which repeats none of the counted operations, by that of one that
keeps all: an assumption for large blocks, whose time is on the device.  In small ones its bookkeeping takes longer."""


@dataclass(frozen=True)
class Fastest:
    """The fastest setting that fits: what to set, its peak in bytes, and its time by that of the configuration as it
    is."""

    settings: tuple[str, ...]
    peak: int
    relative: float


def fastest_that_fits(
    config_of: Callable[[Sequence[str]], TrainConfig],
    count: int,
    limit: int,
    base: Estimate,
    on_progress: Callable[[str], object] = lambda text: None,
) -> Fastest | None:
    """The fastest of all values of `model.recompute` and `keep_graphs` whose peak is at most `limit` bytes, or None.

    config_of: the configuration with changes on top; base: its estimate without.  on_progress: called with what is
    tried.  Time is taken to be proportional to operations.
    """

    estimate = _trial(config_of, count, on_progress)
    most = max(len(plan.terms) for plan in check_run(config_of(()), count, estimate_only=True).plans)
    fitting: dict[tuple[str, str], tuple[float, int]] = {}
    for how in typing.get_args(Recompute):
        if how == "all" and any("model.recompute=none" in settings for settings in fitting):
            break  # it repeats every evaluation that carries gradient, as `none` does which keeps no graph
        try:
            kept, found = _keep_most(partial(estimate, how), most, limit)
        except UserError:  # graphs or this recomputing do not go with the rest
            if how == "selective":
                continue
            kept, found = 0, estimate(how, 0)
        if found.peak <= limit:
            fitting[f"model.recompute={how}", f"keep_graphs={kept}"] = _time(how, found), found.peak
            if kept == most:
                break  # whatever computes more again is slower
    if not fitting:
        return None
    settings, (seconds, peak) = min(fitting.items(), key=lambda one: one[1][0])
    return Fastest(settings, peak, seconds / _time(config_of(()).model.recompute, base))


def _trial(
    config_of: Callable[[Sequence[str]], TrainConfig], count: int, on_progress: Callable[[str], object]
) -> Callable[[str, int], Estimate]:
    """The estimate for a `model.recompute` and a number of kept graphs, traced once for each `model.recompute`."""
    traced: dict[str, TracedRun] = {}

    def estimate(how: str, kept: int) -> Estimate:
        changes = (f"model.recompute={how}", f"keep_graphs={kept}")
        on_progress(f"trying {' '.join(changes)} ...")
        job = check_run(config_of(changes), count, estimate_only=True)
        if how not in traced:  # first with all graphs, where they go with the rest
            traced[how] = TracedRun.of(job)
        return estimate_traced(job, traced[how])

    return estimate


def _time(how: str, found: Estimate) -> float:
    return found.flops * (SELECTIVE_TIME if how == "selective" else 1)


def _keep_most(estimate: Callable[[int], Estimate], most: int, limit: int) -> tuple[int, Estimate]:
    """The largest number of kept graphs, up to `most`, with which the peak is at most `limit`, or 0; its estimate."""
    kept, found = most, estimate(most)
    while found.peak > limit and kept > 0:
        # a peak with graphs falls by one graph with each that is not kept
        kept = max(0, kept + (limit - found.peak) // found.kept_graph)
        found = estimate(kept)
    return kept, found
