"""What a run is said to need, against what it takes."""

import json
import re
import shutil
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from families import FAMILIES, sides_of
from given import data_of
from tiers import tiers
from typer.testing import CliRunner
from vlms import vlm_folder

from benchmarks.perf import hardware_guide
from flowbp.cli import app
from flowbp.cli.console import print_estimate
from flowbp.config import TrainConfig
from flowbp.config.sizes import parse_memory_size
from flowbp.estimate import (
    Advice,
    Estimate,
    Fastest,
    Speed,
    advise_settings,
    estimate_run,
    fastest_that_fits,
    measure_run,
    speed_of,
)
from flowbp.estimate.advice import DRASTIC, MAX_ADVISED, SWITCHES, harmless_settings
from flowbp.rewards import RewardConfig
from flowbp.rewards.loading import modules_of
from flowbp.training import loop, preflight
from flowbp.training.loading import LoadedModels, load_models
from flowbp.training.progress import NullReporter
from imgen_common import hub
from imgen_common.config import load
from imgen_common.devices import PEAK_TFLOPS, find_card
from imgen_common.errors import UserError
from imgen_common.memory import LiveBytes, held, nbytes
from imgen_common.run_folder.folder import RunFolder

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
    "checkpointing": ["model.recompute=all"],
    "selective": ["model.recompute=selective"],
    "bfloat16": ["model.dtype=bfloat16"],
    "bfloat16, cast": ["model.dtype=bfloat16", "model.working_copy=false"],
    "chunks": ["method=flowbp_sparse", "active_steps_per_forward=3", "total_batch_size=8"],
    "bfloat16 adapters": ["model.dtype=bfloat16", "lora.rank=4"],
    "kept graphs": ["keep_graphs=2"],
    "kept graphs, guided": ["keep_graphs=3", "guidance_scale=2", "model.height=64", "model.width=64"],
    "rewards in parts": ["reward_batch_size=2"],
    "autoencoder in parts": ["model.vae.gradient_checkpointing=true", "model.vae.tile=16", "offload_trajectory=true"],
}


def config_of(*sets: str) -> TrainConfig:
    return load(TrainConfig, [], [*SMALL, *sets])


@cache
def estimated(*sets: str, count: int = 1) -> Estimate:
    return estimate_run(preflight.check_run(config_of(*sets), count))


@pytest.mark.parametrize("case", tiers(CASES, slow=["adapters"]))
def test_the_peak_of_an_update_is_what_was_said(case: str) -> None:
    taken, _ = measure_run(config_of(*CASES[case]), torch.device("cpu"))
    assert estimated(*CASES[case]).update_peak == pytest.approx(taken, rel=0.1)


@pytest.mark.exhaustive
def test_source_images_are_counted() -> None:
    plain, edits = estimated(), estimated("data.prompts=builtin:shapes/edits")
    assert edits.activation["encoding sources"] > 0
    assert "encoding sources" not in plain.activation
    assert edits.activation["rollout"] > plain.activation["rollout"]
    assert edits.flops > 1.2 * plain.flops  # 64 tokens of a source beside 16 of the image


@pytest.mark.parametrize("folder", tiers(FAMILIES, slow=["flux2"]), indirect=True)
def test_every_family_is_traced(folder: Path) -> None:
    sets = [
        f"model.ref={folder}",
        *(f"model.{side}={pixels}" for side, pixels in sides_of(folder).items()),
        "method=refl",
        "method.active.num_active_steps=2",
        *data_of(folder.name),
    ]
    found = estimated(*sets)
    assert found.flops > 0
    assert all(size > 0 for size in found.activation.values())
    assert not found.untraced


def without_weights(folder: Path, place: Path) -> Path:
    """The descriptions of a model alone."""
    return shutil.copytree(folder, place / folder.name, ignore=shutil.ignore_patterns("*.safetensors"))


@pytest.mark.slow
def test_of_a_vision_language_model_the_weights_are_counted(tmp_path: Path) -> None:
    """What it holds on top depends on its answers."""
    accept = {"kind": "text", "begins": "y"}
    folder = vlm_folder("qwen3_vl", tmp_path / "vlm", {"kind": "sampled", "accept": accept})
    sets = ["rewards.0.score=vlm", f"rewards.0.ref={folder}"]
    found = estimated(*sets)
    assert found.untraced == ("reward",)
    vlm, heldout = (nbytes(held(modules_of([scorer.load()]))) for scorer in config_of(*sets).scorers)
    assert found.static["rewards"] == pytest.approx(vlm / 2 + heldout, rel=0.01)  # in bfloat16, as on a GPU


@pytest.mark.exhaustive
def test_weights_are_not_needed_to_estimate(tmp_path: Path) -> None:
    """Of generator, reward and held-out reward; the same answer as with them, and training still asks for them."""
    keys = {"generator": "model.ref", "reward": "rewards.0.ref", "heldout": "heldout.0.ref"}
    refs = [f"{key}={without_weights(hub.WEIGHTS / name, tmp_path)}" for name, key in keys.items()]
    assert not list(tmp_path.rglob("*.safetensors"))
    for name, ref in zip(keys, refs, strict=True):
        with pytest.raises(UserError, match=rf"{name}.*: half-downloaded model: no model\.safetensors"):
            preflight.check_run(config_of(ref), 1)
    assert estimate_run(preflight.check_run(config_of(*refs), 1, estimate_only=True)) == estimated()


@pytest.mark.exhaustive
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


@pytest.mark.exhaustive
def test_operations_are_counted() -> None:
    """Twice the images, twice the operations; micro-batches and chunks change nothing."""
    one, two = estimated().flops, estimated("total_batch_size=8").flops
    assert two == pytest.approx(2 * one, rel=0.01)
    assert estimated("per_device_batch_size=2").flops == pytest.approx(one, rel=0.01)
    sparse = estimated("method=flowbp_sparse").flops
    assert estimated("method=flowbp_sparse", "active_steps_per_forward=3").flops == pytest.approx(sparse, rel=0.01)


@pytest.mark.exhaustive
def test_sharding_lowers_what_it_shards() -> None:
    whole = estimated(count=4).static
    for kind, weights in (("fsdp2", 4), ("zero2", 1)):
        cut = estimated(f"distributed.kind={kind}", count=4).static
        assert cut["trained weights"] == whole["trained weights"] // weights
        assert cut["AdamW"] == whole["AdamW"] // 4


@pytest.mark.parametrize("text", ["24GB", "24 GiB", "1.5GiB", "24000000000", "24g", "24Gi"])
def test_sizes(text: str) -> None:
    known = {"24GB": 24 * 10**9, "24 GiB": 24 * 2**30, "1.5GiB": 3 * 2**29, "24000000000": 24 * 10**9}
    known |= {"24g": 24 * 10**9, "24Gi": 24 * 2**30}
    assert parse_memory_size(text) == known[text]


@pytest.mark.parametrize("text", ["", "0GB", "24 gigabytes", "-1", "GiB", "24"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match=r"such as 24GiB"):
        parse_memory_size(text)


@pytest.mark.slow
def test_the_command_says_whether_it_fits() -> None:
    sets = [part for text in SMALL for part in ("--set", text)]
    done = CliRunner().invoke(app, ["estimate", "--memory", "8GiB", "--gpus", "2", *sets])
    assert "fits" in done.stdout
    assert "not fit" not in done.stdout


def test_all_that_is_advised_are_settings() -> None:
    assert all(
        config_of("active_steps_per_forward=3", change) != config_of("active_steps_per_forward=3")
        for change in (*SWITCHES, *DRASTIC)
    )


TWO = "[{name: a, ref: builtin:shapes/heldout}, {name: b, ref: builtin:shapes/heldout}]"


@pytest.mark.parametrize(
    ("sets", "rewards"),
    [
        ([], ["heldout.0", "rewards.0"]),
        (["heldout=[]"], ["rewards.0"]),
        ([f"heldout={TWO}"], ["heldout.0", "heldout.1", "rewards.0"]),
    ],
)
def test_the_precision_of_every_reward_is_tried(sets: list[str], rewards: list[str]) -> None:
    plain = config_of(*sets)
    changes = [change for change in harmless_settings(plain) if change not in SWITCHES]
    assert changes == [f"{name}.storage_dtype=float16" for name in rewards]
    assert all(config_of(*sets, change) != plain for change in changes)


@pytest.mark.exhaustive
def test_the_command_says_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three settings, the last of which needs processes."""
    tried = ("model.gradient_checkpointing=true", "lora.rank=16")
    monkeypatch.setattr("flowbp.estimate.advice.SWITCHES", (*tried, "distributed.kind=fsdp2"))
    monkeypatch.setattr("flowbp.estimate.advice.DRASTIC", ())
    sets = [part for text in SMALL for part in ("--set", text)]
    done = CliRunner().invoke(app, ["estimate", "--memory", "20MB", "--json", *sets])
    content = json.loads(done.stdout)
    for change in tried:
        assert f"trying {change} ..." in done.stderr.splitlines()  # not on a terminal
    assert content["fits"] is False
    assert content["peak"] == estimated().peak > 20e6
    alone = content["advice"]["alone"]
    assert 1 <= len(alone) <= MAX_ADVISED
    assert all(size < content["peak"] for size in alone.values())
    assert content["advice"]["together"] <= min(alone.values()) < 0.99 * content["peak"]
    for change, size in alone.items():
        assert estimated(change).peak == size


# --- order of loading, advice, speed ---------------------------------------------------------------------------------


PEAKS = {
    "": {"startup": 90, "rollout": 30, "evaluation": 80},
    "model.gradient_checkpointing=true": {"startup": 90, "rollout": 10, "evaluation": 80},
    "eval.batch_size=1": {"startup": 90, "rollout": 30, "evaluation": 40},
    "data.embeddings=disk": {"startup": 45, "rollout": 30, "evaluation": 80},
    "heldout.0.storage_dtype=float16": {"startup": 89, "rollout": 29, "evaluation": 79},
    "lora.rank=16": {"startup": 10, "rollout": 10, "evaluation": 10},
}
"""Bytes by phase with one setting each."""


BY_WORTH = (
    *("data.embeddings=disk", "eval.batch_size=1", "model.gradient_checkpointing=true"),
    *("heldout.0.storage_dtype=float16", "lora.rank=16"),
)


def estimate_of(phases: dict[str, int]) -> Estimate:
    stages = {name: size for name, size in phases.items() if name != "startup"}
    return Estimate(
        {"": 0}, stages, {"": phases["startup"]}, kept_graph=0, host=0, embeddings=0, flops=0, sent=0, untraced=()
    )


@pytest.mark.parametrize(
    ("limit", "chosen", "together"),
    [
        (85, ["data.embeddings=disk"], 80),  # enough with one; what saves little is not advised
        (50, ["data.embeddings=disk", "eval.batch_size=1"], 45),  # the second lowers nothing alone
        (20, list(BY_WORTH), 0),
        (100, None, None),
    ],
)
def test_settings_are_advised_that_lower_the_peak_together(
    monkeypatch: pytest.MonkeyPatch, limit: int, chosen: list[str] | None, together: int | None
) -> None:
    """Each phase is lowered by what the settings save of it; one that changes what is trained comes last."""

    def estimate(changes: tuple[str, ...]) -> Estimate:
        saved = {
            name: sum(size - PEAKS.get(change, PEAKS[""])[name] for change in changes)
            for name, size in PEAKS[""].items()
        }
        return estimate_of({name: max(0, size - saved[name]) for name, size in PEAKS[""].items()})

    monkeypatch.setattr("flowbp.estimate.advice.check_run", lambda config, count, estimate_only: config)
    monkeypatch.setattr("flowbp.estimate.advice.estimate_run", lambda config: estimate(tuple(config)))
    monkeypatch.setattr(
        "flowbp.estimate.advice.harmless_settings", lambda config: [c for c in PEAKS if c and c[:4] != "lora"]
    )
    monkeypatch.setattr("flowbp.estimate.advice.DRASTIC", ("lora.rank=16",))
    said: list[str] = []
    found = advise_settings(lambda changes: list(changes), 1, limit, estimate_of(PEAKS[""]), said.append)  # type: ignore[arg-type,return-value]
    if chosen is None:
        assert found is None
        assert not said
        return
    assert isinstance(found, Advice)
    assert list(found.alone) == chosen
    assert found.together == together
    assert said[0] == "trying model.gradient_checkpointing=true ..."
    assert len(said) <= len(PEAKS)  # each once, and all together


@pytest.mark.parametrize(
    ("alone", "together"),
    [
        ({"eval.batch_size=1": 0, "data.embeddings=disk": 0}, 0),
        ({"eval.batch_size=1": 4, "data.embeddings=disk": -40}, 4),  # less than a hundredth of the peak
        ({"eval.batch_size=1": 200, "data.embeddings=disk": 100}, 0),  # the two exclude each other
        ({"eval.batch_size=1": 30, "data.embeddings=disk": 30}, -5),
    ],
)
def test_settings_that_lower_nothing_are_not_advised(
    monkeypatch: pytest.MonkeyPatch, alone: dict[str, int], together: int
) -> None:
    """alone, together: bytes that they save of each phase."""

    def estimate(changes: list[str]) -> Estimate:
        saved = alone[changes[0]] if len(changes) == 1 else together
        return estimate_of({"startup": 1000 - saved, "rollout": 500 - saved})

    monkeypatch.setattr("flowbp.estimate.advice.check_run", lambda config, count, estimate_only: config)
    monkeypatch.setattr("flowbp.estimate.advice.estimate_run", estimate)
    monkeypatch.setattr("flowbp.estimate.advice.harmless_settings", lambda config: list(alone))
    monkeypatch.setattr("flowbp.estimate.advice.DRASTIC", ())
    base = estimate_of({"startup": 1000, "rollout": 500})
    assert advise_settings(lambda changes: list(changes), 1, 100, base) is None  # type: ignore[arg-type,return-value]


def test_rewards_are_loaded_after_the_text_encoders_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and in the estimate."""
    config = config_of("eval.num_prompts=2", "eval.quick_num_prompts=2", "max_train_steps=1")
    models: list[LoadedModels] = []

    def load_models_first(*given: Any, **named: Any) -> LoadedModels:
        models.append(load_models(*given, **named))
        assert not models[0].rewards
        assert models[0].backbone.pipe.text_encoder is not None
        return models[0]

    def stop(*_: object) -> None:
        assert models[0].backbone.pipe.text_encoder is None
        raise UserError("stopped here")

    monkeypatch.setattr(loop, "load_models", load_models_first)
    monkeypatch.setattr(loop, "load_rewards", stop)
    with RunFolder.create(tmp_path / "run", config, ["test"]) as run, pytest.raises(UserError, match="stopped here"):
        loop.train(config, run, Accelerator(cpu=True), NullReporter())


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3090 Ti", "RTX 3090 Ti"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("H100 NVL", "H100 NVL"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A10G", None),
        ("NVIDIA H100 PCIe MIG 1g.10gb", None),
        ("NVIDIA H200 NVL", None),
        ("Tesla V100-SXM2-16GB", None),
        ("", None),
    ],
)
def test_cards_by_their_names(name: str, card: str | None) -> None:
    assert find_card(name) == card


def test_the_speed_is_that_of_the_named_card(monkeypatch: pytest.MonkeyPatch) -> None:
    assert speed_of("4090", None) == Speed(82.5, "half the peak of RTX 4090")
    assert speed_of("H100", 500.0) == Speed(500.0, "as given")
    assert all(
        speed_of(card, None) == Speed(peak / 2, f"half the peak of {card}") for card, peak in PEAK_TFLOPS.items()
    )
    with pytest.raises(UserError, match=r"--gpu RTX 4900: not known; did you mean 'RTX 4090'.*give --tflops"):
        speed_of("RTX 4900", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert speed_of(None, None) == "not estimated: torch sees no GPU; name one with --gpu, or give --tflops"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L40")
    assert speed_of(None, None) == Speed(90.5, "half the peak of L40")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T1000")
    assert str(speed_of(None, None)).startswith("not estimated: the peak of NVIDIA T1000 is not known here")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0008, "105 updates: 0.084 s"),
        (0.05, "105 updates: 5.2 s"),
        (2.0, "105 updates: 3 min 30 s"),
        (1037.4, "17 min 17 s at 82.5"),
    ],
)
def test_short_times_have_digits(capsys: pytest.CaptureFixture[str], seconds: float, said: str) -> None:
    sizes = {"static": {"a": 1}, "activation": {}, "startup": {}, "peak": 1, "host": 0, "embeddings": 1, "disk": 1}
    work = {"gradient_accumulation_steps": 1, "updates": 105, "tflop_per_update": 1.0, "tflops": 82.5, "speed": "why"}
    work["bytes_sent_per_update"] = 0
    print_estimate(
        sizes | work | {"seconds_per_update": seconds, "licenses": {}, "untraced": [], "counted_for": "cuda"}
    )
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("ref", ["builtin:shapes/reward", "builtin:shapes/heldout"])
def test_a_reward_stored_in_float16_scores_as_it_prints(ref: str) -> None:
    whole, half = (RewardConfig(ref=ref, storage_dtype=dtype).load() for dtype in (None, "float16"))
    for reward in (whole, half):
        noise = torch.Generator().manual_seed(0)
        for layer in (m for m in reward.model.modules() if isinstance(m, torch.nn.Linear)):
            rounded = layer.weight.data + 1e-3 * torch.randn(layer.weight.shape, generator=noise)
            if reward is half:
                layer.parametrizations.weight.original.copy_(rounded)
            else:
                layer.weight.data = rounded
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    prompts = ["a red circle", "two blue crosses"] * 2
    scores = [reward(images, prompts) for reward in (whole, half)]
    assert not torch.equal(*scores)
    assert torch.allclose(*scores, rtol=1e-3)
    first, second = (torch.autograd.grad(found.sum(), images)[0] for found in scores)
    assert (first - second).norm() < 1e-2 * first.norm()
    sizes = [nbytes(held(modules_of([reward]))) for reward in (whole, half)]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "fp16"])
def test_other_precisions_are_refused(dtype: str) -> None:
    with pytest.raises(UserError, match=r"heldout\.0\.storage_dtype"):
        config_of(f"heldout.0.storage_dtype={dtype}")


def test_hpsv3_keeps_its_own_precision() -> None:
    with pytest.raises(UserError, match="hpsv3 has a precision of its own; set it to null"):
        config_of("heldout=[{score: hpsv3, ref: rewards/hpsv3, name: hpsv3, storage_dtype: float16}]")


MEMORY = re.compile(r"[0-9]+ GPUs? of ([0-9]+) GB|one GPU of ([0-9]+) GB")
LARGE = sorted(path for path in hardware_guide.RECIPES.rglob("*.yaml") if path.parent.name != "miniature")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published models without weights."""
    folder = tmp_path_factory.mktemp("models")
    hardware_guide.write_models(folder)
    return folder


@pytest.mark.parametrize("recipe", LARGE, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_says_which_memory_it_needs(recipe: Path) -> None:
    assert MEMORY.search(recipe.read_text().splitlines()[0])


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "recipe", [path for path in LARGE if path.stem != "common"], ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_a_recipe_fits_into_the_memory_that_it_says(recipe: Path, models: Path) -> None:
    """With a tenth to spare, by its estimate at published sizes."""
    said = MEMORY.search(recipe.read_text().splitlines()[0])
    assert said is not None
    gigabytes, gpus = int(said[1] or said[2]), 1 if said[2] else 8
    found = hardware_guide.estimate_recipe(models, recipe.parent.name, recipe.stem, gpus)
    assert 1.1 * found.peak <= gigabytes * 1e9, found.phases


@pytest.mark.exhaustive
def test_the_fastest_setting_that_fits_is_said() -> None:
    """All graphs where there is room, fewer with less, and what fits is what its estimate says."""

    def config_with(changes: Sequence[str]) -> TrainConfig:
        return config_of(*wide, *changes)

    def fastest(limit: int) -> Fastest | None:
        return fastest_that_fits(config_with, 1, limit, base)

    wide = ("model.height=64", "model.width=64", "eval.batch_size=1", "reward_batch_size=1")
    base = estimated(*wide)
    ample = fastest(10 * base.peak)
    assert ample is not None
    assert ample.settings == ("model.recompute=none", "keep_graphs=3")
    assert ample.relative < 1
    tight = fastest(ample.peak - 1)
    assert tight is not None
    assert tight.peak == estimated(*wide, *tight.settings).peak < ample.peak
    assert ample.relative < tight.relative
    assert fastest(1) is None
