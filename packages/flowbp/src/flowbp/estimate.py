"""What a run needs, before it begins: memory by part, arithmetic.  No weight is read and no GPU is asked.

Networks are built from their JSON files.  One evaluation of the network, one swept step and one reward stage run on
torch's fake tensors, which have shapes and no content, and the storages that live at once are counted.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from flowbp import backbones
from flowbp.config import TrainConfig
from flowbp.guidance import guided
from flowbp.launch import Job, arithmetic, check
from flowbp.licences import licence
from flowbp.networks import blocks_of, prepare, quantise
from flowbp.train import Trainer, all_prompts, load_parts, losses_of, shares, trainable
from flowbp.types import Backbone, Cond, Reward, tile
from imgen_common.errors import UserError
from imgen_common.live import LiveBytes, allocate, held, nbytes

FLOAT = 4
"""Bytes of a float32: trained weights, gradients, moments, the average and the states between steps."""
EVALUATION = "evaluation"
SWITCHES = (
    *("model.gradient_checkpointing=true", "micro_batch_size=1", "reward_chunk=1", "eval.batch_size=1"),
    *("model.vae.gradient_checkpointing=true", "model.vae.slicing=true", "offload_trajectory=true"),
    *("model.dtype=bfloat16", "lora.rank=16", "chunk=1", "distributed.sync=step", "distributed.kind=fsdp2"),
)
"""Settings that may lower the peak."""


@dataclass(frozen=True)
class Traced:
    """Bytes that a piece of work held at once beyond what was there before, and its floating-point operations."""

    bytes: int
    flops: float


@dataclass(frozen=True)
class Estimate:
    """Of one process, in bytes.  lasting: what is there throughout the training.  passing: what each stage holds on
    top; they come one after the other.  before: the whole of the stage before the training.  host: kept states in the
    host's memory, counted nowhere else.  flops: of one update.
    untraced: rewards whose stage could not be traced, counted with their weights only.
    """

    lasting: dict[str, int]
    passing: dict[str, int]
    before: dict[str, int]
    host: int
    flops: float
    untraced: tuple[str, ...]

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return max(sum(self.before.values()), sum(self.lasting.values()) + max(self.passing.values()))

    @property
    def update_peak(self) -> int:
        """The most that an update holds: without evaluations, and without what comes before the training."""
        return sum(self.lasting.values()) + max(size for name, size in self.passing.items() if name != EVALUATION)


def estimate(job: Job) -> Estimate:
    """What each of the job's processes needs."""
    config, count = job.config, job.num_processes
    parts = Parts(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        parts.fake()
        sizes = Sizes.of(parts, config, count)
        share, micro = shares(config, count)
        stages, untraced = stages_of(parts, job, micro)
    state = micro * FLOAT * math.prod(parts.shape)
    kept = state * max(len(plan.keep.states) + len(plan.keep.velocities) for plan in job.plans)
    trajectory = 2 * state + (0 if config.offload_trajectory else kept)
    forwards = sum(plan.num_gradient_forwards for plan in job.plans) / len(job.plans)
    repeats = share // micro
    step_flops = stages["swept step"].flops / config.chunk
    flops = repeats * (config.num_steps * stages["rollout"].flops + forwards * step_flops + stages["reward"].flops)
    passing = {name: stage.bytes + trajectory + sizes.gathered for name, stage in stages.items()}
    passing["optimizer step"] = sizes.step
    # gradients are let go after every update: they are not there yet in the first rollout and reward stage
    for name in ("swept step", "optimizer step", *(("rollout", "reward") if repeats > 1 else ())):
        passing[name] += sizes.gradients
    return Estimate(
        lasting=sizes.lasting,
        passing=passing,
        host=kept if config.offload_trajectory else 0,
        before={"weights": sizes.lasting["frozen weights"] + sizes.lasting["trained weights"], **sizes.before},
        flops=flops,
        untraced=untraced,
    )


@dataclass(frozen=True)
class Advice:
    """Up to three settings that lower the peak most, what each alone and all together would make of it, in bytes."""

    alone: dict[str, int]
    together: int


def advise(config_of: Callable[[Sequence[str]], TrainConfig], count: int, peak: int) -> Advice | None:
    """What would lower a peak; None if nothing does.  config_of: the configuration with changes on top."""

    def peak_with(*changes: str) -> int:
        try:
            return estimate(check(config_of(changes), count, here=False)).peak
        except UserError:  # a change that does not go with the rest
            return peak

    lowered = {change: found for change in SWITCHES if (found := peak_with(change)) < peak}
    best = dict(sorted(lowered.items(), key=lambda item: item[1])[:3])
    return Advice(best, peak_with(*best)) if best else None


def measure(config: TrainConfig, device: torch.device) -> tuple[int, float]:
    """As `measured`, of a run with real weights."""
    return measured(Trainer(config, load_parts(config, device), Accelerator(cpu=device.type == "cpu")))


def measured(trainer: Trainer) -> tuple[int, float]:
    """(most bytes held, seconds) of real updates: the second one, after AdamW made its moments.

    On a GPU as its allocator counts them, on a CPU as storages that live.
    """
    config, parts, device = trainer.config, trainer.parts, trainer.accelerator.device
    first = all_prompts(trainer)[: 2 * config.batch_size]
    if config.data.embeddings != "live":
        parts.conditions.add([*first, ""])
        parts.backbone.free_text()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        trainer.step()
        seconds = trainer.step()["seconds"]
        return torch.cuda.max_memory_allocated(device), seconds
    known = [*networks_held(trainer), *trainer.weights.state()["average"].values()]
    with LiveBytes(known) as live:
        trainer.step()
        seconds = trainer.step()["seconds"]
    return nbytes(known) + live.peak, seconds


def networks_held(trainer: Trainer) -> list[Tensor]:
    """All weights and buffers of a trainer's networks."""
    rewards = [m for reward in trainer.parts.rewards.values() for m in modules_of(reward)]
    networks = [part for part in trainer.parts.backbone.pipe.components.values() if isinstance(part, nn.Module)]
    return held((*networks, *rewards))


class Parts:
    """The networks of a run without content, on the device that is planned for."""

    def __init__(self, config: TrainConfig) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.backbone: Backbone = backbones.told(
            backbones.skeleton(config.model.ref), config.model.ref, config.model.embedded_guidance
        )
        self.backbone.bfloat16 = config.model.dtype == "bfloat16"
        low = self.backbone.bfloat16 and config.lora is not None
        components = self.backbone.pipe.components.items()
        self.modules = {name: part for name, part in components if isinstance(part, nn.Module)}
        for part in self.modules.values():
            part.to(torch.bfloat16 if low else torch.float32).requires_grad_(False).eval()
        # kernels of attention differ in time, not in what they hold, and may not be installed where a run is planned
        prepare(self.backbone, config.model.model_copy(update={"attention": None}))
        if config.model.quantization is not None:
            quantise(self.backbone.net)
        trainable(self.backbone.net, config)
        self.rewards: dict[str, Reward] = {scorer.name: scorer.load("meta") for scorer in config.scorers}
        self.shape = self.backbone.latent_shape((config.model.height, config.model.width))

    def fake(self) -> None:
        """Gives every network its fake tensors, and gradients to what is trained; within a fake mode."""
        for part in self.networks():
            allocate(part, self.device)
        self.trained = [p for p in self.backbone.net.parameters() if p.requires_grad]
        for p in self.trained:
            p.grad = torch.zeros_like(p)
        self.cond = self.backbone.encode(["a picture"])

    def networks(self) -> list[nn.Module]:
        """Everything that has weights."""
        return [*self.modules.values(), *(m for reward in self.rewards.values() for m in modules_of(reward))]

    def conditions(self, batch: int) -> tuple[Cond, Cond]:
        """As `Conditions` gives them."""
        return tile(self.cond, batch), self.cond


def modules_of(part: Any) -> Iterator[nn.Module]:
    """The networks that a reward is made of."""
    for value in vars(part).values():
        if isinstance(value, nn.Module):
            yield value
        elif type(value).__module__.startswith("flowbp.rewards"):
            yield from modules_of(value)


@dataclass(frozen=True)
class Sizes:
    """What follows from numbers of weights alone.  gathered: what a sharded network brings together at a time; step:
    what adding gradients up and AdamW hold in passing."""

    lasting: dict[str, int]
    before: dict[str, int]
    gradients: int
    gathered: int
    step: int

    @classmethod
    def of(cls, parts: Parts, config: TrainConfig, count: int) -> "Sizes":
        """Of one of `count` processes."""
        net, kind, once = parts.backbone.net, config.distributed.kind, config.distributed.sync == "update"
        number = sum(p.numel() for p in parts.trained)
        frozen = nbytes(net.parameters()) - FLOAT * number + nbytes(net.buffers())
        split_weights = count if kind in ("fsdp2", "zero3") else 1
        split_rest = count if kind != "ddp" else 1
        texts = nbytes(held(m for name, m in parts.modules.items() if "text" in name))
        others = nbytes(held(m for name, m in parts.modules.items() if "text" not in name and m is not net))
        lasting = {
            "frozen weights": frozen // split_weights,
            "trained weights": FLOAT * number // split_weights,
            "AdamW": 2 * FLOAT * number // split_rest,
            "average": FLOAT * number // (1 if kind == "zero2" else split_rest),
            "autoencoder": others,
            "rewards": nbytes(held(m for reward in parts.rewards.values() for m in modules_of(reward))),
            "text encoders": texts if config.data.embeddings == "live" else 0,
        }
        largest = max(nbytes(block.parameters()) for block in blocks_of(net))
        local = FLOAT * number // split_rest
        reduced = FLOAT * number if kind == "ddp" and count > 1 else 0
        before = {"autoencoder": others, "rewards": lasting["rewards"], "average": lasting["average"]}
        before["text encoders"] = texts
        gradients = FLOAT * number // (1 if once else split_rest)
        return cls(lasting, before, gradients, 2 * largest if split_weights > 1 else 0, max(local, reduced))


def stages_of(parts: Parts, job: Job, micro: int) -> tuple[dict[str, Traced], tuple[str, ...]]:
    """The stages of an update and of an evaluation, and rewards that could not be traced."""
    config = job.config
    coupled = any(term.coupling for plan in job.plans for term in plan.terms)
    found = {
        "rollout": traced(partial(forward, parts, config, micro), parts),
        "swept step": traced(partial(swept, parts, config, micro * config.chunk, coupled), parts),
    }
    rows = min(config.reward_chunk or micro, micro)
    known, untraced = [], []
    for reward in config.rewards:
        try:
            known.append(traced(partial(rewarded, parts, reward, rows), parts))
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException):
            untraced.append(reward.name)
    found["reward"] = Traced(max((t.bytes for t in known), default=0), sum(t.flops for t in known) * micro / rows)
    batch = min(config.eval.batch_size, config.eval.num_prompts)
    found[EVALUATION] = traced(partial(evaluated, parts, config, batch), parts)
    return found, tuple(untraced)


def traced(work: Callable[[], object], parts: Parts) -> Traced:
    """What `work` needs beyond the weights and gradients that are there."""
    live = LiveBytes((*held(parts.networks()), *(p.grad for p in parts.trained if p.grad is not None)))
    with live:
        work()
    return Traced(live.peak, float(live.flops))


def forward(parts: Parts, config: TrainConfig, batch: int) -> Tensor:
    """One evaluation of the rollout."""
    velocity = guided(parts.backbone.velocity, *parts.conditions(batch), config.guidance)
    x = torch.empty(batch, *parts.shape, device=parts.device)
    with torch.no_grad():
        return velocity(x, torch.empty(batch, device=parts.device))


def swept(parts: Parts, config: TrainConfig, batch: int, coupled: bool) -> None:
    """One step with gradient."""
    velocity = guided(parts.backbone.velocity, *parts.conditions(batch), config.guidance)
    x = torch.empty(batch, *parts.shape, device=parts.device, requires_grad=coupled)
    v = velocity(x, torch.empty(batch, device=parts.device))
    torch.autograd.backward(v, torch.empty_like(v))


def rewarded(parts: Parts, reward: Any, batch: int) -> None:
    """Decoding, one reward, and the gradient at the sample."""
    x = torch.empty(batch, *parts.shape, device=parts.device, requires_grad=True)
    scores = parts.rewards[reward.name](parts.backbone.decode(x), ["a picture"] * batch)
    torch.autograd.grad(losses_of(reward.loss, scores).sum(), x)


def evaluated(parts: Parts, config: TrainConfig, batch: int) -> None:
    """One step of an evaluation, then its pictures; rewards hold less than that."""
    forward(parts, config, batch)
    x = torch.empty(batch, *parts.shape, device=parts.device)
    with torch.no_grad():
        parts.backbone.decode(x)


# --- telling ---------------------------------------------------------------------------------------------------------

UNITS = {"": 1, "MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30}


def size_of(text: str) -> int:
    """Bytes of `24GiB`, `80GB` or a plain number.  Raises UserError for anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(MB|MiB|GB|GiB)?", text)
    if match is None or not float(match[1]):
        raise UserError(f"--memory {text}: give a number of bytes, or one with a unit, such as 24GiB or 80GB")
    return int(float(match[1]) * UNITS[match[2] or ""])


def as_json(
    job: Job,
    found: Estimate,
    tflops: float,
    limit: int | None,
    advice: Advice | None,
    measured: tuple[int, float] | None,
) -> dict[str, Any]:
    """Everything that `flowbp plan` says: bytes, seconds, operations."""
    config = job.config
    checkpoint = arithmetic(job)["checkpoint_bytes"]
    refs = [config.model.ref, *(scorer.ref for scorer in config.scorers)]
    content: dict[str, Any] = {
        "processes": job.num_processes,
        "lasting": found.lasting,
        "passing": found.passing,
        "before": found.before,
        "host": found.host,
        "peak": found.peak,
        "untraced": list(found.untraced),
        "counted_for": "cuda" if torch.cuda.is_available() else "cpu",
        "tflop_per_update": found.flops / 1e12,
        "tflops": tflops,
        "seconds_per_update": found.flops / 1e12 / tflops,
        "updates": config.num_updates,
        "disk": checkpoint * (config.checkpoint.keep + 1),
        "licences": {ref: licence(ref) for ref in dict.fromkeys(refs)},
    }
    if limit is not None:
        content |= {"memory": limit, "fits": found.peak <= limit}
    if advice is not None:
        content["advice"] = {"alone": advice.alone, "together": advice.together}
    if measured is not None:
        content["measured"] = {"peak": measured[0], "estimated": found.update_peak, "seconds_per_update": measured[1]}
    return content
