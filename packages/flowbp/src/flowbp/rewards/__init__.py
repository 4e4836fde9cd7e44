"""Differentiable rewards: pictures in [0, 1] and prompts in, one score per picture out, larger is better."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from imgen_common import hub
from imgen_common.config import Config
from imgen_common.errors import UserError

if TYPE_CHECKING:
    import torch

    from flowbp.types import Reward

Kind = Literal["clip", "clipscore", "hpsv2", "hpsv3", "aesthetic", "imagereward"]
MODEL_TYPES: dict[Kind, str] = {
    "clip": "clip",
    "clipscore": "clip",
    "hpsv2": "clip",
    "hpsv3": "qwen2_vl",
    "aesthetic": "clip",
    "imagereward": "blip",
}
"""transformers' name of the model under each kind."""


class RewardConfig(Config):
    """A reward model."""

    score: Kind = "clip"
    """What is made of the model: `clip` exp(logit_scale) cosine (PickScore and its kin), `clipscore` the cosine,
    `hpsv2` the cosine of bordered pictures (HPSv2.1), `hpsv3` HPSv3, `aesthetic` the LAION predictor, `imagereward`
    ImageReward."""
    ref: str
    """Its folder: `builtin:...`, a path, or `org/name@revision`; published pickles first go through
    `flowbp convert-reward`."""

    def load(self, device: "torch.device | str" = "cpu") -> "Reward":
        """The frozen reward; on the device "meta" without its weights, which are not read.

        Raises UserError if the folder holds another kind of model.
        """
        folder = hub.resolve(self.ref, weights=str(device) != "meta")
        found = json.loads((folder / "config.json").read_text()).get("model_type")
        if found != MODEL_TYPES[self.score]:
            raise UserError(
                f"{self.ref}: a score {self.score!r} is made of a {MODEL_TYPES[self.score]!r} model, this is a "
                f"{found!r}; scores are {', '.join(MODEL_TYPES)}"
            )
        return _load(self.score, folder, device)


def _load(kind: Kind, folder: Path, device: "torch.device | str") -> "Reward":
    if kind == "imagereward":
        from flowbp.rewards.image_reward import ImageReward

        return ImageReward.load(folder, device=device)
    if kind == "hpsv3":
        from flowbp.rewards.hpsv3 import HPSv3

        return HPSv3.load(folder, device=device)
    from flowbp.rewards.clip import AestheticReward, ClipReward

    if kind == "aesthetic":
        return AestheticReward.load(folder, device=device)
    return ClipReward.load(folder, device=device, cosine=kind != "clip", letterbox=kind == "hpsv2")
