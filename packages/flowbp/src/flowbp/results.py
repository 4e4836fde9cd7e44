"""Evaluations on disk: `RUN/evaluations/NAME-gSCALE/{scores.json, 000.png, ...}`."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from flowbp.evaluate import Evaluation
from imgen_common.images import to_pil
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


def save_evaluation(run: Path, name: str, guidance: float, evaluation: Evaluation) -> Path:
    """Writes the pictures, then the scores, so that a folder with scores is whole."""
    folder = run / "evaluations" / f"{name}-g{guidance:g}"
    folder.mkdir(parents=True, exist_ok=True)
    if len(evaluation.images):
        for i, picture in enumerate(to_pil(evaluation.images)):
            picture.save(folder / f"{i:03d}.png")
    content = {
        "name": name,
        "guidance": guidance,
        "prompts": evaluation.prompts,
        "scores": evaluation.scores,
        "groups": evaluation.groups,
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
