"""The papers' two protocols: the pictures of a whole prompt file at fixed seeds, and their scores, in one folder.

    config.yaml, environment.json            what the pictures are and what scores them; on what it ran
    pictures/00012/metadata.jsonl            the prompt (for GenEval its row), as GenEval's own scorer wants it
    pictures/00012/samples/0003.png          its pictures
    scores/NAME.rank0.jsonl                  a line per picture, those that one process scored
    table.md, table.json                     the results

Everything is written whole or not at all and found again, so the same command goes on after a kill.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image

from flowbp import backbones
from flowbp.config import ModelConfig, PositiveInt
from flowbp.data import load_prompts, numbered_lines
from flowbp.embeddings import Conditions, digest
from flowbp.evaluate import generate, initial_noise
from flowbp.evaluators import judge
from flowbp.evaluators.geneval import Task, read_tasks
from flowbp.inference import Subject
from flowbp.rewards import Kind, RewardConfig
from imgen_common import hub
from imgen_common.config import Config, to_yaml
from imgen_common.errors import UserError, nearest
from imgen_common.images import decode, from_pil, to_pil
from imgen_common.runs import CONFIG, RunFolder, write_atomic

Protocol = Literal["hpdv2", "geneval"]
IMAGES: dict[Protocol, int] = {"hpdv2": 1, "geneval": 4}
"""Pictures per prompt in the papers."""
GENEVAL = "geneval"
KINDS = (*get_args(Kind), *get_args(judge.Aspect), GENEVAL)
"""What can score a picture: rewards, the judge's two questions, GenEval's rules."""
NAME = re.compile(r"[a-z][a-z0-9_]*")
JUDGED = 32
"""Pictures whose marks are asked for and written together."""
Item = tuple[int, int]
"""Numbers of a prompt and of its picture."""
Scores = list[dict[str, Any]]
Evaluator = Callable[[Sequence[Image.Image], Sequence["Prompt"]], Scores]
"""Pictures and prompts -> a row for each: its `score`, None where there is none, and what else is to be kept."""
T = TypeVar("T")


class ScorerSpec(Config):
    """What scores the pictures."""

    name: str
    kind: str
    ref: str
    """Folder of the reward or of GenEval's detector, or the name under which the judge is served."""
    colours: str | None = None
    """GenEval's CLIP."""


class BenchmarkConfig(Config):
    """What the pictures of a benchmark folder are, and what scores them."""

    label: str
    protocol: Protocol
    model: ModelConfig
    run: str | None = None
    """The run whose trained weights drew; null: the model as it came."""
    update: int | None = None
    """The update they are of."""
    prompts: str
    content: str
    """Digest of the prompts, or of GenEval's metadata."""
    num_prompts: PositiveInt
    images: PositiveInt
    steps: PositiveInt
    guidance: float
    seed: int
    scorers: tuple[ScorerSpec, ...] = ()

    @property
    def items(self) -> list[Item]:
        """All pictures, prompt by prompt."""
        return [(prompt, image) for prompt in range(self.num_prompts) for image in range(self.images)]


MAY_DIFFER = ("prompts", "scorers")
"""Keys that may change within a folder: the digest stands for the prompts, and scorers may be added."""


@dataclass(frozen=True)
class Prompt:
    """What to draw, and for GenEval what must be in the picture."""

    text: str
    task: Task | None = None

    def row(self) -> str:
        """As a line of JSON."""
        if self.task is None:
            return json.dumps({"prompt": self.text})
        return self.task.model_dump_json(by_alias=True, exclude_defaults=True)


# --- what is asked for -----------------------------------------------------------------------------------------------


def read_prompts(protocol: Protocol, source: str, key: str, limit: int | None) -> list[Prompt]:
    """The prompts of a file.  Raises UserError as `load_prompts` and `read_tasks` do."""
    if protocol == "geneval":
        return [Prompt(task.prompt, task) for task in read_tasks(Path(source), limit)]
    return [Prompt(text) for text in load_prompts(source, key, limit)]


def parse_scorer(text: str, colours: str | None) -> ScorerSpec:
    """The scorer that `KIND=REF` or `NAME:KIND=REF` stands for."""
    left, _, ref = text.partition("=")
    name, _, kind = left.rpartition(":")
    name = name or kind
    if not ref:
        raise UserError(f"--score {text}: must be KIND=REF or NAME:KIND=REF; kinds are {', '.join(KINDS)}")
    if kind not in KINDS:
        raise UserError(f"--score {text}: unknown kind {kind!r}{nearest(kind, KINDS)}; allowed: {', '.join(KINDS)}")
    if not NAME.fullmatch(name):
        raise UserError(f"--score {text}: a name has lower-case letters, digits and underscores only, this is {name!r}")
    if kind == GENEVAL and colours is None:
        raise UserError(f"--score {text}: GenEval tells colours by a CLIP ViT-L/14; give it with --colours REF")
    return ScorerSpec(name=name, kind=kind, ref=ref, colours=colours if kind == GENEVAL else None)


def check(config: BenchmarkConfig, url: str | None) -> None:
    """Everything that can be found wrong without loading weights."""
    names = [spec.name for spec in config.scorers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--score: {', '.join(twice)} given twice; give one of them a name, NAME:KIND=REF")
    for spec in config.scorers:
        if spec.kind in get_args(judge.Aspect):
            judge.check_url(url)
        elif spec.kind != GENEVAL:
            hub.resolve(spec.ref)
        elif config.protocol != "geneval":
            raise UserError(f"--score {spec.name}: needs GenEval's metadata; give --protocol geneval")
        else:
            from flowbp.evaluators.detector import check_detector

            check_detector(spec.ref)
            hub.resolve(cast(str, spec.colours))
    hub.resolve(config.model.ref)
    backbone = backbones.skeleton(config.model.ref)
    backbones.told(backbone, config.model.ref, config.model.embedded_guidance)
    backbone.sigmas(config.steps, (config.model.height, config.model.width))
    backbone.latent_shape((config.model.height, config.model.width))


def configuration(
    one: Subject,
    protocol: Protocol,
    source: str,
    prompts: Sequence[Prompt],
    scorers: Sequence[ScorerSpec],
    **given: Any,
) -> BenchmarkConfig:
    """What is asked for as a whole; given: images, steps, guidance, seed."""
    return BenchmarkConfig(
        label=one.label,
        protocol=protocol,
        model=one.config.model,
        run=one.run.name if one.run else None,
        update=RunFolder.open(one.run, is_main=False).latest_checkpoint() if one.run else None,
        prompts=source,
        content=digest(*(prompt.row() for prompt in prompts)),
        num_prompts=len(prompts),
        scorers=tuple(scorers),
        **given,
    )


def open_folder(out: Path, config: BenchmarkConfig, command: Sequence[str]) -> RunFolder:
    """The folder, new or to go on with; scorers that it knows already stay.

    Raises UserError if it was made with other settings, or knows another scorer of one's name.
    """
    if not (out / CONFIG).is_file():
        return RunFolder.create(out, config, command)
    folder = RunFolder.open(out, config, command, may_differ=MAY_DIFFER)
    known = {spec.name: spec for spec in folder.config(BenchmarkConfig).scorers}
    for spec in config.scorers:
        if (before := known.setdefault(spec.name, spec)) != spec:
            folder.close()
            raise UserError(
                f"{out}: its scores {spec.name!r} are of {before.kind}={before.ref}, now {spec.kind}={spec.ref} was "
                f"given; give the new ones another name, NAME:{spec.kind}={spec.ref}"
            )
    write_atomic(out / CONFIG, to_yaml(config.model_copy(update={"scorers": tuple(known.values())})))
    return folder


# --- scorers ---------------------------------------------------------------------------------------------------------


def load_scorer(spec: ScorerSpec, device: torch.device, url: str | None) -> Evaluator:
    """The scorer with its weights."""
    if spec.kind in get_args(judge.Aspect):
        ask = judge.Judge(cast(judge.Aspect, spec.kind), judge.check_url(url), spec.ref)
        return lambda pictures, prompts: [
            {"score": score} | ({"answer": answer} if score is None else {})
            for score, answer in ask(pictures, [prompt.text for prompt in prompts])
        ]
    if spec.kind == GENEVAL:
        return _geneval(spec, device)
    reward = RewardConfig(score=cast(Kind, spec.kind), ref=spec.ref).load(device)

    def score(pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        with torch.no_grad():
            found = reward(from_pil(pictures).to(device), [prompt.text for prompt in prompts]).tolist()
        return [{"score": value if math.isfinite(value) else None} for value in found]

    return score


def _geneval(spec: ScorerSpec, device: torch.device) -> Evaluator:
    from flowbp.evaluators.detector import Detector, GenEval
    from flowbp.rewards.clip import ClipReward

    clip = ClipReward.load(hub.resolve(cast(str, spec.colours)), device=device)
    rules = GenEval(Detector.load(spec.ref, device), clip)

    def score(pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        tasks = [prompt.task for prompt in prompts if prompt.task]
        found = zip(tasks, rules(pictures, tasks), strict=True)
        return [{"tag": task.tag, "score": float(not wrong), "mistakes": wrong} for task, wrong in found]

    return score


# --- the work --------------------------------------------------------------------------------------------------------


def picture_file(folder: Path, item: Item) -> Path:
    """Where a picture is kept."""
    return folder / "pictures" / f"{item[0]:05d}" / "samples" / f"{item[1]:04d}.png"


def read_scores(folder: Path, name: str) -> dict[Item, dict[str, Any]]:
    """All rows of one scorer, whichever process wrote them.  Raises UserError with the line that is none."""
    found = {}
    for file in sorted((folder / "scores").glob(f"{name}.rank*.jsonl")):
        for number, line in numbered_lines(file):
            try:
                row = json.loads(line)
                found[int(row["prompt"]), int(row["image"])] = row
            except (ValueError, LookupError, TypeError):
                raise UserError(f"{file}:{number}: not a row of scores; remove the line and run again") from None
    return found


@dataclass(frozen=True)
class Benchmark:
    """What one process does in a folder; `tick` is told what is being done, how many are done, and of how many."""

    subject: Subject
    config: BenchmarkConfig
    prompts: Sequence[Prompt]
    out: Path
    batch_size: int
    url: str | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    tick: Callable[[str, int, int], None] = lambda label, done, total: None

    @property
    def undrawn(self) -> list[Item]:
        """The pictures that are not there."""
        return [item for item in self.config.items if not picture_file(self.out, item).exists()]

    def unscored(self, name: str) -> list[Item]:
        """The pictures without a row of this scorer."""
        done = read_scores(self.out, name)
        return [item for item in self.config.items if item not in done]

    @torch.no_grad()
    def draw(self, todo: Sequence[Item]) -> None:
        """Draws pictures: picture k of prompt i from noise stream (seed, "benchmark-k", i), whatever the batch."""
        if not todo:
            return
        config, backbone = self.config, self.subject.load(self.device)
        conditions = Conditions(backbone)
        conditions.add([*(self.prompts[i].text for i, _ in todo), ""])
        backbone.free_text()
        size = (config.model.height, config.model.width)
        for start in range(0, len(todo), self.batch_size):
            batch = todo[start : start + self.batch_size]
            cond, negative = conditions([self.prompts[i].text for i, _ in batch])
            noise = torch.cat([initial_noise(backbone, size, config.seed, f"benchmark-{k}", [i]) for i, k in batch])
            noise = noise.to(next(iter(cond.values())).device)
            images = generate(backbone, cond, negative, noise, size=size, steps=config.steps, guidance=config.guidance)
            for item, picture in zip(batch, to_pil(images), strict=True):
                self._save(item, picture)
            self.tick(f"drawing {config.label}", start + len(batch), len(todo))

    def _save(self, item: Item, picture: Image.Image) -> None:
        file = picture_file(self.out, item)
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent.parent / "metadata.jsonl").write_text(self.prompts[item[0]].row() + "\n", encoding="utf-8")
        fresh = file.with_name(f".{file.name}.tmp")
        picture.save(fresh, "PNG")
        fresh.replace(file)

    def score(self, spec: ScorerSpec, todo: Sequence[Item]) -> None:
        """Scores pictures that were drawn; every batch is on disk before the next begins."""
        if not todo:
            return
        evaluator = load_scorer(spec, self.device, self.url)
        size = JUDGED if spec.kind in get_args(judge.Aspect) else self.batch_size
        file = self.out / "scores" / f"{spec.name}.rank{self.rank}.jsonl"
        file.parent.mkdir(exist_ok=True)
        lines = [line for _, line in numbered_lines(file)] if file.exists() else []
        for start in range(0, len(todo), size):
            batch = todo[start : start + size]
            prompts = [self.prompts[i] for i, _ in batch]
            rows = evaluator([decode(picture_file(self.out, item)) for item in batch], prompts)
            for (i, k), prompt, row in zip(batch, prompts, rows, strict=True):
                lines.append(json.dumps({"prompt": i, "image": k, "text": prompt.text} | row))
            write_atomic(file, "\n".join(lines) + "\n")
            self.tick(f"scoring {spec.name}", start + len(batch), len(todo))


def run(work: Benchmark, command: Sequence[str], state: PartialState) -> None:
    """Draws and scores whatever is missing in the folder; the processes of `state` share it without overlap."""

    def mine(missing: list[Item]) -> list[Item]:
        return broadcast_object_list([missing])[0][state.process_index :: state.num_processes]

    folder = together(lambda: open_folder(work.out, work.config, command) if state.is_main_process else None)
    try:
        together(partial(work.draw, mine(work.undrawn)))
        for spec in work.config.scorers:
            left = together(partial(work.unscored, spec.name))
            together(partial(work.score, spec, mine(left)))
    finally:
        if folder is not None:
            folder.close()


def together(work: Callable[[], T]) -> T:
    """What `work` gives in this process, once all have done theirs; a UserError of one is raised in all."""
    found, said = [], ""
    try:
        found.append(work())
    except UserError as error:
        said = str(error)
    if wrong := [text for text in gather_object([said]) if text]:
        raise UserError(wrong[0])
    return found[0]
