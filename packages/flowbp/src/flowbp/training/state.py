"""The trained weights, their average (EMA) and AdamW: full on every process (DDP), or sharded (FSDP2, ZeRO).

A run may continue with another number of processes or another layout: checkpoints hold whole tensors, or, of FSDP2, the
parts that each process held, from which any other number of processes reads what it needs.
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

from flowbp.backbones.options import blocks_of
from flowbp.config import OptimConfig
from flowbp.core.types import Velocity
from imgen_common.errors import UserError
from imgen_common.run_folder.checkpoints import check_tensors
from imgen_common.run_folder.sharded import ShardedTensors

StateDict = Mapping[str, Mapping[str, Tensor]]
"""Tensors by name: `weights`, `ema` (their average), `optimizer` (NAME/step, NAME/exp_avg, NAME/exp_avg_sq)."""
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@runtime_checkable
class TrainState(Protocol):
    """What an optimizer step needs and changes, on one of several processes.  All processes call all methods."""

    gradient_scale: float
    """What a process multiplies its part of the global batch's mean loss with."""

    def gradient_sync(self, passes: int) -> AbstractContextManager[None]:
        """Around the `passes` backward passes of an update; after it `.grad` holds the sum over the processes."""

    def sync_on_last_backward(self, velocity: Velocity) -> Velocity:
        """The velocity, made to count its forwards with gradient: before the last one synchronization is switched on.

        It is what accelerate's `no_sync` is for a loop with one backward pass per micro-batch; a sweep makes many.
        """

    def step(self, learning_rate: float, max_grad_norm: float, ema_decay: float) -> float:
        """AdamW with the gradient clipped to `max_grad_norm`; the average moves by 1 - ema_decay towards the weights.

        Returns the norm before clipping.  Where that is not finite nothing is changed.
        """

    def ema_weights(self) -> AbstractContextManager[None]:
        """Within it the network carries the averaged weights."""

    def gather_ema(self) -> dict[str, Tensor]:
        """The averaged weights as full tensors on the main process; empty tensors on the others."""

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Everything: under FSDP2 sharded tensors (DTensor); otherwise full tensors on the main process and empty ones
        on the others."""

    def load_state_dict(self, state: StateDict, update: int) -> None:
        """Restores what `state_dict` returned after `update` updates: full tensors, the same on every process, or
        `ShardedTensors`.

        Raises UserError, with nothing changed, if it is not a state of these weights (`check_state`).
        """


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], optim: OptimConfig, *, fused: bool = False
) -> torch.optim.AdamW:
    """The optimizer of a configuration.  fused: its step is one kernel, for which its counts are on the device too."""
    return torch.optim.AdamW(
        parameters.values(),
        lr=optim.learning_rate,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=fused,
    )


@contextmanager
def swap_values(weights: Mapping[str, Tensor], ema: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it each weight and its average have exchanged their values."""

    @torch.no_grad()
    def swap() -> None:
        for name, mean in ema.items():
            kept = weights[name].detach().clone()
            weights[name].copy_(mean)
            mean.copy_(kept)

    swap()
    try:
        yield
    finally:
        swap()


class TorchTrainState:
    """`TrainState` of full weights (DDP), or of this process's shards of a network that `shard` made (FSDP2).

    Gradients are summed in one all-reduce per update, or, of shards, once per update or after every backward pass.
    DDP's own wrapper would reduce in every backward pass, of which a sweep makes one per active step.
    """

    gradient_scale = 1.0

    def __init__(
        self, net: nn.Module, optim: OptimConfig, accelerator: Accelerator, *, sync_each_backward: bool
    ) -> None:
        self.net, self.accelerator, self.sync_each_backward = net, accelerator, sync_each_backward
        self.parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
        self.fused = accelerator.device.type == "cuda"
        self.optimizer = make_optimizer(self.parameters, optim, fused=self.fused)
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._left = 0

    @contextmanager
    def gradient_sync(self, passes: int) -> Iterator[None]:
        self._left = passes
        if isinstance(self.net, FSDPModule):
            self.net.set_requires_gradient_sync(self.sync_each_backward)
        yield
        if self._left:
            raise RuntimeError(
                f"{self._left} of {passes} backward passes were not made: gradients are not synchronized"
            )
        if not isinstance(self.net, FSDPModule) and self.accelerator.num_processes > 1:
            self._all_reduce_gradients()

    def sync_on_last_backward(self, velocity: Velocity) -> Velocity:
        def call(x: Tensor, sigma: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                self._left -= 1
                # a sharded network must know before its last forward that gradients are synchronized
                if not self._left and isinstance(self.net, FSDPModule):
                    self.net.set_requires_gradient_sync(True)
            return velocity(x, sigma)

        return call

    def _all_reduce_gradients(self) -> None:
        for p in self.parameters.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "sum")
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def step(self, learning_rate: float, max_grad_norm: float, ema_decay: float) -> float:
        norm = full_tensor(nn.utils.clip_grad_norm_(self.parameters.values(), max_grad_norm))
        if norm.isfinite():
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
            for name, p in self.parameters.items():
                self.ema[name].lerp_(p, 1 - ema_decay)
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def ema_weights(self) -> AbstractContextManager[None]:
        return swap_values(self.parameters, self.ema)

    def gather_ema(self) -> dict[str, Tensor]:
        return {name: self._gather(mean) for name, mean in self.ema.items()}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        found = {"weights": self._weights(), "ema": self.ema, "optimizer": self._moments()}
        if isinstance(self.net, FSDPModule):
            return found
        return {group: {name: self._gather(t) for name, t in tensors.items()} for group, tensors in found.items()}

    def _weights(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.parameters.items()}

    def _moments(self) -> dict[str, Tensor]:
        states = ((name, self.optimizer.state.get(p, {})) for name, p in self.parameters.items())
        return {f"{name}/{key}": value for name, state in states for key, value in state.items()}

    def _gather(self, tensor: Tensor) -> Tensor:
        found = full_tensor(tensor)
        return found.cpu() if self.accelerator.is_main_process else found.new_empty(0)

    @torch.no_grad()
    def load_state_dict(self, state: StateDict, update: int) -> None:
        check_state(state, self.parameters, update)
        for p in self.parameters.values() if update else ():
            step = torch.zeros((), device=p.device if self.fused else None)
            self.optimizer.state[p] = {"step": step} | {key: torch.zeros_like(p) for key in MOMENTS[1:]}
        overwrite(self._weights(), state["weights"])
        overwrite(self.ema, state["ema"])
        overwrite(self._moments(), state["optimizer"])


def overwrite(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copies what was saved into tensors that may be sharded."""
    if isinstance(saved, ShardedTensors):
        saved.read_into(tensors)
        return
    for name, tensor in tensors.items():
        tensor.copy_(shard_like(tensor, saved[name]))


def check_state(state: StateDict, parameters: Mapping[str, Tensor], update: int) -> None:
    """Raises UserError unless it holds weights, averages and, after the first update, moments of these parameters."""
    moments = {f"{name}/{key}": p for name, p in parameters.items() for key in MOMENTS[1:]}
    moments |= {f"{name}/{MOMENTS[0]}": torch.tensor(float(update)) for name in parameters}
    for group, expected in (("weights", parameters), ("ema", parameters), ("optimizer", moments if update else {})):
        found = state[group]
        like = found.like if isinstance(found, ShardedTensors) else found
        check_tensors(f"the checkpoint of update {update}: {group}", like, expected)
    counts = {name: torch.zeros(()) for name in state["optimizer"] if name.endswith(f"/{MOMENTS[0]}")}
    overwrite(counts, state["optimizer"])
    steps = {count.item() for count in counts.values()}
    if steps - {float(update)}:
        raise UserError(f"the checkpoint of update {update}: its optimizer has made {max(steps):g} updates")


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(like: Tensor, tensor: Tensor) -> Tensor:
    """This process's part of a full tensor, sharded and placed as `like` is."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def shard(net: ModelMixin, device: torch.device, param_dtype: torch.dtype | None = None) -> None:
    """Shards a network over all processes, block by block (FSDP2), with the weights that process 0 holds.

    The other processes may hold it on the meta device.  param_dtype: precision in which parameters are gathered to
    compute with; None: their own.  Gradients are summed, in float32.
    """
    held = {name: t.detach() for name, t in (*net.named_parameters(), *net.named_buffers())}
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype, torch.float32 if param_dtype else None, cast_forward_inputs=False)
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
