"""Errors a user can mend, and how a command line answers them."""

import difflib
import errno
import functools
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import typer


class UserError(Exception):
    """Something the user can mend: the message says what was given, what is allowed and what to do.

    A command line prints it as one line and exits with code 2 (`run_cli`); it never carries a traceback to the user.
    """


class WriteError(UserError):
    """A file cannot be written."""


class DiskFullError(WriteError):
    """The disk, or the user's share of it, is full.  what: the file that did not fit, in words."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; make room and run the command again")
        self.what = what


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk, or the user's share of it, is full; safetensors and torch.save say so in words only."""
    words = ("No space left on device", "Disk quota exceeded", "enforce fail at inline_container", ". unexpected pos ")
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    text = str(error)
    return full or any(word in text for word in words[:2]) or all(word in text for word in words[2:])


def nearest(name: str, options: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the option closest to `name`, or `""` when none is close."""
    close = difflib.get_close_matches(name, list(options), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@functools.cache
def warn_once(text: str) -> None:
    """Prints a warning on standard error, the first time that this process has it."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def one_line(text: str, limit: int | None = 300) -> str:
    """Words of someone else on one line, so that they cannot rewrite a terminal: what cannot be printed becomes a
    space, and what exceeds `limit` is cut."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if limit is None or len(line) <= limit else line[: limit - 1] + "…"


def run_cli(app: "typer.Typer", name: str, renamed: Mapping[str, str] = {}) -> NoReturn:
    """Run a typer application as the program `name` and exit.

    renamed: commands and options of earlier versions, each with its name now; they are refused with it.

    Exit codes: 0 done; 2 usage errors (typer names the nearest command or option) and `UserError` (one line on
    stderr, no traceback), which a full disk is too; 130 Ctrl-C.  Any other exception keeps its traceback.
    """
    try:
        for place, word in enumerate(sys.argv[1:]):
            option = word.partition("=")[0]
            if option in renamed and (option.startswith("-") or place == 0):
                raise UserError(f"{option}: renamed; write {renamed[option]}")
        app(prog_name=name)
    except UserError as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not is_disk_full(error):
            raise
        print(f"{name}: error: {DiskFullError(f'the disk is full ({one_line(str(error))})')}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
