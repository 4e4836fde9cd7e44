"""What a run folder holds, read for its report."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, FiniteFloat

from flowbp.config import TrainConfig
from flowbp.evaluation.compare import Change, paired_changes
from flowbp.evaluation.results import SavedEvaluation, load_evaluations, pair_evaluations
from imgen_common.files import read_json, read_text
from imgen_common.run_folder.environment import read_environment
from imgen_common.run_folder.folder import RunFolder
from imgen_common.run_folder.listing import read_alerts

GRID = "grid.json"


class NoiseGrid(BaseModel):
    """The content of `grid.json`."""

    sigmas: tuple[FiniteFloat, ...]


@dataclass(frozen=True)
class RunData:
    """Everything that a report is made of."""

    name: str
    config: TrainConfig
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: dict[tuple[str, float], SavedEvaluation]
    sigmas: tuple[float, ...] | None
    earlier_configs: dict[int, str] = field(default_factory=dict)
    """The configurations with which it ran up to an update, where it went on with another one."""
    alerts: dict[int, list[str]] = field(default_factory=dict)
    """What the watchdog found, by update."""

    @property
    def own_scale(self) -> float:
        """The guidance scale that the run is judged at."""
        return self.config.eval_guidance_scales[0]

    @property
    def scales(self) -> list[float]:
        """The guidance scales of the evaluations, the run's own first."""
        found = {scale for _, scale in self.evaluations}
        return sorted(found, key=lambda scale: (scale != self.own_scale, scale))

    @cached_property
    def pairs(self) -> dict[float, tuple[SavedEvaluation, SavedEvaluation]]:
        """As `pair_evaluations` gives them."""
        return pair_evaluations(self.evaluations, self.own_scale)

    @cached_property
    def changes(self) -> dict[float, dict[str, Change]]:
        """The changes of all scores between the pairs, by guidance scale."""
        return {scale: paired_changes(*pair) for scale, pair in self.pairs.items()}

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
    grid, earlier = path / GRID, sorted(path.glob("config-until-*.yaml"))
    return RunData(
        name=path.resolve().name,
        config=folder.config(TrainConfig),
        environment=read_environment(path),
        metrics=folder.metrics(),
        evaluations=load_evaluations(path),
        sigmas=read_json(grid, NoiseGrid).sigmas if grid.exists() else None,
        earlier_configs={int(file.stem.rpartition("-")[2]): read_text(file) for file in earlier},
        alerts={update: texts for update, texts in read_alerts(path).items() if texts},
    )
