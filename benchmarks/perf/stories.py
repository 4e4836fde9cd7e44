"""The loop of interleave, side by side on the miniature: many stories at once and one after another, and its service
against the bound of its generator."""

import asyncio
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.perf.serve_load import ServiceSetting, measure_load, start_service
from benchmarks.quality.interleave_miniature import load_stories, run_stories
from interleave.loop.config import LoopConfig, RunConfig
from interleave.loop.run import build_components

NUM_STORIES = 6
CLIENTS = (1, 16, 64)
"""Of the service; it can work on 64 images at once."""


@dataclass(frozen=True)
class ServiceRatio:
    """Images per second of `interleave serve`, its generator's bound, and their ratio, by the wall clock."""

    clients: int
    rate: float
    bound: float
    ratio: float


def make_batches(device: torch.device) -> tuple[partial[None], partial[None], None]:
    """The stories of the miniature, planned, drawn and judged: all at once, and one after another.

    Both make the same images.
    """
    parts, stories = build_components(RunConfig()), load_stories(NUM_STORIES, False, 0)

    def make(concurrency: int) -> None:
        loop = LoopConfig(concurrency=concurrency, max_attempts=2)
        with tempfile.TemporaryDirectory() as folder:
            run_stories(stories, parts, loop, 0, Path(folder))

    return partial(make, NUM_STORIES), partial(make, 1), None


def measure_service(seconds: float) -> list[ServiceRatio]:
    """The service with a scripted generator that waits for 0.2 seconds, for each number of clients."""
    setting = ServiceSetting()
    with start_service(setting, max(CLIENTS)) as url:
        rows = [asyncio.run(measure_load(url, setting, count, seconds)) for count in CLIENTS]
    return [ServiceRatio(row.clients, row.rate, row.bound, row.ratio) for row in rows]
