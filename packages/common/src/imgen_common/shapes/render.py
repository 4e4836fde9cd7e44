"""Images from scenes."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from imgen_common.shapes.scene import SIZE, Scene, Spec, compose

_Y, _X = np.meshgrid(np.arange(SIZE, dtype=np.float32), np.arange(SIZE, dtype=np.float32), indexing="ij")


def coverage(shape: str, x: float, y: float, radius: float | NDArray[np.float32]) -> NDArray[np.float32]:
    """Antialiased mask of a shape in [0, 1]: its signed distance, ramped over one pixel.

    `radius` may be an array broadcast against (SIZE, SIZE), so that many sizes are drawn at once.
    """
    dx, dy = _X - np.float32(x), _Y - np.float32(y)
    match shape:
        case "circle":
            distance = np.sqrt(dx * dx + dy * dy) - radius
        case "square":
            distance = np.maximum(np.abs(dx), np.abs(dy)) - radius * 0.88
        case "triangle":
            distance = np.maximum(0.894 * np.abs(dx) - 0.447 * (dy + radius), dy - radius * 0.85)
        case "cross":
            ax, ay, arm = np.abs(dx), np.abs(dy), radius * 0.36
            distance = np.minimum(np.maximum(ax - radius, ay - arm), np.maximum(ay - radius, ax - arm))
        case _:
            raise ValueError(f"unknown shape {shape!r}")
    return np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)


AREA = {"circle": math.pi, "square": 4 * 0.88**2, "triangle": 1.85**2 / 2, "cross": 4 * 2 * 0.36 - 4 * 0.36**2}
"""Area of a shape of radius 1."""
CENTROID = {"circle": 0.0, "square": 0.0, "triangle": 0.85 - 1.85 / 3, "cross": 0.0}
"""How far below a shape's center its center of mass lies, in radii."""


def render(scene: Scene) -> NDArray[np.float32]:
    """The image of a scene, shape (3, SIZE, SIZE), RGB in [0, 1]."""
    image = np.full((3, SIZE, SIZE), scene.background, np.float32)
    for placed in scene.placed:
        alpha = coverage(placed.thing.shape, placed.x, placed.y, placed.radius)
        image = image * (1 - alpha) + alpha * np.array(placed.rgb, np.float32)[:, None, None]
    return image


def draw(specs: Sequence[Spec], rng: np.random.Generator) -> NDArray[np.float32]:
    """One random true image for each caption, shape (n, 3, SIZE, SIZE), RGB in [0, 1]."""
    return np.stack([render(compose(spec, rng)) for spec in specs])
