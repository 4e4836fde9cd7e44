"""From what a command was given to the work: data, words, judge and folder, checked before anything is made."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from imgen_common.config import Config, load
from imgen_common.errors import UserError
from imgen_common.judging.agreement import Agreement, compare_judges, differently_shown
from imgen_common.judging.answers import read_answers
from interleave.benchmarks.base import Item, OfficialJudge
from interleave.benchmarks.config import BenchmarkConfig, ShapesJudgeConfig
from interleave.benchmarks.registry import BENCHMARKS
from interleave.benchmarks.run import BenchmarkWork, read_facts
from interleave.loop.config import RunConfig
from interleave.loop.shards import Shard
from interleave.models.chat.endpoint import EndpointChat, EndpointChatConfig
from interleave.models.hashes import check_models
from interleave.protocols import HashedImage, SystemText

BUILTIN = "builtin:shapes"
RUN = "run."
"""How a setting of the loop begins in a benchmark's configuration."""


@dataclass(frozen=True)
class BenchmarkRequest:
    """What a command was given.

    data: `builtin:shapes`, or the path of the official data.  prompts_from: a copy of the authors' repository.
    outputs_from: what others made.  limit: first items only.  shard: as `Shard.parse` takes it.
    """

    name: str
    data: str
    out: Path
    prompts_from: Path | None = None
    outputs_from: Path | None = None
    limit: int | None = None
    shard: str = "1/1"


def load_config(configs: Sequence[Path], run_configs: Sequence[Path], sets: Sequence[str]) -> BenchmarkConfig:
    """The configuration of files and `KEY=VALUE`; run_configs: recipes of `interleave batch` for its key `run`.

    Raises UserError as `imgen_common.config.load`, and where both kinds of files set `run`.
    """
    if not run_configs:
        return load(BenchmarkConfig, configs, sets)
    of_run = [text.removeprefix(RUN) for text in sets if text.startswith(RUN)]
    config = load(BenchmarkConfig, configs, [text for text in sets if not text.startswith(RUN)])
    if "run" in config.model_fields_set:
        raise UserError("--run-config: `run` is set beside it, and one would be lost; write all of it in one of them")
    return config.model_copy(update={"run": load(RunConfig, run_configs, of_run)})


def prepare(
    request: BenchmarkRequest, config: BenchmarkConfig, command: Sequence[str]
) -> tuple[BenchmarkWork, list[str]]:
    """The work, and why its figures cannot be compared with published ones.

    Raises UserError for what is wrong without a model that makes images.
    """
    benchmark, differences = BENCHMARKS[request.name], []
    if (kept := read_facts(request.out)) is not None and kept.benchmark != benchmark.name:
        raise UserError(f"{request.out}: is of the benchmark {kept.benchmark}; give another --out")
    shard = Shard.parse(request.shard)
    prompts = benchmark.read_prompts(request.prompts_from)
    if request.data == BUILTIN:
        from interleave.benchmarks.shapes import data as miniature  # imports torch

        differences.append("the data are the miniature's")
        items = benchmark.load(miniature.write_data(request.name, request.out / "data"))
        items = spread(items, min(request.limit or miniature.COUNT, len(items)))
    else:
        items = benchmark.load(Path(request.data))
        if request.limit is not None and request.limit < len(items):
            differences.append(f"only {request.limit} of {len(items)} items are used")
            items = spread(items, request.limit)
    shard.of(items)  # refuses more parts than items
    if not prompts.is_official:
        remedy = "give --prompts-from a copy of the authors' repository, if they have one"
        differences.append(f"the judge's questions are in our own words; {remedy}")
    differences += judge_differences(config.judge, benchmark.judge)
    parts = benchmark, config, items, prompts, request.out, shard, request.outputs_from, tuple(command)
    work = BenchmarkWork(*parts, is_miniature=request.data == BUILTIN)
    work.open()
    return work, differences


def judge_differences(config: Config, official: OfficialJudge) -> list[str]:
    """How a judge differs from that of published figures: its model, or the settings of its requests."""
    if not isinstance(config, EndpointChatConfig) or config.model.rpartition("/")[2] != official.model:
        given = config.model if isinstance(config, EndpointChatConfig) else f"of the kind {getattr(config, 'kind', '')}"
        return [f"the judge is {given}, published figures are of {official.model}"]
    limit = config.extra.get("max_completion_tokens", config.max_new_tokens)
    settings = {name: getattr(config, name) for name in ("temperature", "top_p", "image_detail")}
    sent = {**settings, "max_tokens": limit, **config.extra}
    expected = {**dict.fromkeys(settings), **official.settings}
    if expected["temperature"] == 0:  # the most probable answer, whatever its share
        del expected["top_p"]
    return [
        f"the judge's {name} is {sent.get(name)}, that of published figures {'unset' if value is None else value}"
        for name, value in expected.items()
        if sent.get(name) != value
    ]


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` items at equal distances, so that all categories have theirs, whose items stand together."""
    return [items[number * len(items) // count] for number in range(count)]


def compare_folders(first: Path, second: Path) -> list[Agreement]:
    """How far the judges of two folders agree.  Raises UserError if they are of other items, words or outputs."""
    left, right = read_facts(first), read_facts(second)
    if left is None or right is None:
        raise UserError(f"{first if left is None else second}: not a folder of `interleave benchmark`; give one")
    remedies = {
        "benchmark": f"{left.benchmark} and {right.benchmark}",
        "items": "give both the same --data and --limit",
        "prompts": "give both the same questions (--prompts-from)",
    }
    for name, remedy in remedies.items():
        if getattr(left, name) != getattr(right, name):
            what = {"benchmark": "benchmarks"}.get(name, name)
            raise UserError(
                f"{first} and {second}: their {what} differ; two judges are compared on the same questions ({remedy})"
            )
    answers = read_answers(first), read_answers(second)
    if others := differently_shown(*answers):
        raise UserError(
            f"{first} and {second}: their judges saw different outputs of {len(others)} items, such as {others[0]!r}; "
            "give the outputs/ of one as --outputs-from of the other"
        )
    found = compare_judges(*answers)
    if not found:
        raise UserError(f"{first} and {second}: have no question in common that both judges answered")
    return found


def check_judge(config: Config, official: OfficialJudge, *, is_miniature: bool = True) -> None:
    """Asks an endpoint once, as the run will ask it.  Raises UserError if it does not answer, for a model that is not
    there, and for the miniature's judge, which is the default, of other items than its own."""
    check_models({"judge": config})
    if isinstance(config, ShapesJudgeConfig) and not is_miniature:
        raise UserError(
            "judge.kind: shapes, the default, knows the miniature's items alone; give a CONFIG with a judge, such as "
            "configs/interleave/benchmark_*.yaml"
        )
    system = [SystemText("Answer in one word.")] * official.has_system
    images = [HashedImage.white(32, 32)] * (2 if official.sees_several else 1)
    if not isinstance(config, EndpointChatConfig):
        return

    async def check(judge: EndpointChat) -> None:
        try:
            await judge.check((*system, *images, "Say yes."))
        finally:
            await judge.close()

    asyncio.run(check(config.build()))
