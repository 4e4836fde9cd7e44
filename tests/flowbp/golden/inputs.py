"""Weights and pictures that anyone can make again from their names alone, whatever the library."""

import zlib

import numpy as np


def weights(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 numbers for a weight of this name: norms near one, matrices that keep the size of what goes through."""
    draws = np.random.Generator(np.random.Philox(zlib.crc32(key.encode()))).standard_normal(shape)
    if len(shape) == 1 and key.endswith("weight"):
        return np.asarray(1 + 0.1 * draws, dtype=np.float32)
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 16
    return np.asarray(draws / np.sqrt(fan_in), dtype=np.float32)


def pictures(height: int, width: int) -> np.ndarray:
    """Two pictures of waves, (2, 3, height, width) float32 in whole 1/255."""
    n, c, y, x = np.meshgrid(*(np.arange(k) for k in (2, 3, height, width)), indexing="ij")
    waves = np.sin(0.31 * (n + 1) * y + 0.7 * c) * np.cos(0.23 * x * (1 + 0.2 * c) - n)
    return (np.round(255 * (0.5 + 0.5 * waves)) / 255).astype(np.float32)


TOKENS = [[2, 7, 9, 4, 3], [2, 11, 5, 6, 3]]
"""Ids of two prompts of equal length, the last one the end."""
