"""The same application over Ray Serve: its front as one deployment, the generator's replicas as another.

Ray starts replicas, replaces dead ones, and gives up on those whose model does not load; the front lets requests in,
checks them, and asks again where a replica died.
"""

import asyncio
import logging
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.schema import DeploymentStatusOverview

from imgen_common.errors import UserError
from interleave.serve.app import create_app
from interleave.serve.config import ServeConfig
from interleave.serve.metrics import Metrics
from interleave.serve.studio import About, Drawn, Failed, Make, Studio, Task, make_generator

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger("interleave.serve")
LOOPBACK = "127.0.0.1"
REPLICAS = "replicas"
LOOK_EVERY = 1.0
"""Seconds between questions to Ray about the replicas."""
LOADING_TRIES = 3
ANSWERS_BESIDES = 1000
"""Requests that the front may be answering besides those that it lets in."""


class Replica:
    """A generator in a Ray Serve replica."""

    def __init__(self, config: ServeConfig, make: Make) -> None:
        self._studio = Studio(config, make)

    async def draw(self, task: Task) -> Drawn | Failed:
        """The picture, or why there is none."""
        return await self._studio.draw(task)

    async def about(self) -> About:
        """The model."""
        return self._studio.about


class RayBackend:
    """The replicas, as the front sees them from a replica of its own."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._about: About | None = None
        self._trouble: str | None = None
        self._num_drawing = 0

    @property
    def about(self) -> About | None:
        """The model, as the first replica to be ready told it."""
        return self._about

    @property
    def trouble(self) -> str | None:
        """As of the latest look."""
        return "the model is being loaded" if self._about is None and self._trouble is None else self._trouble

    @property
    def capacity(self) -> int:
        """Tasks that replicas hold at most."""
        return self._config.num_replicas * self._config.jobs_per_worker

    @property
    def num_running(self) -> int:
        """As many as replicas can hold: Ray does not tell."""
        return min(self._num_drawing, self.capacity)

    async def start(self) -> None:
        """Find the replicas, and look after them from now on."""
        self._app_name = serve.get_replica_context().app_name
        self._replicas = serve.get_deployment_handle(REPLICAS, app_name=self._app_name)
        self._looking = asyncio.create_task(self._look())

    async def stop(self) -> None:
        """Look no more; Ray ends the replicas."""
        self._looking.cancel()

    async def draw(self, task: Task) -> Drawn | Failed:
        """The picture; where a replica dies at it, another one's."""
        self._num_drawing += 1
        try:
            for _ in range(self._config.max_deaths):
                with suppress(RayError):
                    return await self._ask(task)
            return Failed("worker_died", f"{self._config.max_deaths} workers died at this request")
        finally:
            self._num_drawing -= 1

    async def _ask(self, task: Task) -> Drawn | Failed:
        response = self._replicas.draw.remote(task)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError:
            return Failed("rate_limited", "the queue is full; ask again later")
        except RayServeException:
            return Failed("not_ready", "no worker is ready")

    async def _look(self) -> None:
        while True:
            with suppress(RayError, RayServeException, KeyError):
                status = await asyncio.to_thread(serve.status)
                self._trouble = _trouble(status.applications[self._app_name].deployments[REPLICAS])
                if self._about is None and self._trouble is None:
                    self._about = await self._replicas.about.remote()
            await asyncio.sleep(LOOK_EVERY)


def deploy(
    config: ServeConfig, secret: bytes | None, make: Make = make_generator, name: str = "interleave", prefix: str = "/"
) -> None:
    """Start the application on the cluster under a path; does not wait for it."""

    def build() -> "FastAPI":
        return create_app(config, RayBackend(config), Metrics(), secret)

    inside = config.max_queue + config.num_replicas * config.jobs_per_worker
    replicas = serve.deployment(
        name=REPLICAS,
        num_replicas=config.num_replicas,
        max_ongoing_requests=config.jobs_per_worker,
        max_queued_requests=inside,
        max_constructor_retry_count=LOADING_TRIES,
        health_check_period_s=LOOK_EVERY,
        graceful_shutdown_timeout_s=config.drain,
        ray_actor_options={"num_cpus": config.replica_cpus, "num_gpus": config.replica_gpus},
    )(Replica)
    front = serve.deployment(
        name="front",
        max_ongoing_requests=inside + ANSWERS_BESIDES,
        graceful_shutdown_timeout_s=config.drain,
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress(build)())
    target = serve.RunTarget(front.bind(replicas.bind(config, make)), name=name, route_prefix=prefix)
    serve.run_many([target], wait_for_applications_running=False)


@contextmanager
def cluster(config: ServeConfig) -> Iterator[None]:
    """Ray with its proxy listening: the cluster of `ray_address`, or one of this machine alone, without dashboard,
    ended afterwards.  Raises UserError where there is no such cluster.
    """
    try:
        if config.ray_address is None:
            ray.init(address="local", include_dashboard=False, _node_ip_address=LOOPBACK, log_to_driver=False)
        else:
            ray.init(address=config.ray_address, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        raise UserError(f"ray_address {config.ray_address}: {str(error).splitlines()[0]}") from None
    if config.ray_address is None and ray.util.get_node_ip_address() != LOOPBACK:
        ray.shutdown()
        raise RuntimeError("Ray listens beyond this machine; `prepare` comes before Ray is imported")
    try:
        serve.start(http_options={"host": config.host, "port": config.port})
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def serve_until_stopped(config: ServeConfig, secret: bytes | None, url: str) -> None:
    """Serve until Ctrl-C or SIGTERM; `url` is printed once the proxy listens."""
    stopped = threading.Event()
    with cluster(config):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.set())
        deploy(config, secret)
        while not stopped.wait(0.1):
            with suppress(OSError), socket.create_connection((config.host, config.port), timeout=1):
                print(url, flush=True)
                break
        stopped.wait()


def _trouble(replicas: DeploymentStatusOverview) -> str | None:
    """Why no replica is ready; of a traceback no more than its last line, where that is for users."""
    if any(state == "RUNNING" for state in replicas.replica_states):
        return None
    lines = replicas.message.strip().splitlines()
    if not lines:
        return "the model is being loaded"
    error = re.fullmatch(r"(?:\w+\.)*(\w+): (.*)", lines[-1])
    if error is None:
        return "no replica is ready; see the service's log"
    return f"the model does not load: {error[2] if error[1] == UserError.__name__ else error[1]}"
