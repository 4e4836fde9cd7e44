"""`interleave run`, `batch`, `plan` and `report`."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imgen_common.errors import UserError

if TYPE_CHECKING:
    from interleave.loop.config import RunConfig
    from interleave.records import Record, Trajectory


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


# --- run and batch ---------------------------------------------------------------------------------------------------


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
    with spinner("loading"):
        config = load_run_config(configs, sets)
        from imgen_common.run_folder.find import free_path
        from interleave.loop import requests
        from interleave.loop import run as session

        path = free_path(runs, name, session.slug(request))
        session.create_run(path, config, sys.argv, lambda store: [requests.make_request(request, image or [], store)])
    _go_on(path, config, as_json, one=True)


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
    with spinner("loading"):
        from imgen_common.run_folder.find import find_run, free_path
        from interleave.loop import requests
        from interleave.loop import run as session

        if (file is None) == (resume is None):
            raise UserError("give a FILE of requests to begin, or --resume RUN to go on (one of the two)")
        if retry and resume is None:
            raise UserError("--retry goes with --resume RUN: it tries the failed stories of that run again")
        if resume is not None:
            path = find_run(resume, runs)
            config = load_run_config([path / "config.yaml", *(configs or [])], sets)
        else:
            assert file is not None
            config = load_run_config(configs, sets)
            path = free_path(runs, name, file.stem)
            source = file
            session.create_run(path, config, sys.argv, lambda store: requests.read_requests(source, store))
    _go_on(path, config, as_json, one=False, retry=retry)


def _go_on(path: Path, config: "RunConfig", as_json: bool, one: bool, retry: bool = False) -> None:
    """Run what is left of a run folder, show it, write its page."""
    from interleave.cli import console
    from interleave.loop import requests
    from interleave.loop import run as session
    from interleave.pages.run import write_report
    from interleave.storage.images import IMAGES, ImageStore
    from interleave.storage.trace import read_trace

    out = console.console()
    total = len(requests.load_requests(path))
    tell: Callable[[Record], None] = console.Telling(out) if one else console.Counting(out, total)
    if as_json:
        tell = console.json_lines(lambda line: print(line, flush=True))
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
            console.story(trajectories[0], attempts, ImageStore(path / IMAGES), out)
        console.summary(trajectories, attempts, path, out)
        out.print(f"report: {page}")
    _exit(trajectories)


def _exit(trajectories: "list[Trajectory]") -> None:
    if any(trajectory.status != "complete" for trajectory in trajectories):
        raise typer.Exit(1)


# --- plan, report ----------------------------------------------------------------------------------------------------


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
    with spinner("loading"):
        config = load_run_config(configs, sets)
        import asyncio
        import tempfile

        from interleave.cli import console
        from interleave.loop import requests
        from interleave.loop import run as session
        from interleave.storage.images import ImageStore

        with tempfile.TemporaryDirectory() as folder:
            store = ImageStore(Path(folder))
            asked = requests.make_request(request, image or [], store)
            record = asyncio.run(session.plan_only(config, asked, [store.get(i) for i in asked.image_ids]))
    if as_json:
        print(record.model_dump_json())
    elif record.plan is not None:
        console.plan(record.plan, console.console())
    if record.plan is None:
        error = record.planner.error if record.planner else "no plan"
        raise UserError(f"the planner gave no plan that can be used ({error}); try another --set seed=N or planner")


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, finished or not.")],
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Write the HTML page of a run anew: the stories, and under each step its attempts, verdicts and reasons.

    Example: interleave report runs/requests
    """
    from imgen_common.run_folder.find import find_run
    from interleave.pages.run import write_report

    page = write_report(find_run(run, runs))
    print(page)
    if open_page:
        typer.launch(str(page))


# --- common ----------------------------------------------------------------------------------------------------------


def load_run_config(configs: list[Path] | None, sets: list[str] | None) -> "RunConfig":
    from imgen_common.config import load
    from interleave.loop.config import RunConfig

    return load(RunConfig, configs or [], sets or [])


@contextmanager
def spinner(text: str) -> Iterator[None]:
    """A turning mark on standard error, where that is a terminal: libraries take seconds to load."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield
