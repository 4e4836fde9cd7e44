"""Differentiable rewards: pictures in [0, 1] and prompts in, one score per picture out, larger is better."""

from typing import TYPE_CHECKING

from imgen_common import hub
from imgen_common.config import Config
from imgen_common.errors import UserError

if TYPE_CHECKING:
    import torch

    from flowbp.rewards.clip import ClipReward


class RewardConfig(Config):
    """A reward model."""

    ref: str
    """Folder of a transformers `CLIPModel`: `builtin:...`, a path, or `org/name@revision`."""

    def load(self, device: "torch.device | str" = "cpu") -> "ClipReward":
        """The frozen reward.  Raises UserError if the folder holds another kind of model."""
        import json

        folder = hub.resolve(self.ref)
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
        if kind != "clip":
            raise UserError(f"{self.ref}: reward models of type {kind!r} are not supported; allowed: clip")
        from flowbp.rewards.clip import ClipReward

        return ClipReward.load(folder, device=device)
