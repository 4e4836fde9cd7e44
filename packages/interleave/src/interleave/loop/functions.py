"""One story with plain Python functions as generator, critic and planner, without a configuration."""

import asyncio
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from imgen_common.run_folder.folder import RunFolder
from interleave.agents.prompts import render_plan
from interleave.loop.components import Components
from interleave.loop.config import LoopConfig, RunConfig
from interleave.loop.engine import Engine
from interleave.loop.requests import make_request, save_requests
from interleave.protocols import CriticAnswer, CriticInput, GenerationRequest, HashedImage, PlannerAnswer
from interleave.records import Attempt, Plan, PlanStep, Request, Trajectory, Verdict
from interleave.storage.images import IMAGES, ImageStore
from interleave.storage.trace import Trace

Generate = Callable[[str, Sequence[Image.Image], int], Image.Image]
"""generate(prompt, sources, seed) -> RGB image: from the prompt alone where `sources` is empty, else an edit of its
last image."""
Criticize = Callable[[Image.Image, Image.Image, str], tuple[bool, str]]
"""criticize(before, after, prompt) -> (accepted, prompt of the next attempt); `before` is white for a first image."""


class FunctionGenerator:
    """A function as a generator; it runs in a thread, so it may take its time."""

    def __init__(self, generate: Generate, max_sources: int = 1) -> None:
        self._generate, self.max_sources = generate, max_sources

    @property
    def id(self) -> str:
        return getattr(self._generate, "__qualname__", type(self._generate).__name__)

    @property
    def params(self) -> Mapping[str, Any]:
        return {}

    async def generate(self, job: GenerationRequest) -> HashedImage:
        """The image that the function returns."""
        sources = [source.image for source in job.sources]
        return HashedImage.from_pil(await asyncio.to_thread(self._generate, job.prompt, sources, job.seed))

    async def close(self) -> None:
        """There is nothing to close."""


class FunctionCritic:
    """A function as a critic."""

    def __init__(self, criticize: Criticize) -> None:
        self._criticize = criticize

    @property
    def id(self) -> str:
        return getattr(self._criticize, "__qualname__", type(self._criticize).__name__)

    async def judge(self, look: CriticInput, seed: int) -> CriticAnswer:
        """The verdict that the function returns."""
        prompt = look.prompt_used or look.original_prompt
        success, refined = await asyncio.to_thread(self._criticize, look.before.image, look.after.image, prompt)
        return CriticAnswer(Verdict(success=success, refined_prompt=refined, reasoning=""), "")

    async def close(self) -> None:
        """There is nothing to close."""


class FixedPlanner:
    """A planner that always answers with the same prompts, one image each."""

    id = "fixed"

    def __init__(self, prompts: Sequence[str]) -> None:
        steps = (PlanStep(index=i, name="", instruction=prompt, prompt=prompt) for i, prompt in enumerate(prompts, 1))
        self._plan = Plan(steps=tuple(steps), reasoning="")

    async def plan(self, request: Request, images: Sequence[HashedImage], seed: int) -> PlannerAnswer:
        """The plan."""
        return PlannerAnswer(self._plan, render_plan(self._plan))

    async def close(self) -> None:
        """There is nothing to close."""


@dataclass(frozen=True)
class StoryResult:
    """What came of a request.

    trajectory: plan, status and the attempt chosen for each step.  attempts: every attempt with its verdict.
    images: by step, those that the story shows.
    """

    trajectory: Trajectory
    attempts: list[Attempt]
    images: dict[int, Image.Image]


def tell_story(
    request: str,
    generate: Generate,
    criticize: Criticize | None = None,
    prompts: Sequence[str] = (),
    folder: Path | None = None,
    loop: LoopConfig | None = None,
    seed: int = 0,
) -> StoryResult:
    """Runs one request through the loop.

    prompts: of the steps; without any, the request is the only one.  folder: a run folder that keeps the trace and the
    images, which `interleave report` reads; by default nothing is kept.  Raises UserError if the folder is taken, and
    returns a trajectory whose status says so where a function raised a `BackendError`.
    """
    with tempfile.TemporaryDirectory() as place:
        return asyncio.run(_told(request, generate, criticize, prompts, folder or Path(place) / "run", loop, seed))


async def _told(
    text: str,
    generate: Generate,
    criticize: Criticize | None,
    prompts: Sequence[str],
    folder: Path,
    loop: LoopConfig | None,
    seed: int,
) -> StoryResult:
    config = RunConfig(loop=loop or LoopConfig(select="last"), seed=seed)
    planner, critic = FixedPlanner(prompts) if prompts else None, FunctionCritic(criticize) if criticize else None
    with RunFolder.create(folder, config, ["interleave.tell_story"]):
        images = ImageStore(folder / IMAGES)
        request = make_request(text, (), images)
        save_requests([request], folder)
        with Trace(folder) as trace:
            parts = Components(planner, critic, FunctionGenerator(generate))
            trajectory = await Engine(parts, config.loop, seed, trace, images).run(request)
            attempts = list(trace.read()[trajectory.id].attempts.values())
    chosen = {a.step: a.image_id for a in attempts if trajectory.selected.get(a.step) == a.attempt and a.image_id}
    return StoryResult(trajectory, attempts, {step: images.get(image).image for step, image in chosen.items()})
