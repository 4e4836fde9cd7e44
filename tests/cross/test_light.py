"""Configuration, names and files are checked before torch is imported, which takes seconds."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

GENERATOR = "builtin:shapes/generator"
FLOWBP = {
    "train --set max_train_stepz=3": "did you mean 'max_train_steps'",
    "train bad.yaml": "max_train_step: unknown key",
    "train missing.yaml": "missing.yaml: no such file",
    "train --resume nothing": "nothing: no such run",
    "train --set model.ref=missing/folder/x": "missing/folder/x",
    "train --set rewards.0.ref=./empty": "empty: not a model folder",
    "train --set data.prompts=missing.txt": "missing.txt",
    "train --set eval.quick_prompts=missing.txt": "missing.txt",
    "train --set name=a/b": "name 'a/b'",
    "train --set lora.init=gone.safetensors": "lora.init: model 'gone.safetensors': no such file or folder",
    "train --set total_batch_size=7 --set per_device_batch_size=2": "per_device_batch_size 2",
    "train --set distributed.kind=fsdp2": "needs processes",
    "train --set method.active.num_active_steps=99": "asks for 99 of 25 steps; lower method.active.num_active_steps",
    "train --set method=refl --set num_inference_steps=9": "asks for 11 of 9 steps",
    "estimate --set a=1": "--set a=1",
    "estimate --set heldout.0.ref=./empty": "empty",
    "estimate --gpu RTX9999": "--gpu RTX9999: not known",
    "estimate --memory 24XB": "24XB",
    "sample": "Missing argument",
    "sample x --run nothing": "nothing",
    "sample x --model ./empty": "empty",
    "sample x --guidance-scale 0": "--guidance-scale 0",
    "sample x --out bad.yaml": "bad.yaml: cannot be written",
    "eval nothing/x/y": "nothing/x/y",
    f"eval {GENERATOR} --set evl.x=1": "did you mean 'eval'",
    f"eval {GENERATOR} --prompts no.txt": "no.txt",
    f"benchmark {GENERATOR} --prompts missing.txt --out o": "missing.txt",
    f"benchmark {GENERATOR} --prompts builtin:shapes/test --out o --score clipp=x": "did you mean 'clip'",
    "report nothing": "nothing: no such run",
    f"report {'x' * 300}": "no such run",
    f"benchmark {GENERATOR} --prompts builtin:shapes/test --out o --score clip=./none": "./none",
    "export nothing --to diffusers": "nothing: no such run",
    "export run --to diffusers": "run: no checkpoint yet; continue the run",
    "export run --to diffusers --step 7": "run: no checkpoint of step 7; there are: none",
    "export x --to diffuserz": "did you mean 'diffusers'",
    "export run --to diffusers --out empty": "empty: exists already",
    "convert-reward hpsv2 bad.yaml empty --with x": "empty: exists already",
    "convert-reward hpsv9 f o --with x": "did you mean 'hpsv3'",
    "convert-reward hpsv2 bad.yaml o --with ./none": "./none",
    "convert-reward hpsv3 bad.yaml o --with x": "hpsv3: needs --prompt-source FILE",
    "convert-reward hpsv2 missing.pt o --with x": "missing.pt: no such file",
    "table missing": "missing: no such folder",
    "explain refll": "did you mean 'refl'",
    "explain refl --figure x.bmp": "must end in .png",
}
INTERLEAVE = {
    "run x --set lop.x=1": "did you mean 'loop'",
    "run x missing.yaml": "missing.yaml: no such file",
    "run x --image missing.png": "missing.png",
    f"run x --name {'n' * 300}": "at most 240 bytes",
    "batch missing.jsonl": "missing.jsonl: no such file",
    "run red --set generator.ref=none/x --set planner.kind=none": "no such local folder",
    "run red --set generator.lora=gone.safetensors --set planner.kind=none": "generator.lora: model 'gone.safetensors'",
    "sft critic --set vision=reference --set lora.r=4": "vision: reference is of full training",
    "run red --set critic.model.ref=./none": "no such folder",
    "run red --set critic.template=bad.txt": "remove <|im_start|>",
    "batch bad.yaml": "cannot read rows of .yaml",
    "batch --resume nothing": "nothing: no such run",
    "plan x --set a=1": "--set a=1",
    "sft critic bad.yaml": "max_train_step",
    "sft planner --set trl.lerning_rate=1": "did you mean 'learning_rate'",
    "grpo --set trl.num_generatoins=1": "did you mean 'num_generations'",
    "sft planner --resume nothing": "nothing: no such run",
    "sft critic --set model=none/x": "no such local folder",
    "sft critic --dry-run": "sets/miniature: not there; make it first",
    "grpo --dry-run --json": "sets/miniature: not there; make it first",
    "sft critic sft.yaml": "critic_sft.jsonl: no such file",
    "grpo bad.yaml": "max_train_step",
    "grpo --set reward_weights.acuracy=1": "did you mean 'accuracy'",
    "grpo --set generator.ref=./none": "./none",
    "grpo sft.yaml": "critic_rl.jsonl: no such file",
    "data build --out o --set a=1": "--set a=1",
    "benchmark wise --out o --data none": "none: no file, nor a folder with merge.json",
    "benchmark ueval --out o --set jugde.kind=shapes": "did you mean 'judge'",
    "benchmark rise --out o --stage judge": "allowed: all, generate, score",
    "benchmark agree none bad.yaml": "none: not a folder of `interleave benchmark`",
    "export-reward builtin:shapes/critic --out empty": "empty: exists already",
    "data check missing": "missing",
    "serve --set a=1": "--set a=1",
    "demo --set a=1": "--set a=1",
    "demo --set generator.ref=./none": "./none",
    "demo --port 99999": "cannot listen on",
    "report nothing": "nothing: no such run",
}


FEW = {"flowbp": dict(list(FLOWBP.items())[::7]), "interleave": dict(list(INTERLEAVE.items())[2::5])}


@pytest.mark.parametrize(
    ("program", "mistakes"),
    [
        *(pytest.param(program, few, marks=pytest.mark.slow) for program, few in FEW.items()),
        pytest.param("flowbp", FLOWBP, marks=pytest.mark.exhaustive),
        pytest.param("interleave", INTERLEAVE, marks=pytest.mark.exhaustive),
    ],
)
def test_mistakes_are_found_before_torch_is_imported(tmp_path: Path, program: str, mistakes: dict[str, str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("max_train_steps: 3\n")
    (tmp_path / "bad.yaml").write_text("max_train_step: 3\n")
    (tmp_path / "bad.txt").write_text("<|im_start|>user {original_instruction}")
    (tmp_path / "sft.yaml").write_text("model: builtin:shapes/critic\ndata: empty\n")
    before = {path.name for path in tmp_path.iterdir()}
    script = Path(__file__).with_name("light.py")
    given = "\n".join(json.dumps(words.split()) for words in mistakes)
    done = subprocess.run(
        [sys.executable, script, program], cwd=tmp_path, input=given, capture_output=True, text=True, timeout=120
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for (words, said), (code, heavy, text) in zip(mistakes.items(), answers, strict=True):
        assert (code, heavy) == (2, []), (words, text)
        assert said in text, (words, text)
        assert "Traceback" not in text
    assert {path.name for path in tmp_path.iterdir()} == before  # and nothing is written


SERVED = """
import sys
from imgen_common.config import load
from interleave.loop.config import RunConfig
from interleave.loop.run import build_components

server = "{kind: endpoint, url: http:" + "//127.0.0.1:1/v1, model: x}"
given = [f"{key}={server}" for key in ("planner.model", "critic.model")]
given.append(sys.argv[1].replace("SERVER", server))
build_components(load(RunConfig, [], [*given, "generator.kind=scripted"]))
assert not {"torch", "transformers", "diffusers"} & set(sys.modules)
"""


@pytest.mark.parametrize(
    "judge", [pytest.param("judge=null", marks=pytest.mark.slow), "judge={kind: model, model: SERVER}"]
)
def test_models_that_servers_run_need_no_torch(judge: str) -> None:
    subprocess.run([sys.executable, "-c", SERVED, judge], check=True)


@pytest.mark.parametrize("program", ["flowbp", "interleave"])
def test_the_version_is_that_of_the_package(program: str) -> None:
    done = subprocess.run([sys.executable, "-m", program, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{program} {metadata.version(program)}\n"


@pytest.mark.parametrize(
    ("program", "typed", "completed"), [("flowbp", "tra", "train"), ("interleave", "data bu", "build")]
)
def test_a_shell_completes_commands(program: str, typed: str, completed: str) -> None:
    words = f"{program} {typed}"
    asked = {f"_{program.upper()}_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    code = f"import sys; sys.argv[0] = {program!r}; from {program}.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **asked})
    assert done.stdout.split() == [completed]
