"""Run folders by name or path."""

import itertools
import os
import re
from pathlib import Path

from imgen_common.errors import UserError, nearest, quoted

CONFIG, ENVIRONMENT, METRICS, LOCK = "config.yaml", "environment.json", "metrics.jsonl", ".lock"


MAX_NAME_BYTES = 240
"""Longest name of a run folder; a number may follow."""


TOLD = "interleave.tell_story"
"""What makes run folders from Python; its run has functions, which no command knows."""
MAKERS = (
    *("flowbp train", "flowbp benchmark", "interleave run", "interleave batch", "interleave demo"),
    *("interleave sft", "interleave grpo", "interleave data", "interleave benchmark"),
    TOLD,
)
"""What makes run folders."""


def find_run(text: str, root: Path, *made_by: str) -> Path:
    """The run folder that `text` names: a path, or the name of a run under `root`.

    made_by: commands, as in `MAKERS`, whose runs are meant; none: any.
    Raises UserError with the nearest name if there is none, and for a run of another command.
    """
    if not text:  # of a variable of the shell that is not set; as a path it would mean this folder
        raise UserError("run '': the name is empty; give the name of a run, or its folder")
    for path in (Path(text), root / text):
        if os.path.isfile(path / CONFIG):  # False, too, for a name that is too long
            check_maker(path, *made_by)
            if os.path.getsize(path / CONFIG) == 0:  # it would count as all defaults
                raise UserError(f"{path / CONFIG}: is empty, as after a loss of power; restore it, or start anew")
            return path
    if os.path.exists(text):
        above = next((path for path in Path(text).parents if os.path.isfile(path / CONFIG)), None)
        which = f"that of the run, {above}" if above else "the folder of an earlier run"
        raise UserError(f"{text}: not a run folder (no {CONFIG} in it); give {which}")
    raise UserError(f"{text}: no such run{_describe_runs(text, root, *made_by)}")


def check_is_model(text: str, root: Path, *made_by: str) -> None:
    """Raises UserError, with the runs there are, for a `text` that is no run and cannot name a model either.

    made_by: as for `find_run`.
    """
    if re.fullmatch(r"[\w.-]+", text) and not Path(text).exists():  # a model of the hub has a slash in its name
        models = "a model is a folder, org/name[@revision] or builtin:shapes/..."
        raise UserError(f"{text}: no such run or model{_describe_runs(text, root, *made_by)}; {models}")


def _describe_runs(text: str, root: Path, *made_by: str) -> str:
    """The runs under `root` of some commands for a message about a `text` that is none, the nearest name first."""
    paths = [path.parent for path in root.glob(f"*/{CONFIG}")]
    names = [path.name for path in paths if not made_by or maker_of(path) in (None, *made_by)]
    known = f"; runs in {root}: {', '.join(sorted(names))}" if names else f"; there are no such runs in {root}"
    return nearest(Path(text).name, names) + known


def check_maker(path: Path, *made_by: str) -> None:
    """Raises UserError for a run that says that another command made it."""
    maker = maker_of(path)
    if made_by and maker not in (None, *made_by):
        raise UserError(f"{path}: a run of `{maker}`, not of `{made_by[0]}`; give that command the run, or another run")


def maker_of(path: Path) -> str | None:
    """Which of `MAKERS` a run says made it; None where it says none of them."""
    from pydantic import BaseModel

    from imgen_common.files import read_json

    class Recorded(BaseModel):
        command: list[str] = []

    try:
        program, command, *_ = [*read_json(path / ENVIRONMENT, Recorded).command, "", ""]
    except UserError:
        return None
    file = Path(program)  # as sys.argv has it, also of `python -m`
    maker = f"{file.parent.name if file.name == '__main__.py' else file.name} {command}".strip()
    return maker if maker in MAKERS else None


def is_run(text: str, root: Path) -> bool:
    """Whether `text` names a run folder rather than a model."""
    return text != "" and any(os.path.isfile(path / CONFIG) for path in (Path(text), root / text))


def free_path(root: Path, name: str | None, otherwise: str) -> Path:
    """Where a new run goes under `root`: `name`, which must be free, or `otherwise`, numbered until it is free.

    Raises UserError for a name that is taken, or no plain folder name.
    """
    plain = otherwise if name is None else name
    path = root / plain
    if root.is_file():
        raise UserError(f"--runs {root}: is a file; give the folder that holds the run folders")
    if plain in ("", ".", "..") or path.name != plain or len(plain.encode()) > MAX_NAME_BYTES:
        raise UserError(
            f"name {plain!r}: must be the plain name of a folder, of at most {MAX_NAME_BYTES} bytes; "
            "where it goes is --runs"
        )
    if name is not None and (path / CONFIG).exists():
        raise UserError(f"{path}: holds a run already; go on with --resume {quoted(path)} or choose another name")
    if name is not None or not path.exists():
        return path
    numbered = (root / f"{plain}-{number}" for number in itertools.count(2))
    return next(free for free in numbered if not free.exists())
