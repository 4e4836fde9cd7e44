"""How fast a run is assumed to compute."""

from dataclasses import dataclass

import torch

from imgen_common.devices import PEAK_TFLOPS, find_card
from imgen_common.errors import UserError, nearest

SHARE = 0.5
"""Part of the peak that training with large batches reaches."""


@dataclass(frozen=True)
class Speed:
    """tflops: assumed TFLOP/s.  reason: where they come from, for a reader."""

    tflops: float
    reason: str


def speed_of(gpu: str | None, tflops: float | None) -> Speed | str:
    """The speed that is assumed: `tflops`, or half the peak of the card named `gpu`, or of this machine's.

    A text that says why there is none, where neither is given and this machine's GPU is not known.  Raises UserError
    for an unknown name.
    """
    if tflops is not None:
        return Speed(tflops, "as given")
    given = torch.cuda.get_device_name() if gpu is None and torch.cuda.is_available() else gpu
    if given is None:
        return "not estimated: torch sees no GPU; name one with --gpu, or give --tflops"
    found = find_card(given)
    if found is not None:
        return Speed(SHARE * PEAK_TFLOPS[found], f"half the peak of {found}")
    known = ", ".join(PEAK_TFLOPS)
    if gpu is None:
        return f"not estimated: the peak of {given} is not known here; give --tflops, or --gpu with one of {known}"
    raise UserError(f"--gpu {gpu}: not known{nearest(gpu, PEAK_TFLOPS)}; give --tflops, or one of {known}")
