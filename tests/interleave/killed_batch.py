"""A batch in a process of its own, to be killed: `python killed_batch.py FOLDER`."""

import asyncio
import sys
from pathlib import Path

from backends import FakeCritic, FakeGenerator, FakePlanner, plan_of

from interleave.loop.config import LoopConfig
from interleave.loop.engine import Engine
from interleave.models.generators.cache import CachedGenerator
from interleave.protocols import Components
from interleave.records import Request
from interleave.storage.images import ImageStore
from interleave.storage.trace import Trace


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    parts = Components(
        FakePlanner(lambda r, s: plan_of(f"{r.id} one", "two", None, "four"), latency=0.01),
        FakeCritic(lambda shown, seed: (seed % 3 == 0, shown.prompt_used + "!"), latency=0.01),
        CachedGenerator(FakeGenerator(latency=0.01, limit=4), folder / "cache"),
    )
    print("ready", flush=True)
    with Trace(folder) as trace:
        engine = Engine(parts, LoopConfig(concurrency=8), 0, trace, ImageStore(folder / "images"))
        asyncio.run(engine.run_all([Request(id=f"r{i}", text=f"story {i}") for i in range(30)]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
