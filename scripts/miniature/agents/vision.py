"""Pretraining of the critic's vision tower: each image token predicts what is in its cell.

From the answers alone the critic learns shapes slowly (it misread half of them after 1600 updates).  Here a linear
head on every output of the tower (the merged tokens and the deepstack features) predicts the thing whose center lies in
the token's 8x8 pixels: its color, its shape, and its place in the cell.  The head is discarded.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from imgen_common.shapes.scene import COLOURS, SHAPES, SIZE, Thing, compose, sample_spec
from imgen_common.shapes.verify import Detection, detect
from imgen_common.streams import numpy_generator
from scripts.miniature.agents import models
from scripts.miniature.agents.cases import NEXT_COLOR, expected_detections, mutate, render_noisy
from scripts.miniature.agents.pool import WHITE, GeneratedImages
from scripts.miniature.agents.train import save_model, to_patches
from scripts.miniature.world.negatives import hard_negative
from scripts.miniature.world.session import Schedule, Session

SEED = 51
SCHEDULE = Schedule(steps=700, batch=160, lr=1.5e-3, ema=0.99, save_every=100)
CELL = models.PATCH * models.MERGE
SIDE = SIZE // CELL
COLOR_NAMES = ("nothing", *COLOURS, "mixed")
SHAPE_NAMES = ("nothing", *SHAPES, "blob")
SUB = 4
"""Places within a cell, per axis: the columns and rows of the critic's reports."""
GENERATED_SHARE = 0.6
SIZES = (len(COLOR_NAMES), len(SHAPE_NAMES), SUB, SUB)


def label_cells(found: list[Detection]) -> Tensor:
    """(16, 4): color, shape, column and row of the thing in each cell; the last two are -100 where there is none."""
    result = torch.zeros(SIDE * SIDE, 4, dtype=torch.long)
    result[:, 2:] = -100
    for d in found:
        x, y = (min(max(v, 0.0), SIZE - 1e-3) for v in (d.x, d.y))
        cell = int(y // CELL) * SIDE + int(x // CELL)
        place = (int(x % CELL * SUB // CELL), int(y % CELL * SUB // CELL))
        result[cell] = torch.tensor([COLOR_NAMES.index(d.thing.colour), SHAPE_NAMES.index(d.thing.shape), *place])
    return result


class LabeledImages:
    """Generated and rendered images with their labels."""

    def __init__(self, generated: GeneratedImages) -> None:
        white = (generated.before == WHITE).flatten(1).all(1)
        self._images = torch.cat([generated.after, generated.before[~white]])
        self._found = [f for part in self._images.split(512) for f in detect(part.float() / 255)]

    def batch(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """uint8 (n, 3, 32, 32) and labels (n, 16, 4)."""
        rows = [
            self._sample_generated(rng) if rng.random() < GENERATED_SHARE else _sample_rendered(rng)
            for _ in range(count)
        ]
        return torch.stack([image for image, _ in rows]), torch.stack([label_cells(found) for _, found in rows])

    def _sample_generated(self, rng: np.random.Generator) -> tuple[Tensor, list[Detection]]:
        i = int(rng.integers(len(self._images)))
        image, found = self._images[i], self._found[i]
        if rng.random() < 0.5:
            image, found = image.flip(-1), [Detection(d.thing, SIZE - 1 - d.x, d.y, d.overlap) for d in found]
        for _ in range(int(rng.integers(3))):
            image = image.roll(1, 0)
            found = [
                Detection(Thing(NEXT_COLOR.get(d.thing.colour, "mixed"), d.thing.shape), d.x, d.y, d.overlap)
                for d in found
            ]
        return image, found


def _sample_rendered(rng: np.random.Generator) -> tuple[Tensor, list[Detection]]:
    spec = sample_spec(rng)
    scene = compose(spec if rng.random() < 0.5 else hard_negative(spec, rng), rng)
    if rng.random() < 0.3:
        scene = mutate(scene, rng)
    return render_noisy(scene, rng), expected_detections(scene)


def cell_loss(outputs: list[Tensor], heads: nn.ModuleList, wanted: Tensor) -> tuple[Tensor, float]:
    """Mean loss of all heads, and the share of occupied cells whose color and shape the first one predicts."""
    target = wanted.flatten(0, 1)
    total, right = torch.zeros(()), 0.0
    for k, (output, head) in enumerate(zip(outputs, heads, strict=True)):
        parts = head(output).split(SIZES, dim=-1)
        there = 1.0 + 3.0 * (target[:, 0] > 0)
        for axis in (0, 1):
            each = cross_entropy(parts[axis], target[:, axis], reduction="none")
            total = total + (each * there).sum() / there.sum()
        total = total + 0.2 * sum(cross_entropy(parts[axis], target[:, axis]) for axis in (2, 3))
        if k == 0:
            held = (parts[0].argmax(-1) == target[:, 0]) & (parts[1].argmax(-1) == target[:, 1])
            right = held[target[:, 0] > 0].float().mean().item()
    return total / len(outputs), right


def train_vision_tower(
    folder: Path, size: models.ModelSize, generated: GeneratedImages, start: Path | None = None
) -> None:
    """Trains (or resumes) the vision tower in `folder`; leaves the whole model in `folder/model`.

    Does nothing where `folder/model` is there already.
    start: a folder of weights to start from; None starts from fresh weights.
    """
    if (folder / "model").exists():
        return
    torch.manual_seed(SEED)
    processor = models.processor()
    model = models.load_model(start, size, processor.tokenizer)
    tower, data = model.model.visual, LabeledImages(generated)
    heads = nn.ModuleList([nn.Linear(size.width, sum(SIZES)) for _ in range(len(tower.deepstack_visual_indexes) + 1)])
    session = Session(folder, {"tower": tower, "heads": heads}, SCHEDULE)

    def forward(images: Tensor, wanted: Tensor) -> tuple[Tensor, float]:
        grid = torch.tensor([[1, SIZE // models.PATCH, SIZE // models.PATCH]]).expand(len(images), -1)
        out = tower(to_patches(images), grid_thw=grid)
        return cell_loss([out.pooler_output, *out.deepstack_features], heads, wanted)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        value, right = forward(*data.batch(numpy_generator(SEED, "vision", step), SCHEDULE.batch))
        return value, {"right": right}

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        _, right = forward(*data.batch(numpy_generator(SEED + 1, "vision-check"), 256))
        return {"checked": right}

    session.run(loss, evaluate)
    session.swap_average()
    save_model(model, processor, folder)
