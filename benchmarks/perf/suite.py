"""The ratios of this project, each measured side by side on the miniature or a tiny model.

Two variants of one computation run in turns, on one thread.  Time is the CPU time of the process, because the machine
may be shared; a ratio is the median over repeats of first / second.  Memory is the peak of live tensor bytes above the
weights, which does not depend on the machine; it cannot be counted where models work on threads of their own.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.common import time_call
from benchmarks.perf.stories import NUM_STORIES, make_batches
from benchmarks.perf.sweep_memory import BackwardPass, Sizes
from flowbp.config import TrainConfig
from flowbp.core.engine import rollout, sweep
from flowbp.core.plan import Plan, draw_plan
from flowbp.core.types import Reward
from flowbp.estimate import network_tensors
from flowbp.rewards import RewardConfig
from flowbp.training.loading import load_models
from flowbp.training.trainer import Trainer
from imgen_common.config import load
from imgen_common.memory import LiveBytes
from imgen_common.streams import normal, numpy_generator

Call = Callable[[], object]
SETTING = (
    *("method=flowbp_sparse", "method.active.num_active_steps=4", "num_inference_steps=12", "total_batch_size=4"),
    *("heldout=[]", "seed=0"),
)
"""Of every update of the miniature."""
SCALE = 3.5
"""Guidance scale where there is guidance."""


@dataclass(frozen=True)
class Case:
    """Two variants of one computation; `make` prepares both as calls, and the tensors that are there before, or None
    where bytes cannot be counted."""

    name: str
    first: str
    second: str
    make: Callable[[torch.device], tuple[Call, Call, Sequence[Tensor] | None]]


@dataclass(frozen=True)
class Ratio:
    """Medians of seconds of both variants, median of first / second, and the same of live bytes."""

    name: str
    first: str
    second: str
    first_seconds: float
    second_seconds: float
    time: float
    memory: float | None


# Cases ----------------------------------------------------------------------------------------------------------------


def make_trainer(device: torch.device, *sets: str) -> Trainer:
    """A trainer of the miniature, its prompts embedded where the configuration keeps them."""
    config = load(TrainConfig, [], [*SETTING, *sets])
    trainer = Trainer(config, load_models(config, device), Accelerator(cpu=device.type == "cpu"))
    if config.data.embeddings != "live":
        trainer.embed_prompts(trainer.training_prompts())
    return trainer


def make_updates(first: Sequence[str], second: Sequence[str], device: torch.device) -> tuple[Call, Call, list[Tensor]]:
    """The gradient of an update of the miniature with either settings."""
    trainers = [make_trainer(device, *sets) for sets in (first, second)]

    def compute(trainer: Trainer) -> None:
        trainer.compute_gradient()
        trainer.models.backbone.net.zero_grad(set_to_none=True)

    known = [tensor for trainer in trainers for tensor in network_tensors(trainer)]
    return partial(compute, trainers[0]), partial(compute, trainers[1]), known


def make_guided_sweeps(device: torch.device) -> tuple[Call, Call, list[Tensor]]:
    """The sweep alone, without the detached negative branch and with it."""
    trainer = make_trainer(device, f"guidance_scale={SCALE}")
    plan, x_0, conds = _inputs(trainer)
    velocity = trainer._velocity(conds)
    positive = trainer._velocity(conds, gradient_only=True)
    trajectory = rollout(velocity, x_0, trainer.sigmas, plan.rollout_spec)
    cotangent = normal(x_0.shape, 0, "cotangent").to(device)

    def pull(given: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        sweep(plan, trajectory, velocity, cotangent, gradient_velocity=given)
        trainer.models.backbone.net.zero_grad(set_to_none=True)

    return partial(pull, positive), partial(pull, None), network_tensors(trainer)


def make_rollouts(device: torch.device) -> tuple[Call, Call, list[Tensor]]:
    """The guided rollout, both branches in one batch and one after the other."""
    calls, known = [], []
    for batched in ("true", "false"):
        trainer = make_trainer(device, f"guidance_scale={SCALE}", f"guidance.batched={batched}")
        plan, x_0, conds = _inputs(trainer)
        calls.append(partial(rollout, trainer._velocity(conds), x_0, trainer.sigmas, plan.rollout_spec))
        known += network_tensors(trainer)
    return calls[0], calls[1], known


def make_executors(device: torch.device) -> tuple[Call, Call, list[Tensor]]:
    """The backward pass of a tiny random network, by the sweep and by the papers' joint graph."""
    update = BackwardPass(Sizes(num_steps=12, tokens=256), device)
    calls = [update.prepare(executor, 4) for executor in ("sweep", "joint")]

    def clear_after(call: Call) -> None:
        call()
        update.clear_gradients()

    return partial(clear_after, calls[0]), partial(clear_after, calls[1]), list(update.net.parameters())


def _inputs(trainer: Trainer) -> tuple[Plan, Tensor, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    plan = draw_plan(trainer.config.method, trainer.sigmas, numpy_generator(0, "plan", trainer.update))
    count = trainer.config.total_batch_size
    prompts, x_0 = trainer._samples(range(trainer.update * count, (trainer.update + 1) * count))
    positive, negative = trainer.models.embeddings(prompts)
    return plan, x_0, (dict(positive), dict(negative))


BFLOAT16 = "model.dtype=bfloat16"
GUIDED = f"guidance_scale={SCALE}"
CASES = (
    Case("backward pass, K = 4", "sweep", "joint graph", make_executors),
    Case(f"guided sweep, scale {SCALE}", "without the negative", "with it", make_guided_sweeps),
    Case(f"guided rollout, scale {SCALE}", "one batch", "two forwards", make_rollouts),
    Case("update, text", "cached", "live", partial(make_updates, [], ["data.embeddings=live"])),
    Case("update", "4 graphs kept", "evaluated again", partial(make_updates, ["keep_graphs=4"], [])),
    Case("guided update", "4 graphs kept", "again", partial(make_updates, [GUIDED, "keep_graphs=4"], [GUIDED])),
    Case("update", "recompute selective", "none", partial(make_updates, ["model.recompute=selective"], [])),
    Case("update", "recompute all", "none", partial(make_updates, ["model.recompute=all"], [])),
    Case(
        "update in bfloat16",
        "working copy",
        "cast each time",
        partial(make_updates, [BFLOAT16], [BFLOAT16, "model.working_copy=false"]),
    ),
    Case(f"{NUM_STORIES} stories of interleave", "all at once", "one after another", make_batches),
)


# Measuring ------------------------------------------------------------------------------------------------------------


def measure(case: Case, device: torch.device, repeats: int) -> Ratio:
    """One case: each variant once to warm up and count its bytes, then both in turns."""
    *calls, known = case.make(device)
    peaks, seconds = [], []
    for call in calls:
        call()
        if known is not None:
            with LiveBytes(known) as live:
                call()
            peaks.append(live.peak)
    for repeat in range(repeats):
        order = (0, 1) if repeat % 2 else (1, 0)
        found = {i: time_call(calls[i], device) for i in order}
        seconds.append((found[0], found[1]))
    first, second = (statistics.median(column) for column in zip(*seconds, strict=True))
    ratio = statistics.median(a / b for a, b in seconds)
    memory = peaks[0] / peaks[1] if peaks else None
    return Ratio(case.name, case.first, case.second, first, second, ratio, memory)


# Precision ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Precision:
    """What a lower precision changes: error, the root mean square difference of values by their standard deviation over
    images; cosine and norm of the gradient against float32's; the least of several cosines, of which it is the mean."""

    what: str
    error: float
    cosine: float
    norm: float
    least: float | None = None


def compare_precisions(device: torch.device, count: int = 32) -> list[Precision]:
    """The rewards and the autoencoder of the miniature in bfloat16 against float32, on images of the base model."""
    trainer = make_trainer(device, f"total_batch_size={count}")
    plan, x_0, conds = _inputs(trainer)
    prompts, _ = trainer._samples(range(count))
    backbone = trainer.models.backbone
    x = rollout(trainer._velocity(conds), x_0, trainer.sigmas, plan.rollout_spec).x_end
    images = backbone.decode(x).detach()
    scored: Reward = RewardConfig(ref="builtin:shapes/reward").load(device)

    def value_and_gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
        leaf = at.detach().clone().requires_grad_()
        value = function(leaf)
        total = value if value.dim() == 1 else scored(value.float(), prompts)
        return value.detach().float(), torch.autograd.grad(total.sum(), leaf)[0]

    rows = []
    for ref in ("builtin:shapes/reward", "builtin:shapes/heldout"):
        found = []
        for dtype in ("float32", "bfloat16"):
            reward = RewardConfig.model_validate({"ref": ref, "dtype": dtype}).load(device)
            found.append(value_and_gradient(partial(reward, prompts=prompts), images))
        rows.append(_difference(f"score of {ref.removeprefix('builtin:')} in bfloat16", *found))
    exact = value_and_gradient(backbone.decode, x)
    backbone.pipe.vae.to(torch.bfloat16)
    rows.append(_difference("images of the autoencoder in bfloat16", exact, value_and_gradient(backbone.decode, x)))
    return rows


def compare_rollouts(device: torch.device, count: int = 16, num_updates: int = 8) -> list[Precision]:
    """Rollouts of the miniature in lower precisions against float32: their images, and the gradients of updates.

    All weights are trained; the sweep stays in float32.  Means over updates of the same weights with other prompts and
    noise, since gradients differ much in how they bear a change of the images.
    """

    def outcomes(dtype: str) -> Iterator[tuple[Tensor, Tensor]]:
        trainer = make_trainer(device, f"total_batch_size={count}", f"rollout.dtype={dtype}")
        for update in range(num_updates):
            trainer.update = update
            trainer.models.backbone.net.zero_grad(set_to_none=True)
            trainer.compute_gradient()
            gradients = [p.grad.flatten() for p in trainer.models.parameters.values() if p.grad is not None]
            plan, x_0, conds = _inputs(trainer)
            x_end = rollout(trainer._rollout_velocity(conds), x_0, trainer.sigmas, plan.rollout_spec).x_end
            with torch.no_grad():
                yield trainer.models.backbone.decode(x_end), torch.cat(gradients)

    exact, rows = list(outcomes("null")), []
    for dtype in ("bfloat16", "fp8"):
        what = f"rollouts in {dtype}, {num_updates} updates"
        found = [_difference(what, *pair) for pair in zip(exact, outcomes(dtype), strict=True)]
        error, cosine, norm = (
            statistics.fmean(getattr(one, name) for one in found) for name in ("error", "cosine", "norm")
        )
        rows.append(Precision(what, error, cosine, norm, min(one.cosine for one in found)))
    return rows


def _difference(what: str, exact: tuple[Tensor, Tensor], rounded: tuple[Tensor, Tensor]) -> Precision:
    (value, gradient), (other, slope) = exact, rounded
    error = ((other - value).square().mean().sqrt() / value.std(0).square().mean().sqrt()).item()
    cosine = torch.cosine_similarity(gradient.double().flatten(), slope.double().flatten(), dim=0).item()
    return Precision(what, error, cosine, (slope.norm() / gradient.norm()).item())
