"""Reward backpropagation training: one loop, the same for one process and many."""

import math
import resource
import signal
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from types import FrameType
from typing import Literal, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import ModelMixin
from torch import Tensor, nn

from flowbp import watchdog
from flowbp.combine import combined
from flowbp.compare import comparable
from flowbp.config import Hinge, LogSigmoid, TrainConfig
from flowbp.data import draw_prompts, is_shapes, load_prompts
from flowbp.embeddings import Conditions, Shards, fingerprint
from flowbp.engine import Outcome, backpropagate, num_passes, rollout
from flowbp.evaluate import Evaluation, Sampling, evaluate, initial_noise
from flowbp.guidance import guided
from flowbp.networks import check_machine, compile_blocks, prepare, quantise
from flowbp.pictures import distance
from flowbp.plan import Plan
from flowbp.plan import plan as draw_plan
from flowbp.results import drop_evaluations, load_evaluations, save_evaluation
from flowbp.types import Backbone, Reward
from flowbp.weights import TorchWeights, Weights, shard
from imgen_common import hub
from imgen_common.errors import UserError
from imgen_common.runs import RunFolder
from imgen_common.streams import normal, numpy_generator

MAY_DIFFER = (
    *(
        "name",
        "num_updates",
        "checkpoint",
        "trackers",
        "micro_batch_size",
        "chunk",
        "reward_chunk",
        "offload_trajectory",
        "watchdog",
        "distributed",
    ),
    *("data.embeddings", "data.cache", "eval.every", "eval.batch_size", "eval.quick_prompts", "eval.quick_num_prompts"),
)
"""Keys of the configuration that a resumed run may change: none alters the updates already made, or makes the
evaluation after another one than the evaluation before."""
NUM_SHOWN = 48
"""Pictures kept of every evaluation."""


@runtime_checkable
class Reporter(Protocol):
    """How a run tells a person what it is doing."""

    def stage(self, text: str) -> None:
        """A new phase begins."""

    def update(self, update: int, metrics: Mapping[str, float]) -> None:
        """An update is done."""

    def evaluation(self, name: str, done: int, total: int) -> None:
        """So many prompts of an evaluation are done."""

    def alert(self, text: str) -> None:
        """The watchdog barks."""


@dataclass
class Parts:
    """What a run is made of, loaded."""

    backbone: Backbone
    rewards: Mapping[str, Reward]
    prompts: list[str]
    conditions: Conditions
    parameters: dict[str, nn.Parameter]


def trainable(net: nn.Module, config: TrainConfig) -> dict[str, nn.Parameter]:
    """Makes all weights of the network trainable, or adds adapters and makes those trainable; float32, by name.

    Adapters are initialised from the run's seed, equally on every process.
    Raises UserError if no layer matches `lora.targets`.
    """
    if config.lora is None:
        net.requires_grad_(True)
    else:
        from peft import LoraConfig, inject_adapter_in_model

        lora = config.lora
        layers = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
        targets = [n for n in layers if any(n == t or n.endswith(f".{t}") for t in lora.targets)]
        if not targets:
            raise UserError(f"lora.targets {list(lora.targets)} match no linear layer; there are e.g. {layers[:4]}")
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(config.seed)
            warnings.filterwarnings("ignore", ".*get_apply_tensor_subclass.*")  # of merging, which export does itself
            inject_adapter_in_model(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets), net)
    found = {name: p for name, p in net.named_parameters() if p.requires_grad}
    for parameter in found.values():
        parameter.data = parameter.data.float()  # adapters of a bfloat16 network start in bfloat16
    return found


def load_backbone(config: TrainConfig, device: torch.device, net_device: str | None = None) -> Backbone:
    """The generator in the configuration's precision; net_device: of the transformer, as `backbones.load` has it."""
    from flowbp import backbones

    check_machine(config.model)
    low, quantized = config.model.dtype == "bfloat16", config.model.quantization is not None
    backbone = backbones.load(
        config.model.ref,
        dtype=torch.bfloat16 if low and config.lora is not None else torch.float32,
        device=device,
        net_device="cpu" if quantized else net_device,
        embedded_guidance=config.model.embedded_guidance,
    )
    backbone.bfloat16 = low
    if quantized:
        quantise(backbone.net, device)
        backbone.net.to(device)
    prepare(backbone, config.model)
    return backbone


def load_parts(config: TrainConfig, device: torch.device, *, is_main: bool = True) -> Parts:
    """Loads the generator, the rewards and the prompts that the configuration names.

    Under adapters of a bfloat16 network the frozen weights are bfloat16; whatever is trained is float32.  A network
    that is to be sharded is read by the main process alone.
    """
    sharded = config.distributed.kind == "fsdp2"
    backbone = load_backbone(config, device, ("cpu" if is_main else "meta") if sharded else None)
    net = backbone.net
    assert isinstance(net, ModelMixin)
    prompts = load_prompts(config.data.prompts, config.data.key)
    parameters = trainable(net, config)
    if sharded:
        shard(net, device, torch.bfloat16 if backbone.bfloat16 and config.lora is None else None)
        parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    if config.model.compile:
        compile_blocks(net)
    store = Shards(Path(config.data.cache)) if config.data.embeddings == "disk" else None
    mark = fingerprint(hub.resolve(config.model.ref)) if store else ""
    return Parts(backbone, load_rewards(config, device), prompts, Conditions(backbone, store, mark), parameters)


def load_rewards(config: TrainConfig, device: torch.device) -> dict[str, Reward]:
    """All rewards by name, the trained ones first."""
    return {scorer.name: scorer.load(device) for scorer in config.scorers}


def weights_of(config: TrainConfig, backbone: Backbone, accelerator: Accelerator) -> Weights:
    """The trained weights of a loaded backbone, held as the configuration says."""
    kind, each_pass = config.distributed.kind, config.distributed.sync == "step"
    if kind in ("zero2", "zero3"):
        from flowbp.zero import ZeroWeights

        return ZeroWeights(backbone, config.optim, accelerator, int(kind[-1]), each_pass=each_pass)
    return TorchWeights(backbone.net, config.optim, accelerator, each_pass=each_pass)


def sampling_of(config: TrainConfig, guidance: float) -> Sampling:
    """How `config` wants the pictures of its evaluations, at a guidance scale."""
    size, evaluation = (config.model.height, config.model.width), config.eval
    return Sampling(size, evaluation.steps, guidance, evaluation.seed, evaluation.batch_size)


def rate(config: TrainConfig, update: int) -> float:
    """Learning rate of an update, counted from 0."""
    optim = config.optim
    warm = min(1.0, (update + 1) / (optim.warmup + 1))
    progress = max(0, update - optim.warmup) / max(1, config.num_updates - optim.warmup)
    fall = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}
    return optim.lr * warm * fall[optim.schedule]


def losses_of(loss: Hinge | LogSigmoid, scores: Tensor) -> Tensor:
    """Per-sample losses of scores."""
    if isinstance(loss, Hinge):
        return -scores if loss.ceiling is None else (loss.ceiling - scores).clamp(min=0)
    return nn.functional.softplus((loss.centre - scores) / loss.width)


class Trainer:
    """Everything an update needs.  Its state is `weights` (and their average and moments), nothing else:

    prompts, noise and plans are functions of (seed, update), so a resumed run repeats the uninterrupted one exactly.
    """

    def __init__(self, config: TrainConfig, parts: Parts, accelerator: Accelerator) -> None:
        self.config, self.parts, self.accelerator = config, parts, accelerator
        self.share, self.micro = shares(config, accelerator.num_processes)
        self.size = (config.model.height, config.model.width)
        self.sigmas = parts.backbone.sigmas(config.num_steps, self.size)
        self.weights = weights_of(config, parts.backbone, accelerator)
        self.reward_weights = torch.tensor([reward.weight for reward in config.rewards], dtype=torch.float64)
        self.update = 0

    def gradient(self) -> dict[str, float]:
        """Leaves the global batch's gradient of this update in `.grad`, on every process; returns its metrics."""
        config = self.config
        plan = draw_plan(config.method, self.sigmas, numpy_generator(config.seed, "plan", self.update))
        first = self.update * config.batch_size + self.accelerator.process_index * self.share
        sums: dict[str, float] = {}
        with self.weights.synchronised(self.share // self.micro * num_passes(plan, config.chunk)):
            for offset in range(first, first + self.share, self.micro):
                for name, value in self._accumulate(plan, range(offset, offset + self.micro)).items():
                    sums[name] = sums.get(name, 0.0) + value
        metrics = self._reduce({name: value / config.batch_size for name, value in sums.items()})
        return metrics | {"gradient_forwards": float(plan.num_gradient_forwards)}

    def step(self) -> dict[str, float]:
        """One update; returns its metrics.  Raises FloatingPointError, with no weight changed, if it is not finite."""
        start = time.perf_counter()
        metrics = self.gradient()
        learning_rate, norm = rate(self.config, self.update), math.nan
        if math.isfinite(metrics["loss"]):
            decay = min(self.config.ema, (1 + self.update) / (10 + self.update))
            norm = self.weights.step(learning_rate, self.config.optim.max_grad_norm, decay)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"update {self.update + 1}: loss {metrics['loss']:g}, gradient norm {norm:g}: not applied"
            )
        self.update += 1
        return metrics | {
            "grad_norm": norm,
            "lr": learning_rate,
            "seconds": time.perf_counter() - start,
            "peak_memory_mb": peak_memory_mb(self.accelerator.device),
        }

    def _accumulate(self, plan: Plan, samples: range) -> dict[str, float]:
        """Adds the gradient of some samples of the global batch; returns sums over these samples."""
        config, backbone, device = self.config, self.parts.backbone, self.accelerator.device
        chosen = draw_prompts(len(self.parts.prompts), config.seed, samples.start, len(samples))
        prompts = [self.parts.prompts[i] for i in chosen]
        cond, negative = self.parts.conditions(prompts)
        velocity = self.weights.counted(guided(backbone.velocity, cond, negative, config.guidance))
        x_0 = initial_noise(backbone, self.size, config.seed, "noise", samples).to(device)
        trajectory = rollout(velocity, x_0, self.sigmas, plan.keep, offload=config.offload_trajectory)
        seen: dict[str, list[Tensor]] = {name: [] for name in self.parts.rewards}

        def loss(x: Tensor, rows: slice) -> Tensor:
            images = backbone.decode(x)
            losses = []
            for reward in config.rewards:
                scores = self.parts.rewards[reward.name](images, prompts[rows])
                seen[reward.name].append(scores.detach())
                losses.append(losses_of(reward.loss, scores))
            for watched in config.heldout:
                with torch.no_grad():
                    seen[watched.name].append(self.parts.rewards[watched.name](images, prompts[rows]))
            return torch.stack(losses)

        def renoise(copy: int) -> Tensor:
            draws = [normal(x_0.shape[1:], config.seed, "renoise", i, copy) for i in samples]
            return torch.stack(draws).to(device)

        outcome = backpropagate(
            plan,
            trajectory,
            velocity,
            loss,
            noise=renoise,
            chunk=config.chunk,
            scale=len(samples) / config.batch_size * config.guidance.backward_scale * self.weights.gradient_scale,
            reward_chunk=config.reward_chunk,
            combine=lambda gradients: combined(gradients, self.reward_weights, config.combine),
        )
        count = len(samples)
        sums = {name: torch.cat(values)[:count].sum().item() for name, values in seen.items()}
        sums["loss"] = (self.reward_weights @ outcome.losses.mean(0).sum(1).double().cpu()).item()
        sums |= {f"gap_{k}": row.sum().item() for k, row in enumerate(outcome.gaps)}
        return sums | self._agreement(outcome)

    def _agreement(self, outcome: Outcome) -> dict[str, float]:
        """Sums over samples of how the rewards' gradients compare; nothing where there is one reward."""
        if outcome.agreement is None:
            return {}
        names = [reward.name for reward in self.config.rewards]
        norms, cosines = outcome.agreement.norms.sum(-1), outcome.agreement.cosines.sum(-1)
        found = {f"gradient_{name}": norms[i].item() for i, name in enumerate(names)}
        for (i, first), (j, second) in combinations(enumerate(names), 2):
            found[f"cosine_{first}_{second}"] = cosines[i, j].item()
        return found

    def _reduce(self, metrics: dict[str, float]) -> dict[str, float]:
        """Adds metrics up over the processes, in one message."""
        if self.accelerator.num_processes == 1:
            return metrics
        names = sorted(metrics)
        totals = self.accelerator.reduce(
            torch.tensor([metrics[n] for n in names], dtype=torch.float64, device=self.accelerator.device), "sum"
        )
        return dict(zip(names, totals.tolist(), strict=True))

    def restore(self, update: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes up the state of a checkpoint made after `update` updates."""
        self.weights.restore(tensors)
        self.update = update

    def evaluate(
        self, prompts: Sequence[str], source: str, guidance: float, reporter: Reporter, label: str
    ) -> Evaluation:
        """Pictures and scores of the network as it is now, at the evaluation's fixed seeds."""
        accelerator = self.accelerator
        return evaluate(
            self.parts.backbone,
            self.parts.conditions,
            prompts,
            self.parts.rewards,
            sampling_of(self.config, guidance),
            verify=is_shapes(source),
            num_images=NUM_SHOWN,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            gather=gather_object if accelerator.num_processes > 1 else list,
            tick=lambda done: reporter.evaluation(label, done * accelerator.num_processes, len(prompts)),
        )


def shares(config: TrainConfig, num_processes: int) -> tuple[int, int]:
    """(pictures per process, pictures per micro-batch).  Raises UserError if they do not divide evenly."""
    share, rest = divmod(config.batch_size, num_processes)
    if rest or not share:
        raise UserError(
            f"batch_size {config.batch_size} does not divide by {num_processes} processes; choose a multiple"
        )
    micro = min(config.micro_batch_size or share, share)
    if share % micro:
        raise UserError(f"micro_batch_size {micro} does not divide {share}, the share of a process; choose a divisor")
    return share, micro


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far in MB (10^6 bytes): of the GPU, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


class Interrupt:
    """Remembers a Ctrl-C so that the update in flight ends and is saved; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "Interrupt":
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def anywhere(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is up on any process: Ctrl-C may reach one before and another after the same update."""
    if accelerator.num_processes == 1:
        return flag
    flags = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(flags, "sum").item() > 0)


def train(config: TrainConfig, run: RunFolder, accelerator: Accelerator, reporter: Reporter) -> None:
    """The run, from its last checkpoint if it has one, to its last update; evaluates before and after.

    Raises KeyboardInterrupt after saving if Ctrl-C was pressed, UserError on anything the user can mend.
    """
    if not config.heldout:
        reporter.alert("no held-out reward: what is gained may be reward hacking, and nothing tells; set `heldout`")
    reporter.stage("loading models")
    trainer = Trainer(config, load_parts(config, accelerator.device, is_main=accelerator.is_main_process), accelerator)
    latest = run.latest_checkpoint()
    if latest is not None:
        checkpoint = run.load_checkpoint(latest)
        trainer.restore(checkpoint.step, checkpoint.tensors)
    accelerator.wait_for_everyone()
    run.rewind(trainer.update)

    full_prompts = load_prompts(config.eval.prompts, config.data.key, config.eval.num_prompts)
    quick_prompts = load_prompts(config.eval.quick_prompts, config.data.key, config.eval.quick_num_prompts)
    # all prompts are embedded before the first update, from the run's very beginning, so that a resumed run embeds
    # them in the same batches; then the text encoders, which may be larger than the network, are let go
    if config.data.embeddings != "live":
        reporter.stage("embedding prompts")
        trainer.parts.conditions.add([*all_prompts(trainer, full_prompts, quick_prompts), ""])
        trainer.parts.backbone.free_text()

    # before the first update: the base model, at the seeds that everything is compared at
    if trainer.update == 0:
        full_evaluation(trainer, run, full_prompts, "base", reporter)
        if watching(config):
            base = quick_evaluation(trainer, run, quick_prompts, reporter)
            if run.is_main:
                save_evaluation(run.path / watchdog.FOLDER, "base", config.guidance.scale, base)
    if run.is_main:
        watchdog.rewind(run.path, trainer.update)
        if trainer.update < config.num_updates:
            drop_evaluations(run.path, "trained")

    reporter.stage("training")
    with Interrupt() as interrupt:
        while trainer.update < config.num_updates:
            # one update, or none at all: a non-finite gradient is refused before it touches a weight
            try:
                metrics = trainer.step()
            except FloatingPointError as error:
                save(trainer, run)
                raise UserError(
                    f"{error}; the state before it is saved in {run.path}; lower optim.lr or optim.max_grad_norm"
                ) from None
            run.log(trainer.update, {f"train/{name}": value for name, value in metrics.items()})
            reporter.update(trainer.update, metrics)

            # once in a while: a quick look at prompts that are neither trained on nor reported
            alarmed = False
            looked = config.eval.every > 0 and trainer.update % config.eval.every == 0
            if looked:
                with trainer.weights.averaged():
                    quick = quick_evaluation(trainer, run, quick_prompts, reporter)
                alarmed = anywhere(accelerator, watch(trainer, run, quick, reporter))

            # a state to go on from: at intervals, where it was looked at, at the end, and when asked to stop
            last = trainer.update == config.num_updates
            asked = anywhere(accelerator, interrupt.asked)
            if last or asked or looked or trainer.update % config.checkpoint.every == 0:
                save(trainer, run)
            if asked and not last:
                raise KeyboardInterrupt
            if alarmed and config.watchdog.stop:
                break

    with trainer.weights.averaged():
        full_evaluation(trainer, run, full_prompts, "trained", reporter)


def all_prompts(trainer: Trainer, *evaluated: Sequence[str]) -> list[str]:
    """Every prompt that this process will train on or evaluate, in order, each once."""
    config, accelerator = trainer.config, trainer.accelerator
    found: dict[str, None] = {}
    for update in range(config.num_updates):
        first = update * config.batch_size + accelerator.process_index * trainer.share
        for i in draw_prompts(len(trainer.parts.prompts), config.seed, first, trainer.share):
            found[trainer.parts.prompts[i]] = None
    for prompts in evaluated:
        found |= dict.fromkeys(prompts[accelerator.process_index :: accelerator.num_processes])
    return list(found)


def watching(config: TrainConfig) -> bool:
    """Whether the run watches for reward hacking."""
    return config.watchdog.enabled and config.eval.every > 0


def quick_evaluation(trainer: Trainer, run: RunFolder, prompts: Sequence[str], reporter: Reporter) -> Evaluation:
    """The network as it is now on the quick prompts, logged."""
    config = trainer.config
    quick = trainer.evaluate(prompts, config.eval.quick_prompts, config.guidance.scale, reporter, "quick")
    run.log(trainer.update, {f"eval/{name}": value for name, value in quick.means().items()})
    log_grid(run, trainer.update, quick)
    return quick


def watch(trainer: Trainer, run: RunFolder, quick: Evaluation, reporter: Reporter) -> bool:
    """Judges the model against its base, logs what was found; whether there is an alert.

    Every process must call it, only the main one judges.
    """
    config = trainer.config
    if not watching(config):
        return False
    adapters = {} if config.lora is None else trainer.weights.whole_average()
    if not run.is_main:
        return False
    base = load_evaluations(run.path / watchdog.FOLDER).get(("base", config.guidance.scale))
    if base is None or not comparable(base, quick):
        reporter.alert(f"update {trainer.update}: not watched, the base has not been evaluated on these quick prompts")
        return False
    trained, watched = ([one.name for one in part] for part in (config.rewards, config.heldout))
    drift = watchdog.drift_of(base.images(), quick.images)
    found = watchdog.look(config.watchdog, base, quick, trained, watched, drift)
    watchdog.record(run.path, trainer.update, found)
    measures = {f"watch/{name}": value for name, value in found.measures.items()}
    measures["watch/distance"] = distance(base.images(), quick.images).mean().item()
    if config.lora is not None:
        measures["watch/lora_norm"] = watchdog.adapter_norm(adapters, config.lora.alpha / config.lora.rank)
    run.log(trainer.update, measures)
    for alert in found.alerts:
        reporter.alert(f"update {trainer.update}: {alert}")
    return bool(found.alerts)


def full_evaluation(trainer: Trainer, run: RunFolder, prompts: Sequence[str], name: str, reporter: Reporter) -> None:
    """Evaluates at every guidance scale of the configuration and the training's own, and keeps the rows."""
    config = trainer.config
    for scale in dict.fromkeys((config.guidance.scale, *config.eval.guidance)):
        label = f"{name}, guidance {scale:g}"
        reporter.stage(f"evaluating {label}")
        result = trainer.evaluate(prompts, config.eval.prompts, scale, reporter, label)
        if run.is_main:
            save_evaluation(run.path, name, scale, result)


def save(trainer: Trainer, run: RunFolder) -> None:
    """A checkpoint of the state after the updates made so far."""
    run.save_checkpoint(trainer.update, trainer.weights.state(), {})
    healthy = watchdog.last_healthy(run.path)
    run.prune(trainer.config.checkpoint.keep, keep=() if healthy is None else (healthy,))


def log_grid(run: RunFolder, update: int, evaluation: Evaluation) -> None:
    """Keeps a grid of the evaluation's first pictures."""
    if run.is_main:
        from imgen_common.images import grid

        images = evaluation.images[:24]
        run.log_image(update, "quick", grid(images, columns=8, scale=max(1, 96 // images.shape[-1])))


def trained_weights(
    run: RunFolder, kept: Literal["average", "last"] = "average", step: int | None = None
) -> tuple[TrainConfig, dict[str, Tensor]]:
    """The configuration of a run and its weights from a checkpoint, the last by default: averaged, or of that update.

    Raises UserError if there is no such checkpoint.
    """
    chosen = run.latest_checkpoint() if step is None else step
    if chosen is None:
        raise UserError(f"{run.path}: no checkpoint yet; let the run go on (flowbp train --resume {run.path})")
    tensors = run.load_checkpoint(chosen).tensors
    return run.config(TrainConfig), tensors["weights" if kept == "last" else "average"]


@torch.no_grad()
def apply_trained(backbone: Backbone, run_path: Path) -> TrainConfig:
    """Puts a run's averaged weights into a freshly loaded backbone; returns the run's configuration."""
    config, weights = trained_weights(RunFolder.open(run_path, is_main=False))
    for name, parameter in trainable(backbone.net, config).items():
        parameter.copy_(weights[name])
    backbone.net.requires_grad_(False)
    return config
