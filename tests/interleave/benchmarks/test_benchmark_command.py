"""The command: end to end, in parts, killed at any moment, and what it says of mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imgen_common.config import load
from imgen_common.errors import UserError
from interleave.benchmarks import setup
from interleave.benchmarks.official import files
from interleave.benchmarks.registry import BENCHMARKS
from interleave.benchmarks.setup import BenchmarkRequest, check_judge, judge_differences, load_config, prepare
from interleave.cli import main
from interleave.cli.benchmark import TITLES
from interleave.loop import run as session
from interleave.loop.config import RunConfig
from interleave.models.chat.endpoint import EndpointChat, EndpointChatConfig
from interleave.protocols import HashedImage, Message, SystemText

RECIPES = Path(__file__).parents[3] / "configs" / "interleave"
FAST = ("run.planner.kind=none", "run.critic.kind=none", "run.generator.num_inference_steps=2", "run.cache=null")
JUDGE = 'judge={"kind": "scripted", "answers": ["{\\"criteria_met\\": true}"], "latency": 0.2}'


def words(name: str, out: Path, *options: str, sets: tuple[str, ...] = FAST) -> list[str]:
    return ["benchmark", name, "--out", str(out), *options, *(word for text in sets for word in ("--set", text))]


def interleave(*arguments: str) -> int:
    before, sys.argv = sys.argv, ["interleave", *arguments]
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        sys.argv = before
    return int(ended.value.code or 0)


def table(out: Path) -> dict[str, Any]:
    return json.loads((out / "table.json").read_text())


@pytest.mark.slow
def test_generation_and_scoring_alone_make_what_both_make(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert interleave(*words("wise", tmp_path / "both", "--limit", "3")) == 0
    shown = capsys.readouterr()
    assert "3 items: 3 generated, 3 judged whole." in shown.out
    assert "3 calls of the judge, about " in shown.err
    assert interleave(*words("wise", tmp_path / "apart", "--limit", "3", "--stage", "generate")) == 0
    assert not (tmp_path / "apart" / "table.json").exists()
    assert interleave(*words("wise", tmp_path / "apart", "--limit", "3", "--stage", "score", "--json")) == 0
    assert table(tmp_path / "apart") == table(tmp_path / "both")
    assert len(list((tmp_path / "apart" / "outputs").glob("*.png"))) == 3
    layout = ("--outputs-from", str(tmp_path / "both" / "outputs"), "--limit", "3")
    assert interleave(*words("wise", tmp_path / "theirs", *layout)) == 0
    assert table(tmp_path / "theirs")["figures"] == table(tmp_path / "both")["figures"]
    monkeypatch.setattr(setup, "check_judge", lambda *given: pytest.fail("nothing is left to ask"))
    for folder, more in (("both", ()), ("apart", ("--stage", "score")), ("theirs", layout[:2])):
        assert interleave(*words("wise", tmp_path / folder, "--limit", "3", *more)) == 0


@pytest.mark.parametrize(
    ("name", "options", "sets", "said"),
    [
        ("wise", ["--data", "none"], (), "none: no file, nor a folder with merge.json"),
        ("ueval", ["--data", "none"], (), "zlab-princeton/UEval on the Hugging Face Hub"),
        ("comm", ["--data", "none"], (), "weisuxi/CoMM on the Hugging Face Hub"),
        ("rise", ["--data", "none"], (), "PhoenixZ/RISEBench on the Hugging Face Hub"),
        ("rise", [], (), "builtin:shapes/planner takes no images; --set run.planner.kind=none"),
        ("wise", ["--stage", "judge"], (), "--stage 'judge': unknown; allowed: all, generate, score"),
        ("wise", ["--shard", "9/8"], (), "--shard 9/8: the parts of 8 are 1 to 8"),
        ("wise", ["--shard", "1/100"], (), "there are only 24 items"),
        ("wise", ["--prompts-from", "none"], (), "vllm_eval.py; give the folder of a copy of PKU-YuanGroup/WISE"),
        ("wise", ["--outputs-from", "none"], (), "none: has no image of an item"),
        ("wise", [], ("judge.kind=local", "judge.ref=none/of-it"), "none/of-it"),
        ("wise", ["--outputs-from", "none", "--stage", "generate"], (), "was made already"),
        ("wise", [], ("judge.kind=gpt",), "judge"),
        ("wise", [], ("jugde.kind=shapes",), "did you mean 'judge'"),
    ],
)
def test_mistakes_are_one_line(
    name: str, options: list[str], sets: tuple[str, ...], said: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert interleave(*words(name, Path("out"), *options, sets=sets)) == 2
    shown = capsys.readouterr().err.splitlines()
    assert said in shown[-1]
    assert len([line for line in shown if line.startswith("interleave: error:")]) == 1


@pytest.mark.slow
def test_a_price_above_the_limit_waits_for_yes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limited = (*FAST, "confirm_calls=2")
    assert interleave(*words("wise", tmp_path / "out", "--limit", "3", sets=limited)) == 2
    assert "add --yes" in capsys.readouterr().err
    assert not (tmp_path / "out" / "answers.jsonl").exists()
    assert interleave(*words("wise", tmp_path / "out", "--limit", "3", "--yes", sets=limited)) == 0
    priced = (*FAST, "prices.prompt=1000000", "confirm_money=5")
    assert interleave(*words("wise_legacy", tmp_path / "priced", "--limit", "3", sets=priced)) == 2
    assert "USD" in capsys.readouterr().err


def test_a_judge_that_is_down_is_refused_before_anything_is_generated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    down = (*FAST, "judge.kind=endpoint", "judge.url=http" + "://127.0.0.1:9/v1")
    assert interleave(*words("wise", tmp_path / "out", "--limit", "2", sets=down)) == 2
    assert "chat endpoint http" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out" / "generation").exists()
    assert interleave(*words("wise", tmp_path / "out", "--limit", "2", "--stage", "generate", sets=down)) == 0


def test_stories_that_failed_are_said_with_how_to_try_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = ("run.generator.kind=images_api", "run.generator.url=http" + "://127.0.0.1:9/v1")
    gone = (*FAST[:2], *gone, "run.generator.retry.max_tries=1", "run.loop.max_attempts=1")
    out = tmp_path / "my out[1]"
    assert interleave(*words("wise", out, "--limit", "2", "--stage", "generate", sets=gone)) == 0
    said = " ".join(capsys.readouterr().out.split())
    folder = f"'{out / 'generation'}'"
    assert f"2 of 2 items failed and will be missing; to try again: interleave batch --resume {folder} --retry" in said


@pytest.mark.parametrize(
    ("name", "images", "systems"),
    [("ueval", 2, 0), ("rise", 2, 0), ("comm", 2, 1), ("wise", 1, 1), ("wise_legacy", 1, 1)],
)
def test_a_judge_is_first_asked_as_later(name: str, images: int, systems: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some servers are started with a limit of one image, and some models take no system turn beside images."""
    asked: list[Message] = []

    async def check(_: EndpointChat, message: Message) -> None:
        asked.append(message)

    monkeypatch.setattr(EndpointChat, "check", check)
    check_judge(load(EndpointChatConfig, [], ["url=http" + "://127.0.0.1:9/v1", "model=m"]), BENCHMARKS[name].judge)
    kinds = (HashedImage, SystemText)
    assert [[sum(isinstance(part, kind) for part in m) for kind in kinds] for m in asked] == [[images, systems]]


def test_two_folders_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert interleave(*words("wise", tmp_path / "a", "--limit", "3")) == 0
    other = ("judge.kind=scripted", 'judge.answers=["Score: 0"]')
    layout = ("--outputs-from", str(tmp_path / "a" / "outputs"), "--limit", "3")
    assert interleave(*words("wise", tmp_path / "b", *layout, sets=other)) == 0
    changed = ("judge.kind=scripted", 'judge.answers=["Score: 1"]')
    assert interleave(*words("wise", tmp_path / "b", *layout, sets=changed)) == 2
    assert "holds answers of the judge 'scripted " in capsys.readouterr().err
    assert interleave(*words("wise", tmp_path / "a", "--limit", "3", sets=(*FAST, *changed))) == 2
    said = capsys.readouterr().err
    assert f"give another --out, and --outputs-from {tmp_path / 'a' / 'outputs'} for the same images" in said
    assert interleave("benchmark", "agree", str(tmp_path / "a"), str(tmp_path / "b")) == 0
    said = capsys.readouterr().out
    assert "| score " in said
    assert "nan" not in said
    assert "–: a judge that answers all items alike has none" in said
    assert interleave("benchmark", "agree", str(tmp_path / "a"), str(tmp_path / "b"), "--json") == 0
    (found,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["correlation"] is None
    assert interleave("benchmark", "agree", str(tmp_path / "a"), str(tmp_path / "none")) == 2


@pytest.mark.parametrize("name", ["ueval", "wise", "wise_legacy", "rise", "comm"])
def test_the_recipe_of_a_judge_is_that_of_the_published_figures(name: str) -> None:
    config = load_config([RECIPES / f"benchmark_{name}.yaml"], [RECIPES / "klein_qwen3vl.yaml"], ["run.seed=3"])
    official = BENCHMARKS[name].judge
    assert isinstance(config.judge, EndpointChatConfig)
    assert config.judge.model == official.model
    assert config.judge.temperature == official.settings.get("temperature", config.judge.temperature)
    assert config.judge.max_new_tokens == official.settings.get("max_tokens", config.judge.max_new_tokens)
    assert config.run.seed == 3
    assert config.run.planner == load(RunConfig, [RECIPES / "klein_qwen3vl.yaml"]).planner


def test_settings_of_the_loop_beside_its_recipe_are_not_lost(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("run: {loop: {max_attempts: 3}}\n")
    for configs, sets in (([tmp_path / "own.yaml"], []), ([], ["run={seed: 3}"])):
        with pytest.raises(UserError, match="--run-config: `run` is set beside it"):
            load_config(configs, [RECIPES / "klein_qwen3vl.yaml"], sets)
    assert load_config([tmp_path / "own.yaml"], [], []).run.loop.max_attempts == 3


@pytest.mark.parametrize(
    ("name", "sets", "said"),
    [
        ("wise", [], []),
        ("wise", ["judge.model=Qwen/Qwen3.5-35B-A3B"], []),
        ("wise", ["judge.model=Qwen3.5-35B-A3B-FP8"], ["the judge is Qwen3.5-35B-A3B-FP8, published figures are of"]),
        ("comm", ["judge.model=gpt-4o-mini"], ["the judge is gpt-4o-mini, published figures are of gpt-4o"]),
        ("rise", ["judge.temperature=0.7"], ["the judge's temperature is 0.7, that of published figures 0"]),
        ("rise", ["judge.image_detail=null"], ["the judge's image_detail is None, that of published figures high"]),
        ("rise", ["judge.extra.top_p=0.5"], []),  # at temperature 0 it changes nothing
        ("comm", ["judge.extra.top_p=0.5"], ["the judge's top_p is 0.5, that of published figures unset"]),
        ("ueval", ["judge.extra.temperature=0"], ["the judge's temperature is 0, that of published figures unset"]),
        ("wise_legacy", ["judge.max_new_tokens=500"], ["max_tokens is 500, that of published figures 2000"]),
        ("rise", ["judge.extra.max_completion_tokens=500"], ["max_tokens is 500, that of published figures 4096"]),
        ("rise", ["judge.extra.max_completion_tokens=4096", "judge.max_new_tokens=9"], []),
        (
            "wise",
            ["judge.extra.chat_template_kwargs=null"],
            ["chat_template_kwargs is None, that of"],
        ),
        (
            "ueval",
            ["judge={kind: shapes}"],
            ["the judge is of the kind shapes, published figures are of"],
        ),
    ],
)
def test_a_judge_that_is_not_the_published_one_is_said(name: str, sets: list[str], said: list[str]) -> None:
    config = load_config([RECIPES / f"benchmark_{name}.yaml"], [], sets)
    found = judge_differences(config.judge, BENCHMARKS[name].judge)
    assert len(found) == len(said)
    for part, sentence in zip(said, found, strict=True):
        assert part in sentence


@pytest.mark.slow
def test_stories_that_failed_can_be_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = ("run.generator.url=http://127.0.0.1:9/v1", "run.generator.retry.max_tries=1", "run.loop.max_attempts=1")
    sets = ("run.planner.kind=none", "run.critic.kind=none", "run.cache=null", "run.generator.kind=images_api", *gone)
    for _ in range(2):
        assert interleave(*words("wise", tmp_path / "out", "--limit", "2", "--stage", "generate", sets=sets)) == 0
        said = capsys.readouterr().out
        again = f"batch --resume {tmp_path / 'out' / 'generation'} --retry"
        assert "0 of 2 items are generated" in said
        assert "2 of 2 items failed and will be missing" in said
        assert again in " ".join(said.split())
    assert interleave(*again.split()) == 1
    assert "2 requests: 2 generator_failed" in capsys.readouterr().out


def test_every_benchmark_has_its_command() -> None:
    assert list(TITLES) == list(BENCHMARKS)


# --- kills and parts -------------------------------------------------------------------------------------------------


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def kill_when(command: list[str], reached: Callable[[], bool]) -> None:
    """Starts a command and kills it once something is reached; the wait ends as a guard only."""
    process = subprocess.Popen(
        [sys.executable, "-m", "interleave", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 180
    while process.poll() is None and not reached():
        assert time.monotonic() < end
        time.sleep(0.02)
    assert process.poll() is None, "ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_kill_loses_nothing(tmp_path: Path) -> None:
    sets = (*FAST, JUDGE)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert interleave(*words("ueval", whole, "--limit", "4", sets=sets)) == 0
    command = words("ueval", killed, "--limit", "4", sets=sets)
    kill_when(command, lambda: lines(killed / "generation" / "trace.jsonl") >= 4)
    assert lines(killed / "answers.jsonl") == 0
    kill_when(command, lambda: lines(killed / "answers.jsonl") >= 3)
    assert interleave(*command) == 0
    assert table(killed) == table(whole)
    for file in (whole / "outputs").rglob("*.png"):
        assert file.read_bytes() == (killed / file.relative_to(whole)).read_bytes()


@pytest.mark.slow
def test_parts_that_generate_have_the_table_of_one(tmp_path: Path) -> None:
    assert interleave(*words("ueval", tmp_path / "whole", "--limit", "6")) == 0
    for number in (1, 2, 3):
        assert interleave(*words("ueval", tmp_path / "parts", "--limit", "6", "--shard", f"{number}/3")) == 0
    assert table(tmp_path / "parts") == table(tmp_path / "whole")


@pytest.mark.parametrize("again", ["1/1", "1/4"])
def test_what_parts_have_is_not_generated_again(again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the same command without --shard, to see the figures of all parts."""
    monkeypatch.setattr(session, "run_and_close", lambda *given, **more: [])

    def generate(shard: str) -> None:
        request = BenchmarkRequest("ueval", "builtin:shapes", tmp_path, limit=4, shard=shard)
        prepare(request, load_config([], [], []), [])[0].generate(lambda record: None)

    generate("1/2")
    with pytest.raises(UserError, match=r"1-of-2: has [12] of these items already.* --stage score"):
        generate(again)
    generate("1/2")
    (tmp_path / "generation.1-of-2" / "requests.jsonl").unlink()  # as while another process makes that part
    generate("2/2")


def test_parts_that_are_made_otherwise_are_not_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "run_and_close", lambda *given, **more: [])

    def generate(number: int, *sets: str) -> None:
        request = BenchmarkRequest("ueval", "builtin:shapes", tmp_path, limit=2, shard=f"{number}/2")
        prepare(request, load_config([], [], sets), [])[0].generate(lambda record: None)

    generate(1)
    said = "1-of-2: was made with another configuration in seed; give all parts the same, or another --out"
    with pytest.raises(UserError, match=said):
        generate(2, "run.seed=1")
    assert not (tmp_path / "generation.2-of-2").exists()
    generate(2, "run.loop.concurrency=2")


def test_a_part_that_was_killed_as_it_began_is_to_be_removed(tmp_path: Path) -> None:
    request = BenchmarkRequest("ueval", "builtin:shapes", tmp_path, limit=2)
    work = prepare(request, load_config([], [], []), [])[0]
    (tmp_path / "generation").mkdir()
    (tmp_path / "generation" / "config.yaml").touch()
    with pytest.raises(
        UserError, match=r"generation: has no requests\.jsonl yet: .* was killed as it began; then remove it"
    ):
        work.generate(lambda record: None)


def test_the_miniature_judges_no_images_of_official_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its critic, which is the default, would have up to 16 of them made in each step."""
    row = {"id": 1, "prompt": "How do I fold a crane?", "task": "art", "text_rubrics": ["a"], "image_rubrics": ["b"]}
    (tmp_path / "items.json").write_text(json.dumps([row]))
    monkeypatch.setattr(session, "run_and_close", lambda *given, **more: [])
    sets = ["run.planner.kind=none", "run.generator.kind=images_api"]
    request = BenchmarkRequest("ueval", str(tmp_path / "items.json"), tmp_path / "out")
    with pytest.raises(UserError, match="builtin:shapes/critic knows nothing but"):
        prepare(request, load_config([], [], sets), [])[0].generate(lambda record: None)
    prepare(request, load_config([], [], [*sets, "run.critic.kind=none"]), [])[0].generate(lambda record: None)


def test_the_miniature_judges_no_official_items(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rubric that names no shape was met by any image."""
    row = {"id": 1, "prompt": "Fold a crane?", "task": "art", "text_rubrics": ["It folds."], "image_rubrics": []}
    (tmp_path / "items.json").write_text(json.dumps([row]))
    (tmp_path / "predictions.json").write_text('[{"id": 1, "text_answer": "Fold it."}]')
    layout = ["--data", str(tmp_path / "items.json"), "--outputs-from", str(tmp_path / "predictions.json")]
    assert interleave(*words("ueval", tmp_path / "out", *layout)) == 2
    assert "judge.kind: shapes, the default, knows the miniature's items alone" in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_generated_needs_no_model_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the planner's server has made room for the judge's; nor is any image compressed again."""
    assert interleave(*words("wise", tmp_path, "--limit", "1", "--stage", "generate")) == 0
    monkeypatch.setattr(session, "build_components", lambda config: pytest.fail("nothing is left to make"))
    monkeypatch.setattr(files, "write_atomic", lambda *given: pytest.fail("it is written already"))
    assert interleave(*words("wise", tmp_path, "--limit", "1")) == 0
    assert table(tmp_path)["num_judged"] == 1
