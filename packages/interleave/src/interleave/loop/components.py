"""The parts that the loop joins."""

from dataclasses import dataclass

from interleave.protocols import Critic, Generator, Judge, Planner


@dataclass(frozen=True)
class Components:
    """Who does what.  planner None: the request is the only prompt.  critic None: no image is judged."""

    planner: Planner | None
    critic: Critic | None
    generator: Generator
    judge: Judge | None = None

    async def close(self) -> None:
        """Release all of them."""
        for part in (self.planner, self.critic, self.generator, self.judge):
            if part is not None:
                await part.close()
