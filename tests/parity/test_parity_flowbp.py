"""flowbp computes what it computed before its code was rearranged: gradients, trainings, images, files and pages.

The goldens were recorded at the last commit before the move; see `goldens`.
"""

import contextlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from families import SIZE, folder_of
from parity.goldens import check, digest, fingerprint, numbers, page, stable
from PIL import Image
from safetensors.torch import load_file

from flowbp.cli import main
from flowbp.config import TrainConfig
from flowbp.methods import METHODS
from flowbp.training.loading import load_models
from flowbp.training.trainer import Trainer
from imgen_common.config import load
from imgen_common.run_folder.folder import RunFolder

RECORDED = ("flux", "flux2", "sd3")
pytestmark = pytest.mark.exhaustive
SMALL = [
    *(
        "num_inference_steps=6",
        "total_batch_size=4",
        "method=flowbp_bridge",
        "eval.num_prompts=6",
        "eval.num_inference_steps=3",
    ),
    *(
        "eval.guidance_scale=[1.0, 2.0]",
        "eval.every=5",
        "eval.quick_num_prompts=6",
        "checkpoint.every=5",
        "checkpoint.keep=9",
    ),
]
STEPS = "max_train_steps"
TWO_REWARDS = "[{name: one, ref: builtin:shapes/reward}, {name: two, ref: builtin:shapes/heldout, weight: 0.5}]"
RUNS = {
    "bridge": [*SMALL, f"{STEPS}=10"],
    "lora": [*SMALL, f"{STEPS}=3", "lora={rank: 4}", "method=flowbp_lagrange", "guidance_scale=2"],
    "two": [
        *SMALL,
        f"{STEPS}=3",
        f"rewards={TWO_REWARDS}",
        "heldout=[]",
        "combine=pcgrad",
        "method=draft_lv",
        "per_device_batch_size=2",
    ],
}


def flowbp(*words: object) -> str:
    """What a command prints on standard output; it must succeed."""
    out = io.StringIO()
    before, sys.argv = sys.argv, ["flowbp", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = before
    assert ended.value.code == 0, out.getvalue()
    return out.getvalue()


def sets(texts: Sequence[str]) -> list[str]:
    return [word for text in texts for word in ("--set", text)]


def pixels(file: Path) -> dict[str, str]:
    return digest(Image.open(file).convert("RGB").tobytes())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the trained runs, and `resumed`: five updates of `bridge`, then five more."""
    folder = tmp_path_factory.mktemp("runs")
    for name, texts in RUNS.items():
        flowbp("train", "--json", "--runs", folder, *sets([*texts, f"name={name}"]))
    flowbp("train", "--json", "--runs", folder, *sets([*SMALL, f"{STEPS}=5", "name=resumed"]))
    flowbp("train", "--json", "--runs", folder, "--resume", folder / "resumed", "--set", f"{STEPS}=10")
    return folder


@pytest.mark.parametrize("family", RECORDED)
def test_gradients_of_all_methods(family: str, tmp_path: Path) -> None:
    folder = folder_of(family, tmp_path)
    for method in METHODS:
        for scale in (1, 1.5):
            texts = [f"model={{ref: {folder}, height: {SIZE[0]}, width: {SIZE[1]}}}", f"method={method}"]
            texts += ["total_batch_size=2", "num_inference_steps=16", f"guidance_scale={scale}", "seed=3"]
            config = load(TrainConfig, [], texts)
            trainer = Trainer(config, load_models(config, torch.device("cpu")), Accelerator(cpu=True))
            metrics = trainer.compute_gradient()
            gradients = {name: p.grad for name, p in trainer.models.parameters.items() if p.grad is not None}
            value = {"metrics": stable(metrics), "gradients": fingerprint(gradients)}
            check(f"gradient {family} {method} {scale}", value, "flowbp")


@pytest.mark.parametrize("name", [*RUNS, "resumed"])
def test_trainings(runs: Path, name: str) -> None:
    run = RunFolder.open(runs / name, is_main=False)
    latest = run.latest_checkpoint()
    assert latest is not None
    tensors = run.load_checkpoint(latest).tensors
    value = {
        "checkpoint": {group: fingerprint(held) for group, held in tensors.items()},
        "metrics": [stable(line) for line in run.metrics()],
        "evaluations": {
            file.parent.name: stable(json.loads(file.read_text()))
            for file in sorted(run.path.glob("evaluations/*/scores.json"))
        },
        "images": {
            str(file.relative_to(run.path)): pixels(file) for file in sorted(run.path.glob("evaluations/*/00[0-3].png"))
        },
    }
    check(f"training {name.replace('resumed', 'bridge')}", value, "flowbp")


def test_the_report(runs: Path) -> None:
    for name in RUNS:
        flowbp("report", name, "--runs", runs)
        check(f"report {name}", page((runs / name / "report.html").read_text(encoding="utf-8")), "flowbp")


def test_evaluation_and_images(runs: Path, tmp_path: Path) -> None:
    words = (
        "eval",
        "bridge",
        "--against",
        "lora",
        "--runs",
        runs,
        "--num-prompts",
        6,
        "--json",
        *sets(["eval.num_inference_steps=3"]),
    )
    check("eval", stable(json.loads(flowbp(*words))), "flowbp")
    flowbp("sample", "a red circle left of a blue square", "--run", "lora", "--runs", runs, "--out", tmp_path)
    check("sample", {file.name: pixels(file) for file in sorted(tmp_path.glob("*.png"))}, "flowbp")


def test_exports(runs: Path, tmp_path: Path) -> None:
    for kind in ("diffusers", "comfyui", "merged"):
        flowbp("export", "lora", "--runs", runs, "--to", kind, "--out", tmp_path / kind)
        files = sorted((tmp_path / kind).rglob("*.safetensors"))
        value = {str(file.relative_to(tmp_path)): fingerprint(load_file(file)) for file in files}
        check(f"export {kind}", value, "flowbp")


@pytest.mark.parametrize("method", METHODS)
def test_plans_as_shown(method: str) -> None:
    check(f"explain {method}", numbers(flowbp("explain", method, "--seed", 3)), "flowbp")


def test_the_estimate() -> None:
    for name, texts in RUNS.items():
        check(f"estimate {name}", json.loads(flowbp("estimate", "--json", *sets(texts))), "flowbp")
