"""Counter-based random streams: every draw is named by (seed, purpose, counters), never by what was drawn before it.

A stream is found by hashing its name, so a result does not depend on how often a generator was called, on the number
of processes, or on where a run was resumed.  `purpose` says what the numbers are for ("noise", "plan"); the counters
are integers such as the step, the rank or the index of a sample.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def stream_key(seed: int, purpose: str, *counters: int) -> int:
    """The 128-bit key of a stream, uniform in [0, 2**128)."""
    name = json.dumps([int(seed), purpose, *(int(counter) for counter in counters)]).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")


def stream_seed(seed: int, purpose: str, *counters: int) -> int:
    """A seed of 31 bits from the stream's key, as models and services take it."""
    return stream_key(seed, purpose, *counters) % 2**31


def numpy_generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """A fresh Philox generator keyed by the stream's whole 128-bit key."""
    return np.random.Generator(np.random.Philox(key=stream_key(seed, purpose, *counters)))


def torch_generator(seed: int, purpose: str, *counters: int, device: "torch.device | str" = "cpu") -> "torch.Generator":
    """A fresh torch generator seeded by the low 64 bits of the stream's key.

    On a CPU torch keeps only the low 32 bits of a seed, so two of 65 000 streams are likely to coincide (and on
    another device the numbers differ): where a stream per sample and step is wanted, use `normal`.
    """
    import torch

    return torch.Generator(device).manual_seed(stream_key(seed, purpose, *counters) & (2**64 - 1))


def normal(
    shape: Sequence[int], seed: int, purpose: str, *counters: int, dtype: "torch.dtype | None" = None
) -> "torch.Tensor":
    """Standard normal numbers of `shape` on the CPU, the same for every device, dtype (up to rounding) and torch.

    dtype: float32 where none is given; the numbers are drawn in float64 and rounded.
    """
    import torch

    values = numpy_generator(seed, purpose, *counters).standard_normal(tuple(shape))
    return torch.from_numpy(np.asarray(values)).to(dtype or torch.float32)
