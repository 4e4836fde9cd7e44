"""One self-contained HTML page about a set: what is in it, what was left out, and some rows with their pictures."""

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from imgen_common.files import write_atomic
from imgen_common.page import document, fold, section, table, text
from interleave.agents.parsing import parse_plan, parse_verdict
from interleave.datasets.check import FILES, files_of, info_of, row_of
from interleave.datasets.filters import SetInfo, SetName
from interleave.datasets.rows import RlRow, SftRow
from interleave.pages.images import Shots
from interleave.pages.story import STYLE as STORY_STYLE
from interleave.pages.words import short
from interleave.records import Plan, Verdict
from interleave.storage.images import IMAGES, ImageStore

PAGE = "statistics.html"
SHOWN = 6
"""Rows of each file that are shown."""
BINS = 10


@dataclass
class Seen:
    """What is counted of one file's rows.

    words: lengths of prompt and answer.  steps: pictures or texts per plan.  scores: (sc, pq, success).
    """

    rows: int = 0
    words: list[tuple[int, int]] = field(default_factory=list)
    pictures: Counter[int] = field(default_factory=Counter)
    steps: Counter[int] = field(default_factory=Counter)
    verdicts: Counter[bool] = field(default_factory=Counter)
    scores: list[tuple[float, float, bool]] = field(default_factory=list)
    unreadable: int = 0
    examples: list[tuple[int, SftRow | RlRow]] = field(default_factory=list)

    def add(self, row: SftRow | RlRow, name: SetName, is_example: bool) -> None:
        """One more row."""
        self.rows += 1
        if is_example:
            self.examples.append((self.rows, row))
        if isinstance(row, RlRow):
            marks = row.evaluation
            self.verdicts[marks.success] += 1
            self.scores.append((marks.semantics, marks.quality, marks.success))
            self.words.append((len(row.original_prompt.split()), len(row.prompt_used.split())))
            return
        self.words.append((sum(len(part.split()) for part in row.texts), len(row.completion.split())))
        self.pictures[len(row.image_ids)] += 1
        answer = parse_plan(row.completion, "tolerant") if name == "planner_sft" else _verdict(row)
        match answer:
            case Plan():
                self.steps[len(answer.steps)] += 1
            case Verdict():
                self.verdicts[answer.success] += 1
            case _:
                self.unreadable += 1


def _verdict(row: SftRow) -> Verdict | None:
    answer = parse_verdict(row.completion, "tolerant")
    return answer if isinstance(answer, Verdict) else None


def write_page(folder: Path) -> Path:
    """Write the page of the set in `folder` anew; its path.  Raises UserError if there is no set."""
    page = folder / PAGE
    write_atomic(page, render(folder))
    return page


def render(folder: Path) -> str:
    """The page.  Rows that cannot be read are left to `data check`."""
    seen = {file.name: _read(file) for file in files_of(folder)}
    ids = [image_id for one in seen.values() for _, row in one.examples for image_id in _ids(row)]
    shots = Shots(ids, ImageStore(folder / IMAGES).get)
    info = info_of(folder)
    body = [
        _headline(folder, seen, info),
        _rows(seen),
        *(_told(info) if info else []),
        _lengths(seen),
        _scores(seen),
        *(_examples(name, one, shots) for name, one in seen.items()),
    ]
    return document(f"{folder.resolve().name}: training sets", STORY_STYLE + STYLE, body)


def _read(file: Path) -> Seen:
    """Rows shown are spread evenly over the file."""
    name, _ = FILES[file.name]
    with file.open("rb") as lines:
        total = sum(1 for _ in lines)
    wanted = {total * i // SHOWN for i in range(SHOWN)}
    seen = Seen()
    with file.open("rb") as lines:
        for number, line in enumerate(lines):
            try:
                seen.add(row_of(line, name), name, number in wanted)
            except ValueError:
                seen.unreadable += 1
    return seen


def _ids(row: SftRow | RlRow) -> tuple[str, ...]:
    return row.image_ids if isinstance(row, SftRow) else (row.before_id, row.after_id)


# --- numbers ---------------------------------------------------------------------------------------------------------


def _headline(folder: Path, seen: Mapping[str, Seen], info: SetInfo | None) -> str:
    facts = [f"{sum(one.rows for one in seen.values())} rows in {len(seen)} files"]
    if info is not None:
        facts += [f"{sum(info.trajectories.values())} trajectories"] if info.trajectories else []
        facts += [f"judge: {info.judge}"] if info.judge else []
        facts += [f"source: {info.source}"]
    warn = "" if info else '<p class="warn">set.json is missing: the set was not finished.</p>'
    notes = "".join(f'<p class="warn">{text(note)}</p>' for note in (info.notes if info else ()))
    return f"<header><h1>{text(folder.resolve().name)}</h1><p class=facts>{text(' · '.join(facts))}</p></header>" + (
        warn + notes
    )


def _rows(seen: Mapping[str, Seen]) -> str:
    rows = [
        (
            text(name),
            str(one.rows),
            *((str(one.verdicts[True]), str(one.verdicts[False])) if one.verdicts else ("", "")),
            _counts(one.steps),
            _counts(one.pictures),
            str(one.unreadable or ""),
        )
        for name, one in seen.items()
    ]
    head = ("file", "rows", "success", "failure", "steps of the plan", "pictures in the prompt", "unreadable")
    return section("Rows", "Steps and pictures: how many rows have so many.", table(head, rows, (1, 2, 3, 6)))


def _counts(counter: Mapping[int, int]) -> str:
    return text(", ".join(f"{key}: {counter[key]}" for key in sorted(counter)))


def _told(info: SetInfo) -> Iterator[str]:
    """What the build says of itself."""
    if info.filters:
        filters = [
            (
                *map(text, (one.filter, one.of, "" if one.setting is None else str(one.setting))),
                str(one.given),
                str(one.dropped),
            )
            for one in info.filters
        ]
        head = ("filter", "of", "setting", "given", "dropped")
        yield section("Filters", "In the order in which they were applied.", table(head, filters, (3, 4)))
    if info.trajectories:
        ends = [("trajectories", text(end), str(n)) for end, n in info.trajectories.items()]
        ends += [("attempts", text(end), str(n)) for end, n in info.attempts.items()]
        ends += [("images", "scored", str(info.scored))]
        ends += [("images", text(f"judge failed: {kind}"), str(n)) for kind, n in info.unscored.items()]
        made = f"Planners: {', '.join(info.planners) or 'none'}. Generators: {', '.join(info.generators) or 'none'}."
        yield section("Trajectories", text(made), table(("", "", ""), ends, (2,)))
    if info.categories:
        most = max(sum(one.values()) for one in info.categories.values())
        rows = [
            (
                text(name or "(none)"),
                str(sum(one.values())),
                _bar(one.get("complete", 0), one.get("ended early", 0), most),
            )
            for name, one in info.categories.items()
        ]
        note = '<span class="good">complete</span> and <span class="bad">ended early</span>'
        yield section("Categories", note, table(("category", "requests", ""), rows, (1,)))


def _lengths(seen: Mapping[str, Seen]) -> str:
    rows = [
        (text(name), what, *_spread([pair[i] for pair in one.words]))
        for name, one in seen.items()
        for i, what in enumerate(
            ("instruction", "rewritten prompt") if name.startswith("critic_rl") else ("prompt", "answer")
        )
        if one.words
    ]
    head = ("file", "words of", "least", "median", "95 %", "most")
    return section("Lengths", "In words, pictures not counted.", table(head, rows, (2, 3, 4, 5)))


def _spread(values: Sequence[int]) -> tuple[str, ...]:
    ordered = sorted(values)
    at = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return str(ordered[0]), f"{statistics.median(ordered):g}", str(at), str(ordered[-1])


def _scores(seen: Mapping[str, Seen]) -> str:
    scores = [marks for one in seen.values() for marks in one.scores]
    if not scores:
        return ""
    binned = [[Counter((min(int(marks[i]), BINS - 1), marks[2]) for marks in scores)] for i in range(2)]
    most = max(count for both in binned for counter in both for count in _per_bin(counter))
    rows = [
        (f"{low} to {low + 1}", *(_bar(b[0][low, True], b[0][low, False], most) for b in binned)) for low in range(BINS)
    ]
    note = (
        'Rows of critic_rl by the judge\'s marks; <span class="good">success</span> and '
        '<span class="bad">failure</span> as the critic said.'
    )
    return section("Scores", note, table(("mark", "semantics", "quality"), rows))


def _per_bin(counter: Mapping[tuple[int, bool], int]) -> list[int]:
    return [counter.get((low, True), 0) + counter.get((low, False), 0) for low in range(BINS)]


def _bar(good: int, bad: int, most: int) -> str:
    """Two lengths one after the other, with their numbers."""
    parts = "".join(
        f'<i class="{look}" style="width:{100 * count / most:.2f}%"></i>'
        for look, count in (("good", good), ("bad", bad))
        if count
    )
    told = f"{good} + {bad}" if good or bad else ""
    return f'<span class="bar" role="img" aria-label="{told}">{parts}</span> <small>{told}</small>'


# --- rows ------------------------------------------------------------------------------------------------------------


def _examples(name: str, seen: Seen, shots: Shots) -> str:
    shown = "".join(_example(number, row, shots) for number, row in seen.examples)
    return section(name, f"{len(seen.examples)} of {seen.rows} rows, spread evenly.", shown)


def _example(number: int, row: SftRow | RlRow, shots: Shots) -> str:
    pictures = "".join(shots.show(image_id, f"picture {i}") for i, image_id in enumerate(_ids(row), 1))
    given = f'<div class="seen">{pictures}</div>' if pictures else ""
    if isinstance(row, RlRow):
        marks = row.evaluation
        facts = f"success: {str(marks.success).lower()} · semantics {marks.semantics:g} · quality {marks.quality:g}"
        used = row.prompt_used or row.original_prompt
        said = f"<p>{text(row.original_prompt)}</p>" + (
            f"<p class=note>drawn with: {text(used)}</p>" if used != row.original_prompt else ""
        )
        return f'<div class="row"><h3>{number}</h3>{given}{said}<p class=facts>{text(facts)}</p></div>'
    prompt = "\n[picture]\n".join(row.texts).strip()
    answer = f'<p class="answer" dir="auto">{text(short(row.completion, 700))}</p>'
    return f'<div class="row"><h3>{number}</h3>{given}{answer}{fold("prompt", _pre(prompt))}</div>'


def _pre(value: str) -> str:
    return f'<pre dir="auto">{text(value)}</pre>'


STYLE = """
.bar { display: inline-flex; width: 14rem; height: .8rem; background: var(--card); border-radius: 3px; overflow: hidden;
  vertical-align: middle; }
.bar i { display: block; height: 100%; } i.good { background: var(--green); } i.bad { background: var(--orange); }
span.good { color: var(--green); } span.bad { color: var(--orange); }
.row { border-left: 2px solid var(--line); padding: .1rem 0 .1rem 1.1rem; margin: 1rem 0 1.4rem; break-inside: avoid; }
.seen { display: flex; flex-wrap: wrap; gap: .6rem; margin: .4rem 0; } .seen .shot { width: 9rem;
  box-shadow: 0 0 0 1px var(--line); }
.answer { white-space: pre-wrap; overflow-wrap: anywhere; } .row pre { white-space: pre-wrap; overflow-wrap: anywhere; }
"""
