"""One story with plain Python functions as generator, critic and planner, without a configuration."""

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from imgen_common.errors import UserError, check_text, is_blank, one_line
from imgen_common.files import local_path
from imgen_common.http import run_in_thread
from imgen_common.run_folder.find import TOLD
from imgen_common.run_folder.folder import RunFolder
from imgen_common.tables import describe_type
from interleave.agents.prompts import render_plan
from interleave.loop.config import LoopConfig, RunConfig
from interleave.loop.engine import Engine
from interleave.loop.requests import make_request, save_requests
from interleave.protocols import Components, CriticAnswer, CriticInput, GenerationRequest, HashedImage, PlannerAnswer
from interleave.records import Attempt, Plan, PlanStep, Request, Trajectory, Verdict
from interleave.storage.images import IMAGES, ImageStore
from interleave.storage.trace import Trace

Generate = Callable[[str, Sequence[Image.Image], int], Image.Image]
"""generate(prompt, sources, seed) -> RGB image: from the prompt alone where `sources` is empty, else an edit of its
last image."""
Criticize = Callable[[Image.Image, Image.Image, str], tuple[bool, str | None]]
"""criticize(before, after, prompt) -> (accepted, prompt of the next attempt); `before` is white for a first image, and
None leaves the prompt as it is."""


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


class FunctionGenerator:
    """A function as a generator; it runs in a thread, so it may take its time."""

    def __init__(self, generate: Generate, max_sources: int = 1) -> None:
        self._generate, self.max_sources = generate, max_sources
        self.id, self.params = _name_of(generate), dict[str, Any]()

    async def generate(self, request: GenerationRequest) -> HashedImage:
        """The image that the function returns."""
        sources = [source.image for source in request.sources]
        made = await asyncio.to_thread(self._generate, request.prompt, sources, request.seed)
        if not isinstance(made, Image.Image):
            raise UserError(f"generate ({self.id}) returned {describe_type(made)}; it must return an image of PIL")
        return HashedImage.from_pil(made)

    async def close(self) -> None:
        """Nothing to release."""


class FunctionCritic:
    """A function as a critic."""

    def __init__(self, criticize: Criticize) -> None:
        self._criticize, self.id = criticize, _name_of(criticize)

    async def judge(self, shown: CriticInput, seed: int) -> CriticAnswer:
        """The verdict that the function returns."""
        prompt = shown.prompt_used or shown.original_prompt
        said: Any = await asyncio.to_thread(self._criticize, shown.before.image, shown.after.image, prompt)
        if not (isinstance(said, tuple) and len(said) == 2 and isinstance(said[1], str | None)):
            what = "(accepted, prompt of the next attempt)"
            raise UserError(f"criticize ({self.id}) returned {one_line(repr(said), 80)}; it must return {what}")
        return CriticAnswer(Verdict(success=bool(said[0]), refined_prompt=said[1] or prompt), "")

    async def close(self) -> None:
        """Nothing to release."""


class FixedPlanner:
    """A planner that always answers with the same prompts, one image each."""

    id = "fixed"

    def __init__(self, prompts: str | Sequence[str]) -> None:
        """Raises UserError for an empty prompt, and for one with half of a surrogate pair."""
        given = [prompts] if isinstance(prompts, str) else prompts
        for number, prompt in enumerate(given, 1):
            check_text(prompt, f"prompts: step {number}")
            if is_blank(prompt):
                raise UserError(f"prompts: step {number} of {len(given)} is empty; say what to draw")
        steps = (PlanStep(index=i, instruction=prompt, prompt=prompt) for i, prompt in enumerate(given, 1))
        self._plan = Plan(steps=tuple(steps))

    async def plan(self, request: Request, images: Sequence[HashedImage], seed: int) -> PlannerAnswer:
        """The plan."""
        return PlannerAnswer(self._plan, render_plan(self._plan))

    async def close(self) -> None:
        """Nothing to release."""


@dataclass(frozen=True)
class StoryResult:
    """The record of a story, all its attempts, and the images that it shows by step."""

    trajectory: Trajectory
    attempts: list[Attempt]
    images: dict[int, Image.Image]


def tell_story(
    request: str,
    generate: Generate,
    criticize: Criticize | None = None,
    prompts: str | Sequence[str] = (),
    folder: str | Path | None = None,
    loop: LoopConfig | None = None,
    seed: int = 0,
) -> StoryResult:
    """Runs one request through the loop.

    prompts: of the steps; without any, the request is the only one.  folder: a run folder that keeps the trace and the
    images, which `interleave report` reads; by default nothing is kept.  Raises UserError if the folder is taken, a
    prompt is empty, `loop.select` needs scores, or a function returns something else than it must; returns a trajectory
    whose status says so where a function raised a `BackendError`.
    """
    if loop is not None and loop.select.startswith("best_by"):
        raise UserError(f"loop.select: {loop.select}: functions give no scores; choose last or first_success")
    config = RunConfig(loop=loop or LoopConfig(), seed=seed)
    planner, critic = FixedPlanner(prompts) if prompts else None, FunctionCritic(criticize) if criticize else None
    parts = Components(planner, critic, FunctionGenerator(generate))
    with tempfile.TemporaryDirectory() as temporary:
        run = local_path(str(folder)) if folder else Path(temporary) / "run"
        images = ImageStore(run / IMAGES)
        made = make_request(request, (), images)  # without images nothing is stored, should it be refused
        with RunFolder.create(run, config, [TOLD]):
            save_requests([made], run)
            with Trace(run) as trace:
                engine = Engine(parts, config.loop, seed, trace, images)
                trajectory = run_in_thread(engine.run(made))  # a notebook has a running event loop
                attempts = list(trace.read()[trajectory.id].attempts.values())
        chosen = {a.step: a.image_id for a in attempts if trajectory.selected.get(a.step) == a.attempt and a.image_id}
        return StoryResult(trajectory, attempts, {step: images.get(image).image for step, image in chosen.items()})
