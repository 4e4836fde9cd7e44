"""The papers' two protocols: the images of a whole prompt file at fixed seeds, and their scores, in one folder.

    config.yaml, environment.json          what the images are and what scores them; on what it ran
    data.json                              hashes of the weights that draw
    images/00012/metadata.jsonl            the prompt (for GenEval its row), as GenEval's own scorer reads it
    images/00012/samples/0003.png          its images
    scores/NAME.rank0.jsonl                a line per image, those that one process scored
    scores/NAME/answers.rank0.jsonl        what a judge said about its images, in its own words
    table.md, table.json                   the results

Every file is written whole or not at all, and is found again, so that the same command continues after a kill.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image

from flowbp.core.noise import initial_noise
from flowbp.data.edits import check_scored
from flowbp.data.embeddings import PromptEmbeddings
from flowbp.data.prompts import describe_unread_prompts
from flowbp.evaluation import vlm_judge
from flowbp.evaluation.benchmarks.geneval_shapes import find_mistakes_by_verifier
from flowbp.evaluation.benchmarks.settings import (
    GENEVAL_KINDS,
    GENEVAL_SHAPES,
    JUDGED,
    BenchmarkConfig,
    BenchmarkRequest,
    ImageId,
    JudgeConfig,
    Prompt,
    ScorerSpec,
    benchmark_config,
    check_benchmark,
    open_benchmark_folder,
    read_prompts,
    read_scores,
)
from flowbp.evaluation.evaluate import decode_finite, generate_latents
from flowbp.evaluation.sources import ModelSource
from flowbp.rewards import REWARDS, RewardConfig, load_reward
from imgen_common import hub
from imgen_common.errors import UserError
from imgen_common.files import finite_or_none, numbered_lines, write_atomic
from imgen_common.images import MAX_OWN_BYTES, decode, from_pil, save_png, to_pil
from imgen_common.judging.answers import AnswerLog, read_answers
from imgen_common.judging.cost import Cost, estimate_cost
from imgen_common.judging.questions import Question
from imgen_common.judging.runner import Judging, all_at_once
from imgen_common.run_folder.data import hash_model
from imgen_common.run_folder.folder import RunFolder

if TYPE_CHECKING:
    from flowbp.evaluation.benchmarks.detector import GenEval

T = TypeVar("T")
ScoreRows = list[dict[str, Any]]
ScoreImages = Callable[[Sequence[Image.Image], Sequence[Prompt]], ScoreRows]
"""score_images(images, prompts) -> a row for each image: its `score` (None: there is none) and what explains it."""


def image_file(folder: Path, image_id: ImageId) -> Path:
    """Where an image is kept."""
    return folder / "images" / f"{image_id[0]:05d}" / "samples" / f"{image_id[1]:04d}.png"


def load_scorer(spec: ScorerSpec, device: torch.device) -> ScoreImages:
    """The scorer with its weights."""
    if spec.kind in GENEVAL_KINDS:
        return _geneval(spec, device)
    reward = load_reward(RewardConfig(score=spec.kind, ref=spec.ref), device)

    def score(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> ScoreRows:
        with torch.no_grad():
            found = reward(from_pil(images).to(device), [prompt.text for prompt in prompts]).tolist()
        return [{"score": finite_or_none(value)} for value in found]

    return score


def _geneval(spec: ScorerSpec, device: torch.device) -> ScoreImages:
    rules = find_mistakes_by_verifier if spec.kind == GENEVAL_SHAPES else _load_geneval(spec, device)

    def score(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> ScoreRows:
        tasks = [prompt.task for prompt in prompts if prompt.task]
        found = zip(tasks, rules(images, tasks), strict=True)
        return [{"tag": task.tag, "score": float(not wrong), "mistakes": wrong} for task, wrong in found]

    return score


def _load_geneval(spec: ScorerSpec, device: torch.device) -> "GenEval":
    from flowbp.evaluation.benchmarks.detector import Detector, GenEval
    from flowbp.rewards.clip import ClipReward

    clip = ClipReward.load(hub.resolve(cast(str, spec.color_model)), device=device)
    return GenEval(Detector.load(spec.ref, device), clip)


@dataclass(frozen=True)
class Benchmark:
    """The work of one process in a folder.  on_progress(label, done, total): called after every batch."""

    source: ModelSource
    config: BenchmarkConfig
    prompts: Sequence[Prompt]
    out: Path
    batch_size: int
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    on_progress: Callable[[str, int, int], None] = lambda label, done, total: None

    def open(self, command: Sequence[str]) -> RunFolder:
        """As `open_benchmark_folder`, in one process of all."""
        hashes = self.source.hashes()
        for spec in self.config.scorers:
            models = {f"the scorer {spec.name}": spec.ref, f"the color model of {spec.name}": spec.color_model}
            for name, ref in models.items() if spec.kind not in (*JUDGED, GENEVAL_SHAPES) else ():
                hashes |= {} if ref is None else hash_model(name, ref)
        return open_benchmark_folder(self.out, self.config, command, hashes)

    @property
    def rewards(self) -> dict[str, RewardConfig]:
        """The scorers that are rewards, by name."""
        return {s.name: RewardConfig(score=s.kind, ref=s.ref) for s in self.config.scorers if s.kind in REWARDS}

    def unread_prompts(self) -> list[str]:
        """A sentence for each text encoder and reward that does not read all of the prompts."""
        return describe_unread_prompts([prompt.text for prompt in self.prompts], self.config.model, self.rewards)

    @property
    def missing_images(self) -> list[ImageId]:
        """The images that are not on disk."""
        return [image_id for image_id in self.config.image_ids if not image_file(self.out, image_id).exists()]

    def unscored_images(self, name: str) -> list[ImageId]:
        """The images without a row of this scorer."""
        done = read_scores(self.out, name)
        return [image_id for image_id in self.config.image_ids if image_id not in done]

    @torch.no_grad()
    def generate_images(self, todo: Sequence[ImageId]) -> None:
        """Generates images: number k of prompt i from noise stream (seed, "benchmark-k", i), whatever the batch."""
        if not todo:
            return
        config, backbone = self.config, self.source.load(self.device)
        embeddings = PromptEmbeddings(backbone)
        embeddings.add([self.prompts[i].text for i, _ in todo])
        backbone.unload_text_encoders()
        size = (config.model.height, config.model.width)
        for start in range(0, len(todo), self.batch_size):
            batch = todo[start : start + self.batch_size]
            cond, negative = embeddings([self.prompts[i].text for i, _ in batch])
            noise = torch.cat([initial_noise(backbone, size, config.seed, f"benchmark-{k}", [i]) for i, k in batch])
            steps, scale = config.num_inference_steps, config.guidance_scale
            latents = generate_latents(backbone, cond, negative, noise, size, steps, scale)
            for image_id, image in zip(batch, to_pil(decode_finite(backbone, latents)), strict=True):
                file, row = image_file(self.out, image_id), self.prompts[image_id[0]].row()
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(file.parent.parent / "metadata.jsonl", row + "\n")
                save_png(image, file)
            self.on_progress(f"generating images of {config.label}", start + len(batch), len(todo))

    def score_images(self, spec: ScorerSpec, todo: Sequence[ImageId]) -> None:
        """Scores images on disk; the rows of every batch are written before the next one begins."""
        if not todo:
            return
        if spec.kind in JUDGED:
            asyncio.run(self._judge_images(spec, todo))
            return
        score, size = load_scorer(spec, self.device), self.batch_size
        file = self.out / "scores" / f"{spec.name}.rank{self.rank}.jsonl"
        file.parent.mkdir(exist_ok=True)
        lines = [line for _, line in numbered_lines(file)] if file.exists() else []
        for start in range(0, len(todo), size):
            batch = todo[start : start + size]
            prompts = [self.prompts[i] for i, _ in batch]
            rows = score([decode(image_file(self.out, image_id), MAX_OWN_BYTES) for image_id in batch], prompts)
            for (i, k), prompt, row in zip(batch, prompts, rows, strict=True):
                lines.append(json.dumps({"prompt": i, "image": k, "text": prompt.text} | row))
            write_atomic(file, "\n".join(lines) + "\n")
            self.on_progress(f"scoring {spec.name}", start + len(batch), len(todo))

    def check_judge(self) -> Cost:
        """What the judge will cost for all images without a score.  Raises UserError if it will be asked, and does not
        answer."""
        specs = [spec for spec in self.config.scorers if spec.kind in JUDGED]
        todo = [(spec, i) for spec in specs for i, _ in self.unscored_images(spec.name)]
        for spec in dict.fromkeys(spec for spec, _ in todo):
            _refuse_other_judge(self.out / "scores" / spec.name, self._judge(spec).id)
        for model in dict.fromkeys(spec.ref for spec, _ in todo):
            asyncio.run(vlm_judge.check_judge(vlm_judge.check_url(self.judge.url), model, self.judge.extra))
        white = Image.new("RGB", (1, 1), "white")
        questions = (_question(spec, white, self.prompts[i]) for spec, i in todo)
        return estimate_cost(questions, self.judge.prices, self.judge.concurrency)

    def _judge(self, spec: ScorerSpec) -> vlm_judge.EndpointJudge:
        given = self.judge
        return vlm_judge.EndpointJudge(vlm_judge.check_url(given.url), spec.ref, given.extra, given.concurrency)

    async def _judge_images(self, spec: ScorerSpec, todo: Sequence[ImageId]) -> None:
        """Asks the judge about images on disk.  Raises UserError once it is not there; its answers are kept."""

        def ask(image_id: ImageId) -> list[Question]:
            return [_question(spec, decode(image_file(self.out, image_id), MAX_OWN_BYTES), self.prompts[image_id[0]])]

        judge = self._judge(spec)
        log = AnswerLog(self.out / "scores" / spec.name, f"rank{self.rank}")
        try:
            await Judging(judge, log, vlm_judge.PROMPTS, self.judge.concurrency).judge_all(
                {f"{i}/{k}": all_at_once(partial(ask, (i, k))) for i, k in todo},
                partial(self.on_progress, f"scoring {spec.name}"),
            )
        finally:
            await judge.close()


def _refuse_other_judge(answers: Path, judge: str) -> None:
    """Raises UserError if a folder has answers of another judge, or of other keys of its requests."""
    if others := sorted({answer.judge for answer in read_answers(answers)} - {judge}):
        raise UserError(
            f"{answers}: has answers of {others[0]!r}, the judge is now {judge!r}; give the same judge.extra, or add "
            "scores under another name (--score NAME:KIND=MODEL)"
        )


def _question(spec: ScorerSpec, image: Image.Image, prompt: Prompt) -> Question:
    return vlm_judge.make_question(cast(vlm_judge.Criterion, spec.kind), image, prompt.text)


def prepare_benchmark(
    source: ModelSource, request: BenchmarkRequest, out: Path, batch_size: int, judge: JudgeConfig
) -> Benchmark:
    """The benchmark of a request; nothing is written.  Raises UserError for what is wrong without loading weights."""
    prompts = read_prompts(request, source.config.data)
    texts = [prompt.text for prompt in prompts]
    config = benchmark_config(source, request, prompts)
    source.check_drawing(texts, (config.model.height, config.model.width), config.num_inference_steps)
    check_benchmark(config, judge.url)
    work = Benchmark(source, config, prompts, out, batch_size, judge)
    check_scored((reward.load("meta") for reward in work.rewards.values()), texts)
    return work


def run_benchmark(work: Benchmark, command: Sequence[str], state: PartialState) -> None:
    """Generates and scores whatever is missing in the folder; the processes of `state` share it without overlap."""

    def mine(missing: list[ImageId]) -> list[ImageId]:
        return broadcast_object_list([missing])[0][state.process_index :: state.num_processes]

    # each process has looked for the run's last checkpoint at a time of its own
    step = broadcast_object_list([work.source.step])[0]
    work = replace(work, source=replace(work.source, step=step))
    folder = run_on_all_processes(lambda: work.open(command) if state.is_main_process else None)
    try:
        run_on_all_processes(partial(work.generate_images, mine(work.missing_images)))
        for spec in work.config.scorers:
            unscored = run_on_all_processes(partial(work.unscored_images, spec.name))
            run_on_all_processes(partial(work.score_images, spec, mine(unscored)))
    finally:
        if folder is not None:
            folder.close()


def run_on_all_processes(work: Callable[[], T]) -> T:
    """The result of `work` in this process, once all have done theirs; a UserError of one is raised in all."""
    found, message = [], ""
    try:
        found.append(work())
    except UserError as error:
        message = str(error)
    if messages := [text for text in gather_object([message]) if text]:
        raise UserError(messages[0])
    return found[0]
