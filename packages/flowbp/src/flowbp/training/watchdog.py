"""Watches for reward hacking: what rises with the reward, what falls behind it, and how the images change.

Never looks at a verifier: where one exists, it is what the watchdog is judged by.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from flowbp.config import LoraConfig, WatchdogConfig
from flowbp.evaluation.compare import format_score, paired_change, score_title
from flowbp.evaluation.evaluate import Evaluation
from flowbp.evaluation.image_statistics import dissimilarity
from flowbp.evaluation.results import SavedEvaluation
from imgen_common.files import append_line, read_json_lines, write_atomic
from imgen_common.run_folder.listing import ALERTS, AlertLine

FOLDER = "watchdog"
ROUNDING = 1e-5
"""Share of the largest score up to which the base's scores count as equal: their deviation is no measure then."""
MIN_STD = {"colors": 0.5}
"""Least standard deviation of a statistic, in its units: where the base is all alike, a small change is not large."""
MIN_STD_OF_SHARES = 0.2
"""The same of those that are shares."""
DRIFT = "1: as unlike the base's as those of different prompts are"
"""What drift is measured in."""


@dataclass(frozen=True)
class Finding:
    """What a comparison with the base found: alerts in words, none if all is well, and changes by name for the log."""

    alerts: list[str]
    measures: dict[str, float]


def compare_with_base(
    config: WatchdogConfig,
    base: Evaluation | SavedEvaluation,
    now: Evaluation | SavedEvaluation,
    trained: Sequence[str],
    heldout: Sequence[str],
    drift: float,
) -> Finding:
    """Compares the model with its base on the same prompts and seeds.

    Alerts where a score is not finite; where a held-out reward is clearly lower (95 % paired interval below 0) while a
    trained one is clearly higher; where a trained one is ahead of all held-out ones by `lead`; where a statistic has
    moved by `shift`; where the images have drifted further than `config.drift`.  drift: by `image_drift`; nan
    raises no alert.  One image alone raises none either, but for a score that is not finite.
    """
    alerts = _not_finite({name: now.scores[name] for name in (*trained, *heldout)})
    changes = {name: standardized_change(base.scores[name], now.scores[name]) for name in (*trained, *heldout)}
    risen = [name for name in trained if paired_change(base.scores[name], now.scores[name]).low > 0]
    for name in heldout if len(now.prompts) > 1 else ():
        found = paired_change(base.scores[name], now.scores[name])
        if risen and found.high < 0:
            alerts.append(
                f"{score_title(name)} fell from {format_score(name, found.before, found.after)} to "
                f"{format_score(name, found.after, found.before)} while "
                f"{score_title(risen[0])} rose"
            )
    others = [changes[name] for name in heldout if not math.isnan(changes[name])]
    for name in trained if others else ():
        if (ahead := changes[name] - max(others)) > config.lead:
            alerts.append(f"{score_title(name)} is {ahead:.2f} standard deviations ahead of every held-out reward")
    shifts = {
        name: standardized_change(base.statistics[name], now.statistics[name], MIN_STD.get(name, MIN_STD_OF_SHARES))
        for name in base.statistics
    }
    for name, shift in shifts.items():
        if abs(shift) > config.shift:
            alerts.append(f"the images' {name} moved by {shift:+.2f} standard deviations")
    if config.drift is not None and drift > config.drift:
        alerts.append(f"the images drifted: {drift:.2f}, above watchdog.drift {config.drift:g} ({DRIFT})")
    return Finding(alerts, changes | _of_images({**shifts, "drift": drift}, changes))


def _of_images(measures: Mapping[str, float], taken: Collection[str]) -> dict[str, float]:
    """Measures of images; one that is named as a reward is gets another name."""
    return {f"image_{name}" if name in taken else name: value for name, value in measures.items()}


def _not_finite(scores: Mapping[str, Sequence[float]]) -> list[str]:
    """An alert for every score that has no value for a prompt."""
    lost = {name: int((~np.isfinite(values)).sum()) for name, values in scores.items()}
    return [
        f"{score_title(name)} is not finite on {count} of {len(scores[name])} prompts"
        for name, count in lost.items()
        if count
    ]


def image_drift(base: Tensor, now: Tensor) -> float:
    """Mean unlikeness of the base's image and the model's, over that of the base's images and their neighbors.

    0 for the base itself, about 1 for images that have nothing to do with it.  base, now: (n, 3, h, w) in [0, 1] at
    equal prompts and seeds.  nan where the base has fewer than two images, or equal ones.
    """
    offsets = range(1, min(4, len(base)))
    apart = sum(dissimilarity(base, base.roll(offset, 0)).mean().item() for offset in offsets)
    return dissimilarity(base, now).mean().item() * len(offsets) / apart if apart else math.nan


def standardized_change(before: Sequence[float], after: Sequence[float], min_std: float = 0.0) -> float:
    """Change of the mean in standard deviations of `before`, `min_std` at least, over what is finite in both.

    nan of fewer than two values, and where those before are equal up to rounding and there is no `min_std`.
    """
    a, b = np.asarray(before, float), np.asarray(after, float)
    finite = np.isfinite(a) & np.isfinite(b)
    a, b = a[finite], b[finite]
    if len(a) < 2:
        return math.nan
    std = max(float(a.std()), min_std)
    return float((b - a).mean()) / std if std > ROUNDING * float(np.abs(a).max()) else math.nan


def adapter_norm(parameters: Mapping[str, Tensor], lora: LoraConfig) -> float:
    """Frobenius norm of the whole update that adapters stand for, alpha / rank B A over all layers; 0 without any."""
    total = 0.0
    for name, a in parameters.items():
        layer, is_down, _ = name.partition(".lora_A.")
        if is_down:
            b = parameters[name.replace(".lora_A.", ".lora_B.")]
            total += (lora.scale_of(layer) * (b.detach().float() @ a.detach().float())).square().sum().item()
    return total**0.5


def append_finding(run: Path, update: int, finding: Finding) -> None:
    """Appends what was found to the run's log."""
    (run / FOLDER).mkdir(exist_ok=True)
    append_line(run / ALERTS, AlertLine(update=update, alerts=finding.alerts).model_dump_json())


def drop_findings_after(run: Path, update: int) -> None:
    """Deletes what was found after an update that the run goes back to."""
    file = run / ALERTS
    kept = [text for line, text in read_json_lines(file, AlertLine) if line.update <= update]
    if file.exists():
        write_atomic(file, b"".join(kept))
