"""Trainings that all start from exactly the base weights of models that are loaded once."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator

from flowbp.config import TrainConfig
from flowbp.training.loading import load_models
from flowbp.training.trainer import Trainer
from imgen_common.console import quiet_libraries

Scores = dict[str, list[float]]
"""{name of a score: one number per prompt}."""


class TrainerFactory:
    """The models of a configuration, loaded once per process of one thread.

    `make` may be given configurations that differ from it in anything but models, rewards and prompts.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        torch.set_num_threads(1)
        quiet_libraries()
        self.device = device
        self.accelerator = Accelerator(cpu=device.type == "cpu")
        self.models = load_models(config, device)
        self.base_weights = {name: p.detach().clone() for name, p in self.models.parameters.items()}

    @torch.no_grad()
    def restore_base(self) -> None:
        """Restores the base weights bit for bit and clears the gradients."""
        for name, p in self.models.parameters.items():
            p.copy_(self.base_weights[name])
            p.grad = None

    def make(self, config: TrainConfig) -> Trainer:
        """A fresh training from the base weights."""
        self.restore_base()
        return Trainer(config, self.models, self.accelerator)


def evaluate_average(trainer: Trainer, prompts: Sequence[str], source: str, guidance_scale: float) -> Scores:
    """Scores of the averaged weights on prompts of `source`, rounded to four decimals."""
    with trainer.state.ema_weights():
        found = trainer.evaluate(prompts, source, guidance_scale).scores
    return {name: [round(value, 4) for value in values] for name, values in found.items()}
