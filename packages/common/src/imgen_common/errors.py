"""Errors a user can mend, and how a command line answers them."""

import difflib
import errno
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NoReturn

from imgen_common.shutdown import exit_code, interrupted_by_signals
from imgen_common.terminal import safe_streams

if TYPE_CHECKING:
    import typer


MENDABLE = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change its permissions, or choose another"),
    errno.ENAMETOOLONG: "shorten the name",
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room, and run the command again"),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR), "give a folder for a folder, and a file for a file"),
}
"""What to do about failures of the file system that no command foresees."""


class UserError(Exception):
    """Something the user can mend: the message says what was given, what is allowed and what to do.

    A command line prints it as one line and exits with code 2 (`run_cli`); it never carries a traceback to the user.
    """


def nearest(name: str, options: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the option closest to `name`, or `""` when none is close."""
    close = difflib.get_close_matches(name, list(options), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_line(text: str, limit: int | None = 300) -> str:
    """Words of someone else on one line, so that they cannot rewrite a terminal: what cannot be printed becomes a
    space, and what exceeds `limit` is cut."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if limit is None or len(line) <= limit else line[: limit - 1] + "…"


def run_cli(app: "typer.Typer", name: str, renamed: Mapping[str, str] = {}) -> NoReturn:
    """Run a typer application as the program `name` and exit.

    renamed: commands and options of earlier versions, each with its name now; they are refused with it.

    Exit codes: 0 done; 1 standard output could not be written; 2 usage errors (typer names the nearest command or
    option) and `UserError` (one line on stderr, no traceback); 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.  Any other
    exception keeps its traceback.
    """
    with safe_streams() as output_failure, interrupted_by_signals():
        code = _run(app, name, renamed)
        if (failure := output_failure()) is not None:
            print(
                f"{name}: error: standard output: {failure.strerror}; what was printed is incomplete", file=sys.stderr
            )
            code = code or 1
    sys.exit(code)


def _run(app: "typer.Typer", name: str, renamed: Mapping[str, str]) -> int | str | None:
    """The exit code of the program."""
    try:
        for place, word in enumerate(sys.argv[1:]):
            option = word.partition("=")[0]
            if option in renamed and (option.startswith("-") or place == 0):
                raise UserError(f"{option}: renamed; write {renamed[option]}")
        app(prog_name=name)
    except UserError as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in MENDABLE or error.filename is None:
            raise
        print(f"{name}: error: {error.filename}: {error.strerror}; {MENDABLE[error.errno]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return exit_code()
    except SystemExit as ended:
        # typer ends with 130 on every KeyboardInterrupt, whichever signal it came from
        return exit_code() if ended.code == 130 else ended.code
    return 0
