"""The same application over Ray Serve: the HTTP service is one deployment, the replicas of the generator are another.

Ray starts replicas, replaces dead ones, and gives up on those whose model cannot be loaded; the service admits and
checks requests, and asks again where a replica died.
"""

import asyncio
import logging
import os
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

from imgen_common.errors import UserError, one_line
from interleave.serve.app import create_app
from interleave.serve.config import ServeConfig
from interleave.serve.metrics import Metrics
from interleave.serve.worker import (
    GenerationFailure,
    GenerationResult,
    GenerationTask,
    GeneratorFactory,
    ModelInfo,
    Worker,
    build_worker_generator,
)

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger("interleave.serve")
LOOPBACK = "127.0.0.1"
REPLICAS = "replicas"
POLL_SECONDS = 1.0
"""Seconds between two queries about the replicas."""
MAX_LOADING_TRIES = 3
MAX_SOCKET_PATH = 107
"""Bytes that Linux allows."""
SOCKET_IN_FOLDER = "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
EXTRA_REQUESTS = 1000
"""Requests that the service may be answering besides those that it admits."""


class Replica:
    """A generator in a Ray Serve replica."""

    def __init__(self, config: ServeConfig, build_generator: GeneratorFactory) -> None:
        self._worker = Worker(config, build_generator)

    async def generate(self, task: GenerationTask) -> GenerationResult | GenerationFailure:
        return await self._worker.generate(task)

    async def model_info(self) -> ModelInfo:
        return self._worker.model_info


class RayBackend:
    """A `Backend`: the replicas, as seen from the deployment of the service."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._reason: str | None = None
        self._num_tasks = 0
        self.model_info: ModelInfo | None = None
        """The model, as reported by the first replica that was ready."""

    @property
    def not_ready_reason(self) -> str | None:
        """As of the last query."""
        return "the model is being loaded" if self.model_info is None and self._reason is None else self._reason

    @property
    def capacity(self) -> int:
        return self._config.num_replicas * self._config.requests_per_worker

    @property
    def num_running(self) -> int:
        """At most as many as the replicas can hold, since Ray does not report it."""
        return min(self._num_tasks, self.capacity)

    async def start(self) -> None:
        """Finds the replicas and starts to query them."""
        self._app_name = serve.get_replica_context().app_name
        self._replicas = serve.get_deployment_handle(REPLICAS, app_name=self._app_name)
        self._polling = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        """Stops the queries; Ray ends the replicas."""
        self._polling.cancel()

    async def generate(self, task: GenerationTask) -> GenerationResult | GenerationFailure:
        """The image; where a replica dies, another one generates it."""
        self._num_tasks += 1
        try:
            for _ in range(self._config.max_deaths):
                with suppress(RayError):
                    return await self._ask(task)
            return GenerationFailure("worker_died", f"{self._config.max_deaths} workers died at this request")
        finally:
            self._num_tasks -= 1

    async def _ask(self, task: GenerationTask) -> GenerationResult | GenerationFailure:
        response = self._replicas.generate.remote(task)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError:
            return GenerationFailure("rate_limited", "the queue is full; ask again later")
        except RayServeException:
            return GenerationFailure("not_ready", "no worker is ready")

    async def _poll(self) -> None:
        while True:
            with suppress(RayError, RayServeException, KeyError):
                status = await asyncio.to_thread(serve.status)
                self._reason = _not_ready_reason(status.applications[self._app_name].deployments[REPLICAS])
                if self.model_info is None and self._reason is None:
                    self.model_info = await self._replicas.model_info.remote()
            await asyncio.sleep(POLL_SECONDS)


def deploy(
    config: ServeConfig,
    secret: bytes | None,
    build_generator: GeneratorFactory = build_worker_generator,
    name: str = "interleave",
    prefix: str = "/",
) -> None:
    """Starts the application on the cluster under a path; does not wait for it."""

    def build_app() -> "FastAPI":
        return create_app(config, RayBackend(config), Metrics(), secret)

    max_requests = config.max_queue + config.num_replicas * config.requests_per_worker
    replicas = serve.deployment(
        name=REPLICAS,
        num_replicas=config.num_replicas,
        max_ongoing_requests=config.requests_per_worker,
        max_queued_requests=max_requests,
        max_constructor_retry_count=MAX_LOADING_TRIES,
        health_check_period_s=POLL_SECONDS,
        graceful_shutdown_timeout_s=config.shutdown_timeout,
        ray_actor_options={"num_cpus": config.replica_cpus, "num_gpus": config.replica_gpus},
    )(Replica)
    service = serve.deployment(
        name="service",
        max_ongoing_requests=max_requests + EXTRA_REQUESTS,
        graceful_shutdown_timeout_s=config.shutdown_timeout,
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress(build_app)())
    target = serve.RunTarget(service.bind(replicas.bind(config, build_generator)), name=name, route_prefix=prefix)
    serve.run_many([target], wait_for_applications_running=False)


@contextmanager
def cluster(config: ServeConfig) -> Iterator[None]:
    """Ray with its proxy listening: the cluster of `ray_address`, or one of this machine alone, without dashboard,
    shut down afterwards.  Raises UserError where there is no such cluster.
    """
    if config.ray_address is None:
        _start_local_ray()
    else:
        try:
            ray.init(address=config.ray_address, log_to_driver=False)
        except Exception as error:  # of many classes, such as RuntimeError for a cluster of another version
            raise UserError(f"ray_address {config.ray_address}: {one_line(str(error))}") from None
    if config.ray_address is None and ray.util.get_node_ip_address() != LOOPBACK:
        ray.shutdown()
        raise RuntimeError("Ray listens beyond this machine; call `prepare_ray` before Ray is imported")
    try:
        serve.start(http_options={"host": config.host, "port": config.port})
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def _start_local_ray() -> None:
    """Raises UserError where Ray's files or sockets cannot be in the folder of temporary files."""
    folder = os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp"))
    remedy = f"it keeps files in {folder}; set RAY_TMPDIR to a folder with a short path that can be written, as /tmp"
    if len(os.fsencode(folder)) > MAX_SOCKET_PATH - len(SOCKET_IN_FOLDER):
        raise UserError(f"Ray cannot start: the paths of its sockets would be too long; {remedy}")
    try:
        ray.init(address="local", include_dashboard=False, _node_ip_address=LOOPBACK, log_to_driver=False)
    except Exception as error:  # of this very class where a part of Ray does not come up in time
        ray.shutdown()
        if not isinstance(error, OSError):
            remedy = f"its logs are in {folder}/ray/session_latest/logs"
        raise UserError(f"Ray cannot start: {one_line(str(error))}; {remedy}") from None


def serve_until_stopped(config: ServeConfig, secret: bytes | None, url: str) -> None:
    """Serves until Ctrl-C or SIGTERM; `url` is printed once the proxy listens."""
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


def _not_ready_reason(replicas: DeploymentStatusOverview) -> str | None:
    """Why no replica is ready; of a traceback the message of a UserError, or else the name of the exception."""
    if any(state == "RUNNING" for state in replicas.replica_states):
        return None
    lines = replicas.message.strip().splitlines()
    if not lines:
        return "the model is being loaded"
    error = re.fullmatch(r"(?:\w+\.)*(\w+): (.*)", lines[-1])
    if error is None:
        return "no replica is ready; see the log of the service"
    return f"the model cannot be loaded: {error[2] if error[1] == UserError.__name__ else error[1]}"
