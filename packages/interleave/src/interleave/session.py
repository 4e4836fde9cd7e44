"""A run of the loop in its folder: parts made from a configuration, records, pictures, and the way to go on.

config.yaml  environment.json  requests.jsonl     trace.jsonl (plans, attempts, trajectories)     pictures/
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from importlib import metadata
from pathlib import Path

from imgen_common.errors import UserError
from imgen_common.libraries import quiet_libraries
from imgen_common.runs import RunFolder, free_path
from interleave import chat, generators, judging
from interleave import requests as request_files
from interleave.agents import ChatCritic, ChatPlanner
from interleave.config import (
    ModelCritic,
    ModelPlanner,
    NoCritic,
    NoPlanner,
    RandomCritic,
    RunConfig,
    SelfCritic,
)
from interleave.controls import RandomRewrite
from interleave.engine import Engine, Parts, ask_planner
from interleave.parts import Critic, Generator, Picture
from interleave.prompts import template
from interleave.records import Attempt, PlanRecord, Record, Request, Trajectory
from interleave.store import PICTURES, PictureStore, Trace

MAY_DIFFER = ("loop.concurrency", "cache")
"""What may change between the sessions of a run: nothing that a record depends on."""


def make_planner(config: RunConfig) -> ChatPlanner | None:
    """The planner that a configuration names.  Raises UserError where its model cannot be had."""
    quiet_libraries()
    planner = config.planner
    if isinstance(planner, NoPlanner):
        return None
    return ChatPlanner(
        chat.make(planner.model), template(planner.text_template), template(planner.pictures_template), planner.policy
    )


def make_parts(config: RunConfig) -> Parts:
    """The parts that a configuration names, models loaded.  Raises UserError where one cannot be had."""
    planner = make_planner(config)
    generator: Generator = generators.make(config.generator)
    if config.cache is not None:
        generator = generators.CachedGenerator(generator, Path(config.cache))
    return Parts(planner, _critic(config, planner), generator, judging.make(config.judge) if config.judge else None)


def _critic(config: RunConfig, planner: ChatPlanner | None) -> Critic | None:
    critic = config.critic
    match critic:
        case NoCritic():
            return None
        case RandomCritic():
            return RandomRewrite(critic.accept, critic.phrases)
        case SelfCritic():
            if planner is None:
                raise UserError("critic.kind: self needs a planner's model; set planner.kind=model or choose another")
            model = planner.model
        case ModelCritic():
            same = isinstance(config.planner, ModelPlanner) and config.planner.model == critic.model
            model = planner.model if planner is not None and same else chat.make(critic.model)
            return ChatCritic(
                model,
                template(critic.template),
                critic.context,
                critic.policy,
                critic.num_samples,
                critic.accept_share,
            )
    return ChatCritic(model, template(critic.template), critic.context, critic.policy)


def create(
    path: Path, config: RunConfig, command: Sequence[str], ask: Callable[[PictureStore], list[Request]]
) -> list[Request]:
    """Start a run folder with the requests that `ask` makes with its picture store."""
    with RunFolder.create(path, config, command):
        requests = ask(PictureStore(path / PICTURES))
        request_files.save(requests, path)
    return requests


async def check(parts: Parts) -> None:
    """Raises UserError if an endpoint that the parts need does not answer, or refuses the key."""
    for part in (parts.planner, parts.critic):
        if isinstance(part, ChatPlanner | ChatCritic) and isinstance(part.model, chat.EndpointChat):
            await part.model.check()


async def run(
    path: Path,
    parts: Parts,
    config: RunConfig,
    command: Sequence[str],
    on_record: Callable[[Record], None],
    retry_failed: bool = False,
) -> list[Trajectory]:
    """Go on with the requests of the run in `path`, from where its trace ends.

    Raises UserError if the folder is in use, or belongs to another configuration.
    """
    with RunFolder.open(path, config, command, may_differ=MAY_DIFFER):
        requests = request_files.saved(path)
        with Trace(path) as trace:
            engine = Engine(
                parts,
                config.loop,
                config.seed,
                trace,
                PictureStore(path / PICTURES),
                on_record,
                {name: metadata.version(name) for name in ("interleave", "imgen-common")},
                retry_failed,
            )
            return await engine.run_all(requests)


async def plan_only(config: RunConfig, request: Request, pictures: Sequence[Picture]) -> PlanRecord:
    """What the planner makes of a request, with as many tries as in a run."""
    planner = make_planner(config)
    try:
        return await ask_planner(planner, request, pictures, config.loop, config.seed)
    finally:
        if planner is not None:
            await planner.close()


class Storytelling:
    """Stories, each in a run folder of its own, for a page that shows them as they come."""

    def __init__(self, config: RunConfig, parts: Parts, runs: Path) -> None:
        self._config, self._parts, self._runs = config, parts, runs

    async def stream(
        self, text: str, pictures: Sequence[Picture], seed: int
    ) -> AsyncGenerator[tuple[Record, Picture | None], None]:
        """The records of a story, each when it is complete, an attempt's with its picture.

        Raises UserError as `run`.
        """
        config = self._config.model_copy(update={"seed": seed})
        path = free_path(self._runs, None, slug(text))
        create(path, config, ["demo"], lambda store: [request_files.request(text, pictures, store)])
        records: asyncio.Queue[Record | None] = asyncio.Queue()
        telling = asyncio.create_task(run(path, self._parts, config, ["demo"], records.put_nowait))
        telling.add_done_callback(lambda _: records.put_nowait(None))
        try:
            while (record := await records.get()) is not None:
                drawn = record.image_id if isinstance(record, Attempt) else None
                yield record, PictureStore(path / PICTURES).get(drawn) if drawn else None
            await telling
        finally:
            telling.cancel()


def slug(request: str) -> str:
    """A folder's name made of a request's first words."""
    words = re.findall(r"[a-z0-9]+", request.lower())
    return "_".join(words)[:40].strip("_") or "story"


def run_and_close(
    path: Path,
    config: RunConfig,
    command: Sequence[str],
    on_record: Callable[[Record], None],
    retry_failed: bool = False,
) -> list[Trajectory]:
    """`run` with parts made for it, from code that is not asynchronous."""
    parts = make_parts(config)

    async def main() -> list[Trajectory]:
        try:
            await check(parts)
            return await run(path, parts, config, command, on_record, retry_failed)
        finally:
            await parts.close()

    return asyncio.run(main())
