"""The trainings of a study.  Each training is one JSON file in the work folder, so that a stopped study goes on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from benchmarks.common import clock, describe_run, read_json, time_call, write_json
from benchmarks.quality.trainer_factory import Scores, TrainerFactory, evaluate_average
from benchmarks.studies.studies import SETTINGS, STUDIES, Study
from flowbp.config import TrainConfig
from flowbp.data.prompts import load_prompts
from flowbp.methods import Method
from flowbp.training.trainer import Trainer
from imgen_common.config import Config, load
from imgen_common.errors import UserError

MODULE = "benchmarks.studies"
TIMED_UPDATES = 6
"""Updates of each variant, taken in turns, that say how many updates the seconds allow."""


class StudySize(Config):
    """Sizes of a study, which all its trainings share."""

    seconds: float = Field(default=60.0, gt=0)
    """Seconds of computing of each training, without evaluations."""
    num_prompts: int = Field(default=504, ge=2)
    """Test prompts of each evaluation."""
    sets: tuple[str, ...] = ()
    """`KEY=VALUE` of the recipe."""

    def recipe(self, study: Study) -> TrainConfig:
        """The configuration that the variants share; a study of rewards watches the one that is held out too."""
        return load(TrainConfig, [], [*SETTINGS, *study.settings, f"eval.num_prompts={self.num_prompts}", *self.sets])


@dataclass(frozen=True)
class Point:
    """One evaluation of a training, after a number of updates and of seconds of computing."""

    updates: int
    seconds: float
    scores: Scores


@dataclass(frozen=True)
class StudyResult:
    """The base's scores, and the points of every training: {variant: one list of points for each seed}."""

    base: Scores
    runs: dict[str, list[list[Point]]] = field(default_factory=dict)
    seconds_per_update: dict[str, float] = field(default_factory=dict)


def run_study(name: str, size: StudySize, seeds: Sequence[int], folder: Path, device: torch.device) -> StudyResult:
    """Runs the trainings that the work folder lacks; returns all.

    Raises UserError if the work folder has trainings of other sizes.
    """
    study, place = STUDIES[name], folder / name
    _check_size(place / "size.json", size)
    waiting = [
        (variant, seed) for seed in seeds for variant in study.variants if not _file(place, variant, seed).exists()
    ]
    if waiting or not (place / "base.json").exists():
        runner = StudyRunner(study, size, place, device)
        for number, (variant, seed) in enumerate(waiting, 1):
            runner.run(variant, seed)
            print(f"{name}: {variant}, seed {seed} ({number} of {len(waiting)})", flush=True)
    base = read_json(place / "base.json")
    found = StudyResult(base["scores"], seconds_per_update=base["seconds_per_update"])
    for variant in study.variants:
        cells = [read_json(_file(place, variant, seed))["points"] for seed in seeds]
        found.runs[variant] = [[Point(**point) for point in cell] for cell in cells]
    return found


def _file(place: Path, variant: str, seed: int) -> Path:
    return place / f"{variant}-seed{seed}.json"


def _check_size(file: Path, size: StudySize) -> None:
    given = size.model_dump(mode="json")
    if file.exists() and (found := read_json(file)) != given:
        raise UserError(f"{file.parent}: its trainings have the sizes {found}; give the same, or another --folder")
    write_json(file, given)


class StudyRunner:
    """Models, prompts, and the updates that the seconds allow each variant."""

    def __init__(self, study: Study, size: StudySize, place: Path, device: torch.device) -> None:
        self.study, self.size, self.place, self.device = study, size, place, device
        self.config = size.recipe(study)
        self.factory = TrainerFactory(self.config, device)
        self.prompts = load_prompts(self.config.eval.prompts, self.config.data, size.num_prompts)
        base = place / "base.json"
        if not base.exists():
            trainer = self.trainer(next(iter(study.variants.values())), 0, 1)
            content: dict[str, Any] = {"scores": self.evaluate(trainer), "seconds_per_update": self._time_updates()}
            write_json(base, content | {"environment": describe_run(MODULE, (), device)})
        self.seconds_per_update: dict[str, float] = read_json(base)["seconds_per_update"]

    def trainer(self, method: Method, seed: int, num_updates: int) -> Trainer:
        """A fresh training of a variant."""
        changed = {"seed": seed, "max_train_steps": num_updates, "method": method}
        return self.factory.make(self.config.model_copy(update=changed))

    def evaluate(self, trainer: Trainer) -> Scores:
        """Scores on the test prompts at the guidance scale of the training."""
        return evaluate_average(trainer, self.prompts, self.config.eval.prompts, self.config.guidance_scale)

    def run(self, variant: str, seed: int) -> None:
        """Trains a variant for its seconds and writes its points.  It ends early at a gradient that is not finite."""
        affordable = self.size.seconds / self.seconds_per_update[variant]
        stops = [max(1, round(part * affordable)) for part in self.study.parts]
        trainer, seconds, points = self.trainer(self.study.variants[variant], seed, stops[-1]), 0.0, []
        failure = None
        for stop in stops:
            start = clock(self.device)
            try:
                while trainer.update < stop:
                    trainer.step()
            except FloatingPointError as error:
                failure = str(error)
            seconds += clock(self.device) - start
            points.append(Point(trainer.update, seconds, self.evaluate(trainer)))
        content = {"failure": failure, "points": [asdict(point) for point in points]}
        write_json(_file(self.place, variant, seed), content)

    def _time_updates(self) -> dict[str, float]:
        """Median seconds of computing of an update of each variant; they take turns, and the first one warms up."""
        count = TIMED_UPDATES + 1
        trainers = {name: self.trainer(method, 1000, count) for name, method in self.study.variants.items()}
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for _ in range(count):
            for name, trainer in trainers.items():
                seconds[name].append(time_call(trainer.step, self.device))
        return {name: float(np.median(values[1:])) for name, values in seconds.items()}
