"""The report: one page that needs nothing else, says what the numbers allow, and escapes what others wrote."""

import json
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pages import Page
from PIL import Image

from flowbp.config import TrainConfig
from flowbp.core.plan import draw_plan
from flowbp.data.edits import sources_of
from flowbp.data.prompts import load_prompts
from flowbp.evaluation import compare
from flowbp.evaluation.evaluate import Evaluation
from flowbp.evaluation.results import delete_evaluations, load_evaluations, save_evaluation
from flowbp.methods import METHODS
from flowbp.reports import figure, report
from flowbp.reports.charts import Series, line_chart, moving_average, ticks
from flowbp.reports.explain import linear_sigmas
from flowbp.reports.figure import plan_svg
from flowbp.reports.run_data import read_run
from flowbp.training.watchdog import Finding, append_finding
from imgen_common.config import load
from imgen_common.errors import UserError
from imgen_common.run_folder.folder import RunFolder

EVIL = '<script>alert("1")</script> & "quotes"'


def evaluation(prompts: list[str], rate: float, shift: float, *, verified: bool = True) -> Evaluation:
    """Scores whose verdicts pass with probability `rate`, the same draws whatever the rate."""
    draws = np.random.default_rng(0).random((3, len(prompts)))
    scores = {"reward": (draws[1] + shift).tolist(), "heldout": (draws[2] + shift).tolist()}
    if verified:
        scores["verifier"] = (draws[0] < rate).astype(float).tolist()
    groups = [("single", "count")[i % 2] for i in range(len(prompts))] if verified else None
    return Evaluation(prompts, scores, groups, torch.rand(min(30, len(prompts)), 3, 32, 32))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with metrics and evaluations at the training's guidance and at 2."""
    config = load(
        TrainConfig, [], ["method=leapalign", "guidance_scale=1", "max_train_steps=30", f"data.key={json.dumps(EVIL)}"]
    )
    path = tmp_path / "runs" / "some run"
    prompts = [EVIL, *(f"prompt {i}" for i in range(119))]
    with RunFolder.create(path, config, ["flowbp", "train", EVIL]) as folder:
        for i in range(1, 31):
            numbers = {"reward": i / 10, "heldout": 1.0, "loss": -i / 10, "grad_norm": 0.5, "gap_0": 0.1, "gap_1": 0.2}
            numbers |= {"seconds": 2.0, "peak_memory_gib": 0.9, "learning_rate": 1e-4, "tflops": 400.0, "mfu": 0.404}
            numbers |= {"seconds_rollout": 1.5, "seconds_sweep": 0.5}
            folder.log(i, {f"train/{name}": value for name, value in numbers.items()})
        folder.log(20, {"eval/reward": 1.0, "eval/heldout": 2.0, "eval/verifier": 0.5})
        folder.log(21, {"train/reward": float("nan")})
    save_evaluation(path, "base", 1.0, evaluation(prompts, 0.4, 0.0))
    save_evaluation(path, "trained", 1.0, evaluation(prompts, 0.6, 0.1))
    save_evaluation(path, "base", 2.0, evaluation(prompts, 0.5, 0.0))
    save_evaluation(path, "trained", 2.0, evaluation(prompts, 0.4, -0.1))
    return path


def read(path: Path) -> tuple[str, Page]:
    text = report.write_report(path).read_text(encoding="utf-8")
    elsewhere = report.write_report(path, path.with_name("elsewhere.html"))
    assert elsewhere.name == "elsewhere.html"
    assert elsewhere.read_text(encoding="utf-8") == text
    return text, Page(text)


@pytest.mark.slow
def test_the_speed_of_its_updates_is_there(run: Path) -> None:
    text, _ = read(run)
    assert "400 TFLOP/s per process, 40.4% of the peak in bfloat16 (MFU), mean of 30 updates" in text
    assert "rollout 75%, decoder 0%, reward 0%, sweep 25%" in text


@pytest.mark.slow
def test_alerts_stand_in_it_with_their_updates(run: Path) -> None:
    assert "What the watchdog found" not in read(run)[0]
    for update, alerts in ((10, []), (20, [f"Drift is above 0.2 {EVIL}"])):
        append_finding(run, update, Finding(alerts, {}))
    text = read(run)[0]
    assert "update 20: Drift is above 0.2 &lt;script&gt;" in text
    assert "update 10:" not in text


def test_a_regulariser_has_a_chart(run: Path) -> None:
    assert report._distance_charts(read_run(run)) == []
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("regularise: null", "regularise: {kind: velocity, weight: 2.0}"))
    with RunFolder.open(run) as folder:
        folder.log(30, {"train/regularise": 0.5})
    (chart,) = report._distance_charts(read_run(run))
    assert "Distance to the base" in chart


def test_the_page_stands_alone(run: Path) -> None:
    text, page = read(run)
    assert len(page.images) == 2 * 2 * 30
    assert all(str(image["src"]).startswith("data:image/png;base64,") for image in page.images)
    assert all(image["alt"] for image in page.images)
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert "http:" not in text
    assert "https:" not in text
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_what_others_wrote_is_escaped(run: Path) -> None:
    text, page = read(run)
    assert "<script" not in text
    assert EVIL in page.text
    assert any(image["alt"] == f"before: {EVIL}" for image in page.images)


def test_the_result_comes_first_and_every_guidance_beside_it(run: Path) -> None:
    _, page = read(run)
    place = [
        page.text.index(title) for title in ("Verifier", "Every guidance scale", "Images at equal seeds", "Curves")
    ]
    assert place == sorted(place)
    base, trained = (evaluation([""] * 120, rate, 0).scores["verifier"] for rate in (0.4, 0.6))
    assert compare.format_score("verifier", float(np.mean(base))) in page.text
    assert compare.format_score("verifier", float(np.mean(trained))) in page.text
    assert "120 prompts" in page.text
    assert "paired bootstrap over prompts" in page.text
    assert page.text.count("lower") >= 1  # guidance 2 got worse, and the page says so
    for title in ("Gradient norm", "Gaps", "Peak memory", "Resolved configuration", "Package versions", "leapalign"):
        assert title in page.text


def test_a_reward_that_rises_while_the_verifier_falls_is_named(run: Path) -> None:
    prompts = [f"p{i}" for i in range(200)]
    save_evaluation(run, "base", 1.0, evaluation(prompts, 0.7, 0.0))
    save_evaluation(run, "trained", 1.0, evaluation(prompts, 0.3, 1.0))
    assert "exploits the reward" in read(run)[1].text


def test_the_source_of_an_edit_stands_before_its_images(run: Path) -> None:
    edits = list(load_prompts("builtin:shapes/edits/test", limit=12))
    for name in ("base", "trained"):
        save_evaluation(run, name, 1.0, evaluation(edits, 0.7, 0.0))
    saved = load_evaluations(run)["base", 1.0]
    assert [len(saved.source_files[i]) for i in range(12)] == [1] * 12
    with Image.open(saved.source_files[3][0]) as image:
        assert image.tobytes() == sources_of(edits[3])[0].load().tobytes()
    markup, _ = read(run)
    for prompt in edits:
        assert markup.index(f'alt="source of: {prompt}"') < markup.index(f'alt="before: {prompt}"')


def test_a_run_that_is_not_finished_says_so(run: Path) -> None:
    for folder in ("trained-g1", "trained-g2"):
        (run / "evaluations" / folder / "scores.json").unlink()
    _, page = read(run)
    assert "Not finished: 30 of 30 updates are done" in page.text
    assert not page.images


def test_an_evaluation_made_again_leaves_nothing_of_the_one_before(run: Path) -> None:
    save_evaluation(run, "base", 1.0, Evaluation(["a"], {"reward": [0.5]}, None, torch.rand(1, 3, 8, 8)))
    assert len(load_evaluations(run)["base", 1.0].image_files) == 1
    delete_evaluations(run, "trained")
    assert sorted(load_evaluations(run)) == [("base", 1.0), ("base", 2.0)]


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "new", load(TrainConfig), ["flowbp", "train"]):
        pass
    assert "Nothing has been evaluated yet" in read(tmp_path / "new")[1].text


def test_evaluations_of_other_prompts_are_not_compared(run: Path) -> None:
    save_evaluation(run, "trained", 1.0, evaluation(["another"] * 120, 0.6, 0.1))
    assert "cannot be compared" in read(run)[1].text


def test_prompts_without_a_verifier_have_rewards_only(run: Path) -> None:
    prompts = [f"p{i}" for i in range(20)]
    for name, shift in (("base", 0.0), ("trained", 0.2)):
        for scale in (1.0, 2.0):
            save_evaluation(run, name, scale, evaluation(prompts, 0.5, shift, verified=False))
    _, page = read(run)
    assert "Categories" not in page.text
    assert "higher" in page.text


@pytest.mark.slow
@pytest.mark.parametrize(("size", "offset", "decimals"), [(0.01, 0.27, 4), (1.0, 22.0, 2), (0.002, 0.05, 5)])
def test_images_have_scores_with_the_digits_of_their_size(run: Path, size: float, offset: float, decimals: int) -> None:
    for name, shift in (("base", 0.0), ("trained", 0.2)):
        one = evaluation([f"p{i}" for i in range(20)], 0.5, shift)
        one.scores["reward"] = [offset + size * value for value in one.scores["reward"]]
        save_evaluation(run, name, 1.0, one)
    shown = re.findall(r"reward (\d+\.\d+) → (\d+\.\d+)", read(run)[1].text)
    lengths = {len(number.partition(".")[2]) for pair in shown for number in pair}
    assert len(shown) >= 20
    assert decimals in lengths


@pytest.mark.slow
def test_large_images_are_made_small(run: Path) -> None:
    from PIL import Image

    for file in (run / "evaluations").glob("*/00*.png"):
        Image.new("RGB", (1024, 512), "red").save(file)
    widths = [_width(str(image["src"])) for image in read(run)[1].images]
    assert max(widths) == report.THUMBNAIL


def _width(uri: str) -> int:
    import base64
    import io

    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).width


@pytest.mark.parametrize("size", [0, 60])
def test_a_damaged_image_of_an_evaluation_is_named(run: Path, size: int) -> None:
    file = run / "evaluations" / "base-g1" / "003.png"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match=r"base-g1/003\.png: "):
        report.write_report(run)
    with pytest.raises(UserError, match=r"base-g1/003\.png: "):
        load_evaluations(str(run))["base", 1.0].images()


def test_a_backend_that_matplotlib_does_not_know_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MPLBACKEND of another version: its import would raise ValueError."""
    (tmp_path / "matplotlib.py").write_text("import os\nfound = os.environ.get('MPLBACKEND')\nrcParams = {}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Qt4Agg")
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    fake = figure._import_matplotlib()
    del sys.modules["matplotlib"]
    assert (fake.found, os.environ["MPLBACKEND"], fake.rcParams) == (None, "Qt4Agg", {"backend": "Qt4Agg"})


def test_only_a_run_folder_has_a_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        report.write_report(tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_image_that_follows_the_theme(method: str) -> None:
    drawn = draw_plan(METHODS[method], linear_sigmas(25, 3.0), np.random.default_rng(3))
    svg = plan_svg(drawn, "title")
    page = Page(svg)
    assert "var(--ink)" in svg
    assert "://" not in svg
    assert all(address.startswith("#") for address in page.addresses)
    assert not page.images


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ([0.0] * 40, [1.0] * 40, "higher"),
        ([1.0] * 40, [0.0] * 40, "lower"),
        ([0.0, 1.0] * 20, [1.0, 0.0] * 20, "no clear change"),
        ([0.0] * 40, [0.0] * 40, "no clear change"),
        ([0.0] * 3, [1.0] * 3, "too few prompts"),
        ([0.0] * 40, [math.nan] * 40, "not finite"),
        ([0.0] * 40, [math.inf] + [1.0] * 39, "not finite"),
        ([math.inf] * 3, [math.inf] * 3, "not finite"),
        ([-math.inf] * 40, [0.0] * 40, "not finite"),
    ],
)
def test_verdicts_follow_the_interval(before: list[float], after: list[float], verdict: str) -> None:
    change = compare.paired_change(before, after)
    assert change.verdict == verdict
    json.dumps(compare.scores_as_json({"reward": change, "other": compare.mean_score(after)}), allow_nan=False)


def test_numbers_for_people() -> None:
    assert compare.format_score("verifier", 0.5238) == "52.4 %"
    assert compare.format_change("verifier", -0.031) == "\N{MINUS SIGN}3.1"
    assert compare.format_change("reward", 22.5) == "+22.50"
    assert compare.format_score("reward", 0.00021) == "0.000210"
    assert compare.format_score("reward", -1.041e-8) == "\N{MINUS SIGN}1.04e\N{MINUS SIGN}08"
    assert compare.format_change("reward", 2.5e-7, 0.31) == "+0.0000"


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        (22.314, 22.402, "22.31 22.40 +0.09"),  # CLIP, PickScore
        (0.2731, 0.2768, "0.2731 0.2768 +0.0037"),  # HPSv2.1
        (0.0512, 0.0498, "0.05120 0.04980 -0.00140"),  # cosines
        (-0.31, 1.044, "-0.310 1.044 +1.354"),  # ImageReward
        (8.5, 8.75, "8.500 8.750 +0.250"),  # HPSv3
        (1234.5, 1300, "1234.50 1300.00 +65.50"),
        (0, 0, "0.00 0.00 +0.00"),
    ],
)
def test_scores_are_shown_with_the_digits_of_their_size(before: float, after: float, shown: str) -> None:
    difference = after - before
    change = compare.Change(before, after, difference, difference, difference, 40)
    text = compare.describe_change("reward", change)
    assert f"{text.before} {text.after} {text.difference}".replace("\N{MINUS SIGN}", "-") == shown
    assert text.interval == f"{text.difference} to {text.difference}"


def test_scores_that_are_not_finite_are_named() -> None:
    def evaluated(*scores: float) -> Any:
        return {1.0: SimpleNamespace(scores={"reward": [0.5, 0.5], "heldout": list(scores)})}

    assert compare.describe_not_finite([evaluated(1, 2)]) == []
    (said,) = compare.describe_not_finite([evaluated(1, 2), evaluated(1, math.nan)])
    assert said.startswith("not finite: scores of heldout; `flowbp sample` says")


def test_scores_that_are_not_finite_are_null_on_disk(tmp_path: Path) -> None:
    given = replace(evaluation(["a", "b", "c"], 0.4, 0.0), scores={"reward": [0.5, math.nan, -math.inf]})
    file = save_evaluation(tmp_path, "base", 1.0, given) / "scores.json"
    assert json.loads(file.read_text(), parse_constant=pytest.fail)["scores"] == {"reward": [0.5, None, None]}
    (read,) = load_evaluations(tmp_path).values()
    assert str(read.scores["reward"]) == "[0.5, nan, nan]"


@pytest.mark.parametrize("before", [math.nan, math.inf])
def test_a_change_that_is_not_finite_has_no_interval(before: float) -> None:
    change = compare.paired_change([before] * 40, [0.25] * 40)
    assert compare.describe_change("reward", change) == (str(before), "0.2500", "-", "-", "not finite")


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3.2, 8.1), (5, 5), (0, 0), (1e-7, 3e-7), (-1e6, 1e6), (0, 1e-13), (0.1, 0.1 + 2e-17)]
)
def test_ticks_are_few_and_enclose(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low + 1e-9 * abs(low)
    assert found[-1] >= high - 1e-9 * abs(high)
    assert 2 <= len(set(found)) == len(found) <= 7


def test_charts_without_data_are_left_out() -> None:
    assert line_chart("t", "u", [Series("", "--blue", [], [])], 10) == ""
    assert "<circle" in line_chart("t", "u", [Series("", "--blue", [3], [2.0])], 10)
    assert moving_average([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]
