"""`runs list`, `compare` and `clean`: what run folders hold, told from their files, and what may be removed."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from imgen_common.config import Config
from imgen_common.errors import UserError
from imgen_common.run_folder.checkpoints import write_manifest
from imgen_common.run_folder.cleaning import find_removable, remove
from imgen_common.run_folder.commands import build_runs_app, format_age, format_bytes
from imgen_common.run_folder.folder import RunFolder
from imgen_common.run_folder.listing import list_runs, summarize_run


class Training(Config):
    method: str = "refl"
    rewards: tuple[str, ...] = ("clip",)
    guidance_scale: float = 2.0
    max_train_steps: int = 4


def make_training(path: Path, *, finished: bool) -> Path:
    """A run with checkpoints of updates 1 to 3, of 4, and their metrics; finished: also 4, and it is evaluated."""
    with RunFolder.create(path, Training()) as run:
        run.log(0, {"eval/reward": 1.0})
        for step in range(1, 5 if finished else 4):
            run.log(step, {"train/reward": 10.0 * step})
            run.save_checkpoint(step, {}, {"update": step})
        run.log(3, {"eval/reward": 2.5})
    for scale, name in ((1.0, "trained"), (2.0, "trained"), (2.0, "base")):
        folder = path / "evaluations" / f"{name}-g{scale:g}"
        if finished or name == "base":
            folder.mkdir(parents=True)
            content = {"name": name, "guidance": scale, "prompts": ["a", "b"], "scores": {"reward": [scale, 2 * scale]}}
            (folder / "scores.json").write_text(json.dumps(content))
            (folder / "000.png").write_bytes(b"x" * 100)
    (path / "samples").mkdir()
    (path / "samples" / "grid-000003.png").write_bytes(b"x" * 50)
    return path


def make_stories(path: Path, requests: int, statuses: list[str], extra: str = "") -> Path:
    """A run of the loop with so many requests, of which some have ended; each has one image, that was judged."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(f"loop: {{}}\nplanner: {{}}\n{extra}")
    (path / "requests.jsonl").write_text('{"text": "a"}\n' * requests)
    records = [
        record
        for i, status in enumerate(statuses)
        for record in (
            {"type": "attempt", "trajectory_id": f"{i}", "step": 1, "attempt": 1, "verdict": status == "complete"},
            {"type": "trajectory", "id": f"{i}", "status": status},
        )
    ]
    (path / "trace.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"type": "att')
    (path / "images").mkdir()
    (path / "images" / "a.png").write_bytes(b"x" * 70)
    return path


def make_sft(path: Path, *, finished: bool) -> Path:
    """A run of TRL with a whole checkpoint of update 2, of 6, and one that a kill left."""
    (path / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    (path / "checkpoints" / "checkpoint-3").mkdir()
    (path / "config.yaml").write_text("trl: {}\n")
    (path / "checkpoints" / "checkpoint-2" / "trainer_state.json").write_text('{"max_steps": 6}')
    write_manifest(path / "checkpoints" / "checkpoint-2")
    (path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "train_lo')
    if finished:
        (path / "model").mkdir()
    return path


def test_a_stopped_training_names_the_update_it_goes_on_from(tmp_path: Path) -> None:
    run = summarize_run(make_training(tmp_path / "a", finished=False))
    assert (run.kind, run.state, run.done, run.total) == ("train", "stopped", 3, 4)
    assert run.progress == "stopped at update 3 of 4"
    assert (run.scores, run.scores_of) == ({"reward": 2.5}, "the quick evaluation at update 3")


def test_scores_of_a_tiny_decoders_images_are_said_to_be_that(tmp_path: Path) -> None:
    path = make_training(tmp_path / "a", finished=False)
    with RunFolder.open(path, Training(), ["flowbp"]) as run:
        run.log(4, {"eval_preview/reward": 7.0})
    found = summarize_run(path)
    assert found.scores == {"reward": 7.0}
    assert found.scores_of == "the quick evaluation at update 4, decoded by model.vae.preview"


def test_a_finished_training_has_the_scores_at_its_own_scale(tmp_path: Path) -> None:
    run = summarize_run(make_training(tmp_path / "a", finished=True))
    assert (run.state, run.progress, run.scores) == ("finished", "finished", {"reward": 3.0})
    assert run.size == sum(file.stat().st_size for file in (tmp_path / "a").rglob("*") if file.is_file())


def test_a_training_that_lacks_an_evaluation_is_not_finished(tmp_path: Path) -> None:
    """It was stopped between those of two guidance scales."""
    run = make_training(tmp_path / "run", finished=True)
    assert summarize_run(run).state == "finished"
    (run / "evaluations" / "trained-g2" / "scores.json").unlink()
    found = summarize_run(run)
    assert (found.state, found.scores) == ("stopped", {"reward": 1.5})
    with pytest.raises(UserError, match="--images is for finished runs"):
        find_removable(run, images=True)


def test_a_run_whose_lock_is_held_is_running(tmp_path: Path) -> None:
    path = make_training(tmp_path / "a", finished=False)
    with RunFolder.open(path) as run:
        run.log(4, {"train/reward": 1.0})
        assert summarize_run(path).progress == "running at update 4 of 4"
    assert summarize_run(path).state == "stopped"


@pytest.mark.parametrize(
    ("requests", "statuses", "kind", "progress", "complete"),
    [
        (1, ["complete"], "run", "finished", 1.0),
        (3, ["complete", "failed"], "batch", "stopped, 2 of 3 stories", 0.5),
        (2, ["complete", "failed"], "batch", "finished", 0.5),
    ],
)
def test_stories(requests: int, statuses: list[str], kind: str, progress: str, complete: float, tmp_path: Path) -> None:
    run = summarize_run(make_stories(tmp_path / "a", requests, statuses))
    assert (run.kind, run.progress) == (kind, progress)
    assert run.scores == {"complete": complete, "accepted": complete}


def test_a_build_is_finished_when_its_sets_are_made(tmp_path: Path) -> None:
    path = make_stories(tmp_path / "a", 2, ["complete", "complete"], "trajectories: []\nfilters: {}\n")
    assert (summarize_run(path).kind, summarize_run(path).state) == ("data build", "stopped")
    (path / "set.json").write_text('{"rows": {"critic_sft": {"train": 5, "val": 2}}}')
    assert (summarize_run(path).state, summarize_run(path).scores) == ("finished", {"critic_sft": 7.0})


def test_training_of_agents(tmp_path: Path) -> None:
    stopped, done = make_sft(tmp_path / "a", finished=False), make_sft(tmp_path / "b", finished=True)
    assert summarize_run(stopped).progress == "stopped at update 2 of 6"
    assert (summarize_run(done).state, summarize_run(done).scores) == ("finished", {"loss": 2.0})


def test_damage_and_strangers_are_listed(tmp_path: Path) -> None:
    for name, text in (("a", "method: [\n"), ("b", "x: 1\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    assert {run.name: (run.kind, run.state) for run in list_runs(tmp_path)} == {
        "a": ("other", "unreadable"),
        "b": ("other", "finished"),
    }
    with pytest.raises(UserError, match="there is no such folder"):
        list_runs(tmp_path / "c")


# --- clean -----------------------------------------------------------------------------------------------------------


def test_cleaning_keeps_the_last_checkpoint_and_scores(tmp_path: Path) -> None:
    path = make_training(tmp_path / "a", finished=True)
    before = summarize_run(path)
    found = find_removable(path, images=True)
    assert [one.what for one in found] == [
        *("checkpoint of update 1", "checkpoint of update 2", "checkpoint of update 3"),
        *("logged images", "images of evaluations"),
    ]
    assert [one.size for one in found][-2:] == [50, 300]
    freed = remove(path, images=True)
    after = summarize_run(path)
    assert freed == before.size - after.size == sum(one.size for one in found)
    assert (after.scores, after.done) == (before.scores, 4)
    assert [entry.name for entry in (path / "checkpoints").iterdir()] == ["step-000004"]
    assert RunFolder.open(path, is_main=False).load_checkpoint(4).state == {"update": 4}
    assert find_removable(path, images=True) == []


def test_without_images_only_checkpoints_go(tmp_path: Path) -> None:
    path = make_training(tmp_path / "a", finished=False)
    names = [one.path.name for one in find_removable(path, images=False)]
    assert names == ["step-000001", "step-000002"]
    (path / "watchdog").mkdir()
    for alerts, kept in (([], []), (["drift"], ["step-000002"])):  # of the last update before the first alert
        lines = [{"update": 2, "alerts": []}, {"update": 3, "alerts": alerts}]
        (path / "watchdog" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert [one.path.name for one in find_removable(path, images=False)] == names[: 2 - len(kept)]
    with pytest.raises(UserError, match="--images is for finished runs"):
        find_removable(path, images=True)


def test_the_checkpoint_that_is_loaded_at_the_end_is_not_cleaned(tmp_path: Path) -> None:
    """With load_best_model_at_end; without it transformers would leave the last model, without a word."""
    run = make_sft(tmp_path / "sft", finished=False)
    for step, best in ((4, 2), (6, 4)):
        folder = run / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir()
        state = {"global_step": step, "best_model_checkpoint": f"elsewhere/checkpoints/checkpoint-{best}"}
        (folder / "trainer_state.json").write_text(json.dumps(state))
        write_manifest(folder)
    assert [one.what for one in find_removable(run, images=False)] == ["checkpoint of update 2"]
    (run / "model").mkdir()
    assert len(find_removable(run, images=False)) == 2


def test_a_run_in_use_is_not_cleaned(tmp_path: Path) -> None:
    path = make_training(tmp_path / "a", finished=True)
    with RunFolder.open(path), pytest.raises(UserError, match="in use by another process"):
        remove(path, images=False)
    assert len(RunFolder.open(path, is_main=False).checkpoints()) == 4


def test_nothing_goes_where_the_last_checkpoint_is_damaged(tmp_path: Path) -> None:
    path = make_training(tmp_path / "a", finished=True)
    (path / "checkpoints" / "step-000004" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="damaged checkpoint"):
        remove(path, images=True)
    assert len(RunFolder.open(path, is_main=False).checkpoints()) == 4
    assert (path / "samples" / "grid-000003.png").exists()


def test_images_of_stories_go_and_those_of_sets_stay(tmp_path: Path) -> None:
    stories = make_stories(tmp_path / "a", 1, ["complete"])
    assert remove(stories, images=True) == 70
    assert not (stories / "images" / "a.png").exists()
    build = make_stories(tmp_path / "b", 1, ["complete"], "trajectories: []\nfilters: {}\n")
    (build / "set.json").write_text('{"rows": {}}')
    with pytest.raises(UserError, match="its sets name its images"):
        remove(build, images=True)


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Calls a command in a folder with the runs `done` and `open`; what it printed."""
    monkeypatch.chdir(tmp_path)
    make_training(tmp_path / "runs" / "done", finished=True)
    make_training(tmp_path / "runs" / "open", finished=False)
    content = yaml.safe_load((tmp_path / "runs" / "open" / "config.yaml").read_text())
    (tmp_path / "runs" / "open" / "config.yaml").write_text(yaml.dump({**content, "method": "draft\x1b[2J"}))

    def run(*words: str) -> str:
        result = CliRunner().invoke(build_runs_app("flowbp", ("a", "b")), words)
        assert result.exit_code == 0, result.output
        return result.output

    return run


@pytest.mark.parametrize("words", [(), ("list",), ("--runs", "runs")])
def test_runs_are_listed_by_default(words: tuple[str, ...], call: Callable[..., str]) -> None:
    lines = call(*words).splitlines()
    assert lines[0].split() == ["run", "kind", "state", "last", "scores", "size", "written"]
    rows = {line.split()[0]: " ".join(line.split()) for line in lines[1:3]}
    assert rows["done"].startswith("done train finished reward=3 ")
    assert rows["open"].startswith("open train stopped at update 3 of 4 reward=2.5 ")
    assert lines[-1].startswith("2 runs in runs, ")


@pytest.mark.parametrize(
    ("values", "shown"),
    [("[1000000.5, 1000000.58]", "reward=1000000.54"), ("[null, 1.5]", "reward=not finite"), ("[NaN]", "reward=not")],
)
def test_scores_are_shown_with_the_digits_of_their_size(values: str, shown: str, call: Callable[..., str]) -> None:
    content = f'{{"name": "trained", "guidance": 2.0, "prompts": ["a", "b"], "scores": {{"reward": {values}}}}}'
    (Path("runs") / "done" / "evaluations" / "trained-g2" / "scores.json").write_text(content)
    assert f" {shown} " in " ".join(call("list").splitlines()[1].split())
    assert shown.removeprefix("reward=") in call("compare", "done", "open")


def test_json(call: Callable[..., str]) -> None:
    runs = {run["name"]: run for run in json.loads(call("--json"))}
    assert runs["open"]["state"] == "stopped"
    both = json.loads(call("compare", "done", "open", "--json"))
    assert both["configuration"] == {"method": ["refl", "draft\x1b[2J"]}
    assert [run["scores"] for run in both["runs"]] == [{"reward": 3.0}, {"reward": 2.5}]


@pytest.mark.parametrize("value", ["NaN", "Infinity"])
def test_a_score_that_is_not_finite_is_null_in_json(call: Callable[..., str], tmp_path: Path, value: str) -> None:
    (scores,) = (tmp_path / "runs" / "done" / "evaluations").glob("trained-g1/scores.json")
    scores.write_text(scores.read_text().replace('"reward": [1.0', f'"bad": [{value}, {value}], "reward": [1.0'))
    (tmp_path / "runs" / "done" / "evaluations" / "trained-g2" / "scores.json").unlink()
    for words in (("--json",), ("compare", "done", "open", "--json")):
        found = json.loads(call(*words), parse_constant=pytest.fail)
        runs = {run["name"]: run for run in (found["runs"] if "compare" in words else found)}
        assert runs["done"]["scores"] == {"bad": None, "reward": 1.5}


def test_a_quick_score_is_of_the_last_quick_evaluation(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", Training()) as run:
        run.log(1, {"eval/reward": 0.5, "eval/old": 0.5})
        run.log(2, {"eval/reward": float("nan")})
    found = summarize_run(tmp_path / "run")
    assert found.as_json()["scores"] == {"reward": None}
    assert "at update 2" in found.scores_of


def test_a_folder_that_goes_while_it_is_listed_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = make_training(tmp_path / "run", finished=False), os.scandir

    def scandir(folder: Any) -> Any:
        if Path(folder).name.startswith("step-"):  # pruned, once its parent was read
            raise FileNotFoundError(2, "No such file or directory", str(folder))
        return read(folder)

    whole = summarize_run(path).size
    monkeypatch.setattr(os, "scandir", scandir)
    assert 0 < summarize_run(path).size < whole


def test_nothing_is_removed_where_standard_input_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_training(tmp_path / "run", finished=True)
    monkeypatch.setattr(sys, "stdin", None)
    build_runs_app("prog", ("a", "b"))(["clean", str(tmp_path / "run")], standalone_mode=False)
    assert "nothing was removed; --yes removes it" in capsys.readouterr().out


def test_a_narrow_terminal_shows_runs_below_each_other(
    call: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setenv("COLUMNS", "40")
    assert "last scores reward=3\n" in re.sub(r"\x1b\[[0-9;]*m", "", call())


def test_two_runs_side_by_side(call: Callable[..., str]) -> None:
    lines = [line.split() for line in call("compare", "done", "open").splitlines()]
    assert ["configuration", "done", "open"] in lines
    assert ["method", '"refl"', '"draft\\u001b[2J"'] in lines
    assert ["reward", "3", "2.5"] in lines


def test_nothing_is_removed_without_a_confirmation(call: Callable[..., str], tmp_path: Path) -> None:
    assert "nothing was removed; --yes removes it" in call("clean", "done", "open")
    assert len(list((tmp_path / "runs").glob("*/checkpoints/*"))) == 7
    assert "freed" in call("clean", "done", "open", "--yes")
    assert len(list((tmp_path / "runs").glob("*/checkpoints/*"))) == 2
    assert call("clean", "done", "open") == "nothing to remove\n"


def test_numbers_as_people_read_them() -> None:
    assert [format_bytes(size) for size in (0, 999, 1536, 75.6 * 2**20, 1234 * 2**30)] == [
        *("0 B", "999 B", "1.5 KiB", "75.6 MiB", "1,234 GiB"),
    ]
    assert [format_age(seconds) for seconds in (-5, 59, 61, 7300, 200000)] == [
        *("just now", "just now", "1 min ago", "2 h ago", "2 d ago"),
    ]


def test_no_heavy_library_is_imported(tmp_path: Path) -> None:
    make_training(tmp_path / "a", finished=True)
    code = (
        "import sys; from pathlib import Path; from imgen_common.run_folder import cleaning, listing; "
        f"root = Path({str(tmp_path)!r}); listing.list_runs(root); cleaning.find_removable(root / 'a', True); "
        "print(sorted({'torch', 'numpy', 'transformers', 'diffusers', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
