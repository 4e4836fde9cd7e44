"""What the seconds of an update go to, and how many operations it computes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from flowbp.core.plan import Plan
from flowbp.core.types import Velocity
from imgen_common.devices import PEAK_TFLOPS, find_card
from imgen_common.memory import FlopCounter

STAGES = ("data", "rollout", "decoder", "reward", "sweep", "optimizer")
"""data: prompts, noise and embeddings.  rollout: its evaluations, those whose graph is kept too, and those of renoised
copies without gradient.  decoder, reward: forward and backward.  sweep: other evaluations with gradient, all backward
passes, and a regulariser's base.  optimizer: with the sum of the gradients over the processes."""


class StageClock:
    """Seconds of an update by stage, and its floating-point operations.

    On a GPU events are put into its queue where a stage begins, and read once the update is done, so nothing waits.
    Operations are counted in the first update: those of later ones follow from the numbers of evaluations of their
    plans.  Recomputed activations do not count.
    """

    def __init__(self, device: torch.device, *, counts: bool) -> None:
        """counts: whether operations are counted, which an update of compiled blocks does not show."""
        self.device, self.counts = device, counts
        card = find_card(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.peak_tflops = None if card is None else PEAK_TFLOPS[card]
        self._marks: list[tuple[str, float | torch.cuda.Event, int]] = []
        self._counter: FlopCounter | None = None
        self._costs: dict[str, float] | None = None

    @contextmanager
    def update(self) -> Iterator[None]:
        """Around an update, which begins with its data."""
        self._marks.clear()
        if not self.counts or self._costs is not None:
            self.switch("data")
            yield
        else:
            with FlopCounter() as self._counter:
                self.switch("data")
                yield

    def switch(self, stage: str) -> None:
        """The stage before ends, and this one begins."""
        if not self._marks or self._marks[-1][0] != stage:
            done = 0 if self._counter is None else self._counter.flops - self._counter.recomputed
            self._marks.append((stage, self._now(), done))

    def switch_at_gradient(self, tensor: Tensor, stage: str) -> None:
        """The stage begins when a backward pass reaches the tensor."""
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: self.switch(stage))

    def timed(self, velocity: Velocity, with_gradient: str = "sweep") -> Velocity:
        """The velocity, of the stage `rollout` without gradient and of another one with it.  Its backward pass is of
        the stage `sweep`."""

        def call(x: Tensor, sigma: Tensor) -> Tensor:
            self.switch(with_gradient if torch.is_grad_enabled() else "rollout")
            v = velocity(x, sigma)
            self.switch_at_gradient(v, "sweep")
            return v

        return call

    def _now(self) -> "float | torch.cuda.Event":
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def metrics(self, plan: Plan, seconds: float) -> dict[str, float]:
        """Of the update of this plan that has just been made, in so many seconds: seconds by stage, `tflops`, the
        TFLOP/s of this process, and `mfu`, their part of the GPU's dense bfloat16 peak where that is known."""
        self.switch("end")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        spent, flops = dict.fromkeys(STAGES, 0.0), dict.fromkeys(STAGES, 0.0)
        for (stage, start, before), (_, stop, after) in pairwise(self._marks):
            spent[stage] += _seconds_between(start, stop)
            flops[stage] += after - before
        found = {f"seconds_{stage}": value for stage, value in spent.items()}
        evaluations = {"rollout": plan.num_plain_forwards, "sweep": plan.num_gradient_forwards}
        if self._counter is not None:
            self._costs = {stage: value / evaluations.get(stage, 1) for stage, value in flops.items()}
            self._counter = None
        if self._costs is not None:
            total = sum(cost * evaluations.get(stage, 1) for stage, cost in self._costs.items())
            found["tflops"] = total / seconds / 1e12
            if self.peak_tflops is not None:
                found["mfu"] = found["tflops"] / self.peak_tflops
        return found


def _seconds_between(start: "float | torch.cuda.Event", stop: "float | torch.cuda.Event") -> float:
    if isinstance(start, float) and isinstance(stop, float):
        return stop - start
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(stop, torch.cuda.Event)
    return start.elapsed_time(stop) / 1000
