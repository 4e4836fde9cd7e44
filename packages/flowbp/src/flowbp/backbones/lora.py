"""Adapters (LoRA) in files of diffusers, PEFT, kohya's scripts and ComfyUI, taken up as the start of a training."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.normalization import AdaLayerNormContinuous
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor, nn

from flowbp.backbones.layer_names import original_layers
from flowbp.backbones.loading import layers_of_targets, mark_trainable
from flowbp.config import LoraConfig, TrainConfig
from flowbp.core.types import Backbone
from imgen_common import hub
from imgen_common.errors import UserError
from imgen_common.hub.adapters import check_plain_start, parse_adapter_key
from imgen_common.weights import ADAPTER_CONFIG, read_json

PEFT_ALPHA = 8
"""lora_alpha of a description that does not give it."""
TRIED = (
    "diffusers (transformer.LAYER.lora_A.weight), PEFT (base_model.model.LAYER.lora_A.weight), kohya "
    "(lora_unet_LAYER.lora_down.weight) and ComfyUI (diffusion_model.LAYER.lora_A.weight)"
)
UNSUPPORTED = ("use_dora", "use_qalora", "fan_in_fan_out", "lora_bias", "layer_replication", "modules_to_save")
"""Options of PEFT's LoRA that make of it something else than scale B A."""


@dataclass(frozen=True)
class LayerAdapter:
    """The update of one linear layer, weight += alpha / rank * up @ down.  down: (rank, in).  up: (out, rank)."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Its rank."""
        return len(self.down)


class _Target(NamedTuple):
    """What a name in a file stands for: layers of the network whose outputs are stacked there."""

    layers: list[str]
    is_original: bool


def read_adapter(ref: str, net: nn.Module, pipeline: str) -> dict[str, LayerAdapter]:
    """The adapter in a file, by the name of its layer in the network, float32.

    It may have the keys of diffusers, PEFT, kohya or ComfyUI, with the layers' names in diffusers or in the original
    model.  What a file stacks, as query, key and value, is taken apart: exactly, with its rank for each part, or with
    its own where the parts do not share columns.  net: without adapters, may be on the meta device.  pipeline: class
    name of its pipeline.  alpha is that of the file, PEFT's 8 where its description has none, and the rank without one.
    Raises UserError for a file of which not everything is an adapter of linear layers of this network.
    """
    file = hub.resolve_adapter(ref, "lora.init")
    with safe_open(file, "pt") as content:
        tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118 (it is no mapping)
        options = _options(ref, file, tensors, content.metadata() or {})
    linear = {name: module for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    found: dict[str, LayerAdapter] = {}
    targets = _targets(linear, pipeline)
    for name, (target, parts) in _by_module(ref, tensors, targets, type(net).__name__).items():
        widths = [linear[layer].out_features for layer in target.layers]
        whole = _whole(ref, name, parts, options)
        _check_shapes(ref, name, whole, linear[target.layers[0]].in_features, widths, target.layers)
        if target.is_original and _is_swapped(net, target.layers[0]):
            whole = LayerAdapter(whole.down, torch.cat(whole.up.chunk(2)[::-1]), whole.alpha)
        parts_of = zip(target.layers, take_apart(whole, widths), strict=True)
        found |= {layer: one for layer, one in parts_of if one is not None}
    return found


def take_apart(whole: LayerAdapter, widths: list[int]) -> list[LayerAdapter | None]:
    """The adapters of layers with the same input whose outputs, of these widths, are stacked; their updates are exact.

    Each has the rank of the whole, unless every part has columns of its own, as `flowbp export` writes them: then each
    has its own ones.  None for a part that is zero, where another is not.
    """
    ups = list(whole.up.split(widths))
    present = [i for i, up in enumerate(ups) if up.any()] or list(range(len(ups)))
    found: list[LayerAdapter | None] = [LayerAdapter(whole.down, up, whole.alpha) for up in ups]
    size, rest = divmod(whole.rank, len(present))
    blocks = {i: slice(k * size, (k + 1) * size) for k, i in enumerate(present)}
    if not rest and whole.up.any() and all(_is_within(ups[i], own) for i, own in blocks.items()):
        alpha = whole.alpha * size / whole.rank
        for i, own in blocks.items():
            found[i] = LayerAdapter(whole.down[own], ups[i][:, own], alpha)
    return [one if i in blocks else None for i, one in enumerate(found)]


def _is_within(up: Tensor, columns: slice) -> bool:
    return bool(up.count_nonzero() == up[:, columns].count_nonzero())


def adopt_adapter(lora: LoraConfig, net: nn.Module, pipeline: str) -> LoraConfig:
    """The settings with the rank, alpha and layers of the adapter that `init` names; without `init`, as they are.

    net, pipeline: as for `read_adapter`.  Raises UserError as that does, and if other values were set beside `init`.
    """
    if lora.init is None:
        return lora
    found = read_adapter(lora.init, net, pipeline)
    rank = Counter(one.rank for one in found.values()).most_common(1)[0][0]
    alpha = Counter(one.alpha for one in found.values()).most_common(1)[0][0]
    values: dict[str, Any] = {
        "rank": rank,
        "alpha": alpha,
        "rank_pattern": {layer: one.rank for layer, one in found.items() if one.rank != rank},
        "alpha_pattern": {layer: one.alpha for layer, one in found.items() if one.alpha != alpha},
    }
    for name, value in values.items():
        if name in lora.model_fields_set and (given := getattr(lora, name)) != value:
            raise UserError(f"lora.{name} {given}: the adapter {lora.init} has {value}; leave lora.{name} out")
    return lora.model_copy(update=values | {"target_modules": _target_modules(lora, net, set(found))})


@torch.no_grad()
def load_adapter(adapter: Mapping[str, LayerAdapter], parameters: Mapping[str, nn.Parameter]) -> None:
    """Puts an adapter into the trained parameters of a network whose settings `adopt_adapter` made."""
    for layer, one in adapter.items():
        parameters[f"{layer}.lora_A.default.weight"].copy_(one.down)
        parameters[f"{layer}.lora_B.default.weight"].copy_(one.up)


def attach_adapter(backbone: Backbone, config: TrainConfig) -> None:
    """Puts the adapter that `lora.init` names on a freshly loaded backbone, frozen."""
    assert config.lora is not None
    pipeline = type(backbone.pipe).__name__
    lora = adopt_adapter(config.lora, backbone.net, pipeline)
    found = read_adapter(str(lora.init), backbone.net, pipeline)
    load_adapter(found, mark_trainable(backbone.net, config.model_copy(update={"lora": lora})))
    backbone.net.requires_grad_(False)


def _target_modules(lora: LoraConfig, net: nn.Module, layers: set[str]) -> tuple[str, ...]:
    """Ends of names that stand for exactly these layers: the configured ones, those within blocks, or whole names."""

    def chosen(targets: Iterable[str]) -> set[str]:
        given = lora.model_copy(update={"target_modules": tuple(targets)})
        return {name for names in layers_of_targets(net, given).values() for name in names}

    if "target_modules" in lora.model_fields_set:
        difference = sorted(chosen(lora.target_modules) ^ layers)
        if difference:
            raise UserError(
                f"lora.target_modules: stand for other layers than the {len(layers)} of the adapter {lora.init}; the "
                f"first that differs is {difference[0]}; leave lora.target_modules out"
            )
        return lora.target_modules
    ends = sorted({re.sub(r"^\w+\.\d+\.", "", name) for name in layers})
    ends = [end for end in ends if not any(end.endswith(f".{other}") for other in ends)]  # each layer counts once
    if chosen(ends) == layers:
        return tuple(ends)
    if others := sorted(chosen(layers) - layers):  # the name of a layer is the end of that of others
        what = f"has no {others[0]}, whose name ends as that of a layer that it has"
        raise UserError(f"lora.init {lora.init}: {what}; give an adapter with both or neither")
    return tuple(sorted(layers))


def _options(ref: str, file: Path, keys: Iterable[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's description of the adapter: adapter_config.json beside a file of PEFT, or what diffusers put into its
    header, where the keys of a pipeline's adapter say which component they are of."""
    described = file.parent / ADAPTER_CONFIG
    is_peft = file.name == hub.ADAPTER_FILES[0] or any(key.startswith("base_model.model.") for key in keys)
    if is_peft and described.exists():
        options = read_json(described)
    else:
        try:
            content = json.loads(metadata.get("lora_adapter_metadata", "{}"))
            start = "transformer."
            options = {key.removeprefix(start): value for key, value in content.items() if key.startswith(start)}
            options = options or {key: value for key, value in content.items() if "." not in key}
        except (ValueError, AttributeError, RecursionError):
            raise UserError(f"lora.init {ref}: lora_adapter_metadata in its header is no JSON object") from None
    if kind := [options["peft_type"]] if options.get("peft_type", "LORA") != "LORA" else []:
        raise UserError(f"lora.init {ref}: is a {kind[0]} adapter; only LORA is taken up")
    other = [name for name in UNSUPPORTED if options.get(name)]
    if other or options.get("bias", "none") != "none":
        raise UserError(f"lora.init {ref}: its {(other or ['bias'])[0]} is not supported; give a plain LoRA")
    check_plain_start(options, f"lora.init {ref}")
    return options


def _targets(layers: Iterable[str], pipeline: str) -> dict[str, _Target]:
    """What names stand for, dots as underscores: those of the network's linear layers, and the original ones."""
    present = set(layers)
    found = {
        name.replace(".", "_"): _Target(ours, is_original=True)
        for name, ours in original_layers(present, pipeline).items()
        if present.issuperset(ours)
    }
    return found | {name.replace(".", "_"): _Target([name], is_original=False) for name in present}


def _by_module(
    ref: str, tensors: Mapping[str, Tensor], targets: Mapping[str, _Target], network: str
) -> dict[str, tuple[_Target, dict[str, Tensor]]]:
    """The tensors down, up and alpha of each module of a file, and what it stands for.  Raises UserError for others."""
    found: dict[str, tuple[_Target, dict[str, Tensor]]] = {}
    unknown = []
    for key, tensor in tensors.items():
        module, part, target = parse_adapter_key(key, targets) or ("", "", None)
        if target is None:
            unknown.append(key)
            continue
        found.setdefault(module, (target, {}))[1][part] = tensor
    if not found:
        has = f"its {len(tensors)} keys begin with {min(tensors)}" if tensors else "it is empty"
        example = next((target.layers[0] for target in targets.values()), "none")
        raise UserError(
            f"lora.init {ref}: no key is of a layer of {network} (such as {example}): {has}; tried the forms of {TRIED}"
        )
    if unknown:
        raise UserError(
            f"lora.init {ref}: {len(unknown)} of {len(tensors)} keys are of no linear layer of {network} or no part of "
            f"a plain LoRA, the first is {min(unknown)}; an adapter is taken up whole: give one of this model alone, "
            "without text encoders"
        )
    layers = Counter(layer for target, _ in found.values() for layer in target.layers)
    if twice := [layer for layer, number in layers.items() if number > 1]:
        raise UserError(f"lora.init {ref}: has more than one adapter for the layer {twice[0]}")
    return found


def _whole(ref: str, name: str, parts: Mapping[str, Tensor], options: Mapping[str, Any]) -> LayerAdapter:
    """One module of a file.  Raises UserError where a part is missing, or what it holds are no numbers to train."""
    down, up, given = parts.get("down"), parts.get("up"), parts.get("alpha")
    if down is None or up is None:
        raise UserError(
            f"lora.init {ref}: {name} has no lora_{'A (down)' if down is None else 'B (up)'}; copy it again"
        )
    if down.dim() != 2 or up.dim() != 2 or not 0 < len(down) == up.shape[1]:
        shapes = f"{list(down.shape)} and {list(up.shape)}"
        raise UserError(f"lora.init {ref}: {name} has matrices of {shapes}; must be [rank, in] and [out, rank]")
    rank, alpha = len(down), float(len(down))
    layer = name.removeprefix("base_model.model.").removeprefix("transformer.")
    if options:
        alpha = _described(ref, options, "alpha_pattern", layer, options.get("lora_alpha", PEFT_ALPHA))
    # alpha counts by the rank that it was chosen for; PEFT takes no matrices of another one
    if (described := _described(ref, options, "rank_pattern", layer, options.get("r", rank))) != rank:
        raise UserError(
            f"lora.init {ref}: {name} has rank {rank}, but its description says {described}; copy both from one place"
        )
    if given is not None:
        alpha = given.item() if given.numel() == 1 else float("nan")
    elif options.get("use_rslora") and isinstance(alpha, int | float):
        alpha *= rank**0.5  # PEFT then scales by alpha / sqrt(rank)
    finite = all(part.is_floating_point() and part.isfinite().all() for part in (down, up))
    if not (finite and isinstance(alpha, int | float) and 0 < alpha < float("inf")):
        what = f"alpha {alpha}; must be above 0" if finite else "values that are no finite floating-point numbers"
        raise UserError(f"lora.init {ref}: {name} has {what}")
    return LayerAdapter(down.float(), up.float(), float(alpha))


def _described(ref: str, options: Mapping[str, Any], pattern: str, layer: str, default: Any) -> Any:
    """What PEFT's description says of a layer: in a mapping by patterns of names or, where none fits, `default`."""
    by_name = options.get(pattern) or {}
    try:
        return by_name.get(get_pattern_key(list(by_name), layer), default)
    except (re.error, AttributeError, TypeError):
        raise UserError(f"lora.init {ref}: its {pattern} is none of PEFT; copy it again") from None


def _check_shapes(ref: str, name: str, whole: LayerAdapter, inputs: int, widths: list[int], layers: list[str]) -> None:
    """Raises UserError unless an adapter fits its layers."""
    found, expected = (whole.down.shape[1], len(whole.up)), (inputs, sum(widths))
    if found != expected:
        raise UserError(
            f"lora.init {ref}: {name} is of a layer with {found[0]} inputs and {found[1]} outputs; in this network "
            f"{' + '.join(layers)} has {expected[0]} and {expected[1]}; give an adapter of the same model"
        )


def _is_swapped(net: nn.Module, layer: str) -> bool:
    """Whether diffusers has the halves of a layer's outputs in the other order than the original model: the modulation
    of the text in the last block of Stable Diffusion 3, and the last one of FLUX."""
    return isinstance(net.get_submodule(layer.rpartition(".")[0]), AdaLayerNormContinuous)
