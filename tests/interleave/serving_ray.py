"""Services over one Ray cluster of this machine."""

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from serving import COMMON, PATIENCE, SECRET_TOKEN, Service, free_port

from interleave.serve import ServeConfig, prepare_ray
from interleave.serve.app import digest
from interleave.serve.worker import GeneratorFactory

NUM_CHANCES = 8


@contextlib.contextmanager
def cluster() -> Iterator[Callable[[ServeConfig, GeneratorFactory, Path], AbstractContextManager[Service]]]:
    """What starts a service on a cluster that lives as long."""
    whole = COMMON.model_copy(update={"port": free_port()})
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  (Ray's own name)
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # where replicas find the generator
    prepare_ray(whole)

    from ray import serve

    from interleave.serve import ray

    @contextlib.contextmanager
    def start(config: ServeConfig, make: GeneratorFactory, log: Path) -> Iterator[Service]:
        name = log.parent.name
        small = config.model_copy(update={"replica_cpus": 0.1})
        ray.deploy(small, digest(SECRET_TOKEN), make, name, f"/{name}")
        yield Service(f"http://127.0.0.1:{whole.port}/{name}", log)
        serve.delete(name)

    with contextlib.ExitStack() as stack:
        for chance in reversed(range(NUM_CHANCES)):
            try:
                stack.enter_context(ray.cluster(whole))
                break
            except Exception:  # Ray gives its node 30 seconds to start, whatever else the machine does
                traceback.print_exc()
                if not chance:
                    raise
        yield start


def listeners() -> list[tuple[str, int]]:
    """Addresses, in hexadecimal as Linux tells them, and ports that processes of Ray listen on."""
    owners: dict[str, str] = {}
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            owners[os.readlink(link)] = (link.parents[1] / "cmdline").read_text()
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    listening = [line for line in lines if line[3] == "0A" and "ray" in owners.get(f"socket:[{line[9]}]", "")]
    return [(address, int(port, 16)) for address, _, port in (line[1].partition(":") for line in listening)]


def asks_for_a_token(port: int) -> bool:
    """Whether a replica's port turns away those without Ray's token."""
    import grpc

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=PATIENCE)
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.UNAUTHENTICATED
    return False
