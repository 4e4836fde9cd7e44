"""A resumable training session: modules, their average, AdamW, a decaying learning rate, a log, a state folder."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from imgen_common.config import Config


class Schedule(Config):
    """How long and how fast to train."""

    steps: int
    """Number of updates."""
    batch: int
    """Images per update."""
    lr: float
    """Peak learning rate of AdamW, reached after `warmup` updates."""
    warmup: int = 100
    """Updates of linear warm-up."""
    constant: float = 0.4
    """Share of the updates at the peak rate before the cosine decay to zero."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's decay rates."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    ema: float = 0.998
    """Decay of the weight average, warmed up as (1 + step) / (10 + step)."""
    save_every: int = 250
    """Updates between states."""

    def rate(self, step: int) -> float:
        """Learning rate of an update (0-based)."""
        progress = max(0.0, step / self.steps - self.constant) / (1 - self.constant)
        return self.lr * min(1.0, (step + 1) / self.warmup) * (0.5 + 0.5 * math.cos(math.pi * progress))


class Session:
    """Runs `loss(step)` for `schedule.steps` updates; after a kill it resumes from `folder/state`."""

    def __init__(self, folder: Path, modules: Mapping[str, nn.Module], schedule: Schedule) -> None:
        self.folder, self.modules, self.schedule = folder, dict(modules), schedule
        self.names, self.parameters = zip(
            *(
                (f"{m}.{n}", p)
                for m, module in modules.items()
                for n, p in module.named_parameters()
                if p.requires_grad
            ),
            strict=True,
        )
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=schedule.lr, betas=schedule.betas, weight_decay=schedule.weight_decay
        )
        self.step, self.seconds = 0, 0.0
        folder.mkdir(parents=True, exist_ok=True)
        self._load()

    def run(
        self, loss: Callable[[int], tuple[Tensor, dict[str, float]]], evaluate: Callable[[], dict[str, float]]
    ) -> None:
        """Trains to the end; `evaluate` is called at every state, with the averaged weights in place."""
        last = time.perf_counter()
        while self.step < self.schedule.steps:
            for group in self.optimizer.param_groups:
                group["lr"] = self.schedule.rate(self.step)
            value, extra = loss(self.step)
            if not torch.isfinite(value):
                raise FloatingPointError(f"the loss of step {self.step} is {value.item()}; nothing was updated")
            self.optimizer.zero_grad(set_to_none=True)
            value.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            decay = min(self.schedule.ema, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
            self.step += 1
            now = time.perf_counter()
            self.seconds, last = self.seconds + now - last, now
            if self.step % 50 == 0:
                self.log({"loss": value.item(), "norm": norm.item()} | extra)
            if self.step % self.schedule.save_every == 0 or self.step == self.schedule.steps:
                self._save()
                self.swap_average()
                self.log(evaluate())
                self.swap_average()
                last = time.perf_counter()

    def swap_average(self) -> None:
        """Exchanges the weights and their average, in place."""
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.average, strict=True):
                kept = parameter.clone()
                parameter.copy_(average)
                average.copy_(kept)

    def log(self, values: Mapping[str, float]) -> None:
        """Appends one line to `log.jsonl` and prints it."""
        line = {"step": self.step, "seconds": round(self.seconds, 1)} | {k: round(v, 5) for k, v in values.items()}
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def _save(self) -> None:
        tensors = {f"average.{n}": a for n, a in zip(self.names, self.average, strict=True)}
        for module_name, module in self.modules.items():
            tensors |= {f"weights.{module_name}.{n}": t.contiguous() for n, t in module.state_dict().items()}
        for i, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{k}": v for k, v in entry.items()}
        new, old = self.folder / "state.new", self.folder / "state"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        save_file({k: t.contiguous() for k, t in tensors.items()}, new / "state.safetensors")
        (new / "state.json").write_text(json.dumps({"step": self.step, "seconds": self.seconds}))
        replaced = self.folder / "state.old"
        shutil.rmtree(replaced, ignore_errors=True)
        if old.exists():
            os.rename(old, replaced)
        os.rename(new, old)
        shutil.rmtree(replaced, ignore_errors=True)

    def _load(self) -> None:
        state_folder = next((p for p in (self.folder / "state", self.folder / "state.old") if p.exists()), None)
        if state_folder is None:
            return
        tensors = load_file(state_folder / "state.safetensors")
        meta = json.loads((state_folder / "state.json").read_text())
        self.step, self.seconds = meta["step"], meta["seconds"]
        self.average = [tensors[f"average.{n}"].to(p.device) for n, p in zip(self.names, self.parameters, strict=True)]
        for name, module in self.modules.items():
            prefix = f"weights.{name}."
            module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        state = self.optimizer.state_dict()
        state["state"] = {
            i: {k.split(".", 2)[2]: v for k, v in tensors.items() if k.startswith(f"adam.{i}.")}
            for i in range(len(self.parameters))
            if f"adam.{i}.step" in tensors
        }
        self.optimizer.load_state_dict(state)
