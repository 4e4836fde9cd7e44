"""What a benchmark folder is made of: protocol, model, prompts and scorers, checked before anything is written."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast, get_args

from flowbp.config import DataConfig, ModelConfig, PositiveInt
from flowbp.core.settings import GuidanceRescale
from flowbp.data.edits import Edit, describe_row, sources_of
from flowbp.data.prompts import is_shapes_source, load_prompts
from flowbp.evaluation import vlm_judge
from flowbp.evaluation.benchmarks.geneval import GenEvalTask, read_tasks
from flowbp.evaluation.benchmarks.geneval_shapes import VERIFIER, shapes_tasks
from flowbp.evaluation.sources import ModelSource, check_guidance_scale
from flowbp.rewards import REWARDS, RewardConfig, resolve_reward
from imgen_common import hub
from imgen_common.config import NO_SECRETS, ONE_ANSWER, Config, to_yaml
from imgen_common.errors import UserError, nearest
from imgen_common.files import local_path, numbered_lines, write_atomic
from imgen_common.judging.answers import read_answers
from imgen_common.judging.cost import CostLimits
from imgen_common.run_folder.data import DataHash, extend_data, moved_models, record_data, recorded_data
from imgen_common.run_folder.find import CONFIG, check_maker
from imgen_common.run_folder.folder import RunFolder

BenchmarkProtocol = Literal["hpdv2", "geneval", "geneval_shapes"]
IMAGES_PER_PROMPT: dict[BenchmarkProtocol, int] = {"hpdv2": 1, "geneval": 4, "geneval_shapes": 4}
"""As in the papers."""
GENEVAL, GENEVAL_SHAPES = GENEVAL_KINDS = ("geneval", "geneval_shapes")
"""Kinds of scorers that have a protocol of their own, which has their name."""
JUDGED = get_args(vlm_judge.Criterion)
SCORER_NAME = re.compile(r"[a-z][a-z0-9_]*")
ImageId = tuple[int, int]
"""(number of the prompt, number of the image among those of the prompt)."""


class ScorerSpec(Config):
    """A scorer of images."""

    renamed: ClassVar = {"colours": "color_model"}

    name: str
    kind: str
    ref: str
    """Folder of the reward or of GenEval's detector, the name under which the judge is served, or the verifier."""
    color_model: str | None = None
    """The CLIP with which GenEval classifies colors."""


class JudgeConfig(CostLimits):
    """How the judge is asked, `judge.KEY` for `--set`."""

    url: str | None = None
    """Base URL of its endpoint; `--judge` sets it, too."""
    extra: Annotated[Mapping[str, Any], NO_SECRETS, ONE_ANSWER] = {}
    """Further keys of a request, as the server names them; null leaves one out (`temperature: null`), and
    `max_completion_tokens` takes the place of `max_tokens`.  All answers of a folder have the same."""
    concurrency: PositiveInt = 8
    """Images that it is asked about at once."""


class BenchmarkConfig(Config):
    """What the images of a benchmark folder are, and what scores them."""

    label: str
    protocol: BenchmarkProtocol
    model: ModelConfig
    eval_model: str | None = None
    """The model whose transformer draws instead (`eval.model`)."""
    run: str | None = None
    """The run whose trained weights are used; null: the published model."""
    update: int | None = None
    """The update of the run that they are of."""
    prompts: str
    num_prompts: PositiveInt
    images: PositiveInt
    """Images per prompt."""
    num_inference_steps: PositiveInt
    guidance_scale: float
    guidance_rescale: GuidanceRescale | None = None
    """How guidance is rescaled (`guidance.rescale`)."""
    seed: int
    content: str
    """Digest of the prompts, or of the metadata of GenEval; last, so that what changed it is named first."""
    scorers: tuple[ScorerSpec, ...] = ()

    @property
    def image_ids(self) -> list[ImageId]:
        """All images, prompt by prompt."""
        return [(prompt, image) for prompt in range(self.num_prompts) for image in range(self.images)]


@dataclass(frozen=True)
class BenchmarkRequest:
    """What is asked for.  None stands for the value of the protocol (images), or of the model or run (the others)."""

    protocol: BenchmarkProtocol
    prompts: str
    """File with prompts, or with the metadata of GenEval; `builtin:shapes/SPLIT`."""
    scorers: tuple[ScorerSpec, ...] = ()
    num_prompts: int | None = None
    """Only the first prompts; None: all of them."""
    images: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Prompt:
    """A prompt, and for GenEval what its images must show."""

    text: str
    task: GenEvalTask | None = None

    def row(self) -> str:
        """The prompt as a line of JSON."""
        if self.task is None:
            return json.dumps({"prompt": self.text})
        return self.task.model_dump_json(by_alias=True, exclude_defaults=True)


def read_prompts(request: BenchmarkRequest, data: DataConfig) -> list[Prompt]:
    """The prompts of the file.  Raises UserError as `load_prompts`, `read_tasks` and `shapes_tasks` do."""
    if request.protocol == GENEVAL_SHAPES:
        return [Prompt(task.prompt, task) for task in shapes_tasks(request.prompts, request.num_prompts)]
    if request.protocol == "geneval" and is_shapes_source(request.prompts):
        raise UserError(
            f"{request.prompts}: GenEval reads its own metadata, a .jsonl or .json; for GenEval's rules on images of "
            f"shapes give --protocol {GENEVAL_SHAPES}"
        )
    if request.protocol == "geneval":
        return [Prompt(task.prompt, task) for task in read_tasks(local_path(request.prompts), request.num_prompts)]
    found = load_prompts(request.prompts, data, request.num_prompts)
    if any(sources_of(prompt) for prompt in found):
        raise UserError(f"{request.prompts}: holds edits, which no protocol has; evaluate them with `flowbp eval`")
    return [Prompt(text) for text in found]


def parse_scorer(text: str, color_model: str | None) -> ScorerSpec:
    """The scorer that `[NAME:]KIND=REF` describes; a kind is a reward, a criterion of the judge or a GenEval."""
    kinds = (*REWARDS, *JUDGED, *GENEVAL_KINDS)
    left, _, ref = text.partition("=")
    name, _, kind = left.rpartition(":")
    name = name or kind
    if not ref:
        raise UserError(f"--score {text}: must be KIND=REF or NAME:KIND=REF; kinds are {', '.join(kinds)}")
    if kind not in kinds:
        raise UserError(f"--score {text}: unknown kind {kind!r}{nearest(kind, kinds)}; allowed: {', '.join(kinds)}")
    if not SCORER_NAME.fullmatch(name):
        raise UserError(f"--score {text}: a name has lower-case letters, digits and underscores only, this is {name!r}")
    if kind == GENEVAL_SHAPES and ref != VERIFIER:
        raise UserError(f"--score {text}: its judge is the verifier of the shapes world; give {kind}={VERIFIER}")
    if kind == GENEVAL and color_model is None:
        raise UserError(f"--score {text}: GenEval classifies colors with a CLIP ViT-L/14; give --color-model REF")
    return ScorerSpec(name=name, kind=kind, ref=ref, color_model=color_model if kind == GENEVAL else None)


def benchmark_config(source: ModelSource, request: BenchmarkRequest, prompts: Sequence[Prompt]) -> BenchmarkConfig:
    """The configuration of the folder.  Raises UserError for a guidance scale out of range."""
    scale = source.config.eval_guidance_scales[0] if request.guidance_scale is None else request.guidance_scale
    check_guidance_scale(scale)
    from flowbp.data.embeddings import digest

    # of rows that bring an answer, also that
    content = digest(
        *(one.row() for one in prompts), *(describe_row(p.text) for p in prompts if isinstance(p.text, Edit))
    )
    return BenchmarkConfig(
        label=source.label,
        protocol=request.protocol,
        model=source.config.model,
        eval_model=source.config.eval.model,
        run=source.run.name if source.run else None,
        update=source.step,
        prompts=request.prompts,
        content=content,
        num_prompts=len(prompts),
        images=request.images or IMAGES_PER_PROMPT[request.protocol],
        num_inference_steps=request.num_inference_steps or source.config.eval.num_inference_steps,
        guidance_scale=scale,
        guidance_rescale=source.config.guidance.rescale,
        seed=request.seed,
        scorers=request.scorers,
    )


def check_scorers(scorers: Sequence[ScorerSpec], protocol: BenchmarkProtocol, judge_url: str | None) -> None:
    """Raises UserError for scorers that are given twice, missing, or not for this protocol; torch is not needed."""
    names = [spec.name for spec in scorers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"--score: {', '.join(twice)} given twice; give one of them a name, NAME:KIND=REF")
    for spec in scorers:
        if spec.kind in JUDGED:
            vlm_judge.check_url(judge_url)
        elif spec.kind in GENEVAL_KINDS and spec.kind != protocol:
            raise UserError(f"--score {spec.name}: needs what images must show; give --protocol {spec.kind}")
        elif spec.kind not in GENEVAL_KINDS:
            resolve_reward(RewardConfig(score=spec.kind, ref=spec.ref))
        elif spec.kind == GENEVAL:
            hub.resolve(spec.ref)
            hub.resolve(cast(str, spec.color_model))


def check_request(request: BenchmarkRequest, out: Path, source: ModelSource, judge_url: str | None) -> None:
    """Raises UserError for what can be found wrong before torch is imported."""
    if request.guidance_scale is not None:
        check_guidance_scale(request.guidance_scale)
    if (out / CONFIG).is_file():
        check_maker(out, "flowbp benchmark")
    check_scorers(request.scorers, request.protocol, judge_url)
    read_prompts(request, source.config.data)
    source.check()


def check_benchmark(config: BenchmarkConfig, judge_url: str | None) -> None:
    """Raises UserError for what can be found wrong with the scorers without loading weights."""
    check_scorers(config.scorers, config.protocol, judge_url)
    for spec in config.scorers:
        if spec.kind == GENEVAL:
            from flowbp.evaluation.benchmarks.detector import check_detector

            check_detector(spec.ref)


def open_benchmark_folder(
    out: Path, config: BenchmarkConfig, command: Sequence[str], hashes: Mapping[str, DataHash]
) -> RunFolder:
    """The folder, made or opened to continue in it; scorers that it has already stay.  hashes: of the models.

    Raises UserError if it was made with other settings or weights, or has another scorer of the same name.
    """
    if not (out / CONFIG).is_file():
        folder = RunFolder.create(out, config, command)
        record_data(out, hashes)
        return folder
    # the digest stands for the prompts, and scorers may be added; hashes say whether a model is the same elsewhere
    moved = moved_models(out, config, {"model.ref": "model.ref", "eval_model": "eval.model"})
    label = ["label"] if "model.ref" in moved and config.run is None else []  # which is then that place
    folder = RunFolder.open(out, config, command, may_differ=("prompts", "scorers", *moved, *label))
    try:
        known = {spec.name: spec for spec in folder.config(BenchmarkConfig).scorers}
        for spec in config.scorers:
            before, recorded = known.setdefault(spec.name, spec), recorded_data(out)
            ends = f"the scorer {spec.name}", f"the color model of {spec.name}"
            of_it = {key: hashed for key, hashed in hashes.items() if key.endswith(ends)}
            is_same = before.kind == spec.kind and of_it and of_it.items() <= recorded.items()
            if before != spec and not is_same:
                raise UserError(
                    f"{out}: its scores {spec.name!r} are of {before.kind}={before.ref}, now {spec.kind}={spec.ref} "
                    f"was given; give the new ones another name, NAME:{spec.kind}={spec.ref}"
                )
        extend_data(out, hashes)
        write_atomic(out / CONFIG, to_yaml(config.model_copy(update={"scorers": tuple(known.values())})))
    except BaseException:
        folder.close()
        raise
    return folder


def read_scores(folder: Path, name: str) -> dict[ImageId, dict[str, Any]]:
    """All rows of one scorer, whichever process wrote them: its lines, or the final answers of a judge.

    Raises UserError naming a line that is not a row.
    """
    found = {}
    for file in sorted((folder / "scores").glob(f"{name}.rank*.jsonl")):
        for number, line in numbered_lines(file):
            try:
                row = json.loads(line)
                found[int(row["prompt"]), int(row["image"])] = row
            except (ValueError, LookupError, TypeError):
                raise UserError(f"{file}:{number}: not a row of scores; remove the line and run again") from None
    for answer in read_answers(folder / "scores" / name):
        if answer.is_final:
            prompt, image = map(int, answer.item.split("/"))
            found[prompt, image] = {"prompt": prompt, "image": image, "score": answer.value}
    return found
