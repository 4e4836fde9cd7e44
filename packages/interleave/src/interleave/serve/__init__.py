"""A generator as an HTTP service.

Knows nothing of training.
"""

import ipaddress
import logging
import math
import os
import secrets
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from imgen_common.errors import UserError
from imgen_common.http.client import token_of
from interleave.serve.config import ServeConfig

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

__all__ = ["TOKEN", "ServeConfig", "serve", "serve_ray"]
TOKEN = "INTERLEAVE_SERVE_TOKEN"
"""Environment variable that holds the bearer token of all requests."""


def serve(config: ServeConfig) -> None:
    """Serves with worker processes on this machine until stopped, and prints the address.

    Raises UserError if the address is taken, or if others can reach it and there is no token.
    """
    from interleave.serve.app import create_app
    from interleave.serve.metrics import Metrics
    from interleave.serve.pool import WorkerPool

    _configure_logging()
    secret = required_secret(config.host)
    metrics = Metrics()
    app = create_app(config, WorkerPool(config, metrics), metrics, secret)
    with open_listener(config.host, config.port) as listener:
        print(listener_url(listener), flush=True)
        build_server(app, config).run(sockets=[listener])


def build_server(app: "FastAPI", config: ServeConfig) -> "uvicorn.Server":
    """The server of the application; when it is stopped, it lets running requests finish first."""
    from interleave.serve.connections import build_limited_server

    return build_limited_server(
        app,
        config.max_connections,
        config.head_timeout,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=math.ceil(config.shutdown_timeout),
    )


def serve_ray(config: ServeConfig) -> None:
    """Serves with Ray Serve replicas until stopped, and prints the address.  Needs the extra `ray`.

    Raises UserError as `serve`, and where Ray is not installed or its cluster cannot be reached.
    """
    prepare_ray(config)
    try:
        from interleave.serve.ray import serve_until_stopped
    except ModuleNotFoundError as error:
        raise UserError(f"--engine ray: {error.name} is not installed; install interleave[ray]") from None
    _configure_logging()
    secret = required_secret(config.host)
    with open_listener(config.host, config.port) as listener:  # checks that the address is free; Ray opens it again
        url, port = listener_url(listener), listener.getsockname()[1]
    serve_until_stopped(config.model_copy(update={"port": port}), secret, url)


def prepare_ray(config: ServeConfig) -> None:
    """Sets what Ray reads when it is imported: no usage statistics, and a cluster of our own listens on loopback only.

    Without the last variable, named for other systems, Ray listens on all addresses of a Linux machine too.  A replica
    still opens one port on all of them, which Ray 2.60 does not let us choose: it asks for Ray's own token.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if config.ray_address is None:
        os.environ["RAY_AUTH_MODE"] = "token"
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the home folder
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # under `uv run` Ray would copy the working folder and start every process in an environment made for it
        os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"


def required_secret(host: str) -> bytes | None:
    """The digest of the service's token; None without one.  Raises UserError as `required_token`."""
    from interleave.serve.app import digest

    token = required_token(host, TOKEN)
    return None if token is None else digest(token)


def required_token(host: str, variable: str) -> str | None:
    """The token in an environment variable; None without one.  Raises UserError without one if others reach `host`."""
    token = token_of(variable)
    if not token and not is_loopback(host):
        raise UserError(f"host {host}: others can reach it, so it needs a token; set {variable}, or use 127.0.0.1")
    return token or None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; of names, that is assumed of localhost alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def local_hosts(host: str, more: Sequence[str] = ()) -> list[str]:
    """Host names that requests without a token may carry: this machine's own, `host`, on which it listens, and more.

    A web page elsewhere can point a name of its own at this machine, and then ask as if it were one of its pages.
    """
    return ["localhost", "127.0.0.1", "[::1]", host, *more]


def open_listener(host: str, port: int) -> socket.socket:
    """A listening socket.  Raises UserError if the address is not available."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host} port {port} ({error}); choose another host or port") from None


def listener_url(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _configure_logging() -> None:
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger(__name__).setLevel(logging.INFO)
