"""interleave tells, builds and trains what it did before its code was rearranged.

The goldens were recorded at the last commit before the move; see `goldens`.  Everything runs through the command.
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from parity.goldens import check, digest, fingerprint, numbers, page, stable
from PIL import Image
from safetensors.torch import load_file

from interleave.cli import main

pytestmark = pytest.mark.exhaustive
RECIPES = Path(__file__).parents[2] / "configs" / "interleave"
STORY = "draw a red circle, then add a blue square on its right, then make the circle green"
REQUESTS = (
    "draw three green squares",
    "draw a yellow cross above a purple triangle, then take away the cross",
    "paint a blue circle, and then put an orange square below it",
)
CONTROLS = ("miniature_no_critic", "miniature_best_of_3", "miniature_random_rewrite")
FOLDERS = {"images": "images"}
NOT_ACCEPTED = "steps_not_accepted"
UPDATES = (
    "per_device_train_batch_size=4",
    "max_steps=2",
    "save_steps=2",
    "logging_steps=1",
    "gradient_accumulation_steps=1",
)
GENERATION = (
    *("per_device_train_batch_size=16", "num_generations=8", "steps_per_generation=1", "max_completion_length=96"),
    "temperature=1.8",
)


def interleave(*words: object) -> str:
    """What a command prints on standard output; 1 is a story that is not complete."""
    out = io.StringIO()
    before, sys.argv = sys.argv, ["interleave", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = before
    assert ended.value.code in (0, 1), out.getvalue()
    return out.getvalue()


def trace(run: Path) -> list[Any]:
    """The records of a run by request and step, whatever the order in which they were made.

    A story with steps that the critic never accepted was plainly complete when the goldens were recorded.
    """
    lines = [stable(json.loads(line)) for line in (run / "trace.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [x | {"status": "complete", "error": None} if x.get("status") == NOT_ACCEPTED else x for x in lines]
    return sorted(
        lines, key=lambda r: (r.get("trajectory_id", r.get("id")), r["type"], r.get("step", 0), r.get("attempt", 0))
    )


def images(folder: Path) -> dict[str, str]:
    """Digests of the pixels of a folder's images, by their names."""
    files = sorted(folder.rglob("*.png"))
    return {file.name: digest(Image.open(file).convert("RGB").tobytes())["sha256"] for file in files}


def rows(folder: Path) -> dict[str, list[Any]]:
    """The rows of a set's files."""
    files = sorted(folder.glob("*_*.jsonl"))
    return {f.name: [stable(json.loads(line)) for line in f.read_text(encoding="utf-8").splitlines()] for f in files}


def logged(run: Path) -> list[Any]:
    """What a training wrote of its updates, without times and rates."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    volatile = ("runtime", "per_second", "step_time", "seconds", "flos", "memory")
    return [{k: v for k, v in stable(line).items() if not any(word in k for word in volatile)} for line in lines]


def test_one_story(tmp_path: Path) -> None:
    told = interleave("run", STORY, "--name", "one", "--runs", tmp_path)
    check("story", trace(tmp_path / "one"), "interleave")
    check("story images", images(tmp_path / "one" / FOLDERS["images"]), "interleave")
    check("story told", numbers(told.replace(str(tmp_path), "")), "interleave")
    check("story page", page((tmp_path / "one" / "report.html").read_text(encoding="utf-8")), "interleave")
    check("plan", numbers(interleave("plan", STORY)), "interleave")


@pytest.mark.parametrize("recipe", CONTROLS)
def test_stories_of_the_controls(recipe: str, tmp_path: Path) -> None:
    interleave("run", STORY, RECIPES / f"{recipe}.yaml", "--name", "one", "--runs", tmp_path)
    check(f"story {recipe}", trace(tmp_path / "one"), "interleave")


def test_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request of the recording names an orange square, which the built-in planner no longer takes."""
    monkeypatch.setattr("interleave.loop.run.check_request", lambda *_, **__: None)
    file = tmp_path / "requests.jsonl"
    file.write_text("".join(json.dumps({"text": text, "id": f"r{i}"}) + "\n" for i, text in enumerate(REQUESTS)))
    interleave("batch", file, "--name", "many", "--runs", tmp_path, "--set", "loop.concurrency=1")
    check("batch", trace(tmp_path / "many"), "interleave")
    check("batch page", page((tmp_path / "many" / "report.html").read_text(encoding="utf-8")), "interleave")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of 24 stories of the miniature."""
    out = tmp_path_factory.mktemp("sets") / "small"
    words = ("--set", "prompts.count=24", "--set", "run.loop.concurrency=1")
    interleave("data", "build", RECIPES / "data_miniature.yaml", "--out", out, *words)
    return out


def test_a_set(built: Path) -> None:
    check("set rows", rows(built), "interleave")
    check("set facts", stable(json.loads((built / "set.json").read_text(encoding="utf-8"))), "interleave")
    check("set checked", numbers(interleave("data", "check", built).replace(str(built), "")), "interleave")
    (shown,) = built.glob("*.html")
    check("set page", page(shown.read_text(encoding="utf-8")), "interleave")


@pytest.mark.parametrize("role", ["planner", "critic"])
def test_two_updates_of_sft(role: str, built: Path, tmp_path: Path) -> None:
    options = [word for text in UPDATES for word in ("--set", f"trl.{text}")]
    words = (RECIPES / f"sft_{role}.yaml", "--set", f"data={built}", "--name", role, "--runs", tmp_path, *options)
    check(
        f"sft {role} dry run", stable(json.loads(interleave("sft", role, *words, "--dry-run", "--json"))), "interleave"
    )
    interleave("sft", role, *words)
    weights = load_file(tmp_path / role / "model" / "model.safetensors")
    check(f"sft {role}", {"weights": fingerprint(weights), "logged": logged(tmp_path / role)}, "interleave")


def test_two_updates_of_grpo(built: Path, tmp_path: Path) -> None:
    options = [f"trl.{text}" for text in (*UPDATES, *GENERATION)]
    sets = [word for text in [*options, f"data={built}", f"cache={tmp_path / 'cache'}"] for word in ("--set", text)]
    words = (RECIPES / "grpo_critic.yaml", "--name", "critic", "--runs", tmp_path, *sets)
    check("grpo dry run", stable(json.loads(interleave("grpo", *words, "--dry-run", "--json"))), "interleave")
    interleave("grpo", *words)
    weights = load_file(tmp_path / "critic" / "model" / "model.safetensors")
    check("grpo", {"weights": fingerprint(weights), "logged": logged(tmp_path / "critic")}, "interleave")
