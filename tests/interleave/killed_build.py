"""A build of training sets in a process of its own, to be killed: `python killed_build.py FOLDER`."""

import asyncio
import sys
from pathlib import Path

from backends import FakeCritic, FakeGenerator, FakeJudge, FakePlanner, plan_of

from interleave.datasets.build import BuildProgress, continue_build, open_build
from interleave.datasets.config import DataConfig, FilePrompts, FiltersConfig, TemplatesConfig
from interleave.datasets.filters import SetInfo
from interleave.protocols import Components, CriticInput, Judge


def mark(shown: CriticInput) -> float:
    """A score by the image alone."""
    return int(shown.after.id[:2], 16) / 25.5


def parts(latency: float = 0.0) -> Components:
    """Two images a story; a third of them is accepted."""
    return Components(
        FakePlanner(lambda r, s: plan_of(f"{r.id} one", "two", None), latency=latency),
        FakeCritic(lambda shown, seed: (seed % 3 == 0, shown.prompt_used + "!"), latency=latency),
        FakeGenerator(latency=latency, limit=4),
    )


def build(
    out: Path,
    asked: Path,
    made: Components | None,
    judge: Judge | None = None,
    telling: BuildProgress | None = None,
    **changes: object,
) -> SetInfo:
    """What is left of a build of the requests in the file `asked`, unless `changes` of its configuration differ."""
    given = {
        "prompts": FilePrompts(path=str(asked)),
        "templates": TemplatesConfig(planner_text="planner_text", critic="critic"),
        "filters": FiltersConfig(low=None, val=0.25),
    }
    config = DataConfig.model_validate({**given, **changes})
    with open_build(out, config, ["test"]) as requests:
        return asyncio.run(continue_build(out, config, requests, made, judge, telling or BuildProgress()))


if __name__ == "__main__":
    print("ready", flush=True)
    build(Path(sys.argv[1]), Path(sys.argv[2]), parts(latency=0.01), FakeJudge(mark))
