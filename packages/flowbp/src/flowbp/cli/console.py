"""The tables that the commands print on a terminal."""

import math
from collections.abc import Iterable, Mapping, Sequence
from textwrap import indent
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from flowbp.config import TrainConfig
from flowbp.core.plan import Plan
from flowbp.evaluation.compare import Change, MeanScore, describe_change, format_score, score_title
from flowbp.reports.explain import describe_axes, describe_reward_input, plan_costs, plan_strip
from imgen_common.config import to_yaml
from imgen_common.console import format_duration, print_table
from imgen_common.errors import one_line

if TYPE_CHECKING:
    from flowbp.evaluation.benchmarks.tables import BenchmarkRow

ARITHMETIC_LABELS = {
    "images_per_process": "images per process and update",
    "evaluations_per_image_with_gradient": "network evaluations per image, with gradient",
    "evaluations_per_image_without_gradient": "network evaluations per image, without",
    "evaluations_per_update_with_gradient": "network evaluations per update, with gradient",
    "evaluations_per_update_without_gradient": "network evaluations per update, without",
    "jacobians_per_image": "Jacobian products per image",
    "images": "images in total",
    "prompts": "training prompts",
    "epochs": "passes through the prompts",
    "checkpoint_bytes": "bytes per checkpoint",
}
"""Labels of numbers whose names do not say enough."""


LABELLED = 15
"""Characters from one number of a step to the next in the drawing of a plan."""


def standard_output() -> Console:
    """A console; where standard output is not a terminal, tables are 120 characters wide."""
    out = Console(highlight=False, emoji=False)
    return out if out.is_terminal else Console(highlight=False, emoji=False, width=120)


def _table(*columns: str, right: Iterable[int] = (), title: str | None = None) -> Table:
    table = Table(
        box=None, header_style="bold", title=title, title_justify="left", pad_edge=False, padding=(0, 2, 0, 0)
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in set(right) else "left", overflow="fold")
    return table


def print_methods(rows: Sequence[Mapping[str, str]]) -> None:
    """The named methods on their axes, then what each does."""
    out = standard_output()
    axes = ("reward sees", "active steps", "weights", "coupling", "gap floor")
    table = _table("method", *axes)
    for row in rows:
        table.add_row(f"[bold]{row['name']}[/]", *(escape(row[axis]) for axis in axes))
    print_table(out, table)
    out.print()
    lines = _table("method", "what it does", "source")
    for row in rows:
        lines.add_row(f"[bold]{row['name']}[/]", escape(row["about"]), escape(row["source"]))
    print_table(out, lines)


def print_families(rows: Sequence[Mapping[str, object]]) -> None:
    """The models that can be trained, one in each row."""
    table = _table("model", "license", "guidance", "billions", "source images", "LoRA on", right=(3, 4, 5))
    for row in rows:
        cells = (str(row[key]) for key in ("license", "guidance", "billions", "max_source_images"))
        table.add_row(str(row["model"]), *cells, "-" if row["lora_gb"] is None else f"{row['lora_gb']} GB")
    print_table(standard_output(), table)


def print_plan(config: TrainConfig, plan: Plan, heading: str) -> None:
    """A plan of a configuration: axes of the method, steps in characters, terms, legs, cost."""
    out = standard_output()
    out.print(f"[bold]{escape(heading)}[/]\n")
    axes = _table("axis", "choice")
    for name, text in describe_axes(config.method).items():
        axes.add_row(name, escape(text))
    print_table(out, axes)
    out.print(f"\nThe reward sees {escape(describe_reward_input(plan))}.\n")
    strip = list(plan_strip(plan))
    whole = max((len(line) for _, line in strip), default=0)
    part = max(LABELLED, (out.width - 8) // LABELLED * LABELLED) if out.is_terminal else whole
    for start in range(0, whole, max(1, part)):  # what stands under a step stays there on a narrow terminal
        for label, line in strip:
            out.print(f"[dim]{label:<8}[/]{escape(line[start : start + part])}", soft_wrap=True)
    out.print("[dim]        ● active   ◉ active and coupled   ○ node of a leg   ▲ what the reward sees[/]\n")
    terms = _table("step", "sigma", "weight c", "Euler steps", "coupling alpha", right=range(5))
    for row in plan.table():
        coupling = f"{row['coupling']:g}" if row["coupling"] else "-"
        values = (f"{row['sigma']:.4f}", f"{row['weight']:+.4f}", f"{row['euler_steps']:.2f}", coupling)
        terms.add_row(str(row["step"]), *values)
    print_table(out, terms)
    if plan.legs:
        legs = _table("leg", "from", "to", "velocities and their weights", right=(0, 1, 2))
        for k, leg in enumerate(plan.legs, 1):
            nodes = "  ".join(f"v_{q} {w:+.4f}" for q, w in leg.nodes)
            legs.add_row(str(k), f"x_{leg.start}", f"x_{leg.stop}", nodes)
        out.print()
        print_table(out, legs)
    cost = _table("per image", "")
    for name, text in plan_costs(plan, config.keep_graphs):
        cost.add_row(name, escape(text))
    out.print()
    print_table(out, cost)


def print_start(prompts: Sequence[str], path: str) -> None:
    """The first training prompts, as they were read, and the run folder."""
    print(f"{len(prompts):,} training prompts, such as")
    for prompt in prompts[:3]:
        print(f"  {one_line(prompt, 100)}")
    print(f"run folder: {path}", flush=True)


def print_dry_run(config: TrainConfig, numbers: Mapping[str, Any]) -> None:
    """The resolved configuration and the numbers that follow from it."""
    out = standard_output()
    out.print("[bold]Configuration[/]\n")
    print(indent(to_yaml(config).rstrip(), "  "))
    out.print("\n[bold]Arithmetic[/] [dim](methods with random steps: mean over the first plans of this run)[/]\n")
    table = _table("", "", right=(1,))
    table.show_header = False
    layers = numbers.get("lora_layers", {})
    rows = {ARITHMETIC_LABELS.get(key, key.replace("_", " ")): numbers[key] for key in numbers if key != "lora_layers"}
    for label, value in {**rows, **{f"adapters on layers {target}": layers[target] for target in layers}}.items():
        table.add_row(label, f"{value:,}" if isinstance(value, int) else _number(value))
    out.print(Padding(table, (0, 0, 0, 2)))
    out.print()


def _number(value: float) -> str:
    """With two decimals, or two significant digits where these would hide a small one."""
    return f"{value:,.2f}" if value >= 0.1 or not value else f"{value:.2g}"


def print_estimate(content: Mapping[str, Any]) -> None:
    """The result of `flowbp estimate`."""
    out = standard_output()
    table = _table("memory of a GPU", "GiB", right=(1,))
    for name, size in content["static"].items():
        if size:
            table.add_row(name, format_gib(size))
    for name, size in content["activation"].items():
        table.add_row(f"  during {name}", format_gib(size))
    table.add_row("while prompts are embedded, in total", format_gib(sum(content["startup"].values())))
    table.add_row("[bold]peak[/]", f"[bold]{format_gib(content['peak'])}[/]")
    print_table(out, table)
    for line in _cost_lines(content):
        out.print(line)
    if "measured" in content:
        one = content["measured"]
        out.print(
            f"\nmeasured: {format_gib(one['peak'])} GiB and {_seconds(one['seconds_per_update'])} per update; "
            f"estimated {format_gib(one['estimated'])} GiB, {one['estimated'] / one['peak']:.3f} times as much"
        )
    if "fits" in content:
        verdict = "[green]fits[/]" if content["fits"] else "[red]does not fit[/]"
        out.print(f"\n{verdict}: {format_gib(content['peak'])} GiB of {format_gib(content['memory'])} GiB")
    if "fastest" in content:
        one = content["fastest"]
        settings = " ".join(f"--set {setting}" for setting in one["settings"])
        cost = f"{format_gib(one['peak'])} GiB, {one['relative']:.2f} times the operations"
        out.print(f"the fastest setting that fits: {settings}: {cost}")
    if "advice" in content:
        out.print("these settings lower the peak most, one after the other:")
        for change, size in content["advice"]["alone"].items():
            lowered = f"alone to {format_gib(size)} GiB" if size < content["peak"] else "with the others"
            out.print(f"  --set {escape(change):<38} {lowered}")
        out.print(f"  all of them{'':<33} to {format_gib(content['advice']['together'])} GiB")
    elif not content.get("fits", True):
        out.print("no setting lowers it: use a smaller model, a larger GPU or, with distributed.kind=fsdp2, more GPUs")


def _cost_lines(content: Mapping[str, Any]) -> list[str]:
    seconds, updates = content["seconds_per_update"], content["updates"]
    time = f"time {content['speed']}"
    if seconds is not None:
        total = seconds * updates
        time = (
            f"{_seconds(seconds)} at {content['tflops']:g} TFLOP/s ({content['speed']}); {updates} updates: "
            f"{format_duration(total) if total >= 10 else f'{total:.2g} s'} without evaluations"
        )
    lines = [
        f"\ngradient accumulation steps: {content['gradient_accumulation_steps']}",
        f"one update: {_number(content['tflop_per_update'])} TFLOP per process; {escape(time)}",
        *_sent_line(content),
        f"disk: {format_gib(content['disk'])} GiB of checkpoints",
        f"embeddings of the prompts: at most {format_gib(content['embeddings'])} GiB per process, in the host's memory "
        "(on disk with data.embeddings=disk)",
        *(f"license of {escape(ref)}: {escape(terms)}" for ref, terms in content["licenses"].items()),
        *(f"not traced: the stage of reward {name}; only its weights are counted" for name in content["untraced"]),
    ]
    if content["host"]:
        lines.append(f"pinned memory of the host: {format_gib(content['host'])} GiB of stored states")
    if content["counted_for"] == "cpu":
        lines.append("[dim]counted with the operations of a CPU: torch sees no GPU here[/]")
    return lines


def _seconds(value: float) -> str:
    """Of an update, with three digits."""
    return f"{value:.3g} s" if value < 100 else format_duration(value)


def _sent_line(content: Mapping[str, Any]) -> list[str]:
    sent = content["bytes_sent_per_update"]
    return [f"network: each process sends {format_gib(sent)} GiB in an update"] if sent else []


def format_gib(size: float) -> str:
    """Bytes in GiB (2^30 bytes), with three significant digits."""
    gib = size / 2**30
    return f"{gib:,.{max(0, 2 - math.floor(math.log10(gib)))}f}" if size else "0"


def print_comparison(changes: Mapping[float, Mapping[str, Change]], own: float | None, before: str, after: str) -> None:
    """Before against after by guidance scale.  own: the scale of the training."""
    num = next((one.num for scores in changes.values() for one in scores.values()), 0)
    heading = f"{escape(before)} -> {escape(after)}, {num} prompts at equal seeds"
    table = _table("guidance", "", "before", "after", "change", "95 % interval", "", right=(2, 3, 4, 5), title=heading)
    for scale, scores in changes.items():
        label = f"{scale:g}" + ("*" if scale == own else "")
        for name, one in scores.items():
            table.add_row(label, score_title(name).removesuffix(" reward"), *describe_change(name, one))
            label = ""
    out = standard_output()
    print_table(out, table)
    starred = "* the scale it was trained with. " if own in changes else ""
    out.print(
        f"[dim]{starred}Verifier: images that show what the prompt says, changes in percentage points. "
        "Interval: paired bootstrap over prompts.[/]"
    )


def print_categories(changes: Mapping[str, Change], title: str) -> None:
    """The verifier by category."""
    columns = ("category", "prompts", "before", "after", "change", "95 % interval", "")
    table = _table(*columns, right=range(1, 6), title=title)
    for group, one in changes.items():
        table.add_row(group, str(one.num), *describe_change("verifier", one))
    out = standard_output()
    out.print()
    print_table(out, table)


def print_mean_scores(
    scores: Mapping[float, Mapping[str, MeanScore]], groups: Mapping[float, Mapping[str, MeanScore]], label: str
) -> None:
    """One model by guidance scale; the verifier by category too."""
    num = next((one.num for by_name in scores.values() for one in by_name.values()), 0)
    table = _table("guidance", "", "mean", "95 % interval", right=(2, 3), title=f"{escape(label)}, {num} prompts")
    for scale, by_name in scores.items():
        rows = [(score_title(name), name, one) for name, one in by_name.items()]
        rows += [(f"  {group} ({one.num})", "verifier", one) for group, one in groups.get(scale, {}).items()]
        first = f"{scale:g}"
        for text, name, one in rows:
            mean, low, high = (format_score(name, value, one.mean) for value in (one.mean, one.low, one.high))
            table.add_row(first, text, mean, f"{low} to {high}" if math.isfinite(one.mean) else "not finite")
            first = ""
    print_table(standard_output(), table)


def print_benchmark(rows: "Sequence[BenchmarkRow]") -> None:
    """Benchmark folders as rows below each other, with the columns of the papers."""
    from flowbp.evaluation.benchmarks import tables

    out, names = standard_output(), tables.score_columns(rows)
    table = _table("", *(tables.COLUMN_TITLES.get(name, name) for name in names), right=range(1, len(names) + 1))
    for label, row in zip(tables.row_labels(rows), rows, strict=True):
        cells = [tables.format_cell(row, name) for name in names]
        table.add_row(f"[bold]{escape(label)}[/]", *(mean for mean, _ in cells))
        table.add_row("", *(f"[dim]{interval}[/]" for _, interval in cells))
    if names:
        print_table(out, table)
    for note in tables.table_notes(rows):
        out.print(f"[dim]{escape(note)}[/]")
