"""The tables of `benchmarks.quality.miniature`, made from its finished cells."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import format_versions, read_json, write_json
from benchmarks.quality.miniature_cells import (
    BUDGETS,
    COMPETITORS,
    CONTROL,
    Budget,
    Settings,
    choose_rates,
    guidance_scales,
    read_cells,
)
from imgen_common.console import markdown_table
from imgen_common.errors import UserError
from imgen_common.files import write_atomic
from imgen_common.statistics import Interval, paired_bootstrap_interval

BASE = "base"


@dataclass(frozen=True)
class MethodRow:
    """One competitor at one budget and guidance scale, averaged over its seeds.

    scores: means by name.  changes: differences to the base, paired by prompt.  behind: verifier accuracy of the best
    row minus that of this one, paired by prompt; None for the best row.  seeds_low, seeds_high: lowest and highest
    verifier accuracy of a seed.
    """

    name: str
    rate: float | None
    seeds: list[int]
    updates: float
    seconds: float
    failures: int
    scores: dict[str, float]
    changes: dict[str, Interval]
    seeds_low: float
    seeds_high: float
    behind: Interval | None = None


@dataclass(frozen=True)
class MiniatureResults:
    """The contents of a folder of cells."""

    settings: Settings
    calibration: dict[str, Any]
    base: dict[str, Any]
    cells: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "MiniatureResults":
        """Reads a folder.  Raises UserError if the benchmark has not evaluated its base yet."""
        files = [folder / name for name in ("settings.json", "calibration.json", "base.json")]
        if missing := [file.name for file in files if not file.exists()]:
            raise UserError(f"{folder}: no {', '.join(missing)} yet; run the benchmark without --report first")
        settings, calibration, base = map(read_json, files)
        return cls(Settings.model_validate(settings), calibration, base, read_cells(folder))

    @property
    def seconds(self) -> float:
        """Seconds of computing of all cells, of the calibration and of the base."""
        return sum(part["seconds"] for part in (self.calibration, self.base, *self.cells))

    def chosen_rates(self) -> dict[tuple[str, Budget], float]:
        """{(method, budget): the chosen learning rate}."""
        return choose_rates(self.cells, self.settings.config.guidance_scale, self.settings.rates)


def rank_methods(found: MiniatureResults, budget: Budget, scale: float) -> list[MethodRow]:
    """Rows of the base and of every competitor with a final cell, in descending order of verifier accuracy."""
    base: dict[str, list[float]] = found.base["scores"]["final"][f"{scale:g}"]
    per_prompt = {BASE: base["verifier"]}
    means = {name: float(np.mean(values)) for name, values in base.items()}
    rows = [MethodRow(BASE, None, [], 0, 0, 0, means, {}, means["verifier"], means["verifier"])]
    rates = found.chosen_rates()
    for name in COMPETITORS:
        cells = [
            cell
            for cell in found.cells
            if (cell["phase"], cell["method"], cell["budget"], cell["rate"])
            == ("final", name, budget, rates.get((name, budget)))
        ]
        if cells:
            rows.append(summarize_method(name, cells, base, f"{scale:g}"))
            per_prompt[name] = mean_over_seeds(cells, f"{scale:g}", "verifier")
    rows.sort(key=lambda row: -row.scores["verifier"])
    best = per_prompt[rows[0].name]
    return [rows[0], *(with_gap_to_best(row, per_prompt[row.name], best) for row in rows[1:])]


def mean_over_seeds(cells: Sequence[Mapping[str, Any]], scale: str, score: str) -> list[float]:
    """A score per prompt, averaged over the seeds."""
    return np.mean([cell["scores"][scale][score] for cell in cells], axis=0).tolist()


def summarize_method(
    name: str, cells: Sequence[Mapping[str, Any]], base: Mapping[str, list[float]], scale: str
) -> MethodRow:
    """The row of one competitor, from its cells, one per seed."""
    after = {score: mean_over_seeds(cells, scale, score) for score in base}
    accuracies = [float(np.mean(cell["scores"][scale]["verifier"])) for cell in cells]
    return MethodRow(
        name=name,
        rate=cells[0]["rate"],
        seeds=[cell["seed"] for cell in cells],
        updates=float(np.mean([cell["updates"] for cell in cells])),
        seconds=float(np.mean([cell["training_seconds"] for cell in cells])),
        failures=sum(cell["failure"] is not None for cell in cells),
        scores={score: float(np.mean(values)) for score, values in after.items()},
        changes={score: paired_bootstrap_interval(base[score], values) for score, values in after.items()},
        seeds_low=min(accuracies),
        seeds_high=max(accuracies),
    )


def with_gap_to_best(row: MethodRow, own: Sequence[float], best: Sequence[float]) -> MethodRow:
    """The row with its distance to the best row."""
    return MethodRow(**{**vars(row), "behind": paired_bootstrap_interval(own, best)})


# Text -----------------------------------------------------------------------------------------------------------------


def format_table(rows: Sequence[MethodRow]) -> str:
    """A table as Markdown."""
    header = ["method", "verifier %", "change", "reward", "change", "held-out", "change", "over seeds"]
    header += ["best minus this", "rate", "seeds", "updates", "seconds"]
    return markdown_table(header, [format_row(row) for row in rows])


def format_row(row: MethodRow) -> list[str]:
    """The texts of one line of a table."""
    trained = row.rate is not None
    cells = [row.name, f"{100 * row.scores['verifier']:.1f}", format_interval(row.changes.get("verifier"), 100, 1)]
    for name in ("reward", "heldout"):
        cells += [
            f"{row.scores[name]:.2f}" if name in row.scores else "-",
            format_interval(row.changes.get(name), 1, 2),
        ]
    cells += [f"{100 * row.seeds_low:.1f} to {100 * row.seeds_high:.1f}" if trained else "-"]
    cells += [format_interval(row.behind, 100, 1)]
    cells += [f"{row.rate:g}" if trained else "-", str(len(row.seeds)) if trained else "-"]
    return [*cells, f"{row.updates:.0f}", f"{row.seconds:.0f}"]


def format_interval(found: Interval | None, factor: float, digits: int) -> str:
    """`+1.2 [+0.3, +2.1]`."""
    if found is None:
        return "-"
    mean, low, high = (f"{factor * value:+.{digits}f}" for value in found)
    return f"{mean} [{low}, {high}]"


def describe_ranking(rows: Sequence[MethodRow]) -> str:
    """A summary of the ranking that claims no more than the intervals show."""
    best, rest = rows[0], rows[1:]
    equal = [row.name for row in rest if row.behind is not None and row.behind.low <= 0]
    above = [row.name for row in rows if (change := row.changes.get("verifier")) and change.low > 0]
    below = [row.name for row in rows if (change := row.changes.get("verifier")) and change.high < 0]
    lines = [f"Highest verifier accuracy: {best.name}."]
    if equal:
        lines.append(f"Not distinguishable from it on these prompts (interval contains 0): {', '.join(equal)}.")
    elif rest:
        lines.append("All others are clearly below it on these prompts.")
    for name, phrase in ((CONTROL, "the control (more pretraining)"), (BASE, "the untrained base")):
        if name in (best.name, *equal):
            lines.append(f"No method is clearly ahead of {phrase}.")
    lines.append(f"Clearly above the base: {', '.join(above) or 'none'}; clearly below: {', '.join(below) or 'none'}.")
    if diverged := [f"{row.name} ({row.failures})" for row in rows if row.failures]:
        lines.append(f"Runs that stopped at a gradient that was not finite: {', '.join(diverged)}.")
    return " ".join(lines)


def format_search(found: MiniatureResults) -> str:
    """The table of verifier accuracy on the tuning prompts by rate, with the chosen rates in bold."""
    scale, rates, chosen = found.settings.config.guidance_scale, found.settings.rates, found.chosen_rates()
    tried = {
        (cell["method"], cell["budget"], cell["rate"]): float(np.mean(cell["scores"][f"{scale:g}"]["verifier"]))
        for cell in found.cells
        if cell["phase"] == "search"
    }
    rows = []
    for name in COMPETITORS:
        for budget in BUDGETS:
            line = [f"{100 * tried[name, budget, r]:.1f}" if (name, budget, r) in tried else "-" for r in rates]
            best = chosen.get((name, budget))
            line = [f"**{cell}**" if rate == best else cell for cell, rate in zip(line, rates, strict=True)]
            if set(line) != {"-"}:
                rows.append([f"{name}, equal {budget}", *line])
    return markdown_table(["verifier % on tuning prompts", *(f"{rate:g}" for rate in rates)], rows)


def describe_edge_rates(found: MiniatureResults) -> str:
    """A sentence that names the methods whose chosen rate is the lowest or the highest candidate."""
    rates = found.settings.rates
    ends = [
        f"{name} (equal {budget})" for (name, budget), r in found.chosen_rates().items() if r in (rates[0], rates[-1])
    ]
    return f"Chosen rates at the edge of the candidates (better ones may lie outside): {', '.join(ends) or 'none'}."


def describe_setup(found: MiniatureResults) -> str:
    """The settings, the hardware, and how to read the intervals."""
    settings, config = found.settings, found.settings.config
    evaluation = config.eval
    parts = [found.calibration, found.base, *found.cells]
    hardware = sorted({part["environment"]["hardware"] for part in parts})
    software = sorted({format_versions(part["environment"]) for part in parts})
    seeds = sorted({cell["seed"] for cell in found.cells if cell["phase"] == "final"})
    weights = ", ".join(f"{ref} {digest}" for ref, digest in settings.weights.items())
    return "\n".join(
        [
            f"Batch {config.total_batch_size}, N = {config.num_inference_steps}, "
            f"trained at guidance {config.guidance_scale:g}, {'LoRA' if config.lora else 'all weights'}; "
            f"{settings.updates} updates, or "
            f"{found.calibration['budget_seconds']:.0f} s of computing; training seeds {seeds}; evaluation seed "
            f"{evaluation.seed}, {evaluation.num_prompts} prompts of {evaluation.prompts}, "
            f"{evaluation.num_inference_steps} steps.",
            f"Rates are chosen from {', '.join(f'{r:g}' for r in settings.rates)} per method and budget by verifier "
            f"accuracy on {evaluation.quick_num_prompts} prompts of {evaluation.quick_prompts} with seed "
            f"{settings.search_seed}; these prompts are not reported.",
            "Brackets: 95 % percentile bootstrap over prompts of the paired difference, after averaging over seeds. "
            "They show how much a number depends on the prompts, not on the training seeds (`over seeds`: lowest and "
            "highest accuracy of a seed). Nothing is corrected for the number of comparisons.",
            "Seconds: computing of the training alone. Equal seconds come from a number of updates that a calibration "
            "gives, so the seconds of the table differ a little. The control has no equal updates.",
            f"{'; '.join(hardware)}; one thread per process; {'; '.join(software)}; weights {weights}.",
            f"{found.seconds:.0f} s of computing in total, including search and evaluations, without loading models "
            "and without rendering the images of the control.",
        ]
    )


def rank_all(found: MiniatureResults) -> Iterator[tuple[Budget, float, list[MethodRow]]]:
    """(budget, guidance scale, rows) wherever there is a competitor."""
    for budget in BUDGETS:
        for scale in guidance_scales(found.settings.config):
            rows = rank_methods(found, budget, scale)
            if len(rows) > 1:
                yield budget, scale, rows


def build_report(found: MiniatureResults) -> tuple[str, dict[str, Any]]:
    """The report as Markdown and as data."""
    parts, data = ["# The miniature: methods side by side", describe_setup(found)], []
    scale_trained = found.settings.config.guidance_scale
    for budget, scale, rows in rank_all(found):
        kind = "as in training" if scale == scale_trained else "not as in training"
        parts += [
            f"## Equal {budget}, evaluated at guidance {scale:g} ({kind})",
            format_table(rows),
            describe_ranking(rows),
        ]
        data.append(
            {"budget": budget, "guidance": scale, "verdict": describe_ranking(rows), "rows": [asdict(r) for r in rows]}
        )
    parts += ["## The search", format_search(found), describe_edge_rates(found)]
    content = {"settings": found.settings.model_dump(mode="json"), "calibration": found.calibration, "tables": data}
    return "\n\n".join(parts) + "\n", content | {"seconds": found.seconds, "environment": found.base["environment"]}


def write_report(folder: Path, output: Path) -> str:
    """Prints the report; writes it to `output` (JSON) and as Markdown beside it."""
    text, content = build_report(MiniatureResults.read(folder))
    print(text)
    write_json(output, content)
    write_atomic(output.with_suffix(".md"), text)
    print(f"written to {output.with_suffix('.md').name} and {output.name}")
    return text
