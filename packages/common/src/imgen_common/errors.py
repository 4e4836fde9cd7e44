"""Errors a user can mend, and how a command line answers them."""

import difflib
import errno
import functools
import os
import re
import shlex
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from imgen_common.shutdown import exit_code, interrupted_by_signals
from imgen_common.terminal import safe_streams

if TYPE_CHECKING:
    import typer


MENDABLE = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change its permissions, or choose another"),
    errno.ENAMETOOLONG: "shorten the name",
    errno.EFBIG: "lift the limit on the size of files (ulimit -f), or choose a folder on another file system",
    **dict.fromkeys((errno.EIO, errno.ESTALE), "check the disk or its mount, then run the command again"),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR), "give a folder for a folder, and a file for a file"),
}
"""What to do about failures of the file system that no command foresees."""


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


def system_error(error: BaseException, path: Path | str = "a file of weights") -> OSError | None:
    """The failure of the operating system that an error is; safetensors says its number in words only.

    path: the file, for an error that does not name it.
    """
    if isinstance(error, OSError):
        return error
    match = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return OSError(int(match[1]), os.strerror(int(match[1])), str(path)) if match else None


def nearest(name: str, options: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the option closest to `name`, or `""` when none is close."""
    close = difflib.get_close_matches(name[:200], list(options), n=1)  # whose time is quadratic
    return f"; did you mean {close[0]!r}?" if close else ""


@functools.cache
def warn_once(text: str) -> None:
    """Prints a warning on standard error, the first time that this process has it."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def written_or_warned(write: Callable[[], Path], again: str) -> Path | None:
    """The page that `write` writes of what is done already; None where it cannot be written, with a warning of what was
    wrong.  again: the command that writes it again."""
    try:
        return write()
    except WriteError as error:
        warn_once(f"{error.what if isinstance(error, DiskFullError) else error}; {again} writes the page again")
        return None


def quoted(path: Path | str) -> str:
    """A path as one word of a shell, for commands that are printed to be copied."""
    return shlex.quote(str(path))


def one_line(text: str, limit: int | None = 300) -> str:
    """Words of someone else on one line, so that they cannot rewrite a terminal: what cannot be printed becomes a
    space, and what exceeds `limit` is cut."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if limit is None or len(line) <= limit else line[: limit - 1] + "…"


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: spaces, and characters without a shape, such as U+200B and Ctrl-Z, alone."""
    return all(character.isspace() or unicodedata.category(character) in ("Cf", "Cc") for character in text)


HALF_PAIR = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, which gateways leave where they cut a text, and which no file takes."""


def check_text(text: str, where: str) -> None:
    """Raises UserError naming `where` for NUL, and for half a surrogate pair, which no file and no tokenizer takes.

    They come from JSON such as "\\u0000" and "\\ud83d", and from an argument of a command line that is not UTF-8.
    """
    if "\0" in text:
        raise UserError(f"{where}: holds NUL (U+0000), which is no letter; remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise UserError(f"{where}: holds half of a surrogate pair ({half}); write valid UTF-8") from None


def check_choice(option: str, given: str, choices: Any) -> Any:
    """`given`, if it is a value of the Literal `choices`.  Raises UserError with the nearest of them otherwise."""
    allowed = get_args(choices)
    if given not in allowed:
        raise UserError(f"{option} {given!r}: unknown{nearest(given, allowed)}; allowed: {', '.join(allowed)}")
    return given


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

    Exit codes: 0 done; 1 standard output could not be written; 2 usage errors (typer names the nearest command or
    option), and one line on stderr for a `UserError` or a full disk; 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.  Any other
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
        _check_interpreter()
        _check_working_directory()
        _check_numeric_variables()
        sys.argv[1:] = map(_expand_home, sys.argv[1:])
        for place, word in enumerate(sys.argv[1:]):
            _check_argument(word, place + 1)
            option, _, value = word.partition("=")
            _check_place(option, value or "".join(sys.argv[place + 2 : place + 3]))
            if option in renamed and (option.startswith("-") or place == 0):
                raise UserError(f"{option}: renamed; write {renamed[option]}")
        _command_of(app)(prog_name=name)
    except UserError as error:
        print(f"{name}: error: {one_line(str(error), None)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return exit_code()
    except SystemExit as ended:
        # typer ends with 130 on every KeyboardInterrupt, whichever signal it came from
        return exit_code() if ended.code == 130 else ended.code
    except Exception as error:
        if (explained := _explain(error, name)) is None:
            raise
        print(f"{name}: error: {explained}", file=sys.stderr)
        return 2
    return 0


def _check_interpreter() -> None:
    """Raises UserError where Python runs without docstrings, which transformers reads as it is imported."""
    if sys.flags.optimize > 1:
        raise UserError(
            "Python runs without docstrings (-OO or PYTHONOPTIMIZE=2), which transformers needs; leave it out"
        )


def _expand_home(word: str) -> str:
    """A word of the command line whose `~` no shell has expanded, as bash leaves that of `--runs=~/runs`."""
    found = re.fullmatch(r"(--[\w-]+=)?(~(?:/.*)?)", word, re.DOTALL)
    return word if found is None else (found[1] or "") + os.path.expanduser(found[2])


def _check_place(option: str, value: str) -> None:
    """Raises UserError for an address in the place of a folder, which would be made here under its name."""
    if option in ("--runs", "--out") and (found := re.match(r"([a-zA-Z][\w+.-]*)://", value)):
        raise UserError(
            f"{option} {found[1]}://...: is an address; give a folder of this machine, and copy it afterwards"
        )


def _check_argument(word: str, place: int) -> None:
    """Raises UserError for a word of the command line, the `place`-th, that is not UTF-8, or not read as such."""
    encoding = sys.getfilesystemencoding()
    wrong = "" if encoding == "utf-8" else f", as which Python reads no argument here, but as {encoding}: PYTHONUTF8=1"
    try:
        check_text(word, f"argument {place}, {one_line(word.encode('utf-8', 'replace').decode(), 60)!r}")
    except UserError as error:
        raise UserError(f"{error}{wrong}") from None


def _check_working_directory() -> None:
    """Raises UserError where the working directory was removed, which torch answers with a failure of its own."""
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(
            f"the working directory is gone or cannot be read ({error.strerror}); cd to a folder that exists"
        ) from None


NUMERIC_VARIABLES = {
    **dict.fromkeys(("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT", "DIFFUSERS_TIMEOUT_REMOTE_CODE"), int),
    "HF_DATASETS_IN_MEMORY_MAX_SIZE": float,
}
"""Variables that huggingface_hub, diffusers and datasets read as numbers when they are imported: seconds and bytes."""


def _check_numeric_variables() -> None:
    """Raises UserError where one of them is no number, which would be a traceback of the library."""
    for name, kind in NUMERIC_VARIABLES.items():
        try:
            kind(os.environ.get(name, "0"))
        except ValueError:
            what = "a whole number of seconds" if kind is int else "a number of bytes"
            raise UserError(f"{name}={one_line(os.environ[name], 40)}: must be {what}; correct or unset it") from None


def _explain(error: Exception, program: str) -> str | None:
    """What the user of a program can do about an error of the operating system; None where that is not known."""
    failure = system_error(error)
    where = f"{failure.filename}: {failure.strerror}" if failure is not None and failure.filename is not None else ""
    if is_disk_full(error):
        return str(DiskFullError(where or f"the disk is full ({one_line(str(error))})"))
    if where and failure is not None and failure.errno in MENDABLE:
        return f"{where}; {MENDABLE[failure.errno]}"
    if "No usable temporary directory" in str(error):
        return f"{one_line(str(error.args[-1]))}; {SET_TMPDIR}"
    if isinstance(error, ImportError) and "failed to map segment" in str(error):  # by the dynamic loader, of libtorch
        return f"memory ran out as libraries were loaded ({one_line(str(error))}); lift the limit (ulimit -v)"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported
        says = HELPFUL.get(program, "")
        return f"memory ran out ({one_line(str(error) or 'of the machine')}); {LESS_MEMORY}{says}"
    return None


SET_TMPDIR = "set TMPDIR to a folder that can be written"
LESS_MEMORY = "lower batch sizes, image size or precision, or take a larger device"
HELPFUL = {
    "flowbp": "; flowbp estimate --memory 24GB says which settings help most, of which --resume takes most",
    "interleave": "; --dry-run of sft and grpo says what takes how much",
}
"""What a program has that says which settings help."""


def _command_of(app: "typer.Typer") -> Callable[..., object]:
    """The application's command, whose message for a value that is none of its choices names the nearest one."""
    import typer

    command = typer.main.get_command(app)
    invoke = command.invoke

    def invoke_with_clear_errors(context: "typer.Context") -> object:
        try:
            return invoke(context)
        except typer.BadParameter as error:
            message = error.message.removeprefix("Value error, ").replace("Input should be", "must be").rstrip(".")
            given, found, allowed = message.partition(" is not one of ")
            hint = nearest(given.strip("'"), re.findall(r"'([^']*)'", allowed)) if found else ""
            error.message = f"{message}{hint}" if hint or not message else f"{message}."
            raise

    command.invoke = invoke_with_clear_errors  # type: ignore[assignment]
    return command
