"""The work behind `benchmarks.quality.miniature`: one training run, evaluated at one or two budgets, is one job.

A cell is (phase, method, learning rate, seed, budget) and one JSON file; a job skips cells that are there.  Where the
learning rate does not depend on the length of the run, the shorter of two budgets is a prefix of the longer one and is
evaluated on the way.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import Flux2KleinPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import mse_loss

from benchmarks.common import clock, stamp, write_json
from flowbp.backbones.flux2 import Flux2
from flowbp.config import TrainConfig
from flowbp.data.prompts import load_prompts
from flowbp.methods import METHODS
from flowbp.training.loading import LoadedModels, load_models
from flowbp.training.progress import NullReporter
from flowbp.training.trainer import Trainer
from imgen_common import hub
from imgen_common.config import Config
from imgen_common.console import quiet_libraries
from imgen_common.errors import UserError
from imgen_common.shapes.render import draw
from imgen_common.shapes.scene import sample_spec
from imgen_common.streams import numpy_generator, torch_generator
from scripts.miniature.world import generator

MODULE = "benchmarks.quality.miniature"
Budget = Literal["updates", "seconds"]
BUDGETS: tuple[Budget, ...] = ("updates", "seconds")
Phase = Literal["search", "final"]
CONTROL = "pretraining"
"""The control: the same seconds of the loss that the generator was made with."""
COMPETITORS = (*METHODS, CONTROL)
Scores = dict[str, dict[str, list[float]]]
"""{guidance scale: {score: one number per prompt}}."""


class Settings(Config):
    """What all cells of a folder have in common."""

    config: TrainConfig
    """Everything that the methods share: model, reward, loss, guidance, N, batch, optimizer, evaluation."""
    updates: int
    """Updates of the equal-updates budget."""
    seconds: float | None = None
    """Seconds of computing of the equal-seconds budget; null: what the median method needs for `updates`."""
    rates: tuple[float, ...]
    """Candidate learning rates, the same for all."""
    rounds: int
    """Timed updates of each competitor in the calibration."""
    search_seed: int
    """Training seed of the search, never reported."""
    pretraining_batch: int = generator.BASE.schedule.batch
    """Pictures per update of the control, as in the generator's own training."""
    pretraining_pictures: int
    """Pictures of the train split that the control draws from."""
    weights: dict[str, str]
    """Digest of every model's weights by reference."""


@dataclass(frozen=True)
class Stop:
    """Where a job is evaluated."""

    budget: Budget
    updates: int


@dataclass(frozen=True)
class Job:
    """One training run.  Search jobs are evaluated on tuning prompts, final ones on test prompts."""

    phase: Phase
    method: str
    rate: float
    seed: int
    stops: tuple[Stop, ...]

    def file(self, folder: Path, budget: Budget) -> Path:
        """Of a cell."""
        return folder / "cells" / f"{self.phase}-{self.method}-lr{self.rate:g}-seed{self.seed}-{budget}.json"

    def missing(self, folder: Path) -> tuple[Stop, ...]:
        """Stops without a cell, the earliest first."""
        found = [stop for stop in self.stops if not self.file(folder, stop.budget).exists()]
        return tuple(sorted(found, key=lambda stop: stop.updates))


class Pretraining(Trainer):
    """The trainer with the generator's own loss: whatever is not the gradient (AdamW, warm-up, clipping, average) is
    the very same code.

        loss = mean |v(x, sigma) - (noise - clean)|^2,   x = (1 - sigma) clean + sigma noise,   sigma = sigmoid(normal)

    Text-to-image only: the generator's edit updates would cost the control time.  The text encoder stays as it is,
    as in alignment.  Arithmetic in bfloat16, as the generator was trained.
    """

    def __init__(
        self, config: TrainConfig, parts: LoadedModels, accelerator: Accelerator, data: "Pictures", batch: int
    ) -> None:
        super().__init__(config, parts, accelerator)
        self._data, self._batch = data, batch

    def compute_gradient(self) -> dict[str, float]:
        """Leaves the gradient of this update's pictures in `.grad`; returns the loss."""
        rng = torch_generator(self.config.seed, "pretraining", self.update)
        rows = torch.randint(len(self._data.captions), (self._batch,), generator=rng)
        dropped = torch.rand(self._batch, generator=rng) < generator.CAPTION_DROPOUT
        captions = ["" if drop else self._data.captions[i] for i, drop in zip(rows, dropped, strict=True)]
        text = self.models.embeddings(captions)[0]["text"]
        clean = self._data.latents[rows]
        sigma = torch.sigmoid(torch.randn(self._batch, generator=rng))
        noise = torch.randn(clean.shape, generator=rng)
        device = self.accelerator.device
        clean, sigma, noise = clean.to(device), sigma.to(device), noise.to(device)
        x = torch.lerp(clean, noise, sigma[:, None, None])
        with torch.autocast(device.type, torch.bfloat16):
            v = generator.velocity(self._data.pipeline, x, sigma, text)
        loss = mse_loss(v.float(), noise - clean)
        loss.backward()
        return {"loss": loss.item()}


@dataclass(frozen=True)
class Pictures:
    """True pictures of the train split as latent tokens (n, L, c), their captions, and the pipeline they are of."""

    pipeline: Flux2KleinPipeline
    latents: Tensor
    captions: list[str]

    @classmethod
    def make(cls, backbone: Flux2, count: int, file: Path) -> "Pictures":
        """`count` random scenes, drawn and encoded, or read from `file` if they have been before."""
        pipeline = backbone.pipe
        if not file.exists():
            latents, captions = encoded_scenes(pipeline, count)
            fresh = file.with_name(f"{file.stem}-{os.getpid()}.new")
            save_file({"latents": latents}, fresh, {"captions": json.dumps(captions)})
            fresh.replace(file)
        with safe_open(file, "pt") as content:
            return cls(pipeline, content.get_tensor("latents"), json.loads(content.metadata()["captions"]))


def encoded_scenes(pipeline: Flux2KleinPipeline, count: int) -> tuple[Tensor, list[str]]:
    """Latent tokens (count, L, c) of random scenes of the train split, and their captions."""
    latents, captions = [], []
    for chunk in range(0, count, 512):
        rng = numpy_generator(0, "pretraining-pictures", chunk)
        specs = [sample_spec(rng, "train") for _ in range(min(512, count - chunk))]
        images = torch.from_numpy(draw(specs, rng)).to(pipeline.vae.device)
        latents.append(generator.encode(pipeline, images).cpu())
        captions += [spec.caption for spec in specs]
    return torch.cat(latents).contiguous(), captions


class Bench:
    """Models, prompts and the base weights, loaded once per process; every run starts from exactly the base."""

    def __init__(self, settings: Settings, device: torch.device, folder: Path) -> None:
        torch.set_num_threads(1)
        quiet_libraries()
        self.settings, self.device, self.folder = settings, device, folder
        self.accelerator = Accelerator(cpu=device.type == "cpu")
        config = settings.config
        self.parts = load_models(config, device)
        self.base = {name: p.detach().clone() for name, p in self.parts.parameters.items()}
        sources = (
            (config.eval.prompts, config.eval.num_prompts),
            (config.eval.quick_prompts, config.eval.quick_num_prompts),
        )
        self.prompts = {
            phase: (source, load_prompts(source, config.data.key, number))
            for phase, (source, number) in zip(("final", "search"), sources, strict=True)
        }

    @cached_property
    def pictures(self) -> Pictures:
        """What the control is trained on; making it is not counted, as the generator's own cache is made beforehand."""
        backbone = self.parts.backbone
        assert isinstance(backbone, Flux2)
        found = Pictures.make(backbone, self.settings.pretraining_pictures, self.folder / "pictures.safetensors")
        self.parts.embeddings.add(list(dict.fromkeys(found.captions)))
        return found

    @torch.no_grad()
    def restore(self) -> None:
        """The base weights, bit for bit, and no gradients."""
        for name, p in self.parts.parameters.items():
            p.copy_(self.base[name])
            p.grad = None

    def trainer(self, method: str, rate: float, seed: int, num_updates: int) -> Trainer:
        """A fresh run from the base weights."""
        self.restore()
        config = self.settings.config
        changed: dict[str, Any] = {"seed": seed, "max_train_steps": num_updates}
        changed["optim"] = config.optim.model_copy(update={"learning_rate": rate})
        if method == CONTROL:
            batch = self.settings.pretraining_batch
            return Pretraining(config.model_copy(update=changed), self.parts, self.accelerator, self.pictures, batch)
        return Trainer(config.model_copy(update=changed | {"method": METHODS[method]}), self.parts, self.accelerator)

    def scores(self, trainer: Trainer, phase: Phase) -> Scores:
        """The averaged weights on the prompts of a phase: search at the training's guidance, final at all scales."""
        config = self.settings.config
        scales = [config.guidance_scale] if phase == "search" else scales_of(config)
        source, prompts = self.prompts[phase]
        with trainer.state.ema_weights():
            found = {s: trainer.evaluate(prompts, source, s, NullReporter(), "").scores for s in scales}
        return {f"{s:g}": {n: [round(v, 4) for v in values] for n, values in one.items()} for s, one in found.items()}


def scales_of(config: TrainConfig) -> list[float]:
    """Guidance scales of the final evaluation, the training's own first."""
    return list(dict.fromkeys((config.guidance_scale, *config.eval.guidance_scale)))


def evaluate_base(bench: Bench, file: Path) -> None:
    """Scores of the untouched base."""
    start = clock(bench.device)
    trainer = bench.trainer("full", bench.settings.rates[0], 0, 1)
    scores = {phase: bench.scores(trainer, phase) for phase in ("final", "search")}
    write_json(file, {"scores": scores, "seconds": clock(bench.device) - start, "environment": where(bench)})


def calibrate(bench: Bench, file: Path) -> None:
    """Mean seconds of computing per update of every competitor, in turns, at the smallest rate; then the budgets."""
    settings = bench.settings
    begin = clock(bench.device)
    count = settings.rounds + 1
    trainers = {name: bench.trainer(name, min(settings.rates), settings.search_seed, count) for name in COMPETITORS}
    spent: dict[str, list[float]] = {name: [] for name in COMPETITORS}
    for number in range(count):
        for name, trainer in trainers.items():
            start = clock(bench.device)
            trainer.step()
            if number:  # the first one warms up
                spent[name].append(clock(bench.device) - start)
    bench.restore()
    per_update = {name: float(np.mean(values)) for name, values in spent.items()}
    median = float(np.median([per_update[name] for name in METHODS]))
    content = {"per_update": per_update, "budget_seconds": settings.seconds or settings.updates * median}
    write_json(file, content | {"seconds": clock(bench.device) - begin, "environment": where(bench)})


def stops(settings: Settings, calibration: Mapping[str, Any], method: str) -> tuple[Stop, ...]:
    """How many updates each budget allows; the control, whose updates are of another kind, has seconds only."""
    affordable = max(1, round(calibration["budget_seconds"] / calibration["per_update"][method]))
    seconds = Stop("seconds", affordable)
    return (seconds,) if method == CONTROL else (Stop("updates", settings.updates), seconds)


def split(settings: Settings, job: Job) -> list[Job]:
    """One job, or one per stop where the schedule of the rate depends on the length of the run."""
    if settings.config.optim.lr_scheduler == "constant":
        return [job]
    return [Job(job.phase, job.method, job.rate, job.seed, (stop,)) for stop in job.stops]


def run_job(bench: Bench, folder: Path, job: Job) -> None:
    """Trains to every missing stop and writes its cell; a run that diverges is evaluated where it stopped."""
    waiting = job.missing(folder)
    if not waiting:
        return
    trainer = bench.trainer(job.method, job.rate, job.seed, max(stop.updates for stop in waiting))
    training, norms, failure = 0.0, [], None
    before, scored, scores = clock(bench.device), -1, {}
    for stop in waiting:
        start = clock(bench.device)
        while trainer.update < stop.updates and failure is None:
            try:
                norms.append(trainer.step()["grad_norm"])
            except FloatingPointError as error:
                failure = str(error)
        training += clock(bench.device) - start
        if trainer.update != scored:
            scored, scores = trainer.update, bench.scores(trainer, job.phase)
        content = {
            **{"phase": job.phase, "method": job.method, "rate": job.rate, "seed": job.seed, "budget": stop.budget},
            **{"updates": trainer.update, "planned": stop.updates, "failure": failure, "training_seconds": training},
            **{"grad_norm": float(np.median(norms)) if norms else None, "scores": scores},
        }
        now = clock(bench.device)
        write_json(job.file(folder, stop.budget), content | {"seconds": now - before, "environment": where(bench)})
        before = now


def where(bench: Bench) -> dict[str, Any]:
    """On what a cell was computed, and when it was ready."""
    return stamp(MODULE, (), bench.device) | {"ready": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def digests(refs: Iterable[str]) -> dict[str, str]:
    """Digest of all safetensors files of every model, so that cells of other weights are not mixed in."""
    found = {}
    for ref in refs:
        digest = hashlib.blake2b(digest_size=8)
        for file in sorted(hub.resolve(ref).rglob("*.safetensors")):
            digest.update(file.read_bytes())
        found[ref] = digest.hexdigest()
    return found


def keep_settings(folder: Path, settings: Settings) -> None:
    """Writes the settings of a fresh folder.  Raises UserError if the folder's cells were made with others."""
    file = folder / "settings.json"
    if not file.exists():
        write_json(file, settings.model_dump(mode="json"))
        return
    old, new = read(file), settings.model_dump(mode="json")
    if wrong := [key for key in new if old.get(key) != new[key]]:
        raise UserError(
            f"{folder}: its cells were made with other {', '.join(wrong)} (see settings.json there); give the same, "
            "choose another --folder, or remove it"
        )


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """All cells, in the order of their names."""
    return [read(file) for file in sorted((folder / "cells").glob("*.json"))]


def read(file: Path) -> dict[str, Any]:
    """A JSON object."""
    return json.loads(file.read_text(encoding="utf-8"))


def chosen_rates(
    cells: Sequence[Mapping[str, Any]], scale: float, rates: Sequence[float]
) -> dict[tuple[str, Budget], float]:
    """{(method, budget): rate} with the highest verifier accuracy on the tuning prompts, the lower one of equals.

    Only where all candidates have been tried.
    """
    tried: dict[tuple[str, Budget], dict[float, float]] = {}
    for cell in cells:
        if cell["phase"] == "search":
            accuracy = float(np.mean(cell["scores"][f"{scale:g}"]["verifier"]))
            tried.setdefault((cell["method"], cell["budget"]), {})[cell["rate"]] = accuracy
    return {
        key: max(sorted(found), key=lambda rate: found[rate])
        for key, found in tried.items()
        if set(found) >= set(rates)
    }
