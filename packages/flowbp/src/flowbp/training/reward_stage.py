"""The reward stage of one micro-batch: decode, score, make losses of the scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowbp.config import Hinge, LogSigmoid, TrainConfig
from flowbp.core.types import Backbone, Reward, ScoredLosses


@dataclass(frozen=True)
class RewardStage:
    """The loss that the engine differentiates, which returns the scores it is made of beside it.

    rewards: all by name, held-out ones too.  prompts: of the samples of the micro-batch.
    """

    config: TrainConfig
    backbone: Backbone
    rewards: Mapping[str, Reward]
    prompts: Sequence[str]

    def __call__(self, x: Tensor, rows: slice) -> ScoredLosses:
        """Losses (rewards, b) of the clean latents x of the samples `rows`, and the scores of all rewards, (b,)."""
        images, prompts = self.backbone.decode(x), self.prompts[rows]
        losses, scores = [], {}
        for reward in self.config.rewards:
            found = self.rewards[reward.name](images, prompts)
            losses.append(reward_losses(reward.loss, found))
            scores[reward.name] = found.detach()
        with torch.no_grad():
            scores |= {held.name: self.rewards[held.name](images, prompts) for held in self.config.heldout}
        return ScoredLosses(torch.stack(losses), scores)


def reward_losses(loss: Hinge | LogSigmoid, scores: Tensor) -> Tensor:
    """Per-sample losses of scores; both (b,)."""
    if isinstance(loss, Hinge):
        return -scores if loss.ceiling is None else (loss.ceiling - scores).clamp(min=0)
    return nn.functional.softplus((loss.center - scores) / loss.width)
