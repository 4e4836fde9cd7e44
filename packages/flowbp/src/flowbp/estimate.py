"""What a run needs, before it begins: memory by part, operations, disk.  No weight is read and no GPU is needed.

Networks are built from their JSON files.  One evaluation of the network, one swept step and one reward stage run on
torch's fake tensors, which have shapes and no content, and the storages that are alive at once are counted.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from flowbp.backbones.licenses import license_of
from flowbp.backbones.loading import mark_trainable
from flowbp.backbones.options import apply_model_options, blocks_of, quantize
from flowbp.backbones.pipelines import text_encoder_names
from flowbp.config import TrainConfig, TrainedReward
from flowbp.core.guidance import guided_velocity
from flowbp.core.types import Backbone, Reward, Velocity, repeat_batch
from flowbp.training.loading import load_models
from flowbp.training.preflight import CheckedRun, batch_sizes, check_run, update_arithmetic
from flowbp.training.trainer import Trainer, reward_losses
from imgen_common.errors import UserError
from imgen_common.memory import LiveBytes, allocate, held, nbytes

FLOAT32_BYTES = 4
"""Of trained weights, gradients, moments, their average and the states between steps."""
EVALUATION = "evaluation"
SWITCHES = (
    *("model.gradient_checkpointing=true", "per_device_batch_size=1", "reward_batch_size=1", "eval.batch_size=1"),
    *("model.vae.gradient_checkpointing=true", "model.vae.slicing=true", "offload_trajectory=true"),
    *("model.dtype=bfloat16", "lora.rank=16", "active_steps_per_forward=1"),
    *("distributed.sync=step", "distributed.kind=fsdp2"),
)
"""Settings that may lower the peak."""
UNTRACEABLE = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
"""What fake tensors raise where an operation needs content, or its shape depends on content."""


@dataclass(frozen=True)
class Estimate:
    """Memory of one process in bytes, and operations of one update.

    static: by part, what is there throughout the training.  activation: by stage, what it holds on top; stages come
    one after the other.  startup: by part, what is there before the training.  host: kept states in the host's memory,
    in no other sum.  flops: of one update.  untraced: rewards whose stage could not be traced: of those only the
    weights are in the sums.
    """

    static: dict[str, int]
    activation: dict[str, int]
    startup: dict[str, int]
    host: int
    flops: float
    untraced: tuple[str, ...]

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return max(sum(self.startup.values()), sum(self.static.values()) + max(self.activation.values()))

    @property
    def update_peak(self) -> int:
        """The most that an update holds: without evaluations, and without what comes before the training."""
        return sum(self.static.values()) + max(size for name, size in self.activation.items() if name != EVALUATION)


def estimate_run(job: CheckedRun) -> Estimate:
    """What each of the run's processes needs."""
    config = job.config
    batch = batch_sizes(config, job.num_processes)
    models = FakeModels(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        models.allocate()
        weights = WeightSizes.of(models, config, job.num_processes)
        stages, untraced = trace_stages(models, job, batch.per_device)

    # a rollout holds the state, its velocity, and what the most demanding plan keeps
    state = batch.per_device * FLOAT32_BYTES * math.prod(models.shape)
    kept = state * max(len(plan.rollout_spec.states) + len(plan.rollout_spec.velocities) for plan in job.plans)
    trajectory = 2 * state + (0 if config.offload_trajectory else kept)
    activation = {name: stage.bytes + trajectory + weights.unsharded for name, stage in stages.items()}
    activation["optimizer step"] = weights.optimizer_step
    # gradients are freed after every update: they are not there yet in the first rollout and reward stage
    accumulates = batch.gradient_accumulation_steps > 1
    for name in ("swept step", "optimizer step", *(("rollout", "reward") if accumulates else ())):
        activation[name] += weights.gradients

    num_swept = sum(plan.num_gradient_forwards for plan in job.plans) / len(job.plans)
    step_flops = stages["swept step"].flops / config.active_steps_per_forward
    flops = config.num_inference_steps * stages["rollout"].flops + num_swept * step_flops + stages["reward"].flops
    return Estimate(
        static=weights.static,
        activation=activation,
        startup=weights.startup,
        host=kept if config.offload_trajectory else 0,
        flops=batch.gradient_accumulation_steps * flops,
        untraced=untraced,
    )


@dataclass(frozen=True)
class Advice:
    """Up to three settings that lower the peak most, what each alone and all together would make of it, in bytes."""

    alone: dict[str, int]
    together: int


def advise_settings(config_of: Callable[[Sequence[str]], TrainConfig], count: int, peak: int) -> Advice | None:
    """What would lower a peak; None if nothing does.  config_of: the configuration with changes on top."""

    def peak_with(*changes: str) -> int:
        try:
            return estimate_run(check_run(config_of(changes), count, estimate_only=True)).peak
        except UserError:  # a change that does not go with the rest
            return peak

    lowered = {change: found for change in SWITCHES if (found := peak_with(change)) < peak}
    best = dict(sorted(lowered.items(), key=lambda item: item[1])[:3])
    return Advice(best, peak_with(*best)) if best else None


# --- real updates, to compare with -----------------------------------------------------------------------------------


def measure_run(config: TrainConfig, device: torch.device) -> tuple[int, float]:
    """As `measure_updates`, of a run with real weights."""
    return measure_updates(Trainer(config, load_models(config, device), Accelerator(cpu=device.type == "cpu")))


def measure_updates(trainer: Trainer) -> tuple[int, float]:
    """(most bytes held, seconds) of real updates: the second one, after AdamW made its moments.

    On a GPU as its allocator counts them, on a CPU as storages that are alive.
    """
    config, device = trainer.config, trainer.accelerator.device
    if config.data.embeddings != "live":
        trainer.embed_prompts(trainer.training_prompts()[: 2 * config.total_batch_size])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        trainer.step()
        seconds = trainer.step()["seconds"]
        return torch.cuda.max_memory_allocated(device), seconds
    known = [*network_tensors(trainer), *trainer.state.state_dict()["ema"].values()]
    with LiveBytes(known) as live:
        trainer.step()
        seconds = trainer.step()["seconds"]
    return nbytes(known) + live.peak, seconds


def network_tensors(trainer: Trainer) -> list[Tensor]:
    """All weights and buffers of a trainer's networks."""
    networks = [part for part in trainer.models.backbone.pipe.components.values() if isinstance(part, nn.Module)]
    return held((*networks, *modules_of(trainer.models.rewards.values())))


# --- networks without content ----------------------------------------------------------------------------------------


class FakeModels:
    """The networks of a run without content, on the device that is planned for."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, model = config, config.model
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        empty = backbones.init_empty_weights(model.ref)
        self.backbone: Backbone = backbones.with_embedded_guidance(empty, model.ref, model.embedded_guidance)
        self.backbone.bfloat16 = model.dtype == "bfloat16"
        dtype = torch.bfloat16 if self.backbone.bfloat16 and config.lora is not None else torch.float32
        components = self.backbone.pipe.components.items()
        self.modules = {name: part for name, part in components if isinstance(part, nn.Module)}
        for part in self.modules.values():
            part.to(dtype).requires_grad_(False).eval()
        # kernels of attention differ in time, not in what they hold, and may not be installed where a run is planned
        apply_model_options(self.backbone, model.model_copy(update={"attention": None}))
        if model.quantization is not None:
            quantize(self.backbone.net)
        mark_trainable(self.backbone.net, config)
        self.rewards: dict[str, Reward] = {scorer.name: scorer.load("meta") for scorer in config.scorers}
        self.shape = self.backbone.latent_shape((model.height, model.width))

    def allocate(self) -> None:
        """Gives every network its fake tensors, and gradients to what is trained; within a fake mode."""
        for part in self.networks():
            allocate(part, self.device)
        self.trained = [p for p in self.backbone.net.parameters() if p.requires_grad]
        for p in self.trained:
            p.grad = torch.zeros_like(p)
        self.cond = self.backbone.encode(["a picture"])

    def networks(self) -> list[nn.Module]:
        """Everything that has weights."""
        return [*self.modules.values(), *modules_of(self.rewards.values())]

    def velocity(self, batch: int) -> Velocity:
        """The guided velocity of so many samples."""
        cond, guidance = repeat_batch(self.cond, batch), self.config.classifier_free_guidance
        return guided_velocity(self.backbone.velocity, cond, self.cond, guidance)

    def latents(self, batch: int, *, requires_grad: bool = False) -> Tensor:
        """Latents of so many samples."""
        return torch.empty(batch, *self.shape, device=self.device, requires_grad=requires_grad)


def modules_of(rewards: Iterable[Any]) -> Iterator[nn.Module]:
    """The networks that rewards are made of."""
    for value in (value for reward in rewards for value in vars(reward).values()):
        if isinstance(value, nn.Module):
            yield value
        elif type(value).__module__.startswith("flowbp.rewards"):
            yield from modules_of([value])


@dataclass(frozen=True)
class WeightSizes:
    """Bytes that follow from numbers of weights alone.

    static, startup: as in `Estimate`.  gradients: of all trained weights.  unsharded: what a sharded network gathers
    at a time.  optimizer_step: what adding gradients up and AdamW allocate for a moment.
    """

    static: dict[str, int]
    startup: dict[str, int]
    gradients: int
    unsharded: int
    optimizer_step: int

    @classmethod
    def of(cls, models: FakeModels, config: TrainConfig, count: int) -> "WeightSizes":
        """Of one of `count` processes."""
        net, kind = models.backbone.net, config.distributed.kind
        # over how many processes weights are cut up, and gradients with the optimizer
        weight_shards = count if kind in ("fsdp2", "zero3") else 1
        optimizer_shards = count if kind != "ddp" else 1
        trained = FLOAT32_BYTES * sum(p.numel() for p in models.trained)
        frozen = nbytes(net.parameters()) - trained + nbytes(net.buffers())
        names = text_encoder_names(models.backbone.pipe)
        text_encoders = nbytes(held(m for name, m in models.modules.items() if name in names))
        others = nbytes(held(m for name, m in models.modules.items() if name not in names and m is not net))
        static = {
            "frozen weights": frozen // weight_shards,
            "trained weights": trained // weight_shards,
            "AdamW": 2 * trained // optimizer_shards,
            "EMA": trained // (1 if kind == "zero2" else optimizer_shards),
            "autoencoder": others,
            "rewards": nbytes(held(modules_of(models.rewards.values()))),
            "text encoders": text_encoders if config.data.embeddings == "live" else 0,
        }
        startup = {"weights": static["frozen weights"] + static["trained weights"], "autoencoder": others}
        startup |= {name: static[name] for name in ("rewards", "EMA")} | {"text encoders": text_encoders}
        largest_block = max(nbytes(block.parameters()) for block in blocks_of(net))
        return cls(
            static=static,
            startup=startup,
            gradients=trained // (1 if config.distributed.sync == "update" else optimizer_shards),
            unsharded=2 * largest_block if weight_shards > 1 else 0,
            optimizer_step=max(trained // optimizer_shards, trained if kind == "ddp" and count > 1 else 0),
        )


# --- stages ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageCost:
    """Bytes that a stage held at once beyond what was there before, and its floating-point operations."""

    bytes: int
    flops: float


def trace_stages(models: FakeModels, job: CheckedRun, batch: int) -> tuple[dict[str, StageCost], tuple[str, ...]]:
    """The stages of an update of `batch` samples and of an evaluation, and rewards that could not be traced."""
    config = job.config
    coupled = any(term.coupling for plan in job.plans for term in plan.terms)
    swept = batch * config.active_steps_per_forward
    stages = {
        "rollout": trace_stage(partial(rollout_stage, models, batch), models),
        "swept step": trace_stage(partial(sweep_stage, models, swept, coupled), models),
    }
    rows = min(config.reward_batch_size or batch, batch)
    costs, untraced = [], []
    for reward in config.rewards:
        try:
            costs.append(trace_stage(partial(reward_stage, models, reward, rows), models))
        except UNTRACEABLE:
            untraced.append(reward.name)
    flops = sum(cost.flops for cost in costs) * batch / rows
    stages["reward"] = StageCost(max((cost.bytes for cost in costs), default=0), flops)
    evaluated = min(config.eval.batch_size, config.eval.num_prompts)
    stages[EVALUATION] = trace_stage(partial(evaluation_stage, models, evaluated), models)
    return stages, tuple(untraced)


def trace_stage(work: Callable[[], object], models: FakeModels) -> StageCost:
    """What `work` needs beyond the weights and gradients that are there."""
    live = LiveBytes((*held(models.networks()), *(p.grad for p in models.trained if p.grad is not None)))
    with live:
        work()
    return StageCost(live.peak, float(live.flops))


def rollout_stage(models: FakeModels, batch: int) -> Tensor:
    """One evaluation of the rollout."""
    with torch.no_grad():
        return models.velocity(batch)(models.latents(batch), torch.empty(batch, device=models.device))


def sweep_stage(models: FakeModels, batch: int, coupled: bool) -> None:
    """One step with gradient."""
    x = models.latents(batch, requires_grad=coupled)
    v = models.velocity(batch)(x, torch.empty(batch, device=models.device))
    torch.autograd.backward(v, torch.empty_like(v))


def reward_stage(models: FakeModels, reward: TrainedReward, batch: int) -> None:
    """Decoding, one reward, and the gradient at the sample."""
    x = models.latents(batch, requires_grad=True)
    scores = models.rewards[reward.name](models.backbone.decode(x), ["a picture"] * batch)
    torch.autograd.grad(reward_losses(reward.loss, scores).sum(), x)


def evaluation_stage(models: FakeModels, batch: int) -> None:
    """One step of an evaluation, then its images; rewards hold less than that."""
    rollout_stage(models, batch)
    with torch.no_grad():
        models.backbone.decode(models.latents(batch))


# --- answers ---------------------------------------------------------------------------------------------------------


def parse_memory_size(text: str) -> int:
    """Bytes of `24GiB`, `80GB` or a plain number.  Raises UserError for anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(MB|MiB|GB|GiB)?", text)
    if match is None or not float(match[1]):
        raise UserError(f"--memory {text}: give a number of bytes, or one with a unit, such as 24GiB or 80GB")
    return int(float(match[1]) * {None: 1, "MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30}[match[2]])


def estimate_as_json(
    job: CheckedRun,
    found: Estimate,
    tflops: float,
    limit: int | None,
    advice: Advice | None,
    measured: tuple[int, float] | None,
) -> dict[str, Any]:
    """Everything that `flowbp estimate` says: bytes, seconds, operations."""
    config = job.config
    arithmetic = update_arithmetic(job)
    refs = [config.model.ref, *(scorer.ref for scorer in config.scorers)]
    content: dict[str, Any] = {
        "processes": job.num_processes,
        "gradient_accumulation_steps": arithmetic["gradient_accumulation_steps"],
        "static": found.static,
        "activation": found.activation,
        "startup": found.startup,
        "host": found.host,
        "peak": found.peak,
        "untraced": list(found.untraced),
        "counted_for": "cuda" if torch.cuda.is_available() else "cpu",
        "tflop_per_update": found.flops / 1e12,
        "tflops": tflops,
        "seconds_per_update": found.flops / 1e12 / tflops,
        "updates": config.max_train_steps,
        "disk": arithmetic["checkpoint_bytes"] * (config.checkpoint.keep + 1),
        "licenses": {ref: license_of(ref) for ref in dict.fromkeys(refs)},
    }
    if limit is not None:
        content |= {"memory": limit, "fits": found.peak <= limit}
    if advice is not None:
        content["advice"] = {"alone": advice.alone, "together": advice.together}
    if measured is not None:
        content["measured"] = {"peak": measured[0], "estimated": found.update_peak, "seconds_per_update": measured[1]}
    return content
