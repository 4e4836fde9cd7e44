"""The shared vocabulary: velocities, trajectories, conditioning, and the two protocols the engine is fed by."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from flowbp.core.settings import GuidanceRescale, NoiseLevels
from imgen_common.prompt_limits import PromptLimit

Velocity = Callable[[Tensor, Tensor], Tensor]
"""velocity(x, sigma) -> v = dx/dsigma, same shape as x.

x is (c*b, ...) for any whole number c of copies of the micro-batch of b samples, copy-major (all b samples of copy 0
first); sigma is (c*b,), float32 or float64.  The callable closes over prompts and guidance and repeats its
conditioning c times (`repeat_batch`)."""


@dataclass(frozen=True)
class ScoredLosses:
    """What a loss may return beside its values.

    losses: (b,), or (rewards, b), differentiable.  scores: detached numbers by name, (b,), which the engine hands on.
    """

    losses: Tensor
    scores: Mapping[str, Tensor]


Loss = Callable[[Tensor, slice], Tensor | ScoredLosses]
"""loss(x, rows) -> per-sample losses, shape (rows,), or (rewards, rows): differentiable in x, smaller is better.

x holds the clean latents of samples `rows` of the micro-batch, so that the reward can be run in chunks."""

Noise = Callable[[int], Tensor]
"""noise(copy) -> standard normal, shape of the latents; copy counts from 0.  Must depend on the sample, not on the
rank or on how often it was called."""

Cond = Mapping[str, Tensor]
"""What a backbone's `encode` returns: opaque, every value batch-first."""

LENGTHS = "lengths"
"""Key of a conditioning whose texts a network sees at their own lengths: how many tokens of each are its own, (b,).
Where it is missing, as on tensors without content, all are."""


Layout = tuple[tuple[int, int], ...]
"""Rows and columns of the tokens of each source image of a sample."""


@dataclass(frozen=True)
class Trajectory:
    """What a no-grad rollout leaves behind.

    sigmas: the grid, shape (N+1,), descending to 0.  states: {i: x_i} and velocities: {i: v_i}, only those a plan
    asked to keep.  x_end: what the reward sees, x_N or the posterior mean of an early stop.  graphs: {i: (x_i, v_i)},
    the v_i with their graphs, which a sweep frees.
    """

    sigmas: Float[Tensor, " n_plus_1"]
    states: Mapping[int, Tensor]
    velocities: Mapping[int, Tensor]
    x_end: Tensor
    graphs: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@runtime_checkable
class Backbone(Protocol):
    """One model family behind one small adapter; knows no LoRA, EMA, checkpoints or guidance."""

    net: nn.Module
    """What is trained."""
    pipe: Any
    """The diffusers pipeline it was loaded from, `net` being its transformer."""
    guidance_rescale: GuidanceRescale
    """What becomes of a guided velocity: what the family's pipeline does, unless it was set otherwise."""
    bfloat16: bool
    """Whether the network multiplies matrices in bfloat16 (autocast), whatever its weights are kept in."""
    embedded_guidance: float
    """Guidance input of a guidance-distilled network; others have none."""

    @property
    def unused_layers(self) -> tuple[str, ...]:
        """Names of layers of `net` that no image depends on, and that hence get no gradient."""

    max_tokens: int
    """Tokens to which the longest-reading text encoder pads and cuts a prompt."""

    def encode(self, prompts: Sequence[str]) -> Cond:
        """Conditioning of the prompts, batch-first."""

    min_sources: int
    """Source images that every prompt must have; 0: it may have none."""
    max_sources: int
    """Source images that an edit may have; 0: the family cannot edit."""
    reads_sources: bool
    """Whether the text encoder sees the sources, so that the conditioning of a prompt, and of the empty one, depends on
    them: then `encode_edit` embeds, otherwise `encode`."""

    def encode_edit(self, instruction: str, sources: Sequence[Image.Image]) -> Cond:
        """Conditioning of one instruction, (1, ...), whose sources the text encoder sees."""

    def source_text_tokens(self, size: tuple[int, int]) -> int:
        """Tokens of text that stand for a source, prepared at `size`; 0 where the text encoder does not see it."""

    def source_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) to which a source image of `size` is brought.  Raises UserError where it cannot be."""

    def prepare_source(self, image: Image.Image) -> Float[Tensor, "1 3 h w"]:
        """What `encode_source` takes.  Raises UserError as `source_size`."""

    def encode_source(self, pixels: Float[Tensor, "1 3 h w"]) -> Float[Tensor, "c rows columns"]:
        """Latents of a source image, one token in each place."""

    def velocity_of_layout(self, x: Tensor, sigma: Tensor, cond: Cond, layout: Layout) -> Tensor:
        """`velocity` of samples that all have sources of one layout."""

    def prompt_limits(self) -> Mapping[str, PromptLimit]:
        """How much of a prompt each text encoder reads, by its name; before they are unloaded."""

    def unload_text_encoders(self) -> None:
        """Removes the text encoders; `encode` does not work afterwards."""

    def set_max_tokens(self, length: int) -> None:
        """Pads and cuts prompts to so many tokens.  Raises UserError where the text encoder does not read them."""

    def pipeline_guidance(self, scale: float) -> float:
        """What the pipeline's own `guidance_scale` (or `true_cfg_scale`) must be for guidance at `scale` here."""

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Shape of one latent, without the batch, for images of `size` (height, width) pixels."""

    def noise(self, batch: int, size: tuple[int, int], rng: torch.Generator) -> Tensor:
        """Standard normal latents for images of `size` (height, width) pixels."""

    def sigmas(self, steps: int, size: tuple[int, int], levels: NoiseLevels = "pipeline") -> Tensor:
        """Noise levels, shape (steps + 1,), shift included, 1 ... 0: the pipeline's, or shifted linspace(1, 1/N, N)."""

    def velocity(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """dx/dsigma, unguided; sigma of shape (batch,), in [0, 1]."""

    def decode(self, x: Tensor) -> Tensor:
        """Images "b 3 h w" in [0, 1], differentiable."""


@runtime_checkable
class Reward(Protocol):
    """A differentiable score of images; larger is better.  One that cuts prompts has a `prompt_limit`.

    One with `sees_sources = True` is called with a third argument: for each prompt, a tuple of the images that it
    edits, perhaps none, tensors (3, h_i, w_i) in [0, 1]; its prompts are instructions, while others get captions of the
    wanted images.
    """

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """Scores of images in [0, 1] for their prompts."""


def batch_size(cond: Cond) -> int:
    """Number of samples in `cond`; raises ValueError if its values disagree or it is empty."""
    sizes = {value.shape[0] for value in cond.values()}
    if len(sizes) != 1:
        raise ValueError(
            f"conditioning must hold one batch size, got { ({k: tuple(v.shape) for k, v in cond.items()}) }"
        )
    return sizes.pop()


def repeat_batch(cond: Cond, copies: int) -> dict[str, Tensor]:
    """`cond` repeated `copies` times, copy-major; the very tensors when copies is 1."""
    if copies == 1:
        return dict(cond)
    return {key: value.repeat(copies, *(1,) * (value.dim() - 1)) for key, value in cond.items()}


def concat(a: Cond, b: Cond) -> dict[str, Tensor]:
    """The samples of `a` followed by those of `b`.

    Raises ValueError if keys, or shapes apart from the batch, differ (texts of different padded length do).
    """
    if a.keys() != b.keys():
        raise ValueError(f"conditionings differ in keys: {sorted(a)} and {sorted(b)}")
    for key in a:
        if a[key].shape[1:] != b[key].shape[1:]:
            raise ValueError(
                f"conditioning {key!r} cannot be concatenated: {tuple(a[key].shape)} and {tuple(b[key].shape)}; "
                "pad both to one length, or set guidance.batched to false"
            )
    return {key: torch.cat([a[key], b[key]]) for key in a}
