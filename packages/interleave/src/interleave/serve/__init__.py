"""A generator as a service over HTTP."""

import ipaddress
import logging
import math
import os
import socket
from typing import TYPE_CHECKING

from imgen_common.errors import UserError
from interleave.serve.config import ServeConfig

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

__all__ = ["TOKEN", "ServeConfig", "serve", "serve_ray"]
TOKEN = "INTERLEAVE_SERVE_TOKEN"
"""Name of the environment variable that holds the bearer token of all requests."""


def serve(config: ServeConfig) -> None:
    """Serve with worker processes on this machine until stopped; the address is printed.

    Raises UserError if the address is taken, or if it is not of this machine only and there is no token.
    """
    from interleave.serve.app import create_app
    from interleave.serve.metrics import Metrics
    from interleave.serve.workers import Pool

    _log()
    secret = required_secret(config.host)
    metrics = Metrics()
    app = create_app(config, Pool(config, metrics), metrics, secret)
    with listening(config.host, config.port) as listener:
        print(address(listener), flush=True)
        server(app, config).run(sockets=[listener])


def server(app: "FastAPI", config: ServeConfig) -> "uvicorn.Server":
    """What runs the application; stopped, it lets running requests end first."""
    import uvicorn

    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=math.ceil(config.drain),
    )
    return uvicorn.Server(settings)


def serve_ray(config: ServeConfig) -> None:
    """Serve with Ray Serve replicas until stopped; the address is printed.  Needs the extra `ray`.

    Raises UserError as `serve`, and where Ray is not installed or its cluster cannot be reached.
    """
    prepare_ray(config)
    try:
        from interleave.serve.ray import serve_until_stopped
    except ModuleNotFoundError as error:
        raise UserError(f"--engine ray: {error.name} is not installed; install interleave[ray]") from None
    _log()
    secret = required_secret(config.host)
    with listening(config.host, config.port) as listener:  # whether it is free; Ray opens it again
        url, port = address(listener), listener.getsockname()[1]
    serve_until_stopped(config.model_copy(update={"port": port}), secret, url)


def prepare_ray(config: ServeConfig) -> None:
    """What Ray reads when it is imported: no usage statistics; of a cluster of our own, that it stays on loopback.

    Without the last variable, named for other systems, Ray listens on all addresses of a Linux machine too.  A replica
    still opens one port on all of them, which Ray 2.60 does not let us choose: it asks for Ray's own token.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if config.ray_address is None:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"


def required_secret(host: str) -> bytes | None:
    """The digest of the token, if there is one.  Raises UserError where there must be: away from loopback."""
    from interleave.serve.app import digest

    token = os.environ.get(TOKEN, "").strip()
    if token:
        return digest(token)
    if not is_loopback(host):
        raise UserError(f"host {host}: others can reach it, so it needs a token; set {TOKEN}, or take host 127.0.0.1")
    return None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; a name other than localhost is taken for reachable."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens.  Raises UserError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(f"{host} port {port}: cannot listen ({error.strerror}); give another host or port") from None


def address(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _log() -> None:
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger(__name__).setLevel(logging.INFO)
