"""The benchmarks' own logic, at sizes where the numbers mean nothing."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiers import tiers

from benchmarks import common
from benchmarks.common import read_json, write_json
from benchmarks.perf import gpu_update, sweep_memory
from benchmarks.quality import gradient_fidelity, miniature, miniature_cells, miniature_report
from benchmarks.quality.miniature_cells import CONTROL, Bench, Settings, Stop, TrainingJob
from flowbp.config import TrainConfig
from flowbp.core.engine import rollout
from flowbp.core.noise import initial_noise
from flowbp.methods import METHODS
from imgen_common.config import load
from imgen_common.console import markdown_table
from imgen_common.errors import UserError

ROOT = Path(__file__).parents[2]
SMALL = [
    "num_inference_steps=12",
    "total_batch_size=1",
    "eval.num_inference_steps=2",
    "eval.num_prompts=4",
    "eval.quick_num_prompts=3",
]
CPU = torch.device("cpu")


def test_a_table_is_markdown() -> None:
    assert markdown_table(["a", "b"], [["x", "1.0"]]) == "| a |   b |\n| - | --: |\n| x | 1.0 |"


def test_a_result_of_other_options_does_not_write_over_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["-m", "--prompts", "8"])
    first = common.result_file("study", CPU, "json")
    assert first.parent == tmp_path
    write_json(first, {"environment": common.describe_run("benchmarks.study", sys.argv[1:], CPU)})
    assert common.result_file("study", CPU, "md") == first.with_suffix(".md")
    monkeypatch.setattr(sys, "argv", ["-m", "--prompts", "2"])
    assert common.result_file("study", CPU, "json") == Path("runs/benchmark-results", first.name)


# sweep_memory ---------------------------------------------------------------------------------------------------------


def row(num_active: int, sweep: float, joint: float, ratio: float = 1.0) -> sweep_memory.MemoryRow:
    return sweep_memory.MemoryRow(num_active, peak(sweep), peak(joint), 1.0, 1.0, ratio)


def peak(measured: float, live: float = math.nan, flops: int = 0) -> sweep_memory.Peak:
    return sweep_memory.Peak(measured, live, flops)


GOOD = [row(1, 100, 100), row(2, 104, 200), row(4, 104, 400), row(8, 105, 801)]


def broken(rows: list[sweep_memory.MemoryRow], as_counted: bool = False) -> list[bool]:
    return [not claim.holds for claim in sweep_memory.check_claims(rows, as_counted)]


def as_counted(row: sweep_memory.MemoryRow) -> sweep_memory.MemoryRow:
    """A row whose counts are what was measured of `row`, and of which nothing was measured."""
    sweep, joint = peak(math.nan, row.sweep.peak, round(100 * row.ratio)), peak(math.nan, row.joint.peak, 100)
    return sweep_memory.MemoryRow(row.num_active, sweep, joint, math.nan, math.nan, math.nan)


def test_claims_hold_where_they_should() -> None:
    assert broken(GOOD) == [False] * 4
    assert broken([as_counted(r) for r in GOOD], as_counted=True) == [False] * 4


def test_each_claim_fails_where_it_should() -> None:
    assert broken([*GOOD[:-1], row(8, 116, 801)]) == [True, False, False, False]
    assert broken([replace(r, joint=peak(-r.joint.peak)) for r in GOOD])[1]
    assert broken([replace(r, joint=peak(100)) for r in GOOD])[2]
    assert broken([row(k, 100, 100 * k**2) for k in (1, 2, 4, 8, 16, 25)])[2]
    assert broken([replace(r, ratio=1.2) for r in GOOD]) == [False, False, False, True]
    for index, bad in enumerate(
        (
            [*GOOD[:-1], row(8, 116, 801)],
            [row(k, 100, -100 * k) for k in (1, 2, 4)],
            [row(k, 100, 100 * k**2) for k in (1, 2, 4, 8, 16, 25)],
            [replace(r, ratio=1.2) for r in GOOD],
        )
    ):
        assert broken([as_counted(r) for r in bad], as_counted=True) == [index == claim for claim in range(4)]


def test_the_time_claim_is_the_median_over_k_of_at_least_two() -> None:
    assert not broken([replace(GOOD[0], ratio=9.0), GOOD[1], GOOD[2], replace(GOOD[3], ratio=9.0)])[3]


@pytest.fixture(scope="module")
def update() -> sweep_memory.BackwardPass:
    return sweep_memory.BackwardPass(replace(sweep_memory.QUICK, tokens=256), CPU)


def test_both_executors_give_one_gradient(update: sweep_memory.BackwardPass) -> None:
    grads = []
    for executor in sweep_memory.EXECUTORS:
        update.clear_gradients()
        update.prepare(executor, 3)()
        grads.append(torch.cat([p.grad.flatten() for p in update.net.parameters()]))
    assert (grads[0] - grads[1]).norm() < 1e-5 * grads[0].norm()


def live(update: sweep_memory.BackwardPass, executor: sweep_memory.Executor, num_active: int) -> float:
    return sweep_memory.count_live_bytes(update, update.prepare(executor, num_active))[0]


def test_live_bytes_grow_with_k_in_the_joint_graph_alone(update: sweep_memory.BackwardPass) -> None:
    assert live(update, "sweep", 4) < 1.2 * live(update, "sweep", 1)
    assert live(update, "joint", 4) > 3 * live(update, "joint", 1)


def test_counts_outside_the_rollout_are_refused(tmp_path: Path) -> None:
    for counts in ([1, 2, 5], [0, 1, 2], [1, 2]):
        with pytest.raises(UserError, match="--counts"):
            sweep_memory.run_sweep_memory(sweep_memory.QUICK, CPU, counts, 1, tmp_path / "out.json")


@pytest.mark.slow
def test_sweep_memory_quickly(tmp_path: Path) -> None:
    held = sweep_memory.run_sweep_memory(sweep_memory.QUICK, CPU, [1, 2, 4], 1, tmp_path / "out.json", from_counts=True)
    content = json.loads((tmp_path / "out.json").read_text())
    assert [claim for claim in content["claims"] if not claim["holds"]] == []
    assert held
    assert [r["num_active"] for r in content["rows"]] == [1, 2, 4]
    assert content["environment"]["packages"]["torch"]
    assert str(ROOT) not in json.dumps(content)


# gpu_update -----------------------------------------------------------------------------------------------------------


def test_the_models_have_their_published_sizes() -> None:
    """2.2 and 3.9 thousand million numbers in the transformers; text of the width that the transformer reads."""
    for name, numbers in (("sd3_5_medium", 2.2e9), ("flux2_klein_base_4b", 3.9e9)):
        with torch.device("meta"):
            pipe = gpu_update.MODELS[name]("shallow")
        assert sum(p.numel() for p in pipe.transformer.parameters()) == pytest.approx(numbers, rel=0.03)


def gpu_row(num_active: int, sweep: int | None) -> gpu_update.CostRow:
    return gpu_update.CostRow("sd3_5_medium", num_active, gpu_update.Cost(sweep, 1.0), gpu_update.Cost(None, None))


def gpu_claims(
    many: int | None = 105, reached: float = 45, held: int = 24 * 10**9 - 1, planned: float = 1
) -> list[bool]:
    rows = [gpu_row(1, 100), gpu_row(8, 500), gpu_row(25, many)]
    rate = gpu_update.Rate("sd3_5_medium", 8, 4, reached, 100)
    fit = gpu_update.RecipeFit("sd3_5_medium", 16, held, round(planned * held), 1.0)
    return [claim.holds for claim in gpu_update.check_claims(rows, [rate], [fit])]


def test_each_claim_about_a_gpu_fails_where_it_should() -> None:
    assert gpu_claims() == [True] * 4
    assert gpu_claims(many=106) == gpu_claims(many=None) == [False, True, True, True]
    assert gpu_claims(reached=44) == [True, False, True, True]
    assert gpu_claims(held=24 * 10**9) == [True, True, False, True]
    assert gpu_claims(planned=0.89) == gpu_claims(planned=1.11) == [True, True, True, False]
    table = gpu_update.format_tables([gpu_row(8, None)], [], [])
    assert "| sd3_5_medium |       8 |        - |        - |   1.000 |       - |" in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs a CUDA device.*--tiny"):
        gpu_update.main(output=tmp_path / "out.json")
    for names, counts, said in ((["sd4"], [1, 2], "--models sd4"), (["sd3_5_medium"], [1], "--counts")):
        with pytest.raises(UserError, match=said):
            gpu_update.run_gpu_update(gpu_update.TINY, CPU, names, counts, tmp_path / "out.json")


@pytest.mark.parametrize("name", tiers(gpu_update.MODELS))
def test_gpu_update_runs_at_tiny_sizes(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_update.run_gpu_update(gpu_update.TINY, CPU, [name], [1, 3], tmp_path / "out.json")
    assert "no claim is checked" in capsys.readouterr().out
    content = json.loads((tmp_path / "out.json").read_text())
    few, many = content["rows"]
    assert many["joint"]["peak"] > 1.05 * few["joint"]["peak"]
    assert many["sweep"]["peak"] < 1.05 * few["sweep"]["peak"]
    assert content["fits"][0]["estimated"] == pytest.approx(content["fits"][0]["measured"], rel=0.1)
    assert content["claims"] == []
    assert str(ROOT) not in json.dumps(content)


# the miniature itself, loaded once ------------------------------------------------------------------------------------


def settings_of(*sets: str, rates: tuple[float, ...] = (1e-4, 1e-3)) -> Settings:
    config = load(TrainConfig, [], [*SMALL, *sets])
    return Settings(
        config=config, updates=2, rates=rates, rounds=1, search_seed=9, pretraining_images=32, weights={"a": "b"}
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    found = Bench(settings_of(), CPU, tmp_path_factory.mktemp("bench"))
    yield found
    found.restore_base()


# gradient_fidelity ----------------------------------------------------------------------------------------------------

SIZE = gradient_fidelity.FidelitySize(prompts=2, images=1, plans=2)
CHOSEN = {name: gradient_fidelity.VARIANTS[name] for name in ("full", "flowbp_sparse", "refl", "draft_lv")}


@pytest.mark.slow
def test_fidelity_of_full_is_one_and_seeds_decide(bench: Bench) -> None:
    bench.restore_base()
    config = bench.settings.config
    found = gradient_fidelity.measure_fidelity(config, bench.models, SIZE, CHOSEN, CPU)
    again = gradient_fidelity.measure_fidelity(config, bench.models, replace(SIZE, prompts=1), CHOSEN, CPU)
    assert all(again[name].cosine == one.cosine[:1] for name, one in found.items())
    rows = gradient_fidelity.summarize(found)
    by_name = {r.method: r for r in rows}
    assert by_name["full"].cosine.mean == pytest.approx(1, abs=1e-9)
    assert by_name["full"].norm.mean == pytest.approx(1, abs=1e-9)
    assert by_name["full"].gradient_forwards == 12
    assert by_name["draft_lv"].gradient_forwards == 3
    assert by_name["flowbp_sparse"].over_paired == (0, 0, 0)
    assert by_name["flowbp_sparse"].cosine.mean < 1
    assert gradient_fidelity.format_table(rows).count("\n") == 1 + len(rows)


def test_fidelity_measures_the_trained_reward_alone() -> None:
    recipe = gradient_fidelity.load_recipe([], ["guidance_scale=2"])
    assert [scorer.name for scorer in recipe.scorers] == ["reward"]
    assert recipe.guidance_scale == 2


def test_fidelity_ends_a_shared_rollout_where_the_reward_looks(bench: Bench) -> None:
    bench.restore_base()
    prompt = gradient_fidelity.PromptRollout(bench.settings.config, bench.models, SIZE, 1, CPU)
    plan = prompt.draw_plan(METHODS["refl"], 0)
    noise = initial_noise(bench.models.backbone, (32, 32), SIZE.seed, "fidelity-noise", prompt.samples)
    own = rollout(prompt.velocity, noise, prompt.sigmas, plan.rollout_spec)
    torch.testing.assert_close(prompt._ending(plan).x_end, own.x_end)


# miniature: the cells -------------------------------------------------------------------------------------------------

JOB = TrainingJob("final", "flowbp_sparse", 1e-3, 0, (Stop("updates", 1), Stop("seconds", 2)))


def scores_in(folder: Path, job: TrainingJob) -> list[object]:
    return [read_json(job.cell_file(folder, stop.budget))["scores"] for stop in job.stops]


@pytest.mark.exhaustive
def test_a_cell_depends_on_nothing_before_it(bench: Bench, tmp_path: Path) -> None:
    for order, jobs in {"first": [JOB], "later": [replace(JOB, method=CONTROL, seed=1), JOB]}.items():
        for job in jobs:
            miniature_cells.run_job(bench, tmp_path / order, job)
    assert scores_in(tmp_path / "first", JOB) == scores_in(tmp_path / "later", JOB)
    early, late = scores_in(tmp_path / "first", JOB)
    assert early != late
    assert set(early) == {"1", "2"}
    assert set(early["1"]) == {"reward", "heldout", "verifier"}
    bench.restore_base()
    for name, p in bench.models.parameters.items():
        assert torch.equal(p, bench.base_weights[name])
        assert p.grad is None


@pytest.mark.exhaustive
def test_a_run_cut_off_between_budgets_goes_on_to_the_same_end(bench: Bench, tmp_path: Path) -> None:
    miniature_cells.run_job(bench, tmp_path / "whole", JOB)
    for stop in JOB.stops:
        miniature_cells.run_job(bench, tmp_path / "parts", replace(JOB, stops=(stop,)))
    assert scores_in(tmp_path / "whole", JOB) == scores_in(tmp_path / "parts", JOB)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "whole").rglob("*.json")}
    miniature_cells.run_job(bench, tmp_path / "whole", JOB)
    assert len(before) == 2
    assert all(file.stat().st_mtime_ns == when for file, when in before.items())


def test_the_control_learns_its_own_loss(bench: Bench) -> None:
    trainer = bench.make_trainer(CONTROL, 1e-4, 0, 1)
    before = {name: p.detach().clone() for name, p in trainer.models.parameters.items()}
    metrics = trainer.step()
    assert 0 < metrics["loss"] < 10
    assert any(not torch.equal(p, before[name]) for name, p in trainer.models.parameters.items())
    assert len(bench.pretraining_data.captions) == len(bench.pretraining_data.latents) == 32


@pytest.mark.exhaustive
def test_calibration_and_base(bench: Bench, tmp_path: Path) -> None:
    found = {}
    for name, work in (("base", miniature_cells.evaluate_base), ("calibration", miniature_cells.calibrate)):
        work(bench, tmp_path / f"{name}.json")
        found[name] = read_json(tmp_path / f"{name}.json")
    per_update = found["calibration"]["per_update"]
    assert list(per_update) == [*METHODS, CONTROL]
    assert found["calibration"]["budget_seconds"] == 2 * np.median([per_update[m] for m in METHODS])
    assert len(found["base"]["scores"]["final"]["2"]["verifier"]) == 4
    assert list(found["base"]["scores"]["search"]) == ["1"]


# miniature: the order of work and the tables --------------------------------------------------------------------------

NUM_PROMPTS = 40
ENVIRONMENT = {"hardware": "Some CPU", "python": "3.11", "packages": {"torch": "2"}}
CALIBRATION = {"per_update": dict.fromkeys(METHODS, 2.0) | {"full": 4.0, CONTROL: 0.5}, "budget_seconds": 200.0}


def answers(right: int, shift: int = 0) -> dict[str, list[float]]:
    verifier = np.roll(np.arange(NUM_PROMPTS) < right, shift).astype(float).tolist()
    return {"verifier": verifier, "reward": [v + 1 for v in verifier], "heldout": [v - 1 for v in verifier]}


def cell(phase: str, method: str, rate: float, seed: int, budget: str, right: int, shift: int = 0) -> dict[str, object]:
    return {
        **{"phase": phase, "method": method, "rate": rate, "seed": seed, "budget": budget, "updates": 100},
        **{"planned": 100, "training_seconds": 200.0, "seconds": 10.0, "environment": ENVIRONMENT},
        **{"failure": "update 3: not finite" if method == "refl" else None},
        "scores": {scale: answers(right, shift) for scale in ("1", "2")},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """refl and flowbp_sparse tie, draft_k is worse, the control alone is unfinished: its search lacks a rate."""
    right = {"refl": 24, "flowbp_sparse": 23, "draft_k": 12, CONTROL: 10}
    cells = [cell("search", CONTROL, 1e-4, 9, "seconds", 10)]
    for method in ("refl", "flowbp_sparse", "draft_k"):
        for budget in ("updates", "seconds"):
            cells += [cell("search", method, rate, 9, budget, 20) for rate in (1e-4, 1e-3)]
            cells += [cell("final", method, 1e-4, seed, budget, right[method] + seed) for seed in (0, 1)]
            cells += [cell("final", method, 1e-3, 0, budget, NUM_PROMPTS)]  # a rate that was not chosen
    for number, content in enumerate(cells):
        write_json(tmp_path / "cells" / f"{number}.json", content)
    miniature_cells.check_settings(tmp_path, settings_of())
    base = {"scores": {"final": {"1": answers(10), "2": answers(24)}}, "seconds": 5.0, "environment": ENVIRONMENT}
    write_json(tmp_path / "base.json", base)
    content = CALIBRATION | {"seconds": 5.0, "environment": ENVIRONMENT}
    write_json(tmp_path / "calibration.json", content)
    return tmp_path


def test_the_lower_of_equal_rates_is_chosen_once_all_are_tried(folder: Path) -> None:
    rates = miniature_report.MiniatureResults.read(folder).chosen_rates()
    assert set(rates.values()) == {1e-4}
    assert (CONTROL, "seconds") not in rates
    assert len(rates) == 6


def test_rows_are_ranked_and_ties_are_named(folder: Path) -> None:
    rows = miniature_report.rank_methods(miniature_report.MiniatureResults.read(folder), "updates", 1.0)
    assert [r.name for r in rows] == ["refl", "flowbp_sparse", "draft_k", "base"]
    assert rows[0].seeds == [0, 1]
    assert rows[0].scores["verifier"] == pytest.approx(24.5 / NUM_PROMPTS)
    assert (rows[0].seeds_low, rows[0].seeds_high) == (24 / NUM_PROMPTS, 25 / NUM_PROMPTS)
    assert rows[0].changes["verifier"].mean == pytest.approx(14.5 / NUM_PROMPTS)
    assert rows[0].behind is None
    text = miniature_report.describe_ranking(rows)
    assert "Highest verifier accuracy: refl." in text
    assert "Not distinguishable from it on these prompts (interval contains 0): flowbp_sparse." in text
    assert "ahead of" not in text
    assert "not finite" in text


def test_a_base_that_is_not_beaten_is_said_to_be(folder: Path) -> None:
    rows = miniature_report.rank_methods(miniature_report.MiniatureResults.read(folder), "updates", 2.0)
    assert "No method is clearly ahead of the untrained base." in miniature_report.describe_ranking(rows)


def test_the_report_has_every_table_and_where_it_comes_from(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = miniature_report.write_report(folder, folder / "report.json")
    assert text in capsys.readouterr().out
    for part in ("Equal updates", "Equal seconds", "guidance 2 (not as in training)", "Some CPU", "torch 2", "[0, 1]"):
        assert part in text
    assert "| **50.0** |" in text
    assert f"{5 + 5 + 10 * 19} s of computing" in text
    assert len(json.loads((folder / "report.json").read_text())["tables"]) == 4
    assert (folder / "report.md").read_text() == text


def test_a_report_of_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"settings\.json"):
        miniature_report.write_report(tmp_path, tmp_path / "report.json")


def test_cells_of_other_settings_are_not_mixed_in(folder: Path) -> None:
    miniature_cells.check_settings(folder, settings_of())
    with pytest.raises(UserError, match="other config, rates"):
        miniature_cells.check_settings(folder, settings_of("total_batch_size=4", rates=(1e-5, 1e-3)))


def test_jobs_share_a_run_where_budgets_chose_one_rate(folder: Path) -> None:
    methods = ["refl", "draft_k"]
    search = miniature.search_jobs(settings_of(), CALIBRATION, [*methods, "full", CONTROL])
    assert {(j.method, j.stops) for j in search} == {
        ("full", (Stop("updates", 2), Stop("seconds", 50))),
        ("refl", (Stop("updates", 2), Stop("seconds", 100))),
        ("draft_k", (Stop("updates", 2), Stop("seconds", 100))),
        (CONTROL, (Stop("seconds", 400),)),
    }
    assert len(search) == 8
    final = miniature.final_jobs(settings_of(), CALIBRATION, folder, methods, [0, 1])
    assert [(j.method, j.seed, len(j.stops)) for j in final] == [
        ("refl", 0, 2), ("draft_k", 0, 2), ("refl", 1, 2), ("draft_k", 1, 2)
    ]  # fmt: skip
    other = settings_of("optim.lr_scheduler=cosine")
    assert [part.stops for part in miniature_cells.split_job(other, final[0])] == [(s,) for s in final[0].stops]


@pytest.mark.parametrize(
    ("sets", "rates", "message"),
    [
        ([], [1e-4], "--rates"),
        ([], [1e-4, 2.0], "--rates"),
        (["eval.quick_prompts=builtin:shapes/test"], [1e-4, 1e-3], "must differ"),
        (["eval.prompts=prompts.txt"], [1e-4, 1e-3], "verifier reads"),
    ],
)
def test_what_cannot_be_compared_is_refused(sets: list[str], rates: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        miniature.make_settings(load(TrainConfig, [], sets), 2, None, rates)


def test_an_unknown_competitor_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'flowbp_sparse'"):
        miniature.parse_methods("flowbp_spars")
    assert miniature.parse_methods("all") == [*METHODS, CONTROL]


def test_the_recipe_that_hacks_the_reward_is_one() -> None:
    config = load(TrainConfig, [ROOT / "configs" / "flowbp" / "miniature" / "hack.yaml"])
    assert config.method.active.kind == "last_steps"
    assert config.optim.learning_rate > TrainConfig().optim.learning_rate
