"""How fast a GPU computes, by its name."""

import re
from dataclasses import dataclass

import torch

from imgen_common.errors import UserError, nearest

PEAK_TFLOPS = {
    **{"RTX 3090": 71, "RTX 3090 Ti": 80, "RTX 4080": 97.5, "RTX 4090": 165, "RTX 5080": 113, "RTX 5090": 210},
    **{"RTX A6000": 155, "RTX 6000 Ada": 364, "A10": 125, "A30": 165, "A40": 150, "A100": 312},
    **{"L4": 121, "L20": 119.5, "L40": 181, "L40S": 362, "H20": 148, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989},
    **{
        "H800 PCIe": 756,
        "H800": 989,
        "H200": 989,
        "GH200": 989,
        "B200": 2250,
        "MI250X": 191.5,
        "MI300X": 1307,
        "MI325X": 1307,
    },
}
"""Dense bfloat16 matrix products with float32 sums, without sparsity, in TFLOP/s, of one device of torch: an MI250X is
two of them.  The figures are those of the makers' data sheets and architecture whitepapers; those of RTX 3090 Ti,
RTX 6000 Ada, L4 and H800 PCIe were found in tables of other projects only."""
VARIANTS = {"laptop", "mobile", "super", "max", "q", "d", "ti", "nvl", "mig"}
"""Words that make a name another card."""
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


def find_card(name: str) -> str | None:
    """The card of `PEAK_TFLOPS` that a name such as `NVIDIA H100 80GB HBM3` or `rtx4090` means; None for another one,
    and for variants of a known one, such as a laptop's."""
    words = set(re.findall("[a-z0-9]+", re.sub(r"rtx(?=[0-9])", "rtx ", name.lower())))
    parts = {card: set(card.lower().split()) for card in PEAK_TFLOPS}
    fitting = [card for card, known in parts.items() if known - {"rtx"} <= words and not words & VARIANTS - known]
    return max(fitting, key=lambda card: len(parts[card]), default=None)
