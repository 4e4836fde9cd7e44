"""The training state under DeepSpeed's ZeRO: stage 2 shards gradients and optimizer, stage 3 the weights too.

accelerate's `DeepSpeedPlugin` cannot do this.  Its `Accelerator.backward` takes one scalar loss and makes the optimizer
step itself; a sweep makes many backward passes per update, each from a cotangent (`torch.autograd.backward(v, c G)`),
and the step comes only after the loss was found finite.  `Accelerator.save_state` writes shards that need as many
processes again, and accelerate ignores the plugin on CPUs, where this is tested.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_fp32_param, safe_set_full_optimizer_state
from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state
from torch import Tensor

from flowbp.config import OptimConfig
from flowbp.core.types import Backbone, Velocity
from flowbp.training.state import MOMENTS, StateDict, check_state, make_optimizer, swap_values


class ZeroTrainState:
    """`TrainState` of a backbone whose network becomes a DeepSpeed engine.  Every process reads the full network first.

    Gradients are averaged by DeepSpeed, hence `gradient_scale`.
    """

    def __init__(
        self, backbone: Backbone, optim: OptimConfig, accelerator: Accelerator, stage: int, *, sync_each_backward: bool
    ) -> None:
        self.accelerator, self.stage, self.sync_each_backward = accelerator, stage, sync_each_backward
        self.gradient_scale = float(accelerator.num_processes)
        self.parameters: dict[str, Any] = {name: p for name, p in backbone.net.named_parameters() if p.requires_grad}
        settings = deepspeed_config(stage, optim.max_grad_norm, backbone.bfloat16)
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend())
        self.engine, *_ = deepspeed.initialize(
            model=backbone.net, optimizer=make_optimizer(self.parameters, optim), config=settings
        )
        backbone.net = self.engine
        self.ema = {name: part.clone() for name, part in self._shards().items()}
        self._left = 0

    def _shards(self) -> dict[str, Tensor]:
        """What this process holds of each weight: all of it, or in stage 3 a flat shard."""
        return {name: p.ds_tensor.data if self.stage == 3 else p.data for name, p in self.parameters.items()}

    @contextmanager
    def gradient_sync(self, passes: int) -> Iterator[None]:
        self._left = passes
        if self.sync_each_backward:
            self.engine.set_gradient_accumulation_boundary(passes == 1)
            yield
        else:
            with self.engine.coalesce_grad_reduction():
                yield

    def sync_on_last_backward(self, velocity: Velocity) -> Velocity:

        def call(x: Tensor, sigma: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                self._left -= 1
                if self.sync_each_backward and not self._left:
                    self.engine.set_gradient_accumulation_boundary(True)
            return velocity(x, sigma)

        return call

    @torch.no_grad()
    def step(self, learning_rate: float, max_grad_norm: float, ema_decay: float) -> float:
        # DeepSpeed was given `max_grad_norm` when it was made
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        if self.engine.was_step_applied():
            for name, part in self._shards().items():
                self.ema[name].lerp_(part, 1 - ema_decay)
        return float(self.engine.get_global_grad_norm())

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        with swap_values(self._shards(), self.ema):
            self._drop_gathered()
            yield
        self._drop_gathered()

    def _drop_gathered(self) -> None:
        """Drops gathered copies of weights that have changed."""
        if self.stage == 3:
            self.engine.empty_partition_cache()

    def gather_ema(self) -> dict[str, Tensor]:
        with self.ema_weights():
            return self._gather_weights()

    def _gather_weights(self) -> dict[str, Tensor]:
        found = {}
        for name, p in self.parameters.items():
            with deepspeed.zero.GatheredParameters([p], enabled=self.stage == 3):
                found[name] = self._on_main(p.data)
        return found

    def _on_main(self, tensor: Tensor) -> Tensor:
        return tensor.to("cpu", copy=True) if self.accelerator.is_main_process else tensor.new_empty(0)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        moments = {}
        inner = self.engine.optimizer.optimizer.state
        for name, p in self.parameters.items() if inner else ():
            moments[f"{name}/step"] = next(iter(inner.values()))["step"].clone()
            for key in MOMENTS[1:]:
                moments[f"{name}/{key}"] = self._on_main(safe_get_full_optimizer_state(p, key))
        return {"weights": self._gather_weights(), "ema": self.gather_ema(), "optimizer": moments}

    @torch.no_grad()
    def load_state_dict(self, state: StateDict, update: int) -> None:
        shapes = {name: p.ds_shape if self.stage == 3 else p.shape for name, p in self.parameters.items()}
        like = {n: torch.empty(shapes[n], dtype=p.dtype, device="meta") for n, p in self.parameters.items()}
        check_state(state, like, update)
        self._set_weights(state["ema"])
        self.ema = {name: part.clone() for name, part in self._shards().items()}
        self._set_weights(state["weights"])
        if state["optimizer"]:
            self._make_moments(next(value for name, value in state["optimizer"].items() if name.endswith("/step")))
            for name, p in self.parameters.items():
                for key in MOMENTS[1:]:
                    safe_set_full_optimizer_state(p, state["optimizer"][f"{name}/{key}"].to(p.device), key)

    def _set_weights(self, tensors: Mapping[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0, enabled=self.stage == 3):
                p.data.copy_(tensors[name])
            safe_set_full_fp32_param(p, tensors[name].to(p.device))
        self._drop_gathered()

    def _make_moments(self, step: Tensor) -> None:
        """Empty moments: DeepSpeed makes them in its first step, and can be given them only when they are there."""
        outer = self.engine.optimizer
        flats = outer.single_partition_of_fp32_groups if self.stage == 2 else outer.fp32_partitioned_groups_flat
        for flat in flats:
            zeros = {key: torch.zeros_like(flat) for key in MOMENTS[1:]}
            outer.optimizer.state[flat] = {"step": step.clone(), **zeros}
        if self.stage == 2:
            for group, flat in zip(outer.bit16_groups, flats, strict=True):
                lazy_init_hp_params_optimizer_state(group, flat, outer.optimizer.state)


def deepspeed_config(stage: int, max_grad_norm: float, bfloat16: bool) -> dict[str, Any]:
    """DeepSpeed's configuration.  Sizes of batches are not its concern: the sweep makes its own backward passes."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "torch_autocast": {"enabled": bfloat16, "dtype": "bfloat16"},
    }
