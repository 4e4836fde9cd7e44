"""How close each method's gradient is to the exact one, as the training that they are for goes on."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.common import read_json, write_json
from benchmarks.quality.gradient_fidelity import FidelitySize, measure_fidelity
from benchmarks.quality.trainer_factory import TrainerFactory
from benchmarks.studies.studies import SETTINGS
from flowbp.config import TrainConfig
from flowbp.core.axes.active import All
from flowbp.core.axes.coupling import Every
from flowbp.methods import METHODS, Method
from imgen_common.config import load

TITLE = "Does a method's gradient stay as close to the exact one while the model is trained?"
VARIANTS: Mapping[str, Method] = {
    **{name: method for name, method in METHODS.items() if name != "full"},
    "all steps, alpha 0.5": Method(active=All(), coupling=Every(alpha=0.5)),
}
Cosines = dict[str, list[float]]
"""{variant: mean cosine over plans for each prompt}."""


def measure_along_training(
    updates: Sequence[int], seeds: Sequence[int], size: FidelitySize, folder: Path, device: torch.device
) -> dict[int, list[Cosines]]:
    """{updates: cosines for each seed} of weights that the default method trained; measures what the folder lacks."""
    place = folder / "fidelity"
    files = {(seed, stop): place / f"updates{stop}-seed{seed}.json" for seed in seeds for stop in updates}
    if any(not file.exists() for file in files.values()):
        config = load(TrainConfig, [], ["heldout=[]", *SETTINGS])
        factory = TrainerFactory(config, device)
        for seed in seeds:
            changed = {"seed": seed, "max_train_steps": max(1, *updates)}
            trainer = factory.make(config.model_copy(update=changed))
            for stop in updates:
                while trainer.update < stop:
                    trainer.step()
                if not files[seed, stop].exists():
                    with trainer.state.ema_weights():
                        found = measure_fidelity(
                            config, factory.models, size, {**VARIANTS, "full": METHODS["full"]}, device
                        )
                    write_json(files[seed, stop], {name: found[name].cosine for name in VARIANTS})
    return {stop: [read_json(files[seed, stop]) for seed in seeds] for stop in updates}
