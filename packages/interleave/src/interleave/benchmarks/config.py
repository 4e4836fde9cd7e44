"""Configuration of `interleave benchmark`.  The defaults are the miniature, on a CPU."""

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Le
from pydantic import Field

from imgen_common.config import Config
from imgen_common.judging.cost import CostLimits
from interleave.loop.config import RunConfig
from interleave.models.chat.endpoint import EndpointChatConfig
from interleave.models.chat.local import LocalChatConfig
from interleave.models.chat.scripted import ScriptedChatConfig

if TYPE_CHECKING:
    from interleave.benchmarks.shapes.judge import ShapesJudge


class ShapesJudgeConfig(Config):
    """The verifier answers; it knows images of the shapes world, and the built-in questions about them."""

    kind: Literal["shapes"] = "shapes"

    def build(self) -> "ShapesJudge":
        """The judge."""
        from interleave.benchmarks.shapes.judge import ShapesJudge  # imports torch

        return ShapesJudge()


class BenchmarkConfig(CostLimits):
    """What makes the images, and what judges them."""

    run: RunConfig = RunConfig()
    """Planner, critic, generator and loop, as of `interleave batch`."""
    judge: Annotated[
        EndpointChatConfig | LocalChatConfig | ScriptedChatConfig | ShapesJudgeConfig, Field(discriminator="kind")
    ] = ShapesJudgeConfig()
    """The chat model that is asked."""
    concurrency: Annotated[int, Ge(1), Le(1000)] = 8
    """Items that are judged at once."""
