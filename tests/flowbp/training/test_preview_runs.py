"""`model.vae.preview`: a training with it is the one without it, but for the images and marks of quick evaluations."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLFlux2
from safetensors.torch import save_file

from flowbp.backbones.preview import Flux2TinyDecoder
from flowbp.config import TrainConfig
from flowbp.evaluation.results import load_evaluations
from flowbp.evaluation.sources import model_source
from flowbp.reports.report import render_report
from flowbp.reports.run_data import read_run
from flowbp.training import watchdog
from flowbp.training.loop import train
from flowbp.training.preflight import check_run
from flowbp.training.progress import NullReporter
from flowbp.training.runs import MAY_DIFFER
from imgen_common.config import load
from imgen_common.errors import UserError
from imgen_common.run_folder.folder import RunFolder

SMALL = [
    *("method=flowbp_sparse", "num_inference_steps=4", "total_batch_size=2", "max_train_steps=2", "ema=0.5"),
    *("eval.every=1", "eval.num_prompts=2", "eval.quick_num_prompts=3", "eval.num_inference_steps=2"),
    *("eval.guidance_scale=[1.0]", "checkpoint.every=1", "checkpoint.keep=9"),
]
QUICK_KINDS = ("eval", "eval_preview")


class Alerts(NullReporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def alert(self, text: str) -> None:
        self.said.append(text)


def decoder_for_the_miniature(file: Path) -> Path:
    torch.manual_seed(0)
    decoder = Flux2TinyDecoder(8, 8, (1, 1, 1))
    save_file({f"decoder.{name}": value for name, value in decoder.state_dict().items()}, file)
    return file


def trained(path: Path, *sets: str) -> tuple[RunFolder, list[str]]:
    config = check_run(load(TrainConfig, [], [*SMALL, *sets]), 1).config
    reporter = Alerts()
    with RunFolder.create(path, config, ["flowbp", "train"]) as run:
        train(config, run, Accelerator(cpu=True), reporter)
    return run, reporter.said


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """One run with the autoencoder alone, and one with a preview."""
    place = tmp_path_factory.mktemp("preview")
    file = decoder_for_the_miniature(place / "taef2.safetensors")
    given = {"plain": "null", "preview": str(file)}
    return {name: trained(place / "runs" / name, f"model.vae.preview={ref}")[0] for name, ref in given.items()}


def logged(run: RunFolder, start: str) -> list[dict[str, float]]:
    names = ("seconds", "peak_memory", "tflops", "mfu")
    return [
        {key: value for key, value in line.items() if key.startswith(start) and not any(n in key for n in names)}
        for line in run.metrics()
    ]


@pytest.mark.slow
def test_rewards_gradients_weights_and_final_evaluations_are_the_same_bit_for_bit(runs: dict[str, RunFolder]) -> None:
    plain, preview = (logged(run, "train/") for run in runs.values())
    assert plain == preview
    assert [line["train/reward"] for line in plain if line]
    assert all("train/grad_norm" in line for line in plain if line)
    states = [run.load_checkpoint(2).tensors for run in runs.values()]
    for group in ("weights", "ema"):
        assert all(torch.equal(value, states[1][group][name]) for name, value in states[0][group].items())
    evaluations = [load_evaluations(run.path) for run in runs.values()]
    for key, one in evaluations[0].items():
        other = evaluations[1][key]
        assert (one.scores, one.statistics, other.preview) == (other.scores, other.statistics, None)
        assert torch.equal(one.images(), other.images())


def test_quick_evaluations_are_decoded_by_the_preview_and_marked(runs: dict[str, RunFolder]) -> None:
    found = {name: {key for line in run.metrics() for key in line} for name, run in runs.items()}
    assert {"eval/reward", "eval/heldout", "eval/verifier"} <= found["plain"]
    assert {"eval_preview/reward", "eval_preview/heldout", "eval_preview/verifier"} <= found["preview"]
    assert not any(key.startswith("eval_preview/") for key in found["plain"])
    assert not any(key.startswith("eval/") for key in found["preview"])
    for name, image in (("plain", "quick"), ("preview", "quick_preview")):
        drawn = sorted(file.name for file in (runs[name].path / "samples").glob("*.png"))
        assert drawn == [f"{image}-{step:06d}.png" for step in range(3)]
    bases = {name: load_evaluations(run.path / watchdog.FOLDER)["base", 1.0] for name, run in runs.items()}
    ref = runs["preview"].config(TrainConfig).model.vae.preview
    assert (bases["plain"].preview, bases["preview"].preview) == (None, ref)
    assert (bases["plain"].images() - bases["preview"].images()).abs().max() > 0.1
    scores = json.loads((runs["plain"].path / watchdog.FOLDER / "evaluations" / "base-g1" / "scores.json").read_text())
    assert "preview" not in scores  # as earlier versions wrote it


def test_the_report_says_what_decoded(runs: dict[str, RunFolder]) -> None:
    pages = {name: render_report(read_run(run.path)) for name, run in runs.items()}
    assert "images of a tiny decoder" in pages["preview"]
    assert "quick evaluations decoded by" in pages["preview"]
    assert "tiny decoder" not in pages["plain"]


@pytest.mark.slow
def test_a_resumed_run_may_change_the_decoder_but_is_not_watched_then(runs: dict[str, RunFolder]) -> None:
    source, said = runs["plain"], Alerts()
    ref = runs["preview"].config(TrainConfig).model.vae.preview
    config = load(TrainConfig, [source.path / "config.yaml"], ["max_train_steps=3", f"model.vae.preview={ref}"])
    with RunFolder.open(source.path, config, ["flowbp"], may_differ=MAY_DIFFER) as run:
        train(config, run, Accelerator(cpu=True), said)
    assert [text for text in said.said if "with this decoder" in text]
    steps = {kind: [line["step"] for line in run.metrics() if f"{kind}/reward" in line] for kind in QUICK_KINDS}
    assert steps == {"eval": [0, 1, 2], "eval_preview": [3]}
    page = render_report(read_run(source.path))
    assert "images of a tiny decoder" in page
    assert "quick evaluation: 3 prompts, averaged weights, guidance 1<" in page


def test_other_commands_do_not_look_for_the_decoder(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    run = str(runs["preview"].path)
    source = model_source(run, tmp_path, [f"model.vae.preview={tmp_path / 'gone.safetensors'}"])
    source.check(scorers=True)
    assert isinstance(source.load(torch.device("cpu")).pipe.vae, AutoencoderKLFlux2)


def test_a_preview_that_does_not_fit_is_refused_before_the_run(tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    decoder = Flux2TinyDecoder(32, 8, (1, 1, 1, 1))
    save_file({f"decoder.{name}": value for name, value in decoder.state_dict().items()}, file)
    config = load(TrainConfig, [], [*SMALL, f"model.vae.preview={file}"])
    with pytest.raises(
        UserError, match=r"model\.vae\.preview .*32 channels for 8 pixels .* has 8 channels for 4 pixels"
    ):
        check_run(config, 1)
    assert check_run(config, 1, estimate_only=True).config.model.vae.preview == str(file)
