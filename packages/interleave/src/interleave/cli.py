"""The command `interleave`.  Nothing heavy is imported before a command runs, so that `--help` answers at once."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imgen_common.errors import UserError, run_cli
from interleave.data.cli import data_app
from interleave.training import cli as training

if TYPE_CHECKING:
    from interleave.config import RunConfig
    from interleave.records import Record, Trajectory

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Tell stories in pictures and words with any image generator: a planner writes the steps, a critic judges "
    "each picture and rewrites the prompt.\n\n"
    'Example: interleave run "draw a red circle, then add a blue square on its right"',
)

Configs = Annotated[
    list[Path] | None,
    typer.Option("--config", "-c", metavar="FILE", help="YAML file; may be given again, later ones over earlier ones."),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the configuration; may be given again."),
]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder that holds the run folders.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines, and nothing else.")]
Images = Annotated[
    list[Path] | None,
    typer.Option("--image", "-i", metavar="FILE", help="A picture of the request; repeatable."),
]
Request_ = Annotated[str, typer.Argument(metavar="REQUEST", help="What the story should be, in words.")]


def main() -> None:
    """Entry point of `interleave` and of `python -m interleave`."""
    run_cli(app, "interleave")


# --- run and batch ---------------------------------------------------------------------------------------------------


@app.command()
def run(
    request: Request_,
    image: Images = None,
    configs: Configs = None,
    sets: Sets = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the run folder.")] = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Tell one story. Steps appear as they are drawn and judged; the run folder holds every attempt, all pictures and
    an HTML page. Without a configuration the miniature tells it, on a CPU in seconds. After a kill or Ctrl-C
    `interleave batch --resume RUN` goes on where it stopped.

    Example:

    \b
      interleave run "draw a red circle, then add a blue square on its right, then make the circle green"
      interleave run "make the circle green" --image circle.png
      interleave run "four pictures on how rain forms" -c configs/interleave/klein_qwen3vl.yaml --set seed=3
    """
    with _busy("loading"):
        config = _load(configs, sets)
        from imgen_common.runs import free_path
        from interleave import requests, session

        path = free_path(runs, name, session.slug(request))
        session.create(path, config, sys.argv, lambda store: [requests.request(request, image or [], store)])
    _go_on(path, config, as_json, one=True)


@app.command()
def batch(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help='JSON lines: {"text": ..., "id": ..., "images": [...]}.')
    ] = None,
    configs: Configs = None,
    sets: Sets = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Name of the run folder.")] = None,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Go on with a run of either command.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="With --resume: try stories again that ended early.")] = False,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Tell many stories at once. What fails in one touches no other; a killed run goes on with --resume, and its
    records are those of a run that was not killed. The exit code is 1 where a story did not become complete.

    Example:

    \b
      interleave batch requests.jsonl
      interleave batch requests.jsonl --set loop.concurrency=64 --set loop.max_attempts=5
      interleave batch --resume runs/requests
      interleave batch --resume runs/requests --retry
    """
    with _busy("loading"):
        from imgen_common.runs import find_run, free_path
        from interleave import requests, session

        if (file is None) == (resume is None):
            raise UserError("give a FILE of requests to begin, or --resume RUN to go on (one of the two)")
        if retry and resume is None:
            raise UserError("--retry goes with --resume RUN: it tries the failed stories of that run again")
        if resume is not None:
            path = find_run(resume, runs)
            config = _load([path / "config.yaml", *(configs or [])], sets)
        else:
            assert file is not None
            config = _load(configs, sets)
            path = free_path(runs, name, file.stem)
            source = file
            session.create(path, config, sys.argv, lambda store: requests.read_file(source, store))
    _go_on(path, config, as_json, one=False, retry=retry)


def _go_on(path: Path, config: "RunConfig", as_json: bool, one: bool, retry: bool = False) -> None:
    """Run what is left of a run folder, show it, write its page."""
    from interleave import requests, session, show
    from interleave.report import write_report
    from interleave.store import PICTURES, PictureStore, read_trace

    out = show.console()
    total = len(requests.saved(path))
    tell: Callable[[Record], None] = show.Telling(out) if one else show.Counting(out, total)
    if as_json:
        tell = show.json_lines(lambda line: print(line, flush=True))
    try:
        trajectories = session.run_and_close(path, config, sys.argv, tell, retry)
    except KeyboardInterrupt:
        print(f"stopped; go on with: interleave batch --resume {path}", file=sys.stderr)
        raise
    attempts = [a for recorded in read_trace(path).values() for a in recorded.attempts.values()]
    page = write_report(path)
    if as_json:
        print(json.dumps({"type": "Run", "path": str(path), "report": str(page)}))
    else:
        if one:
            show.story(trajectories[0], attempts, PictureStore(path / PICTURES), out)
        show.summary(trajectories, attempts, path, out)
        out.print(f"report: {page}")
    _exit(trajectories)


def _exit(trajectories: "list[Trajectory]") -> None:
    if any(trajectory.status != "complete" for trajectory in trajectories):
        raise typer.Exit(1)


# --- plan, report ----------------------------------------------------------------------------------------------------


@app.command()
def plan(
    request: Request_,
    image: Images = None,
    configs: Configs = None,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Print the planner's steps for a request, and draw nothing.

    Example:

    \b
      interleave plan "draw a red circle, then make it green"
      interleave plan "draw a red circle, then make it green" --json
    """
    with _busy("loading"):
        config = _load(configs, sets)
        import asyncio
        import tempfile

        from interleave import requests, session, show
        from interleave.store import PictureStore

        with tempfile.TemporaryDirectory() as folder:
            store = PictureStore(Path(folder))
            asked = requests.request(request, image or [], store)
            record = asyncio.run(session.plan_only(config, asked, [store.get(i) for i in asked.image_ids]))
    if as_json:
        print(record.model_dump_json())
    elif record.plan is not None:
        show.plan(record.plan, show.console())
    if record.plan is None:
        error = record.planner.error if record.planner else "no plan"
        raise UserError(f"the planner gave no plan that can be used ({error}); try another --set seed=N or planner")


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, finished or not.")],
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Write the HTML page of a run anew: the stories, and under each step its attempts, verdicts and reasons.

    Example: interleave report runs/requests
    """
    from imgen_common.runs import find_run
    from interleave.report import write_report

    page = write_report(find_run(run, runs))
    print(page)
    if open_page:
        typer.launch(str(page))


# --- serve and demo --------------------------------------------------------------------------------------------------


@app.command()
def serve(
    configs: Configs = None,
    sets: Sets = None,
    engine: Annotated[
        str, typer.Option(metavar="local|ray", help="Worker processes on this machine, or Ray Serve replicas.")
    ] = "local",
) -> None:
    """Serve the generator over HTTP: one worker per device, like requests batched, a bounded queue, metrics. It listens
    on this machine only, unless told otherwise; then it needs a token in INTERLEAVE_SERVE_TOKEN.

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


@app.command()
def demo(
    configs: Configs = None,
    sets: Sets = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 7860,
    runs: Runs = Path("runs"),
) -> None:
    """Serve a page on which a story can be asked for and is told step by step (extra `demo`).

    Example: interleave demo --port 7861
    """
    with _busy("loading"):
        config = _load(configs, sets)
        from interleave import demo, session
    demo.launch(lambda: session.Storytelling(config, session.make_parts(config), runs), host, port)


# --- data and training -----------------------------------------------------------------------------------------------

app.add_typer(data_app, name="data")
app.command()(training.sft)
app.command()(training.grpo)


# --- common ----------------------------------------------------------------------------------------------------------


def _load(configs: list[Path] | None, sets: list[str] | None) -> "RunConfig":
    from imgen_common.config import load
    from interleave.config import RunConfig

    return load(RunConfig, configs or [], sets or [])


@contextmanager
def _busy(text: str) -> Iterator[None]:
    """A turning mark on standard error, where that is a terminal: libraries take seconds to load."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield
