"""What `interleave serve` is asked to do."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le
from pydantic import Field

from imgen_common.config import Config
from interleave.models.generators.pipeline import PipelineConfig
from interleave.models.generators.scripted import ScriptedConfig

Setting = Literal["num_inference_steps", "guidance_scale", "height", "width", "strength", "negative_prompt"]


class ServeConfig(Config):
    """A generator as a service.  Memory of waiting requests: at most (max_queue + running) x max_body_bytes."""

    generator: Annotated[PipelineConfig | ScriptedConfig, Field(discriminator="kind")] = PipelineConfig()
    """Who draws, once in each worker."""
    devices: tuple[str, ...] = ()
    """Devices, one worker each (`[cuda:0, cuda:1]`); none: one worker on `generator.device`."""
    host: str = "127.0.0.1"
    """Address to listen on.  Other than this machine's own, it needs a token in INTERLEAVE_SERVE_TOKEN."""
    port: Annotated[int, Ge(0), Le(65535)] = 8011
    """Port to listen on; 0: any free one."""
    jobs_per_worker: Annotated[int, Ge(1), Le(1024)] = 32
    """Jobs that a worker holds at once.  Like ones are drawn together, up to `generator.max_batch`; twice that keeps
    the next batch ready."""
    max_queue: Annotated[int, Ge(0)] = 128
    """Requests let in beyond those that workers hold; further ones are answered with 429."""
    deadline: Annotated[float, Gt(0)] = 300.0
    """Seconds after which a request is dropped and answered with 504; a request may ask for fewer."""
    max_body_bytes: Annotated[int, Ge(1)] = 32 * 2**20
    """Largest request in bytes."""
    max_pixels: Annotated[int, Ge(1)] = 16 * 10**6
    """Largest source picture in pixels."""
    max_prompt_chars: Annotated[int, Ge(1)] = 8192
    """Longest prompt and negative prompt in characters."""
    settings: tuple[Setting, ...] = ("num_inference_steps", "guidance_scale", "height", "width", "negative_prompt")
    """What a request may set for its own picture."""
    max_steps: Annotated[int, Ge(1)] = 100
    """Most steps that a request may ask for."""
    max_side: Annotated[int, Ge(1)] = 2048
    """Largest height and width in pixels that a request may ask for."""
    max_deaths: Annotated[int, Ge(1)] = 3
    """How many workers may die at a request before it is given up; the last chance it gets alone."""
    restart_delay: Annotated[float, Gt(0)] = 0.5
    """Seconds before a dead worker is started again, doubled at each death without an answer in between, up to 30."""
    drain: Annotated[float, Ge(0)] = 20.0
    """Seconds that running requests get when the service is stopped."""
    num_replicas: Annotated[int, Ge(1)] = 1
    """Ray only: workers in the cluster."""
    replica_cpus: Annotated[float, Ge(0)] = 1.0
    """Ray only: processor cores of each."""
    replica_gpus: Annotated[float, Ge(0)] = 0.0
    """Ray only: GPUs of each."""
    ray_address: str | None = None
    """Ray only: the cluster (`auto`, `host:port`); null: one of this machine, begun and ended with the service."""
