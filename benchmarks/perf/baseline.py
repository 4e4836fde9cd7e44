"""A result beside the one that was committed before, of the same class of machine."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def read_committed(file: Path) -> dict[str, Any]:
    """The content of a result as the current commit has it; {} where there is none, or no git."""
    try:
        done = subprocess.run(["git", "show", f"HEAD:./{file.name}"], cwd=file.parent, capture_output=True)
    except OSError:
        return {}
    return json.loads(done.stdout) if done.returncode == 0 else {}


def changes(rows: Sequence[Row], before: Sequence[Row], names: Sequence[str], value: str) -> list[float | None]:
    """`value` of each row by that of the row before with equal `names`, less 1; None where either has none."""
    old = {tuple(row[name] for name in names): row.get(value) for row in before}
    found = []
    for row in rows:
        now, then = row.get(value), old.get(tuple(row[name] for name in names))
        found.append(now / then - 1 if now is not None and then else None)
    return found


def comparable(baseline: Row, settings: Sequence[str]) -> Row:
    """The baseline, or nothing where it was measured with other settings."""
    return baseline if list(baseline.get("settings", ())) == list(settings) else {}


def describe(baseline: Row) -> str:
    """Which result a table is compared with, in a sentence."""
    if not baseline:
        return "No result of this class of machine and these settings had been committed before."
    environment = baseline["environment"]
    revision = (environment.get("git") or {}).get("revision", "unknown")[:7]
    machine = environment.get("hardware", "unknown")
    return f"The baseline is the committed result of revision {revision} on the same class of machine, {machine}."
