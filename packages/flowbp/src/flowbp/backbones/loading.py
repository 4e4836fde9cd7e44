"""A generator from a configuration, and the trained weights of a run in it."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from flowbp.backbones.lora import mark_trainable
from flowbp.backbones.options import apply_model_options, check_machine, quantize
from flowbp.config import TrainConfig
from flowbp.core.types import Backbone
from imgen_common.errors import UserError
from imgen_common.run_folder.checkpoints import Checkpoint
from imgen_common.run_folder.folder import RunFolder


def load_checkpoint(run: RunFolder, step: int) -> Checkpoint:
    """A checkpoint of a run: the groups `weights`, `ema` (their average) and `optimizer`.

    Raises UserError for one of an earlier version, which called the average `average`; runs of that version are not
    converted, as the keys of their configurations have other names too.
    """
    checkpoint = run.load_checkpoint(step)
    if "ema" not in checkpoint.tensors:
        raise UserError(
            f"{run.path}: made by a development version of flowbp, whose checkpoints hold no `ema` but "
            f"{', '.join(sorted(checkpoint.tensors))}; go on with that version, or train anew"
        )
    return checkpoint


def read_trained_weights(
    run: RunFolder, weights: Literal["ema", "last"] = "ema", step: int | None = None
) -> tuple[TrainConfig, dict[str, Tensor]]:
    """The configuration of a run and its weights from a checkpoint, the last by default: averaged, or of that update.

    Raises UserError if there is no such checkpoint.
    """
    chosen = run.latest_checkpoint() if step is None else step
    if chosen is None:
        raise UserError(f"{run.path}: no checkpoint yet; let the run go on (flowbp train --resume {run.path})")
    config = run.config(TrainConfig)
    tensors = load_checkpoint(run, chosen).tensors
    return config, tensors["weights" if weights == "last" else "ema"]


@torch.no_grad()
def load_trained_weights(backbone: Backbone, run_path: Path) -> TrainConfig:
    """Puts a run's averaged weights into a freshly loaded backbone; returns the run's configuration."""
    config, weights = read_trained_weights(RunFolder.open(run_path, is_main=False))
    for name, parameter in mark_trainable(backbone.net, config).items():
        parameter.copy_(weights[name])
    backbone.net.requires_grad_(False)
    return config


def load_backbone(config: TrainConfig, device: torch.device, net_device: str | None = None) -> Backbone:
    """The generator in the configuration's precision; net_device: of the transformer, as `backbones.load` has it."""
    from flowbp import backbones

    check_machine(config.model)
    low, quantized = config.model.dtype == "bfloat16", config.model.quantization is not None
    backbone = backbones.load(
        config.model.ref,
        dtype=torch.bfloat16 if low and config.lora is not None else torch.float32,
        device=device,
        net_device="cpu" if quantized else net_device,
        embedded_guidance=config.model.embedded_guidance,
    )
    backbone.bfloat16 = low
    if quantized:
        quantize(backbone.net, device)
        backbone.net.to(device)
    apply_model_options(backbone, config.model)
    return backbone
