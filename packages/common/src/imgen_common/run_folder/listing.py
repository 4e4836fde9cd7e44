"""What run folders hold, read from their files: kind, state, last scores, size.  No model and no tensor is loaded."""

import contextlib
import fcntl
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge
from pydantic import BaseModel

from imgen_common.config import read_yaml
from imgen_common.errors import UserError
from imgen_common.files import Number, byte_lines, finite_or_none, read_json, read_json_lines
from imgen_common.run_folder.checkpoints import MANIFEST, find_checkpoints
from imgen_common.run_folder.find import CONFIG, LOCK, METRICS
from imgen_common.run_folder.folder import CHECKPOINTS, MetricsLine

State = Literal["running", "finished", "stopped", "unreadable"]
KINDS: tuple[tuple[str, frozenset[str]], ...] = (
    ("train", frozenset({"method", "rewards", "max_train_steps"})),
    ("grpo", frozenset({"trl", "reward_weights"})),
    ("sft", frozenset({"trl"})),
    ("data build", frozenset({"trajectories", "filters"})),
    ("stories", frozenset({"loop", "planner"})),
)
"""Kinds of runs, each with keys of its configuration that the kinds after it lack."""
ALERTS = "watchdog/log.jsonl"
"""File of a run of `flowbp train` with what its watchdog found."""
TRL_SCORES = ("reward", "eval_loss", "loss")
"""What TRL's trainers log that is shown as scores."""


@dataclass(frozen=True)
class RunSummary:
    """One run folder.

    kind: `train`, `sft`, `grpo`, `data build`, `run` (one story), `batch`, or `other`.  done, total: updates that a
    resumed run would not make again (while it runs: updates made), or stories that have ended; None: not known.
    scores: the last ones, by name, as `scores_of` says; a share counts from 0 to 1.  size: bytes of all files.
    changed: when a file of it was written last, in seconds since 1970.
    """

    name: str
    path: str
    kind: str
    state: State
    done: int | None
    total: int | None
    scores: Mapping[str, float]
    scores_of: str
    size: int
    changed: float

    def as_json(self) -> dict[str, Any]:
        """The fields; a score that is not finite is None."""
        return asdict(self) | {"scores": {name: finite_or_none(value) for name, value in self.scores.items()}}

    @property
    def progress(self) -> str:
        """The state in words."""
        if self.done is None or (self.state == "finished" and self.done == self.total):
            return self.state
        of = "" if self.total is None else f" of {self.total}"
        if self.kind in ("train", "sft", "grpo"):
            return f"{self.state} at update {self.done}{of}"
        return f"{self.state}, {self.done}{of} stories"


@dataclass(frozen=True)
class _Found:
    """What the files of one kind of run say."""

    finished: bool = False
    done: int | None = None
    total: int | None = None
    scores: Mapping[str, float] | None = None
    scores_of: str = ""


class _Evaluation(BaseModel):
    name: str
    guidance: float
    scores: dict[str, list[Number]]


class AlertLine(BaseModel):
    """A line of `ALERTS`: the alerts of an update, none if all was well."""

    update: Annotated[int, Ge(0)]
    alerts: list[str]


class _Rows(BaseModel):
    rows: dict[str, dict[str, int]]


def list_runs(root: Path) -> list[RunSummary]:
    """The runs directly under `root`, that written last first.  Raises UserError if there is no such folder."""
    if not root.is_dir():
        raise UserError(f"--runs {root}: there is no such folder; give the folder that holds the run folders")
    found = [summarize_run(file.parent) for file in sorted(root.glob(f"*/{CONFIG}"))]
    return sorted(found, key=lambda run: -run.changed)


def summarize_run(path: Path) -> RunSummary:
    """The summary of one run folder; one whose configuration cannot be read has the state `unreadable`."""
    try:
        config = read_yaml(path / CONFIG)
    except UserError:
        kind, found, state = "other", _Found(), "unreadable"
    else:
        kind, is_running = kind_of(config), is_in_use(path)
        found = _READERS.get(kind, lambda *_: _Found())(path, config, is_running)
        state = "running" if is_running else "finished" if found.finished else "stopped"
        if kind == "stories":
            kind = "run" if found.total == 1 else "batch"
        elif kind == "other" and not is_running:
            state = "finished"  # nothing says that it is not
    files = list(_files(path))
    return RunSummary(
        name=path.name,
        path=str(path),
        kind=kind,
        state=state,  # type: ignore[arg-type]
        done=found.done,
        total=found.total,
        scores=found.scores or {},
        scores_of=found.scores_of,
        size=sum(file.st_size for file in files),
        changed=max((file.st_mtime for file in files), default=0.0),
    )


def kind_of(config: Mapping[str, Any]) -> str:
    """What kind of run a recorded configuration is of."""
    return next((kind for kind, keys in KINDS if keys <= config.keys()), "other")


def is_in_use(path: Path) -> bool:
    """Whether a process holds the lock of a run folder.  Nothing is written."""
    try:
        file = os.open(path / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # a file system without locks
    finally:
        os.close(file)
    return False


def whole_checkpoints(path: Path) -> dict[int, Path]:
    """The checkpoints of a run from which it can be resumed, by their step, ascending; damage is not looked for."""
    found = find_checkpoints(path / CHECKPOINTS)
    # those of TRL are made in place, and whole once they have a manifest
    return {step: one for step, one in found.items() if one.name.startswith("step-") or (one / MANIFEST).is_file()}


def read_alerts(path: Path) -> dict[int, list[str]]:
    """Alerts of a run by update; an empty list where all was well."""
    return {line.update: line.alerts for line, _ in read_json_lines(path / ALERTS, AlertLine)}


def last_healthy_update(path: Path) -> int | None:
    """The newest update before the first alert whose evaluation raised none."""
    healthy = None
    for update, alerts in sorted(read_alerts(path).items()):
        if alerts:
            return healthy
        healthy = update
    return healthy


def _files(path: Path) -> Iterator[os.stat_result]:
    for folder, _, names in os.walk(path):  # which passes over folders that are removed meanwhile
        for name in names:
            with contextlib.suppress(OSError):
                about = os.lstat(os.path.join(folder, name))
                if stat.S_ISREG(about.st_mode):
                    yield about


def _last_metrics(path: Path) -> tuple[int | None, dict[str, tuple[int, float]]]:
    """The last step of metrics.jsonl, and the last value of each metric with its step; NaN: it was not finite."""
    last, values = None, dict[str, tuple[int, float]]()
    for line, _ in read_json_lines(path / METRICS, MetricsLine):
        last = line.step
        found = line.model_extra or {}
        values |= {name: (line.step, math.nan if value is None else value) for name, value in found.items()}
    return last, values


def _updates_done(path: Path, last_logged: int | None, is_running: bool) -> int:
    return (last_logged or 0) if is_running else max(whole_checkpoints(path), default=0)


def _read_train(path: Path, config: Mapping[str, Any], is_running: bool) -> _Found:
    last, metrics = _last_metrics(path)
    done, total = _updates_done(path, last, is_running), config["max_train_steps"]
    trained = _trained_scores(path, config.get("guidance_scale"))
    if trained is not None:
        scale, scores = trained
        return _Found(
            _is_evaluated(path), done, total, scores, f"the evaluation after training, guidance scale {scale:g}"
        )
    quick = {name: value for name, value in metrics.items() if name.startswith(("eval/", "eval_preview/"))}
    at = max((step for step, _ in quick.values()), default=0)
    last_scores = {name: value for name, (step, value) in quick.items() if step == at}
    previewed = any(name.startswith("eval_preview/") for name in last_scores)
    prefix, mark = ("eval_preview/", ", decoded by model.vae.preview") if previewed else ("eval/", "")
    return _Found(
        False,
        done,
        total,
        {name.removeprefix(prefix): value for name, value in last_scores.items() if name.startswith(prefix)},
        f"the quick evaluation at update {at}{mark}" if quick else "",
    )


def _is_evaluated(path: Path) -> bool:
    """Whether each evaluation of the base has one of the trained model beside it."""
    files = [file.parent.name for file in (path / "evaluations").glob("*/scores.json")]
    return {"trained-" + name.removeprefix("base-") for name in files if name.startswith("base-")} <= set(files)


def _trained_scores(path: Path, own: object) -> tuple[float, dict[str, float]] | None:
    """Means of the evaluation after training, that at the guidance scale `own` if there is one; None before it."""
    found = dict[float, dict[str, float]]()
    for file in sorted((path / "evaluations").glob("trained-*/scores.json")):
        with contextlib.suppress(UserError):
            one = read_json(file, _Evaluation)
            found[one.guidance] = {name: sum(of) / len(of) for name, of in one.scores.items() if of}
    return min(found.items(), key=lambda item: (item[0] != own, item[0]), default=None)


def _read_trl(path: Path, config: Mapping[str, Any], is_running: bool) -> _Found:
    last, metrics = _last_metrics(path)
    done = _updates_done(path, last, is_running)
    scores = {name: metrics[name][1] for name in TRL_SCORES if name in metrics}
    return _Found(
        (path / "model").is_dir(), done, _max_steps(path), scores, f"the log up to update {last}" if scores else ""
    )


def _max_steps(path: Path) -> int | None:
    """How many updates TRL's last checkpoint says the training has."""
    for folder in reversed(whole_checkpoints(path).values()):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return int(json.loads((folder / "trainer_state.json").read_bytes())["max_steps"])
    return None


def _read_stories(path: Path, config: Mapping[str, Any], is_running: bool) -> _Found:
    ended, judged = dict[str, str](), dict[tuple[str, ...], object]()
    with contextlib.suppress(UserError):
        for record in _records(path / "trace.jsonl"):
            if record.get("type") == "trajectory":
                ended[str(record.get("id"))] = str(record.get("status"))
            elif record.get("type") == "attempt":
                key = tuple(str(record.get(name)) for name in ("trajectory_id", "step", "attempt"))
                judged[key] = record.get("verdict")
    total = 0
    with contextlib.suppress(UserError):
        total = sum(1 for _ in byte_lines(path / "requests.jsonl"))
    scores = dict[str, float]()
    if ended:
        scores["complete"] = sum(status == "complete" for status in ended.values()) / len(ended)
    verdicts = [verdict for verdict in judged.values() if isinstance(verdict, bool)]
    if verdicts:
        scores["accepted"] = sum(verdicts) / len(verdicts)
    of = f"shares of {len(ended)} stories that are complete and of {len(verdicts)} judged images that were accepted"
    return _Found(total > 0 and len(ended) >= total, len(ended), total, scores, of if scores else "")


def _records(file: Path) -> Iterator[dict[str, Any]]:
    for _, line in byte_lines(file):
        with contextlib.suppress(ValueError):  # a line that a kill left unfinished
            record = json.loads(line)
            if isinstance(record, dict):
                yield record


def _read_build(path: Path, config: Mapping[str, Any], is_running: bool) -> _Found:
    stories = _read_stories(path, config, is_running)
    try:
        rows = read_json(path / "set.json", _Rows).rows
    except UserError:
        return _Found(False, stories.done, stories.total, stories.scores, stories.scores_of)
    counts = {name: float(sum(parts.values())) for name, parts in rows.items()}
    return _Found(True, stories.done, stories.total, counts, "rows of each set")


_READERS = {
    "train": _read_train,
    "sft": _read_trl,
    "grpo": _read_trl,
    "stories": _read_stories,
    "data build": _read_build,
}
