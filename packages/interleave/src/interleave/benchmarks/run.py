"""One runner for all benchmarks: generate, ask the judge, aggregate; each stage alone, in parts, again after a kill.

benchmark.json            which benchmark, data, words and outputs this folder is of
generation[.2-of-8]/      a run folder of the loop, one for each part
answers[.2-of-8].jsonl    what the judge said
outputs/                  what was made, in the layout of the authors' own scorer
table.md, table.json      the figures
"""

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from imgen_common.errors import UserError, quoted
from imgen_common.files import read_json, write_atomic, writing
from imgen_common.judging.answers import AnswerLog, by_item, read_answers
from imgen_common.judging.cost import Cost, all_questions, estimate_cost
from imgen_common.judging.questions import Question
from imgen_common.judging.runner import Judging, NextQuestions
from imgen_common.run_folder.data import hash_file, hash_rows
from imgen_common.run_folder.find import CONFIG
from interleave.agents.judge import ChatModelJudge
from interleave.benchmarks.base import Benchmark, Item, Output, Prompts
from interleave.benchmarks.config import BenchmarkConfig
from interleave.benchmarks.report import BenchmarkReport, make_report, table_markdown
from interleave.datasets.rows import FinishedStory, before_and_after
from interleave.loop import run as session
from interleave.loop.requests import REQUESTS, load_requests, make_interleaved_request, make_request
from interleave.loop.shards import ALL, Shard, what_differs
from interleave.protocols import ChatModel
from interleave.records import Record, Request, Trajectory
from interleave.storage.images import IMAGES, ImageStore
from interleave.storage.trace import read_trace

FACTS, GENERATED, OUTPUTS = "benchmark.json", "generated", "outputs"
Progress = Callable[[int, int], None]
"""on_progress(done, total)."""


class BenchmarkFacts(BaseModel):
    """What the figures of a folder are of; no two of different facts can be in one folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    benchmark: str
    items: str
    """Hash of what each is given, with its images."""
    num_items: int
    prompts: str
    prompts_source: str
    is_official: bool
    outputs: str
    """Where what others made lies."""
    outputs_hash: str = ""
    """Hash of that when it was last read, by which it is known elsewhere; empty in folders of earlier versions."""


def read_facts(out: Path) -> BenchmarkFacts | None:
    """What a folder is of; None where it is of nothing yet.  Raises UserError if its file is damaged."""
    return read_json(out / FACTS, BenchmarkFacts) if (out / FACTS).exists() else None


@dataclass(frozen=True)
class BenchmarkWork:
    """A benchmark in a folder, and the part of it that this process does.

    outputs_from: a folder with what others made, in the authors' layout; None: the loop makes it.  is_miniature: the
    items are of the shapes world, whose riddles have words that its models do not know.
    """

    benchmark: Benchmark
    config: BenchmarkConfig
    items: Sequence[Item]
    prompts: Prompts
    out: Path
    shard: Shard = ALL
    outputs_from: Path | None = None
    command: Sequence[str] = field(default_factory=tuple)
    is_miniature: bool = False

    def facts(self) -> BenchmarkFacts:
        """What the folder is of."""
        named = json.dumps([[item.id, dict(item.row), *_image_hashes(item)] for item in self.items], default=str)
        return BenchmarkFacts(
            benchmark=self.benchmark.name,
            items=hashlib.sha256(named.encode()).hexdigest()[:12],
            num_items=len(self.items),
            prompts=self.prompts.hash,
            prompts_source=self.prompts.source,
            is_official=self.prompts.is_official,
            outputs=str(self.outputs_from.absolute()) if self.outputs_from else GENERATED,
            outputs_hash=_hash_outputs(self.outputs()) if self.outputs_from else "",
        )

    def open(self) -> None:
        """Creates the folder, or goes on in it.  Raises UserError if it is of something else."""
        kept, facts = read_facts(self.out), self.facts()
        # a start that failed, as without its judge, left nothing that could be mixed with figures of others
        if kept is None or not any((*self.out.glob("generation*"), *self.out.glob("answers*"))):
            with writing(self.out):
                self.out.mkdir(parents=True, exist_ok=True)
            write_atomic(self.out / FACTS, facts.model_dump_json(indent=1) + "\n")
            return
        if self.outputs_from is not None and kept.outputs != GENERATED:  # earlier versions kept it as it was given
            is_same = kept.outputs_hash == facts.outputs_hash
            place = facts.outputs if is_same else str(Path(kept.outputs).absolute())
            kept = kept.model_copy(update={"outputs": place, "outputs_hash": facts.outputs_hash})
        for name, value in kept:
            if value != getattr(facts, name):
                now = getattr(facts, name)
                differ = f"other {name} ({value!r} there, {now!r} now)"
                if name == "items":
                    differ = f"other items or images ({kept.num_items} items there, {facts.num_items} now)"
                raise UserError(
                    f"{self.out}: was begun with {differ}; figures of both cannot be mixed; give another --out"
                )
        write_atomic(self.out / FACTS, facts.model_dump_json(indent=1) + "\n")

    @property
    def generation(self) -> Path:
        """The run folder of this part."""
        return self._generation(self.shard.part)

    def generate(self, on_record: Callable[[Record], None]) -> list[Trajectory]:
        """Makes what is missing of this part's items; how all of its stories ended.  Raises UserError as `interleave
        batch`."""
        folder = self._generation(self.shard.part)
        is_new = not (folder / CONFIG).exists()
        if is_new:
            run, inputs = self.config.run, session.hash_inputs(self.config.run)
            mine = {item.id for item in self.shard.of(self.items)}
            # one without requests is just being made by another process, or was killed as it began
            begun = [part for part in sorted(self.out.glob("generation*")) if (part / REQUESTS).exists()]
            for other in begun:
                if twice := len(mine & {request.id for request in load_requests(other)}):
                    raise UserError(
                        f"{other}: has {twice} of these items already, which would be generated again; give --shard as "
                        "for the other parts, or --stage score for the figures of all of them"
                    )
                if differing := what_differs(run.model_dump(mode="json"), inputs, other):
                    raise UserError(
                        f"{other}: was made with another {differing}; give all parts the same, or another --out"
                    )
            session.create_run(folder, run, self._requests, any_words=self.is_miniature, section="run.", inputs=inputs)
        elif not (folder / REQUESTS).exists():
            raise UserError(
                f"{folder}: has no {REQUESTS} yet: another process begins it, or was killed as it began; then remove it"
            )
        elif [request.id for request in load_requests(folder)] != [item.id for item in self.shard.of(self.items)]:
            raise UserError(f"{folder}: was begun for other items; give another --out")
        return session.run_and_close(folder, self.config.run, list(self.command), on_record, is_new=is_new)

    def outputs(self) -> dict[str, Output]:
        """What was made, by item id, of all parts."""
        if self.outputs_from is not None:
            return self.benchmark.read_outputs(self.outputs_from, self.items)
        found: dict[str, Output] = {}
        for folder in sorted(self.out.glob("generation*")):
            found |= read_generated(folder)
        return {item.id: found[item.id] for item in self.items if item.id in found}

    def num_done(self) -> int:
        """How many stories of this part have ended."""
        folder = self._generation(self.shard.part)
        return sum(entry.trajectory is not None for entry in read_trace(folder).values()) if folder.exists() else 0

    def estimate(self, outputs: Mapping[str, Output], judge: ChatModel) -> Cost:
        """What the questions of this part that are not answered yet will cost; equal ones are asked once."""
        log, counted = self._log(judge), set[str]()

        def value_of(question: Question) -> Any:
            kept = log.find(question.key(judge.id))
            return question.example if kept is None else kept.value

        def missing() -> Iterator[Question]:  # one by one, since each has its images
            for next_questions in self._questions(outputs).values():
                for question in all_questions(next_questions, value_of):
                    if (key := question.key(judge.id)) not in counted and log.find(key) is None:
                        counted.add(key)
                        yield question

        return estimate_cost(missing(), self.config.prices, self.config.concurrency)

    async def score(self, outputs: Mapping[str, Output], judge: ChatModel, on_progress: Progress) -> None:
        """Asks the judge about this part's items.  Raises UserError once it is not there."""
        judging = Judging(ChatModelJudge(judge), self._log(judge), self.prompts.hash, self.config.concurrency)
        await judging.judge_all(self._questions(outputs), on_progress)

    def write_outputs(self, outputs: Mapping[str, Output]) -> None:
        """Writes what was made in the authors' layout to outputs/."""
        if self.outputs_from is None:
            self.benchmark.write_outputs(outputs, self.items, self.out / OUTPUTS)

    def write_report(self, outputs: Mapping[str, Output], differences: Sequence[str]) -> BenchmarkReport:
        """The figures of all answers about these outputs, which are written to table.md and table.json."""
        answers = by_item(answer for answer in read_answers(self.out) if answer.item in outputs)
        report = make_report(self.benchmark, self.items, outputs, answers, self.prompts, differences)
        write_atomic(self.out / "table.json", json.dumps(asdict(report), indent=1) + "\n")
        write_atomic(self.out / "table.md", table_markdown(report))
        return report

    def _log(self, judge: ChatModel) -> AnswerLog:
        """Raises UserError if the folder holds answers of another judge."""
        others = {answer.judge for answer in read_answers(self.out)} - {judge.id}
        if others:
            images = (
                "" if self.outputs_from else f", and --outputs-from {quoted(self.out / OUTPUTS)} for the same images"
            )
            raise UserError(
                f"{self.out}: holds answers of the judge {min(others)!r}, this is {judge.id!r}; figures of both "
                f"cannot be mixed; give another --out{images}"
            )
        return AnswerLog(self.out, self.shard.part)

    def _questions(self, outputs: Mapping[str, Output]) -> dict[str, NextQuestions]:
        mine = {item.id: item for item in self.shard.of(self.items) if item.id in outputs}
        return {name: partial(self._ask, item, outputs[name]) for name, item in mine.items()}

    def _ask(self, item: Item, output: Output, values: Mapping[str, Any]) -> Sequence[Any]:
        return self.benchmark.questions(item, output, self.prompts, values)

    def _generation(self, part: str) -> Path:
        return self.out / f"generation{f'.{part}' if part else ''}"

    def _requests(self, store: ImageStore) -> list[Request]:
        return [_request(item, store) for item in self.shard.of(self.items)]


def _image_hashes(item: Item) -> list[str]:
    return [hash_file(part).sha256 for part in item.content if isinstance(part, Path)]


def _hash_outputs(outputs: Mapping[str, Output]) -> str:
    parts = ((key, part) for key, output in sorted(outputs.items()) for part in output.content)
    return hash_rows(
        f"{key} {hash_file(part).sha256 if isinstance(part, Path) else part}" for key, part in parts
    ).sha256


def _request(item: Item, store: ImageStore) -> Request:
    """Images before a text, as the loop takes them; others in their places."""
    *first, last = item.content
    if isinstance(last, str) and not any(isinstance(part, str) for part in first):
        images = [part for part in first if isinstance(part, Path)]
        return make_request(last, images, store, item.id, item.category)
    return make_interleaved_request(item.content, store, item.id, item.category)


def read_generated(folder: Path) -> dict[str, Output]:
    """The stories of a run folder that have all their parts: the words of each step, then its image.

    Without a planner nobody wrote words: the only step repeats the request.
    """
    store, found = ImageStore(folder / IMAGES), {}
    for name, entry in read_trace(folder).items():
        if entry.trajectory is None or not entry.trajectory.is_whole:
            continue
        story = FinishedStory(entry.trajectory, tuple(entry.attempts.values()))
        content: list[str | Path] = []
        for step, attempt in story.shown_steps():
            content += [step.words] if step.words and entry.trajectory.planner is not None else []
            content += [store.path(before_and_after(attempt)[1])] if attempt is not None else []
        found[name] = Output(tuple(content))
    return found


def score_now(work: BenchmarkWork, outputs: Mapping[str, Output], judge: ChatModel, on_progress: Progress) -> None:
    """`BenchmarkWork.score`, from code that is not asynchronous; the judge is closed."""

    async def main() -> None:
        try:
            await work.score(outputs, judge, on_progress)
        finally:
            await judge.close()

    asyncio.run(main())
