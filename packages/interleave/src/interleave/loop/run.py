"""A run of the loop in its folder: components built from a configuration, records, images, and resuming.

config.yaml  environment.json  requests.jsonl     trace.jsonl (plans, attempts, trajectories)     images/
"""

import asyncio
import contextlib
import re
import shutil
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path

from imgen_common.errors import UserError, one_line
from imgen_common.hub import BUILTIN
from imgen_common.images import shape_problem
from imgen_common.run_folder.data import DATA, DataHash, check_data, hash_rows, moved_models, record_data
from imgen_common.run_folder.find import ENVIRONMENT, free_path
from imgen_common.run_folder.folder import RunFolder
from imgen_common.shapes.vocabulary import (
    VERIFIER,
    describe_large_image,
    describe_missing_image,
    describe_unknown_words,
)
from interleave.agents.critic import ChatCritic, RandomRewrite, RubricCritic
from interleave.agents.judge import ChatJudge
from interleave.agents.planner import ChatPlanner
from interleave.agents.prompts import load_template
from interleave.loop import requests as request_files
from interleave.loop.config import (
    ModelCritic,
    ModelPlanner,
    NoCritic,
    NoPlanner,
    RandomCritic,
    RationalRewardsCritic,
    RunConfig,
    SelfCritic,
)
from interleave.loop.engine import Engine, request_plan
from interleave.models.chat.endpoint import EndpointChat
from interleave.models.chat.local import LocalChatConfig
from interleave.models.concurrency import mark_retrieved
from interleave.models.generators.cache import CachedGenerator
from interleave.models.hashes import check_models, hash_models
from interleave.models.remote import HOW_REACHED
from interleave.protocols import Components, Critic, Generator, HashedImage
from interleave.records import Attempt, PlanRecord, Record, Request, Trajectory
from interleave.storage.images import IMAGES, ImageStore
from interleave.storage.trace import Trace

COMMAND = ("interleave", "demo")
"""What is recorded of a run that the page began."""
MAX_SLUG = 40
"""Characters of a folder's name that is made of a request."""
SERVED = ("generator", "planner.model", "critic.model", "critic.edit_model", "critic.t2i_model", "judge.model")
MAY_DIFFER = (
    *("loop.concurrency", "loop.max_generations", "loop.max_seconds", "cache"),
    *(f"{part}.{key}" for part in SERVED for key in HOW_REACHED),
)
"""What may change between the sessions of a run: budgets, and nothing else that a record depends on."""
TEMPLATES = "the text of a template"
"""What the hash of all templates is called."""


def build_planner(config: RunConfig) -> ChatPlanner | None:
    """The planner that a configuration names.  Raises UserError where its model cannot be had."""
    planner = config.planner
    if isinstance(planner, NoPlanner):
        return None
    templates = load_template(planner.text_template), load_template(planner.images_template)
    return ChatPlanner(planner.model.build(), *templates, planner.parse_mode)


def build_components(config: RunConfig) -> Components:
    """The components that a configuration names, models loaded.  Raises UserError where one cannot be had."""
    planner = build_planner(config)
    generator: Generator = config.generator.build()
    if config.cache is not None:
        generator = CachedGenerator(generator, Path(config.cache))
    judge = config.judge.build() if config.judge is not None else None
    return Components(planner, _build_critic(config, planner), generator, judge)


def _build_critic(config: RunConfig, planner: ChatPlanner | None) -> Critic | None:
    critic = config.critic
    samples = 1, 0.5  # answers per image, and the share of them that must accept it
    match critic:
        case NoCritic():
            return None
        case RandomCritic():
            return RandomRewrite(critic.accept, critic.phrases)
        case RationalRewardsCritic():
            edit = critic.edit_model.build()
            t2i = edit if critic.t2i_model in (None, critic.edit_model) else critic.t2i_model.build()
            templates = load_template(critic.edit_template), load_template(critic.t2i_template)
            return RubricCritic((edit, templates[0]), (t2i, templates[1]), critic.min_score)
        case SelfCritic():
            if planner is None:
                raise UserError("critic.kind: self needs a planner's model; set planner.kind=model or choose another")
            model = planner.model
        case ModelCritic():
            same = isinstance(config.planner, ModelPlanner) and config.planner.model == critic.model
            model = planner.model if planner is not None and same else critic.model.build()
            samples = critic.num_samples, critic.acceptance_threshold
    return ChatCritic(model, load_template(critic.template), critic.context, critic.parse_mode, *samples)


def check_request(config: RunConfig, request: Request, *, any_words: bool = False, section: str = "") -> None:
    """Raises UserError for a request that the built-in models cannot answer or judge: of another world, unless
    `any_words` (it is a benchmark's), or with images for the planner, which takes none.

    section: what stands before the keys of `config` in the user's configuration, such as `run.`.
    """
    planner, generator = config.planner, config.generator
    reader = generator if isinstance(planner, NoPlanner) else planner.model
    ref, where = getattr(reader, "ref", ""), f"request {one_line(request.text, 80)!r}"
    if isinstance(config.critic, SelfCritic) and reader is generator:
        raise UserError("critic.kind: self is the planner's model, and planner.kind is none; set critic.kind to model")
    words = re.sub(r"\[image \d+\]", " ", request.text)  # the places of its images
    # what another planner or generator makes of other words, the built-in critic and judge would judge all the same
    judging = (getattr(part, "ref", "") for part in (getattr(config.critic, "model", None), config.judge))
    knowing = next((name for name in (ref, *judging) if name.startswith(BUILTIN)), "")
    if not any_words and (unknown := describe_unknown_words(knowing, words)):
        other = (
            "configure another judge, or none (judge: null)"
            if knowing == VERIFIER
            else "give a CONFIG with other models"
        )
        raise UserError(f"{where}: {unknown}; ask for what it knows, or {other}")
    if not any_words and not request.image_ids and (missing := describe_missing_image(ref, request.text)):
        remedy = "begin with what is to be drawn, or give the image that is meant (--image, --set planner.kind=none)"
        raise UserError(f"{where}: {missing}; {remedy}")
    if isinstance(config.critic, SelfCritic) and ref.startswith(BUILTIN):
        raise UserError(f"critic.kind: self: {ref} takes no images; name another planner, or set critic.kind to model")
    if request.image_ids and reader is not generator and ref.startswith(BUILTIN):
        raise UserError(
            f"{where}: {ref} takes no images; --set {section}planner.kind=none makes the request the prompt of the "
            "only step, or name another planner"
        )


def hash_inputs(config: RunConfig, section: str = "") -> dict[str, DataHash]:
    """Hashes of the models that are loaded for a configuration, by their keys, and of all its templates.

    section: as for `check_request`.  Raises UserError for what cannot be had.
    """
    parts = (config.planner, config.critic, config.judge)
    refs = [ref for part in parts for name, ref in part or () if name.endswith("template")]
    models = {section + key: model for key, model in _models(config).items()}
    return {**hash_models(models), TEMPLATES: hash_rows(load_template(ref).text for ref in refs)}


def places(config: RunConfig, section: str = "") -> dict[str, str]:
    """What the hashes of models and templates are called (`hash_inputs`), by the keys that say where these lie."""
    keys = [section + key for key in _models(config)]
    parts = {"planner": config.planner, "critic": config.critic, "judge": config.judge}
    found = {f"{section}{key}.{name}": TEMPLATES for key, part in parts.items() for name, _ in part or ()}
    templates = {key: name for key, name in found.items() if key.endswith("template")}
    return {f"{key}.ref": key for key in keys} | {f"{section}generator.lora": f"{section}generator.lora"} | templates


def _models(config: RunConfig) -> dict[str, object]:
    """The configurations of all models, by their keys."""
    parts = {"planner": config.planner, "critic": config.critic, "judge": config.judge}
    agents = {f"{key}.{name}": value for key, part in parts.items() for name, value in part or () if "model" in name}
    return {"generator": config.generator, **agents}


def check_references(config: RunConfig) -> None:
    """Raises UserError for a model or an adapter that cannot be had, before anything is loaded."""
    check_models(_models(config))


def create_run(
    path: Path,
    config: RunConfig,
    ask: Callable[[ImageStore], list[Request]],
    *,
    any_words: bool = False,
    section: str = "",
    inputs: Mapping[str, DataHash] | None = None,
) -> list[Request]:
    """Start a run folder with the requests that `ask` makes with its image store; `run_requests` records how it is run.

    any_words: the requests are a benchmark's, and words that the built-in models do not know are part of it.  section:
    as for `check_request`.  inputs: what `hash_inputs` gives, where it is known.

    Raises UserError, and leaves no folder, for a request that cannot be read or answered.
    """
    is_first = not path.parent.exists()
    with RunFolder.create(path, config):
        try:
            store = ImageStore(path / IMAGES)
            requests = ask(store)
            for request in requests:
                check_request(config, request, any_words=any_words, section=section)
                _check_sizes(config, request, [store.get(image).image.size for image in request.image_ids])
            check_references(config)
            record_data(path, inputs or hash_inputs(config))
            request_files.save_requests(requests, path)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            if is_first:
                with contextlib.suppress(OSError):  # another run was started in it meanwhile
                    path.parent.rmdir()
            raise
    return requests


def _check_sizes(config: RunConfig, request: Request, sizes: Sequence[tuple[int, int]]) -> None:
    """Raises UserError for images of a request that a model that is loaded here cannot read."""
    where = f"request {one_line(request.text, 80)!r}"
    if large := describe_large_image(getattr(config.generator, "ref", ""), sizes):
        raise UserError(f"{where}: {large}")
    readers = [name for name, model in _models(config).items() if isinstance(model, LocalChatConfig)]
    if readers and (problem := next(filter(None, (shape_problem(*size) for size in sizes)), None)):
        raise UserError(f"{where}: an image {problem}, such as {readers[0]}; cut it, or enlarge its short side")


def fewest_images(requests: Sequence[Request]) -> int:
    """Of the requests that have any: a server that does not take so many answers none of these."""
    return min((len(request.image_ids) for request in requests if request.image_ids), default=0)


async def check_endpoints(components: Components, *, num_images: int = 0) -> None:
    """Raises UserError if an endpoint that the components need does not answer, or refuses the key.

    num_images: with how many the planner is asked, as of `fewest_images`.
    """
    for part in (components.planner, components.critic, components.judge):
        await _check_endpoints_of(part, num_images)


async def _check_endpoints_of(part: object, num_images: int) -> None:
    models = (part.model,) if isinstance(part, ChatPlanner | ChatCritic | ChatJudge) else ()
    for model in part.models if isinstance(part, RubricCritic) else models:
        if isinstance(model, EndpointChat):
            num_shown = num_images if isinstance(part, ChatPlanner) else 2
            await model.check((*[HashedImage.white(32, 32)] * num_shown, "Say yes."))


async def run_requests(
    path: Path,
    components: Components,
    config: RunConfig,
    command: Sequence[str],
    on_record: Callable[[Record], None],
    retry_failed: bool = False,
    is_new: bool = False,
) -> list[Trajectory]:
    """Continue the run in `path` from where its trace ends; `is_new`: it has none, and was just made.

    Raises UserError if the folder is in use, or belongs to another configuration.
    """
    with RunFolder.open(path, config, command, may_differ=(*MAY_DIFFER, *moved_models(path, config, places(config)))):
        if not is_new and (path / DATA).exists():  # else of an earlier version
            check_data(path, hash_inputs(config))
        requests = request_files.load_requests(path)
        with Trace(path) as trace:
            images = ImageStore(path / IMAGES)
            engine = Engine(components, config.loop, config.seed, trace, images, on_record, retry_failed)
            return await engine.run_all(requests)


async def plan_only(config: RunConfig, request: Request, images: Sequence[HashedImage]) -> PlanRecord:
    """What the planner makes of a request, with as many tries as in a run."""
    check_request(config, request)
    planner = build_planner(config)
    try:
        await _check_endpoints_of(planner, len(images))
        return await request_plan(planner, request, images, config.loop, config.seed)
    finally:
        if planner is not None:
            await planner.close()


class StoryStream:
    """Stories, each in a run folder of its own, for a page that shows them as they come."""

    def __init__(self, config: RunConfig, components: Components, runs: Path) -> None:
        self._config, self._components, self._runs = config, components, runs
        self._inputs = hash_inputs(config)

    async def stream(
        self, text: str, images: Sequence[HashedImage], seed: int
    ) -> AsyncGenerator[tuple[Record, HashedImage | None], None]:
        """The records of a story as they come, an attempt's with its image.  Raises UserError as `run_requests`."""
        config = self._config.model_copy(update={"seed": seed})
        path = free_path(self._runs, None, slug(text))
        inputs = self._inputs  # of the models as they were loaded
        create_run(path, config, lambda store: [request_files.make_request(text, images, store)], inputs=inputs)
        records: asyncio.Queue[Record | None] = asyncio.Queue()
        story = run_requests(path, self._components, config, COMMAND, records.put_nowait, is_new=True)
        running = asyncio.create_task(story)
        running.add_done_callback(mark_retrieved)
        running.add_done_callback(lambda _: records.put_nowait(None))
        try:
            while (record := await records.get()) is not None:
                image_id = record.image_id if isinstance(record, Attempt) else None
                yield record, ImageStore(path / IMAGES).get(image_id) if image_id else None
            await running
        finally:
            running.cancel()


def slug(request: str) -> str:
    """A folder's name made of a request's first words."""
    name = "_".join(re.findall(r"[a-z0-9]+", request.lower())) or "story"
    return name if len(name) <= MAX_SLUG else name[: MAX_SLUG + 1].rpartition("_")[0] or name[:MAX_SLUG]


def run_and_close(
    path: Path,
    config: RunConfig,
    command: Sequence[str],
    on_record: Callable[[Record], None],
    retry_failed: bool = False,
    *,
    is_new: bool = False,
) -> list[Trajectory]:
    """`run_requests` with components built for it, from code that is not asynchronous.

    is_new: the folder was made for this call, and is removed where a component cannot be had (UserError).
    """

    async def main() -> list[Trajectory]:
        try:
            requests = request_files.load_requests(path)
            await check_endpoints(components, num_images=fewest_images(requests))
            return await run_requests(path, components, config, command, on_record, retry_failed, is_new)
        finally:
            await components.close()

    try:
        components = build_components(config)
        return asyncio.run(main())
    except UserError:
        if is_new and not (path / ENVIRONMENT).exists():  # nothing ran in it
            shutil.rmtree(path, ignore_errors=True)
        raise
