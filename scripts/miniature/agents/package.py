"""Packages a trained model: saves it in float16, measures what was saved, writes its provenance."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from imgen_common.hub import WEIGHTS
from imgen_common.run_folder.environment import environment


def ship_model(
    name: str, stages: Sequence[Path], about: dict[str, Any], measure: Callable[[Path], dict[str, float]]
) -> None:
    """Writes `builtin:shapes/NAME` from the last stage with its provenance; prints what the shipped files score."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder, trained = WEIGHTS / name, stages[-1] / "model"
    shutil.rmtree(folder, ignore_errors=True)
    model = AutoModelForImageTextToText.from_pretrained(trained, dtype=torch.float16, local_files_only=True)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(trained, local_files_only=True).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    metrics = measure(folder)
    content = about | {
        "stages": {s.name: json.loads((s / "log.jsonl").read_text().splitlines()[-1]) for s in stages},
        "environment": environment([]),
        "metrics": {key: round(value, 4) for key, value in metrics.items()},
    }
    (folder / "provenance.json").write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps({name: content["metrics"]}, indent=2))
