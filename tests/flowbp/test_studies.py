"""The studies' own logic, at sizes where the numbers mean nothing."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.quality.gradient_fidelity import FidelitySize
from benchmarks.studies import __main__ as command
from benchmarks.studies import fidelity, report
from benchmarks.studies.runs import Point, StudyResult, StudySize, run_study
from benchmarks.studies.studies import STUDIES
from imgen_common.errors import UserError

CPU = torch.device("cpu")
SMALL = StudySize(seconds=1e-3, num_prompts=4, sets=("total_batch_size=1", "eval.num_inference_steps=2"))


def test_every_study_shares_all_but_the_method() -> None:
    for name, study in STUDIES.items():
        recipe = SMALL.recipe(study)
        assert recipe.num_inference_steps == 12, name
        assert len(set(study.variants.values())) == len(study.variants) > 2, name
        assert list(study.parts) == sorted({*study.parts, 1.0})


@pytest.mark.exhaustive
def test_a_study_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    first = run_study("refill", SMALL, [0], tmp_path, CPU)
    file = tmp_path / "refill" / "mass-seed0.json"
    before = file.read_text()
    (tmp_path / "refill" / "none-seed0.json").unlink()
    again = run_study("refill", SMALL, [0], tmp_path, CPU)
    assert file.read_text() == before
    assert again.runs["none"][0][0].scores == first.runs["none"][0][0].scores  # a training depends on nothing before it
    assert again.runs["none"][0][0].updates == 1
    with pytest.raises(UserError, match=r"its trainings have the sizes .*another --folder"):
        run_study("refill", SMALL.model_copy(update={"num_prompts": 5}), [0], tmp_path, CPU)


def test_an_unknown_study_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown study 'alfa'.*alpha"):
        command.main("alfa")
    with pytest.raises(UserError, match=r"--seeds '0,x': give whole numbers"):
        command.main("alpha", seeds="0,x")


def made_up(name: str) -> StudyResult:
    """Two seeds of every variant; the n-th variant makes n prompts more right with each evaluation."""
    study = STUDIES[name]
    base = {"verifier": [0.0] * 10, "reward": [1.0] * 10, "heldout": [2.0] * 10}
    runs: dict[str, list[list[Point]]] = {}
    for number, variant in enumerate(study.variants):
        scores = {
            "verifier": [1.0] * number + [0.0] * (10 - number),
            "reward": [1.0 + number] * 10,
            "heldout": [2.0] * 10,
        }
        runs[variant] = [[Point(10 * number, 1.0, scores) for _ in study.parts] for _ in range(2)]
    return StudyResult(base, runs, dict.fromkeys(study.variants, 0.5))


@pytest.mark.parametrize("name", STUDIES)
def test_the_table_and_the_figure_show_every_variant(name: str) -> None:
    study, result = STUDIES[name], made_up(name)
    table, figure = report.format_study(study, result), report.plot_study(study, result)
    assert len(table.splitlines()) == 3 + len(study.variants) * len(study.parts)
    last = table.splitlines()[-1]
    expected = 10 * (len(study.variants) - 1)
    assert f"{expected:.1f}, {expected:.1f}" in last
    assert f"+{len(study.variants) - 1:.2f} [" in last
    for variant in study.variants:
        assert f">{variant}<" in figure
    json.dumps(report.study_content(result))


@pytest.mark.exhaustive
def test_fidelity_is_measured_along_a_training_and_kept(tmp_path: Path) -> None:
    size = FidelitySize(prompts=1, images=1, plans=1)
    found = fidelity.measure_along_training([0, 1], [0], size, tmp_path, CPU)
    assert {stop: len(runs) for stop, runs in found.items()} == {0: 1, 1: 1}
    assert found[0] != found[1]
    assert all(
        -1 <= value <= 1 for runs in found.values() for one in runs for cosines in one.values() for value in cosines
    )
    assert fidelity.measure_along_training([0, 1], [0], size, tmp_path, CPU) == found
    figure, table = report.plot_fidelity(found), report.format_fidelity(found)
    assert all(f">{name}<" in figure and name in table for name in fidelity.VARIANTS)
