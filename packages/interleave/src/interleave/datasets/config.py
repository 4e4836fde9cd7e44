"""What `interleave data build` is asked to do."""

from typing import Annotated, ClassVar, Literal, Self

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field, model_validator

from imgen_common.config import Config
from interleave.agents.scoring import JudgeConfig, VerifierJudgeConfig
from interleave.loop.config import RunConfig

Share = Annotated[float, Ge(0), Le(1)]


class FilePrompts(Config):
    """Requests from a file."""

    kind: Literal["file"] = "file"
    path: str
    """JSON lines as `interleave batch` reads them; `category` is counted on the page of statistics."""


class ShapesPrompts(Config):
    """Requests of the miniature's world, with known plans."""

    kind: Literal["shapes"] = "shapes"
    split: Literal["train", "tune", "test"] = "train"
    """Which part of the world they speak of."""
    count: Annotated[int, Ge(1)] = 300
    """How many."""
    riddles: Share = 0.0
    """Share of them that name things by facts instead of colour and shape."""
    seed: Annotated[int, Ge(0)] = 0
    """Which ones are drawn."""


class BudgetConfig(Config):
    """What a build may cost, over all its sessions.  Requests that have begun are finished, so that each of the
    `run.loop.concurrency` that are under way may go beyond it; `run.loop` bounds a single request."""

    renamed: ClassVar = {"max_pictures": "max_images"}

    max_images: Annotated[int, Ge(1)] | None = None
    """No request begins once so many pictures were drawn; null: no limit."""
    max_seconds: Annotated[float, Gt(0)] | None = None
    """No request begins so many seconds after the session began; null: no limit."""


class TemplatesConfig(Config):
    """From which templates rows are rendered: those that the trained agents will be run with, whatever the teacher
    read.  Built-in names or text files."""

    renamed: ClassVar = {"planner_pictures": "planner_images"}

    planner_text: str = "shapes_planner"
    """Of requests without pictures."""
    planner_images: str = "planner_images"
    """Of requests with pictures."""
    critic: str = "shapes_critic"
    """Of the critic."""


class FiltersConfig(Config):
    """What becomes a row.  A step is all attempts at one step of one plan; its score is the judge's
    sqrt(semantics * quality)."""

    planner: Literal["plan", "complete", "accepted"] = "plan"
    """Plans to keep: every one that could be read, those of complete stories, or those whose every picture the critic
    accepted."""
    degrading: Annotated[float, Ge(0), Le(10)] | None = 0.0
    """Steps whose last picture scores lower than the first by more than this are left out; null: kept."""
    low: Annotated[float, Ge(0), Le(10)] | None = 3.0
    """Steps no picture of which scores this much are left out; null: kept."""
    rl_share: Share | None = 1 / 3
    """Share of the scored steps, those whose scores vary most, that go to `critic_rl`; the others go to `critic_sft`;
    null: all go to both."""
    balance: Annotated[float, Ge(1)] | None = 1.0
    """Rows of the commoner verdict for each of the rarer one, at most, in each set and split; null: all are kept."""
    dedupe: bool = True
    """Whether a row is left out whose question (words and pictures) an earlier one asks already."""
    val: Annotated[float, Ge(0), Lt(1)] = 0.05
    """Share of the requests whose rows are held back in the `val` files; all rows of equal requests go together."""


class DataConfig(Config):
    """Trajectories, their scores, and the sets made of them."""

    prompts: Annotated[FilePrompts | ShapesPrompts, Field(discriminator="kind")] | None = ShapesPrompts()
    """What is asked for; null: nothing, only `trajectories` are used."""
    run: RunConfig = RunConfig()
    """Teachers, generator, loop and seed."""
    teacher: Literal["run", "shapes"] = "run"
    """Who plans and judges: planner and critic of `run`, or what the miniature's world knows of its own requests."""
    judge: JudgeConfig | None = VerifierJudgeConfig()
    """Who scores every judged picture afterwards; null: nobody, and `critic_rl` stays empty."""
    max_unscored: Share = 0.1
    """Share of the pictures that the judge may fail on before the build stops."""
    trajectories: tuple[str, ...] = ()
    """Folders of more trajectories to use: of other builds, runs, batches or `data import execution_record`."""
    budget: BudgetConfig = BudgetConfig()
    """What it may cost."""
    templates: TemplatesConfig = TemplatesConfig()
    """How rows are worded."""
    filters: FiltersConfig = FiltersConfig()
    """What becomes a row."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.teacher == "shapes" and not isinstance(self.prompts, ShapesPrompts):
            raise ValueError("teacher: shapes knows the plans of its own requests only; set prompts.kind=shapes")
        if self.prompts is None and not self.trajectories:
            raise ValueError("nothing to build from; give prompts or trajectories")
        return self
