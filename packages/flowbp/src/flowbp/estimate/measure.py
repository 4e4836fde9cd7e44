"""Real updates, to compare an estimate with."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from flowbp.config import TrainConfig
from flowbp.rewards.loading import modules_of
from flowbp.training.loading import load_models, load_rewards
from flowbp.training.trainer import Trainer
from imgen_common.memory import LiveBytes, held, nbytes


def measure_run(config: TrainConfig, device: torch.device) -> tuple[int, float]:
    """As `measure_updates`, of a run with real weights."""
    models = load_models(config, device, with_rewards=False)
    return measure_updates(Trainer(config, models, Accelerator(cpu=device.type == "cpu")))


def measure_updates(trainer: Trainer) -> tuple[int, float]:
    """(most bytes held, seconds) of real updates: the second one, after AdamW made its moments.

    On a GPU as its allocator counts them, on a CPU as storages that are alive.
    """
    config, device = trainer.config, trainer.accelerator.device
    if config.data.embeddings != "live":
        trainer.embed_prompts(trainer.training_prompts()[: 2 * config.total_batch_size])
    if not trainer.models.rewards:
        trainer.models.rewards = load_rewards(config, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        trainer.step()
        seconds = trainer.step()["seconds"]
        return torch.cuda.max_memory_allocated(device), seconds
    known = [*network_tensors(trainer), *trainer.state.state_dict()["ema"].values()]
    with LiveBytes(known) as live:
        trainer.step()
        seconds = trainer.step()["seconds"]
    return nbytes(known) + live.peak, seconds


def network_tensors(trainer: Trainer) -> list[Tensor]:
    """All weights and buffers of a trainer's networks."""
    networks = [part for part in trainer.models.backbone.pipe.components.values() if isinstance(part, nn.Module)]
    return held((*networks, *modules_of(trainer.models.rewards.values())))
