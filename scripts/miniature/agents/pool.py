"""A pool of images of the miniature generator, on which the critic is trained and measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from imgen_common.config import Config
from imgen_common.hub import resolve
from imgen_common.shapes.edits import sample_edit
from imgen_common.shapes.render import render
from imgen_common.shapes.scene import SIZE, Split, sample_spec, split_of
from imgen_common.shapes.steps import EditKind
from imgen_common.shapes.stories import sample_change
from imgen_common.shapes.verify import detect
from imgen_common.streams import normal, numpy_generator
from scripts.miniature.world.generator import encode, enlarge, sample

CHUNK = 60
"""Images per file."""
WHITE = 255
"""Value of the image that stands before the first one."""


class PoolSize(Config):
    """Numbers of chunks of 60 images."""

    captions: int
    """Chunks of images generated from captions."""
    edits: int
    """Chunks of edits of rendered scenes."""
    chains: int
    """Chunks of changes of generated images."""
    recolorings: int
    """Chunks of recolorings of one of several things in generated images, which the generator does worst."""
    steps: tuple[int, ...]
    """Sampling steps, which the chunks take in turns."""


TRAIN = PoolSize(captions=30, edits=30, chains=7, recolorings=16, steps=(12, 12, 25))
TEST = PoolSize(captions=8, edits=5, chains=3, recolorings=3, steps=(25,))
GUIDANCE = (1.0, 2.0)


@dataclass(frozen=True)
class GeneratedImages:
    """Images as uint8 (n, 3, 32, 32) and the prompts of which they came; `before` is white for a caption."""

    before: Tensor
    after: Tensor
    prompts: list[str]

    @staticmethod
    def join(parts: Sequence["GeneratedImages"]) -> "GeneratedImages":
        """All of them in order."""
        return GeneratedImages(
            torch.cat([p.before for p in parts]),
            torch.cat([p.after for p in parts]),
            [prompt for p in parts for prompt in p.prompts],
        )


def read_chunk(file: Path) -> GeneratedImages:
    """One chunk."""
    with safe_open(file, "pt") as tensors:
        prompts = tensors.metadata()["prompts"].split("\n")
        return GeneratedImages(tensors.get_tensor("before"), tensors.get_tensor("after"), prompts)


def load_pool(
    folder: Path, split: Split, kinds: Sequence[str] = ("drawn", "edited", "chained", "recoloured")
) -> GeneratedImages:
    """All finished chunks of a split."""
    files = [file for kind in kinds for file in sorted((folder / split).glob(f"{kind}-*.safetensors"))]
    return GeneratedImages.join([read_chunk(file) for file in files])


def to_bytes(images: Tensor) -> Tensor:
    """(n, 3, h, w) in [0, 1] to uint8, rounded to nearest as a saved image is."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def generate_pool(folder: Path, split: Split, size: PoolSize, seed: int) -> None:
    """Draws what is missing of a split's pool."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    pipeline = Flux2KleinPipeline.from_pretrained(resolve("builtin:shapes/generator"), dtype=torch.float32)
    makers: Mapping[str, tuple[int, Callable[[Path, Split, int, int], tuple[Tensor | None, list[str]]]]] = {
        "drawn": (size.captions, _sample_captions),
        "edited": (size.edits, _sample_edits),
        "chained": (size.chains, _sample_chains),
        "recoloured": (size.recolorings, _sample_recolorings),
    }
    for kind, (count, make) in makers.items():
        for i in range(count):
            file = folder / split / f"{kind}-{i:03d}.safetensors"
            if file.exists():
                continue
            before, prompts = make(folder, split, seed, i)
            noise = torch.stack([normal((16, 32), seed, f"pool-{split}-{kind}", i, j) for j in range(len(prompts))])
            after = sample(
                pipeline,
                prompts,
                noise,
                steps=size.steps[i % len(size.steps)],
                guidance=GUIDANCE[i % len(GUIDANCE)],
                reference=None if before is None else encode(pipeline, enlarge(before)),
            )
            if before is None:
                before = torch.ones_like(after)
            tensors = {"before": to_bytes(before), "after": to_bytes(after)}
            save_file(tensors, file.with_suffix(".new"), {"prompts": "\n".join(prompts)})
            file.with_suffix(".new").rename(file)
            print(file.name, flush=True)


def _sample_captions(folder: Path, split: Split, seed: int, chunk: int) -> tuple[None, list[str]]:
    rng = numpy_generator(seed, f"pool-{split}-captions", chunk)
    return None, [sample_spec(rng, split).caption for _ in range(CHUNK)]


def _sample_edits(folder: Path, split: Split, seed: int, chunk: int) -> tuple[Tensor, list[str]]:
    rng = numpy_generator(seed, f"pool-{split}-edits", chunk)
    edits = [sample_edit(rng, split) for _ in range(CHUNK)]
    return torch.from_numpy(np.stack([render(e.before) for e in edits])), [e.instruction for e in edits]


def _sample_chains(folder: Path, split: Split, seed: int, chunk: int) -> tuple[Tensor, list[str]]:
    """Changes of generated and edited images."""
    return _sample_changes(folder, split, numpy_generator(seed, f"pool-{split}-chains", chunk))


def _sample_recolorings(folder: Path, split: Split, seed: int, chunk: int) -> tuple[Tensor, list[str]]:
    """Recolorings of one of several things in generated and edited images."""
    return _sample_changes(folder, split, numpy_generator(seed, f"pool-{split}-recolourings", chunk), "recolour")


def _sample_changes(
    folder: Path, split: Split, rng: np.random.Generator, kind: EditKind | None = None
) -> tuple[Tensor, list[str]]:
    """Changes of generated and edited images whose things are distinct, well formed and of this split.

    kind: only changes of this kind, and only of images with several things.
    """
    images = load_pool(folder, split, ("drawn", "edited")).after
    chosen: list[Tensor] = []
    prompts: list[str] = []
    while len(prompts) < CHUNK:
        image = images[int(rng.integers(len(images)))].float()[None] / 255
        things = tuple(sorted(d.thing for d in detect(image)[0]))
        if not 0 < len(set(things)) == len(things) <= 3 or any("mixed" in str(t) or "blob" in str(t) for t in things):
            continue
        if split_of(things) != split or (kind and len(things) == 1):
            continue
        step = sample_change(things, rng, split)
        if step is not None and kind in (None, step.kind):
            chosen.append(image[0])
            prompts.append(step.prompt)
    assert chosen[0].shape == (3, SIZE, SIZE)
    return torch.stack(chosen), prompts
