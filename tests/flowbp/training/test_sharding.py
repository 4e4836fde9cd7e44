"""Several processes that cut the weights up between them make the update of one that holds them all."""

import atexit
import gc
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from families import FAMILIES, folder_of, sides_of
from forking import command, forked
from given import data_of, prompt_for, shrink_sources
from safetensors.torch import load_file, save_file
from tiers import tiers
from torch import Tensor, distributed

from flowbp.config import TrainConfig
from flowbp.estimate import estimate_run
from flowbp.training.loading import load_models
from flowbp.training.preflight import check_launcher, check_run
from flowbp.training.state import full_tensor
from flowbp.training.trainer import Trainer
from imgen_common.config import load
from imgen_common.errors import UserError
from imgen_common.run_folder.checkpoints import Tensors, find_checkpoints, load_checkpoint, save_checkpoint
from imgen_common.run_folder.folder import RunFolder

TOLERANCE = 1e-5
ANCHOR = "regularise.weight=20"
"""Its base is evaluated between the forwards that a sharded network counts."""
CASES = {
    "fsdp2": {
        "full": ["distributed.kind=fsdp2"],
        "each-step": ["distributed.kind=fsdp2", "distributed.sync=step", "per_device_batch_size=1"],
        "lora": ["distributed.kind=fsdp2", "lora.rank=4", "active_steps_per_forward=2", ANCHOR],
        "checkpointing": ["distributed.kind=fsdp2", "model.gradient_checkpointing=true"],
        "edits": ["distributed.kind=fsdp2", "data.prompts=builtin:shapes/edits"],
    },
    "zero": {
        "zero2": ["distributed.kind=zero2"],
        "zero3": ["distributed.kind=zero3"],
        "zero2-lora": [
            "distributed.kind=zero2",
            "distributed.sync=step",
            "lora.rank=4",
            "per_device_batch_size=1",
            ANCHOR,
        ],
        "zero3-lora": [
            "distributed.kind=zero3",
            "distributed.sync=step",
            "lora.rank=4",
            "active_steps_per_forward=2",
            ANCHOR,
        ],
    },
}
ALL_CASES = "sd3"  # the family that runs every case and resumes; the others run those below
OTHERS = ("checkpointing", "each-step", "zero3", "zero2-lora")
SLOW = ("full", "lora")
"""Cases of the first family that run in the slow tier; all others but that of edits are exhaustive."""
EDITS = ("flux2", "edits")
PROMPTS = ["a red circle", "two blue crosses", "a green square"]
SMALL = [
    "method=refl",
    "method.active.num_active_steps=2",
    "num_inference_steps=4",
    "total_batch_size=2",
    "lora.rank=2",
]
SMALL += ["max_train_steps=2", "eval.guidance_scale=[1.0]", "eval.num_prompts=3", "eval.num_inference_steps=2"]
"""A run of the command that takes seconds."""


def config_of(folder: Path, *sets: str) -> TrainConfig:
    # a large eps and rate: AdamW divides by the root of the second moment, which magnifies rounding where that is
    # small, and a small step drowns in the rounding of the weight it is added to
    common = [f"model.ref={folder}", "num_inference_steps=4", "total_batch_size=4"]
    common += [f"model.{side}={pixels}" for side, pixels in sides_of(folder).items()]
    common += [
        "optim.learning_rate=0.01",
        "optim.eps=0.01",
        "optim.lr_warmup_steps=0",
        "method=flowbp_bridge",
        "guidance_scale=1.5",
    ]
    common += ["method.active.num_active_steps=3", "eval.num_inference_steps=2", "eval.batch_size=1"]
    return load(TrainConfig, [], [*common, *data_of(folder.name), *sets])


def fresh(config: TrainConfig, accelerator: Accelerator) -> Trainer:
    return Trainer(config, load_models(config, accelerator.device, is_main=accelerator.is_main_process), accelerator)


def trained(config: TrainConfig, accelerator: Accelerator, resume: Tensors | None = None) -> Trainer:
    trainer = fresh(config, accelerator)
    if resume is not None:
        trainer.restore(1, resume)
    while trainer.update < 2:
        trainer.step()
    return trainer


def flat(trainer: Trainer) -> dict[str, Tensor]:
    """State and scores after the updates; whole on the main process."""
    with trainer.state.ema_weights():
        prompts = [prompt_for(trainer.models.backbone, text) for text in PROMPTS]
        scores = trainer.evaluate(prompts, "", 1.5).scores
    state = {
        f"{group}/{name}": full_tensor(t)
        for group, tensors in trainer.state.state_dict().items()
        for name, t in tensors.items()
    }
    return {**state, **{f"score/{name}": torch.tensor(values) for name, values in scores.items()}}


def change(state: dict[str, Tensor], base: dict[str, Tensor], group: str) -> Tensor:
    """How far a group of tensors has moved from the base weights."""
    return torch.cat([(state[f"{group}/{name}"] - base[name]).double().flatten() for name in sorted(base)])


def is_slow(family: str, case: str) -> bool:
    return (family == ALL_CASES and case in SLOW) or (family, case) == EDITS


def cases(library: str) -> list[tuple[str, str]]:
    """Families, and what each runs of a library."""
    found = [(f, case) for f in FAMILIES for case in CASES[library] if f == ALL_CASES or case in OTHERS]
    return [one for one in found if one[1] != EDITS[1]] + [EDITS] * (EDITS[1] in CASES[library])


def by_tier(library: str) -> list[Any]:
    """The cases as parameters of a test."""
    tiers = {True: pytest.mark.slow, False: pytest.mark.exhaustive}
    return [pytest.param(*case, marks=tiers[is_slow(*case)]) for case in cases(library)]


@cache
def results(library: str, slow: bool) -> Path:
    """What two processes made of the cases of a library in one tier."""
    place = Path(mkdtemp())
    atexit.register(shutil.rmtree, place)
    for family in FAMILIES:
        folder_of(family, place)
    forked(2, _worker, place, library, slow, log=place / "log")
    return place


def check_one_process(library: str, family: str, case: str) -> None:
    place = results(library, is_slow(family, case))
    config = config_of(place / family, *CASES[library][case], "distributed.kind=ddp")
    parts = load_models(config, torch.device("cpu"))
    unused = parts.backbone.unused_layers  # without a gradient; DeepSpeed has moments of them and lets them decay
    base = {name: p.detach().clone() for name, p in parts.parameters.items() if not name.startswith(unused)}
    one, two = flat(trained(config, Accelerator(cpu=True))), load_file(place / f"{family}-{case}.safetensors")
    moments = tuple(f"optimizer/{name}" for name in unused)
    assert one.keys() == {name for name in two if name in one or not name.startswith(moments)}
    for group in ("weights", "ema"):
        ours, theirs = change(one, base, group), change(two, base, group)
        assert ours.norm() > 0
        assert (ours - theirs).norm() < TOLERANCE * ours.norm()
    for name in one:
        if name.startswith(("optimizer/", "score/")):
            assert torch.allclose(one[name].double(), two[name].double(), rtol=1e-3, atol=1e-5), name


def check_resume(library: str, case: str) -> None:
    place = results(library, is_slow(ALL_CASES, case))
    whole, again = (load_file(place / f"{ALL_CASES}-{case}{end}.safetensors") for end in ("", "-resumed"))
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize(("family", "case"), by_tier("fsdp2"))
def test_two_processes_under_fsdp2_equal_one(family: str, case: str) -> None:
    check_one_process("fsdp2", family, case)


@pytest.mark.slow
def test_a_run_under_fsdp2_resumes_exactly() -> None:
    check_resume("fsdp2", "full")


@pytest.mark.parametrize("case", tiers(sorted(set(CASES["fsdp2"]) - {EDITS[1]}), slow=["lora"]))
def test_what_processes_send_is_what_was_estimated(case: str) -> None:
    place = results("fsdp2", case in SLOW)
    job = check_run(config_of(place / ALL_CASES, *CASES["fsdp2"][case]), 2, estimate_only=True)
    assert float((place / f"{case}.sent").read_text()) == pytest.approx(estimate_run(job).sent, rel=0.02)


@pytest.mark.parametrize(("family", "case"), by_tier("zero"))
def test_two_processes_under_zero_equal_one(family: str, case: str) -> None:
    check_one_process("zero", family, case)


@pytest.mark.parametrize("case", tiers(["zero2", "zero3"]))
def test_a_run_under_zero_resumes_exactly(case: str) -> None:
    check_resume("zero", case)


def test_a_launcher_that_does_not_fit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"distributed.kind fsdp2: needs processes; start it with torchrun"):
        check_launcher("fsdp2", {})
    with pytest.raises(UserError, match=r"asks for FSDP; flowbp shards weights itself.*distributed.kind=fsdp2"):
        check_launcher("ddp", {"RANK": "0", "ACCELERATE_USE_FSDP": "true"})
    quiet = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}
    with pytest.raises(UserError, match=r"several processes were asked for and one was started.*--multi_gpu"):
        check_launcher("ddp", quiet)
    check_launcher("ddp", quiet | {"RANK": "0"})
    check_launcher("ddp", quiet | {"MASTER_ADDR": "node17"})  # which accelerate was started with
    check_launcher("ddp", {"ACCELERATE_MIXED_PRECISION": "no"})
    check_launcher("ddp", {})
    for alone in ({"RANK": "0"}, {"SLURM_PROCID": "1"}, {"SLURM_STEP_NUM_TASKS": "1"}):
        check_launcher("ddp", {"SLURM_STEP_NUM_TASKS": "8", **alone})
    assert capsys.readouterr().err == ""
    check_launcher("ddp", {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0"})
    assert "srun started 8 processes that do not know of each other" in capsys.readouterr().err
    check_launcher("zero3", {"RANK": "0", "ACCELERATE_USE_FSDP": "false"})


@pytest.mark.parametrize("kind", tiers(["fsdp2", "zero2"], slow=["fsdp2"]))
def test_a_sharded_run_goes_on_with_one_process(tmp_path: Path, kind: str) -> None:
    """Through the command: three prompts on two processes, then from its checkpoint without them."""
    common = [*SMALL, "eval.every=1", "eval.quick_num_prompts=3", "eval.batch_size=1"]
    words = ["flowbp", "train", "--runs", str(tmp_path)]
    changes = [f"--set={text}" for text in (*common, f"distributed.kind={kind}")]
    resumed = ["--resume", "flowbp", "--set=distributed.kind=ddp", "--set=max_train_steps=3"]
    forked(2, command, *words, *changes, "--set=name=flowbp", log=tmp_path / "log")
    newest = max(find_checkpoints(tmp_path / "flowbp" / "checkpoints").values())
    shards = ["shard-00001-model-00001-of-00001.safetensors", "shard-00002-model-00001-of-00001.safetensors"]
    assert sorted(file.name for file in newest.glob("weights/*")) == (shards if kind == "fsdp2" else [])
    exported = [
        "export",
        str(tmp_path / "flowbp"),
        "--to",
        "diffusers",
        "--weights",
        "last",
        "--out",
        str(tmp_path / "out"),
    ]
    forked(1, command, "flowbp", *exported, log=tmp_path / "log")
    adapter = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    weights = load_checkpoint({2: newest}, 2).tensors["weights"]
    assert sum(map(torch.numel, adapter.values())) == sum(map(torch.numel, weights.values())) > 0
    forked(1, command, *words, *resumed, log=tmp_path / "log")
    run = RunFolder.open(tmp_path / "flowbp", is_main=False)
    assert [line["step"] for line in run.metrics() if "train/loss" in line] == [1, 2, 3]
    assert (tmp_path / "flowbp" / "report.html").exists()


@pytest.mark.slow
def test_accelerate_launch_starts_two_processes_without_a_gpu(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    words = [*launcher, "--main_process_port", "0", "-m", "flowbp", "train", "--runs", str(tmp_path), "--json"]
    done = subprocess.run(
        [*words, *(f"--set={s}" for s in (*SMALL, "eval.every=0", "name=run"))],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count('"event": "done"') == 1  # one process tells
    run = RunFolder.open(tmp_path / "run", is_main=False)
    assert [line["step"] for line in run.metrics() if "train/loss" in line] == [1, 2]


def count_sent(call: Callable[[], object]) -> float:
    """Bytes that this process sends in a call, where collectives go round in a ring."""
    sent, share = 0.0, 1 - 1 / distributed.get_world_size()

    def counting(name: str) -> Callable[..., Any]:
        real = getattr(distributed, name)

        def counted(*given: Any, **named: Any) -> Any:
            nonlocal sent
            tensors = [value for value in (*given, *named.values()) if isinstance(value, Tensor)]
            sent += (2 if name == "all_reduce" else 1) * share * max(one.nbytes for one in tensors)
            return real(*given, **named)

        return counted

    with pytest.MonkeyPatch.context() as patched:
        for name in ("all_gather_single", "reduce_scatter_single", "all_reduce"):
            patched.setattr(distributed, name, counting(name))
        call()
    return sent


def _worker(place: Path, library: str, slow: bool) -> None:
    torch.set_num_threads(1)
    shrink_sources(pytest.MonkeyPatch())  # to the end of the process
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2

    def keep(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        file = place / f"{name}.safetensors"
        if accelerator.is_main_process:
            save_file({key: value.contiguous() for key, value in tensors.items()}, file)
        accelerator.wait_for_everyone()
        return load_file(file)

    gc.freeze()  # DeepSpeed collects garbage at every gathering, and would walk through all that was imported
    for family, case in (one for one in cases(library) if is_slow(*one) == slow):
        config = config_of(place / family, *CASES[library][case])
        keep(f"{family}-{case}", flat(trained(config, accelerator)))
        if (family, library) == (ALL_CASES, "fsdp2"):
            sent = count_sent(fresh(config, accelerator).step)
            if accelerator.is_main_process:
                (place / f"{case}.sent").write_text(str(sent))
        if family == ALL_CASES and len(CASES[library][case]) == 1:
            first = fresh(config, accelerator)
            first.step()
            folder, state = place / f"{family}-{case}-checkpoints", first.state.state_dict()
            save_checkpoint(folder, 1, state, {}, is_main=accelerator.is_main_process)
            accelerator.wait_for_everyone()
            saved = load_checkpoint(find_checkpoints(folder), 1).tensors
            keep(f"{family}-{case}-resumed", flat(trained(config, accelerator, saved)))
    accelerator.end_training()
