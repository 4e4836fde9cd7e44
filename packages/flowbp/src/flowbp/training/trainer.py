"""One update: draw a plan, roll out, score, sweep, step."""

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import combinations

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from flowbp.backbones.loading import with_decoder, without_adapters
from flowbp.config import TrainConfig
from flowbp.core.engine import BackwardOptions, Outcome, Regulariser, backpropagate, num_backward_passes, rollout
from flowbp.core.guidance import guided_velocity
from flowbp.core.multi_reward import combine_gradients
from flowbp.core.noise import initial_noise
from flowbp.core.plan import Plan, RolloutSpec, draw_plan
from flowbp.core.types import Cond, ScoredLosses, Velocity
from flowbp.data.edits import score_images
from flowbp.data.prompts import is_shapes_source, prompt_indices
from flowbp.evaluation.evaluate import Evaluation, EvaluationTask, NotFiniteError, ProcessGroup, decode_finite, evaluate
from flowbp.rewards.losses import reward_losses
from flowbp.training.loading import LoadedModels, make_train_state
from flowbp.training.preflight import batch_sizes, keeps_working_copy
from flowbp.training.stage_clock import StageClock
from flowbp.training.state import TorchTrainState
from imgen_common.devices import autocast_weights_once
from imgen_common.errors import check_gradients
from imgen_common.streams import normal, numpy_generator

LOWER = "lower optim.learning_rate or optim.max_grad_norm"
"""What helps a training that diverges."""
DIVERGED = f"the weights have diverged; {LOWER}"
"""The same where the weights that an update begins with give no images, so that it fails at any rate."""
FIRST = "check the weights of the model and of the rewards, or compute in float32 (model.dtype, dtype of each reward)"
"""What helps where nothing was trained yet."""
NUM_SAVED_IMAGES = 48
"""Images kept of every evaluation."""


class Trainer:
    """Everything an update needs.  Only `state` (weights, their average, moments) and `update` change.

    Prompts, noise and plans are functions of (seed, update), so a resumed run repeats the uninterrupted one exactly.
    """

    def __init__(self, config: TrainConfig, models: LoadedModels, accelerator: Accelerator) -> None:
        self.config, self.models, self.accelerator = config, models, accelerator
        self.batch = batch_sizes(config, accelerator.num_processes)
        self.size = (config.model.height, config.model.width)
        self.sigmas = models.backbone.sigmas(config.num_inference_steps, self.size, config.train_sigmas)
        self.state = make_train_state(config, models.backbone, accelerator)
        self.reward_weights = torch.tensor([reward.weight for reward in config.rewards], dtype=torch.float64)
        self.update = 0
        self.clock = StageClock(accelerator.device, counts=not (config.model.compile or config.rollout.compile))

    def step(self) -> dict[str, float]:
        """One update; returns its metrics.  Raises NotFiniteError, with no weight changed, if it is not finite."""
        start, plan = time.perf_counter(), self._draw_plan()
        with self.clock.update():
            metrics = self.compute_gradient()
            learning_rate, norm = learning_rate_at(self.config, self.update), math.nan
            if math.isfinite(metrics["loss"]):
                # the average follows quickly at first, when the weights it remembers are hardly trained
                ema_decay = min(self.config.ema, (1 + self.update) / (10 + self.update))
                norm = self.state.step(learning_rate, self.config.optim.max_grad_norm, ema_decay)
        if not math.isfinite(norm):
            raise self.find_not_finite()
        self.update += 1
        seconds = time.perf_counter() - start
        return {
            **metrics,
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "seconds": seconds,
            **self.clock.metrics(plan, seconds),
            "peak_memory_gib": peak_memory_gib(self.accelerator.device),
        }

    def _draw_plan(self) -> Plan:
        """Of this update: one for all samples, the same on every process, so that all make equally many passes."""
        return draw_plan(self.config.method, self.sigmas, numpy_generator(self.config.seed, "plan", self.update))

    def compute_gradient(self) -> dict[str, float]:
        """Leaves the global batch's gradient of this update in `.grad`, on every process; returns its metrics."""
        config, batch = self.config, self.batch
        plan = self._draw_plan()
        regularised = config.regularise is not None
        num_passes = batch.gradient_accumulation_steps * num_backward_passes(
            plan, config.active_steps_per_forward, regularised=regularised
        )
        # normalize here and nowhere else: the engine takes the mean over a micro-batch, the update the mean over the
        # global batch, so a micro-batch counts as its part of it; metrics are summed over samples and divided below
        share = batch.per_device / config.total_batch_size
        scale = share * config.classifier_free_guidance.backward_scale * self.state.gradient_scale
        sums: dict[str, float] = {}
        if self.models.rollout is not None:
            self.models.rollout.refresh()
        # samples are numbered through the whole run
        first = self.update * config.total_batch_size + self.accelerator.process_index * batch.per_process
        with self.state.gradient_sync(num_passes), self._weights_cast_once():
            for start in range(first, first + batch.per_process, batch.per_device):
                samples = range(start, start + batch.per_device)
                for name, value in self._accumulate(plan, samples, scale).items():
                    sums[name] = sums.get(name, 0.0) + value
            self.clock.switch("optimizer")
            self._check_gradients()
        metrics = self._sum_over_processes({name: value / config.total_batch_size for name, value in sums.items()})
        return metrics | {"gradient_forwards": float(plan.num_gradient_forwards)}

    def _weights_cast_once(self) -> AbstractContextManager[None]:
        """Around evaluations of the same weights, which autocast casts once where `model.working_copy` says so."""
        used = keeps_working_copy(self.config) and self.models.backbone.bfloat16
        return autocast_weights_once() if used else nullcontext()

    def _check_gradients(self) -> None:
        """Raises UserError if a trained weight got no gradient, not even zeros.  DeepSpeed keeps its own."""
        if isinstance(self.state, TorchTrainState):
            unused = self.models.backbone.unused_layers
            silent = [name for name, p in self.state.parameters.items() if p.grad is None]
            check_gradients([name for name in silent if not name.startswith(unused)])

    @torch.no_grad()
    def find_not_finite(self) -> NotFiniteError:
        """Repeats the rollouts of this update to find what is not finite first, on any process; all must call it."""
        config, batch = self.config, self.batch
        first = self.update * config.total_batch_size + self.accelerator.process_index * batch.per_process
        found: NotFiniteError | None = None
        for start in range(first, first + batch.per_process, batch.per_device):
            samples = range(start, start + batch.per_device)
            prompts, x_0 = self._samples(samples)
            velocity = self._rollout_velocity(self.models.embeddings(prompts))
            x_end = rollout(
                velocity, x_0, self.sigmas, RolloutSpec(frozenset(), frozenset(), len(self.sigmas) - 1)
            ).x_end
            try:
                images = decode_finite(self.models.backbone, x_end)
            except NotFiniteError as error:
                is_diverged = self.update > 0 and not x_end.isfinite().all()
                found = found or (NotFiniteError(error.what, DIVERGED) if is_diverged else error)
                continue
            for name, reward in self.models.rewards.items():
                if not score_images(reward, images, prompts).isfinite().all():
                    found = found or NotFiniteError(f"the scores of {name}", "check its weights, or leave it out")
        gather = gather_object if self.accelerator.num_processes > 1 else list
        own = [] if found is None else [(found.what, found.advice)]  # an exception of two arguments cannot be pickled
        every = gather(own)
        return NotFiniteError(*every[0]) if every else NotFiniteError("the gradient", LOWER if self.update else FIRST)

    def _samples(self, samples: range) -> tuple[list[str], Tensor]:
        """Prompts and noise, which depend on a sample's number alone, not on the rank or its micro-batch."""
        config, models = self.config, self.models
        chosen = prompt_indices(len(models.prompts), config.seed, samples.start, len(samples))
        x_0 = initial_noise(models.backbone, self.size, config.seed, "noise", samples)
        return [models.prompts[i] for i in chosen], x_0.to(self.accelerator.device)

    def _velocity(self, conds: tuple[Cond, Cond], *, gradient_only: bool = False) -> Velocity:
        """`guided_velocity` of samples with this conditioning, of their prompts and of the negative one."""
        backbone, guidance = self.models.backbone, self.config.classifier_free_guidance
        rescale = backbone.guidance_rescale
        return guided_velocity(backbone.velocity, *conds, guidance, rescale, gradient_only=gradient_only)

    def _rollout_velocity(self, conds: tuple[Cond, Cond]) -> Velocity:
        """`_velocity` as `config.rollout` says, for evaluations without gradient."""
        rolled = self.models.rollout or self.models.backbone
        rescale = self.models.backbone.guidance_rescale
        return guided_velocity(rolled.velocity, *conds, self.config.classifier_free_guidance, rescale)

    def _regulariser(self, conds: tuple[Cond, Cond]) -> Regulariser | None:
        """The anchor to the base, whose velocity is guided as that of the sweep is, one branch after the other too: at
        equal weights both are equal bit for bit."""
        config, models = self.config, self.models
        if config.regularise is None:
            return None
        guidance = config.classifier_free_guidance
        guidance = guidance.model_copy(update={"batched": guidance.batched and not guidance.detach_negative})
        backbone = models.base or models.backbone
        velocity = guided_velocity(backbone.velocity, *conds, guidance, backbone.guidance_rescale)

        def base(x: Tensor, sigma: Tensor) -> Tensor:
            self.clock.switch("sweep")
            with without_adapters(models.backbone.net):
                return velocity(x, sigma)

        return Regulariser(config.regularise.weight, base)

    def _accumulate(self, plan: Plan, samples: range, scale: float) -> dict[str, float]:
        """Adds the gradient of some samples of the global batch; returns sums over these samples."""
        config, device, clock = self.config, self.accelerator.device, self.clock
        clock.switch("data")
        prompts, x_0 = self._samples(samples)

        def renoise(copy: int) -> Tensor:
            return torch.stack([normal(x_0.shape[1:], config.seed, "renoise", i, copy) for i in samples]).to(device)

        # the rollout keeps only what the plan and `keep_graphs` ask for; the sweep then makes a graph per other term
        conds = self.models.embeddings(prompts)
        velocity = self.state.sync_on_last_backward(self._velocity(conds))
        spec = plan.keep_graphs(config.keep_graphs)
        rolled = self._rollout_velocity(conds)

        def rolled_velocity(x: Tensor, sigma: Tensor) -> Tensor:
            # a graph that is kept is one of the network as it is trained
            return (velocity if torch.is_grad_enabled() else rolled)(x, sigma)

        trajectory = rollout(
            clock.timed(rolled_velocity, "rollout"), x_0, self.sigmas, spec, offload=config.offload_trajectory
        )
        options = BackwardOptions(
            scale=scale,
            reward_weights=self.reward_weights,
            combine=None if config.combine == "weighted" else self._combine,
            reward_batch_size=config.reward_batch_size,
            steps_per_forward=config.active_steps_per_forward,
            regulariser=self._regulariser(conds),
            gradient_velocity=clock.timed(self.state.sync_on_last_backward(self._velocity(conds, gradient_only=True))),
        )
        loss = partial(self._score, prompts)
        evaluated = clock.timed(velocity)
        return self._metric_sums(backpropagate(plan, trajectory, evaluated, loss, noise=renoise, options=options))

    def _combine(self, gradients: Tensor) -> Tensor:
        return combine_gradients(gradients, self.reward_weights, self.config.combine)

    def _score(self, prompts: Sequence[str], x: Tensor, rows: slice) -> ScoredLosses:
        """Losses (rewards, b) of the clean latents of samples `rows`, and the scores of all rewards, (b,) each."""
        config, rewards = self.config, self.models.rewards
        self.clock.switch("decoder")
        images, texts = self.models.backbone.decode(x), prompts[rows]
        self.clock.switch("reward")
        self.clock.switch_at_gradient(images, "decoder")
        scores = {reward.name: score_images(rewards[reward.name], images, texts) for reward in config.rewards}
        losses = torch.stack([reward_losses(reward.loss, scores[reward.name]) for reward in config.rewards])
        self.clock.switch_at_gradient(losses, "reward")
        with torch.no_grad():
            scores |= {held.name: score_images(rewards[held.name], images, texts) for held in config.heldout}
        return ScoredLosses(losses, {name: found.detach() for name, found in scores.items()})

    def _metric_sums(self, outcome: Outcome) -> dict[str, float]:
        """Sums over samples of scores, loss, gaps of legs, and how several rewards' gradients compare."""
        sums = {name: values.sum().item() for name, values in outcome.scores.items()}
        sums["loss"] = (self.reward_weights @ outcome.losses.mean(0).sum(1).double().cpu()).item()
        if outcome.regularise is not None:
            sums["regularise"] = outcome.regularise.sum().item()
        sums |= {f"gap_{k}": row.sum().item() for k, row in enumerate(outcome.gaps)}
        if outcome.agreement is not None:
            names = [reward.name for reward in self.config.rewards]
            norms, cosines = outcome.agreement.norms.sum(-1), outcome.agreement.cosines.sum(-1)
            sums |= {f"gradient_{name}": norms[i].item() for i, name in enumerate(names)}
            for (i, first), (j, second) in combinations(enumerate(names), 2):
                sums[f"cosine_{first}_{second}"] = cosines[i, j].item()
        return sums

    def _sum_over_processes(self, metrics: dict[str, float]) -> dict[str, float]:
        """Adds metrics up over the processes, in one message."""
        if self.accelerator.num_processes == 1:
            return metrics
        names = sorted(metrics)
        totals = self.accelerator.reduce(
            torch.tensor([metrics[n] for n in names], dtype=torch.float64, device=self.accelerator.device), "sum"
        )
        return dict(zip(names, totals.tolist(), strict=True))

    def restore(self, update: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restores the state of a checkpoint made after `update` updates."""
        self.state.load_state_dict(tensors, update)
        self.update = update

    def training_prompts(self) -> list[str]:
        """Every prompt that this process will train on, in order of first use."""
        config, batch, prompts = self.config, self.batch, self.models.prompts
        starts = range(0, config.max_train_steps * config.total_batch_size, config.total_batch_size)
        first = self.accelerator.process_index * batch.per_process
        chosen = (prompt_indices(len(prompts), config.seed, start + first, batch.per_process) for start in starts)
        used = dict.fromkeys(i for indices in chosen for i in indices)  # edits with equal words are not the same
        return [prompts[i] for i in used]

    def embed_prompts(self, prompts: Sequence[str]) -> None:
        """Embeds them and the empty prompt, then unloads the text encoders, which may be larger than the network."""
        self.models.embeddings.add(prompts)
        for backbone in (self.models.backbone, self.models.eval_backbone, self.models.base):
            if backbone is not None:
                backbone.unload_text_encoders()

    def evaluate(
        self,
        prompts: Sequence[str],
        source: str,
        guidance: float,
        on_progress: Callable[[int], None] = lambda done: None,
        before_batch: Callable[[], None] = lambda: None,
        *,
        quick: bool = False,
    ) -> Evaluation:
        """Images and scores of the network as it is now, at the evaluation's fixed seeds.

        on_progress: called with the number of images that all processes have scored.  before_batch: of `ProcessGroup`.
        quick: images are decoded by `model.vae.preview`, if there is one.
        """
        accelerator, models = self.accelerator, self.models
        backbone, preview = models.eval_backbone or models.backbone, None
        if quick and models.preview is not None:
            backbone, preview = with_decoder(backbone, models.preview), self.config.model.vae.preview
        task = EvaluationTask(prompts, self.models.rewards, is_shapes_source(source), NUM_SAVED_IMAGES)
        gather = gather_object if accelerator.num_processes > 1 else list
        with self._weights_cast_once():
            found = evaluate(
                backbone,
                self.models.embeddings,
                task,
                self.config,
                guidance,
                ProcessGroup(accelerator.process_index, accelerator.num_processes, gather, before_batch),
                lambda done: on_progress(min(done * accelerator.num_processes, len(prompts))),
            )
        return replace(found, preview=preview)


def learning_rate_at(config: TrainConfig, update: int) -> float:
    """Learning rate of an update, counted from 0."""
    optim = config.optim
    warm = min(1.0, (update + 1) / (optim.lr_warmup_steps + 1))
    progress = max(0, update - optim.lr_warmup_steps) / max(1, config.max_train_steps - optim.lr_warmup_steps)
    fall = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress)}
    return optim.learning_rate * warm * fall[optim.lr_scheduler]


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: of the GPU, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
