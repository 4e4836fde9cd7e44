"""The commands `interleave serve` and `interleave demo`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from imgen_common.console import spinner
from imgen_common.errors import UserError
from interleave.cli.options import Configs, Runs, Sets
from interleave.cli.run import load_run_config


def serve(
    configs: Configs = None,
    sets: Sets = None,
    engine: Annotated[
        str, typer.Option(metavar="local|ray", help="Worker processes on this machine, or Ray Serve replicas.")
    ] = "local",
) -> None:
    """Serve the generator over HTTP, with one worker per device, batching, a bounded queue and metrics. By default it
    listens only on the local machine; to listen on another address, it needs a token in INTERLEAVE_SERVE_TOKEN.

    Example:

    \b
      interleave serve
      interleave serve --set port=8011 --set devices='[cuda:0, cuda:1]'
      interleave serve --engine ray --set num_replicas=8
    """
    from imgen_common.config import load
    from imgen_common.errors import nearest
    from interleave.serve import ServeConfig, serve, serve_ray

    engines: dict[str, Callable[[ServeConfig], None]] = {"local": serve, "ray": serve_ray}
    if engine not in engines:
        raise UserError(f"--engine {engine}: must be local or ray{nearest(engine, engines)}")
    engines[engine](load(ServeConfig, configs or [], sets or []))


def demo(
    configs: Configs = None,
    sets: Sets = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 7860,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Further host name that it is reached by without a token, as by a proxy.")
    ] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Serve a web page that makes stories and shows their steps as they come (needs the package gradio). On an address
    that others reach it needs a token in INTERLEAVE_DEMO_TOKEN, which the page asks for as a password.

    Example: interleave demo --port 7861
    """
    with spinner("loading"):
        config = load_run_config(configs, sets)
        from interleave.loop import run

        run.check_references(config)
        from interleave import demo
    demo.serve_demo(lambda: run.StoryStream(config, run.build_components(config), runs), host, port, allow_host or [])
