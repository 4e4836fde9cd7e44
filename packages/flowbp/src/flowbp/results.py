"""Evaluations on disk: `RUN/evaluations/NAME-gSCALE/{scores.json, 000.png, ...}`."""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from flowbp.evaluate import Evaluation
from imgen_common.images import from_pil, to_pil
from imgen_common.runs import write_atomic


@dataclass(frozen=True)
class Saved:
    """An evaluation read back; `pictures` are the files of the first prompts' pictures, in order."""

    name: str
    guidance: float
    prompts: list[str]
    scores: dict[str, list[float]]
    groups: list[str] | None
    pictures: list[Path]
    statistics: dict[str, list[float]] = field(default_factory=dict)

    def images(self) -> Tensor:
        """The pictures, (n, 3, h, w) in [0, 1]."""
        return from_pil([Image.open(file) for file in self.pictures])


def folder_of(run: Path, name: str, guidance: float) -> Path:
    """Where an evaluation of a run is kept."""
    return run / "evaluations" / f"{name}-g{guidance:g}"


def save_evaluation(run: Path, name: str, guidance: float, evaluation: Evaluation) -> Path:
    """Writes the pictures, then the scores, so that a folder with scores is whole."""
    folder = folder_of(run, name, guidance)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if len(evaluation.images):
        for i, picture in enumerate(to_pil(evaluation.images)):
            picture.save(folder / f"{i:03d}.png")
    content = {
        "name": name,
        "guidance": guidance,
        "prompts": evaluation.prompts,
        "scores": evaluation.scores,
        "groups": evaluation.groups,
        "statistics": evaluation.statistics,
    }
    write_atomic(folder / "scores.json", json.dumps(content) + "\n")
    return folder


def load_evaluations(run: Path) -> dict[tuple[str, float], Saved]:
    """All whole evaluations of a run by (name, guidance)."""
    found = {}
    for file in sorted((run / "evaluations").glob("*/scores.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        pictures = sorted(p for p in file.parent.glob("*.png") if re.fullmatch(r"\d+", p.stem))
        found[(content["name"], content["guidance"])] = Saved(pictures=pictures, **content)
    return found


def drop_evaluations(run: Path, name: str) -> None:
    """Removes those of a state that the run has left behind."""
    for key, saved in load_evaluations(run).items():
        if saved.name == name:
            shutil.rmtree(folder_of(run, *key))
