"""Weights under DeepSpeed's ZeRO: stage 2 cuts up gradients and optimizer, stage 3 the weights too."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state
from torch import Tensor

from flowbp.config import OptimConfig
from flowbp.types import Backbone, Velocity
from flowbp.weights import MOMENTS, State, adamw, swapped


class ZeroWeights:
    """`Weights` of a backbone whose network becomes a DeepSpeed engine.  Every process reads the whole network first.

    Gradients are averaged by DeepSpeed, hence `gradient_scale`.
    """

    def __init__(
        self, backbone: Backbone, optim: OptimConfig, accelerator: Accelerator, stage: int, *, each_pass: bool
    ) -> None:
        self.accelerator, self.stage, self.each_pass = accelerator, stage, each_pass
        self.gradient_scale = float(accelerator.num_processes)
        self.parameters: dict[str, Any] = {name: p for name, p in backbone.net.named_parameters() if p.requires_grad}
        settings = settings_of(stage, optim.max_grad_norm, backbone.bfloat16)
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend())
        self.engine, *_ = deepspeed.initialize(
            model=backbone.net, optimizer=adamw(self.parameters, optim), config=settings
        )
        backbone.net = self.engine
        self.average = {name: part.clone() for name, part in self._parts().items()}
        self._left = 0

    def _parts(self) -> dict[str, Tensor]:
        """What this process holds of each weight: all of it, or in stage 3 a flat piece."""
        return {name: p.ds_tensor.data if self.stage == 3 else p.data for name, p in self.parameters.items()}

    @contextmanager
    def synchronised(self, passes: int) -> Iterator[None]:
        """As `Weights` says."""
        self._left = passes
        if self.each_pass:
            self.engine.set_gradient_accumulation_boundary(passes == 1)
            yield
        else:
            with self.engine.coalesce_grad_reduction():
                yield

    def counted(self, velocity: Velocity) -> Velocity:
        """As `Weights` says."""

        def call(x: Tensor, sigma: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                self._left -= 1
                if self.each_pass and not self._left:
                    self.engine.set_gradient_accumulation_boundary(True)
            return velocity(x, sigma)

        return call

    @torch.no_grad()
    def step(self, rate: float, limit: float, decay: float) -> float:
        """As `Weights` says; `limit` was given to DeepSpeed at the beginning."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self.engine.step()
        if self.engine.was_step_applied():
            for name, part in self._parts().items():
                self.average[name].lerp_(part, 1 - decay)
        return float(self.engine.get_global_grad_norm())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """As `Weights` says."""
        with swapped(self._parts(), self.average):
            self._forget()
            yield
        self._forget()

    def _forget(self) -> None:
        """Gathered copies of what has changed."""
        if self.stage == 3:
            self.engine.empty_partition_cache()

    def whole_average(self) -> dict[str, Tensor]:
        """As `Weights` says."""
        with self.averaged():
            return self._whole()

    def _whole(self) -> dict[str, Tensor]:
        found = {}
        for name, p in self.parameters.items():
            with deepspeed.zero.GatheredParameters([p], enabled=self.stage == 3):
                found[name] = self._kept(p.data)
        return found

    def _kept(self, tensor: Tensor) -> Tensor:
        return tensor.to("cpu", copy=True) if self.accelerator.is_main_process else tensor.new_empty(0)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """As `Weights` says."""
        moments = {}
        inner = self.engine.optimizer.optimizer.state
        for name, p in self.parameters.items() if inner else ():
            moments[f"{name}/step"] = next(iter(inner.values()))["step"].clone()
            for key in MOMENTS[1:]:
                moments[f"{name}/{key}"] = self._kept(safe_get_full_optimizer_state(p, key))
        return {"weights": self._whole(), "average": self.whole_average(), "optimizer": moments}

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """As `Weights` says."""
        self._place(state["average"])
        self.average = {name: part.clone() for name, part in self._parts().items()}
        self._place(state["weights"])
        if state["optimizer"]:
            self._begin(next(value for name, value in state["optimizer"].items() if name.endswith("/step")))
            for name, p in self.parameters.items():
                for key in MOMENTS[1:]:
                    safe_set_full_optimizer_state(p, state["optimizer"][f"{name}/{key}"].to(p.device), key)

    def _place(self, tensors: Mapping[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0, enabled=self.stage == 3):
                p.data.copy_(tensors[name])
            safe_set_full_fp32_param(p, tensors[name].to(p.device))
        self._forget()

    def _begin(self, step: Tensor) -> None:
        """Empty moments: DeepSpeed makes them in its first step, and can be given them only when they are there."""
        outer = self.engine.optimizer
        flats = outer.single_partition_of_fp32_groups if self.stage == 2 else outer.fp32_partitioned_groups_flat
        for flat in flats:
            zeros = {key: torch.zeros_like(flat) for key in MOMENTS[1:]}
            outer.optimizer.state[flat] = {"step": step.clone(), **zeros}
        if self.stage == 2:
            for group, flat in zip(outer.bit16_groups, flats, strict=True):
                lazy_init_hp_params_optimizer_state(group, flat, outer.optimizer.state)


def settings_of(stage: int, limit: float, bfloat16: bool) -> dict[str, Any]:
    """DeepSpeed's configuration.  Sizes of batches are not its concern: the sweep makes its own backward passes."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": limit,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "torch_autocast": {"enabled": bfloat16, "dtype": "bfloat16"},
    }
