"""Jobs and cells of `benchmarks.quality.miniature`.

A job is one training run, evaluated at one or two budgets.  A cell is (phase, method, learning rate, seed, budget) and
one JSON file; a job skips the cells that are there.  Where the learning rate does not depend on the length of the run,
the shorter of two budgets is a prefix of the longer one and is evaluated on the way.
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

from benchmarks.common import clock, describe_run, read_json, time_call, write_json
from benchmarks.quality.trainer_factory import Scores, TrainerFactory, evaluate_average
from flowbp.backbones.families.flux2 import Flux2
from flowbp.config import TrainConfig
from flowbp.data.prompts import load_prompts
from flowbp.methods import METHODS
from flowbp.training.loading import LoadedModels
from flowbp.training.trainer import Trainer
from imgen_common import hub
from imgen_common.config import Config
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
"""The control: the same seconds of training with the loss that the generator was pretrained with."""
COMPETITORS = (*METHODS, CONTROL)
ScoresByScale = dict[str, Scores]
"""Scores by guidance scale."""


class Settings(Config):
    """Settings that all cells of a folder have in common."""

    config: TrainConfig
    """Model, reward, loss, guidance, N, batch, optimizer and evaluation, which the methods share."""
    updates: int
    """Updates of the equal-updates budget."""
    seconds: float | None = None
    """Seconds of computing of the equal-seconds budget; null: those that the median method needs for `updates`."""
    rates: tuple[float, ...]
    """Candidate learning rates, the same for all."""
    rounds: int
    """Timed updates of each competitor in the calibration."""
    search_seed: int
    """Training seed of the search, which is never reported."""
    pretraining_batch: int = generator.BASE.schedule.batch
    """Images per update of the control, as in the generator's own training."""
    pretraining_images: int
    """Number of images of the train split on which the control trains."""
    weights: dict[str, str]
    """Digest of the weights of every model by its reference."""


@dataclass(frozen=True)
class Stop:
    """A number of updates after which a job is evaluated, and the budget that it belongs to."""

    budget: Budget
    updates: int


@dataclass(frozen=True)
class TrainingJob:
    """One training run.  Search jobs are evaluated on tuning prompts, final ones on test prompts."""

    phase: Phase
    method: str
    rate: float
    seed: int
    stops: tuple[Stop, ...]

    def cell_file(self, folder: Path, budget: Budget) -> Path:
        """The file of the job's cell at a budget."""
        return folder / "cells" / f"{self.phase}-{self.method}-lr{self.rate:g}-seed{self.seed}-{budget}.json"

    def missing_stops(self, folder: Path) -> tuple[Stop, ...]:
        """Stops without a cell, the earliest first."""
        missing = [stop for stop in self.stops if not self.cell_file(folder, stop.budget).exists()]
        return tuple(sorted(missing, key=lambda stop: stop.updates))


class PretrainingTrainer(Trainer):
    """The trainer with the generator's own loss instead of a reward.

    Everything but the gradient (AdamW, warm-up, clipping, weight average) is the code of the trainer.

        loss = mean |v(x, sigma) - (noise - clean)|^2,   x = (1 - sigma) clean + sigma noise,   sigma = sigmoid(normal)

    It trains text-to-image only: the edit updates of the generator's training would cost the control time.  The text
    encoder is frozen, as in alignment.  It computes in bfloat16, as the generator's training did.
    """

    def __init__(
        self, config: TrainConfig, parts: LoadedModels, accelerator: Accelerator, data: "EncodedImages", batch: int
    ) -> None:
        super().__init__(config, parts, accelerator)
        self._data, self._batch = data, batch

    def compute_gradient(self) -> dict[str, float]:
        """Leaves the gradient of this update's images in `.grad`; returns the loss."""
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
class EncodedImages:
    """Latent tokens (n, L, c) of rendered images of the train split, their captions, and the pipeline of the tokens."""

    pipeline: Flux2KleinPipeline
    latents: Tensor
    captions: list[str]

    @classmethod
    def load_or_make(cls, backbone: Flux2, count: int, file: Path) -> "EncodedImages":
        """Renders and encodes `count` random scenes, or reads them from `file` where it exists."""
        pipeline = backbone.pipe
        if not file.exists():
            latents, captions = encode_scenes(pipeline, count)
            fresh = file.with_name(f"{file.stem}-{os.getpid()}.new")
            save_file({"latents": latents}, fresh, {"captions": json.dumps(captions)})
            fresh.replace(file)
        with safe_open(file, "pt") as content:
            return cls(pipeline, content.get_tensor("latents"), json.loads(content.metadata()["captions"]))


def encode_scenes(pipeline: Flux2KleinPipeline, count: int) -> tuple[Tensor, list[str]]:
    """Latent tokens (count, L, c) of random scenes of the train split, and their captions."""
    latents, captions = [], []
    for chunk in range(0, count, 512):
        rng = numpy_generator(0, "pretraining-pictures", chunk)
        specs = [sample_spec(rng, "train") for _ in range(min(512, count - chunk))]
        images = torch.from_numpy(draw(specs, rng)).to(pipeline.vae.device)
        latents.append(generator.encode(pipeline, images).cpu())
        captions += [spec.caption for spec in specs]
    return torch.cat(latents).contiguous(), captions


class Bench(TrainerFactory):
    """Models, prompts and base weights, loaded once per process; every run starts from exactly the base."""

    def __init__(self, settings: Settings, device: torch.device, folder: Path) -> None:
        config = settings.config
        super().__init__(config, device)
        self.settings, self.folder = settings, folder
        sources = (
            (config.eval.prompts, config.eval.num_prompts),
            (config.eval.quick_prompts, config.eval.quick_num_prompts),
        )
        self.prompts = {
            phase: (source, load_prompts(source, config.data, number))
            for phase, (source, number) in zip(("final", "search"), sources, strict=True)
        }

    @cached_property
    def pretraining_data(self) -> EncodedImages:
        """Training data of the control.  Its seconds are not counted: the generator's own cache is made beforehand."""
        backbone, file = self.models.backbone, self.folder / "pretraining-images.safetensors"
        assert isinstance(backbone, Flux2)
        data = EncodedImages.load_or_make(backbone, self.settings.pretraining_images, file)
        self.models.embeddings.add(list(dict.fromkeys(data.captions)))
        return data

    def make_trainer(self, method: str, rate: float, seed: int, num_updates: int) -> Trainer:
        """A fresh run from the base weights."""
        config = self.settings.config
        changed: dict[str, Any] = {"seed": seed, "max_train_steps": num_updates}
        changed["optim"] = config.optim.model_copy(update={"learning_rate": rate})
        if method == CONTROL:
            self.restore_base()
            batch = self.settings.pretraining_batch
            return PretrainingTrainer(
                config.model_copy(update=changed), self.models, self.accelerator, self.pretraining_data, batch
            )
        return self.make(config.model_copy(update=changed | {"method": METHODS[method]}))

    def evaluate(self, trainer: Trainer, phase: Phase) -> ScoresByScale:
        """Scores of the averaged weights on the prompts of a phase.

        The search evaluates at the guidance of the training, the final phase at all scales.
        """
        config = self.settings.config
        scales = [config.guidance_scale] if phase == "search" else guidance_scales(config)
        source, prompts = self.prompts[phase]
        return {f"{scale:g}": evaluate_average(trainer, prompts, source, scale) for scale in scales}


def guidance_scales(config: TrainConfig) -> list[float]:
    """Guidance scales of the final evaluation, the one of the training first."""
    return list(dict.fromkeys((config.guidance_scale, *config.eval.guidance_scale)))


def evaluate_base(bench: Bench, file: Path) -> None:
    """Writes the scores of the untrained base."""
    start = clock(bench.device)
    trainer = bench.make_trainer("full", bench.settings.rates[0], 0, 1)
    scores = {phase: bench.evaluate(trainer, phase) for phase in ("final", "search")}
    write_json(file, {"scores": scores, "seconds": clock(bench.device) - start, "environment": describe_cell(bench)})


def calibrate(bench: Bench, file: Path) -> None:
    """Writes the mean seconds of computing per update of every competitor, and the equal-seconds budget.

    The competitors take turns, at the smallest rate.
    """
    settings = bench.settings
    begin = clock(bench.device)
    count = settings.rounds + 1
    trainers = {
        name: bench.make_trainer(name, min(settings.rates), settings.search_seed, count) for name in COMPETITORS
    }
    seconds: dict[str, list[float]] = {name: [] for name in COMPETITORS}
    for number in range(count):
        for name, trainer in trainers.items():
            spent = time_call(trainer.step, bench.device)
            if number:  # the first update warms up
                seconds[name].append(spent)
    bench.restore_base()
    per_update = {name: float(np.mean(values)) for name, values in seconds.items()}
    median = float(np.median([per_update[name] for name in METHODS]))
    content = {"per_update": per_update, "budget_seconds": settings.seconds or settings.updates * median}
    write_json(file, content | {"seconds": clock(bench.device) - begin, "environment": describe_cell(bench)})


def make_stops(settings: Settings, calibration: Mapping[str, Any], method: str) -> tuple[Stop, ...]:
    """The updates that each budget allows.  The control has seconds only, since its updates are of another kind."""
    affordable = max(1, round(calibration["budget_seconds"] / calibration["per_update"][method]))
    seconds = Stop("seconds", affordable)
    return (seconds,) if method == CONTROL else (Stop("updates", settings.updates), seconds)


def split_job(settings: Settings, job: TrainingJob) -> list[TrainingJob]:
    """The job, or a job per stop where the learning rate depends on the length of the run."""
    if settings.config.optim.lr_scheduler == "constant":
        return [job]
    return [TrainingJob(job.phase, job.method, job.rate, job.seed, (stop,)) for stop in job.stops]


def run_job(bench: Bench, folder: Path, job: TrainingJob) -> None:
    """Trains to every missing stop and writes its cell.  A run that diverges is evaluated where it stopped."""
    waiting = job.missing_stops(folder)
    if not waiting:
        return
    trainer = bench.make_trainer(job.method, job.rate, job.seed, max(stop.updates for stop in waiting))
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
            scored, scores = trainer.update, bench.evaluate(trainer, job.phase)
        content = {
            **{"phase": job.phase, "method": job.method, "rate": job.rate, "seed": job.seed, "budget": stop.budget},
            **{"updates": trainer.update, "planned": stop.updates, "failure": failure, "training_seconds": training},
            **{"grad_norm": float(np.median(norms)) if norms else None, "scores": scores},
        }
        now = clock(bench.device)
        write_json(
            job.cell_file(folder, stop.budget), content | {"seconds": now - before, "environment": describe_cell(bench)}
        )
        before = now


def describe_cell(bench: Bench) -> dict[str, Any]:
    """Hardware and versions of a cell, and the time when it was ready."""
    return describe_run(MODULE, (), bench.device) | {"ready": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def weight_digests(refs: Iterable[str]) -> dict[str, str]:
    """A digest of all safetensors files of every model, so that cells of other weights are not mixed in."""
    found = {}
    for ref in refs:
        digest = hashlib.blake2b(digest_size=8)
        for file in sorted(hub.resolve(ref).rglob("*.safetensors")):
            digest.update(file.read_bytes())
        found[ref] = digest.hexdigest()
    return found


def check_settings(folder: Path, settings: Settings) -> None:
    """Writes the settings of a new folder.  Raises UserError if the cells of the folder have other settings."""
    file = folder / "settings.json"
    if not file.exists():
        write_json(file, settings.model_dump(mode="json"))
        return
    old, new = read_json(file), settings.model_dump(mode="json")
    if wrong := [key for key in new if old.get(key) != new[key]]:
        raise UserError(
            f"{folder}: its cells were made with other {', '.join(wrong)} (see settings.json there); give the same, "
            "choose another --folder, or remove it"
        )


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """All cells, in the order of their names."""
    return [read_json(file) for file in sorted((folder / "cells").glob("*.json"))]


def choose_rates(
    cells: Sequence[Mapping[str, Any]], scale: float, rates: Sequence[float]
) -> dict[tuple[str, Budget], float]:
    """{(method, budget): the rate with the highest verifier accuracy on the tuning prompts, the lower one of equals}.

    A method and budget without a search cell of every candidate is left out.
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
