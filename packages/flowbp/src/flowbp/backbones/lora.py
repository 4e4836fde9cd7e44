"""Which weights of a network are trained: all of them, or adapters."""

import warnings

import torch
from torch import nn

from flowbp.config import TrainConfig
from imgen_common.errors import UserError


def mark_trainable(net: nn.Module, config: TrainConfig) -> dict[str, nn.Parameter]:
    """Makes all weights of the network trainable, or adds adapters and makes those trainable; float32, by name.

    Adapters are initialized from the run's seed, equally on every process.
    Raises UserError if no layer matches `lora.target_modules`.
    """
    if config.lora is None:
        net.requires_grad_(True)
    else:
        from peft import LoraConfig, inject_adapter_in_model

        lora = config.lora
        layers = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
        targets = [n for n in layers if any(n == t or n.endswith(f".{t}") for t in lora.target_modules)]
        if not targets:
            raise UserError(
                f"lora.target_modules {list(lora.target_modules)} match no linear layer; there are e.g. {layers[:4]}"
            )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(config.seed)
            warnings.filterwarnings("ignore", ".*get_apply_tensor_subclass.*")  # of merging, which export does itself
            inject_adapter_in_model(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets), net)
    found = {name: p for name, p in net.named_parameters() if p.requires_grad}
    for parameter in found.values():
        parameter.data = parameter.data.float()  # adapters of a bfloat16 network start in bfloat16
    return found
