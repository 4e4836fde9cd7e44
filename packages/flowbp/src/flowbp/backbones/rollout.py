"""The network as rollouts evaluate it: the same weights in another precision, compiled, or both."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import ScalingType, scaled_mm

from flowbp.backbones.loading import with_network
from flowbp.backbones.options import blocks_of, compile_blocks
from flowbp.config.rollout import RolloutConfig
from flowbp.core.types import Backbone, Cond
from imgen_common.errors import UserError

FP8 = torch.float8_e4m3fn
LARGEST_FP8 = torch.finfo(FP8).max
TILE = 16
"""Both sides of a matrix of 8-bit floats are multiples of it on a GPU."""
MIN_CAPABILITY = (8, 9)
"""Compute capability from which on GPUs multiply 8-bit floats."""
ADAPTER = "lora_"
"""In the names of adapters' layers, which are small and stay in bfloat16."""
CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weights autocast would cast in every evaluation."""


class RolloutNetwork:
    """A backbone's velocity as `RolloutConfig` says, without gradient.

    It shares every parameter with the backbone, but for copies of lower precision, which `refresh` renews in place.
    """

    def __init__(self, backbone: Backbone, config: RolloutConfig, *, compiled: bool = False) -> None:
        """compiled: whether the network's blocks are compiled (`model.compile`), and so are these."""
        shared = {id(t): t for t in (*backbone.net.parameters(), *backbone.net.buffers())}
        net = copy.deepcopy(backbone.net, shared)
        self.backbone = with_network(backbone, net)
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._float8: list[Float8Linear] = []
        if config.dtype == "fp8":
            self._float8 = _use_float8(net)
        if config.dtype is not None:
            self._copies = _copy_in_bfloat16(net)
            self.backbone.bfloat16 = True
        self.is_graph = config.compile == "reduce-overhead"
        if self.is_graph:
            net.compile(mode=config.compile)
        elif config.compile is not None or compiled:
            compile_blocks(net)
        self.net = net

    @torch.no_grad()
    def refresh(self) -> None:
        """Renews the copies of weights that are trained, after these have changed."""
        for low, weight in self._copies:
            if weight.requires_grad:
                low.copy_(weight)
        for layer in self._float8:
            layer.refresh()

    @torch.no_grad()
    def velocity(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """`Backbone.velocity` of this network."""
        if not self.is_graph:
            return self.backbone.velocity(x, sigma, cond)
        # the next replay of a CUDA graph overwrites what this one returns
        torch.compiler.cudagraph_mark_step_begin()
        return self.backbone.velocity(x, sigma, cond).clone()


def check_rollout(config: RolloutConfig) -> None:
    """Raises UserError where this machine lacks what the configuration asks for."""
    has_gpu = torch.cuda.is_available()
    if config.compile == "reduce-overhead" and not has_gpu:
        raise UserError(
            "rollout.compile reduce-overhead: CUDA graphs need a CUDA device, torch sees none; set it to default"
        )
    if config.dtype == "fp8" and has_gpu and torch.cuda.get_device_capability() < MIN_CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        raise UserError(
            f"rollout.dtype fp8: needs a GPU of compute capability 8.9 (Ada, Hopper) or newer, this one has {found}; "
            "set it to bfloat16"
        )


class Float8Linear(nn.Module):
    """y = x W^T + b with rows of x and W rounded to 8-bit floats (e4m3), a scale for each row, sums in float32; y is
    bfloat16."""

    values: Float[Tensor, "out inputs"]
    scale: Float[Tensor, "out 1"]
    bias: Float[Tensor, " out"] | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.source = (layer,)  # a tuple, so that its parameters are not those of this module
        values, scale = to_float8(layer.weight.detach())
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        bias = None if layer.bias is None else layer.bias.detach().bfloat16()
        self.register_buffer("bias", bias, persistent=False)

    def refresh(self) -> None:
        """Rounds the layer's weights anew, if they are trained."""
        (layer,) = self.source
        if layer.weight.requires_grad:
            values, scale = to_float8(layer.weight.detach())
            self.values.copy_(values)
            self.scale.copy_(scale)
            if self.bias is not None:
                self.bias.copy_(layer.bias)

    def forward(self, x: Float[Tensor, "*b inputs"]) -> Float[Tensor, "*b out"]:
        values, scale = to_float8(x.flatten(0, -2))
        by_row = ScalingType.RowWise
        found = scaled_mm(values, self.values.t(), scale, by_row, self.scale.t(), by_row, bias=self.bias)
        return found.unflatten(0, x.shape[:-1])


def to_float8(rows: Float[Tensor, "n m"]) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n 1"]]:
    """Rows as 8-bit floats, and the float32 scale of each, its largest magnitude / 448: values * scale is the row."""
    scale = rows.abs().amax(1, keepdim=True).float().clamp(min=torch.finfo(torch.float32).tiny) / LARGEST_FP8
    return (rows / scale).to(FP8), scale


def _use_float8(net: nn.Module) -> list[Float8Linear]:
    """Replaces the blocks' linear layers, but for adapters and such as no GPU multiplies; returns the new ones."""
    found = []
    for block in blocks_of(net):
        for name, layer in list(block.named_modules()):
            fits = isinstance(layer, nn.Linear) and not any(side % TILE for side in layer.weight.shape)
            if fits and ADAPTER not in name:
                found.append(Float8Linear(layer))
                block.set_submodule(name, found[-1])
    return found


def _copy_in_bfloat16(net: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Gives layers whose weights are of another precision such in bfloat16; returns (new, old)."""
    found: list[tuple[Tensor, Tensor]] = []
    for layer in [module for module in net.modules() if isinstance(module, CAST)]:
        for name, weight in list(layer.named_parameters(recurse=False)):
            if weight.dtype != torch.bfloat16:
                low = nn.Parameter(weight.detach().bfloat16(), requires_grad=False)
                layer.register_parameter(name, low)
                found.append((low, weight))
    return found
