"""Errors a user can mend, and how a command line answers them."""

import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import typer


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


def check_gradients(without: Sequence[str]) -> None:
    """Raises UserError where trained weights, by name, got no gradient in an update: they would never be trained."""
    if without:
        named = ", ".join(without[:3]) + (f" and {len(without) - 3} more" if len(without) > 3 else "")
        raise UserError(
            f"no gradient reaches {named}, which would be trained; take them out of lora.target_modules, or do not "
            "recompute what they are in by re-entrant checkpointing"
        )


def run_cli(app: "typer.Typer", name: str, renamed: Mapping[str, str] = {}) -> NoReturn:
    """Run a typer application as the program `name` and exit.

    renamed: commands and options of earlier versions, each with its name now; they are refused with it.

    Exit codes: 0 done; 2 usage errors (typer names the nearest command or option) and `UserError` (one line on
    stderr, no traceback); 130 Ctrl-C.  Any other exception keeps its traceback.
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
    sys.exit(0)
