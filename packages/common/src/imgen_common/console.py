"""What is printed: a spinner, tables in Markdown, and the messages of other libraries."""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@contextmanager
def spinner(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner on standard error, if that is a terminal: libraries take seconds to load.

    Gives a function that says what is being done now, beside the spinner; elsewhere as a line.
    """
    if not sys.stderr.isatty():
        yield lambda text: print(text, file=sys.stderr, flush=True)
        return
    from rich.console import Console

    with Console(stderr=True).status(text) as status:
        yield status.update


class GroupedCommands(TyperGroup):
    """Lists commands under the headings that their `rich_help_panel` gives, in the order of their first commands."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        width = formatter.width - 6 - max(map(len, self.commands))
        for name, command in self.commands.items():
            if not command.hidden:
                heading = getattr(command, "rich_help_panel", None) or "Commands"
                groups.setdefault(heading, []).append((name, command.get_short_help_str(width)))
        for heading, rows in groups.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


def add_version(app: typer.Typer, package: str) -> None:
    """Gives an application the option `--version`, which prints the version of its package."""

    def show(given: bool) -> None:
        if given:
            from importlib import metadata

            print(package, metadata.version(package))
            raise typer.Exit

    def options(
        version: Annotated[
            bool, typer.Option("--version", callback=show, is_eager=True, help="Print the version.")
        ] = False,
    ) -> None:
        pass

    app.callback()(options)


def quiet_libraries() -> None:
    """Turns off the progress bars and the advice of diffusers and transformers, which are meant for their callers.

    It also turns off what no user can act on: deprecations in transformers, whose old names TRL and accelerate still
    use; that TRL's environments are experimental; that torch normalizes bfloat16 by weights in float32 unfused.
    """
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    for message in ("You are using 'environment_factory'", "Mismatch dtype between input and weight"):
        warnings.filterwarnings("ignore", message, UserWarning)
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    logging.getLogger("DeepSpeed").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """False for what DeepSpeed says wherever it is imported without a GPU, as diffusers does to save a model."""
    return not record.getMessage().startswith("Setting accelerator to CPU")


def print_table(out: "Console", table: "Table") -> None:
    """Prints a table, or where it would be squeezed to less than its longest words, its rows below each other."""
    if _least_width(out, table) <= out.width:
        out.print(table)
        return
    if table.title:
        out.print(table.title)
    for row in zip(*(column.cells for column in table.columns), strict=True):
        for column, cell in zip(table.columns, row, strict=True):
            if cell:
                out.print(f"[dim]{column.header}[/] {cell}" if column.header else cell)
        out.print()


def _least_width(out: "Console", table: "Table") -> int:
    """The width at which no word of a table is cut."""
    from rich.text import Text

    widths = [
        max(out.measure(Text.from_markup(str(cell))).minimum for cell in (column.header, *column.cells))
        for column in table.columns
    ]
    return sum(widths) + 2 * (len(widths) - 1)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with its first column aligned left, the others right; columns are padded to line up."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([first, *rest]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), "| " + " | ".join(rule) + " |", *map(line, rows)])


def count(number: int, what: str) -> str:
    """`2 steps`, `1 step`."""
    return f"{number} {what}{'s' * (number != 1)}"


def format_duration(seconds: float) -> str:
    """`41 s`, `2 min 05 s`, `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
