"""A strict reader of images: what is in them, and whether a caption or an edit holds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate, pad

from imgen_common.shapes.render import AREA, CENTROID, coverage
from imgen_common.shapes.scene import COLOURS, SHAPES, SIZE, Spec, Thing, position_holds, relation_holds

MIN_AREA = 14
"""Smallest blob in pixels that counts as a thing."""
MIN_SATURATION = 0.28
"""max(RGB) - min(RGB) from which a pixel is coloured."""
MIN_OVERLAP = 0.72
"""Soft intersection over union with the best template from which a blob has that shape."""
MIN_PURITY = 0.7
"""Share of a blob's pixels that must agree on the colour."""


@dataclass(frozen=True)
class Detection:
    """One blob: its thing (`mixed` colour, `blob` shape where unclear), center in pixels, template overlap.

    box: (left, top, right, bottom) in pixels of the SIZE x SIZE image; None if it was not read from an image.
    """

    thing: Thing
    x: float
    y: float
    overlap: float
    box: tuple[int, int, int, int] | None = None


def _hue_and_saturation(images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Hue in degrees and max - min, from (..., 3, h, w)."""
    r, g, b = images[..., 0, :, :], images[..., 1, :, :], images[..., 2, :, :]
    top, bottom = images.max(-3), images.min(-3)
    delta = top - bottom + 1e-8
    hue = np.where(top == r, ((g - b) / delta) % 6, np.where(top == g, (b - r) / delta + 2, (r - g) / delta + 4))
    return (hue * 60).astype(np.float32), (top - bottom).astype(np.float32)


_COLOUR_NAMES = tuple(COLOURS)
_COLOUR_HUES = _hue_and_saturation(np.array(list(COLOURS.values()), np.float32).T[None, :, None, :])[0].reshape(-1)
_RADIUS_STEPS = np.array([-0.4, -0.2, 0.0, 0.2, 0.4], np.float32)


def _label(foreground: Tensor) -> Tensor:
    """Connected components (8 neighbors) of masks (n, h, w): the largest index of a pixel's component, 0 outside."""
    h, w = foreground.shape[1:]
    mask = foreground.float()[:, None]
    labels = (torch.arange(1, h * w + 1, dtype=torch.float32).view(1, 1, h, w)) * mask
    while True:
        grown = torch.nn.functional.max_pool2d(labels, 3, 1, 1) * mask
        if torch.equal(grown, labels):
            return labels[:, 0].long()
        labels = grown


def _shape_of(saturation: NDArray[np.float32], blob: NDArray[np.bool_]) -> tuple[str, float, float, float]:
    """Best template of a blob: (shape, overlap, x, y); x and y are the center of mass in pixels."""
    rim = np.pad(blob, 1)
    near = np.any([rim[1 + i : 1 + i + SIZE, 1 + j : 1 + j + SIZE] for i in (-1, 0, 1) for j in (-1, 0, 1)], axis=0)
    soft = np.clip(saturation * near / max(float(np.percentile(saturation[blob], 75)), 1e-6), 0, 1)
    soft = np.where(soft < 0.15, 0, soft).astype(np.float32)
    mass = float(soft.sum())
    ys, xs = np.mgrid[0:SIZE, 0:SIZE]
    x, y = float((soft * xs).sum() / mass), float((soft * ys).sum() / mass)
    best, overlap = "blob", 0.0
    for shape in SHAPES:
        radii = np.sqrt(mass / AREA[shape]) + _RADIUS_STEPS
        for radius in radii:
            template = coverage(shape, x, y - CENTROID[shape] * float(radius), float(radius))
            score = float(np.minimum(template, soft).sum() / max(float(np.maximum(template, soft).sum()), 1e-6))
            if score > overlap:
                best, overlap = shape, score
    return (best if overlap >= MIN_OVERLAP else "blob"), overlap, x, y


def fit(images: Tensor) -> Tensor:
    """Images (n, 3, h, w) as (n, 3, SIZE, SIZE), the same ones if they have that size.

    As vision models read an image of another size: the longer side is resized (antialiased), and black, in which there
    is nothing, is added on both sides of the shorter one.  Shapes keep their form, and places their side of the center.
    """
    height, width = images.shape[-2:]
    if (height, width) == (SIZE, SIZE):
        return images
    rows, columns = (max(1, round(SIZE * side / max(height, width))) for side in (height, width))
    resized = interpolate(images.float(), (rows, columns), mode="bilinear", antialias=True, align_corners=False)
    top, left = (SIZE - rows) // 2, (SIZE - columns) // 2
    return pad(resized, (left, SIZE - columns - left, top, SIZE - rows - top))


def detect(images: Tensor) -> list[list[Detection]]:
    """The things in each image.  images: (n, 3, h, w), RGB in [0, 1], read at SIZE x SIZE (see `fit`)."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"the verifier reads images of shape (n, 3, h, w), not {tuple(images.shape)}")
    pixels = fit(images.detach()).float().clamp(0, 1).cpu().numpy()
    hue, saturation = _hue_and_saturation(pixels)
    distance = np.abs((hue[..., None] - _COLOUR_HUES + 180) % 360 - 180)
    nearest = distance.argmin(-1)
    labels = _label(torch.from_numpy(saturation > MIN_SATURATION)).numpy()
    return [_read(labels[i], nearest[i], saturation[i]) for i in range(len(pixels))]


def _read(labels: NDArray[np.int64], colours: NDArray[np.intp], saturation: NDArray[np.float32]) -> list[Detection]:
    found = []
    for label, area in zip(*np.unique(labels[labels > 0], return_counts=True), strict=True):
        if area < MIN_AREA:
            continue
        blob = labels == label
        votes = np.bincount(colours[blob], minlength=len(_COLOUR_NAMES))
        shape, overlap, x, y = _shape_of(saturation, blob)
        pure = votes.max() / votes.sum() >= MIN_PURITY
        thing = Thing(_COLOUR_NAMES[votes.argmax()] if pure else "mixed", shape)
        rows, columns = np.nonzero(blob)
        box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
        found.append(Detection(thing, x, y, overlap, box))
    return found


def caption_holds(found: Sequence[Detection], spec: Spec) -> bool:
    """Whether exactly the captioned things were found, nothing else, in the stated place."""
    if sorted(spec.things) != sorted(d.thing for d in found):
        return False
    if spec.category == "position":
        return position_holds(spec.place, found[0].x, found[0].y)
    if spec.category == "relation":
        a, b = (next(d for d in found if d.thing == t) for t in spec.things)
        return relation_holds(spec.place, (a.x, a.y), (b.x, b.y))
    return True


def verify(images: Tensor, specs: Sequence[Spec]) -> list[bool]:
    """Whether each image (n, 3, h, w) in [0, 1] is exactly what its caption says."""
    return [caption_holds(found, spec) for found, spec in zip(detect(images), specs, strict=True)]


def accuracy(held: Sequence[bool], specs: Sequence[Spec]) -> dict[str, float]:
    """Share of images for which `verify` held, overall (`all`) and by category, in [0, 1]."""
    groups = {"all": list(held)}
    for one, spec in zip(held, specs, strict=True):
        groups.setdefault(spec.category, []).append(one)
    return {name: sum(group) / len(group) for name, group in groups.items()}
