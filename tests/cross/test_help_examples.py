"""Every example of every `--help` is a command line that its program takes, and does what it says."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import FEW, ONE, PROGRAMS, ROLLOUT, commands, parse, program
from PIL import Image

from interleave.cli.benchmark import TITLES


def examples(name: str) -> list[str]:
    """The command lines below the word "Example" of all help texts of a program."""
    found = []
    for command in commands(program(name)):
        text = f"{command.help or ''}\n{command.epilog or ''}".partition("Example")[2].replace("\\\n", " ")
        lines = re.findall(rf"^:?\s*({name} .+)$", text, re.MULTILINE)
        assert lines or hasattr(command, "commands"), f"{command.name}: its help has no example"
        found += lines
    return found


@pytest.mark.parametrize("line", [line for name in PROGRAMS for line in examples(name)])
def test_an_example_is_understood(line: str) -> None:
    assert parse(line) == 0


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_lines_of_an_example_are_broken_as_a_shell_reads_them(name: str) -> None:
    for command in commands(program(name)):
        for line in (command.help or "").partition("Example")[2].splitlines():
            assert "  " not in line.strip()


@pytest.mark.parametrize(
    "line", ["flowbp train --steps 3", "interleave data make", "interleave run", "flowbp estimate --gpus many"]
)
def test_a_mistake_is_not(line: str) -> None:
    assert parse(line) == 2


# --- run -------------------------------------------------------------------------------------------------------------

REPOSITORY = Path(__file__).parents[2]
SCENARIOS: dict[str, list[tuple[str, str]]] = {
    "flowbp": [
        ("flowbp train", FEW),
        ("flowbp train --set method=flowbp_bridge --set method.coupling.alpha=0.3", FEW),
        ("flowbp train --set method=refl", FEW),
        ("flowbp train configs/flowbp/miniature/lora.yaml --set name=miniature-lora", FEW),
        ("flowbp train my.yaml --set optim.learning_rate=3e-5 --dry-run", ""),
        ("flowbp train --resume runs/flowbp_bridge", "--set max_train_steps=3"),
        ("flowbp train --resume runs/flowbp_bridge --resume-from last-good", "--set max_train_steps=4"),
        ('flowbp estimate configs/flowbp/sd3_5_medium/lora_24gb.yaml --memory 24GB --gpu "RTX 4090"', "missing"),
        ("flowbp estimate configs/flowbp/flux1_dev/flowbp_bridge.yaml --gpus 8 --memory 80GB --gpu H100", "missing"),
        ("flowbp estimate --calibrate", FEW),
        ("flowbp init my-run --family sd3_5_medium --reward pickscore --memory 24GiB", ""),
        ("flowbp init my-run-8 --family flux1_dev --memory 80GB --gpus 8", ""),
        ("flowbp methods", ""),
        ("flowbp methods --json", ""),
        ("flowbp doctor", ""),
        ("flowbp doctor --json", ""),
        ("flowbp doctor --bundle report.zip", ""),
        ("flowbp families", ""),
        ("flowbp families --json", ""),
        ("flowbp explain flowbp_lagrange --seed 3", ""),
        ("flowbp explain flowbp_bridge --model builtin:shapes/generator --figure plan.png", ""),
        ("flowbp explain flowbp_sparse --set method.active.num_active_steps=6 --shift 3", ""),
        ("flowbp explain configs/flowbp/miniature/lora.yaml", ""),
        ('flowbp sample "a red circle left of a blue square" --run runs/flowbp_bridge', "--num-images 1"),
        ('flowbp sample "a red circle left of a blue square" --run runs/flowbp_bridge --base', "--num-images 1"),
        ('flowbp sample "two green triangles" --model builtin:shapes/generator --guidance-scale 2 --seed 7', ""),
        ('flowbp sample "make the circle green" --image circle.png --guidance-scale 2', ""),
        ("flowbp eval runs/flowbp_bridge", ""),
        ("flowbp eval runs/flowbp_bridge --against runs/refl --guidance-scale 1 --guidance-scale 2", ""),
        ("flowbp eval builtin:shapes/generator --num-prompts 120 --json", "--num-prompts 6"),
        (
            "flowbp benchmark builtin:shapes/generator --prompts builtin:shapes/test --num-prompts 100 "
            "--out scores/base --score clip=builtin:shapes/reward",
            "--num-prompts 2",
        ),
        (
            "flowbp benchmark builtin:shapes/generator --protocol geneval_shapes --prompts builtin:shapes/test "
            "--out scores/geneval_shapes --score geneval_shapes=builtin:shapes/verifier",
            "--num-prompts 2 --images 1",
        ),
        (
            "flowbp benchmark my-run --prompts hpdv2.txt --out hpdv2/my-run --score hpsv2=rewards/hpsv2 "
            "--score pickscore:clip=yuvalkirstain/PickScore_v1 --score ur_iq=UnifiedReward --judge $JUDGE_URL",
            "missing",
        ),
        (
            "flowbp benchmark my-run --protocol geneval --prompts evaluation_metadata.jsonl --out geneval/my-run "
            "--score geneval=mask2former-swin-small-coco-instance --color-model clip-vit-large-patch14",
            "missing",
        ),
        ("flowbp table geneval/base geneval/my-run", "missing"),
        ("flowbp table hpdv2/* --markdown", "missing"),
        ("flowbp report runs/flowbp_bridge --open", ""),
        ("flowbp report runs/flowbp_bridge --out page.html", ""),
        ("flowbp prefetch black-forest-labs/FLUX.2-klein-base-4B yuvalkirstain/PickScore_v1", "missing"),
        ("flowbp export miniature-lora --to diffusers", ""),
        ("flowbp export sd3_5_medium-lora --to comfyui --out my-lora --step 150", "missing"),
        ("flowbp export flowbp_bridge --to merged --push me/my-model", "missing"),
        ("flowbp export klein-lora --to merged --model black-forest-labs/FLUX.2-klein-4B", "missing"),
        (
            "flowbp convert-reward hpsv2 HPS_v2.1_compressed.pt rewards/hpsv2 --with openai/clip-vit-large-patch14",
            "missing",
        ),
        (
            "flowbp convert-reward hpsv3 HPSv3.safetensors rewards/hpsv3 --with Qwen/Qwen2-VL-7B-Instruct "
            "--prompt-source hpsv3/dataset/data_collator_qwen.py",
            "missing",
        ),
        (
            "flowbp convert-reward imagereward ImageReward.pt rewards/imagereward --with google-bert/bert-base-uncased",
            "missing",
        ),
        ("flowbp train --set rewards.0.score=hpsv2 --set rewards.0.ref=rewards/hpsv2", "missing"),
        ("flowbp runs", ""),
        ("flowbp runs list --json", ""),
        ("flowbp runs compare flowbp_bridge refl", ""),
        ("flowbp runs compare flowbp_bridge refl --json", ""),
        ("flowbp runs clean flowbp_bridge", ""),
        ("flowbp runs clean flowbp_bridge refl --images --yes", ""),
    ],
    "stories": [
        ('interleave run "draw a yellow circle, then make it red"', ""),
        ('interleave run "draw a yellow circle, then make it red, then add a blue square below it"', ""),
        ('interleave run "make the circle green" --image circle.png --set planner.kind=none', ""),
        (
            'interleave run "four images on how rain forms" configs/interleave/klein_qwen3vl.yaml --set seed=3',
            "missing",
        ),
        ("interleave doctor", ""),
        ("interleave doctor --json", ""),
        ("interleave doctor --bundle report.zip", ""),
        ("interleave batch requests.jsonl", ""),
        ("interleave batch requests.txt", ""),
        ("interleave batch requests.jsonl --set loop.concurrency=64 --set loop.max_attempts=5", ""),
        ("interleave batch requests.jsonl --shard 1/2", ""),
        ("interleave batch requests.jsonl --shard 2/2", ""),
        ("interleave merge runs/requests-1-of-2 runs/requests-2-of-2 --out runs/all", ""),
        ("interleave batch --resume runs/requests", ""),
        ("interleave batch --resume runs/requests --retry", ""),
        ('interleave plan "draw a red circle, then make it green"', ""),
        ('interleave plan "draw a red circle, then make it green" --json', ""),
        ("interleave report runs/requests", ""),
        ("interleave runs", ""),
        ("interleave runs list --json", ""),
        ("interleave runs compare requests requests-2", ""),
        ("interleave runs compare requests requests-2 --json", ""),
        ("interleave runs clean requests", ""),
        ("interleave runs clean requests requests-2 --images --yes", ""),
        ("interleave prefetch Qwen/Qwen3-VL-8B-Instruct black-forest-labs/FLUX.2-klein-4B", "missing"),
    ],
    "agents": [
        ("interleave data build", "--set prompts.count=24"),
        ("interleave data build configs/interleave/data_miniature.yaml --out sets/miniature", "missing"),
        ("interleave data build --out sets/part-1 --shard 1/2", "--set prompts.count=24"),
        ("interleave data build --out sets/part-2 --shard 2/2", "--set prompts.count=24"),
        ("interleave merge sets/part-1 sets/part-2 --out sets/all", ""),
        ("interleave data build --resume sets/all", ""),
        ("interleave data build --resume sets/miniature", ""),
        ("interleave data build --resume sets/miniature --set filters.rl_share=0.5 --set filters.val=0.1", ""),
        ("interleave data export-edits runs/requests --out sets/edits", "missing"),
        ("flowbp train --set data.prompts=sets/edits/edits.jsonl", "missing"),
        ("interleave data import sharegpt critic_sft.json --role critic --out sets/released_critic", "missing"),
        ("interleave data import rl critic_rl.jsonl --root . --out sets/released_rl", "missing"),
        ("interleave data import execution_record trajectories/ --out sets/released", "missing"),
        ("interleave data check sets/miniature", ""),
        (
            "interleave data check sets/released_critic --run-config configs/interleave/klein_interleavethinker.yaml",
            "missing",
        ),
        ("interleave data check sets/mine --set critic.template.file=critic.txt --parse-mode tolerant", "missing"),
        ("interleave data show sets/miniature/critic_sft.jsonl 3", ""),
        (
            "interleave data agreement sets/mine --set judge.kind=model "
            "--set judge.model.model=Qwen/Qwen3-VL-32B-Instruct",
            "missing",
        ),
        ("interleave sft critic configs/interleave/sft_critic.yaml --dry-run --processes 8", ""),
        ("interleave sft critic", f"{ONE} --set trl.warmup_steps=0"),
        ("interleave sft critic configs/interleave/sft_critic.yaml --set data=sets/mine", "missing"),
        ("interleave sft critic --resume sft_critic", "missing"),
        ("interleave sft critic --resume sft_critic --resume-from last-good", "missing"),
        ("interleave grpo configs/interleave/grpo_critic.yaml --dry-run", ROLLOUT),
        ("interleave grpo", ROLLOUT),
        ("interleave grpo configs/interleave/grpo_critic.yaml --set model=runs/sft_critic/model", ROLLOUT),
        ("interleave grpo --resume grpo_critic", "missing"),
        ("interleave grpo --resume grpo_critic --resume-from last-good", "missing"),
        ("interleave export-reward builtin:shapes/critic --out rewards/critic", ""),
        ("interleave export-reward grpo_critic --out rewards/grpo --set critic.num_samples=16", ""),
        (
            "interleave export-reward Qwen/Qwen3-VL-8B-Instruct configs/interleave/klein_qwen3vl.yaml "
            "--out rewards/qwen3vl",
            "missing",
        ),
    ],
}
for benchmark in TITLES:
    planner = " --set run.planner.kind=none" if benchmark == "rise" else ""
    judge = f"interleave benchmark {benchmark} configs/interleave/benchmark_{benchmark}.yaml --data data/{benchmark}"
    loop = f"--run-config configs/interleave/klein_qwen3vl.yaml --out scores/klein-{benchmark}"
    SCENARIOS["stories"] += [
        (f"interleave benchmark {benchmark} --out scores/{benchmark}{planner}", "--limit 2"),
        (f"{judge} --prompts-from repository {loop} --yes", "missing"),
        (f"{judge} {loop} --stage generate --shard 2/8", "missing"),
        (f"{judge} --outputs-from theirs --out scores/theirs-{benchmark}", "missing"),
    ]
SCENARIOS["stories"] += [
    ("interleave benchmark ueval --out scores/ueval", "--limit 2"),
    ("interleave benchmark agree scores/ueval scores/ueval_other_judge", "missing"),
]
"""Examples in an order in which each finds what it needs, with what makes it small; "missing": what it names is not
there (published weights, files of others), is finished, or is there already, and it must say so in one line."""
NOT_RUN = ("interleave serve", "interleave demo")
"""Tests of their own start them (tests/interleave/serve, tests/interleave/test_demo.py)."""


def test_every_example_is_run() -> None:
    run = {" ".join(line.split()) for scenario in SCENARIOS.values() for line, _ in scenario}
    known = {" ".join(line.split()) for name in PROGRAMS for line in examples(name)}
    assert {line for line in known if not line.startswith(NOT_RUN)} <= run


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SCENARIOS)
def test_an_example_does_what_its_help_says(name: str, tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / "my.yaml").write_text("method: refl\n")
    (tmp_path / "requests.jsonl").write_text('{"text": "draw a red circle"}\n{"text": "draw two blue squares"}\n')
    (tmp_path / "requests.txt").write_text("draw a cyan cross\n")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "circle.png")
    for line, small in SCENARIOS[name]:
        words = shlex.split(f"{line} {small if small != 'missing' else ''}")
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "BROWSER": "true"},
        )
        output = f"{line}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, output
        if small == "missing":
            assert done.returncode == 2, output
            assert f"{words[0]}: error: " in done.stderr.splitlines()[-1], output
        else:
            # 1: a story that the critic never accepted
            assert done.returncode == 0 or (name == "stories" and done.returncode == 1), output
