"""A generator from a configuration, what of it is trained, and the trained weights of a run in it."""

import warnings
from collections import Counter
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from flowbp.backbones.options import apply_model_options, check_machine, quantize
from flowbp.config import LoraConfig, TrainConfig
from flowbp.core.types import Backbone
from imgen_common.errors import UserError, nearest
from imgen_common.run_folder.checkpoints import Checkpoint, check_tensors
from imgen_common.run_folder.folder import RunFolder


def load_checkpoint(run: RunFolder, step: int) -> Checkpoint:
    """A checkpoint of a run: the groups `weights`, `ema` (their average) and `optimizer`.

    Raises UserError for one of an earlier version: such runs are not converted, as their configurations have other
    keys too.
    """
    checkpoint = run.load_checkpoint(step)
    if "ema" not in checkpoint.tensors:
        raise UserError(
            f"{run.path}: made by a development version of flowbp, whose checkpoints hold no `ema` but "
            f"{', '.join(sorted(checkpoint.tensors))}; continue with that version, or train anew"
        )
    return checkpoint


def read_trained_weights(
    run: RunFolder, weights: Literal["ema", "last"] = "ema", step: int | None = None
) -> tuple[TrainConfig, dict[str, Tensor]]:
    """The configuration of a run, and its averaged or last weights from a checkpoint, the newest by default."""
    chosen = run.latest_checkpoint() if step is None else step
    if chosen is None:
        raise UserError(f"{run.path}: no checkpoint yet; continue the run (flowbp train --resume {run.path})")
    return run.config(TrainConfig), load_checkpoint(run, chosen).tensors["weights" if weights == "last" else "ema"]


@torch.no_grad()
def load_trained_weights(backbone: Backbone, run_path: Path) -> None:
    """Puts a run's averaged weights into a freshly loaded backbone."""
    config, weights = read_trained_weights(RunFolder.open(run_path, is_main=False))
    parameters = mark_trainable(backbone.net, config)
    check_tensors(f"{run_path}: ema", weights, parameters)
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
    backbone.net.requires_grad_(False)


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


def layers_of_targets(net: nn.Module, lora: LoraConfig) -> dict[str, list[str]]:
    """The linear layers whose names end with each of the target modules.

    Raises UserError for one that matches none; the defaults are of several families, and only need one match.
    """
    layers = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    found = {t: [n for n in layers if n == t or n.endswith(f".{t}")] for t in lora.target_modules}
    ends = Counter(".".join(name.split(".")[i:]) for name in layers for i in (-2, -1))
    spared = LoraConfig().target_modules if any(found.values()) else ()
    missed = [f"{t!r}{nearest(t, ends)}" for t, matches in found.items() if not matches and t not in spared]
    if missed or not found:
        raise UserError(
            f"lora.target_modules: no linear layer has a name that ends with {', '.join(missed) or 'any of them: []'}; "
            f"frequent are {', '.join(end for end, _ in ends.most_common(8))}"
        )
    return found


def mark_trainable(net: nn.Module, config: TrainConfig) -> dict[str, nn.Parameter]:
    """Makes all weights of the network trainable, or adds adapters and makes those trainable; float32, by name.

    Adapters are initialized from the run's seed, equally on every process.
    Raises UserError if a target module matches no layer.
    """
    if config.lora is None:
        net.requires_grad_(True)
    else:
        import peft

        lora = config.lora
        targets = sorted({name for names in layers_of_targets(net, lora).values() for name in names})
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(config.seed)
            warnings.filterwarnings("ignore", ".*get_apply_tensor_subclass.*")  # of merging, which export does itself
            given = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)
            peft.inject_adapter_in_model(given, net)
    found = {name: p for name, p in net.named_parameters() if p.requires_grad}
    for parameter in found.values():
        parameter.data = parameter.data.float()  # adapters of a bfloat16 network start in bfloat16
    return found
