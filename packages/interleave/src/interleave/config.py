"""What `interleave run` and `batch` are asked to do.  The defaults are the miniature, on a CPU."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import Field, model_validator

from imgen_common.config import Config
from interleave.chat import ChatConfig, LocalChatConfig
from interleave.engine import LoopConfig
from interleave.generators import GeneratorConfig, PipelineConfig
from interleave.judging import JudgeConfig

Policy = Literal["strict", "tolerant"]


class NoPlanner(Config):
    """The request itself is the only prompt."""

    kind: Literal["none"] = "none"


class ModelPlanner(Config):
    """A chat model writes the steps."""

    kind: Literal["model"] = "model"
    model: ChatConfig = LocalChatConfig(ref="builtin:shapes/planner")
    """The model."""
    text_template: str = "shapes_planner"
    """Template of a request without pictures: a built-in name or a text file."""
    pictures_template: str = "planner_pictures"
    """Template of a request with pictures."""
    policy: Policy = "strict"
    """How answers are read: `strict` JSON, or `tolerant` of Python-style objects, as the released checkpoints write."""


class NoCritic(Config):
    """No picture is judged: the first of each step is taken."""

    kind: Literal["none"] = "none"


class ModelCritic(Config):
    """A chat model judges each picture and rewrites the prompt."""

    kind: Literal["model"] = "model"
    model: ChatConfig = LocalChatConfig(ref="builtin:shapes/critic")
    """The model."""
    template: str = "shapes_critic"
    """Template: a built-in name or a text file."""
    context: Literal["pair", "story"] = "pair"
    """What it sees: the pictures before and after, or also the request and the story so far."""
    policy: Policy = "strict"
    """How answers are read."""
    num_samples: Annotated[int, Ge(1), Le(32)] = 1
    """Answers per picture, with different seeds; more than one needs a temperature above 0."""
    accept_share: Annotated[float, Gt(0), Le(1)] = 0.5
    """Share of those answers that must accept a picture."""

    @model_validator(mode="after")
    def _samples_differ(self) -> "ModelCritic":
        if self.num_samples > 1 and getattr(self.model, "temperature", 1.0) == 0:
            raise ValueError(
                f"num_samples {self.num_samples}: at model.temperature 0 all answers are the same; set it above 0, or "
                "num_samples to 1"
            )
        return self


class SelfCritic(Config):
    """The planner's model judges its own steps: a control for what a trained critic adds."""

    kind: Literal["self"] = "self"
    template: str = "critic"
    """Template: a built-in name or a text file."""
    context: Literal["pair", "story"] = "pair"
    """What it sees, as of `model`."""
    policy: Policy = "strict"
    """How answers are read."""


class RandomCritic(Config):
    """Accepts by chance and rewrites by chance: a control for what looking adds."""

    kind: Literal["random_rewrite"] = "random_rewrite"
    accept: Annotated[float, Ge(0), Le(1)] = 0.5
    """Probability that a picture is accepted."""
    phrases: Annotated[tuple[str, ...], MinLen(1)] = ("in detail", "clearly visible", "exactly as described", "")
    """What is added to the step's prompt after a rejection, one of them by chance."""


class RunConfig(Config):
    """Planner, critic, generator and the loop that joins them."""

    seed: Annotated[int, Ge(0)] = 0
    """Seed of everything that is drawn."""
    planner: Annotated[NoPlanner | ModelPlanner, Field(discriminator="kind")] = ModelPlanner()
    """Who writes the steps."""
    critic: Annotated[NoCritic | ModelCritic | SelfCritic | RandomCritic, Field(discriminator="kind")] = ModelCritic(
        model=LocalChatConfig(ref="builtin:shapes/critic", temperature=1.0), num_samples=8, accept_share=0.75
    )
    """Who judges the pictures."""
    generator: GeneratorConfig = PipelineConfig()
    """Who draws."""
    judge: JudgeConfig | None = None
    """Who scores the pictures, for `loop.select: best_by_judge` and for records; null: nobody."""
    cache: str | None = "cache/pictures"
    """Folder of generated pictures, shared by all runs: an identical one is never drawn twice; null: none."""
    loop: LoopConfig = LoopConfig()
    """Attempts, budgets, selection."""
