"""Watches for reward hacking: what rises with the reward, what falls behind it, and how the pictures change.

Never looks at a verifier: where one exists, it is what the watchdog is judged by.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol, runtime_checkable

import numpy as np
from annotated_types import Gt
from torch import Tensor

from flowbp.compare import Scored, change, title
from flowbp.pictures import unlikeness
from imgen_common.config import Config
from imgen_common.runs import write_atomic

FOLDER = "watchdog"
LOG = "log.jsonl"
LEAST_SPREAD = {"colours": 0.5}
"""Least standard deviation of a statistic, in its units: where the base is all alike, a small change is not large."""
SHARE_SPREAD = 0.2
"""The same of those that are shares."""


class WatchdogConfig(Config):
    """What counts as hacking, judged at every quick evaluation against the base model at equal seeds."""

    enabled: bool = True
    """Whether to watch; needs quick evaluations."""
    shift: Annotated[float, Gt(0)] = 1.0
    """How far the mean of a picture statistic may move, in standard deviations over the base's pictures."""
    lead: Annotated[float, Gt(0)] = 1.0
    """How far a reward may run ahead of every held-out one, in standard deviations over the base's pictures."""
    drift: Annotated[float, Gt(0)] | None = 0.2
    """How unlike the base's pictures at equal prompts and seeds the model's may become, brightness and contrast aside:
    0, the same; 1, as unlike as the base's pictures of different prompts.  null: any."""
    stop: bool = False
    """Whether an alert ends the training."""


@runtime_checkable
class Judged(Scored, Protocol):
    """Scores and picture statistics by name, one number per prompt."""

    @property
    def statistics(self) -> dict[str, list[float]]: ...


@dataclass(frozen=True)
class Finding:
    """What one look found.

    alerts: in words, none if all is well.  measures: standardised changes by name, for the log.
    """

    alerts: list[str]
    measures: dict[str, float]


def look(
    config: WatchdogConfig, base: Judged, now: Judged, trained: Sequence[str], watched: Sequence[str], drift: float
) -> Finding:
    """Compares the model with its base on the same prompts and seeds.

    Alerts where a held-out reward is clearly lower (95 % paired interval below 0) while a trained one is clearly
    higher; where a trained one is ahead of all held-out ones by `lead`; where a statistic has moved by `shift`; where
    the pictures have drifted further than `config.drift`.  drift: by `drift_of`; nan is not judged.
    """
    moved = {name: standardised(base.scores[name], now.scores[name]) for name in (*trained, *watched)}
    alerts = []
    risen = [name for name in trained if change(base.scores[name], now.scores[name]).low > 0]
    for name in watched:
        found = change(base.scores[name], now.scores[name])
        if risen and found.high < 0:
            alerts.append(
                f"{title(name)} fell from {found.before:.3g} to {found.after:.3g} while {title(risen[0])} rose"
            )
    for name in trained if watched else ():
        ahead = moved[name] - max(moved[other] for other in watched)
        if ahead > config.lead:
            alerts.append(f"{title(name)} is {ahead:.2f} standard deviations ahead of every held-out reward")
    shifts = {
        name: standardised(base.statistics[name], now.statistics[name], LEAST_SPREAD.get(name, SHARE_SPREAD))
        for name in base.statistics
    }
    for name, shift in shifts.items():
        if abs(shift) > config.shift:
            alerts.append(f"the pictures' {name} moved by {shift:+.2f} standard deviations")
    if config.drift is not None and drift > config.drift:
        alerts.append(f"the pictures are {drift:.2f} times as unlike the base's as those are unlike each other")
    return Finding(alerts, moved | shifts | {"drift": drift})


def drift_of(base: Tensor, now: Tensor) -> float:
    """Mean unlikeness of the base's picture and the model's, over that of the base's pictures and their neighbours.

    0 for the base itself, about 1 for pictures that have nothing to do with it.  base, now: (n, 3, h, w) in [0, 1] at
    equal prompts and seeds.  nan where the base has fewer than two pictures, or equal ones.
    """
    offsets = range(1, min(4, len(base)))
    apart = sum(unlikeness(base, base.roll(offset, 0)).mean().item() for offset in offsets)
    return unlikeness(base, now).mean().item() * len(offsets) / apart if apart else math.nan


def standardised(before: Sequence[float], after: Sequence[float], least: float = 1e-6) -> float:
    """Change of the mean in standard deviations of `before`, `least` or more; where either is not finite, left out."""
    a, b = np.asarray(before, float), np.asarray(after, float)
    whole = np.isfinite(a) & np.isfinite(b)
    if not whole.any():
        return 0.0
    return float((b - a)[whole].mean()) / max(float(a[whole].std()), least)


def adapter_norm(parameters: Mapping[str, Tensor], scale: float) -> float:
    """Frobenius norm of the whole update that adapters stand for, scale B A over all layers; 0 without adapters."""
    total = 0.0
    for name, a in parameters.items():
        if ".lora_A." in name:
            b = parameters[name.replace(".lora_A.", ".lora_B.")]
            total += (scale * (b.detach().float() @ a.detach().float())).square().sum().item()
    return total**0.5


def record(run: Path, update: int, finding: Finding) -> None:
    """Appends what was found to the run's log."""
    file = run / FOLDER / LOG
    file.parent.mkdir(exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"update": update, "alerts": finding.alerts}) + "\n")


def findings(run: Path) -> dict[int, list[str]]:
    """Alerts of a run by update; an empty list where all was well."""
    file = run / FOLDER / LOG
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return {line["update"]: line["alerts"] for line in lines}


def rewind(run: Path, update: int) -> None:
    """Forgets what was found after an update that the run goes back to."""
    kept = {at: alerts for at, alerts in findings(run).items() if at <= update}
    lines = "".join(json.dumps({"update": at, "alerts": alerts}) + "\n" for at, alerts in kept.items())
    if (run / FOLDER / LOG).exists():
        write_atomic(run / FOLDER / LOG, lines)


def last_healthy(run: Path) -> int | None:
    """The newest update before the first alert that was looked at and found well."""
    healthy = None
    for update, alerts in sorted(findings(run).items()):
        if alerts:
            return healthy
        healthy = update
    return healthy
