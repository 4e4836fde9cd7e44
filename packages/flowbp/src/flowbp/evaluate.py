"""Scores of a generator at fixed seeds, one row per prompt, and paired intervals between two of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flowbp.engine import rollout
from flowbp.guidance import Guidance, guided
from flowbp.pictures import statistics
from flowbp.plan import Keep
from flowbp.types import Backbone, Cond, Reward
from imgen_common.streams import normal


@dataclass(frozen=True)
class Evaluation:
    """Per-prompt results, in the prompts' order.

    scores: by name (`reward`, `heldout`, `verifier`), one number per prompt; verifier scores are 0 or 1.  statistics:
    of the pictures, by name (`pictures.statistics`), one number per prompt.
    groups: a category per prompt where the prompts have one.  images: the first pictures, (n, 3, h, w) in [0, 1].
    """

    prompts: list[str]
    scores: dict[str, list[float]]
    groups: list[str] | None
    images: Tensor = field(repr=False)
    statistics: dict[str, list[float]] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """Mean of every score."""
        return {name: float(np.mean(values)) for name, values in self.scores.items()}


def initial_noise(backbone: Backbone, size: tuple[int, int], seed: int, purpose: str, indices: Sequence[int]) -> Tensor:
    """Noise (len(indices), ...): each sample from its own stream, so that batch, rank and order do not matter."""
    return torch.stack([normal(backbone.latent_shape(size), seed, purpose, i) for i in indices])


@torch.no_grad()
def generate(
    backbone: Backbone,
    cond: Cond,
    negative: Cond | None,
    noise: Tensor,
    *,
    size: tuple[int, int],
    steps: int,
    guidance: float,
) -> Float[Tensor, "b 3 h w"]:
    """Pictures in [0, 1] by `steps` Euler steps from the noise, on the backbone's own noise levels."""
    velocity = guided(backbone.velocity, cond, negative, Guidance(scale=guidance))
    trajectory = rollout(velocity, noise, backbone.sigmas(steps, size), Keep(frozenset(), frozenset(), steps))
    return backbone.decode(trajectory.x_end)


def shapes_verdicts(images: Tensor, prompts: Sequence[str]) -> tuple[list[float], list[str]]:
    """Strict verdicts (0 or 1) of pictures for captions of the shapes world, and each caption's category."""
    from imgen_common.shapes.scene import parse_caption
    from imgen_common.shapes.verify import verify

    specs = [parse_caption(p) for p in prompts]
    return [float(v.ok) for v in verify(images, specs)], [s.category for s in specs]


Conditioner = Callable[[Sequence[str]], tuple[Cond, Cond | None]]
"""conditions(prompts) -> their conditioning, and that of the negative prompt (one row) where guidance needs it."""


@dataclass(frozen=True)
class Sampling:
    """How the pictures of an evaluation are made: prompt i from noise stream (seed, i), whatever the batch."""

    size: tuple[int, int]
    steps: int
    guidance: float
    seed: int
    batch_size: int


class _Row(NamedTuple):
    place: int
    scores: dict[str, float]
    group: str
    picture: Tensor | None
    statistics: dict[str, float]


def evaluate(
    backbone: Backbone,
    conditions: Conditioner,
    prompts: Sequence[str],
    rewards: Mapping[str, Reward],
    sampling: Sampling,
    *,
    verify: bool,
    num_images: int = 0,
    rank: int = 0,
    world: int = 1,
    gather: Callable[[list], list] = lambda rows: rows,
    tick: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Generates one picture per prompt and scores it.

    rewards: by name.  verify: whether the prompts are captions of the shapes world.  num_images: pictures kept.
    rank, world, gather: prompts are dealt out over processes and their rows collected; all make equally many forwards,
    which a sharded network needs.  tick: told how many are done.
    """
    mine = range(rank, len(prompts), world)
    period = sampling.size[0] // backbone.latent_shape(sampling.size)[1]
    rows: list[_Row] = []
    for start in range(0, -(-len(prompts) // world), sampling.batch_size):
        indices = mine[start : start + sampling.batch_size]
        if not indices:
            _pictures(backbone, *conditions([""]), range(1), sampling)
            continue
        texts = [prompts[i] for i in indices]
        images = _pictures(backbone, *conditions(texts), indices, sampling)
        with torch.no_grad():
            scores = {name: reward(images, texts).tolist() for name, reward in rewards.items()}
        groups = [""] * len(texts)
        if verify:
            scores["verifier"], groups = shapes_verdicts(images, texts)
        measured = {name: values.tolist() for name, values in statistics(images, period).items()}
        for at, i in enumerate(indices):
            picture = images[at].cpu() if i < num_images else None
            own, looks = ({name: values[at] for name, values in of.items()} for of in (scores, measured))
            rows.append(_Row(i, own, groups[at], picture, looks))
        tick(len(rows))
    return _collected(prompts, sorted(gather(rows), key=lambda row: row[0]), verify)


def _pictures(
    backbone: Backbone, cond: Cond, negative: Cond | None, indices: Sequence[int], sampling: Sampling
) -> Tensor:
    noise = initial_noise(backbone, sampling.size, sampling.seed, "eval-noise", indices)
    noise = noise.to(next(iter(cond.values())).device)
    return generate(
        backbone, cond, negative, noise, size=sampling.size, steps=sampling.steps, guidance=sampling.guidance
    )


def _collected(prompts: Sequence[str], rows: Sequence[_Row], verify: bool) -> Evaluation:
    pictures = [row.picture for row in rows if row.picture is not None]
    return Evaluation(
        prompts=list(prompts),
        scores={name: [row.scores[name] for row in rows] for name in rows[0].scores},
        groups=[row.group for row in rows] if verify else None,
        images=torch.stack(pictures) if pictures else torch.empty(0),
        statistics={name: [row.statistics[name] for row in rows] for name in rows[0].statistics},
    )


def interval(
    strata: Sequence[Sequence[float]], *, level: float = 0.95, draws: int = 4000, seed: int = 0
) -> tuple[float, float, float]:
    """(mean of the strata's means, low, high): percentile bootstrap, every stratum resampled within itself."""
    rng = np.random.default_rng(seed)
    arrays = [np.asarray(values, float) for values in strata]
    means = np.mean([values[rng.integers(len(values), size=(draws, len(values)))].mean(1) for values in arrays], axis=0)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(np.mean([values.mean() for values in arrays])), float(low), float(high)


def paired_interval(
    before: Sequence[float], after: Sequence[float], *, level: float = 0.95, draws: int = 4000, seed: int = 0
) -> tuple[float, float, float]:
    """(mean difference, low, high): percentile bootstrap over pairs, at the given level."""
    difference = np.asarray(after, float) - np.asarray(before, float)
    return interval([difference.tolist()], level=level, draws=draws, seed=seed)
