"""What turns features into scores, in a file of its own beside the model.

`head` is the one that the LAION aesthetic predictor and ImageReward share: five linear layers, nothing between them.
"""

from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from imgen_common.errors import UserError

HEAD = "head.safetensors"
WIDTHS = (1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)
"""Where the published checkpoints keep these layers among those that only train (dropout)."""


def head(width: int) -> nn.Sequential:
    """Features (b, width) to scores (b, 1)."""
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise((width, *WIDTHS))))


def load_head(folder: Path, made: nn.Sequential, device: torch.device | str) -> nn.Sequential:
    """`made` with the weights of a converted reward, frozen.  Raises UserError if the folder has none."""
    file = folder / HEAD
    if not file.exists():
        raise UserError(f"{folder}: no {HEAD} in it; make the folder with `flowbp convert-reward`")
    if str(device) != "meta":
        made.load_state_dict(load_file(file))
    return made.to(device).eval().requires_grad_(False)
