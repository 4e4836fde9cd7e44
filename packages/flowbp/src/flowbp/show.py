"""What the commands print on a terminal."""

import math
from collections.abc import Iterable, Mapping, Sequence
from textwrap import indent
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from flowbp.compare import Change, Level, interval, number, signed, title
from flowbp.config import TrainConfig
from flowbp.explain import axes_of, counts, reward_text, strip
from flowbp.methods import Method
from flowbp.plan import Plan
from flowbp.progress import clock
from imgen_common.config import to_yaml

if TYPE_CHECKING:
    from flowbp.tables import Row

WORDS = {
    "processes": "processes",
    "pictures_per_update": "pictures per update",
    "pictures_per_process": "pictures per process and update",
    "micro_batches_per_process": "micro-batches per process and update",
    "evaluations_per_picture_with_gradient": "network evaluations per picture, with gradient",
    "evaluations_per_picture_without_gradient": "network evaluations per picture, without",
    "evaluations_per_update_with_gradient": "network evaluations per update, with gradient",
    "evaluations_per_update_without_gradient": "network evaluations per update, without",
    "jacobians_per_picture": "Jacobian products per picture",
    "updates": "updates",
    "pictures": "pictures in all",
    "prompts": "training prompts",
    "epochs": "passes through the prompts",
    "trained_weights": "trained weights",
    "checkpoint_bytes": "bytes per checkpoint",
}


def console() -> Console:
    """Standard output; tables keep a readable width where it is no terminal."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=120)


def _table(*columns: str, right: Iterable[int] = (), title: str | None = None) -> Table:
    table = Table(
        box=None, header_style="bold", title=title, title_justify="left", pad_edge=False, padding=(0, 2, 0, 0)
    )
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place in set(right) else "left")
    return table


def methods(rows: Sequence[Mapping[str, str]]) -> None:
    """The named methods on their axes, and a line on each."""
    out = console()
    table = _table("method", "reward sees", "active steps", "weights", "coupling", "gap floor")
    for row in rows:
        axes = [row[axis] for axis in ("reward sees", "active steps", "weights", "coupling", "gap floor")]
        table.add_row(f"[bold]{row['name']}[/]", *map(escape, axes))
    out.print(table)
    out.print()
    lines = _table("method", "what it does", "source")
    for row in rows:
        lines.add_row(f"[bold]{row['name']}[/]", escape(row["about"]), escape(row["source"]))
    out.print(lines)


def plan(method: Method, drawn: Plan, heading: str) -> None:
    """A drawn plan: axes, strip, terms, legs, cost."""
    out = console()
    out.print(f"[bold]{escape(heading)}[/]\n")
    axes = _table("axis", "choice")
    for name, text in axes_of(method).items():
        axes.add_row(name, escape(text))
    out.print(axes)
    out.print(f"\nThe reward sees {escape(reward_text(drawn))}.\n")
    for label, line in strip(drawn):
        out.print(f"[dim]{label:<8}[/]{escape(line)}", soft_wrap=True)
    out.print("[dim]        ● active   ◉ active and coupled   ○ node of a leg   ▲ what the reward sees[/]\n")
    terms = _table("step", "sigma", "weight c", "Euler steps", "coupling alpha", right=range(5))
    for row in drawn.table():
        coupling = f"{row['coupling']:g}" if row["coupling"] else "-"
        values = (f"{row['sigma']:.4f}", f"{row['weight']:+.4f}", f"{row['euler_steps']:.2f}", coupling)
        terms.add_row(str(row["step"]), *values)
    out.print(terms)
    if drawn.legs:
        legs = _table("leg", "from", "to", "velocities and their weights", right=(0, 1, 2))
        for k, leg in enumerate(drawn.legs, 1):
            nodes = "  ".join(f"v_{q} {w:+.4f}" for q, w in leg.nodes)
            legs.add_row(str(k), f"x_{leg.start}", f"x_{leg.stop}", nodes)
        out.print()
        out.print(legs)
    cost = _table("per picture", "")
    for name, text in counts(drawn):
        cost.add_row(name, escape(text))
    out.print()
    out.print(cost)


def dry_run(config: TrainConfig, numbers: Mapping[str, Any], path: str) -> None:
    """The resolved configuration and what it comes to."""
    out = console()
    out.print("[bold]Configuration[/]\n")
    print(indent(to_yaml(config).rstrip(), "  "))
    out.print("\n[bold]Arithmetic[/] [dim](methods that draw their steps: mean over the first plans of this run)[/]\n")
    table = _table("", "", right=(1,))
    table.show_header = False
    for key, value in numbers.items():
        table.add_row(WORDS[key], f"{value:,}" if isinstance(value, int) else f"{value:,.2f}")
    out.print(Padding(table, (0, 0, 0, 2)))
    out.print(f"\nrun folder: {escape(path)}\n")


def needs(content: Mapping[str, Any]) -> None:
    """What `flowbp plan` found."""
    out = console()
    table = _table("memory of a GPU", "GB", right=(1,))
    for name, size in content["lasting"].items():
        if size:
            table.add_row(name, gigabytes(size))
    for name, size in content["passing"].items():
        table.add_row(f"  in passing: {name}", gigabytes(size))
    table.add_row("before the training, in all", gigabytes(sum(content["before"].values())))
    table.add_row("[bold]peak[/]", f"[bold]{gigabytes(content['peak'])}[/]")
    out.print(table)
    seconds = content["seconds_per_update"]
    out.print(
        f"\nan update: {content['tflop_per_update']:,.2f} TFLOP a process, {seconds:.3g} s at {content['tflops']:g} "
        f"TFLOP/s; {content['updates']} updates: {clock(seconds * content['updates'])}, evaluations not counted"
        f"\ndisk: {gigabytes(content['disk'])} GB of checkpoints"
    )
    for ref, terms in content["licences"].items():
        out.print(f"licence of {escape(ref)}: {escape(terms)}")
    for name in content["untraced"]:
        out.print(f"not traced: the stage of reward {name}; only its weights are counted")
    if content["host"]:
        out.print(f"memory of the host, pinned: {gigabytes(content['host'])} GB of kept states")
    if content["counted_for"] == "cpu":
        out.print("[dim]counted with the CPU's operations: torch sees no GPU here[/]")
    if "measured" in content:
        one = content["measured"]
        ratio = one["estimated"] / one["peak"]
        out.print(
            f"\nmeasured: {gigabytes(one['peak'])} GB and {one['seconds_per_update']:.3g} s an update; estimated "
            f"{gigabytes(one['estimated'])} GB, {ratio:.3f} of it"
        )
    if "fits" in content:
        verdict = "[green]fits[/]" if content["fits"] else "[red]does not fit[/]"
        out.print(f"\n{verdict}: {gigabytes(content['peak'])} GB of {gigabytes(content['memory'])} GB")
    if "advice" in content:
        out.print("these settings lower the peak most:")
        for change, size in content["advice"]["alone"].items():
            out.print(f"  --set {change:<36} to {gigabytes(size)} GB")
        out.print(f"  all of them{'':<31} to {gigabytes(content['advice']['together'])} GB")


def gigabytes(size: float) -> str:
    """Bytes in GB (10^9), to three digits."""
    return f"{size / 1e9:,.{max(0, 2 - math.floor(math.log10(size / 1e9)))}f}" if size else "0"


def summary(found: Mapping[float, Mapping[str, Change]], own: float | None, before: str, after: str) -> None:
    """Before against after by guidance scale; `own` is the scale of the training."""
    num = next((one.num for scores in found.values() for one in scores.values()), 0)
    heading = f"{escape(before)} -> {escape(after)}, {num} prompts at equal seeds"
    table = _table("guidance", "", "before", "after", "change", "95 % interval", "", right=(2, 3, 4, 5), title=heading)
    for scale, scores in found.items():
        label = f"{scale:g}" + ("*" if scale == own else "")
        for name, one in scores.items():
            means = (number(name, one.before), number(name, one.after))
            numbers = (*means, signed(name, one.difference), interval(name, one))
            table.add_row(label, title(name).removesuffix(" reward"), *numbers, one.verdict)
            label = ""
    out = console()
    out.print(table)
    starred = "* the scale it was trained with. " if own in found else ""
    out.print(
        f"[dim]{starred}Verifier: pictures that show what the prompt says, changes in percentage points. "
        "Interval: paired bootstrap over prompts.[/]"
    )


def categories(found: Mapping[str, Change], title: str) -> None:
    """One score by category."""
    table = _table(
        "category", "prompts", "before", "after", "change", "95 % interval", "", right=range(1, 6), title=title
    )
    for group, one in found.items():
        means = (number("verifier", one.before), number("verifier", one.after))
        table.add_row(
            group, str(one.num), *means, signed("verifier", one.difference), interval("verifier", one), one.verdict
        )
    out = console()
    out.print()
    out.print(table)


def levels(found: Mapping[float, Mapping[str, Level]], groups: Mapping[float, Mapping[str, Level]], label: str) -> None:
    """One model by itself, by guidance scale."""
    num = next((one.num for scores in found.values() for one in scores.values()), 0)
    table = _table("guidance", "", "mean", "95 % interval", right=(2, 3), title=f"{escape(label)}, {num} prompts")
    for scale, scores in found.items():
        rows = [(title(name), name, one) for name, one in scores.items()]
        rows += [(f"  {group} ({one.num})", "verifier", one) for group, one in groups.get(scale, {}).items()]
        first = f"{scale:g}"
        for text, name, one in rows:
            table.add_row(first, text, number(name, one.mean), f"{number(name, one.low)} to {number(name, one.high)}")
            first = ""
    console().print(table)


def benchmark(rows: "Sequence[Row]") -> None:
    """Benchmark folders below each other, in the papers' columns."""
    from flowbp import tables

    out, names = console(), tables.columns(rows)
    table = _table("", *(tables.TITLES.get(name, name) for name in names), right=range(1, len(names) + 1))
    for label, row in zip(tables.labels(rows), rows, strict=True):
        cells = [tables.cell(row, name) for name in names]
        table.add_row(f"[bold]{escape(label)}[/]", *(mean for mean, _ in cells))
        table.add_row("", *(f"[dim]{interval}[/]" for _, interval in cells))
    if names:
        out.print(table)
    for note in tables.notes(rows):
        out.print(f"[dim]{escape(note)}[/]")
