"""A first lesson for the critic's vision tower, in a plain loop: each picture token says what stands in its cell.

The answers alone teach shapes slowly (half of them were still misread after 1600 updates of the whole critic).  Here a
linear head on every output of the tower (the merged tokens and the deepstack features) names the thing whose centre
lies in the token's 8x8 pixels: its colour, its shape, and where in the cell.  The head is thrown away.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from imgen_common.shapes.scene import COLOURS, SHAPES, SIZE, Thing, compose, hard_negative, sample_spec
from imgen_common.shapes.verify import Detection, detect
from imgen_common.streams import numpy_generator
from scripts.miniature.agents import models
from scripts.miniature.agents.cases import TURN, centres, mutated, picture
from scripts.miniature.agents.pool import WHITE, Drawn
from scripts.miniature.agents.train import patches, save
from scripts.miniature.world.session import Schedule, Session

SEED = 51
SCHEDULE = Schedule(steps=700, batch=160, lr=1.5e-3, ema=0.99, save_every=100)
CELL = models.PATCH * models.MERGE
SIDE = SIZE // CELL
COLOUR_NAMES = ("nothing", *COLOURS, "mixed")
SHAPE_NAMES = ("nothing", *SHAPES, "blob")
SUB = 4
"""Places told apart within a cell, per axis: the columns and rows of the critic's reports."""
DRAWN_SHARE = 0.6
SIZES = (len(COLOUR_NAMES), len(SHAPE_NAMES), SUB, SUB)


def labels(found: list[Detection]) -> Tensor:
    """(16, 4): colour, shape, column and row of the thing in each cell; the last two are -100 where there is none."""
    result = torch.zeros(SIDE * SIDE, 4, dtype=torch.long)
    result[:, 2:] = -100
    for d in found:
        x, y = (min(max(v, 0.0), SIZE - 1e-3) for v in (d.x, d.y))
        cell = int(y // CELL) * SIDE + int(x // CELL)
        place = (int(x % CELL * SUB // CELL), int(y % CELL * SUB // CELL))
        result[cell] = torch.tensor([COLOUR_NAMES.index(d.thing.colour), SHAPE_NAMES.index(d.thing.shape), *place])
    return result


class Pictures:
    """Drawn and rendered pictures with their labels."""

    def __init__(self, drawn: Drawn) -> None:
        white = (drawn.before == WHITE).flatten(1).all(1)
        self._images = torch.cat([drawn.after, drawn.before[~white]])
        self._found = [f for part in self._images.split(512) for f in detect(part.float() / 255)]

    def batch(self, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """uint8 (n, 3, 32, 32) and labels (n, 16, 4)."""
        rows = [self._drawn(rng) if rng.random() < DRAWN_SHARE else _rendered(rng) for _ in range(count)]
        return torch.stack([image for image, _ in rows]), torch.stack([labels(found) for _, found in rows])

    def _drawn(self, rng: np.random.Generator) -> tuple[Tensor, list[Detection]]:
        i = int(rng.integers(len(self._images)))
        image, found = self._images[i], self._found[i]
        if rng.random() < 0.5:
            image, found = image.flip(-1), [Detection(d.thing, SIZE - 1 - d.x, d.y, d.overlap) for d in found]
        for _ in range(int(rng.integers(3))):
            image = image.roll(1, 0)
            found = [
                Detection(Thing(TURN.get(d.thing.colour, "mixed"), d.thing.shape), d.x, d.y, d.overlap) for d in found
            ]
        return image, found


def _rendered(rng: np.random.Generator) -> tuple[Tensor, list[Detection]]:
    spec = sample_spec(rng)
    scene = compose(spec if rng.random() < 0.5 else hard_negative(spec, rng), rng)
    if rng.random() < 0.3:
        scene = mutated(scene, rng)
    return picture(scene, rng), centres(scene)


def loss_of(outputs: list[Tensor], heads: nn.ModuleList, wanted: Tensor) -> tuple[Tensor, float]:
    """Mean loss of all heads, and how many of the occupied cells the first one names rightly, colour and shape."""
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


def train(folder: Path, size: models.Size, drawn: Drawn, start: Path | None = None) -> None:
    """Trains (or resumes) the vision tower in `folder`; leaves the whole model, otherwise fresh, in `folder/model`.

    Does nothing where `folder/model` is there already.
    start: a folder of weights whose tower goes on learning; without one it is fresh.
    """
    from transformers import AutoModelForImageTextToText

    if (folder / "model").exists():
        return
    torch.manual_seed(SEED)
    processor = models.processor()
    if start is None:
        model = models.build(size, processor.tokenizer)
    else:
        model = AutoModelForImageTextToText.from_pretrained(start, dtype=torch.float32, local_files_only=True)
    tower, pictures = model.model.visual, Pictures(drawn)
    heads = nn.ModuleList([nn.Linear(size.width, sum(SIZES)) for _ in range(len(tower.deepstack_visual_indexes) + 1)])
    session = Session(folder, {"tower": tower, "heads": heads}, SCHEDULE)

    def forward(images: Tensor, wanted: Tensor) -> tuple[Tensor, float]:
        grid = torch.tensor([[1, SIZE // models.PATCH, SIZE // models.PATCH]]).expand(len(images), -1)
        out = tower(patches(images), grid_thw=grid)
        return loss_of([out.pooler_output, *out.deepstack_features], heads, wanted)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        value, right = forward(*pictures.batch(numpy_generator(SEED, "vision", step), SCHEDULE.batch))
        return value, {"right": right}

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        _, right = forward(*pictures.batch(numpy_generator(SEED + 1, "vision-check"), 256))
        return {"checked": right}

    session.run(loss, evaluate)
    session.swap()
    save(model, processor, folder)
