"""The commands as a person meets them: help, a whole small run, going on with it, and every mistake in one line."""

import contextlib
import io
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forking
import pytest
import torch
import typer
from PIL import Image
from rich.console import Console

from flowbp import backbones, cli
from flowbp.cli import app, console, options
from flowbp.config import TrainConfig
from flowbp.core.plan import draw_plan
from flowbp.data.prompts import load_prompts
from flowbp.estimate.advice import SWITCHES
from flowbp.evaluation.compare import Change, MeanScore, mean_score
from flowbp.evaluation.evaluate import NotFiniteError
from flowbp.evaluation.results import load_evaluations
from flowbp.methods import METHODS
from flowbp.reports.explain import describe_axes, describe_method, linear_sigmas, methods_table, plan_strip
from flowbp.rewards.losses import Hinge, Sigmoid, reward_losses
from flowbp.training import launch
from flowbp.training.loop import TrainingLoop
from flowbp.training.preflight import unread_prompts
from flowbp.training.progress import (
    JsonLinesReporter,
    LiveReporter,
    TextReporter,
    format_memory,
    make_reporter,
    sparkline,
)
from flowbp.training.runs import MAY_DIFFER, new_run_path
from flowbp.training.trainer import DIVERGED, LOWER, Trainer
from imgen_common import hub
from imgen_common.config import load
from imgen_common.console import format_duration
from imgen_common.errors import UserError
from imgen_common.run_folder.folder import RunFolder
from imgen_common.streams import numpy_generator

COMMANDS = (
    *("train", "init", "estimate", "methods", "explain", "families", "sample", "eval", "benchmark", "table"),
    *("report", "export", "convert-reward", "doctor", "prefetch"),
    "runs",
)
SMALL = (
    *(
        "method=flowbp_sparse",
        "guidance_scale=1",
        "max_train_steps=3",
        "num_inference_steps=4",
        "total_batch_size=2",
        "eval.num_prompts=12",
        "eval.num_inference_steps=2",
        "eval.every=2",
    ),
    *("eval.quick_num_prompts=2", "checkpoint.every=2", "eval.guidance_scale=[1.0, 2.0]"),
)

Call = Callable[..., tuple[int, str, str]]


def sets(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small run, made by the command."""
    root = tmp_path_factory.mktemp("runs")
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(sys, "argv", ["flowbp", "train", "--runs", str(root), *sets(*SMALL)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert not stop.value.code
    (root / "output.txt").write_text(output.getvalue())
    return root / "flowbp_sparse"


def tree(folder: Path) -> dict[str, bytes]:
    """Every file and its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'pydantic', 'numpy', 'rich', 'diffusers', 'matplotlib'}"
    code = f"import sys, flowbp.cli; found = {heavy} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example(flowbp: Call, command: str) -> None:
    code, text, _ = flowbp(command, "--help")
    assert code == 0
    assert "Example:" in text
    assert f"flowbp {command}" in text.partition("Example:")[2]
    assert len(text.partition("Example:")[0]) > 150


def test_commands_stand_under_headings(flowbp: Call) -> None:
    _, text, _ = flowbp("--help")
    headings = [line for line in text.partition("Options:")[2].splitlines() if line.endswith(":") and line[0] != " "]
    assert headings == ["Training:", "Methods and models:", "Evaluation:", "Files:", "This machine:"]
    assert all(text.count(f"\n  {command} ") == 1 for command in COMMANDS)
    assert text.index("Training:") < text.index("\n  train ") < text.index("Methods and models:")


def test_the_examples_are_all_commands() -> None:
    assert tuple(typer.main.get_command(app).commands) == COMMANDS  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train", "--resum", "x"], "--resume"),
        (["explain", "full", "--num-inferense-steps", "3"], "--num-inference-steps"),
        (["explain", "refll"], "did you mean 'refl'?"),
        (["explain", "nothing"], f"allowed: {', '.join(METHODS)}"),
        (["train", "--set", "lorra.rank=2"], "did you mean 'lora'?"),
        (["train", "flowbp_bridge"], "write --set method=flowbp_bridge"),
        (["plan"], "plan: renamed; write estimate"),
        (["sample", "a cat", "--steps=3"], "--steps: renamed; write --num-inference-steps"),
        (["explain", "full", "--picture", "a.png"], "--picture: renamed; write --figure"),
    ],
)
def test_typos_answer_with_the_nearest_name(flowbp: Call, words: list[str], said: str) -> None:
    code, _, errors = flowbp(*words)
    assert code == 2
    assert said in errors


# --- bad input -------------------------------------------------------------------------------------------------------


BAD = {
    "renamed key": (["num_updates=3"], "num_updates=3: renamed; write max_train_steps"),
    "renamed key of a part": (["optim.lr=1e-3"], "optim.lr=1e-3: renamed; write learning_rate"),
    "renamed key of a method": (["method.active.num_steps=3"], "renamed; write num_active_steps"),
    "key of a part that is no longer there": (["guidance.scale=2"], "renamed; write guidance_scale, beside guidance"),
    "unknown key": (["optim.learing_rate=1"], "unknown key"),
    "wrong type": (["max_train_steps=many"], "must be a valid integer, got 'many'"),
    "out of range": (["optim.learning_rate=2"], "must be less than or equal to 1"),
    "batch that is no batch": (["total_batch_size=1000000000000"], "total_batch_size"),
    "prompts without end": (["eval.num_prompts=1000000000000"], "less than or equal to 1000000"),
    "rank without end": (["lora.rank=1000000000"], "less than or equal to 4096"),
    "unknown method": (["method=flowbp_spars"], f"did you mean 'flowbp_sparse'?; allowed: {', '.join(METHODS)}"),
    "unknown kind": (["rewards.0.loss.kind=hing"], "did you mean 'hinge'?"),
    "more active steps than steps": (
        ["method=flowbp_sparse", "num_inference_steps=4", "method.active.num_active_steps=5"],
        "asks for 5 of 4 steps",
    ),
    "alpha above 1": (["method=flowbp_bridge", "method.coupling.alpha=1.5"], "less than or equal to 1, got 1.5"),
    "alpha below 0": (["method=flowbp_bridge", "method.coupling.alpha=-0.5"], "greater than or equal to 0"),
    "missing model": (["model.ref=/no/such/folder"], "no such folder;"),
    "missing model nearby": (["model.ref=./gen2"], f"'./gen2': no such folder in {Path.cwd()}"),
    "unknown builtin": (["rewards.0.ref=builtin:shapes/rewrad"], "did you mean 'builtin:shapes/reward'?"),
    "not a generator": (["model.ref=builtin:shapes/reward"], "not a diffusers pipeline"),
    "missing prompts": (["data.prompts=none.txt"], "no such prompt file"),
    "missing prompts to evaluate": (["eval.prompts=none.txt"], "no such prompt file"),
    "batch that does not divide": (["total_batch_size=5", "per_device_batch_size=2"], "choose a divisor"),
    "picture that does not fit": (["model.height=33"], "multiples of"),
    "adapters that match nothing": (
        ["lora.target_modules=[nothing]"],
        "no linear layer has a name that ends with 'nothing'",
    ),
    "no guidance scale to evaluate": (["eval.guidance_scale=[]"], "eval.guidance_scale"),
    "one guidance scale twice": (["eval.guidance_scale=[2, 1, 2.0]"], "names 2.0 more than once; write each once"),
    "TensorBoard as a tracker": (["trackers=[tensorboard]"], "leave it out, its files are always written"),
    "several files of prompts": (["data.prompts=[a.txt, b.txt]"], "must be one text, not a list, got ['a.txt'"),
    "one tracker twice": (["trackers=[wandb, wandb]"], "names wandb more than once; write each once"),
    "name with a folder": (["name=../elsewhere"], "must be the plain name"),
}


def assert_refused(answer: tuple[int, str, str], said: str) -> None:
    code, output, errors = answer
    assert code == 2
    assert output == ""
    assert errors.startswith("flowbp: error: ")
    assert errors.count("\n") == 1
    assert said in errors


@pytest.mark.parametrize(("pairs", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_reported_in_one_line_and_nothing_is_written(
    flowbp: Call, tmp_path: Path, pairs: list[str], said: str
) -> None:
    assert_refused(flowbp("train", "--runs", tmp_path / "runs", *sets(*pairs)), said)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("content", "said"), [(b"", "holds no prompt"), (b"caf\xe9\n", "not UTF-8 at byte 3")])
def test_bad_prompt_files(flowbp: Call, tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    answer = flowbp("train", "--runs", tmp_path / "runs", *sets(f"data.prompts={tmp_path / 'prompts.txt'}"))
    assert_refused(answer, said)
    assert not (tmp_path / "runs").exists()


def test_a_half_downloaded_model(flowbp: Call, tmp_path: Path) -> None:
    shutil.copytree(hub.resolve("builtin:shapes/generator"), tmp_path / "model")
    weights = next((tmp_path / "model" / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    answer = flowbp("train", "--runs", tmp_path / "runs", *sets(f"model.ref={tmp_path / 'model'}"))
    assert_refused(answer, "half-downloaded model")


def test_a_full_disk_is_noticed_before_anything_is_written(
    flowbp: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert_refused(flowbp("train", "--runs", tmp_path / "runs"), "no room for 3 checkpoints")
    assert_refused(flowbp("train", "--runs", tmp_path / "runs", *sets("max_train_steps=50")), "no room for 2 ")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(total=0, free=0))  # as FUSE may say
    assert flowbp("train", "--dry-run", "--runs", tmp_path / "runs")[0] == 0
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_run_of_another_configuration_is_not_resumed(flowbp: Call, trained: Path) -> None:
    before = tree(trained)
    for pair, said in (("seed=33", "now 33 was given"), ("eval.seed=99", "now 99 was given")):
        assert_refused(flowbp("train", "--resume", trained, *sets(pair)), said)
    assert tree(trained) == before
    assert (trained / "config-at-start.yaml").read_bytes() == (trained / "config.yaml").read_bytes()


@pytest.mark.slow
def test_a_run_is_resumed_where_its_prompts_lie_elsewhere(flowbp: Call, trained: Path, tmp_path: Path) -> None:
    prompts, source = tmp_path / "prompts.txt", RunFolder.open(trained, is_main=False).config(TrainConfig).data.prompts
    prompts.write_text("\n".join(load_prompts(source)))
    resumed = ("train", "--dry-run", "--resume", trained, *sets(f"data.prompts={prompts}"))
    assert flowbp(*resumed)[0] == 0
    prompts.write_text("a red circle")
    assert_refused(flowbp(*resumed), "data.prompts has changed since the run was started")


def test_a_second_process_stays_out(flowbp: Call, trained: Path) -> None:
    before = tree(trained)
    with RunFolder.open(trained):
        assert_refused(flowbp("train", "--resume", trained), "in use by another process")
    assert {k: v for k, v in tree(trained).items() if k != ".lock"} == {k: v for k, v in before.items() if k != ".lock"}


def test_a_run_under_an_explicit_name_is_not_overwritten(flowbp: Call, trained: Path) -> None:
    before = tree(trained)
    assert_refused(flowbp("train", "--runs", trained.parent, *sets(f"name={trained.name}")), "holds a run already")
    assert tree(trained) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["report", "nowhere"], "no such run"),
        (["train", "--resume", "nowhere"], "no such run"),
        (["sample", "x", "--run", "nowhere"], "nowhere: no such run or model; there are no such runs in"),
        (["eval", "nowhere"], "nowhere: no such run or model"),
        (["explain", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--resume", ""], "run '': the name is empty"),
        (["sample", "x", "--run", ""], "model '': no such folder"),
        (["sample", "x", "--model", ""], "model '': no such folder"),
        (["sample", "x", "--run", "", "--model", "y"], "give one of them"),
        (["eval", "builtin:shapes/generator", "--against", ""], "model '': no such folder"),
        (["eval", "builtin:shapes/generator", "--prompts", ""], "not a dataset folder"),
        (["estimate", "--memory", ""], "--memory '': give a number"),
        (["estimate", "--gpu", ""], "--gpu : not known"),
        (["train", "--dry-run", *sets("data.embeddings=disk", f"data.cache={__file__}")], "is a file; name another"),
        (
            ["train", "--dry-run", *sets("data.embeddings=disk", f"data.cache={__file__}/a/b")],
            "is a file; name another",
        ),
        (["sample", "x", "--base"], "is for --run"),
        (["sample", "x", "--set", "model.dtyp=float32"], "did you mean 'dtype'"),
        (["sample", "a cat", ""], "prompt 2 of 2 is empty; say what to draw"),
        (["sample", " \u200b"], "prompt 1 of 1 is empty"),
        (["sample", "x", *sets("eval.seed=1")], "--set eval.seed: is not read here; give --seed"),
        (["benchmark", "x", "--prompts", "p", "--out", "o", *sets("eval.num_prompts=2")], "here; give --num-prompts"),
        (["sample", str(hub.WEIGHTS / "generator" / "model_index.json")], "is a file, and only its name would be read"),
        (["sample", "x", "--guidance-scale", "0"], "above 0"),
        (["eval", "builtin:shapes/nothing"], "unknown model"),
        (["explain", "full", "--figure", "x.gif"], "must end in .png, .svg or .pdf"),
        (["explain", "full", "--shift", "2", "--model", "builtin:shapes/generator"], "give --model or --shift"),
        *(
            (["explain", "full", "--shift", shift], "must be from 0.001 to 1000")
            for shift in ("nan", "inf", "0", "1e-20")
        ),
        (["explain", "full", "--model", "builtin:shapes/nothing"], "unknown model"),
        (["explain", "flowbp_sparse", "--num-inference-steps", "2"], "asks for 3 of 2 steps"),
        (["train", "--resume-from", "last-good"], "give the run by --resume"),
        (["estimate", "--calibrate", "--gpus", "4"], "cannot be compared with --gpus 4"),
        (["prefetch", "builtin:shapes/nothing"], "unknown model"),
        (["convert-reward", "hpsv3x", "a.pt", "out", "--with", "b"], "did you mean 'hpsv3'"),
        (["export", "x", "--to", "difusers"], "did you mean 'diffusers'"),
        (["convert-reward", "hpsv2", "missing.pt", "out", "--with", "b"], "no such file"),
        (["convert-reward", "hpsv3", __file__, "out", "--with", "b"], "needs --prompt-source FILE"),
        (["convert-reward", "hpsv2", __file__, "out", "--with", "b", "--prompt-source", "c.py"], "is for hpsv3"),
    ],
)
def test_bad_words_to_the_other_commands(flowbp: Call, tmp_path: Path, words: list[str], said: str) -> None:
    runs = ["--runs", tmp_path] if words[0] in ("report", "train", "sample", "eval") else []
    assert_refused(flowbp(*words, *runs), said)


@pytest.mark.slow
def test_what_is_wrong_is_said_before_torch_is_imported(tmp_path: Path, trained: Path) -> None:
    """In 10 seconds, which a typo would cost; the first command that imports it ends this test."""
    (tmp_path / "file").touch()
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    benchmark = ["benchmark", "builtin:shapes/generator", "--prompts", str(tmp_path / "prompts.txt"), "--out"]
    wrong = [
        ["train", "--resume-from", "last-good"],
        ["train", "--resume", str(trained), "--set", "max_train_steps=1"],
        ["train", "--runs", str(tmp_path / "file")],
        ["explain", "full", "--model", "builtin:shapes/nothing"],
        ["estimate", "--calibrate", "--gpus", "4"],
        [*benchmark, str(tmp_path / "out"), "--guidance-scale", "nan"],
        [*benchmark, str(trained)],
        ["doctor", "--bundle", str(tmp_path / "file")],
        ["export", str(trained), "--to", "merged", "--push", "a b"],
    ]
    code = "import sys; sys.modules['torch'] = None; sys.argv[1:] = eval(sys.argv[1]); import flowbp.cli as c; c.main()"
    for words in wrong:
        done = subprocess.run([sys.executable, "-c", code, repr(words)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), (words, done.stderr)


@pytest.mark.parametrize(
    ("repo", "variables", "said"),
    [
        ("a b", {"HF_TOKEN": "x"}, "must be ORG/NAME"),
        ("https://huggingface.co/me/x", {"HF_TOKEN": "x"}, "must be ORG/NAME"),
        ("me/x", {"HF_HUB_OFFLINE": "1", "HF_TOKEN": "x"}, "HF_HUB_OFFLINE is set"),
        ("me/x", {}, "needs a token"),
    ],
)
def test_an_upload_that_cannot_succeed_is_refused_before_the_export(
    flowbp: Call, trained: Path, monkeypatch: pytest.MonkeyPatch, repo: str, variables: dict[str, str], said: str
) -> None:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: variables.get("HF_TOKEN"))
    assert_refused(flowbp("export", trained, "--to", "merged", "--push", repo), said)
    assert not (trained / "export-merged").exists()


def test_a_log_has_no_bar_where_a_runner_forces_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    """FORCE_COLOR of CI makes rich take a file for a terminal, in which the bar would be redrawn all the time."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(make_reporter(10, ["reward"], is_main=True, as_json=False), TextReporter)


def test_an_alert_is_shown_as_it_is() -> None:
    """Brackets in it are no markup."""
    text = io.StringIO()
    LiveReporter(1, ["reward"], Console(file=text, width=80)).alert("the reward clip[v2] [/] fell")
    assert text.getvalue() == "! the reward clip[v2] [/] fell\n"


@pytest.mark.parametrize("setting", [*SWITCHES, "keep_graphs=2", "guidance.batched=false", "model.attention=native"])
def test_what_an_estimate_advises_can_be_changed_in_a_resumed_run(tmp_path: Path, setting: str) -> None:
    """After memory ran out, or on another machine; these settings train the same, but for rounding."""
    config = TrainConfig()
    RunFolder.create(tmp_path / "run", config).close()
    changed = load(TrainConfig, [], [setting])
    assert RunFolder.open(tmp_path / "run", changed, is_main=False, may_differ=MAY_DIFFER)


def test_from_python_a_run_is_resumed_with_its_own_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(TrainConfig, [], ["total_batch_size=4", "name=run"])
    RunFolder.create(tmp_path / "run", config).close()

    def check(given: TrainConfig, *_: object) -> None:
        assert given == config
        raise UserError("checked")

    monkeypatch.setattr("flowbp.training.launch.check_training", check)
    with pytest.raises(UserError, match="checked"):
        launch.train(resume=tmp_path / "run")


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "0.00"), (0.0016, "0.0016"), (0.5, "0.50"), (1234.5, "1,234.50"), (3e-7, "3e-07")]
)
def test_small_numbers_of_an_estimate_are_not_hidden(value: float, shown: str) -> None:
    assert console._number(value) == shown


@pytest.mark.parametrize("seed", ["99999999999999999999999", "-9223372036854775809"])
def test_a_seed_out_of_range_is_a_usage_error(flowbp: Call, seed: str) -> None:
    code, _, errors = flowbp("sample", "a", "--seed", seed)
    assert code == 2
    assert "Invalid value for '--seed'" in errors
    assert "Traceback" not in errors


# --- a run from end to end -------------------------------------------------------------------------------------------


def test_a_run_says_what_it_does_and_leaves_a_report(trained: Path) -> None:
    output = (trained.parent / "output.txt").read_text()
    for said in ("update 1/3", "update 3/3", "gradient norm", "s/update", "peak", "Verifier", "95 % interval"):
        assert said in output
    assert "3,000 training prompts, such as\n  " in output
    assert f"run folder: {trained}" in output
    assert (trained / "report.html").read_text().startswith("<!doctype html>")
    assert len(load_evaluations(trained)) == 4


def test_the_environment_names_the_command(trained: Path) -> None:
    command = json.loads((trained / "environment.json").read_text())["command"]
    assert command[:2] == ["flowbp", "train"]


@pytest.mark.slow
def test_a_second_run_gets_a_number_and_resuming_goes_on(flowbp: Call, trained: Path) -> None:
    assert new_run_path(load(TrainConfig, [], SMALL), trained.parent) == trained.with_name(trained.name + "-2")
    code, output, _ = flowbp(
        "train", "--runs", trained.parent, "--resume", trained.name, "--json", *sets("max_train_steps=4")
    )
    assert code == 0
    events = [json.loads(line) for line in output.splitlines()]
    assert [event["update"] for event in events if event["event"] == "update"] == [4]
    assert events[0] == {"event": "start", "run": str(trained), "max_train_steps": 4}
    assert events[-1]["event"] == "done"
    assert {one["guidance"] for one in events[-1]["results"]} == {1.0, 2.0}
    assert RunFolder.open(trained, is_main=False).config(TrainConfig).max_train_steps == 4
    lines = list(RunFolder.open(trained, is_main=False).metrics())
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval/reward" in line] == [0, 2, 4]
    assert [line["step"] for line in lines if "watch/distance" in line] == [2, 4]


@pytest.mark.slow
def test_a_finished_run_is_not_evaluated_again(flowbp: Call, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "evaluate", lambda *given: pytest.fail("evaluated"))
    code, output, _ = flowbp("train", "--resume", trained, "--json")
    assert code == 0
    assert json.loads(output.splitlines()[-1])["event"] == "done"


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_is_not_resumed_to_fewer_updates_than_it_made(flowbp: Call, trained: Path, number: int) -> None:
    answer = flowbp("train", "--resume", trained, *sets(f"max_train_steps={number}"))
    assert_refused(answer, f"max_train_steps {number}: {trained} has made ")


@pytest.mark.slow
def test_what_a_damaged_checkpoint_had_led_to_is_evaluated_anew(flowbp: Call, trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    scores = run / "evaluations" / "trained-g1" / "scores.json"
    before = scores.read_text()
    *_, whole, last = sorted((run / "checkpoints").glob("step-*"))
    (last / "weights.safetensors").write_bytes(b"")
    fewer = sets(f"max_train_steps={int(whole.name.removeprefix('step-'))}")
    code, _, said = flowbp("train", "--resume", run, "--resume-from", "last-good", *fewer, "--json")
    assert code == 0, said
    assert json.loads(scores.read_text()) != json.loads(before)


def test_sampling_edits_images(flowbp: Call, trained: Path, tmp_path: Path) -> None:
    Image.new("RGB", (32, 48), "red").save(tmp_path / "source.png")
    out = tmp_path / "images"
    words = ("sample", "make it green", "--run", trained, "--num-inference-steps", 2, "--num-images", 2, "--out", out)
    assert flowbp(*words)[0] == 0
    assert flowbp(*words, "--image", tmp_path / "source.png")[0] == 0
    plain, edited = (Image.open(out / f"{number}-make-it-green-seed0.png") for number in ("000", "001"))
    assert plain.tobytes() != edited.tobytes()
    plain, edited = (Image.open(out / f"{number}-grid.png") for number in ("000", "001"))
    assert edited.width > plain.width  # the source stands first
    assert_refused(flowbp(*words, "--image", tmp_path / "none.png"), "none.png: cannot be read")


def test_sampling_keeps_files_and_the_base_differs(flowbp: Call, trained: Path, tmp_path: Path) -> None:
    words = [
        "sample",
        "a red circle",
        "--run",
        trained,
        "--num-images",
        2,
        "--num-inference-steps",
        3,
        "--out",
        tmp_path,
    ]
    assert flowbp(*words)[0] == 0
    assert flowbp(*words, "--base")[0] == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    pictures = ["a-red-circle-seed0.png", "a-red-circle-seed1.png", "grid.png"]
    assert names == [f"{n:03d}-{name}" for n in (0, 1) for name in pictures]
    assert (tmp_path / f"000-{pictures[0]}").read_bytes() != b""


@pytest.mark.slow
def test_evaluating_a_run_compares_it_with_its_base(flowbp: Call, trained: Path) -> None:
    code, output, _ = flowbp("eval", trained, "--num-prompts", 6, "--guidance-scale", 1, "--json")
    assert code == 0
    (result,) = json.loads(output)["results"]
    assert (result["before"], result["after"]) == (f"{trained.name} (base)", trained.name)
    assert result["scores"]["reward"]["num"] == 6
    assert set(result["categories"]) == {"single", "position", "two", "relation", "count", "binding"}


def test_evaluating_a_model_alone(flowbp: Call) -> None:
    words = [
        "eval",
        "builtin:shapes/generator",
        "--num-prompts",
        6,
        "--guidance-scale",
        1,
        *sets("eval.num_inference_steps=2"),
    ]
    code, output, said = flowbp(*words)
    assert code == 0
    assert "too few prompts (6) for intervals that say much; give 10 or more" in " ".join(said.split())
    assert "builtin:shapes/generator, 6 prompts" in output
    assert "Verifier" in output


@pytest.mark.parametrize(("words", "said"), [([], True), (["--num-prompts", 6], False)])
def test_evaluating_a_part_of_a_file_by_default_is_said(
    words: list[object], said: bool, flowbp: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(*given: object) -> None:
        raise UserError("was evaluated")

    monkeypatch.setattr("flowbp.evaluation.sampling.evaluate_model", evaluate)
    (tmp_path / "p.txt").write_text("a red circle\n" * 505)
    _, _, errors = flowbp("eval", "builtin:shapes/generator", "--prompts", tmp_path / "p.txt", *words)
    assert "was evaluated" in errors
    config = load(TrainConfig, [], [f"eval.prompts={tmp_path / 'p.txt'}", *(["eval.num_prompts=6"] if words else [])])
    assert any("only its first 504" in note for note in unread_prompts(config)) is said
    assert ("p.txt: only its first 504 prompts are evaluated; eval.num_prompts=N takes more" in errors) is said


def test_the_report_command_writes_the_page_anew(flowbp: Call, trained: Path) -> None:
    (trained / "report.html").unlink()
    assert flowbp("report", trained.name, "--runs", trained.parent)[:2] == (0, f"report: {trained / 'report.html'}\n")
    assert (trained / "report.html").exists()


def test_prefetch_prints_folders(flowbp: Call) -> None:
    code, output, _ = flowbp("prefetch", "builtin:shapes/reward", "builtin:shapes/heldout")
    assert code == 0
    assert len(output.splitlines()) == 2


@pytest.mark.slow
def test_a_dry_run_writes_nothing(flowbp: Call, tmp_path: Path) -> None:
    words = [
        "train",
        "--dry-run",
        "--runs",
        tmp_path / "runs",
        *sets("method=draft_k", "num_inference_steps=25", "guidance_scale=2", "total_batch_size=6", "lora.rank=2"),
    ]
    code, output, errors = flowbp(*words)
    assert code == 0
    assert "  name: draft_k" in output
    assert "trained weights" in output
    assert not errors
    assert re.search(r"3,000 training prompts, such as\n  a green square\n  .*\n  .*\nrun folder: ", output)
    assert re.search(r"adapters on layers to_qkv_mlp_proj +6\b", output)
    (tmp_path / "long.json").write_text(json.dumps(["a red circle " * 9]))
    code, output, errors = flowbp(*words, *sets(f"data.prompts={tmp_path / 'long.json'}"), "--json")
    content: dict[str, Any] = json.loads(output)
    assert [note.partition(" of ")[0] for note in content["notes"]] == ["1"] * 3
    # 3 active steps; without gradient both branches of 25 steps
    assert content["arithmetic"]["evaluations_per_update_with_gradient"] == 6 * 3
    assert content["arithmetic"]["evaluations_per_update_without_gradient"] == 6 * 2 * 25
    assert content["arithmetic"]["lora_layers"]["to_q"] == 2
    assert [term["step"] for term in content["plan"]["terms"]] == [24, 23, 22]
    assert not (tmp_path / "runs").exists()


LONG_PROMPT = "a red circle and a blue square and a blue square and a blue square"
SAID = "longer than the 12 tokens that text_encoder reads"


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "words",
    [
        ("train", *sets(*SMALL, "data.prompts={file}"), "--runs", "{folder}"),
        ("train", *sets(*SMALL, "eval.prompts={file}", "eval.num_prompts=1"), "--runs", "{folder}", "--json"),
        ("train", "--dry-run", *sets("eval.quick_prompts={file}"), "--runs", "{folder}"),
        ("eval", "builtin:shapes/generator", "--prompts", "{file}", *sets("eval.num_inference_steps=2")),
        ("sample", LONG_PROMPT, "--num-images", "1", "--num-inference-steps", "1", "--out", "{folder}"),
        ("benchmark", "builtin:shapes/generator", "--prompts", "{file}", "--out", "{folder}/out"),
    ],
)  # fmt: skip
def test_a_prompt_that_is_cut_is_said(flowbp: Call, tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "long.CSV").write_text(f'id,prompt\n1,"{LONG_PROMPT}"\n')
    code, output, errors = flowbp(*(word.format(file=tmp_path / "long.CSV", folder=tmp_path) for word in words))
    assert code == 0, errors
    assert (output + errors).count(SAID) == 1


def test_other_processes_end_once_the_first_could_say_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", **place}.items():
        monkeypatch.setenv(name, value)
    waited: list[float] = []
    monkeypatch.setattr(options.time, "sleep", waited.append)
    with pytest.raises(typer.Exit), options.report_error_once():
        raise UserError("lr: wrong")
    assert waited == [options.SECONDS_TO_PRINT]
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="lr: wrong"), options.report_error_once():
        raise UserError("lr: wrong")
    assert len(waited) == 1


@pytest.mark.slow
def test_two_processes_share_one_folder(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "-m", "flowbp", "train", "--runs", str(tmp_path), *sets(*SMALL)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("update 3/3") == 1
    assert len(list(tmp_path.iterdir())) == 1
    (run,) = tmp_path.iterdir()
    words, log = ["flowbp", "train", "--runs", str(tmp_path), *sets(*SMALL, f"name={run.name}")], tmp_path / "log"
    assert all(forking.exit_codes(2, forking.command, *words, log=log))
    assert log.read_text().count("flowbp: error: ") == 1


LONG = (*SMALL, "max_train_steps=500", "checkpoint.every=500", "eval.every=0")  # an evaluation would stop too
LONG_EVALUATION = (*LONG, "eval.num_inference_steps=8", "eval.batch_size=4", "eval.num_prompts=600")
LONG_QUICK_EVALUATION = (*LONG, "eval.every=10", "eval.num_inference_steps=8", "eval.batch_size=4")
LONG_QUICK_EVALUATION += ("eval.quick_num_prompts=80",)


@pytest.mark.parametrize(
    ("number", "settings", "moment", "saved"),
    [
        pytest.param(signal.SIGTERM, LONG, "update 10/", range(10, 30), marks=pytest.mark.slow),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in (
                (signal.SIGINT, LONG, "update 10/", range(10, 30)),
                (signal.SIGHUP, LONG, "update 10/", range(10, 30)),
                (signal.SIGTERM, LONG, "loading models", None),
                (signal.SIGTERM, LONG_EVALUATION, "evaluating base", None),
                (signal.SIGTERM, LONG_QUICK_EVALUATION, "update 10/", range(10, 11)),
            )
        ),
    ],
)
def test_signals_save_and_tell_how_to_go_on(
    tmp_path: Path, number: signal.Signals, settings: tuple[str, ...], moment: str, saved: range | None
) -> None:
    command = [sys.executable, "-m", "flowbp", "train", "--runs", str(tmp_path), *sets(*settings)]
    # where the tests run in the background, its signals are ignored, which processes inherit
    obey = partial(signal.signal, number, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=obey)
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith(moment))
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    (run,) = tmp_path.iterdir()
    assert process.returncode == 128 + number
    latest = RunFolder.open(run, is_main=False).latest_checkpoint()
    assert latest is None if saved is None else latest in saved
    said = "before the first checkpoint" if latest is None else f"saved up to update {latest}"
    # and no advice from libraries
    assert errors.endswith(f"\nstopped; {said}; continue with: flowbp train --resume {run}\n")
    assert [line for line in errors.splitlines() if line and not line.startswith("stopp")] == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("settings", [LONG, LONG_QUICK_EVALUATION], ids=["updates", "evaluation"])
def test_a_signal_stops_two_processes_after_the_same_update(tmp_path: Path, settings: tuple[str, ...]) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "-m", "flowbp", "train", "--runs", str(tmp_path), *sets(*settings)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("update 10/"))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    (run,) = tmp_path.iterdir()
    latest = RunFolder.open(run, is_main=False).latest_checkpoint()
    assert latest is not None
    assert latest >= 10
    assert errors.count(f"stopped; saved up to update {latest}; continue with: flowbp train --resume {run}") == 1


@pytest.mark.exhaustive
def test_a_run_goes_on_when_its_reader_is_gone(tmp_path: Path) -> None:
    words = shlex.join([sys.executable, "-m", "flowbp", "train", "--runs", str(tmp_path), *sets(*SMALL)])
    script = f"set -o pipefail; {words} | head -1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    (run,) = tmp_path.iterdir()
    assert RunFolder.open(run, is_main=False).latest_checkpoint() == 3
    assert (run / "report.html").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize(("key", "value"), [("optim.learning_rate", 1e-5), ("optim.max_grad_norm", 0.1)])
def test_a_run_that_diverged_goes_on_with_what_the_message_says(
    flowbp: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str, value: float
) -> None:
    original = Trainer.compute_gradient

    def diverging(trainer: Trainer) -> dict[str, float]:
        metrics, optim = original(trainer), trainer.config.optim
        healthy = trainer.update < 2 or optim.learning_rate < 1e-4 or optim.max_grad_norm < 1
        return metrics if healthy else metrics | {"loss": float("nan")}

    monkeypatch.setattr(Trainer, "compute_gradient", diverging)
    settings = ("--runs", tmp_path, *sets(*SMALL, "checkpoint.every=1"))
    code, _, errors = flowbp("train", *settings)
    run = tmp_path / "flowbp_sparse"
    assert (code, errors) == (
        2,
        "flowbp: error: update 3: not finite: the gradient; lower optim.learning_rate or optim.max_grad_norm; then go "
        f"on from update 2 with: flowbp train --resume {run} --set KEY=VALUE\n",
    )
    first = (run / "config.yaml").read_text()
    assert flowbp("train", "--resume", run, "--set", "guidance_scale=3")[0] == 2  # still refused
    assert flowbp("train", "--resume", run, "--set", f"{key}={value}")[0] == 0
    assert (run / "config-until-000002.yaml").read_text() == first
    assert (run / "config.yaml").read_text() != first
    assert "Configuration until update 2" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("advice", "way"),
    [(LOWER, "then go on from update 2 with: flowbp train"), ("check its weights, or leave it out", "then start anew")],
)
def test_a_resume_is_advised_where_it_helps(tmp_path: Path, advice: str, way: str) -> None:
    run = SimpleNamespace(checkpoints=lambda: [2], path=tmp_path)
    loop: Any = SimpleNamespace(trainer=SimpleNamespace(update=3), run=run)
    said = TrainingLoop._describe_way_on(loop, NotFiniteError("the scores of clip", advice))
    assert said.startswith(f"update 4: not finite: the scores of clip; {advice}; {way}")


@pytest.mark.slow
def test_a_checkpoint_whose_weights_diverged_is_not_gone_on_from(
    flowbp: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def rolled(trainer: Trainer) -> dict[str, float]:
        healthy = trainer.update < 2 or trainer.config.optim.learning_rate < 1e-4
        return original(trainer) | ({} if healthy else {"loss": float("nan")})

    original = Trainer.compute_gradient
    monkeypatch.setattr(Trainer, "compute_gradient", rolled)
    monkeypatch.setattr(Trainer, "find_not_finite", lambda self: NotFiniteError("the network's latents", DIVERGED))
    every = sets(*SMALL, "checkpoint.every=1")
    code, _, errors = flowbp("train", "--runs", tmp_path, *every)
    run = tmp_path / "flowbp_sparse"
    ruined = run / "checkpoints" / "step-000002"
    said = (
        f"lower optim.learning_rate or optim.max_grad_norm; remove {ruined}, which has these weights; then go on from"
    )
    assert (code, f"{said} update 1 with: flowbp train --resume {run} --set KEY=VALUE\n" in errors) == (2, True)
    shutil.rmtree(ruined)
    assert flowbp("train", "--resume", run, "--set", "optim.learning_rate=1e-5")[0] == 0
    alone = flowbp("train", "--runs", tmp_path / "alone", *every, *sets("checkpoint.keep=1"))
    assert (alone[0], "; then start anew, since the only checkpoint has these weights\n" in alone[2]) == (2, True)


# --- methods and plans -----------------------------------------------------------------------------------------------


def test_methods_lists_all_with_their_sources(flowbp: Call) -> None:
    rows = json.loads(flowbp("methods", "--json")[1])
    assert [row["name"] for row in rows] == list(METHODS)
    assert all(row["about"].endswith(".") and row["source"] for row in rows)
    assert "2606.11075" in describe_method("flowbp_bridge")[1]
    code, output, _ = flowbp("methods")
    assert code == 0
    assert all(name in output for name in METHODS)


def test_families_lists_published_models_with_their_recipes(flowbp: Call) -> None:
    rows = json.loads(flowbp("families", "--json")[1])
    assert {row["pipeline"] for row in rows} == set(backbones.FAMILIES)
    recipes = Path(__file__).parents[3] / "configs" / "flowbp"
    found = {recipe: load(TrainConfig, [recipe]).model.ref for recipe in recipes.rglob("lora_*.yaml")}
    assert {row["model"]: row["lora_gb"] for row in rows if row["lora_gb"]} == {
        ref: int(re.search(r"one GPU of (\d+) GB", recipe.read_text())[1]) for recipe, ref in found.items()
    }
    assert {row["max_source_images"] for row in rows if "Kontext" in row["model"]} == {1}
    code, output, _ = flowbp("families")
    assert code == 0
    for row in rows:
        (line,) = (line for line in output.splitlines() if line.startswith(f"{row['model']} "))
        assert row["license"] in line
        assert "not known" not in line


@pytest.mark.parametrize("width", [20, 40, 60])
def test_words_are_whole_on_a_narrow_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(console, "standard_output", lambda: Console(file=out, width=width, highlight=False))
    method = METHODS["flowbp_lagrange"]
    drawn = draw_plan(method, linear_sigmas(25, 3.0), numpy_generator(3, "plan", 0))
    console.print_methods(methods_table())
    console.print_plan(TrainConfig(method=method), drawn, "a plan")
    change = Change(0.2712, 0.2749, 0.0037, 0.0011, 0.0052, 40)
    console.print_comparison({1.0: {"reward": change, "heldout": change}}, 1.0, "base", "trained")
    text = out.getvalue()
    for word in ("flowbp_lagrange", "Held-out", "0.2749", "higher"):
        assert word in text
    if width > 20:
        assert "active steps" in text


@pytest.mark.parametrize("method", METHODS)
def test_explain_shows_every_method(flowbp: Call, method: str) -> None:
    code, output, _ = flowbp("explain", method, "--num-inference-steps", 25, "--seed", 3)
    assert code == 0
    drawn = draw_plan(METHODS[method], linear_sigmas(25), numpy_generator(3, "plan", 0))
    assert all(f"{row['weight']:+.4f}" in output for row in drawn.table())
    assert "what the reward sees" in output


def test_explain_takes_a_recipe(flowbp: Call, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: full\nnum_inference_steps: 9\n")
    code, output, _ = flowbp("explain", recipe)
    levels = "linear noise levels, shift 1 (a run has those of its model: --model builtin:shapes/generator)"
    assert (code, output.splitlines()[0]) == (0, f"full: 9 steps, seed 0, {levels}")


def test_explain_writes_a_figure_and_takes_the_models_levels(flowbp: Call, tmp_path: Path) -> None:
    words = [
        "--set",
        "method.coupling.alpha=0.7",
        "--model",
        "builtin:shapes/generator",
        "--figure",
        tmp_path / "a.png",
    ]
    code, output, _ = flowbp("explain", "flowbp_bridge", "--num-inference-steps", 9, *words)
    assert code == 0
    assert "bridge: alpha 0.7" in output
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_strip_lines_up() -> None:
    drawn = draw_plan(METHODS["flowbp_lagrange"], linear_sigmas(25, 3.0), numpy_generator(3, "plan", 0))
    rows = dict(plan_strip(drawn))
    for term in drawn.terms:
        assert rows["active"][3 * term.step] == ("◉" if term.coupling else "●")
    for k, leg in enumerate(drawn.legs, 1):
        line = rows[f"leg {k}"]
        assert line.index("○") == 3 * leg.start
        assert line.index("┤") == 3 * leg.stop
    assert rows["reward"].index("▲") == 75
    assert plan_strip(draw_plan(METHODS["full"], linear_sigmas(100), numpy_generator(0, "plan", 0))) == []


def test_a_plan_is_drawn_in_parts_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = draw_plan(METHODS["flowbp_bridge"], linear_sigmas(25), numpy_generator(0, "plan", 0))
    out = Console(width=60, force_terminal=True, color_system=None, file=io.StringIO())
    monkeypatch.setattr(console, "standard_output", lambda: out)
    console.print_plan(TrainConfig(), drawn, "plan")
    lines = [line.rstrip() for line in out.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    steps = [line[8:].split() for line in lines if line.startswith("step    ") and line[8:9].isdigit()]
    assert steps == [["0", "5", "10"], ["15", "20"]]
    assert max(len(line) for line in lines if line.startswith(("active", "weight", "reward  "))) <= 60


def test_axes_name_their_numbers() -> None:
    axes = describe_axes(METHODS["flowbp_lagrange"])
    assert axes["active steps"].startswith(
        "first_supports: sampler dirichlet (clean 2.5, gap 6, noisy 2), num_supports 2"
    )
    assert describe_axes(METHODS["full"])["weights"] == "euler"


# --- small parts -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_reference_is_up_to_date() -> None:
    script = Path(__file__).parents[3] / "scripts" / "reference.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_a_ceiling_the_loss_is_the_negative_score() -> None:
    scores = torch.tensor([-2.0, 0.5, 3.0])
    assert torch.equal(reward_losses(Hinge(), scores), -scores)
    assert reward_losses(Hinge(ceiling=1.0), scores).tolist() == [3.0, 0.5, 0.0]


def test_the_sigmoid_of_a_score_counts_images_near_its_center_most() -> None:
    scores = torch.tensor([-40.0, 1.0, 2.0, 40.0], requires_grad=True)
    losses = reward_losses(Sigmoid(center=1.0, width=2.0), scores)
    assert losses.tolist() == pytest.approx([0.0, -0.5, -1 / (1 + math.exp(-0.5)), -1.0], abs=1e-6)
    losses.sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == pytest.approx([0.0, -0.125, -0.11750, 0.0], abs=1e-5)


def test_plain_progress_speaks_now_and_then() -> None:
    said: list[str] = []
    lines = TextReporter(25, ["reward"], said.append)
    lines.stage("evaluating")
    for done in (*range(8, 104, 8), 104, 60):
        lines.evaluation("base", done, 100)
    assert said[1:] == [f"  base: {done} of 100" for done in (32, 56, 80, 60)]
    del said[:]
    lines.stage("training")
    for update in range(1, 26):
        lines.update(update, {"reward": 1.0, "grad_norm": 2.0, "seconds": 0.5, "peak_memory_gib": 1.5, "gap_0": 0.1})
    assert [line.split()[1] for line in said[1:]] == ["1/25", "10/25", "20/25", "25/25"]
    assert "gaps 0.100" in said[-1]
    assert "1.50 GiB" in said[-1]
    assert "TFLOP/s" not in said[-1]
    fast = {"reward": 1.0, "grad_norm": 2.0, "seconds": 0.5, "peak_memory_gib": 1.5, "tflops": 401.23}
    for known, shown in (({}, "TFLOP/s 401  peak"), ({"mfu": 0.406}, "TFLOP/s 401 (41% of peak)")):
        TextReporter(1, ["reward"], said.append).update(1, fast | known)
        assert shown in said[-1]


SHOWN = [
    (22.3141, "22.31"),
    (0.27314, "0.2731"),
    (-0.05123, "\N{MINUS SIGN}0.05123"),
    (1.0444, "1.044"),
    (2.5e-7, "2.50e\N{MINUS SIGN}07"),
]
"""Scores of several sizes, and how many of their digits are shown."""


@pytest.mark.parametrize(("score", "shown"), SHOWN)
def test_progress_and_tables_show_the_digits_of_a_score(
    score: float, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    metrics = {"held": score, "grad_norm": 2.0, "seconds": 0.5, "peak_memory_gib": 1.5}
    TextReporter(1, ["held"], said.append).update(1, metrics)
    assert f"held {shown} " in said[0]
    out = io.StringIO()
    monkeypatch.setattr(console, "standard_output", lambda: Console(file=out, width=120, highlight=False))
    console.print_mean_scores({1.0: {"held": MeanScore(score, score, score, 40)}}, {}, "a model")
    console.print_comparison({1.0: {"held": Change(score, score, 0.0, 0.0, 0.0, 40)}}, 1.0, "base", "trained")
    assert out.getvalue().count(f" {shown} ") + out.getvalue().count(f" {shown}\n") == 5
    console.print_mean_scores({1.0: {"held": mean_score([score, math.inf])}}, {}, "a model")
    assert "inf     not finite" in out.getvalue()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_events_hold_no_number_that_json_has_not(value: float) -> None:
    said: list[str] = []
    JsonLinesReporter(said.append).update(3, {"reward": value, "loss": -0.5})
    assert json.loads(said[0]) == {"event": "update", "update": 3, "reward": None, "loss": -0.5}


def test_numbers_for_people() -> None:
    assert [format_duration(s) for s in (41, 125, 3 * 3600 + 1200)] == ["41 s", "2 min 05 s", "3 h 20 min"]
    assert [format_memory(m) for m in (0.842, 1.02)] == ["0.84 GiB", "1.02 GiB"]
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, 1.0], 40) == "▁▁"
