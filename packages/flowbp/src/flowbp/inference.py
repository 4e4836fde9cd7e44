"""Pictures and scores of a model as it came or of a trained run, outside of training."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flowbp.compare import Change, Level, as_json, category_changes, changes, level, ordered
from flowbp.config import TrainConfig
from flowbp.data import is_shapes, load_prompts
from flowbp.embeddings import Conditions
from flowbp.evaluate import Evaluation, evaluate, generate
from flowbp.train import apply_trained, load_backbone, sampling_of
from flowbp.types import Backbone, Reward, tile
from imgen_common.config import load
from imgen_common.errors import UserError
from imgen_common.images import grid, to_pil
from imgen_common.runs import CONFIG, find_run, is_run

FILE = re.compile(r"(\d+)-")


@dataclass(frozen=True)
class Subject:
    """A model to draw from: that of a configuration, with the trained weights of `run` if there is one."""

    label: str
    config: TrainConfig
    run: Path | None

    def load(self, device: torch.device) -> Backbone:
        """The backbone with its weights."""
        backbone = load_backbone(self.config, device)
        if self.run is not None:
            apply_trained(backbone, self.run)
        return backbone


def subject(text: str, root: Path, sets: Sequence[str] = (), *, base: bool = False) -> Subject:
    """What a run (a folder, or its name under `root`) or a model reference stands for.

    base: the model that the run started from.  A model brings the defaults of `TrainConfig`; `sets` change them.
    """
    if is_run(text, root):
        path = find_run(text, root)
        config = load(TrainConfig, [path / CONFIG], sets)
        return Subject(f"{path.name} (base)" if base else path.name, config, None if base else path)
    config = load(TrainConfig, [], sets)
    return Subject(text, config.model_copy(update={"model": config.model.model_copy(update={"ref": text})}), None)


def device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def draw(
    backbone: Backbone, prompt: str, seeds: Sequence[int], size: tuple[int, int], steps: int, guidance: float
) -> Tensor:
    """Pictures (b, 3, h, w) of one prompt, one per seed: what the family's diffusers pipeline draws with
    `generator=torch.Generator().manual_seed(seed)`."""
    noise = torch.cat([backbone.noise(1, size, torch.Generator().manual_seed(seed)) for seed in seeds])
    cond = tile(backbone.encode([prompt]), len(seeds))
    negative = backbone.encode([""])
    where = next(iter(cond.values())).device
    return generate(backbone, cond, negative, noise.to(where), size=size, steps=steps, guidance=guidance)


def next_number(folder: Path) -> int:
    """The first number that no file of a folder begins with and no later one does."""
    found = [FILE.match(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(match[1]) + 1 for match in found if match), default=0)


def slug(text: str) -> str:
    """A prompt as part of a file name."""
    return "-".join(re.findall(r"\w+", text.lower()))[:60] or "picture"


def score(
    one: Subject,
    prompts: Sequence[str],
    rewards: dict[str, Reward],
    config: TrainConfig,
    scales: Sequence[float],
    tick: Callable[[str, int, int], None],
) -> dict[float, Evaluation]:
    """Evaluations of one model by guidance scale, with the prompts, seeds and rewards of `config`."""
    backbone = one.load(device())
    conditions = Conditions(backbone)

    def at(scale: float) -> Evaluation:
        return evaluate(
            backbone,
            conditions,
            prompts,
            rewards,
            sampling_of(config, scale),
            verify=is_shapes(config.eval.prompts),
            tick=lambda done: tick(f"{one.label}, guidance {scale:g}", done, len(prompts)),
        )

    return {scale: at(scale) for scale in scales}


def evaluation_prompts(config: TrainConfig) -> list[str]:
    """The prompts that `config.eval` asks for."""
    return load_prompts(config.eval.prompts, config.data.key, config.eval.num_prompts)


def check_scale(scale: float) -> None:
    """Raises UserError for a guidance scale out of range."""
    if not 0 < scale <= 100:
        raise UserError(f"--guidance {scale:g}: must be above 0 and at most 100")


def save(images: Tensor, folder: Path, names: Sequence[str]) -> list[Image.Image]:
    """Writes pictures (b, 3, h, w) as PNG files; returns them."""
    pictures = to_pil(images)
    for picture, name in zip(pictures, names, strict=True):
        picture.save(folder / name)
    return pictures


def save_grid(pictures: Sequence[Image.Image], file: Path, columns: int) -> None:
    """All pictures in rows of `columns`, small ones enlarged."""
    grid(pictures, columns, scale=max(1, 128 // pictures[0].width), gap=4).save(file)


# --- comparisons -----------------------------------------------------------------------------------------------------

Scales = Mapping[float, Evaluation]
"""Evaluations of one model by guidance scale."""


def single(found: Scales) -> tuple[dict[float, dict[str, Level]], dict[float, dict[str, Level]]]:
    """Every score by guidance scale, and the verifier by category."""
    scores = {
        scale: {name: level(one.scores[name]) for name in ordered(list(one.scores))} for scale, one in found.items()
    }
    groups = {}
    for scale, one in found.items():
        rows: dict[str, list[float]] = {}
        for group, value in zip(one.groups or [], one.scores.get("verifier", []), strict=True):
            rows.setdefault(group, []).append(value)
        groups[scale] = {group: level(values) for group, values in rows.items()}
    return scores, groups


def paired(before: Scales, after: Scales) -> tuple[dict[float, dict[str, Change]], dict[float, dict[str, Change]]]:
    """Changes of every score by guidance scale, and of the verifier by category."""
    scores = {scale: changes(before[scale], after[scale]) for scale in after}
    return scores, {
        scale: category_changes(before[scale], after[scale], "verifier") if "verifier" in scores[scale] else {}
        for scale in after
    }


def results(labels: Sequence[str], found: Sequence[Scales]) -> list[dict[str, Any]]:
    """The same as plain data, one entry per guidance scale."""
    if len(found) == 1:
        scores, groups = single(found[0])
        return [
            {
                "guidance": scale,
                "model": labels[0],
                "scores": {name: asdict(one) for name, one in scores[scale].items()},
                "categories": {group: asdict(one) for group, one in groups[scale].items()},
            }
            for scale in scores
        ]
    pairs, changed = paired(*found)
    return [
        {
            "guidance": scale,
            "before": labels[0],
            "after": labels[1],
            "scores": as_json(pairs[scale]),
            "categories": as_json(changed[scale]),
        }
        for scale in pairs
    ]
