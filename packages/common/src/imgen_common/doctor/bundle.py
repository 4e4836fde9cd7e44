"""A file for reports of faults, without secrets."""

import getpass
import io
import json
import os
import re
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from imgen_common.doctor.findings import Finding
from imgen_common.errors import UserError
from imgen_common.files import write_atomic
from imgen_common.run_folder.environment import environment
from imgen_common.run_folder.find import CONFIG, ENVIRONMENT, METRICS

SECRET = re.compile(r"(?i)(token|key|secret|password|credential)")
"""Of variables: wider than for keys of configurations, since a value too many that is removed does no harm here."""
LAST_METRICS = 200
"""Lines of a run's metrics in a bundle."""


def write_bundle(file: Path, program: str, findings: Sequence[Finding], run: Path | None) -> None:
    """Writes a zip file for a report of a fault: versions, findings and, of a run, its configuration, what it ran on
    and its last metrics.  Secrets, names of users and home folders are replaced.

    Raises UserError if the file exists or cannot be written, or `run` is no run folder.
    """
    if file.exists():
        raise UserError(f"{file}: exists; give another name")
    parts = {
        "environment.json": json.dumps(environment([program, *sys.argv[1:]]), indent=1),
        "findings.json": json.dumps([asdict(finding) for finding in findings], indent=1),
    }
    if run is not None:
        if not (run / CONFIG).is_file():
            raise UserError(f"{run}: no run folder (it has no {CONFIG}); give one with --run, or leave it out")
        for name in (CONFIG, ENVIRONMENT, METRICS):
            if (run / name).is_file():
                lines = (run / name).read_text("utf-8", "replace").splitlines()
                parts[f"run/{name}"] = "\n".join(lines[-LAST_METRICS:] if name == METRICS else lines)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, text in parts.items():
            bundle.writestr(name, without_secrets(text))
    write_atomic(file, content.getvalue())


def without_secrets(text: str) -> str:
    """A text without what may be secret: values of such variables, keys and passwords, and the user's name and home."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 6:
            text = text.replace(value, "(removed)")
    text = re.sub(r"(://)[^/\s\"'@]+@", r"\1(removed)@", text)
    text = re.sub(r"\b(hf_|sk-|ghp_|glpat-)[A-Za-z0-9_-]{8,}", "(removed)", text)
    text = re.sub(r"(?i)(bearer\s+)\S+", r"\1(removed)", text)
    text = text.replace(str(Path.home()), "~") if len(str(Path.home())) > 1 else text
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        return text
    return re.sub(rf"(?<![A-Za-z0-9]){re.escape(user)}(?![A-Za-z0-9])", "USER", text) if len(user) > 2 else text
