"""Configuration of `interleave serve`."""

from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le
from pydantic import Field

from imgen_common.config import Config
from interleave.models.generators.pipeline import PipelineConfig
from interleave.models.generators.scripted import ScriptedConfig

Setting = Literal[
    "num_inference_steps", "guidance_scale", "height", "width", "strength", "max_sequence_length", "negative_prompt"
]


class ServeConfig(Config):
    """A generator as a service.  Memory of waiting requests: at most (max_queue + running) x (max_body_bytes, or its
    source images decoded, 3 x max_pixels each)."""

    renamed: ClassVar = {
        "jobs_per_worker": "requests_per_worker",
        "drain": "shutdown_timeout",
        "max_steps": "max_num_inference_steps",
    }

    generator: Annotated[PipelineConfig | ScriptedConfig, Field(discriminator="kind")] = PipelineConfig()
    """The generator, loaded once in each worker."""
    devices: tuple[str, ...] = ()
    """Devices with one worker each (`[cuda:0, cuda:1]`); none: one worker on `generator.device`."""
    host: str = "127.0.0.1"
    """Address to listen on.  Any but a loopback address needs a token in INTERLEAVE_SERVE_TOKEN."""
    port: Annotated[int, Ge(0), Le(65535)] = 8011
    """Port to listen on; 0: any free one."""
    allowed_hosts: tuple[Annotated[str, Field(pattern=r"^(\*|(\*\.)?[^*\s]+)$")], ...] = ()
    """Further host names (`images.example.org`, `*.example.org`) that requests may carry where there is no token, as
    from a proxy on this machine; any but these and this machine's own is answered with 400, as web pages forge them."""
    max_connections: Annotated[int, Ge(1)] = 512
    """Connections open at once; beyond that, the one that has waited longest for a request is closed."""
    head_timeout: Annotated[float, Gt(0)] = 10.0
    """Seconds in which the head of a request must arrive, whole, and a client must go on reading its answer."""
    body_timeout: Annotated[float, Gt(0)] = 60.0
    """Seconds in which the body of a request must arrive, whole."""
    requests_per_worker: Annotated[int, Ge(1), Le(1024)] = 32
    """Requests that a worker holds at once.  Those with equal settings are batched, up to `generator.max_batch`; twice
    that keeps the next batch ready."""
    max_queue: Annotated[int, Ge(0)] = 128
    """Requests admitted beyond those that the workers hold; further ones are answered with 429."""
    deadline: Annotated[float, Gt(0)] = 300.0
    """Seconds after which a request is dropped and answered with 504; a request may ask for fewer."""
    max_body_bytes: Annotated[int, Ge(1)] = 32 * 2**20
    """Largest request in bytes."""
    max_pixels: Annotated[int, Ge(1)] = 16 * 10**6
    """Largest source image in pixels."""
    num_decoders: Annotated[int, Ge(1)] = 2
    """Processes that decode source images, apart from the workers; started when images come."""
    decode_timeout: Annotated[float, Gt(0)] = 10.0
    """Seconds that decoding a source image may take; then the process is killed, and the request answered with 422."""
    max_prompt_chars: Annotated[int, Ge(1)] = 8192
    """Longest prompt and negative prompt in characters."""
    settings: tuple[Setting, ...] = ("num_inference_steps", "guidance_scale", "height", "width", "negative_prompt")
    """Settings that a request may give for its image."""
    max_num_inference_steps: Annotated[int, Ge(1)] = 100
    """Most inference steps that a request may ask for."""
    max_side: Annotated[int, Ge(1)] = 2048
    """Largest height and width in pixels that a request may ask for."""
    max_deaths: Annotated[int, Ge(1)] = 3
    """How many workers may die at a request before it fails; its last attempt runs alone in a worker."""
    restart_delay: Annotated[float, Gt(0)] = 0.5
    """Seconds before a dead worker is restarted, doubled at each death without an answer in between, up to 30."""
    shutdown_timeout: Annotated[float, Ge(0)] = 20.0
    """Seconds that running requests get to finish when the service is stopped."""
    num_replicas: Annotated[int, Ge(1)] = 1
    """Ray only: workers in the cluster."""
    replica_cpus: Annotated[float, Ge(0)] = 1.0
    """Ray only: processor cores of each."""
    replica_gpus: Annotated[float, Ge(0)] = 0.0
    """Ray only: GPUs of each."""
    ray_address: str | None = None
    """Ray only: the cluster (`auto`, `host:port`); null: one of this machine, started and ended with the service."""
