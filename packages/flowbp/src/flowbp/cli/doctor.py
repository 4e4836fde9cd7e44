"""The command `flowbp doctor`."""

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

from imgen_common.doctor.commands import build_doctor

if TYPE_CHECKING:
    from imgen_common.doctor.findings import Finding


def findings() -> "Iterator[Finding]":
    """What flowbp uses beyond what every program does."""
    from imgen_common.doctor.findings import Finding, extras

    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    remedy = "" if compiler else "install a C compiler to use model.compile"
    yield Finding("compiler", "ok", "there" if compiler else "none; model.compile needs one", remedy)
    yield from extras({"torchao": "model.quantization", "wandb": "trackers", "trackio": "trackers"})


doctor = build_doctor("flowbp", findings)
