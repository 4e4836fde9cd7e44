"""The commands as a person meets them, with scripted models: help, stories, going on, and every mistake in one line."""

import io
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from rich.console import Console

from imgen_common import hub
from imgen_common.config import load
from imgen_common.run_folder.folder import RunFolder
from interleave.agents.prompts import render_plan, render_verdict
from interleave.cli import console, main
from interleave.datasets.config import DataConfig
from interleave.datasets.filters import SetInfo
from interleave.loop.config import RunConfig
from interleave.loop.requests import make_request
from interleave.loop.run import create_run
from interleave.records import Plan, PlannerRecord, PlanRecord, PlanStep, Request, Spent, Trajectory, Verdict
from interleave.storage.trace import read_trace
from interleave.training.config import GrpoConfig, SftConfig

CONFIGS = Path(__file__).parents[3] / "configs" / "interleave"
COMMANDS = ("runs", "run", "batch", "merge", "plan", "report", "prefetch", "serve", "demo")
PLAN = Plan(steps=(PlanStep(index=1, prompt="a cat"), PlanStep(index=2, prompt="a hat", text="It likes it.")))
YES = render_verdict(Verdict(success=True, refined_prompt="same", reasoning="good"))
NO = render_verdict(Verdict(success=False, refined_prompt="a bigger cat", reasoning="too small"))

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def interleave(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """interleave(*words) -> (exit code, standard output, standard error), in this process."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["interleave", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        output = capsys.readouterr()
        return int(stop.value.code or 0), output.out, output.err

    return call


def recipe(folder: Path, planner: tuple[str, ...] = (), critic: tuple[str, ...] = (YES,)) -> Path:
    """A configuration whose models say what is given."""

    def says(answers: tuple[str, ...]) -> dict[str, object]:
        return {"kind": "model", "model": {"kind": "scripted", "answers": list(answers)}}

    content = {
        "planner": says(planner or (render_plan(PLAN),)) | {"text_template": "planner_text"},
        "critic": says(critic) | {"template": "critic"},
        "generator": {"kind": "scripted"},
        "cache": str(folder / "cache"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def assert_refused(answer: tuple[int, str, str], *words: str) -> None:
    code, _, err = answer
    assert code == 2
    assert err.strip().count("\n") == 0, err
    assert "Traceback" not in err
    for word in words:
        assert word in err


def test_help_has_examples() -> None:
    shown = subprocess.run([sys.executable, "-m", "interleave", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    for command in COMMANDS:
        assert command in shown.stdout
        text = subprocess.run(
            [sys.executable, "-m", "interleave", command, "-h"], capture_output=True, text=True
        ).stdout
        assert f"interleave {command}" in text.partition("Example")[2]


def test_nothing_heavy_is_imported_for_help() -> None:
    heavy = "torch", "diffusers", "transformers", "fastapi", "gradio", "PIL"
    code = f"import sys, interleave.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_models_are_fetched_and_checked(interleave: Call) -> None:
    code, out, _ = interleave("prefetch", "builtin:shapes/critic", "builtin:shapes/planner")
    assert code == 0
    assert [Path(line).name for line in out.split()] == ["critic", "planner"]
    assert_refused(interleave("prefetch", "org/none"), "`interleave prefetch org/none` with a network")


def test_a_story_is_made(interleave: Call, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    words = ("run", "Draw a Cat, then a hat!", recipe(tmp_path, critic=(NO, YES)), "--runs", runs)
    code, out, _ = interleave(*words)
    assert code == 0, out
    run = runs / "draw_a_cat_then_a_hat"
    assert "step 1/2 attempt 1: rejected" in out
    assert "why: " in out
    assert "next prompt: a bigger cat" in out
    assert "step 1/2 attempt 2: accepted" in out
    assert "It likes it." in out
    assert "1 request: 1 complete; 4 images: 2 rejected, 2 accepted" in out
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "It likes it." in page
    assert "a bigger" in page
    again = interleave(*words)
    assert again[0] == 0
    assert (runs / "draw_a_cat_then_a_hat-2").is_dir()


@pytest.mark.parametrize(
    ("reasoning", "shown"),
    [
        ("", "why: the critic gave no reason\n"),
        (":warning: small", "why: :warning: small\n"),
        ("too small. " * 1900, "too small. ... (20899 characters; the report has all)\n"),
    ],
)
def test_odd_reasons_leave_the_terminal_readable(interleave: Call, tmp_path: Path, reasoning: str, shown: str) -> None:
    no = render_verdict(Verdict(success=False, refined_prompt="a bigger cat", reasoning=reasoning))
    code, out, _ = interleave("run", "a cat", recipe(tmp_path, critic=(no, YES)), "--runs", tmp_path, "--name", "r")
    assert code == 0
    assert shown in out
    page = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert (reasoning.strip() or "the critic gave no reason") in page


@pytest.mark.parametrize(
    ("critic", "attempts", "steps"),
    [((NO,), 3, "steps 1, 2"), ((NO, NO, YES), 2, "step 1"), ((YES, NO), 1, "step 2")],
)
def test_a_story_with_steps_that_were_never_accepted_is_not_plainly_complete(
    interleave: Call, tmp_path: Path, critic: tuple[str, ...], attempts: int, steps: str
) -> None:
    words = (recipe(tmp_path, critic=critic), "--set", f"loop.max_attempts={attempts}", "--runs", tmp_path)
    code, out, _ = interleave("run", "a cat", *words)
    assert code == 1
    assert "1 request: 1 steps_not_accepted; " in out
    assert f": steps_not_accepted the critic accepted no image of {steps}\n" in out
    assert "--retry" not in out  # nothing failed
    (tmp_path / "some.txt").write_text("a cat\n")
    code, out, _ = interleave("batch", tmp_path / "some.txt", *words)
    assert code == 1
    assert f"1/1: steps_not_accepted (the critic accepted no image of {steps})" in out
    assert interleave("batch", "--resume", "some", "--runs", tmp_path)[0] == 1


@pytest.mark.parametrize(
    ("status", "color"), [("complete", 32), ("steps_not_accepted", 33), ("critic_failed", 31), ("planner_failed", 31)]
)
def test_the_end_of_a_story_has_its_color(status: Any, color: int, tmp_path: Path) -> None:
    text = io.StringIO()
    out = Console(file=text, force_terminal=True, color_system="standard", no_color=False, width=200, highlight=False)
    request = Request(id="x", text="a cat")
    story = Trajectory(id="x", request=request, planner=None, plan=None, selected={}, status=status, spent=Spent())
    console.BatchProgressPrinter(out, 1)(story)
    console.print_summary([story], [], tmp_path, out)
    assert text.getvalue().count(f"\x1b[{color}m{status}") == 1 + (status != "complete")


@pytest.mark.parametrize(
    ("kind", "said"), [("refused", "would be refused again"), ("unreachable", "to try the others again")]
)
def test_what_was_refused_is_not_to_be_tried_again(
    kind: Any, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    story = Trajectory(
        id="x",
        request=Request(id="x", text="a cat"),
        planner=None,
        plan=None,
        status="generator_failed",
        error_kind=kind,
    )
    console.print_summary([story], [], tmp_path, Console())
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(("planner", "warned"), [("builtin:shapes/planner t=0.7", True), ("my-planner", False)])
def test_a_plan_of_the_built_in_planner_that_leaves_things_out_is_said_to(
    planner: str, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    request, plan = (
        Request(id="x", text="a red circle and a blue square"),
        Plan(steps=(PlanStep(index=1, prompt="a red"),)),
    )
    about, out = PlannerRecord(model=planner, template="", template_hash=""), console.open_console()
    record = PlanRecord(trajectory_id="x", request=request, planner=about, plan=plan)
    story = Trajectory(id="x", request=request, planner=about, plan=plan, selected={}, status="complete", spent=Spent())
    for show in (console.ProgressPrinter(out), console.BatchProgressPrinter(out, 1)):
        for one in (record, story):
            show(one)
        said = "  the plan leaves out what the request names: circle, blue, square\n" in capsys.readouterr().out
        assert said == warned


def test_json_for_machines(interleave: Call, tmp_path: Path) -> None:
    code, out, _ = interleave("run", "a cat", recipe(tmp_path), "--runs", tmp_path / "runs", "--json")
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["type"] for line in lines] == ["PlanRecord", "Attempt", "Attempt", "Trajectory", "Run"]


def test_an_image_of_the_request(interleave: Call, tmp_path: Path) -> None:
    picture = tmp_path / "in.png"
    Image.new("RGB", (5, 5), "red").save(picture)
    config = recipe(tmp_path)
    code, _, _ = interleave("run", "give it a hat", "-i", picture, config, "--runs", tmp_path, "--name", "r")
    assert code == 0
    assert [a.op for a in read_trace(tmp_path / "r")[first_id(tmp_path / "r")].attempts.values()] == ["edit", "edit"]
    picture.write_bytes(b"not an image")
    bad = interleave("run", "x", "-i", picture, config, "--runs", tmp_path)
    assert_refused(bad, "in.png", "not an image")


def first_id(run: Path) -> str:
    return next(iter(read_trace(run)))


def test_a_batch_whose_failures_can_be_tried_again(interleave: Call, tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    file.write_text('{"text": "one", "id": "a"}\n\n{"text": "two\\u0007\\u202e", "id": "b"}\n', encoding="utf-8")
    config = recipe(tmp_path, planner=("mumble",))
    code, out, _ = interleave("batch", file, config, "--runs", tmp_path / "runs")
    assert code == 1
    assert "2 planner_failed" in out
    assert "\u202e" not in out
    assert f"interleave batch --resume {tmp_path / 'runs' / 'some'} --retry" in out
    assert interleave("batch", "--resume", "some", "--runs", tmp_path / "runs")[0] == 1
    code, out, _ = interleave("batch", "--resume", "some", "--retry", "--runs", tmp_path / "runs")
    assert code == 1
    assert "2 planner_failed" in out


@pytest.mark.slow
def test_what_a_resumed_batch_may_change(interleave: Call, tmp_path: Path) -> None:
    file, runs = tmp_path / "some.txt", ("--runs", tmp_path / "runs")
    file.write_text("a cat\na hat\n")
    where, retry = "generator.url=http://127.0.0.1:9/v1", "generator.retry.max_tries=1"
    gone = [
        word for text in ("generator.kind=images_api", where, retry, "loop.max_attempts=1") for word in ("--set", text)
    ]
    code, out, _ = interleave("batch", file, recipe(tmp_path), *runs, *gone)
    assert (code, "2 generator_failed" in out) == (1, True)
    for changed in ("generator.retry.timeout=900", "generator.url=http://127.0.0.1:1/v1", "generator.key_env=OTHER"):
        code, out, err = interleave("batch", "--resume", "some", "--retry", *runs, "--set", changed)
        assert (code, err.count("error"), "2 generator_failed" in out) == (1, 0, True)
    code, _, err = interleave("batch", "--resume", "some", "--retry", *runs, "--set", "generator.model=other")
    assert (code, "the run has generator.model" in err) == (2, True)


def test_a_story_whose_budget_is_spent_goes_on_with_a_larger_one(interleave: Call, tmp_path: Path) -> None:
    file, runs = tmp_path / "some.txt", ("--runs", tmp_path / "runs")
    file.write_text("a cat\n")
    config = recipe(tmp_path, critic=(NO, NO, YES, YES))
    code, out, _ = interleave("batch", file, config, *runs, "--set", "loop.max_generations=2")
    assert (code, "1 budget_exhausted" in out) == (1, True)
    assert "to go on with a larger budget: interleave batch --resume" in out
    page = (tmp_path / "runs" / "some" / "report.html").read_text(encoding="utf-8")
    assert "with a larger loop.max_generations" in page
    larger = ("--retry", "--set", "loop.max_generations=9")
    code, out, _ = interleave("batch", "--resume", "some", *runs, *larger)
    assert (code, "1 complete" in out) == (0, True), out


def test_a_resumed_batch_counts_from_the_stories_that_have_ended(
    interleave: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, runs = tmp_path / "some.txt", ("--runs", tmp_path / "runs")
    file.write_text("a\nb\nc\n")
    assert interleave("batch", file, recipe(tmp_path), *runs)[0] == 0
    trace = tmp_path / "runs" / "some" / "trace.jsonl"
    trace.write_bytes(b"".join(trace.read_bytes().splitlines(True)[:-1]))
    assert "3/3: complete" in interleave("batch", "--resume", "some", *runs)[1]

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("interleave.loop.run.run_and_close", stop)
    for more in ((), ("--retry",)):
        code, _, err = interleave("batch", "--resume", "some", *runs, *more)
        assert code > 128  # by the signal that this process had before, if any
        assert err.split("interleave batch ")[1].strip() == " ".join(["--resume", str(trace.parent), *more])


def test_paths_are_printed_as_they_are_and_commands_can_be_copied(interleave: Call, tmp_path: Path) -> None:
    """Brackets are no markup of the terminal, and a name with spaces is one word of a shell."""
    file, runs = tmp_path / "my requests[draft].txt", tmp_path / "all runs"
    file.write_text("a cat\n")
    code, out, _ = interleave("batch", file, recipe(tmp_path, planner=("mumble",)), "--runs", runs)
    run = runs / file.stem
    assert code == 1
    assert f"report: {run / 'report.html'}\n" in out
    line = next(line for line in out.splitlines() if "to try the others again: " in line)
    assert shlex.split(line.partition("again: ")[2]) == ["interleave", "batch", "--resume", str(run), "--retry"]
    code, out, _ = interleave("run", "a hat", recipe(tmp_path), "--runs", runs, "--name", "one[two]")
    shown = [word for line in out.splitlines() for word in [line.rpartition("  ")[2]] if word.endswith(".png")]
    assert code == 0
    assert shown
    assert all(Path(path).is_file() for path in shown)


@pytest.mark.parametrize("place", [".", "there"])
def test_a_page_is_not_written_in_the_place_of_a_folder(
    interleave: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    assert interleave("run", "a cat", recipe(tmp_path), "--runs", tmp_path, "--name", "r")[0] == 0
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    said = f"{place}: is a folder; give the path of a file"
    assert_refused(interleave("report", "r", "--runs", tmp_path, "--out", place), said)


@pytest.mark.parametrize("command", [("sft", "critic"), ("grpo",)])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--name", "taken"), "taken: holds a run already"),
        (("--name", "a/b"), "must be the plain name of a folder"),
        (("--resume", "ended"), "ended: is finished; its model is"),
        (("--resume", "taken", "--name", "other"), "--name other: is for a new run"),
        (("--resume-from", "last-good"), "give the run by --resume"),
    ],
)
def test_where_a_training_goes_is_checked_before_anything_is_built_or_paid(
    interleave: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    words: tuple[str, ...],
    said: str,
) -> None:
    """The set, the model, and the image that a generator and a judge are tried with."""
    config = (SftConfig if command[0] == "sft" else GrpoConfig)()
    for name in ("taken", "ended"):
        RunFolder.create(tmp_path / name, config).close()
    (tmp_path / "ended" / "model").mkdir()
    monkeypatch.setattr("interleave.cli.train._ensure_set", None)  # it follows
    assert_refused(interleave(*command, *words, "--runs", tmp_path), said)


def test_a_shard_is_checked_before_a_build_begins(
    interleave: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interleave.cli.data._build", None)
    assert_refused(
        interleave("data", "build", "--out", tmp_path / "set", "--shard", "3/2"), "the parts of 2 are 1 to 2"
    )


def test_a_batch_says_that_its_judge_cannot_be_read(interleave: Call, tmp_path: Path) -> None:
    file, config = tmp_path / "some.txt", recipe(tmp_path)
    file.write_text("a cat\na hat\n")
    for answer, is_read in (('{"score": ["8/10", "7/10"]}', False), ('{"score": [8, 7]}', True)):
        judge = "judge=" + json.dumps({"kind": "model", "model": {"kind": "scripted", "answers": [answer]}})
        code, out, _ = interleave("batch", file, config, "--runs", tmp_path / "runs", "--set", judge)
        assert code == 0, out
        assert ("4 of 4 images not scored: judge: malformed_response" in out) != is_read
        assert ('from 0 to 10, not "8/10"' in out) != is_read


def test_a_batch_of_two_machines_is_that_of_one(interleave: Call, tmp_path: Path) -> None:
    file, config, runs = tmp_path / "some.txt", recipe(tmp_path), tmp_path / "runs"
    file.write_text("a cat\na hat\na bat\n")
    assert interleave("batch", file, config, "--runs", runs, "--name", "whole")[0] == 0
    for part in ("1/2", "2/2"):
        assert interleave("batch", file, config, "--runs", runs, "--shard", part)[0] == 0
    parts = [runs / f"some-{number}-of-2" for number in (1, 2)]
    third = ("--shard", "1/3", "--name", "third")
    assert interleave("batch", file, config, "--runs", runs, *third)[0] == 0
    for wrong, said in {
        (parts[0],): "some-1-of-2 is 1/2; give all 2 parts of one batch or build, and nothing else",
        (runs / "third", parts[1]): "third is 1/3, ",
        (parts[1], runs / "third"): "some-2-of-2 is 2/2; give all 3 parts",
    }.items():
        assert_refused(interleave("merge", *wrong, "--out", runs / "all"), said)
    code, out, _ = interleave("merge", *parts[::-1], "--out", runs / "all")  # a shell sorts 10-of-12 before 2-of-12
    assert (code, out) == (0, f"3 requests: {runs / 'all'}\n")
    assert interleave("batch", "--resume", "all", "--runs", runs)[0] == 0
    assert (runs / "all" / "requests.jsonl").read_bytes() == (runs / "whole" / "requests.jsonl").read_bytes()
    found = [{name: entry.attempts for name, entry in read_trace(runs / one).items()} for one in ("all", "whole")]
    assert [set(one) for one in found] == [set(found[0])] * 2
    images = [[a.image_id for name in sorted(one) for a in one[name].values()] for one in found]
    assert images[0] == images[1]
    assert_refused(interleave("batch", "--resume", "all", "--shard", "1/2", "--runs", runs), "leave it out")
    assert_refused(interleave("batch", "--resume", "all", "--name", "x", "--runs", runs), "--name x: is for a new run")
    assert_refused(interleave("batch", file, config, "--shard", "3/2", "--runs", runs), "the parts of 2 are 1 to 2")
    assert_refused(interleave("merge", *parts, "--out", runs / "all"), "all")


def test_a_finished_batch_is_reported_not_done_again(interleave: Call, tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    file.write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8")
    words = ("--runs", tmp_path / "runs")
    assert interleave("batch", file, recipe(tmp_path), *words)[0] == 0
    before = (tmp_path / "runs" / "some" / "trace.jsonl").read_bytes()
    code, out, _ = interleave("batch", "--resume", "some", *words)
    assert code == 0
    assert "2 complete" in out
    assert (tmp_path / "runs" / "some" / "trace.jsonl").read_bytes() == before
    other = interleave("batch", "--resume", "some", "--set", "seed=9", *words)
    assert_refused(other, "seed")


def test_configuration_files_are_arguments(interleave: Call, tmp_path: Path) -> None:
    file, more = tmp_path / "some.jsonl", tmp_path / "more.yaml"
    file.write_text('{"text": "one"}\n', encoding="utf-8")
    more.write_text("loop: {concurrency: 3}\n", encoding="utf-8")
    words = ("--runs", tmp_path / "runs")
    assert interleave("batch", file, recipe(tmp_path), more, *words)[0] == 0
    config = tmp_path / "runs" / "some" / "config.yaml"
    assert "concurrency: 3" in config.read_text(encoding="utf-8")
    more.write_text("seed: 9\n", encoding="utf-8")
    assert_refused(interleave("batch", more, "--resume", "some", *words), "seed")  # a file of the resumed run
    assert_refused(interleave("batch", file, "--resume", "some", *words), "one of the two")
    for old in (("-c", more), (f"--config={more}",)):
        assert_refused(interleave("run", "a cat", *old), "renamed; write the file after REQUEST")


def test_a_plan_alone(interleave: Call, tmp_path: Path) -> None:
    code, out, _ = interleave("plan", "a cat", recipe(tmp_path))
    assert code == 0
    assert "1. a cat" in out
    code, out, _ = interleave("plan", "a cat", recipe(tmp_path), "--json")
    assert json.loads(out)["plan"]["steps"][1]["text"] == "It likes it."
    assert_refused(interleave("plan", "a cat", recipe(tmp_path, planner=("mumble",))), "no usable plan")


def test_a_plan_with_half_a_surrogate_pair_is_printed_as_json(
    interleave: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = PlannerRecord(model="m", template="t", template_hash="h", raw="\ud83d", num_tries=1)
    record = PlanRecord(trajectory_id="a", request=Request(id="a", text="x"), planner=planner, plan=PLAN)

    async def plan_only(*_: object) -> PlanRecord:
        return record

    monkeypatch.setattr("interleave.loop.run.plan_only", plan_only)
    code, out, _ = interleave("plan", "a cat", recipe(tmp_path), "--json")
    assert code == 0
    assert json.loads(out)["planner"]["raw"] == "\ud83d"


def test_a_page_anew(interleave: Call, tmp_path: Path) -> None:
    interleave("run", "a cat", recipe(tmp_path), "--runs", tmp_path, "--name", "r")
    page = tmp_path / "r" / "report.html"
    page.unlink()
    code, out, _ = interleave("report", "r", "--runs", tmp_path)
    assert code == 0
    assert out.strip() == f"report: {page}"
    assert page.is_file()
    assert_refused(interleave("report", "rr", "--runs", tmp_path), "did you mean 'r'")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("run", " "), ("the request is empty",)),
        (("run", "\u200b\ufeff"), ("the request is empty",)),
        (("run", "x" * 20_001), ("20001 characters", "at most 20000")),
        (("run", "x", "--set", "lop.max_steps=3"), ("did you mean 'loop'",)),
        (("run", "x", "--set", "critic.kind=selff"), ("selff", "self")),
        (("sft", "planner", "--set", "trl.deepspeed={}"), ("trl.deepspeed: needs processes", "torchrun")),
        (("grpo", "--set", "trl.deepspeed=zero2.json"), ("trl.deepspeed: needs processes", "torchrun")),
        (("grpo", "--set", "trl.use_vllm=true"), ("trl.use_vllm: vllm is not installed",)),
        (("run", "remove the red circle"), ("nothing to change", "begin with what is to be drawn")),
        (("run", "remove the red circle", "--set", "planner.kind=none"), ("nothing to change",)),
        (("run", "please make it red"), ("nothing to change",)),
        (
            ("run", "draw a red circle", "--set", "planner.kind=none", "--set", "critic.kind=self"),
            ("critic.kind: self is the planner's model", "planner.kind is none"),
        ),
        (("run", "draw a red circle", "--set", "critic.kind=self"), ("critic.kind: self:", "takes no images")),
        (("data", "export-edits", "nothing", "--out", "o"), ("nothing: no such run",)),
        (("run", "x", "--set", "loop.select=best"), ("loop.select",)),
        (("run", "x", "--name", "../up"), ("plain name",)),
        (("run", "x", "--image", "none.png"), ("none.png",)),
        (
            ("run", "x", "--image", "https://example.org/a.png"),
            ("https://...: is an address, not a file; download it",),
        ),
        (("run", "a short story about a cat"), ("shapes/planner", "4 words 'short', 'story', 'about', 'cat'")),
        (("run", "draw a red circle, then a Drache"), ("the word 'Drache'", "circles, squares", "give a CONFIG")),
        (("run", "dessine un cercle"), ("'dessine', 'un', 'cercle'",)),
        (("run", "draw a red circle", "--set", "generator.ref=none"), ("generator", "none", "no such folder")),
        (("run", "rain on a window", "--set", "planner.kind=none"), ("shapes/generator", "'rain', 'window'")),
        (
            ("run", "rain on a window", "--set", "planner.kind=none", "--set", "generator.kind=images_api"),
            ("shapes/critic", "'rain'", "give a CONFIG"),
        ),
        (("plan", "how rain forms"), ("'how', 'rain', 'forms'",)),
        (("run", "make the circle green", "--image", "circle.png"), ("takes no images", "--set planner.kind=none")),
        (("run", "x", "circle.png"), ("circle.png: an image in the place of a CONFIG; write --image before",)),
        (
            ("run", "make the circle green", "--image", "photo.png", "--set", "planner.kind=none"),
            ("edits images of 32x32 pixels", "one of 300x200", "give one of 128 at most"),
        ),
        (
            tuple("run x --image strip.png --set planner.kind=none --set generator.kind=scripted".split()),
            ("an image is 400x1; models take at most 200 times", "such as critic.model; cut it"),
        ),
        (("batch", "words.jsonl"), ("'cat'",)),
        (("run", "words.jsonl"), ("words.jsonl: is a file, and only its name would be read; interleave batch takes",)),
        (("plan", "words.jsonl"), ("words.jsonl: is a file", "give one request")),
        (("batch",), ("FILE", "--resume")),
        (("batch", "none.jsonl"), ("none.jsonl", "no such file")),
        (("batch", "--resume", "none"), ("no such run",)),
        (("batch", "f.jsonl", "--retry"), ("--retry goes with --resume",)),
        (("serve", "--engine", "rai"), ("did you mean 'ray'",)),
        (("serve", "--set", "prot=3"), ("did you mean 'port'",)),
    ],
)
def test_mistakes(
    interleave: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], told: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32), "red").save(tmp_path / "circle.png")
    Image.new("RGB", (300, 200), "red").save(tmp_path / "photo.png")
    Image.new("RGB", (400, 1), "red").save(tmp_path / "strip.png")
    (tmp_path / "words.jsonl").write_text('{"text": "a red circle"}\n{"text": "a cat"}\n', encoding="utf-8")
    assert_refused(interleave(*words), *told)
    assert not list(tmp_path.glob("runs/*"))


def test_a_folder_that_was_there_is_kept_where_its_models_are_away(
    interleave: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that `merge` made, or that was killed before it began."""
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(hub.resolve("builtin:shapes/generator"), tmp_path / "model")
    config = load(RunConfig, [], [f"generator.ref={model}"])
    create_run(tmp_path / "runs" / "mine", config, lambda store: [make_request("draw a red circle", [], store)])
    shutil.rmtree(model)
    assert_refused(interleave("batch", "--resume", "mine"), "no such folder")
    assert (tmp_path / "runs" / "mine" / "requests.jsonl").is_file()


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ('{"text": 3}', "some.jsonl:1: text"),
        ('{"text": "a", "imags": []}', "did you mean 'images'"),
        ("[]", "some.jsonl:1"),
        ("{", "some.jsonl:1: not JSON"),
        ('{"text": "a", "id": "x"}\n{"text": "b", "id": "x"}', "some.jsonl:2: id 'x' is there already"),
        ('{"text": "a"}\n{"text": "a"}', "some.jsonl:2: this request is there already"),
        ('{"text": "a", "images": ["no.png"]}', "some.jsonl:1"),
        ("", "no requests in it"),
        ('{"text": ""}', "some.jsonl:1: the request is empty"),
        ('{"text": "a"}\n{"text": "b \\ud83d"}', "some.jsonl:2: holds half of a surrogate pair (U+D83D)"),
        ('{"text": "a", "category": "\\udc00"}', "some.jsonl:1: holds half of a surrogate pair (U+DC00)"),
    ],
)
def test_files_of_requests_with_mistakes(interleave: Call, tmp_path: Path, lines: str, told: str) -> None:
    file = tmp_path / "some.jsonl"
    file.write_text(lines, encoding="utf-8")
    assert_refused(interleave("batch", file, "--runs", tmp_path / "runs"), told)
    assert not list(tmp_path.glob("runs/*"))


def test_an_endpoint_that_is_not_there(interleave: Call, tmp_path: Path) -> None:
    config = recipe(tmp_path)
    sets = ("--set", "planner.model.kind=endpoint", "--set", "planner.model.url=http://127.0.0.1:9/v1")
    answer = interleave("run", "x", config, *sets, "--runs", tmp_path / "runs")
    assert_refused(answer, "cannot be reached", "start the server")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, Any]]:
    """What is built and trained, in an empty folder, without doing it: a name and a configuration each."""
    calls: list[tuple[str, Any]] = []

    def build(out: Path, config: DataConfig, *args: object) -> SetInfo:
        calls.append((f"build {out}", config))
        out.mkdir(parents=True, exist_ok=True)
        info = SetInfo(rows={"planner_sft": {"train": 0}}, source="build")
        (out / "set.json").write_text(info.model_dump_json())
        for name in ("critic_sft", "planner_sft", "critic_rl"):
            (out / f"{name}.jsonl").touch()
        return info

    def train_sft(agent: str, config: object, *args: object, **options: object) -> Path:
        calls.append((f"sft {agent}", config))
        return Path("runs/x/model")

    def train_grpo(config: object, *args: object, **options: object) -> Path:
        calls.append(("grpo", config))
        return Path("runs/x/model")

    monkeypatch.setattr("interleave.datasets.build.build_sets", build)
    monkeypatch.setattr("interleave.training.sft.train_sft", train_sft)
    monkeypatch.setattr("interleave.training.grpo.train_grpo", train_grpo)
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.mark.parametrize(
    ("words", "recipe"),
    [(("sft", "critic"), "sft_critic"), (("sft", "planner"), "sft_planner"), (("grpo",), "grpo_critic")],
)
def test_training_without_a_configuration_builds_the_miniatures_set_once(
    interleave: Call, called: list[tuple[str, Any]], words: tuple[str, ...], recipe: str
) -> None:
    cls = GrpoConfig if recipe.startswith("grpo") else SftConfig
    code, out, err = interleave(*words, "--json")
    assert code == 0, err
    assert json.loads(out)["model"] == "runs/x/model"
    assert err.startswith("sets/miniature: not there; building it, once (400 requests")
    assert called == [
        ("build sets/miniature", load(DataConfig, [CONFIGS / "data_miniature.yaml"])),
        (" ".join(words), load(cls, [CONFIGS / f"{recipe}.yaml"])),
    ]
    del called[:]
    code, _, err = interleave(*words, "--set", "seed=3")
    assert (code, err) == (0, "")
    assert called == [(" ".join(words), load(cls, [CONFIGS / f"{recipe}.yaml"], ["seed=3"]))]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sft", "critic", "--set", "trl.learning_rat=1"), "did you mean 'learning_rate'"),
        (("grpo", "--set", "reward_weights={x: 1}"), "reward_weights"),
        (("grpo", "--set", "generator.ref=./none"), "./none"),
        (("grpo", "--set", "generator.lora=./none"), "generator.lora"),
    ],
)
def test_a_setting_that_is_refused_builds_no_set(
    interleave: Call, called: list[tuple[str, Any]], words: tuple[str, ...], said: str
) -> None:
    code, _, err = interleave(*words)
    assert code == 2
    assert said in err
    assert called == []


@pytest.mark.parametrize(
    ("words", "processes"),
    [(("sft", "critic", "--dry-run"), "1"), (("grpo", "--dry-run"), "1"), (("sft", "planner"), "2")],
)
def test_a_plan_and_several_processes_build_no_set(
    interleave: Call,
    called: list[tuple[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    processes: str,
) -> None:
    launcher = {"WORLD_SIZE": processes, "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    assert_refused(interleave(*words), "sets/miniature: not there", "make it first", "interleave data build")
    assert called == []


def test_a_set_of_the_users_is_never_built_for_them(interleave: Call, called: list[tuple[str, Any]]) -> None:
    assert_refused(interleave("sft", "critic", "--set", "data=sets/mine"), "sets/mine/critic_sft.jsonl: no such file")
    for name in ("mine/critic_sft", "miniature/critic_rl"):
        Path(f"sets/{name}.jsonl").parent.mkdir(parents=True)
        Path(f"sets/{name}.jsonl").touch()
    assert interleave("sft", "critic", "--set", "data=sets/mine")[0] == 0
    assert interleave("grpo", CONFIGS / "grpo_critic.yaml")[0] == 0
    assert [name for name, _ in called] == ["sft critic", "grpo"]
    assert_refused(interleave("grpo", "x.yaml", "--resume", "y"), "one of the two")


def test_data_build_without_a_configuration_builds_the_miniatures_set(
    interleave: Call, called: list[tuple[str, Any]]
) -> None:
    interleave("data", "build")
    interleave("data", "build", "--out", "mine", "--set", "prompts=null", "--set", "trajectories=[old]")
    assert [name for name, _ in called] == ["build sets/miniature", "build mine"]
    assert called[0][1] == load(DataConfig, [CONFIGS / "data_miniature.yaml"])
    assert (called[1][1].prompts, called[1][1].trajectories) == (None, ("old",))
    assert_refused(interleave("data", "build", CONFIGS / "data_miniature.yaml"), "--out DIR")
    words = ("data", "build", "--out", "other", "--set", "prompts.kind=file", "--set", "prompts.path=x.jsonl")
    assert_refused(interleave(*words), "teacher=run")
