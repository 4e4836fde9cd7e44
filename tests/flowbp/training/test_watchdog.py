"""The watchdog: what it sees in images, when it alerts, and that a run keeps its last healthy checkpoint."""

import contextlib
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowbp.config import LoraConfig, TrainConfig, WatchdogConfig
from flowbp.evaluation.evaluate import Evaluation
from flowbp.evaluation.image_statistics import dissimilarity, image_statistics, rms_distance
from flowbp.training import watchdog
from flowbp.training.loop import TrainingLoop
from flowbp.training.progress import NullReporter
from flowbp.training.runs import MAY_DIFFER
from flowbp.training.trainer import Trainer
from flowbp.training.watchdog import Finding, compare_with_base, image_drift
from imgen_common.config import load
from imgen_common.images import from_pil, to_pil
from imgen_common.run_folder.folder import RunFolder
from imgen_common.run_folder.listing import last_healthy_update, read_alerts
from imgen_common.shutdown import GracefulShutdown

RECIPES = Path(__file__).parents[3] / "configs" / "flowbp" / "miniature"


def flat(*colour: float, side: int = 32) -> torch.Tensor:
    return torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, side, side).clone()


def test_statistics_of_images_that_anyone_can_count() -> None:
    half = flat(1.0, 1.0, 1.0)
    half[..., 16:] = 0
    found = image_statistics(half)
    assert found["dark"].item() == 0.5
    assert found["saturated"].item() == 0
    assert found["edges"].item() == pytest.approx(1 / 31)
    assert found["colors"].item() == pytest.approx(1.0)
    assert image_statistics(flat(1.0, 0.0, 0.0))["saturated"].item() == 1
    assert image_statistics(flat(0.5, 0.4, 0.5))["colors"].item() == pytest.approx(0)


def test_a_grid_is_seen_and_noise_is_not() -> None:
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    waves = 0.5 + 0.4 * torch.sin(2 * math.pi * x / 8).expand(1, 3, 64, 64)
    assert image_statistics(noise)["grid"].item() == pytest.approx(1 / 64, rel=0.5)
    assert image_statistics(waves)["grid"].item() == pytest.approx(1, abs=1e-4)
    assert image_statistics(flat(0.3, 0.3, 0.3))["grid"].item() == 0
    assert 0.3 < image_statistics(0.5 * noise + 0.5 * waves)["grid"].item() < 1
    slow = (y / 64).expand(1, 3, 64, 64)
    assert image_statistics(slow)["grid"].item() > 0.9  # the same slope in every tile repeats, too
    assert math.isnan(image_statistics(flat(0.3, 0.3, 0.3, side=8))["grid"].item())


def test_distance_is_between_images_of_equal_seeds() -> None:
    a = torch.rand(3, 3, 32, 32)
    assert rms_distance(a, a).tolist() == [0, 0, 0]
    assert rms_distance(flat(0.0, 0.0, 0.0), flat(1.0, 1.0, 1.0)).item() == 1
    back = from_pil(to_pil(a))
    assert (back - a).abs().max() <= 0.5 / 255 + 1e-6


@given(st.floats(0.2, 1), st.lists(st.floats(-0.5, 0.5), min_size=3, max_size=3), st.integers(0, 99))
def test_likeness_is_of_shapes_whatever_the_exposure(contrast: float, tint: list[float], seed: int) -> None:
    a, b = torch.rand(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    exposed = contrast * a + torch.tensor(tint).view(3, 1, 1)
    torch.testing.assert_close(dissimilarity(a, exposed), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(dissimilarity(exposed, b), dissimilarity(a, b), atol=1e-5, rtol=0)
    torch.testing.assert_close(dissimilarity(a, 1 - a), torch.full((4,), 2.0))


def test_a_flat_image_is_like_flat_ones_only() -> None:
    grey, white, noise = flat(0.5, 0.5, 0.5), flat(1.0, 1.0, 1.0), torch.rand(1, 3, 32, 32)
    assert dissimilarity(grey, white).item() == pytest.approx(0, abs=1e-6)
    assert dissimilarity(grey, noise).item() == pytest.approx(0.5)


def evaluation(reward: float, heldout: float, dark: float = 0.0) -> Evaluation:
    draws = torch.randn(3, 60, generator=torch.Generator().manual_seed(0)).double()
    scores = {"reward": (draws[0] + reward).tolist(), "heldout": (draws[1] + heldout).tolist()}
    return Evaluation(["p"] * 60, scores, None, torch.empty(0), {"dark": (draws[2] + dark).tolist()})


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (evaluation(0.5, 0.4), []),
        (evaluation(0.0, -0.5), []),  # the reward did not rise: a bad run, no hacking
        (evaluation(0.5, -0.3), ["Held-out reward fell"]),
        (evaluation(1.5, 0.2), ["Reward is"]),
        (evaluation(0.5, 0.4, dark=1.2), ["dark moved by +"]),
        (evaluation(2.0, -0.5, dark=-3.0), ["Held-out reward fell", "Reward is", "dark moved by -"]),
    ],
)
def test_when_it_barks(now: Evaluation, words: list[str]) -> None:
    found = compare_with_base(WatchdogConfig(), evaluation(0, 0), now, ["reward"], ["heldout"], drift=0.1)
    assert len(found.alerts) == len(words)
    for alert, word in zip(found.alerts, words, strict=True):
        assert word in alert


@pytest.mark.parametrize(
    ("offset", "size", "number"), [(0.27, 0.003, r"0\.2\d{3}"), (21.0, 0.1, r"2\d\.\d\d"), (0.0, 0.01, r".?0\.00\d{4}")]
)
def test_an_alert_has_the_digits_of_its_score(offset: float, size: float, number: str) -> None:
    base, now = evaluation(0, 0), evaluation(0.5, -0.3)
    for one in (base, now):
        for name, values in one.scores.items():
            one.scores[name] = [offset + size * value for value in values]
    found = compare_with_base(WatchdogConfig(), base, now, ["reward"], ["heldout"], drift=0.1)
    assert re.fullmatch(f"Held-out reward fell from {number} to {number} while Reward rose", found.alerts[0])


@pytest.mark.parametrize(("value", "lost"), [(math.nan, 60), (math.inf, 60), (-math.inf, 1), (math.nan, 7)])
@pytest.mark.parametrize("name", ["heldout", "reward"])
def test_scores_that_are_not_finite_raise_an_alert(name: str, value: float, lost: int) -> None:
    now = evaluation(0, 0)
    now.scores[name][:lost] = [value] * lost
    found = compare_with_base(WatchdogConfig(), evaluation(0, 0), now, ["reward"], ["heldout"], drift=0.1)
    assert found.alerts == [
        f"{name.title().replace('Heldout', 'Held-out reward')} is not finite on {lost} of 60 prompts"
    ]


def test_one_image_or_equal_scores_are_no_measure() -> None:
    def few(reward: list[float], heldout: list[float], dark: list[float]) -> Evaluation:
        scores = {"reward": reward, "heldout": heldout}
        return Evaluation(["p"] * len(reward), scores, None, torch.empty(0), {"dark": dark})

    base, now = few([14.2], [0.31], [0.1]), few([14.3], [0.30], [0.9])
    found = compare_with_base(WatchdogConfig(), base, now, ["reward"], ["heldout"], drift=math.nan)
    assert found.alerts == []
    assert all(math.isnan(value) for value in found.measures.values())
    base = few([14.2, 14.2 + 2e-6, 14.2], [0.3, 0.5, 0.4], [0.1] * 3)  # equal up to float32's rounding
    now = few([14.3, 14.3, 14.3], [0.3, 0.5, 0.4], [0.1] * 3)
    found = compare_with_base(WatchdogConfig(), base, now, ["reward"], ["heldout"], drift=0.1)
    assert found.alerts == []
    assert math.isnan(found.measures["reward"])
    for one in (base, now):
        one.scores["dark"] = one.scores.pop("heldout")
    found = compare_with_base(WatchdogConfig(), base, now, ["reward"], ["dark"], drift=0.1)
    assert found.measures.keys() == {"reward", "dark", "image_dark", "drift"}
    for one in (base, now):
        one.scores["heldout"] = one.scores.pop("dark")
    found = compare_with_base(WatchdogConfig(), base, now, ["heldout"], ["reward"], drift=0.1)
    assert found.alerts == []


def test_without_held_out_rewards_images_are_still_watched() -> None:
    found = compare_with_base(WatchdogConfig(), evaluation(0, 0), evaluation(9, 0, dark=2), ["reward"], [], drift=0)
    assert [alert.split(" moved")[0] for alert in found.alerts] == ["the images' dark"]


def test_drift_is_judged_where_a_limit_is_set() -> None:
    base = evaluation(0, 0)

    def barks(limit: float, drift: float) -> bool:
        return bool(compare_with_base(WatchdogConfig(drift=limit), base, base, ["reward"], ["heldout"], drift).alerts)

    assert barks(0.4, 0.41)
    assert not barks(0.4, 0.39)
    assert not barks(0.4, math.nan)


def test_drift_is_measured_in_what_the_base_s_images_differ_by() -> None:
    draws = torch.rand(200, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    base, other = draws.split(100)
    assert image_drift(base, base) == pytest.approx(0, abs=1e-6)
    assert image_drift(base, other) == pytest.approx(1, abs=0.03)  # as unlike as any two of them
    half = torch.lerp(base, other, 0.5)
    assert image_drift(base, half) == pytest.approx(1 - 0.5**0.5, abs=0.03)  # the correlation of a with (a + b) / 2
    common = torch.rand(1, 3, 32, 32)  # what all have in common is nothing to tell them apart by
    assert image_drift(base + 2 * common, other + 2 * common) == pytest.approx(1, abs=0.05)
    for alike in (base[:1], base[:1].expand(4, -1, -1, -1)):
        assert math.isnan(image_drift(alike, alike))


def test_the_last_healthy_update_is_the_one_before_the_first_alert(tmp_path: Path) -> None:
    assert last_healthy_update(tmp_path) is None
    for update, alerts in ((10, []), (20, []), (30, ["bad"]), (40, [])):
        watchdog.append_finding(tmp_path, update, Finding(alerts, {}))
    assert last_healthy_update(tmp_path) == 20
    assert read_alerts(tmp_path)[30] == ["bad"]
    watchdog.drop_findings_after(tmp_path, 20)
    watchdog.append_finding(tmp_path, 30, Finding([], {}))
    assert last_healthy_update(tmp_path) == 30


def test_adapters_have_the_norm_of_what_they_add() -> None:
    a, b = torch.randn(2, 8), torch.randn(6, 2)
    parameters = {"x.lora_A.default.weight": a, "x.lora_B.default.weight": b, "other": torch.ones(3)}
    lora = LoraConfig(rank=4, alpha=2)
    assert watchdog.adapter_norm(parameters, lora) == pytest.approx((0.5 * b @ a).norm().item(), rel=1e-5)
    assert watchdog.adapter_norm({"other": torch.ones(3)}, lora) == 0


@pytest.mark.slow
def test_a_run_that_hacks_is_stopped_and_keeps_its_healthy_state(tmp_path: Path) -> None:
    """Every look but the first finds a statistic moved: the threshold is absurd, the path is the real one."""
    from accelerate import Accelerator

    from flowbp.training.loop import train
    from flowbp.training.progress import JsonLinesReporter
    from imgen_common.run_folder.folder import RunFolder

    sets = [
        "max_train_steps=4",
        "total_batch_size=2",
        "num_inference_steps=4",
        "method=refl",
        "method.active.num_active_steps=2",
    ]
    sets += [
        "eval.every=1",
        "eval.num_prompts=4",
        "eval.quick_num_prompts=4",
        "eval.num_inference_steps=2",
        "eval.guidance_scale=[1.0]",
    ]
    sets += ["checkpoint.keep=1", "watchdog.stop=true", "watchdog.shift=1e-9", "optim.learning_rate=1e-2"]
    config, said = load(TrainConfig, [], sets), []
    with RunFolder.create(tmp_path / "run", config, ["flowbp"]) as run:
        train(config, run, Accelerator(cpu=True), JsonLinesReporter(said.append))
    assert any('"event": "alert"' in line for line in said)
    found = read_alerts(tmp_path / "run")
    assert list(found) == [1]
    assert found[1]
    assert run.checkpoints() == [1]


class Updates(Trainer):
    """Stands for a trainer: it counts updates, and its models draw grey images with a score of 1, or 2 at last."""

    def __init__(self, config: TrainConfig, update: int) -> None:
        self.config, self.update = config, update
        self.accelerator: Any = SimpleNamespace(device=torch.device("cpu"))
        self.state: Any = SimpleNamespace(ema_weights=contextlib.nullcontext, state_dict=lambda: {"weights": {}})

    def step(self) -> dict[str, float]:
        self.update += 1
        return {}


def looping(path: Path, update: int, *sets: str) -> TrainingLoop:
    """The loop of a run after so many updates, watched, with an alert at every evaluation."""
    fixed = ["eval.every=1", "eval.num_prompts=2", "eval.quick_num_prompts=2", "max_train_steps=3"]
    config = load(TrainConfig, [], [*fixed, "checkpoint.every=1", *sets])
    run = RunFolder.open(path) if path.exists() else RunFolder.create(path, config, ["flowbp"])
    trainer = Updates(config, update)
    loop = TrainingLoop(trainer, run, NullReporter(), GracefulShutdown())
    loop.evaluation_due = update > 0

    def evaluated(prompts: list[str], source: str, scale: float, label: str) -> Evaluation:
        scores = {name: [float(trainer.update > 0)] * len(prompts) for name in ("reward", "heldout", "verifier")}
        images = torch.full((len(prompts), 3, 8, 8), 0.5) + 0.1 * torch.eye(8)
        return Evaluation(list(prompts), scores, None, images, {"dark": [3.0 * trainer.update] * len(prompts)})

    loop._evaluate = evaluated  # type: ignore[method-assign]
    return loop


def test_whole_evaluations_of_the_base_are_not_made_again(tmp_path: Path) -> None:
    asked = list[str]()
    for stop in ("base, guidance 2", None):
        loop = looping(tmp_path / "run", 0)
        real = loop._evaluate

        def evaluated(prompts: list[str], source: str, scale: float, label: str, real: Any = real) -> Evaluation:
            asked.append(label)
            if label == stop:  # noqa: B023
                raise KeyboardInterrupt
            return real(prompts, source, scale, label)

        loop._evaluate = evaluated  # type: ignore[assignment]
        with loop.run, contextlib.suppress(KeyboardInterrupt):
            loop.evaluate_base()
    assert asked == ["base, guidance 1", "base, guidance 2", "base, guidance 2", "quick"]


@pytest.mark.parametrize("place", ["image", "finding", "metrics"])
def test_an_evaluation_that_was_cut_short_is_watched_once_resumed(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, or a kill, between the images, the watchdog's finding and the metrics of an evaluation."""
    loop = looping(tmp_path / "run", 0)
    loop.evaluate_base()
    targets = {
        "image": (RunFolder, "log_image"),
        "finding": (watchdog, "append_finding"),
        "metrics": (RunFolder, "log"),
    }
    owner, name = targets[place]
    with loop.run, monkeypatch.context() as patch:
        real, refuses = getattr(owner, name), []

        def fails(*given: Any) -> None:
            if loop.trainer.update == 1 and (name != "log" or any(key.startswith("eval/") for key in given[2])):
                refuses.append(1)
                raise KeyboardInterrupt
            real(*given)

        patch.setattr(owner, name, fails)
        with pytest.raises(KeyboardInterrupt):
            loop.run_updates()
    assert refuses
    resumed = looping(tmp_path / "run", 1)
    with resumed.run:
        resumed.run.rewind(1)
        resumed.run_updates()
        lines = [line["step"] for line in resumed.run.metrics() if "eval/reward" in line]
    assert read_alerts(tmp_path / "run").keys() == {1, 2, 3}
    assert lines == [0, 1, 2, 3]
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 4


@pytest.mark.parametrize(("sets", "last"), [([], 1), (["watchdog.stop=false"], 3)])
def test_a_run_that_the_watchdog_ended_does_not_train_on_when_resumed(
    sets: list[str], last: int, tmp_path: Path
) -> None:
    """It was stopped in the evaluations that follow; told to, it goes on."""
    loop = looping(tmp_path / "run", 0, "watchdog.stop=true")
    with loop.run:
        loop.evaluate_base()
        loop.run_updates()
    assert loop.trainer.update == 1
    resumed = looping(tmp_path / "run", 1, "watchdog.stop=true", *sets)
    with resumed.run:
        resumed.run_updates()
    assert resumed.trainer.update == last


@pytest.mark.slow
def test_without_a_base_to_compare_with_it_says_so(tmp_path: Path) -> None:
    """A run that was begun without the watchdog, or with other quick prompts, and goes on with it."""
    from accelerate import Accelerator

    from flowbp.training.loop import train
    from flowbp.training.progress import JsonLinesReporter
    from imgen_common.run_folder.folder import RunFolder

    sets = [
        "total_batch_size=2",
        "num_inference_steps=4",
        "method=refl",
        "method.active.num_active_steps=2",
        "eval.guidance_scale=[1.0]",
    ]
    sets += ["eval.num_prompts=2", "eval.num_inference_steps=2", "max_train_steps=1", "checkpoint.every=1"]
    sets += ["heldout=[]"]
    for quick, expected in (
        (["eval.every=0"], 0),
        (["eval.every=1", "eval.quick_num_prompts=2", "max_train_steps=2"], 1),
    ):
        config, said = load(TrainConfig, [], [*sets, *quick]), []
        path = tmp_path / "run"
        opened = RunFolder.open(path, config, may_differ=MAY_DIFFER) if path.exists() else None
        with opened or RunFolder.create(path, config, ["flowbp"]) as run:
            train(config, run, Accelerator(cpu=True), JsonLinesReporter(said.append))
        assert sum("not watched" in line for line in said) == expected
        assert sum("no held-out reward" in line for line in said) == 1


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("recipe", "sets", "alerts_expected"),
    [(["hack.yaml"], ["seed=1", "eval.every=10"], True), ([], ["eval.every=30"], False)],
)
def test_hacking_is_caught_before_the_verifier_falls(
    tmp_path: Path, recipe: list[str], sets: list[str], alerts_expected: bool
) -> None:
    """The hacking recipe, left alone, has lost 9 points of the verifier by update 40; the default recipe gains."""
    from accelerate import Accelerator

    from flowbp.training.loop import train
    from flowbp.training.progress import JsonLinesReporter
    from imgen_common.run_folder.folder import RunFolder

    sets = [
        *sets,
        "max_train_steps=30",
        "eval.num_prompts=2",
        "eval.guidance_scale=[1.0]",
        "eval.quick_num_prompts=120",
    ]
    config = load(TrainConfig, [RECIPES / name for name in recipe], [*sets, "watchdog.stop=true"])
    with RunFolder.create(tmp_path / "run", config, ["flowbp"]) as run:
        train(config, run, Accelerator(cpu=True), JsonLinesReporter(lambda line: None))
    lines = run.metrics()
    verifier = {line["step"]: line["eval/verifier"] for line in lines if "eval/verifier" in line}
    *healthy, (update, alerts) = read_alerts(tmp_path / "run").items()
    assert verifier[update] - verifier[0] > -0.05
    assert not any(found for _, found in healthy)
    assert bool(alerts) == alerts_expected
    assert all("drifted: " in alert for alert in alerts)  # nothing else sees it
