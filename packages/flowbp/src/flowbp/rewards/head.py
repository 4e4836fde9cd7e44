"""Heads that turn features into scores; their weights are in a file of their own beside the model.

`scoring_head` is what the LAION aesthetic predictor and ImageReward share: five linear layers with nothing between
them.
"""

from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from imgen_common.errors import UserError

HEAD_FILE = "head.safetensors"
WIDTHS = (1024, 128, 64, 16, 1)
CHECKPOINT_LAYERS = (0, 2, 4, 6, 7)
"""Indices of these layers in the published checkpoints, where dropout layers stand between them."""


def scoring_head(width: int) -> nn.Sequential:
    """Maps features (b, width) to scores (b, 1)."""
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise((width, *WIDTHS))))


def load_head(folder: Path, head: nn.Sequential, device: torch.device | str) -> nn.Sequential:
    """`head`, frozen, with the weights in the folder of a converted reward.  Raises UserError if it has none."""
    file = folder / HEAD_FILE
    if not file.exists():
        raise UserError(f"{folder}: no {HEAD_FILE} in it; make the folder with `flowbp convert-reward`")
    if str(device) != "meta":
        head.load_state_dict(load_file(file))
    return head.to(device).eval().requires_grad_(False)
