"""What a run folder holds, read for its report."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowbp.config import TrainConfig
from flowbp.evaluation.compare import have_same_prompts
from flowbp.evaluation.results import SavedEvaluation, load_evaluations
from imgen_common.run_folder.find import ENVIRONMENT
from imgen_common.run_folder.folder import RunFolder

GRID = "grid.json"


@dataclass(frozen=True)
class RunData:
    """Everything that a report is made of."""

    name: str
    config: TrainConfig
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: dict[tuple[str, float], SavedEvaluation]
    sigmas: tuple[float, ...] | None

    @property
    def training_scale(self) -> float:
        """The guidance scale of the training."""
        return self.config.guidance_scale

    @property
    def scales(self) -> list[float]:
        """The guidance scales of the evaluations, that of the training first."""
        found = {scale for _, scale in self.evaluations}
        return sorted(found, key=lambda scale: (scale != self.training_scale, scale))

    def pair(self, scale: float) -> tuple[SavedEvaluation, SavedEvaluation] | None:
        """Base and trained at a scale, if both exist and are of the same prompts."""
        base, trained = (self.evaluations.get((name, scale)) for name in ("base", "trained"))
        return (base, trained) if base and trained and have_same_prompts(base, trained) else None

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Updates and values of a metric, where it was finite."""
        rows = [(line["step"], line[key]) for line in self.metrics if line.get(key) is not None]
        return [float(step) for step, _ in rows], [float(value) for _, value in rows]

    @property
    def updates(self) -> int:
        """Number of updates so far."""
        return max((line["step"] for line in self.metrics), default=0)


def read_run(path: Path) -> RunData:
    """The run in a folder.  Raises UserError if it holds none."""
    folder = RunFolder.open(path, is_main=False)
    grid, environment = path / GRID, path / ENVIRONMENT
    return RunData(
        name=path.resolve().name,
        config=folder.config(TrainConfig),
        environment=json.loads(environment.read_text(encoding="utf-8")) if environment.exists() else {},
        metrics=folder.metrics(),
        evaluations=load_evaluations(path),
        sigmas=tuple(json.loads(grid.read_text(encoding="utf-8"))["sigmas"]) if grid.exists() else None,
    )
