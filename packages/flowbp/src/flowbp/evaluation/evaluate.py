"""Generates one image per prompt at fixed seeds and scores it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from flowbp.config import TrainConfig
from flowbp.core.engine import rollout
from flowbp.core.guidance import guided_velocity
from flowbp.core.noise import initial_noise
from flowbp.core.plan import RolloutSpec
from flowbp.core.settings import Guidance
from flowbp.core.types import Backbone, Cond, Reward
from flowbp.data.edits import Edit, score_images
from flowbp.evaluation.image_statistics import image_statistics
from imgen_common.errors import UserError


@dataclass(frozen=True)
class ScoredPrompts:
    """Results per prompt, in the order of the prompts.

    scores: by name (`reward`, `heldout`, `verifier`), one number per prompt; those of the verifier are 0 or 1.
    groups: a category per prompt where prompts have one.
    """

    prompts: list[str]
    scores: dict[str, list[float]]
    groups: list[str] | None


@dataclass(frozen=True)
class Evaluation(ScoredPrompts):
    """With the first images, (n, 3, h, w) in [0, 1], and the statistics of all (`image_statistics`), per prompt.

    preview: the tiny decoder that made the images (`model.vae.preview`), whose scores compare with no others; None: the
    autoencoder did.
    """

    images: Tensor = field(repr=False)
    statistics: dict[str, list[float]] = field(default_factory=dict)
    preview: str | None = None


@torch.no_grad()
def generate_latents(
    backbone: Backbone,
    cond: Cond,
    negative: Cond | None,
    noise: Tensor,
    size: tuple[int, int],
    num_inference_steps: int,
    guidance_scale: float,
) -> Tensor:
    """Latents of images of (height, width) `size`, by Euler steps from the noise on the backbone's own noise levels."""
    guidance = Guidance(scale=guidance_scale, rescale=backbone.guidance_rescale)
    velocity = guided_velocity(backbone.velocity, cond, negative, guidance)
    noise = noise.to(next(iter(cond.values())).device)
    sigmas = backbone.sigmas(num_inference_steps, size)
    trajectory = rollout(velocity, noise, sigmas, RolloutSpec(frozenset(), frozenset(), num_inference_steps))
    return trajectory.x_end


@torch.no_grad()
def decode_finite(backbone: Backbone, latents: Tensor) -> Float[Tensor, "b 3 h w"]:
    """Images in [0, 1].  Raises NotFiniteError where there are none to see, which would look black."""
    if not latents.isfinite().all():
        raise NotFiniteError("the network's latents", "check the weights of the model, or try model.dtype=float32")
    images = backbone.decode(latents)
    if not images.isfinite().all():
        raise NotFiniteError(
            "the VAE's images (its latents are finite)", "check the weights of the VAE, or try model.dtype=float32"
        )
    return images


class NotFiniteError(UserError):
    """`what`, a part of the model's result, is NaN or infinite."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"not finite: {what}; {advice}")
        self.what, self.advice = what, advice


EmbedPrompts = Callable[[Sequence[str]], tuple[Cond, Cond | None]]
"""embed_prompts(prompts) -> their embeddings, and that of the negative prompt (one row) where guidance needs it."""


@dataclass(frozen=True)
class EvaluationTask:
    """The prompts of an evaluation and what scores their images.

    rewards: by name.  verify: whether the prompts are captions of the shapes world, which have a verifier.
    num_images: how many of the first images are kept.
    """

    prompts: Sequence[str]
    rewards: Mapping[str, Reward]
    verify: bool
    num_images: int = 0


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that share an evaluation.  gather(rows): the rows of all of them, on each.

    before_batch: called on all of them before each batch; may raise, on all, to give the evaluation up.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[list], list] = list
    before_batch: Callable[[], None] = lambda: None


class _ImageScores(NamedTuple):
    prompt: int
    scores: dict[str, float]
    group: str
    image: Tensor | None
    statistics: dict[str, float]


def evaluate(
    backbone: Backbone,
    embed_prompts: EmbedPrompts,
    task: EvaluationTask,
    config: TrainConfig,
    guidance_scale: float,
    processes: ProcessGroup = ProcessGroup(),
    on_progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Generates one image per prompt, as `config.eval` says, and scores it.

    Prompt i has noise stream (seed, i), whatever the batch.  Prompts are divided among the processes.  All of these
    make equally many forward passes, which a sharded network needs.  on_progress: called with the number of images that
    this process has scored.
    """
    prompts, size = task.prompts, (config.model.height, config.model.width)
    mine = range(processes.rank, len(prompts), processes.size)
    rows: list[_ImageScores] = []
    for start in range(0, -(-len(prompts) // processes.size), config.eval.batch_size):
        processes.before_batch()
        batch = mine[start : start + config.eval.batch_size]
        # a process without prompts left takes part in the passes of the others, with one that it has embedded
        indices = batch or mine[:1] or range(1)
        cond, negative = embed_prompts([prompts[i] for i in indices])
        noise = initial_noise(backbone, size, config.eval.seed, "eval-noise", indices)
        steps = config.eval.num_inference_steps
        # what is not finite becomes a score that is not finite, about which the watchdog alerts
        images = backbone.decode(generate_latents(backbone, cond, negative, noise, size, steps, guidance_scale))
        if batch:
            rows += _score_batch(images, batch, task, size[0] // backbone.latent_shape(size)[1])
            on_progress(len(rows))
    rows = sorted(processes.gather(rows), key=lambda row: row.prompt)
    kept = [row.image for row in rows if row.image is not None]
    return Evaluation(
        prompts=list(prompts),
        scores={name: [row.scores[name] for row in rows] for name in rows[0].scores},
        groups=[row.group for row in rows] if task.verify else None,
        images=torch.stack(kept) if kept else torch.empty(0),
        statistics={name: [row.statistics[name] for row in rows] for name in rows[0].statistics},
    )


def _score_batch(images: Tensor, indices: Sequence[int], task: EvaluationTask, period: int) -> list[_ImageScores]:
    """A row for each image.  period: pixels per latent, of `image_statistics`."""
    prompts = [task.prompts[i] for i in indices]
    with torch.no_grad():
        scores = {name: score_images(reward, images, prompts).tolist() for name, reward in task.rewards.items()}
    groups = [""] * len(prompts)
    if task.verify:
        scores["verifier"], groups = verify_shapes(images, prompts)
    statistics = {name: values.tolist() for name, values in image_statistics(images, period).items()}
    return [
        _ImageScores(
            prompt=i,
            scores={name: values[at] for name, values in scores.items()},
            group=groups[at],
            image=images[at].cpu() if i < task.num_images else None,
            statistics={name: values[at] for name, values in statistics.items()},
        )
        for at, i in enumerate(indices)
    ]


def verify_shapes(images: Tensor, prompts: Sequence[str]) -> tuple[list[float], list[str]]:
    """Whether each image shows what its prompt, of the shapes world, says (0 or 1), and the category of each prompt."""
    from imgen_common.shapes.edits import edit_holds
    from imgen_common.shapes.scene import parse_caption
    from imgen_common.shapes.verify import caption_holds, detect

    held: list[float] = []
    groups: list[str] = []
    for prompt, found in zip(prompts, detect(images), strict=True):
        if isinstance(prompt, Edit) and prompt.shapes is not None:
            held.append(float(edit_holds(found, prompt.shapes)))
            groups.append(prompt.shapes.change.kind)
        else:
            spec = parse_caption(prompt)
            held.append(float(caption_holds(found, spec)))
            groups.append(spec.category)
    return held, groups
