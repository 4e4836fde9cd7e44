"""A pool of pictures drawn by the miniature generator, for the critic to learn from and to be measured on."""

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
from imgen_common.shapes.edits import EditKind, sample_edit
from imgen_common.shapes.render import render
from imgen_common.shapes.scene import SIZE, Split, sample_spec, split_of
from imgen_common.shapes.stories import sample_change
from imgen_common.shapes.verify import detect
from imgen_common.streams import normal, numpy_generator
from scripts.miniature.world.generator import encode, enlarge, sample

CHUNK = 60
"""Pictures per file."""
WHITE = 255
"""Value of the picture that stands before the first one."""


class Amounts(Config):
    """How much is drawn, in chunks of 60 pictures."""

    drawn: int
    """Chunks of pictures from captions."""
    edited: int
    """Chunks of edits of rendered scenes."""
    chained: int
    """Chunks of changes of drawn pictures."""
    recoloured: int
    """Chunks of recolourings of one of several things in drawn pictures, the generator's weakest side."""
    steps: tuple[int, ...]
    """Sampling steps, by turns."""


TRAIN = Amounts(drawn=30, edited=30, chained=7, recoloured=16, steps=(12, 12, 25))
TEST = Amounts(drawn=8, edited=5, chained=3, recoloured=3, steps=(25,))
GUIDANCE = (1.0, 2.0)


@dataclass(frozen=True)
class Drawn:
    """Pictures as uint8 (n, 3, 32, 32) and the prompts of which they came; `before` is white for a caption."""

    before: Tensor
    after: Tensor
    prompts: list[str]

    @staticmethod
    def join(parts: Sequence["Drawn"]) -> "Drawn":
        """All of them in order."""
        return Drawn(
            torch.cat([p.before for p in parts]),
            torch.cat([p.after for p in parts]),
            [prompt for p in parts for prompt in p.prompts],
        )


def read(file: Path) -> Drawn:
    """One chunk."""
    with safe_open(file, "pt") as tensors:
        prompts = tensors.metadata()["prompts"].split("\n")
        return Drawn(tensors.get_tensor("before"), tensors.get_tensor("after"), prompts)


def load(folder: Path, split: Split, kinds: Sequence[str] = ("drawn", "edited", "chained", "recoloured")) -> Drawn:
    """All finished chunks of a split."""
    files = [file for kind in kinds for file in sorted((folder / split).glob(f"{kind}-*.safetensors"))]
    return Drawn.join([read(file) for file in files])


def to_bytes(images: Tensor) -> Tensor:
    """(n, 3, h, w) in [0, 1] to uint8, rounded to nearest as a saved picture is."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def generate(folder: Path, split: Split, amounts: Amounts, seed: int) -> None:
    """Draws what is missing of a split's pool."""
    (folder / split).mkdir(parents=True, exist_ok=True)
    pipeline = Flux2KleinPipeline.from_pretrained(resolve("builtin:shapes/generator"), dtype=torch.float32)
    makers: Mapping[str, tuple[int, Callable[[Path, Split, int, int], tuple[Tensor | None, list[str]]]]] = {
        "drawn": (amounts.drawn, _captions),
        "edited": (amounts.edited, _edits),
        "chained": (amounts.chained, _chains),
        "recoloured": (amounts.recoloured, _recolourings),
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
                steps=amounts.steps[i % len(amounts.steps)],
                guidance=GUIDANCE[i % len(GUIDANCE)],
                reference=None if before is None else encode(pipeline, enlarge(before)),
            )
            if before is None:
                before = torch.ones_like(after)
            tensors = {"before": to_bytes(before), "after": to_bytes(after)}
            save_file(tensors, file.with_suffix(".new"), {"prompts": "\n".join(prompts)})
            file.with_suffix(".new").rename(file)
            print(file.name, flush=True)


def _captions(folder: Path, split: Split, seed: int, chunk: int) -> tuple[None, list[str]]:
    rng = numpy_generator(seed, f"pool-{split}-captions", chunk)
    return None, [sample_spec(rng, split).caption for _ in range(CHUNK)]


def _edits(folder: Path, split: Split, seed: int, chunk: int) -> tuple[Tensor, list[str]]:
    rng = numpy_generator(seed, f"pool-{split}-edits", chunk)
    edits = [sample_edit(rng, split) for _ in range(CHUNK)]
    return torch.from_numpy(np.stack([render(e.before) for e in edits])), [e.instruction for e in edits]


def _chains(folder: Path, split: Split, seed: int, chunk: int) -> tuple[Tensor, list[str]]:
    """Changes of drawn and edited pictures."""
    return _changes(folder, split, numpy_generator(seed, f"pool-{split}-chains", chunk))


def _recolourings(folder: Path, split: Split, seed: int, chunk: int) -> tuple[Tensor, list[str]]:
    """Recolourings of one of several things in drawn and edited pictures."""
    return _changes(folder, split, numpy_generator(seed, f"pool-{split}-recolourings", chunk), "recolour")


def _changes(
    folder: Path, split: Split, rng: np.random.Generator, kind: EditKind | None = None
) -> tuple[Tensor, list[str]]:
    """Changes of drawn and edited pictures whose things are distinct, well formed and of this split.

    kind: only changes of this kind, and only of pictures with several things.
    """
    pictures = load(folder, split, ("drawn", "edited")).after
    chosen: list[Tensor] = []
    prompts: list[str] = []
    while len(prompts) < CHUNK:
        picture = pictures[int(rng.integers(len(pictures)))].float()[None] / 255
        things = tuple(sorted(d.thing for d in detect(picture)[0]))
        if not 0 < len(set(things)) == len(things) <= 3 or any("mixed" in str(t) or "blob" in str(t) for t in things):
            continue
        if split_of(things) != split or (kind and len(things) == 1):
            continue
        step = sample_change(things, rng, split)
        if step is not None and kind in (None, step.kind):
            chosen.append(picture[0])
            prompts.append(step.prompt)
    assert chosen[0].shape == (3, SIZE, SIZE)
    return torch.stack(chosen), prompts
