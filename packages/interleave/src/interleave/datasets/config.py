"""Configuration of `interleave data build`."""

from typing import Annotated, ClassVar, Literal, Self

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field, model_validator

from imgen_common.config import Config, UserPath
from imgen_common.judging.cost import CostLimits
from interleave.agents.prompts import TemplateRef
from interleave.agents.scoring import JudgeConfig, VerifierJudgeConfig
from interleave.loop.config import RunConfig

Share = Annotated[float, Ge(0), Le(1)]


class FilePrompts(Config):
    """Requests from a file."""

    kind: Literal["file"] = "file"
    path: UserPath
    """A file as `interleave batch` reads it; the page of statistics counts their `category`."""


class ShapesPrompts(Config):
    """Requests of the miniature's world, whose plans are known."""

    kind: Literal["shapes"] = "shapes"
    split: Literal["train", "tune", "test"] = "train"
    """The split of the world from which they are sampled."""
    count: Annotated[int, Ge(1)] = 300
    """Number of requests."""
    riddles: Share = 0.0
    """Share of them that name things by facts instead of color and shape."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the sampling."""


class BudgetConfig(Config):
    """Limits of a build.  Requests that have started are finished, so that each of the `run.loop.concurrency` that run
    at once may exceed them; `run.loop` limits a single request."""

    renamed: ClassVar = {"max_pictures": "max_images"}

    max_images: Annotated[int, Ge(1)] | None = None
    """No request starts after so many images, over all sessions; null: no limit."""
    max_seconds: Annotated[float, Gt(0)] | None = None
    """No request starts so many seconds after the session started; null: no limit."""


class TemplatesConfig(Config):
    """Templates of the rows, built-in names or text files: those that the trained agents will be run with, whichever
    the teacher uses."""

    renamed: ClassVar = {"planner_pictures": "planner_images"}

    planner_text: TemplateRef = "shapes_planner"
    """For requests without images."""
    planner_images: TemplateRef = "planner_images"
    """For requests with images."""
    critic: TemplateRef = "shapes_critic"
    """For the critic."""


class FiltersConfig(Config):
    """Which trajectories become rows.  A step is all attempts at one step of one plan; its score is the judge's
    sqrt(semantics * quality)."""

    planner: Literal["plan", "complete", "accepted"] = "plan"
    """Plans to keep: all, those of complete stories, or those of which the critic accepted every image."""
    degrading: Annotated[float, Ge(0), Le(10)] | None = 0.0
    """Drops steps whose last image scores lower than the first by more than this; null: keeps them."""
    low: Annotated[float, Ge(0), Le(10)] | None = 3.0
    """Drops steps of which no image has this score; null: keeps them."""
    rl_share: Share | None = 1 / 3
    """Share of the scored steps, those whose scores vary most, that go to `critic_rl`; the others go to `critic_sft`.
    null: all go to both."""
    balance: Annotated[float, Ge(1)] | None = 1.0
    """Most rows of the more frequent verdict for each row of the other, in each set and split; null: keeps all."""
    dedupe: bool = True
    """Whether to drop rows whose question (text and images) an earlier row has."""
    val: Annotated[float, Ge(0), Lt(1)] = 0.05
    """Share of the requests whose rows go to the `val` files; all rows of equal requests stay together."""


class DataConfig(CostLimits):
    """Trajectories, their scores, and the sets made from them."""

    prompts: Annotated[FilePrompts | ShapesPrompts, Field(discriminator="kind")] | None = ShapesPrompts()
    """The requests; null: none, only `trajectories` are used."""
    run: RunConfig = RunConfig()
    """Configuration of the loop: teachers, generator, seed."""
    teacher: Literal["run", "shapes"] = "run"
    """The teachers: planner and critic of `run`, or the known plans and the verifier of the miniature's world."""
    judge: JudgeConfig | None = VerifierJudgeConfig()
    """Scores every judged image afterwards; null: no judge, and `critic_rl` stays empty."""
    max_unscored: Share = 0.1
    """The build stops when the judge failed on more than this share of the images."""
    shard: Annotated[str, Field(pattern=r"^[0-9]{1,5}/[0-9]{1,5}$")] = "1/1"
    """Which part of the requests is built here: `2/8`, the second of eight parts; `interleave merge` makes one build of
    them."""
    trajectories: tuple[UserPath, ...] = ()
    """Folders of further trajectories: of other builds, runs, batches or `data import execution_record`."""
    budget: BudgetConfig = BudgetConfig()
    """Limits of the build."""
    templates: TemplatesConfig = TemplatesConfig()
    """Templates of the rows."""
    filters: FiltersConfig = FiltersConfig()
    """Which trajectories become rows."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.teacher == "shapes" and isinstance(self.prompts, FilePrompts):
            raise ValueError(
                "teacher: shapes knows the plans of its own requests only; set prompts.kind=shapes, or teacher=run for "
                "the planner and the critic of run"
            )
        if self.prompts is None and not self.trajectories:
            raise ValueError("nothing to build from; give prompts or trajectories")
        return self
