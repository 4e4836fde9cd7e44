"""Trackers beside a run folder: a resumed run goes on as the same run of its tracker."""

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from imgen_common.errors import UserError, one_line, warn_once
from imgen_common.files import read_text, write_atomic
from imgen_common.run_folder.find import METRICS

Tracker = Literal["wandb", "trackio"]
TRACKERS = "trackers.json"
"""File of a run folder that says what each tracker calls the run."""
IDENTITY: Mapping[str, tuple[str, ...]] = {"wandb": ("id", "entity"), "trackio": ("name",)}
"""What a tracker finds a run by, beside the project: W&B by an id, trackio by the name."""


def tracker_module(name: Tracker) -> Any:
    """The tracker's module.  Raises UserError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"tracker {name!r} is not installed; install it (`uv pip install {name}`) or leave it out"
        ) from None


def log_to(module: Any, values: Mapping[str, float], step: int) -> None:
    """Passes numbers on; a tracker that fails in mid-run, as without its network, does not end the run."""
    try:
        module.log(values, step=step)
    except Exception as error:  # each tracker has its own classes
        reason = one_line(str(error) or type(error).__name__)
        warn_once(f"tracker {module.__name__}: did not take numbers ({reason}); {METRICS} has all")


def finish_tracker(module: Any) -> None:
    """Ends the tracker's run; one that fails does not undo what the run has made."""
    try:
        module.finish()
    except Exception as error:  # each tracker has its own classes
        reason = one_line(str(error) or type(error).__name__)
        warn_once(f"tracker {module.__name__}: was not ended ({reason}); what it lacks is in {METRICS}")


def start_tracker(module: Any, run: Path, config: Mapping[str, Any] | None) -> None:
    """Starts a run of the tracker, or goes on with the one that was started for the folder `run`."""
    name, file = module.__name__, run / TRACKERS
    try:
        known = json.loads(read_text(file)) if file.exists() else {}
        found: Mapping[str, str] = known.get(name, {})
    except (ValueError, AttributeError):
        raise UserError(f"{file}: damaged; remove it to go on as a new run of {name}") from None
    project = os.environ.get(f"{name.upper()}_PROJECT") or run.resolve().parent.name or "runs"
    options = {"project": project, "name": run.name, "config": config} | dict(found)
    try:
        started = module.init(**options, resume="allow" if found else "never")
    except Exception as error:  # each tracker has its own classes
        raise UserError(
            f"tracker {name}: cannot be started ({one_line(str(error) or type(error).__name__)}); log in, or leave it "
            "out"
        ) from error
    if not found:
        identity = {key: getattr(started, key, None) for key in ("project", *IDENTITY[name])}
        # trackio changes the name of a new run where another has it
        known[name] = {key: value for key, value in identity.items() if isinstance(value, str)}
        write_atomic(file, json.dumps(known, indent=2) + "\n")
