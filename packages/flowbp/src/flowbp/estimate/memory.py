"""Memory by part and operations of a run, before it begins.  No weight is read and no GPU is needed.

Networks are built from their JSON files.  One evaluation of the network, one swept step and one reward stage run on
torch's fake tensors, which have shapes and no content, and the storages that are alive at once are counted.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from flowbp import backbones
from flowbp.backbones.loading import mark_trainable
from flowbp.backbones.options import apply_model_options, blocks_of, quantize
from flowbp.backbones.rollout import RolloutNetwork
from flowbp.backbones.source_tokens import TOKENS, pack_sources
from flowbp.config import TrainConfig, TrainedReward
from flowbp.core.guidance import guided_velocity
from flowbp.core.types import LENGTHS, Backbone, Reward, Velocity, repeat_batch
from flowbp.data.embeddings import ENCODE_BATCH_SIZE
from flowbp.estimate.speed import micro_batch_flops
from flowbp.estimate.traffic import sent_bytes
from flowbp.rewards.loading import modules_of
from flowbp.rewards.losses import reward_losses
from flowbp.training.preflight import CheckedRun, batch_sizes, keeps_working_copy
from imgen_common.devices import autocast_weights_once
from imgen_common.memory import LiveBytes, allocate, held, nbytes
from imgen_common.prompt_limits import text_encoder_names

FLOAT32_BYTES = 4
"""Of trained weights, gradients, moments, their average and the states between steps."""
EVALUATION = "evaluation"
UNTRACEABLE = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
"""What fake tensors raise where an operation needs content, or its shape depends on content."""


@dataclass(frozen=True)
class Estimate:
    """Memory of one process in bytes, and operations of one update.

    static: by part, what is there throughout the training.  activation: by stage, what it holds on top; stages come
    one after the other.  startup: by part, what is there while prompts are embedded, which comes before rewards are
    loaded; `AdamW` of a resumed run.  kept_graph: of one active step, as `keep_graphs` keeps it, 0 where none is; the
    stages hold as many as the run keeps.  host, embeddings: in the host's memory, in no other sum: kept states, and the
    prompts' embeddings (on disk with `data.embeddings: disk`).  flops, sent: operations of one update, and bytes that
    go to the other processes.  untraced: rewards whose stage could not be traced: of those only the weights are in the
    sums.
    """

    static: dict[str, int]
    activation: dict[str, int]
    startup: dict[str, int]
    kept_graph: int
    host: int
    embeddings: int
    flops: float
    sent: float
    untraced: tuple[str, ...]

    @property
    def phases(self) -> dict[str, int]:
        """What is held at once before the training, and in each stage."""
        static = sum(self.static.values())
        return {"startup": sum(self.startup.values())} | {name: static + size for name, size in self.activation.items()}

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return max(self.phases.values())

    @property
    def update_peak(self) -> int:
        """The most that an update holds: without evaluations, and without what comes before the training."""
        return sum(self.static.values()) + max(size for name, size in self.activation.items() if name != EVALUATION)


def estimate_run(job: CheckedRun) -> Estimate:
    """What each of the run's processes needs."""
    return estimate_traced(job, TracedRun.of(job))


def estimate_traced(job: CheckedRun, traced: "TracedRun") -> Estimate:
    """`estimate_run` of a run that differs from the traced one at most in how many graphs it keeps.

    If it keeps any, the traced one must, too.
    """
    config, models, weights, stages = job.config, traced.models, traced.weights, traced.stages
    batch = batch_sizes(config, job.num_processes)
    graph = traced.kept_graph if config.keep_graphs else 0

    # a rollout holds the state, its velocity, and what the most demanding plan keeps
    state = batch.per_device * FLOAT32_BYTES * math.prod(models.shape)
    kept = state * max(len(plan.rollout_spec.states) + len(plan.rollout_spec.velocities) for plan in job.plans)
    trajectory = 2 * state + (0 if config.offload_trajectory else kept)
    activation = {name: stage.bytes + trajectory + weights.unsharded for name, stage in stages.items()}
    num_kept = max(len(plan.keep_graphs(config.keep_graphs).graphs) for plan in job.plans)
    for name, number in (("rollout", num_kept), ("reward", num_kept), ("swept step", num_kept - 1)):
        activation[name] += max(0, number) * graph
    activation["optimizer step"] = weights.optimizer_step
    # gradients are freed after every update: they are not there yet in the first rollout and reward stage
    accumulates = batch.gradient_accumulation_steps > 1
    for name in ("swept step", "optimizer step", *(("rollout", "reward") if accumulates else ())):
        activation[name] += weights.gradients

    # where embeddings are kept all prompts of the run are embedded first; otherwise those of every batch in its turn
    live = config.data.embeddings == "live"
    activation |= {"embedding prompts": models.embedding_bytes} if live else {}
    activation |= {"encoding sources": models.source_bytes} if models.sources else {}
    trained = min(job.num_prompts, config.max_train_steps * batch.per_process)
    flops = micro_batch_flops({name: one.flops for name, one in stages.items()}, job, models.backbone.guidance_rescale)
    return Estimate(
        static=weights.static | traced.static,
        activation=activation,
        kept_graph=graph,
        startup=weights.startup | {"embedding prompts": 0 if live else models.embedding_bytes},
        host=kept if config.offload_trajectory else 0,
        embeddings=models.text_bytes * (0 if live else trained + config.eval.num_prompts),
        flops=batch.gradient_accumulation_steps * flops,
        sent=traced.sent,
        untraced=traced.untraced,
    )


# --- networks without content ----------------------------------------------------------------------------------------


class FakeModels:
    """The networks of a run without content, on the device that is planned for.

    sources: (height, width) of the source images of every sample.
    """

    def __init__(self, config: TrainConfig, sources: Sequence[tuple[int, int]] = ()) -> None:
        self.config, self.sources, model = config, sources, config.model
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.backbone: Backbone = backbones.init_empty_weights(
            model.ref, embedded_guidance=model.embedded_guidance, distilled=model.allow_distilled
        )
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
        """Gives every network its fake tensors, and gradients to what is trained, and embeds; within a fake mode."""
        for part in self.networks():
            allocate(part, self.device)
        for p in self.trained:
            p.grad = torch.zeros_like(p)
        # what text encoders see of sources depends on content: as many tokens of text stand for them
        shown = sum(map(self.backbone.source_text_tokens, self.sources))
        self.backbone.set_max_tokens(self.backbone.max_tokens + shown)
        with LiveBytes(held(self.networks())) as live:
            encoded = self.backbone.encode(["a picture"] * (1 if self.backbone.reads_sources else ENCODE_BATCH_SIZE))
        self.embedding_bytes = live.peak
        self.cond = {name: value[:1].clone() for name, value in encoded.items() if name != LENGTHS}
        # where text encoders see sources, the empty prompt is embedded with those of every edit
        self.text_bytes = nbytes(self.cond.values()) * (2 if self.backbone.reads_sources else 1)
        with LiveBytes(held(self.networks())) as live:
            latents = [self.backbone.encode_source(torch.empty(1, 3, *size)) for size in self.sources]
        self.source_bytes, self.layout = live.peak, tuple((one.shape[1], one.shape[2]) for one in latents)
        self.cond |= {name: value for name, value in pack_sources([latents]).items() if name == TOKENS}

    @property
    def trained(self) -> list[nn.Parameter]:
        """What is trained."""
        return [p for p in self.backbone.net.parameters() if p.requires_grad]

    def networks(self) -> list[nn.Module]:
        """Everything that has weights."""
        return [*self.modules.values(), *modules_of(self.rewards.values())]

    def velocity(self, batch: int, *, gradient_only: bool = False) -> Velocity:
        """`guided_velocity` of so many samples."""
        cond, guidance = repeat_batch(self.cond, batch), self.config.classifier_free_guidance
        # fake tensors have no content from which the layout could be read
        alike = partial(self.backbone.velocity_of_layout, layout=self.layout)
        velocity, rescale = alike if self.layout else self.backbone.velocity, self.backbone.guidance_rescale
        return guided_velocity(velocity, cond, self.cond, guidance, rescale, gradient_only=gradient_only)

    def latents(self, batch: int, *, requires_grad: bool = False) -> Tensor:
        """Latents of so many samples."""
        return torch.empty(batch, *self.shape, device=self.device, requires_grad=requires_grad)


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
            "base copy": trained if config.regularise is not None and config.lora is None else 0,
            "rollout copy": rollout_copy_bytes(models),
            "eval.model": 0 if config.eval.model is None else frozen,
            "AdamW": 2 * trained // optimizer_shards,
            "EMA": trained // (1 if kind == "zero2" else optimizer_shards),
            "autoencoder": others,
            "rewards": nbytes(held(modules_of(models.rewards.values()))),
            "text encoders": text_encoders if config.data.embeddings == "live" else 0,
        }
        startup = {"weights": static["frozen weights"] + static["trained weights"], "autoencoder": others}
        startup |= {name: static[name] for name in ("EMA", "AdamW", "eval.model", "base copy", "rollout copy")}
        startup["text encoders"] = text_encoders
        largest_block = max(nbytes(block.parameters()) for block in blocks_of(net))
        return cls(
            static=static,
            startup=startup,
            gradients=trained // (1 if config.distributed.sync == "update" else optimizer_shards),
            unsharded=2 * largest_block if weight_shards > 1 else 0,
            optimizer_step=max(trained // optimizer_shards, trained if kind == "ddp" and count > 1 else 0),
        )


def rollout_copy_bytes(models: FakeModels) -> int:
    """What `rollout.dtype` holds beside the network.  Rollouts compute in less memory than is counted then."""
    rollout, net = models.config.rollout, models.backbone.net
    if rollout.dtype is None:
        return 0
    shared = {id(t) for t in held([net])}
    rolled = RolloutNetwork(models.backbone, rollout.model_copy(update={"compile": None})).net
    return nbytes(t for t in held([rolled]) if id(t) not in shared)


# --- stages ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageCost:
    """Bytes that a stage held at once beyond what was there before, and its floating-point operations.

    held: bytes of what it leaves behind.
    """

    bytes: int
    flops: float
    held: int = 0


@dataclass(frozen=True)
class TracedRun:
    """The networks, their sizes and what they send; costs of the stages, rewards that could not be traced, and bytes of
    a kept graph and of further static parts."""

    models: FakeModels
    weights: "WeightSizes"
    sent: float
    stages: Mapping[str, StageCost]
    untraced: tuple[str, ...]
    kept_graph: int
    static: dict[str, int]

    @classmethod
    def of(cls, job: CheckedRun) -> "TracedRun":
        """Of micro-batches on one device."""
        config, batch = job.config, batch_sizes(job.config, job.num_processes).per_device
        models = FakeModels(config, job.sources)
        weights = WeightSizes.of(models, config, job.num_processes)
        sent = sent_bytes(models.backbone, job)
        if config.distributed.kind == "fsdp2" and models.backbone.bfloat16:
            models.backbone.net.to(torch.bfloat16)  # as weights are gathered, so that autocast makes no copies
        copied = keeps_working_copy(config)
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            autocast_weights_once() if copied else contextlib.nullcontext(),
        ):
            models.allocate()
            # what the first evaluation leaves behind
            copy = trace_stage(lambda: rollout_stage(models, 1) is None, models).held if copied else 0
            stages, untraced = trace_stages(models, job, batch)
            graph = trace_kept_graph(models, job, batch).held if config.keep_graphs else 0
        return cls(models, weights, sent, stages, untraced, graph, {"bfloat16 copy": copy} if copied else {})


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
    costs: dict[str, StageCost] = {}
    for reward in config.rewards:
        with contextlib.suppress(*UNTRACEABLE):
            costs[reward.name] = trace_stage(partial(reward_stage, models, [reward], rows), models)
    traced = [reward for reward in config.rewards if reward.name in costs]
    # several share one graph
    cost = trace_stage(partial(reward_stage, models, traced, rows), models) if len(traced) > 1 else None
    cost = cost or next(iter(costs.values()), StageCost(0, 0))
    stages["reward"] = StageCost(cost.bytes, cost.flops * batch / rows)
    evaluated = min(config.eval.batch_size, config.eval.num_prompts)
    stages[EVALUATION] = trace_stage(partial(evaluation_stage, models, evaluated), models)
    return stages, tuple(reward.name for reward in config.rewards if reward.name not in costs)


def trace_stage(work: Callable[[], object], models: FakeModels) -> StageCost:
    """What `work` needs beyond the weights and gradients that are there."""
    live = LiveBytes((*held(models.networks()), *(p.grad for p in models.trained if p.grad is not None)))
    with live:
        found = work()
        left = live.now
    del found
    return StageCost(live.peak, float(live.flops), left)


def trace_kept_graph(models: FakeModels, job: CheckedRun, batch: int) -> StageCost:
    """One evaluation of the rollout whose graph is kept."""
    coupled = any(term.coupling for plan in job.plans for term in plan.terms)

    def evaluate() -> Tensor:
        x = models.latents(batch, requires_grad=coupled)
        return models.velocity(batch)(x, torch.empty(batch, device=models.device))

    return trace_stage(evaluate, models)


def rollout_stage(models: FakeModels, batch: int) -> Tensor:
    """One evaluation of the rollout."""
    with torch.no_grad():
        return models.velocity(batch)(models.latents(batch), torch.empty(batch, device=models.device))


def sweep_stage(models: FakeModels, batch: int, coupled: bool) -> None:
    """One step with gradient, of a regulariser's base too."""
    regularised = models.config.regularise is not None
    base = rollout_stage(models, batch) if regularised else None
    x = models.latents(batch, requires_grad=coupled)
    v = models.velocity(batch, gradient_only=not regularised)(x, torch.empty(batch, device=models.device))
    torch.autograd.backward(v, torch.empty_like(v) if base is None else v.detach() - base)


def reward_stage(models: FakeModels, rewards: Sequence[TrainedReward], batch: int) -> None:
    """Decoding, rewards, and the gradient at the sample: of their sum, or of each where these are combined."""
    x = models.latents(batch, requires_grad=True)
    images, texts = models.backbone.decode(x), ["a picture"] * batch
    scores = {reward.name: models.rewards[reward.name](images, texts) for reward in rewards}
    losses = torch.stack([reward_losses(reward.loss, scores[reward.name]).sum() for reward in rewards])
    totals = losses.sum()[None] if models.config.combine == "weighted" else losses
    for i, total in enumerate(totals):
        torch.autograd.grad(total, x, retain_graph=i < len(totals) - 1)


def evaluation_stage(models: FakeModels, batch: int) -> None:
    """One step of an evaluation, then its images; rewards hold less than that."""
    rollout_stage(models, batch)
    with torch.no_grad():
        models.backbone.decode(models.latents(batch))
