"""A batch in a process of its own, to be killed: `python killed_batch.py FOLDER`."""

import asyncio
import sys
from pathlib import Path

from backends import FakeCritic, FakeGenerator, FakePlanner, plan_of

from interleave.engine import Engine, LoopConfig, Parts
from interleave.generators.cache import CachedGenerator
from interleave.records import Request
from interleave.store import PictureStore, Trace


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    parts = Parts(
        FakePlanner(lambda r, s: plan_of(f"{r.id} one", "two", None, "four"), latency=0.01),
        FakeCritic(lambda look, seed: (seed % 3 == 0, look.prompt_used + "!"), latency=0.01),
        CachedGenerator(FakeGenerator(latency=0.01, limit=4), folder / "cache"),
    )
    print("ready", flush=True)
    with Trace(folder) as trace:
        engine = Engine(parts, LoopConfig(concurrency=8), 0, trace, PictureStore(folder / "pictures"))
        asyncio.run(engine.run_all([Request(id=f"r{i}", text=f"story {i}") for i in range(30)]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
