"""The papers' protocols on the miniature: going on, shares of several processes, settings, tables, the commands."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectors import saved_mask2former
from forking import command, exit_codes, forked
from PIL import Image
from test_judge import serving

from flowbp.config import DataConfig, TrainConfig
from flowbp.evaluation import sampling, vlm_judge
from flowbp.evaluation.benchmarks import run, settings, tables
from flowbp.evaluation.benchmarks.run import Benchmark, image_file
from flowbp.evaluation.benchmarks.settings import BenchmarkRequest, ImageId, ScorerSpec, read_scores
from flowbp.evaluation.compare import MeanScore, mean_score
from imgen_common import hub
from imgen_common.errors import UserError
from imgen_common.judging.answers import read_answers
from imgen_common.judging.questions import JudgeError, JudgeReply, Message
from imgen_common.run_folder.folder import RunFolder
from imgen_common.statistics import bootstrap_interval

GENERATOR, PROMPTS = "builtin:shapes/generator", "builtin:shapes/test"
CLIP = ScorerSpec(name="clip", kind="clip", ref="builtin:shapes/reward")
HELDOUT = ScorerSpec(name="heldout", kind="clip", ref="builtin:shapes/heldout")
Call = Callable[..., tuple[int, str, str]]


def work(out: Path, scorers: Sequence[ScorerSpec] = (CLIP,), batch_size: int = 2, **changed: Any) -> Benchmark:
    """Two prompts of two images each, three steps."""
    one = sampling.model_source(GENERATOR, Path("runs"))
    changed = {"num_prompts": 2, "images": 2, "num_inference_steps": 3, "guidance_scale": 2.0} | changed
    request = BenchmarkRequest("hpdv2", PROMPTS, tuple(scorers), **changed)
    prompts = settings.read_prompts(request, DataConfig())
    config = settings.benchmark_config(one, request, prompts)
    return Benchmark(one, config, prompts, out, batch_size)


def done(given: Benchmark) -> Benchmark:
    """All of it, as `run` does it in one process."""
    with given.open(["test"]):
        given.generate_images(given.missing_images)
        for spec in given.config.scorers:
            given.score_images(spec, given.unscored_images(spec.name))
    return given


class FakeJudge(vlm_judge.EndpointJudge):
    """Says what it is given, one after the other."""

    id = "fake"

    def __init__(self, said: list[Any]) -> None:
        self.said = said

    async def ask(self, system: str, message: Message, seed: int) -> JudgeReply:
        said = self.said.pop(0)
        if isinstance(said, JudgeError):
            raise said
        return JudgeReply(said)

    async def close(self) -> None:
        pass


async def there(url: str, model: str, extra: Any) -> None:
    pass


def with_judge(given: Benchmark, said: list[Any], monkeypatch: pytest.MonkeyPatch) -> Benchmark:
    """The benchmark with a judge as its only scorer, which says what it is given."""
    spec = ScorerSpec(name="ur_iq", kind="ur_iq", ref="served")
    monkeypatch.setattr(vlm_judge, "EndpointJudge", lambda *ignored: FakeJudge(said))
    monkeypatch.setattr(vlm_judge, "check_judge", there)
    config = given.config.model_copy(update={"scorers": (spec,)})
    return replace(given, config=config, judge=settings.JudgeConfig(url="http" + "://127.0.0.1:9/v1"))


def scores(out: Path, name: str = "clip") -> dict[ImageId, float]:
    return {item: row["score"] for item, row in read_scores(out, name).items()}


def pictures(given: Benchmark) -> dict[ImageId, bytes]:
    return {item: image_file(given.out, item).read_bytes() for item in given.config.image_ids}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    return done(work(tmp_path_factory.mktemp("benchmarks") / "finished"))


@pytest.fixture
def copied(finished: Benchmark, tmp_path: Path) -> Benchmark:
    shutil.copytree(finished.out, tmp_path / "copy")
    return replace(finished, out=tmp_path / "copy")


# --- images and scores ---------------------------------------------------------------------------------------------


def test_the_folder(finished: Benchmark) -> None:
    assert sorted(scores(finished.out)) == finished.config.image_ids == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len(set(pictures(finished).values())) == 4
    assert json.loads((finished.out / "images/00001/metadata.jsonl").read_text()) == {
        "prompt": finished.prompts[1].text
    }
    row = read_scores(finished.out, "clip")[1, 0]
    assert row["text"] == finished.prompts[1].text
    assert not list(finished.out.rglob("*.tmp"))


def test_what_is_done_is_not_done_again(copied: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling.ModelSource, "load", lambda self, device: pytest.fail("loaded"))
    monkeypatch.setattr(run, "load_scorer", lambda *ignored: pytest.fail("loaded"))
    done(copied)


def test_going_on_makes_what_is_missing_only(
    finished: Benchmark, copied: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = copied.out / "scores" / "clip.rank0.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0] + lines[2])
    image_file(copied.out, (1, 1)).unlink()
    kept = {item: image_file(copied.out, item).stat().st_mtime_ns for item in copied.config.image_ids[:3]}
    assert (copied.missing_images, copied.unscored_images("clip")) == ([(1, 1)], [(0, 1), (1, 1)])
    done(copied)
    assert pictures(copied) == pictures(finished)
    assert scores(copied.out) == pytest.approx(scores(finished.out), abs=1e-4)
    assert {item: image_file(copied.out, item).stat().st_mtime_ns for item in kept} == kept
    assert len(file.read_text().splitlines()) == 4


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.exhaustive), 3])
def test_the_batch_does_not_matter(finished: Benchmark, tmp_path: Path, batch_size: int) -> None:
    other = done(work(tmp_path / "other", batch_size=batch_size))
    assert scores(other.out) == pytest.approx(scores(finished.out), abs=1e-4)
    ours, theirs = (
        [np.asarray(Image.open(image_file(one.out, item)), int) for item in one.config.image_ids]
        for one in (other, finished)
    )
    assert max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True)) <= 1


def test_an_image_does_not_depend_on_how_many_there_are(finished: Benchmark, tmp_path: Path) -> None:
    more = done(work(tmp_path / "more", scorers=(), num_prompts=3, images=3, batch_size=9))
    assert pictures(finished).items() <= pictures(more).items()


def test_two_processes_share_the_images_without_overlap(finished: Benchmark, tmp_path: Path) -> None:
    ranks = [replace(work(tmp_path / "two"), rank=rank) for rank in (0, 1)]
    with ranks[0].open(["test"]):
        todo = ranks[0].missing_images
        for rank in ranks:
            rank.generate_images(todo[rank.rank :: 2])
        todo = ranks[0].unscored_images("clip")
        for rank in ranks:
            rank.score_images(CLIP, todo[rank.rank :: 2])
    assert scores(ranks[0].out) == pytest.approx(scores(finished.out), abs=1e-4)
    files = sorted((ranks[0].out / "scores").iterdir())
    assert [(file.name, len(file.read_text().splitlines())) for file in files] == [
        ("clip.rank0.jsonl", 2),
        ("clip.rank1.jsonl", 2),
    ]


def test_answers_of_a_folder_are_of_one_judge(copied: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = with_judge(copied, ["Final Score: 4", *[JudgeError("timeout", "slow")] * 3], monkeypatch)
    done(judged)
    monkeypatch.setattr(FakeJudge, "id", "another")
    with pytest.raises(
        UserError, match=r"has answers of 'fake', the judge is now 'another'; give the same judge.extra"
    ):
        judged.check_judge()


def test_scores_without_a_number_stay_so(copied: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    said = ["Final Score: 4", "no", JudgeError("refused", "no"), JudgeError("timeout", "slow")]
    judged = with_judge(copied, said, monkeypatch)
    assert [judged.check_judge().calls, judged.unscored_images("ur_iq")] == [4, judged.config.image_ids]
    done(judged)
    assert len(judged.unscored_images("ur_iq")) == 1  # what failed for a moment only is asked again
    assert "ur_iq has 3 of 4 images" in tables.table_markdown([tables.read_row(copied.out)])
    said.append("Final Score: 7")
    done(judged)
    assert judged.check_judge().calls == 0
    assert copied.unscored_images("ur_iq") == []
    answers = read_answers(copied.out / "scores" / "ur_iq")
    assert {answer.raws for answer in answers} == {("Final Score: 4",), ("no",), (), ("Final Score: 7",)}
    assert {(answer.judge, answer.prompts) for answer in answers} == {("fake", vlm_judge.PROMPTS)}
    row = tables.read_row(copied.out)
    assert (row.means["ur_iq"].mean, row.means["ur_iq"].num, row.unscored) == (4.0, 1, {"clip": 0, "ur_iq": 3})
    assert "ur_iq gave 3 of 4 images no score" in tables.table_markdown([row])


def test_scores_that_an_earlier_version_kept_are_used(copied: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of `scores/`, two of them; the others are asked for."""
    rows = [{"prompt": 0, "image": 0, "text": "", "score": 3.0}]
    rows += [{"prompt": 0, "image": 1, "text": "", "score": None, "answer": "no"}]
    (copied.out / "scores" / "ur_iq.rank0.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    done(with_judge(copied, ["Final Score: 2", "Final Score: 2"], monkeypatch))
    assert scores(copied.out, "ur_iq") == {(0, 0): 3.0, (0, 1): None, (1, 0): 2.0, (1, 1): 2.0}


def test_a_judge_that_goes_down_in_the_middle_goes_on(copied: Benchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    down = JudgeError("unreachable", "gone", is_outage=True)
    judged = with_judge(copied, ["Final Score: 2", down, down, *["Final Score: 5"] * 3], monkeypatch)
    judged = replace(judged, judge=judged.judge.model_copy(update={"concurrency": 1}))
    with pytest.raises(UserError, match=r"the judge fake does not answer \(unreachable: gone\).* run the same command"):
        done(judged)
    assert list(scores(copied.out, "ur_iq").values()) == [2.0]
    with pytest.raises(UserError, match="does not answer"):
        done(judged)
    assert sorted(scores(done(judged).out, "ur_iq").values()) == [2.0, 5.0, 5.0, 5.0]


@pytest.mark.parametrize(
    ("part", "value", "what"),
    [("velocity", math.nan, "the network's latents"), ("decode", -math.inf, "the VAE's images")],
)
def test_images_that_are_not_finite_are_not_saved_as_black_ones(
    part: str, value: float, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = sampling.ModelSource.load

    def load_spoiled(source: sampling.ModelSource, device: Any) -> Any:
        backbone = load(source, device)
        whole = getattr(backbone, part)
        monkeypatch.setattr(backbone, part, lambda *given: whole(*given) + value)
        return backbone

    monkeypatch.setattr(sampling.ModelSource, "load", load_spoiled)
    given = work(tmp_path / "spoiled")
    with pytest.raises(UserError, match=f"^not finite: {what}"):
        done(given)
    assert given.missing_images == given.config.image_ids


def test_a_folder_of_other_weights_is_refused(copied: Benchmark, tmp_path: Path) -> None:
    run = tmp_path / "trained"
    with RunFolder.create(run, TrainConfig()) as opened:
        opened.save_checkpoint(1, {"weights": {"a": torch.zeros(3)}}, {})
    trained = replace(copied, source=replace(copied.source, run=run))
    with pytest.raises(UserError, match=r"what was trained .* has changed since the run was started"):
        trained.open(["test"])
    copied.open(["test"]).close()
    assert trained.source.hashes() == trained.source.hashes() != copied.source.hashes()


def test_a_torn_row_is_reported(copied: Benchmark) -> None:
    file = copied.out / "scores" / "clip.rank0.jsonl"
    file.write_text(file.read_text() + '{"prompt": 1, "ima')
    with pytest.raises(UserError, match=r"clip\.rank0\.jsonl:5: not a row of scores"):
        copied.unscored_images("clip")


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"guidance_scale": 3.0}, "the run has guidance_scale = 2.0, now 3.0 was given"),
        ({"num_inference_steps": 4}, "num_inference_steps = 3, now 4"),
        ({"seed": 1}, "seed = 0, now 1"),
        ({"images": 1}, "images = 2, now 1"),
        ({"num_prompts": 3}, "num_prompts = "),
    ],
)
def test_other_settings_are_refused(copied: Benchmark, changed: dict[str, Any], said: str) -> None:
    other = work(copied.out, **changed)
    with pytest.raises(UserError) as error:
        other.open(["test"])
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_another_rescaling_of_guidance_is_refused(copied: Benchmark) -> None:
    rescaled = sampling.model_source(GENERATOR, Path("runs"), ["guidance.rescale=norm"])
    other = work(copied.out)
    request = BenchmarkRequest("hpdv2", PROMPTS, (CLIP,), images=2, num_inference_steps=3, guidance_scale=2.0)
    config = settings.benchmark_config(rescaled, request, other.prompts)
    with pytest.raises(UserError, match='guidance_rescale = null, now "norm" was given'):
        replace(other, source=rescaled, config=config).open(["test"])


def test_scorers_may_be_added_but_not_exchanged(copied: Benchmark) -> None:
    done(work(copied.out, scorers=(HELDOUT,)))
    assert list(tables.read_row(copied.out).means) == ["clip", "heldout"]
    exchanged = HELDOUT.model_copy(update={"ref": CLIP.ref})
    with pytest.raises(UserError, match="its scores 'heldout' are of clip=builtin:shapes/heldout"):
        done(work(copied.out, scorers=(exchanged,)))
    done(copied)  # the lock was given back


def test_a_scorer_whose_files_were_replaced_is_refused(copied: Benchmark, tmp_path: Path) -> None:
    folder = tmp_path / "reward"
    shutil.copytree(hub.resolve(HELDOUT.ref), folder)
    scorer = HELDOUT.model_copy(update={"ref": str(folder)})
    done(work(copied.out, scorers=(scorer,)))
    moved = HELDOUT.model_copy(update={"ref": str(folder.rename(tmp_path / "moved"))})
    done(work(copied.out, scorers=(moved,)))
    (tmp_path / "moved").rename(folder)
    for file in hub.resolve(CLIP.ref).glob("*.safetensors"):
        shutil.copyfile(file, folder / file.name)
    with pytest.raises(UserError, match="the scorer heldout has changed since the run was started"):
        done(work(copied.out, scorers=(scorer,)))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="not empty and not a run"):
        done(work(tmp_path))
    with pytest.raises(UserError, match="not a folder of `flowbp benchmark`; give the --out of one"):
        tables.read_row(tmp_path)
    with pytest.raises(UserError, match="none: no such folder; give the --out of one"):
        tables.read_row(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("clip", "must be KIND=REF"),
        ("clip=", "must be KIND=REF"),
        ("aesthetc=x", "unknown kind 'aesthetc'; did you mean 'aesthetic'?"),
        ("Pick Score:clip=x", "lower-case letters"),
        ("geneval=x", "give --color-model"),
        ("geneval_shapes=x", "give geneval_shapes=builtin:shapes/verifier"),
    ],
)
def test_scorers_are_parsed(text: str, said: str) -> None:
    assert settings.parse_scorer("clip=a=b", None) == ScorerSpec(name="clip", kind="clip", ref="a=b")
    assert settings.parse_scorer("pickscore:clip=o/n@r", "x") == ScorerSpec(name="pickscore", kind="clip", ref="o/n@r")
    with pytest.raises(UserError) as error:
        settings.parse_scorer(text, None)
    assert said in str(error.value)


# --- tables ----------------------------------------------------------------------------------------------------------


def test_an_interval_of_strata_weighs_them_the_same() -> None:
    mean, low, high = bootstrap_interval([[1.0] * 50, [0.0] * 5])
    assert (mean, low, high) == (0.5, 0.5, 0.5)
    values = np.random.default_rng(0).normal(size=400)
    mean, low, high = bootstrap_interval([values.tolist()])
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.1)
    assert mean_score([0.0] * 40 + [1.0] * 40, [1.0] * 10).mean == 0.75


def test_a_small_score_is_not_shown_as_zero() -> None:
    row = tables.BenchmarkRow("m", "f", "hpdv2", 9, {"x": 9}, {}, {"x": MeanScore(2.4e-5, 1.9e-5, 2.9e-5, 9)})
    assert tables.format_cell(row, "x") == ("0.000024", "0.000019 to 0.000029")


@pytest.mark.parametrize(("protocol", "content", "said"), [("hpdv2", "b", 1), ("hpdv2", "a", 0), ("geneval", "b", 0)])
def test_rows_of_different_prompts_are_said(protocol: str, content: str, said: int) -> None:
    first = tables.BenchmarkRow("m", "f", "hpdv2", 9, {}, {}, {}, "a")
    other = tables.BenchmarkRow("n", "g", protocol, 9, {}, {}, {}, content)
    notes = tables.table_notes([first, other, first])
    assert notes.count("Rows of hpdv2 are of different prompts: their scores cannot be compared.") == said


def geneval_folder(folder: Path, right: dict[str, list[float]]) -> Path:
    """A finished folder of two images a prompt, as far as a table needs it; right: by tag, a value per image."""
    spec = ScorerSpec(name="geneval", kind="geneval", ref="detector", color_model="clip")
    values = [(tag, value) for tag, given in right.items() for value in given]
    config = work(folder).config.model_copy(
        update={
            "protocol": "geneval",
            "scorers": (spec, HELDOUT),
            "num_prompts": len(values) // 2,
            "label": folder.name,
        }
    )
    settings.open_benchmark_folder(folder, config, ["test"], {}).close()
    (folder / "scores").mkdir()
    rows = [{"prompt": i // 2, "image": i % 2, "tag": tag, "score": score} for i, (tag, score) in enumerate(values)]
    (folder / "scores" / "geneval.rank0.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def test_the_table_of_geneval(tmp_path: Path) -> None:
    folder = geneval_folder(
        tmp_path / "mine", {"counting": [1, 0, 1, 1, 0, 0, 1, 1], "single_object": [1, 1], "position": [0, 1]}
    )
    row = tables.write_table(folder)
    assert list(tables.score_columns([row])) == ["overall", "single_object", "counting", "position"]
    means = {name: one.mean for name, one in row.means.items()}
    assert means == {"overall": pytest.approx(212.5 / 3), "single_object": 100, "counting": 62.5, "position": 50}
    counting = row.means["counting"]
    assert 0 < counting.low < 62.5 < counting.high <= 100
    page = (folder / "table.md").read_text()
    assert [cell.strip() for cell in page.splitlines()[0].split("|")][2:6] == ["Overall", "Single", "Count", "Position"]
    assert "| mine | 70.83 <br> " in page
    assert "heldout has 0 of 12 images" in page
    (content,) = json.loads((folder / "table.json").read_text())
    assert content["means"]["overall"]["mean"] == means["overall"]


# --- the commands ----------------------------------------------------------------------------------------------------


def hpdv2(out: Path, *more: object) -> list[object]:
    words = [
        "benchmark",
        GENERATOR,
        "--prompts",
        PROMPTS,
        "--num-prompts",
        2,
        "--images",
        2,
        "--num-inference-steps",
        3,
    ]
    return [*words, "--guidance-scale", 2, "--out", out, "--score", "clip=builtin:shapes/reward", *more]


@pytest.mark.slow
def test_hpdv2_as_a_command(flowbp: Call, finished: Benchmark, tmp_path: Path) -> None:
    code, output, errors = flowbp(*hpdv2(tmp_path / "a", "--score", "heldout:clip=builtin:shapes/heldout"))
    assert code == 0, errors
    assert GENERATOR in output
    assert "heldout" in output
    assert scores(tmp_path / "a") == pytest.approx(scores(finished.out), abs=1e-4)
    code, output, _ = flowbp(*hpdv2(tmp_path / "a", "--json"))
    assert code == 0
    (row,) = json.loads(output)
    assert row["means"]["clip"]["num"] == 2
    code, output, _ = flowbp("table", tmp_path / "a", finished.out, "--markdown")
    assert code == 0
    assert f"| {GENERATOR} (a) " in output
    assert f"| {GENERATOR} (finished) " in output


@pytest.mark.slow
def test_a_judge_is_asked_after_its_cost_is_confirmed(
    flowbp: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third question has no score; a second run with another price asks nothing."""
    monkeypatch.setenv("no_proxy", "*")
    with serving() as server:
        server.reply = lambda number, body: (200, "no idea" if number == 3 else "Good.\nFinal Score: 4")
        words = ["--score", "ur_iq=m", "--judge", server.url, "--set", "judge.confirm_calls=3"]
        answer = flowbp(*hpdv2(tmp_path / "out", *words))
        assert answer[0] == 2
        assert "4 calls of the judge, about " in answer[2]
        assert "more than confirm_calls 3 or confirm_money 1 allows; nothing was asked yet: add --yes" in answer[2]
        assert (len(server.bodies), (tmp_path / "out").exists()) == (1, False)  # one asked whether it is there
        code, output, errors = flowbp(*hpdv2(tmp_path / "out", *words, "--yes", "--set", "judge.prices.prompt=2"))
        assert code == 0, errors
        assert " USD, 2 s" in errors
        assert "ur_iq gave 1 of 4 images no score" in output
        answers = (tmp_path / "out" / "scores" / "ur_iq" / "answers.rank0.jsonl").read_text().splitlines()
        assert sorted(json.loads(answer)["raws"] for answer in answers) == [["Good.\nFinal Score: 4"]] * 3 + [
            ["no idea"]
        ]
        assert len(server.bodies) == 6
        code, _, errors = flowbp(*hpdv2(tmp_path / "out", *words))
        assert (code, len(server.bodies), "calls of the judge" in errors) == (0, 6, False)


METADATA = [
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
    {
        "tag": "counting",
        "include": [{"class": "cat", "count": 2}],
        "exclude": [{"class": "cat", "count": 3}],
        "prompt": "a photo of two cats",
    },
    {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": "a photo of a red cat"},
]


@pytest.mark.slow
def test_geneval_as_a_command(flowbp: Call, tmp_path: Path) -> None:
    """A random detector that sees cats everywhere, none of them surely, and a CLIP that has never seen one."""
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, METADATA)))
    detector = saved_mask2former(tmp_path / "detector")
    words = [
        "benchmark",
        GENERATOR,
        "--protocol",
        "geneval",
        "--prompts",
        tmp_path / "metadata.jsonl",
        "--num-inference-steps",
        2,
    ]
    words += ["--out", tmp_path / "out", "--images", 2, "--score", f"geneval={detector}"]
    code, output, errors = flowbp(*words, "--color-model", "builtin:shapes/heldout")
    assert code == 0, errors
    assert output.split()[:4] == ["Overall", "Single", "Count", "Color"]
    rows = read_scores(tmp_path / "out", "geneval")
    assert [rows[0, k]["score"] for k in (0, 1)] == [1.0, 1.0]
    assert [rows[1, k]["mistakes"] for k in (0, 1)] == [["0 of 2 cat found"]] * 2
    assert all(row["score"] == float(not row["mistakes"]) for row in rows.values())
    assert [json.loads(file.read_text()) for file in sorted(tmp_path.glob("out/images/*/metadata.jsonl"))] == METADATA


def assert_refused(answer: tuple[int, str, str], said: str) -> None:
    code, output, errors = answer
    assert (code, output) == (2, "")
    assert errors.startswith("flowbp: error: ")
    assert errors.count("\n") == 1
    assert said in errors


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--protocol", "genevl"], "did you mean 'geneval'?"),
        (["--score", "heldout:clip=builtin:shapes/none"], "unknown model"),
        (["--score", "clip=builtin:shapes/heldout"], "--score: clip given twice"),
        (["--score", "ur_iq=m"], "must be the base URL"),
        (["--score", "ur_iq=m", "--judge", "http" + "://127.0.0.1:9/v1"], "judge 'm': http"),
        (["--set", "judge.confirm_cals=1"], "did you mean 'confirm_calls'?"),
        (["--score", "geneval=x", "--color-model", "y"], "give --protocol geneval"),
        (["--guidance-scale", "0"], "--guidance-scale 0"),
        (["--size", "33"], "multiples of"),
        (["--prompts", "none.txt"], "no such prompt file"),
        (["--protocol", "geneval"], "give --protocol geneval_shapes"),
        (["--protocol", "geneval", "--prompts", "none.jsonl"], "no such file"),
        (["--protocol", "geneval_shapes", "--prompts", "metadata.jsonl"], "allowed: builtin:shapes/train"),
        (["--score", "geneval_shapes=builtin:shapes/verifier"], "give --protocol geneval_shapes"),
    ],
)
def test_mistakes_are_reported_before_a_file_is_made(flowbp: Call, tmp_path: Path, words: list[str], said: str) -> None:
    assert_refused(flowbp(*hpdv2(tmp_path / "out", *words)), said)
    assert not (tmp_path / "out").exists()


def test_settings_and_metadata_are_refused_in_one_line(flowbp: Call, copied: Benchmark, tmp_path: Path) -> None:
    assert_refused(flowbp(*hpdv2(copied.out, "--seed", 1)), "the run has seed = 0, now 1 was given")
    file = tmp_path / "metadata.jsonl"
    file.write_text(json.dumps(METADATA[0]) + "\n" + json.dumps(METADATA[1] | {"tag": "counts"}))
    answer = flowbp(*hpdv2(tmp_path / "out", "--protocol", "geneval", "--prompts", file))
    assert_refused(answer, f"{file}:2: tag: must be 'single_object'")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_make_one_folder(finished: Benchmark, tmp_path: Path) -> None:
    words = ["flowbp", *map(str, hpdv2(tmp_path / "two", "--batch-size", 1))]
    log, again = tmp_path / "log", tmp_path / "again"
    forked(2, command, *words, log=log)
    assert sum(line.split()[:1] == [GENERATOR] for line in log.read_text().splitlines()) == 1  # one table
    assert scores(tmp_path / "two") == pytest.approx(scores(finished.out), abs=1e-4)
    assert [len(file.read_text().splitlines()) for file in (tmp_path / "two" / "scores").iterdir()] == [2, 2]
    assert all(exit_codes(2, command, *words, "--seed", "1", log=again))
    assert again.read_text().count("flowbp: error: ") == 1
