"""Throughput and latency of `interleave serve` with a generator that only waits, which is the cost of the service.

The service runs in a process of its own.  Clients are connections of this process: each sends its next request as soon
as it has an answer, and checks that the answer is the image of its own prompt and seed.  The bound is the rate of the
generator alone: min(clients, workers x jobs) / latency.  Clients and service share the machine.

    python -m benchmarks.perf.serve_load
    python -m benchmarks.perf.serve_load --latency 0.05 --clients 1,32,256 --engine ray
"""

import asyncio
import base64
import contextlib
import io
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import numpy as np
import typer
from PIL import Image

from imgen_common.console import markdown_table
from imgen_common.errors import UserError, run_cli
from interleave.models.generators.scripted import color_bands
from interleave.protocols import GenerationRequest

MODULE = "benchmarks.perf.serve_load"
STARTUP = 300.0
"""Seconds that the service may take until it is ready."""


@dataclass(frozen=True)
class ServiceSetting:
    """A service: its engine, its workers (processes or replicas), concurrent jobs per worker, seconds per image."""

    engine: str = "local"
    workers: int = 2
    jobs: int = 32
    latency: float = 0.2


@dataclass(frozen=True)
class LoadRow:
    """Results for one number of clients.  Rates are in images per second, times in seconds."""

    clients: int
    answers: int
    rate: float
    bound: float
    median: float
    p95: float
    p99: float

    @property
    def ratio(self) -> float:
        """Rate over bound."""
        return self.rate / self.bound


@contextlib.contextmanager
def start_service(setting: ServiceSetting, max_clients: int) -> Iterator[str]:
    """Runs the service and gives its URL.  Raises UserError if it does not become ready."""
    sets = {
        "port": 0,
        "generator.kind": "scripted",
        "generator.latency": setting.latency,
        "requests_per_worker": setting.jobs,
        "max_queue": max_clients,
        "devices": json.dumps(["cpu"] * setting.workers),
        "num_replicas": setting.workers,
        "replica_cpus": 0.1,
    }
    options = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "interleave", "serve", "--engine", setting.engine, *options]
    environment = {name: value for name, value in os.environ.items() if name != "INTERLEAVE_SERVE_TOKEN"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            url = next((line.strip() for line in process.stdout if line.startswith("http")), "")
            wait_until_ready(url)
            yield url
        finally:
            process.terminate()


def wait_until_ready(url: str) -> None:
    """Returns once the service is ready.  Raises UserError if it takes too long."""
    end = time.monotonic() + STARTUP
    while url and time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/readyz", timeout=5):
            return
        time.sleep(0.2)
    raise UserError(f"the service was not ready within {STARTUP:.0f} seconds; its messages are above")


async def measure_load(url: str, setting: ServiceSetting, clients: int, seconds: float) -> LoadRow:
    """Runs `clients` clients for `seconds` seconds, after each has had one answer."""
    ready = asyncio.Barrier(clients)
    spent = await asyncio.gather(*(run_client(url, number, ready, seconds) for number in range(clients)))
    times = [one for times, _ in spent for one in times]
    median, p95, p99 = np.percentile(times, (50, 95, 99)).tolist()
    rate = sum(len(times) / elapsed for times, elapsed in spent)
    bound = min(clients, setting.workers * setting.jobs) / setting.latency
    return LoadRow(clients, len(times), rate, bound, median, p95, p99)


async def run_client(url: str, number: int, ready: asyncio.Barrier, seconds: float) -> tuple[list[float], float]:
    """Seconds of each answer of one client, and of all its answers together."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    times: list[float] = []
    await request_image(reader, writer, f"client {number} warm", number)
    await ready.wait()
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or not times:
        await request_image(reader, writer, f"client {number} {len(times)}", number)
        times.append(time.perf_counter() - started - elapsed)
    writer.close()
    return times, time.perf_counter() - started


async def request_image(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, prompt: str, seed: int) -> None:
    """Requests one image and checks it.  Raises RuntimeError if the answer is another image or an error."""
    body = json.dumps({"prompt": prompt, "seed": seed}).encode()
    head = f"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
    length = next(int(line.partition(":")[2]) for line in lines if line.startswith("content-length:"))
    answer = json.loads(await reader.readexactly(length))
    if " 200 " not in lines[0]:
        raise RuntimeError(f"{lines[0]}: {answer}")
    image = Image.open(io.BytesIO(base64.b64decode(answer["image"])))
    if image.tobytes() != color_bands(GenerationRequest(prompt, (), seed)).tobytes():
        raise RuntimeError(f"the answer to {prompt!r} is the image of another request")


def format_table(rows: Sequence[LoadRow]) -> str:
    """The table as Markdown."""
    header = ["clients", "answers", "images/s", "bound", "ratio", "p50 ms", "p95 ms", "p99 ms"]
    return markdown_table(
        header,
        [
            [str(row.clients), str(row.answers)]
            + [f"{row.rate:.1f}", f"{row.bound:.1f}", f"{row.ratio:.3f}"]
            + [f"{1000 * one:.0f}" for one in (row.median, row.p95, row.p99)]
            for row in rows
        ],
    )


def main(
    clients: Annotated[str, typer.Option(help="Numbers of clients, separated by commas.")] = "1,16,64,256",
    engine: Annotated[str, typer.Option(help="local or ray.")] = ServiceSetting.engine,
    workers: Annotated[int, typer.Option(help="Workers or replicas.", min=1)] = ServiceSetting.workers,
    jobs: Annotated[int, typer.Option(help="Concurrent jobs per worker.", min=1)] = ServiceSetting.jobs,
    latency: Annotated[float, typer.Option(help="Seconds per image.", min=0.001)] = ServiceSetting.latency,
    seconds: Annotated[float, typer.Option(help="Seconds per number of clients.", min=0.1)] = 10.0,
    output: Annotated[Path | None, typer.Option(help="JSON file; by default named by the hardware.")] = None,
) -> None:
    """Throughput and latency of the service at several numbers of clients, against the bound of its generator."""
    setting = ServiceSetting(engine, workers, jobs, latency)
    counts = [int(count) for count in clients.split(",")]
    with start_service(setting, max(counts)) as url:
        rows = [asyncio.run(measure_load(url, setting, count, seconds)) for count in counts]
    import torch

    from benchmarks.common import describe_run, hardware_name, result_file, write_json

    cpu = torch.device("cpu")
    load = os.getloadavg()[0]
    print(f"{hardware_name(cpu)}, {os.cpu_count()} cores, load average {load:.1f}; {setting}\n\n{format_table(rows)}\n")
    file = output or result_file(f"serve_load-{engine}", cpu, "json")
    content = {"setting": asdict(setting), "seconds": seconds, "load_average": load, "cores": os.cpu_count()}
    results = [asdict(row) | {"ratio": row.ratio} for row in rows]
    write_json(file, content | {"rows": results, "environment": describe_run(MODULE, sys.argv[1:], cpu)})
    print(f"written to {file}")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_cli(app, MODULE)
