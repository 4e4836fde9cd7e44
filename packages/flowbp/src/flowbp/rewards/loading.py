"""Frozen models from transformers folders, and heads beside them; on the meta device only headers are read."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from imgen_common.errors import UserError
from imgen_common.prompt_limits import check_vocabulary
from imgen_common.weights import HEAD_FILE, load_whole, loading

WIDTHS = (1024, 128, 64, 16, 1)
CHECKPOINT_LAYERS = (0, 2, 4, 6, 7)
"""Indices of these layers in the published checkpoints, where dropout layers stand between them."""


def scoring_head(width: int) -> nn.Sequential:
    """Maps features (b, width) to scores (b, 1): the head of the LAION aesthetic predictor and of ImageReward."""
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise((width, *WIDTHS))))


def modules_of(rewards: Iterable[Any]) -> Iterator[nn.Module]:
    """The networks that rewards are made of."""
    for value in (value for reward in rewards for value in vars(reward).values()):
        if isinstance(value, nn.Module):
            yield value
        elif type(value).__module__.startswith("flowbp.rewards"):
            yield from modules_of([value])


class _Float32View(nn.Module):
    """What a layer sees of a weight that is stored in float16."""

    def forward(self, stored: Tensor) -> Tensor:
        return stored.float()


def store_in_float16(model: nn.Module) -> None:
    """Stores the weights of linear layers in float16; they still compute in float32, with a copy made for each call.

    This halves the memory of a frozen model.  Weights that were published in float16 stay what they are; others change
    by at most 2^-11 of their size, which changes a cosine of a CLIP ViT-L with random weights by 7e-5.
    """
    for layer in [module for module in model.modules() if isinstance(module, nn.Linear)]:
        layer.weight.data = layer.weight.data.half()
        parametrize.register_parametrization(layer, "weight", _Float32View(), unsafe=True)


def compute_in(model: nn.Module, dtype: Literal["float32", "bfloat16"] | None) -> None:
    """Makes a model of transformers compute in another precision; heads, and single numbers such as the scale of a
    cosine, keep theirs."""
    if not isinstance(model, PreTrainedModel) or dtype is None:
        return
    numbers = {name: p.data for name, p in model.named_parameters() if p.dim() == 0}
    model.to(getattr(torch, dtype))
    for name, value in numbers.items():
        model.get_parameter(name).data = value


def at_least_float32(x: Tensor) -> Tensor:
    """What a network in a lower precision gave, in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def checkpoint_layers(layers: Iterable[nn.Module]) -> None:
    """Recomputes each layer in the backward pass, so that a gradient needs the memory of one layer, not of all."""
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)


def load_head(folder: Path, head: nn.Sequential, device: torch.device | str) -> nn.Sequential:
    """`head`, frozen, with the weights in the folder of a converted reward.  Raises UserError if it has none."""
    file = folder / HEAD_FILE
    if not file.exists():
        raise UserError(f"{folder}: no {HEAD_FILE} in it; make the folder with `flowbp convert-reward`")
    load_weights(head.to(device), folder, read_tensors(file, device))
    return head.eval().requires_grad_(False)


def read_tensors(file: Path, device: torch.device | str) -> dict[str, Tensor]:
    """The tensors of a safetensors file; on the meta device, which that library does not know, from its header."""
    if str(device) != "meta":
        return load_file(file, str(device))
    with safe_open(file, "pt") as opened:
        shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def load_weights(module: nn.Module, folder: Path, weights: dict[str, Tensor]) -> None:
    """Puts the weights of a folder into a module.  Raises UserError where their names or shapes are others."""
    with loading(f"{folder}: its weights do not fit {type(module).__name__}"):
        module.load_state_dict(weights)


def are_weights_missing(folder: Path, device: torch.device | str) -> bool:
    """Whether a model is loaded without its weights: on the meta device, from a folder that has none but of a head."""
    return str(device) == "meta" and not any(file.name != HEAD_FILE for file in folder.glob("[!.]*.safetensors"))


def prompt_of_each(prompts: Sequence[str], images: Tensor) -> Sequence[str]:
    """The prompts; a text alone is the prompt of every image, and no list of letters."""
    return [prompts] * len(images) if isinstance(prompts, str) else prompts


def load_part(kind: Any, folder: Path, **options: Any) -> Any:
    """The model, processor, tokenizer or configuration of class `kind` in a folder.  Raises UserError without it."""
    with loading(f"{folder}: has no {kind.__name__} that can be loaded"):
        return kind.from_pretrained(folder, local_files_only=True, **options)


def load_tokenizer(folder: Path, model: PreTrainedModel) -> Any:
    """The tokenizer of a folder, for the model of text in it.  Raises UserError without it, or if they do not fit."""
    tokenizer = load_part(AutoTokenizer, folder)
    check_vocabulary(tokenizer, model, str(folder))
    return tokenizer


def load_frozen(
    model_class: type[PreTrainedModel], folder: Path, device: torch.device | str, dtype: torch.dtype
) -> Any:
    """The model of a folder in eval mode, none of its parameters requiring a gradient."""
    with loading(f"{folder}: has no {model_class.__name__} that can be loaded"):
        if are_weights_missing(folder, device):
            with torch.device("meta"):
                model = model_class(load_part(AutoConfig, folder)).to(dtype)
        else:
            on_meta = {"device_map": "meta"} if str(device) == "meta" else {}
            model = load_whole(model_class, folder, dtype=dtype, **on_meta)
    return model.to(device).eval().requires_grad_(False)
