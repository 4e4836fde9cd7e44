"""Services over one Ray cluster of this machine."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from ray import serve
from serving import COMMON, SECRET_TOKEN, Service, free_port

from interleave.serve import ServeConfig, ray
from interleave.serve.app import digest
from interleave.serve.studio import Make

NUM_CHANCES = 8


@contextlib.contextmanager
def cluster() -> Iterator[Callable[[ServeConfig, Make, Path], AbstractContextManager[Service]]]:
    """What starts a service on a cluster that lives as long."""
    whole = COMMON.model_copy(update={"port": free_port()})

    @contextlib.contextmanager
    def start(config: ServeConfig, make: Make, log: Path) -> Iterator[Service]:
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
                if not chance:
                    raise
        yield start
