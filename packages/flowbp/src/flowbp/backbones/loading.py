"""A generator from a configuration, what of it is trained, and the trained weights of a run in it."""

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from flowbp import backbones
from flowbp.backbones import pipelines
from flowbp.backbones.options import apply_model_options, check_machine, quantize, set_attention
from flowbp.config import LoraConfig, TrainConfig
from flowbp.core.types import Backbone
from imgen_common import hub
from imgen_common.errors import UserError, nearest, quoted
from imgen_common.run_folder.checkpoints import check_tensors
from imgen_common.run_folder.folder import RunFolder


def read_trained_weights(
    run: RunFolder, weights: Literal["ema", "last"] = "ema", step: int | None = None
) -> tuple[TrainConfig, dict[str, Tensor]]:
    """The configuration of a run, and its averaged or last weights from a checkpoint, the newest by default."""
    chosen = run.latest_checkpoint() if step is None else step
    if chosen is None:
        raise UserError(f"{run.path}: no checkpoint yet; continue the run (flowbp train --resume {quoted(run.path)})")
    group = run.load_checkpoint(chosen).tensors["weights" if weights == "last" else "ema"]
    return run.config(TrainConfig), dict(group)


@torch.no_grad()
def load_trained_weights(backbone: Backbone, run_path: Path, step: int | None = None) -> None:
    """Puts a run's averaged weights, from its newest checkpoint by default, into a freshly loaded backbone."""
    config, weights = read_trained_weights(RunFolder.open(run_path, is_main=False), step=step)
    parameters = mark_trainable(backbone.net, config)
    check_tensors(f"{run_path}: ema", weights, parameters)
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
    backbone.net.requires_grad_(False)


def load_backbone(config: TrainConfig, device: torch.device, net_device: str | None = None) -> Backbone:
    """The generator in the configuration's precision; net_device: of the transformer, as `backbones.load` has it."""
    check_machine(config.model)
    low, quantized = config.model.dtype == "bfloat16", config.model.quantization is not None
    backbone = backbones.load(
        config.model.ref,
        dtype=torch.bfloat16 if low and config.lora is not None else torch.float32,
        device=device,
        net_device="cpu" if quantized else net_device,
        embedded_guidance=config.model.embedded_guidance,
        distilled=config.model.allow_distilled,
    )
    backbone.bfloat16 = low
    backbone.guidance_rescale = config.guidance.rescale or backbone.guidance_rescale
    if quantized:
        quantize(backbone.net, device)
        backbone.net.to(device)
    apply_model_options(backbone, config.model)
    return backbone


def load_eval_backbone(config: TrainConfig, backbone: Backbone, device: torch.device) -> Backbone:
    """The backbone with the transformer, the scheduler and the settings of the pipeline of `eval.model`, without
    adapters; all else is shared.

    Raises UserError as `check_same_shapes` does.
    """
    assert config.eval.model is not None
    sibling = check_same_shapes(backbone.net, type(backbone.pipe), config.eval.model, "eval.model").pipe
    folder = hub.resolve(config.eval.model)
    kind = type(backbone.pipe)
    dtype = torch.bfloat16 if backbone.bfloat16 else torch.float32
    quantized = config.model.quantization is not None
    net = pipelines.load_transformer(kind, folder, dtype, "cpu" if quantized else device)
    if quantized:
        quantize(net, device)
        net.to(device)
    if config.model.attention is not None:
        set_attention(net, config.model.attention)
    other = with_network(backbone, net)
    other.pipe.scheduler = sibling.scheduler
    # noise levels follow from some: Krea 2's is_distilled, Qwen-Image-2.1's sample_sigmas
    other.pipe.register_to_config(**{key: value for key, value in sibling.config.items() if not key.startswith("_")})
    return other


def copy_frozen(backbone: Backbone) -> Backbone:
    """The backbone with a frozen copy of its network; all else is shared."""
    return with_network(backbone, copy.deepcopy(backbone.net).requires_grad_(False))


def with_network(backbone: Backbone, net: nn.Module) -> Backbone:
    other = copy.copy(backbone)
    other.pipe = copy.copy(backbone.pipe)
    other.net = other.pipe.transformer = net
    return other


def with_decoder(backbone: Backbone, vae: nn.Module) -> Backbone:
    """The backbone with another decoder of its latents; all else is shared."""
    other = copy.copy(backbone)
    other.pipe = copy.copy(backbone.pipe)
    other.pipe.vae = vae
    return other


@contextmanager
def without_adapters(net: nn.Module) -> Iterator[None]:
    """Within it the network is as it was before `mark_trainable` added adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in net.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True  # `enable_adapters` would also change what requires a gradient
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def check_same_shapes(net: nn.Module, family: type, ref: str, key: str) -> Backbone:
    """The backbone that `ref` names, which may be distilled, without weights.

    Raises UserError unless its transformer has the shapes of `net`.

    net: without adapters; a guidance embedder may be there or not.  family: class of its pipeline.  key: where `ref`
    was given.
    """
    other = backbones.init_empty_weights(ref, distilled=True)
    if type(other.pipe) is not family:
        raise UserError(f"{key} {ref}: is a {type(other.pipe).__name__}; must be a {family.__name__}")
    own, found = (
        {name: tuple(p.shape) for name, p in one.named_parameters() if "guidance_embedder" not in name}
        for one in (net, other.net)
    )
    if different := sorted(name for name, _ in own.items() ^ found.items()):
        name = different[0]
        raise UserError(
            f"{key} {ref}: its transformer has other shapes: {name} is {found.get(name, 'missing')}, must be "
            f"{own.get(name, 'missing')}; give a model that was distilled from the same base"
        )
    return other


def layers_of_targets(net: nn.Module, lora: LoraConfig) -> dict[str, list[str]]:
    """The linear layers whose names end with each of the target modules.

    Raises UserError for one that matches none; the defaults are of several families, and only need one match.
    """
    layers = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    found = {t: [n for n in layers if n == t or n.endswith(f".{t}")] for t in lora.target_modules}
    ends = Counter(".".join(name.split(".")[i:]) for name in layers for i in (-2, -1))
    spared = any(found.values()) and lora.target_modules == LoraConfig().target_modules
    missed = [f"{t!r}{nearest(t, [*ends, *layers])}" for t, matches in found.items() if not (matches or spared)]
    if missed or not found:
        raise UserError(
            f"lora.target_modules: no linear layer has a name that ends with {', '.join(missed) or 'any of them: []'}; "
            f"frequent are {', '.join(end for end, _ in ends.most_common(8))}"
        )
    for key, pattern in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for end in pattern:
            if not any(f".{name}".endswith(f".{end}") for names in found.values() for name in names):
                raise UserError(f"lora.{key}: no layer with an adapter has a name that ends with {end!r}")
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
            given = peft.LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                target_modules=targets,
                rank_pattern={name: lora.rank_of(name) for name in targets if lora.rank_of(name) != lora.rank},
                alpha_pattern={name: lora.alpha_of(name) for name in targets if lora.alpha_of(name) != lora.alpha},
            )
            peft.inject_adapter_in_model(given, net)
    found = {name: p for name, p in net.named_parameters() if p.requires_grad}
    for parameter in found.values():
        parameter.data = parameter.data.float()  # adapters of a bfloat16 network start in bfloat16
    return found
