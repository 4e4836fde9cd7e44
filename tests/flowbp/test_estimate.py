"""What a run is said to need, against what it takes."""

import json
import shutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiers import tiers
from typer.testing import CliRunner

from flowbp.cli import app
from flowbp.config import TrainConfig
from flowbp.estimate import SWITCHES, Estimate, estimate_run, measure_run, parse_memory_size
from flowbp.training import preflight
from imgen_common import hub
from imgen_common.config import load
from imgen_common.errors import UserError
from imgen_common.memory import LiveBytes

SMALL = [
    "num_inference_steps=4",
    "method.active.num_active_steps=3",
    "total_batch_size=4",
    "eval.num_prompts=8",
    "eval.quick_num_prompts=8",
]
CASES = {
    "all weights": [],
    "adapters": ["lora.rank=4"],
    "guidance": ["guidance_scale=2"],
    "both branches": ["guidance_scale=2", "guidance.detach_negative=false"],
    "micro-batches": ["per_device_batch_size=2"],
    "checkpointing": ["model.gradient_checkpointing=true"],
    "chunks": ["method=flowbp_sparse", "active_steps_per_forward=3", "total_batch_size=8"],
    "bfloat16 adapters": ["model.dtype=bfloat16", "lora.rank=4"],
    "rewards in parts": ["reward_batch_size=2"],
    "autoencoder in parts": ["model.vae.gradient_checkpointing=true", "model.vae.tile=16", "offload_trajectory=true"],
}


def config_of(*sets: str) -> TrainConfig:
    return load(TrainConfig, [], [*SMALL, *sets])


@cache
def estimated(*sets: str, count: int = 1) -> Estimate:
    return estimate_run(preflight.check_run(config_of(*sets), count))


@pytest.mark.parametrize("case", tiers(CASES, default=["chunks"], slow=["adapters", "both branches", "checkpointing"]))
def test_the_peak_of_an_update_is_what_was_said(case: str) -> None:
    taken, _ = measure_run(config_of(*CASES[case]), torch.device("cpu"))
    assert estimated(*CASES[case]).update_peak == pytest.approx(taken, rel=0.1)


def test_every_family_is_traced(folder: Path) -> None:
    sets = [
        f"model.ref={folder}",
        "model.height=16",
        "model.width=24",
        "method=refl",
        "method.active.num_active_steps=2",
    ]
    found = estimated(*sets)
    assert found.flops > 0
    assert all(size > 0 for size in found.activation.values())
    assert not found.untraced


def without_weights(folder: Path, place: Path) -> Path:
    """The descriptions of a model alone."""
    return shutil.copytree(folder, place / folder.name, ignore=shutil.ignore_patterns("*.safetensors"))


@pytest.mark.slow
def test_weights_are_not_needed_to_estimate(tmp_path: Path) -> None:
    """Of generator, reward and held-out reward; the same answer as with them, and training still asks for them."""
    keys = {"generator": "model.ref", "reward": "rewards.0.ref", "heldout": "heldout.0.ref"}
    refs = [f"{key}={without_weights(hub.WEIGHTS / name, tmp_path)}" for name, key in keys.items()]
    assert not list(tmp_path.rglob("*.safetensors"))
    for name, ref in zip(keys, refs, strict=True):
        with pytest.raises(UserError, match=rf"{name}: half-downloaded model: no \*\.safetensors"):
            preflight.check_run(config_of(ref), 1)
    assert estimate_run(preflight.check_run(config_of(*refs), 1, estimate_only=True)) == estimated()


@pytest.mark.slow
def test_the_switches_lower_what_they_are_for() -> None:
    kept = estimated()
    found = estimated("model.vae.gradient_checkpointing=true", "model.vae.slicing=true", "offload_trajectory=true")
    assert kept.host == 0 < found.host
    assert kept.activation["rollout"] - found.activation["rollout"] == found.host
    for stage in ("reward", "evaluation"):
        assert found.activation[stage] < kept.activation[stage] - found.host


@pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
def test_a_quantized_base_is_planned_and_measured_alike() -> None:
    sets = ["lora.rank=4", "model.dtype=bfloat16", "model.gradient_checkpointing=true"]
    found, plain = estimated(*sets, "model.quantization=int8"), estimated(*sets)
    taken, _ = measure_run(config_of(*sets, "model.quantization=int8"), torch.device("cpu"))
    assert found.update_peak == pytest.approx(taken, rel=0.1)
    assert found.static["frozen weights"] < 0.65 * plain.static["frozen weights"]


def test_live_bytes_are_those_that_live() -> None:
    kept = torch.zeros(1000)
    with LiveBytes([kept]) as live:
        kept.add_(1)
        assert live.now == 0
        first = torch.zeros(1000)
        second = first.view(10, 100) + 1
        assert live.now == live.peak == 8000
        del second
        assert (live.now, live.peak) == (4000, 8000)
        third = first * 2
        del first, third
        assert (live.now, live.peak) == (0, 8000)


@pytest.mark.slow
def test_operations_are_counted() -> None:
    """Twice the images, twice the operations; micro-batches and chunks change nothing."""
    one, two = estimated().flops, estimated("total_batch_size=8").flops
    assert two == pytest.approx(2 * one, rel=0.01)
    assert estimated("per_device_batch_size=2").flops == pytest.approx(one, rel=0.01)
    sparse = estimated("method=flowbp_sparse").flops
    assert estimated("method=flowbp_sparse", "active_steps_per_forward=3").flops == pytest.approx(sparse, rel=0.01)


@pytest.mark.slow
def test_sharding_lowers_what_it_shards() -> None:
    whole = estimated(count=4).static
    for kind, weights in (("fsdp2", 4), ("zero2", 1)):
        cut = estimated(f"distributed.kind={kind}", count=4).static
        assert cut["trained weights"] == whole["trained weights"] // weights
        assert cut["AdamW"] == whole["AdamW"] // 4


@pytest.mark.parametrize("text", ["24GB", "24 GiB", "1.5GiB", "1000"])
def test_sizes(text: str) -> None:
    known = {"24GB": 24 * 10**9, "24 GiB": 24 * 2**30, "1.5GiB": 3 * 2**29, "1000": 1000}
    assert parse_memory_size(text) == known[text]


@pytest.mark.parametrize("text", ["", "0GB", "24 gigabytes", "-1", "GiB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match=r"such as 24GiB"):
        parse_memory_size(text)


def test_the_command_says_whether_it_fits() -> None:
    sets = [part for text in SMALL for part in ("--set", text)]
    done = CliRunner().invoke(app, ["estimate", "--memory", "8GiB", "--gpus", "2", *sets])
    assert "fits" in done.stdout
    assert "not fit" not in done.stdout


def test_all_that_is_advised_are_settings() -> None:
    assert all(
        config_of("active_steps_per_forward=3", change) != config_of("active_steps_per_forward=3")
        for change in SWITCHES
    )


@pytest.mark.slow
def test_the_command_says_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three settings, the last of which needs processes."""
    tried = ("model.gradient_checkpointing=true", "lora.rank=16")
    monkeypatch.setattr("flowbp.estimate.SWITCHES", (*tried, "distributed.kind=fsdp2"))
    sets = [part for text in SMALL for part in ("--set", text)]
    done = CliRunner().invoke(app, ["estimate", "--memory", "20MB", "--json", *sets])
    content = json.loads(done.stdout)
    assert content["fits"] is False
    assert content["peak"] == estimated().peak > 20e6
    alone = content["advice"]["alone"]
    assert 1 <= len(alone) <= 3
    assert all(size < content["peak"] for size in alone.values())
    assert content["advice"]["together"] <= min(alone.values())
    for change, size in alone.items():
        assert estimated(change).peak == size
