"""Everything a run is made of, loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import nn

from flowbp.backbones.loading import copy_frozen, load_backbone, load_eval_backbone, mark_trainable
from flowbp.backbones.lora import load_adapter, read_adapter
from flowbp.backbones.options import compile_blocks
from flowbp.backbones.preview import load_preview
from flowbp.backbones.rollout import RolloutNetwork, check_rollout
from flowbp.config import TrainConfig
from flowbp.core.types import Backbone, Reward
from flowbp.data.embeddings import EmbeddingStore, PromptEmbeddings, fingerprint
from flowbp.data.prompts import load_prompts
from flowbp.training.state import TorchTrainState, TrainState, shard
from imgen_common import hub


@dataclass
class LoadedModels:
    """The generator, the rewards by name, the training prompts and their embeddings.

    parameters: what is trained, by name; of a sharded network this process's part.  eval_backbone: the network of
    `eval.model`, with the very same adapter; None: the generator itself draws the images of evaluations.  base: the
    network before training, where a regulariser needs a copy of it; None: the generator's without adapters.  rollout:
    what rollouts evaluate, if that is not the generator.  preview: decodes the images of quick evaluations, if that is
    not the autoencoder.
    """

    backbone: Backbone
    rewards: Mapping[str, Reward]
    prompts: list[str]
    embeddings: PromptEmbeddings
    parameters: dict[str, nn.Parameter]
    eval_backbone: Backbone | None = None
    base: Backbone | None = None
    rollout: RolloutNetwork | None = None
    preview: nn.Module | None = None


def load_models(
    config: TrainConfig,
    device: torch.device,
    *,
    is_main: bool = True,
    with_rewards: bool = True,
    with_adapter: bool = True,
) -> LoadedModels:
    """Loads the generator, the rewards and the prompts that the configuration names.

    with_rewards=False: rewards are loaded later, in memory that the text encoders have left.  with_adapter=False:
    `lora.init` is not read, since a checkpoint follows.
    """
    # of a network that is to be sharded the main process alone reads the weights; `shard` gives the others their part
    sharded = config.distributed.kind == "fsdp2"
    backbone = load_backbone(config, device, ("cpu" if is_main else "meta") if sharded else None)
    net, prompts = backbone.net, load_prompts(config.data.prompts, config.data)
    assert isinstance(net, ModelMixin)
    init = config.lora.init if config.lora is not None and with_adapter and (is_main or not sharded) else None
    adapter = read_adapter(init, net, type(backbone.pipe).__name__) if init is not None else {}
    base = copy_frozen(backbone) if config.regularise is not None and config.lora is None else None
    evaluated = None if config.eval.model is None else load_eval_backbone(config, backbone, device)
    ref = config.model.vae.preview
    preview = None if ref is None else load_preview(backbone.pipe.vae, ref, device)
    # what is trained is float32 from here on; under adapters of a bfloat16 network the frozen weights are bfloat16
    parameters = mark_trainable(net, config)
    load_adapter(adapter, parameters)
    if evaluated is not None:
        share_adapter(evaluated.net, config, parameters)
    if sharded:
        shard(net, device, torch.bfloat16 if backbone.bfloat16 and config.lora is None else None)
        parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    rolled = make_rollout_network(backbone, config)
    if config.model.compile:
        for one in (net,) if base is None else (net, base.net):
            compile_blocks(one)
    embeddings = make_embeddings(config, backbone)
    rewards = load_rewards(config, device) if with_rewards else {}
    return LoadedModels(backbone, rewards, prompts, embeddings, parameters, evaluated, base, rolled, preview)


def make_embeddings(config: TrainConfig, backbone: Backbone) -> PromptEmbeddings:
    """Embeddings of prompts, kept where the configuration says."""
    if config.data.embeddings != "disk":
        return PromptEmbeddings(backbone)
    # those on disk are shared by all runs, so their keys contain all that they depend on
    key = fingerprint(hub.resolve(config.model.ref), backbone, config.model)
    return PromptEmbeddings(backbone, EmbeddingStore(Path(config.data.cache)), key)


def make_rollout_network(backbone: Backbone, config: TrainConfig) -> RolloutNetwork | None:
    """What rollouts evaluate, if that is not the network as it is trained."""
    if not config.rollout.changes_network:
        return None
    check_rollout(config.rollout)
    return RolloutNetwork(backbone, config.rollout, compiled=config.model.compile)


def share_adapter(net: nn.Module, config: TrainConfig, parameters: Mapping[str, nn.Parameter]) -> None:
    """Adds adapters to a network of the same shapes whose parameters are those of another, `mark_trainable`'s."""
    for name in mark_trainable(net, config):
        layer, _, weight = name.rpartition(".")
        setattr(net.get_submodule(layer), weight, parameters[name])


def load_rewards(config: TrainConfig, device: torch.device | str) -> dict[str, Reward]:
    """All rewards by name, the trained ones first; on "meta" only the headers of their weights are read."""
    return {scorer.name: scorer.load(device) for scorer in config.scorers}


def make_train_state(config: TrainConfig, backbone: Backbone, accelerator: Accelerator) -> TrainState:
    """The trained weights of a loaded backbone, their average and optimizer, held as the configuration says."""
    kind, sync_each_backward = config.distributed.kind, config.distributed.sync == "step"
    if kind in ("zero2", "zero3"):
        from flowbp.training.state_zero import ZeroTrainState  # DeepSpeed is an optional package

        stage = int(kind[-1])
        return ZeroTrainState(backbone, config.optim, accelerator, stage, sync_each_backward=sync_each_backward)
    return TorchTrainState(backbone.net, config.optim, accelerator, sync_each_backward=sync_each_backward)
