"""The trained weights, their average and AdamW: whole on every process (DDP), or cut up over them (FSDP2, ZeRO).

Checkpoints hold whole tensors either way, so that a run may go on with another number of processes or another layout.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from flowbp.config import OptimConfig
from flowbp.networks import blocks_of
from flowbp.types import Velocity

State = Mapping[str, Mapping[str, Tensor]]
"""Whole tensors by name: `weights`, their `average`, and `optimizer` with NAME/step, NAME/exp_avg, NAME/exp_avg_sq."""
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@runtime_checkable
class Weights(Protocol):
    """What an optimizer step needs and changes, on one of several processes.  All processes call all methods."""

    gradient_scale: float
    """What a process multiplies its part of the global batch's mean loss with."""

    def synchronised(self, passes: int) -> AbstractContextManager[None]:
        """Around the `passes` backward passes of an update; after it gradients are added up over the processes."""

    def counted(self, velocity: Velocity) -> Velocity:
        """The velocity, so that the last of the update's backward passes is known before it is made."""

    def step(self, rate: float, limit: float, decay: float) -> float:
        """AdamW with the gradient scaled down to norm `limit`; the average moves by 1 - decay towards the weights.

        Returns the norm the gradient had.  Where that is not finite nothing is changed.
        """

    def averaged(self) -> AbstractContextManager[None]:
        """Within it the network carries the averaged weights."""

    def whole_average(self) -> dict[str, Tensor]:
        """The average, whole, on the main process; empty tensors on the others."""

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything, whole, on the main process; empty tensors on the others."""

    def restore(self, state: State) -> None:
        """Takes up what `state` gave; every process brings all of it."""


def adamw(parameters: Mapping[str, nn.Parameter], optim: OptimConfig) -> torch.optim.AdamW:
    """The optimizer of a configuration."""
    return torch.optim.AdamW(
        parameters.values(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )


@contextmanager
def swapped(weights: Mapping[str, Tensor], average: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it each weight and its average have changed places."""

    @torch.no_grad()
    def swap() -> None:
        for name, mean in average.items():
            kept = weights[name].detach().clone()
            weights[name].copy_(mean)
            mean.copy_(kept)

    swap()
    try:
        yield
    finally:
        swap()


class TorchWeights:
    """Whole weights, with gradients added up in one message per update; or, of a network that `shard` cut up, this
    process's part of them, gradients added up once per update or after every backward pass."""

    gradient_scale = 1.0

    def __init__(self, net: nn.Module, optim: OptimConfig, accelerator: Accelerator, *, each_pass: bool) -> None:
        self.net, self.accelerator, self.each_pass = net, accelerator, each_pass
        self.parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
        self.optimizer = adamw(self.parameters, optim)
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._left = 0

    @contextmanager
    def synchronised(self, passes: int) -> Iterator[None]:
        """After it `.grad` holds the sum over all processes."""
        self._left = passes
        if isinstance(self.net, FSDPModule):
            self.net.set_requires_gradient_sync(self.each_pass)
        yield
        if self._left:
            raise RuntimeError(f"{self._left} of {passes} backward passes were not made: gradients are not added up")
        if not isinstance(self.net, FSDPModule) and self.accelerator.num_processes > 1:
            self._reduce()

    def counted(self, velocity: Velocity) -> Velocity:
        """A sharded network is told before its last forward that gradients are to be added up after it."""

        def call(x: Tensor, sigma: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                self._left -= 1
                if not self._left and isinstance(self.net, FSDPModule):
                    self.net.set_requires_gradient_sync(True)
            return velocity(x, sigma)

        return call

    def _reduce(self) -> None:
        for p in self.parameters.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "sum")
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def step(self, rate: float, limit: float, decay: float) -> float:
        """As `Weights` says."""
        norm = whole(nn.utils.clip_grad_norm_(self.parameters.values(), limit))
        if norm.isfinite():
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            for name, p in self.parameters.items():
                self.average[name].lerp_(p, 1 - decay)
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def averaged(self) -> AbstractContextManager[None]:
        """As `Weights` says."""
        return swapped(self.parameters, self.average)

    def whole_average(self) -> dict[str, Tensor]:
        """As `Weights` says."""
        return {name: self._kept(mean) for name, mean in self.average.items()}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """As `Weights` says."""
        moments = {
            f"{name}/{key}": self._kept(value)
            for name, p in self.parameters.items()
            for key, value in self.optimizer.state.get(p, {}).items()
        }
        weights = {name: self._kept(p.detach()) for name, p in self.parameters.items()}
        return {"weights": weights, "average": self.whole_average(), "optimizer": moments}

    def _kept(self, tensor: Tensor) -> Tensor:
        found = whole(tensor)
        return found.cpu() if self.accelerator.is_main_process else found.new_empty(0)

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """As `Weights` says."""
        for name, p in self.parameters.items():
            p.copy_(part_like(p, state["weights"][name]))
            self.average[name].copy_(part_like(p, state["average"][name]))
            moments = {key: state["optimizer"].get(f"{name}/{key}") for key in MOMENTS}
            kept = {key: value for key, value in moments.items() if value is not None}
            if kept:
                self.optimizer.state[p] = {k: v if k == "step" else part_like(p, v) for k, v in kept.items()}


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be cut up over the processes, which all must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(like: Tensor, tensor: Tensor) -> Tensor:
    """This process's part of a whole tensor, cut up and placed as `like` is."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def shard(net: ModelMixin, device: torch.device, gathered: torch.dtype | None = None) -> None:
    """Cuts a network up over all processes, block by block (FSDP2), with the weights that process 0 holds.

    The other processes may hold it on the meta device.  gathered: precision in which the parts are brought together
    to compute with; None: their own.  Gradients are summed, in float32.
    """
    held = {name: t.detach() for name, t in (*net.named_parameters(), *net.named_buffers())}
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(gathered, torch.float32 if gathered else None, cast_forward_inputs=False)
    net.to("meta")
    for module in (*blocks_of(net), net):
        # the root too gives its weights back after a forward: what an evaluation gathered is stale afterwards
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
    net.to_empty(device=device)
    for name, t in (*net.named_parameters(), *net.named_buffers()):
        first = torch.empty_like(held[name], device=device) if held[name].is_meta else held[name].to(device)
        if isinstance(t, DTensor):
            t.copy_(distribute_tensor(first, mesh, t.placements))
        else:
            distributed.broadcast(first, 0)
            t.copy_(first)
