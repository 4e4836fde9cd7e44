"""The tables of `benchmarks.quality.miniature`, from the cells that are there."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import versions, write_json
from benchmarks.quality.miniature_cells import (
    BUDGETS,
    COMPETITORS,
    CONTROL,
    Budget,
    Settings,
    chosen_rates,
    read,
    read_cells,
    scales_of,
)
from imgen_common.console import markdown_table
from imgen_common.errors import UserError
from imgen_common.files import write_atomic
from imgen_common.statistics import Interval, paired_bootstrap_interval

BASE = "base"


@dataclass(frozen=True)
class Row:
    """One competitor at one budget and guidance scale, averaged over its seeds.

    scores: mean by name.  changes: minus the base, paired by prompt.  behind: how much the best row's verifier lies
    above this one's, paired by prompt; None for the best itself.  seeds_low, seeds_high: least and greatest verifier
    accuracy of a seed.
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
class Found:
    """Everything in a folder."""

    settings: Settings
    calibration: dict[str, Any]
    base: dict[str, Any]
    cells: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Found":
        """Raises UserError if the benchmark has not got as far as its base."""
        files = [folder / name for name in ("settings.json", "calibration.json", "base.json")]
        if missing := [file.name for file in files if not file.exists()]:
            raise UserError(f"{folder}: no {', '.join(missing)} yet; run the benchmark without --report first")
        settings, calibration, base = map(read, files)
        return cls(Settings.model_validate(settings), calibration, base, read_cells(folder))

    @property
    def seconds(self) -> float:
        """Seconds of computing of everything that is kept here."""
        return sum(part["seconds"] for part in (self.calibration, self.base, *self.cells))

    def rates(self) -> dict[tuple[str, Budget], float]:
        """Chosen learning rates."""
        return chosen_rates(self.cells, self.settings.config.guidance_scale, self.settings.rates)


def rows_of(found: Found, budget: Budget, scale: float) -> list[Row]:
    """The base and every competitor that has a final cell, by verifier accuracy, the best first."""
    base: dict[str, list[float]] = found.base["scores"]["final"][f"{scale:g}"]
    per_prompt = {BASE: base["verifier"]}
    means = {name: float(np.mean(values)) for name, values in base.items()}
    rows = [Row(BASE, None, [], 0, 0, 0, means, {}, means["verifier"], means["verifier"])]
    rates = found.rates()
    for name in COMPETITORS:
        cells = [
            cell
            for cell in found.cells
            if (cell["phase"], cell["method"], cell["budget"], cell["rate"])
            == ("final", name, budget, rates.get((name, budget)))
        ]
        if cells:
            rows.append(row_of(name, cells, base, f"{scale:g}"))
            per_prompt[name] = over_seeds(cells, f"{scale:g}", "verifier")
    rows.sort(key=lambda row: -row.scores["verifier"])
    best = per_prompt[rows[0].name]
    return [rows[0], *(with_distance(row, per_prompt[row.name], best) for row in rows[1:])]


def over_seeds(cells: Sequence[Mapping[str, Any]], scale: str, score: str) -> list[float]:
    """A score per prompt, averaged over the seeds."""
    return np.mean([cell["scores"][scale][score] for cell in cells], axis=0).tolist()


def row_of(name: str, cells: Sequence[Mapping[str, Any]], base: Mapping[str, list[float]], scale: str) -> Row:
    """One competitor's cells, one per seed."""
    after = {score: over_seeds(cells, scale, score) for score in base}
    accuracies = [float(np.mean(cell["scores"][scale]["verifier"])) for cell in cells]
    return Row(
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


def with_distance(row: Row, own: Sequence[float], best: Sequence[float]) -> Row:
    """The row with its distance to the best."""
    return Row(**{**vars(row), "behind": paired_bootstrap_interval(own, best)})


# Words ----------------------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row]) -> str:
    """One table."""
    header = ["method", "rate", "seeds", "updates", "seconds", "verifier %", "change", "over seeds", "best less this"]
    header += ["reward", "change", "held-out", "change"]
    return markdown_table(header, [cells_of(row) for row in rows])


def cells_of(row: Row) -> list[str]:
    """One line of a table."""
    trained = row.rate is not None
    start = [row.name, f"{row.rate:g}" if trained else "-", str(len(row.seeds)) if trained else "-"]
    start += [f"{row.updates:.0f}", f"{row.seconds:.0f}", f"{100 * row.scores['verifier']:.1f}"]
    start += [spread(row.changes.get("verifier"), 100, 1)]
    start += [f"{100 * row.seeds_low:.1f} to {100 * row.seeds_high:.1f}" if trained else "-"]
    start += [spread(row.behind, 100, 1)]
    for name in ("reward", "heldout"):
        start += [f"{row.scores[name]:.2f}" if name in row.scores else "-", spread(row.changes.get(name), 1, 2)]
    return start


def spread(found: Interval | None, factor: float, digits: int) -> str:
    """`+1.2 [+0.3, +2.1]`."""
    if found is None:
        return "-"
    mean, low, high = (f"{factor * value:+.{digits}f}" for value in found)
    return f"{mean} [{low}, {high}]"


def verdict(rows: Sequence[Row]) -> str:
    """What the intervals allow to say about the ranking, and what they do not."""
    best, rest = rows[0], rows[1:]
    equal = [row.name for row in rest if row.behind is not None and row.behind.low <= 0]
    above = [row.name for row in rows if (change := row.changes.get("verifier")) and change.low > 0]
    below = [row.name for row in rows if (change := row.changes.get("verifier")) and change.high < 0]
    lines = [f"Highest verifier accuracy: {best.name}."]
    if equal:
        lines.append(f"As good, as far as these prompts can tell (interval contains 0): {', '.join(equal)}.")
    elif rest:
        lines.append("All others lie clearly below it on these prompts.")
    for name, phrase in ((CONTROL, "the control (more pretraining)"), (BASE, "the untouched base")):
        if name in (best.name, *equal):
            lines.append(f"No method is clearly ahead of {phrase}.")
    lines.append(f"Clearly above the base: {', '.join(above) or 'none'}; clearly below: {', '.join(below) or 'none'}.")
    if diverged := [f"{row.name} ({row.failures})" for row in rows if row.failures]:
        lines.append(f"Runs that met a gradient that was not finite and stopped there: {', '.join(diverged)}.")
    return " ".join(lines)


def search_table(found: Found) -> str:
    """Verifier accuracy on the tuning prompts by rate; the chosen ones in bold."""
    scale, rates, chosen = found.settings.config.guidance_scale, found.settings.rates, found.rates()
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


def edges(found: Found) -> str:
    """Whose chosen rate is the least or the greatest candidate, so that a better one may lie outside."""
    rates = found.settings.rates
    ends = [f"{name} (equal {budget})" for (name, budget), r in found.rates().items() if r in (rates[0], rates[-1])]
    return f"Chosen at the edge of the candidates, so perhaps not at their best: {', '.join(ends) or 'none'}."


def preamble(found: Found) -> str:
    """What was run, on what, and how the intervals are to be read."""
    settings, config = found.settings, found.settings.config
    evaluation = config.eval
    parts = [found.calibration, found.base, *found.cells]
    hardware = sorted({part["environment"]["hardware"] for part in parts})
    software = sorted({versions(part["environment"]) for part in parts})
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
            f"Rates from {', '.join(f'{r:g}' for r in settings.rates)}, chosen per method and budget by verifier "
            f"accuracy on {evaluation.quick_num_prompts} prompts of {evaluation.quick_prompts} with seed "
            f"{settings.search_seed}; these prompts are not reported.",
            "Brackets: 95 % percentile bootstrap over prompts of the paired difference, scores averaged over seeds "
            "first: they say how far other prompts would move a number, not how far other training seeds would "
            "(`over seeds`: least and greatest accuracy of a seed). Nothing is corrected for the number of "
            "comparisons.",
            "Seconds: computing of the training alone; equal seconds are made by choosing the number of updates from "
            "a calibration, so the seconds of the table differ a little. The control has no equal updates.",
            f"{'; '.join(hardware)}; one thread a process; {'; '.join(software)}; weights {weights}.",
            f"{found.seconds:.0f} s of computing in all, search and evaluations included; loading of models and the "
            "drawing of the control's pictures are not.",
        ]
    )


def tables(found: Found) -> Iterator[tuple[Budget, float, list[Row]]]:
    """Every budget and guidance scale that has a competitor."""
    for budget in BUDGETS:
        for scale in scales_of(found.settings.config):
            rows = rows_of(found, budget, scale)
            if len(rows) > 1:
                yield budget, scale, rows


def assemble(found: Found) -> tuple[str, dict[str, Any]]:
    """The report as Markdown and as data."""
    parts, data = ["# The miniature: methods side by side", preamble(found)], []
    scale_trained = found.settings.config.guidance_scale
    for budget, scale, rows in tables(found):
        kind = "the training's" if scale == scale_trained else "not the training's"
        parts += [f"## Equal {budget}, evaluated at guidance {scale:g} ({kind})", markdown(rows), verdict(rows)]
        data.append({"budget": budget, "guidance": scale, "verdict": verdict(rows), "rows": [asdict(r) for r in rows]})
    parts += ["## The search", search_table(found), edges(found)]
    content = {"settings": found.settings.model_dump(mode="json"), "calibration": found.calibration, "tables": data}
    return "\n\n".join(parts) + "\n", content | {"seconds": found.seconds, "environment": found.base["environment"]}


def write_report(folder: Path, output: Path) -> str:
    """Prints the report and writes it to `output` (JSON) and, as Markdown, beside it."""
    text, content = assemble(Found.read(folder))
    print(text)
    write_json(output, content)
    write_atomic(output.with_suffix(".md"), text)
    print(f"written to {output.with_suffix('.md').name} and {output.name}")
    return text
