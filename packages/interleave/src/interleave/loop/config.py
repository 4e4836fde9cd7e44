"""Configuration of `interleave run` and `interleave batch`.  The defaults are the miniature, on a CPU."""

from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import Field, model_validator

from imgen_common.config import Config, UserPath
from imgen_common.judging.objects import ParseMode
from interleave.agents.prompts import TemplateRef
from interleave.agents.scoring import JudgeConfig
from interleave.models.chat import ChatConfig
from interleave.models.chat.local import LocalChatConfig
from interleave.models.generators import GeneratorConfig
from interleave.models.generators.pipeline import PipelineConfig

Selection = Literal["last", "first_success", "best_by_judge", "best_by_verdict_probability"]
PositiveInt = Annotated[int, Ge(1)]


class LoopConfig(Config):
    """How the loop goes, and its budgets."""

    max_steps: PositiveInt = 16
    """Longest plan that is accepted; a longer one is asked for again."""
    max_attempts: PositiveInt = 16
    """Images generated for one step, at most; 5 is the paper's best, the miniature needs more."""
    max_generations: PositiveInt | None = None
    """Images asked for in one request, at most, those that failed among them; null: as many as its steps and attempts
    allow."""
    max_seconds: Annotated[float, Gt(0)] | None = None
    """Seconds after which no further image is generated for a request; null: no limit."""
    planner_tries: PositiveInt = 5
    """How often the planner is asked for a plan that can be read."""
    critic_tries: PositiveInt = 3
    """How often the critic is asked for a verdict that can be read, per image."""
    stop_on_success: bool = True
    """Whether a step ends with its first accepted image; false: `max_attempts` are always made (best of N)."""
    rewrite: bool = True
    """Whether a rejected image is generated again with the critic's prompt; false: with the step's own."""
    select: Selection = "last"
    """Which image of a step the story shows, among the accepted ones, or all where none was accepted: the last, the
    first accepted, the one with the judge's highest sqrt(semantics * quality), or with the critic's highest
    probability of success."""
    references: Literal["latest", "all"] = "latest"
    """What an edit is given: the latest accepted image, or all accepted ones that the generator can take."""
    concurrency: PositiveInt = 16
    """Requests worked on at once."""


class NoPlanner(Config):
    """The request itself is the only prompt."""

    kind: Literal["none"] = "none"


class ModelPlanner(Config):
    """A chat model writes the steps."""

    renamed: ClassVar = {"pictures_template": "images_template", "policy": "parse_mode"}
    kind: Literal["model"] = "model"
    model: ChatConfig = LocalChatConfig(ref="builtin:shapes/planner")
    """The model."""
    text_template: TemplateRef = "shapes_planner"
    """Template of a request without images: a built-in name, a .txt file, or a `TemplateFile`."""
    images_template: TemplateRef = "planner_images"
    """Template of a request with images."""
    parse_mode: ParseMode = "strict"
    """How answers are read: `strict` JSON, or `tolerant` of Python-style objects, as the released checkpoints write."""


class NoCritic(Config):
    """No image is judged: the first of each step is taken."""

    kind: Literal["none"] = "none"


class ModelCritic(Config):
    """A chat model judges each image and rewrites the prompt."""

    renamed: ClassVar = {"policy": "parse_mode", "accept_share": "acceptance_threshold"}
    kind: Literal["model"] = "model"
    model: ChatConfig = LocalChatConfig(ref="builtin:shapes/critic")
    """The model."""
    template: TemplateRef = "shapes_critic"
    """Template: a built-in name, a .txt file, or a `TemplateFile`."""
    context: Literal["pair", "story"] = "pair"
    """What it sees: the images before and after, or also the request and the story so far."""
    parse_mode: ParseMode = "strict"
    """How answers are read."""
    num_samples: Annotated[int, Ge(1), Le(32)] = 1
    """Answers per image, with different seeds; more than one needs a temperature above 0."""
    acceptance_threshold: Annotated[float, Gt(0), Le(1)] = 0.5
    """Share of those answers that must accept an image."""

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

    renamed: ClassVar = {"policy": "parse_mode"}
    kind: Literal["self"] = "self"
    template: TemplateRef = "critic"
    """Template: a built-in name, a .txt file, or a `TemplateFile`."""
    context: Literal["pair", "story"] = "pair"
    """What it sees, as of `model`."""
    parse_mode: ParseMode = "strict"
    """How answers are read."""


class RationalRewardsCritic(Config):
    """RationalRewards (arXiv 2604.11626) scores several aspects of each image from 1 to 4 and rewrites the prompt."""

    kind: Literal["rational_rewards"] = "rational_rewards"
    edit_model: ChatConfig = LocalChatConfig(ref="TIGER-Lab/RationalRewards-8B-Edit", temperature=0.1)
    """The model that judges edits."""
    t2i_model: ChatConfig | None = None
    """The model that judges images made from words alone, the first of most stories; null: `edit_model`."""
    edit_template: str = "rational_rewards_edit"
    """Template of an edit: a built-in name or a text file.  The built-in ones are in our own words; the model was
    trained on other words, which its authors publish."""
    t2i_template: str = "rational_rewards_t2i"
    """Template of an image made from words alone."""
    min_score: Annotated[float, Ge(1), Le(4)] = 3.0
    """Lowest score, of 4, with which an image is accepted: an aspect below it rejects the image."""


class RandomCritic(Config):
    """Accepts by chance and rewrites by chance: a control for what looking adds."""

    kind: Literal["random_rewrite"] = "random_rewrite"
    accept: Annotated[float, Ge(0), Le(1)] = 0.5
    """Probability that an image is accepted."""
    phrases: Annotated[tuple[str, ...], MinLen(1)] = ("in detail", "clearly visible", "exactly as described", "")
    """What is added to the step's prompt after a rejection, one of them by chance."""


class RunConfig(Config):
    """Planner, critic, generator and the loop that joins them."""

    seed: Annotated[int, Ge(0)] = 0
    """Seed of everything that is sampled."""
    planner: Annotated[NoPlanner | ModelPlanner, Field(discriminator="kind")] = ModelPlanner()
    """Who writes the steps."""
    critic: Annotated[
        NoCritic | ModelCritic | SelfCritic | RationalRewardsCritic | RandomCritic, Field(discriminator="kind")
    ] = ModelCritic(
        model=LocalChatConfig(ref="builtin:shapes/critic", temperature=1.0), num_samples=8, acceptance_threshold=0.75
    )
    """Who judges the images."""
    generator: GeneratorConfig = PipelineConfig()
    """Which generator makes the images."""
    judge: JudgeConfig | None = None
    """Who scores the images, for `loop.select: best_by_judge` and for records; null: nobody."""
    cache: UserPath | None = "cache/images"
    """Folder of generated images, shared by all runs: an identical one is never generated twice; null: none."""
    loop: LoopConfig = LoopConfig()
    """Attempts, budgets, selection."""

    @model_validator(mode="after")
    def _can_select(self) -> "RunConfig":
        if self.loop.select == "best_by_judge" and self.judge is None:
            raise ValueError("loop.select: best_by_judge needs a judge; configure one or choose another selection")
        model = getattr(self.planner if isinstance(self.critic, SelfCritic) else self.critic, "model", None)
        has_some = getattr(model, "top_logprobs", 1) > 0 or getattr(self.critic, "num_samples", 1) > 1
        if self.loop.select == "best_by_verdict_probability" and (model is None or not has_some):
            raise ValueError(
                "loop.select: best_by_verdict_probability needs a critic of kind model or self, whose model has "
                "top_logprobs above 0 (or, of kind model, num_samples above 1)"
            )
        return self
