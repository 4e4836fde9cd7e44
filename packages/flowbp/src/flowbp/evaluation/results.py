"""Evaluations on disk: `RUN/evaluations/NAME-gSCALE/{scores.json, 000.png, ...}`."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, model_validator
from torch import Tensor

from flowbp.data.edits import sources_of
from flowbp.evaluation.evaluate import Evaluation, ScoredPrompts
from imgen_common.errors import UserError
from imgen_common.files import Number, finite_or_none, read_json, write_atomic, writing
from imgen_common.images import MAX_OWN_BYTES, decode, from_pil, to_pil


@dataclass(frozen=True)
class SavedEvaluation(ScoredPrompts):
    """An evaluation read from disk; `image_files` are the images of the first prompts, in order."""

    name: str
    guidance: float
    image_files: list[Path]
    source_files: dict[int, list[Path]]
    """Of edits: the images that prompt i changed."""
    statistics: dict[str, list[float]] = field(default_factory=dict)
    preview: str | None = None
    """As of `Evaluation`."""

    def images(self) -> Tensor:
        """The images, (n, 3, h, w) in [0, 1].  Raises UserError naming one that is damaged."""
        return from_pil([decode(file, MAX_OWN_BYTES) for file in self.image_files])


class SavedScores(BaseModel):
    """The content of `scores.json`."""

    name: str
    guidance: float
    prompts: list[str]
    scores: dict[str, list[Number]]
    groups: list[str] | None
    statistics: dict[str, list[Number]] = {}
    preview: str | None = None

    @model_validator(mode="after")
    def _one_number_per_prompt(self) -> "SavedScores":
        lengths = {len(column) for column in (*self.scores.values(), *self.statistics.values())}
        if self.groups is not None:
            lengths.add(len(self.groups))
        if lengths - {len(self.prompts)}:
            raise ValueError(f"needs one number for each of {len(self.prompts)} prompts")
        return self


def evaluation_folder(run: Path, name: str, guidance: float) -> Path:
    """Where an evaluation of a run is kept."""
    return run / "evaluations" / f"{name}-g{guidance:g}"


def save_evaluation(run: Path, name: str, guidance: float, evaluation: Evaluation) -> Path:
    """Writes the images, then the scores, so that a folder with scores is complete.  Returns the folder."""
    folder = evaluation_folder(run, name, guidance)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with writing(folder):
            folder.mkdir(parents=True)
            for i, image in enumerate(to_pil(evaluation.images) if len(evaluation.images) else ()):
                image.save(folder / f"{i:03d}.png")
                for k, source in enumerate(sources_of(evaluation.prompts[i])):
                    source.load().save(folder / f"{i:03d}-source{k}.png")
        kept = ("prompts", "scores", "groups", "statistics", *(("preview",) if evaluation.preview else ()))
        content = {"name": name, "guidance": guidance} | {key: getattr(evaluation, key) for key in kept}
        for key in ("scores", "statistics"):
            content[key] = {name: list(map(finite_or_none, column)) for name, column in content[key].items()}
        write_atomic(folder / "scores.json", json.dumps(content) + "\n")
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def load_evaluations(run: str | Path) -> dict[tuple[str, float], SavedEvaluation]:
    """All complete evaluations of a run's folder by (name, guidance scale).

    Raises UserError if one is damaged, or the folder is not there.
    """
    found = {}
    if not Path(run).is_dir():
        raise UserError(f"{run}: no such folder; give that of a run")
    for file in sorted((Path(run) / "evaluations").glob("*/scores.json")):
        saved = read_json(file, SavedScores)
        images, sources = [], dict[int, list[Path]]()
        for path in sorted(file.parent.glob("*.png")):
            if path.stem.isdecimal():
                images.append(path)
            elif match := re.fullmatch(r"(\d+)-source\d+", path.stem):
                sources.setdefault(int(match[1]), []).append(path)
        found[saved.name, saved.guidance] = SavedEvaluation(image_files=images, source_files=sources, **dict(saved))
    return found


def pair_evaluations(
    found: Mapping[tuple[str, float], SavedEvaluation], own: float
) -> dict[float, tuple[SavedEvaluation, SavedEvaluation]]:
    """Base and trained by guidance scale, `own` first, where both exist and are of the same prompts."""
    scales = sorted({scale for _, scale in found}, key=lambda scale: (scale != own, scale))
    pairs = {scale: (found.get(("base", scale)), found.get(("trained", scale))) for scale in scales}
    return {scale: (a, b) for scale, (a, b) in pairs.items() if a and b and a.prompts == b.prompts}


def delete_evaluations(run: Path, name: str) -> None:
    """Removes all evaluations of a name, at every guidance scale."""
    for key, saved in load_evaluations(run).items():
        if saved.name == name:
            shutil.rmtree(evaluation_folder(run, *key))
