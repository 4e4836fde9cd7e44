"""Packages the trained models: saves averaged weights in float16, evaluates what was saved, writes provenance."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline
from transformers import CLIPModel, CLIPProcessor

from imgen_common.hub import SAMPLING_FILE, WEIGHTS
from imgen_common.images import grid
from imgen_common.run_folder.environment import environment
from imgen_common.shapes.edits import sample_edit
from imgen_common.shapes.scene import balanced_specs
from imgen_common.shapes.verify import accuracy, verify
from imgen_common.streams import normal, numpy_generator
from scripts.miniature.world import generator, rewards, vae

EVALUATION_SEED = 7
NUM_EVALUATED = {"captions": 504, "edits": 252, "reconstructions": 1000}


def write_provenance(folder: Path, stages: Sequence[Path], metrics: dict[str, float]) -> None:
    """Writes provenance.json: the last log line of every stage, the environment, metrics of the saved weights."""
    content = {
        "stages": {s.name: json.loads((s / "log.jsonl").read_text().splitlines()[-1]) for s in stages},
        "environment": environment([]),
        "metrics": {k: round(v, 4) for k, v in metrics.items()},
    }
    (folder / "provenance.json").write_text(json.dumps(content, indent=2) + "\n")


def _empty_folder(name: str) -> Path:
    folder = WEIGHTS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def package_generator(work: Path) -> dict[str, float]:
    """Ships the last stage's pipeline; returns metrics of the shipped files on the test split."""
    folder = _empty_folder("generator")
    source = generator.latest_pipeline(work)
    Flux2KleinPipeline.from_pretrained(source, dtype=torch.float16).save_pretrained(folder)
    pipeline = Flux2KleinPipeline.from_pretrained(folder, dtype=torch.float32)
    own = {"height": 32, "width": 32, "num_inference_steps": 12, "guidance_scale": 2.0}
    (folder / SAMPLING_FILE).write_text(json.dumps(own, indent=2) + "\n")
    rng = numpy_generator(EVALUATION_SEED, "package")
    specs = balanced_specs(NUM_EVALUATED["captions"], rng, "test")
    instructions = [sample_edit(rng, "test") for _ in range(NUM_EVALUATED["edits"])]
    metrics = generator.evaluate_pipeline(pipeline, specs, instructions, EVALUATION_SEED, (1.0, 2.0))
    images, checked = vae.render_images(NUM_EVALUATED["reconstructions"], EVALUATION_SEED, "package-vae", 0)
    held = accuracy(verify(vae.reconstruct(pipeline.vae, images), checked), checked)
    metrics |= {f"vae/{k}": v for k, v in held.items()}
    noise = torch.stack([normal((16, 32), EVALUATION_SEED, "evaluation", i) for i in range(48)])
    shown = generator.sample(pipeline, [s.caption for s in specs[:48]], noise)
    grid(shown, columns=12, scale=3).save(folder / "samples.png")
    stages = list(dict.fromkeys([work / "vae", work / generator.BASE.folder, source.parent]))
    write_provenance(folder, stages, metrics)
    return metrics


def package_reward(name: str, source: Path, stages: Sequence[Path], fresh: rewards.LabeledImages) -> dict[str, float]:
    """Ships one reward model; fresh: generated images of the test split that it has never seen."""
    folder = _empty_folder(name)
    processor = CLIPProcessor.from_pretrained(source)
    CLIPModel.from_pretrained(source, dtype=torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    metrics = rewards.pair_accuracy(model, processor, EVALUATION_SEED)
    metrics |= rewards.verifier_agreement(model, processor, fresh)
    write_provenance(folder, stages, metrics)
    return metrics


def package_models(work: Path) -> None:
    """Ships the generator, the tuned reward and the held-out reward, and prints what the shipped files score."""
    shipped = {"generator": package_generator(work)}
    pipeline = Flux2KleinPipeline.from_pretrained(WEIGHTS / "generator", dtype=torch.float32)
    fresh = rewards.label_images(pipeline, "test", EVALUATION_SEED)
    tuned = [work / "reward", work / "reward-tuned"]
    shipped["reward"] = package_reward("reward", work / "reward-tuned" / "model", tuned, fresh)
    shipped["heldout"] = package_reward("heldout", work / "heldout" / "model", [work / "heldout"], fresh)
    print(json.dumps(shipped, indent=2))
