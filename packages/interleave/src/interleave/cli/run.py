"""The commands `interleave run`, `batch`, `plan` and `report`.  Nothing heavy is imported before one runs."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from imgen_common.console import spinner
from imgen_common.errors import UserError, quoted, written_or_warned
from imgen_common.shutdown import message_when_stopped
from interleave.cli.options import Configs, Json, Name, Runs, Sets, Shard

if TYPE_CHECKING:
    from interleave.loop.config import RunConfig
    from interleave.records import Record

Images = Annotated[
    list[Path] | None,
    typer.Option("--image", "-i", metavar="FILE", help="An image that belongs to the request; may be repeated."),
]
MAKERS = ("interleave batch", "interleave run", "interleave demo", "interleave benchmark")
"""Commands whose run folders hold stories."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
Request_ = Annotated[str, typer.Argument(metavar="REQUEST", help="What the story is about.")]


def run(
    request: Request_,
    configs: Configs = None,
    image: Images = None,
    sets: Sets = None,
    name: Name = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Make one story. Each step is printed when its image has been generated and judged; the run folder holds all
    attempts, all images and an HTML page. Without a configuration the miniature is used, which takes seconds on a CPU.
    After a kill or Ctrl-C, `interleave batch --resume RUN` continues the run.

    Example:

    \b
      interleave run "draw a yellow circle, then make it red, then add a blue square below it"
      interleave run "make the circle green" --image circle.png --set planner.kind=none
      interleave run "four images on how rain forms" configs/interleave/klein_qwen3vl.yaml --set seed=3
    """
    with spinner("loading"):
        if file := next((file for file in configs or [] if file.suffix.lower() in IMAGE_SUFFIXES), None):
            raise UserError(f"{file}: an image in the place of a CONFIG; write --image before each image")
        from imgen_common.run_folder.find import free_path
        from imgen_common.tables import check_no_table

        check_no_table(request, "interleave batch takes a file of requests")
        config = load_run_config(configs, sets)
        from interleave.loop import requests
        from interleave.loop import run as session

        path = free_path(runs, name, session.slug(request))
        session.create_run(path, config, lambda store: [requests.make_request(request, image or [], store)])
    _resume(path, config, as_json, one=True, is_new=True)


def batch(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help='Rows of {"text": ..., "id": ..., "images": [...]}, or lines of text.'),
    ] = None,
    configs: Configs = None,
    sets: Sets = None,
    name: Name = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Resume a run; CONFIG files override its own.")
    ] = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="With --resume: try failed stories, and lost scores of a judge, again.")
    ] = False,
    shard: Shard = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Make many stories at once. A failure in one story does not affect the others. --resume continues a killed run,
    and its records equal those of a run that was not killed. The exit code is 1 if a story is not complete. FILE is
    .jsonl, a .json array, .csv or .tsv with the columns text, id and category, or .txt with a request in each line.

    Example:

    \b
      interleave batch requests.jsonl
      interleave batch requests.txt
      interleave batch requests.jsonl --set loop.concurrency=64 --set loop.max_attempts=5
      interleave batch --resume runs/requests
      interleave batch --resume runs/requests --retry
      interleave batch requests.jsonl --shard 1/2
    """
    with spinner("loading"):
        from imgen_common.run_folder.find import find_run, free_path
        from interleave.loop import requests, shards
        from interleave.loop import run as session

        if resume is not None and file is not None and file.suffix in (".yaml", ".yml"):
            configs, file = [file, *(configs or [])], None  # a resumed run has its requests: each argument is a CONFIG
        if (file is None) == (resume is None):
            raise UserError("give a FILE of requests to start a run, or --resume RUN to continue one (one of the two)")
        if shard is not None and resume is not None:
            raise UserError("--shard: a resumed run has its part of the requests; leave it out")
        if name is not None and resume is not None:
            raise UserError(f"--name {name}: is for a new run; leave it out, or leave --resume out")
        if retry and resume is None:
            raise UserError("--retry goes with --resume RUN: it tries the failed stories of that run again")
        if resume is not None:
            path = find_run(resume, runs, *MAKERS)
            config = load_run_config([path / "config.yaml", *(configs or [])], sets)
        else:
            assert file is not None
            config = load_run_config(configs, sets)
            part = shards.Shard.parse(shard or "1/1")
            path = free_path(runs, name, f"{file.stem}-{part.part}" if part.part else file.stem)
            session.create_run(path, config, lambda store: part.of(requests.read_requests(file, store)))
            part.record(path)
    _resume(path, config, as_json, one=False, retry=retry, is_new=resume is None)


def merge(
    folders: Annotated[list[Path], typer.Argument(metavar="SHARD...", help="Folders of all parts.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to create.")],
    as_json: Json = False,
) -> None:
    """Make one folder of the parts of a batch or of a build (--shard): their records, images and answers of judges, as
    if one machine had made them all. Resuming it does what is left, and makes sets and pages of the whole.

    Example:

    \b
      interleave merge runs/requests-1-of-2 runs/requests-2-of-2 --out runs/all
      interleave merge sets/part-1 sets/part-2 --out sets/all
      interleave data build --resume sets/all
    """
    with spinner("merging"):
        from interleave.loop.shards import merge_shards

        count = merge_shards(folders, out)
    made = {"type": "Merged", "path": str(out), "requests": count}
    print(json.dumps(made) if as_json else f"{count} requests: {out}")


def _resume(
    path: Path, config: "RunConfig", as_json: bool, one: bool, retry: bool = False, is_new: bool = False
) -> None:
    """Runs what is left of a run folder, prints it and writes its page."""
    from interleave.cli import console
    from interleave.loop import requests
    from interleave.loop import run as session
    from interleave.pages.run import write_report
    from interleave.storage.images import IMAGES, ImageStore
    from interleave.storage.trace import read_trace

    out = console.open_console()
    asked, recorded = requests.load_requests(path), read_trace(path, forget_whole=True).values()
    ended = [entry.trajectory for entry in recorded if entry.trajectory is not None]
    num_done = sum(trajectory.is_whole or not retry for trajectory in ended)
    on_record: Callable[[Record], None] = console.print_json
    if not as_json:
        on_record = console.ProgressPrinter(out) if one else console.BatchProgressPrinter(out, len(asked), num_done)
    again = " --retry" if retry else ""
    with message_when_stopped(lambda: f"stopped; continue with: interleave batch --resume {quoted(path)}{again}"):
        trajectories = session.run_and_close(path, config, sys.argv, on_record, retry, is_new=is_new)
    attempts = [a for recorded in read_trace(path).values() for a in recorded.attempts.values()]
    page = written_or_warned(lambda: write_report(path), f"interleave report {quoted(path)}")
    if as_json:
        print(json.dumps({"type": "Run", "path": str(path), "report": page and str(page)}))
    else:
        if one:
            console.print_story(trajectories[0], attempts, ImageStore(path / IMAGES), out)
        console.print_summary(trajectories, attempts, path, out)
        out.print(f"report: {console.sanitize(str(page or 'not written'))}", soft_wrap=True)
    if any(trajectory.status != "complete" for trajectory in trajectories):
        raise typer.Exit(1)


def plan(
    request: Request_, configs: Configs = None, image: Images = None, sets: Sets = None, as_json: Json = False
) -> None:
    """Print the planner's steps for a request; no image is generated.

    Example:

    \b
      interleave plan "draw a red circle, then make it green"
      interleave plan "draw a red circle, then make it green" --json
    """
    with spinner("loading"):
        import asyncio
        import tempfile

        from imgen_common.tables import check_no_table

        check_no_table(request, "give one request, in quotation marks")
        config = load_run_config(configs, sets)
        from interleave.cli import console
        from interleave.loop import requests
        from interleave.loop import run as session
        from interleave.storage.images import ImageStore

        with tempfile.TemporaryDirectory() as folder:
            store = ImageStore(Path(folder))
            asked = requests.make_request(request, image or [], store)
            record = asyncio.run(session.plan_only(config, asked, [store.get(i) for i in asked.image_ids]))
    if as_json:
        print(json.dumps(record.model_dump(mode="json")))  # as an escape also half a surrogate pair
    elif record.plan is not None:
        console.print_plan(record, console.open_console())
    if record.plan is None:
        error = record.planner.error if record.planner else "no plan"
        has_answered = record.planner is None or record.planner.error_kind is None
        advice = "try --set seed=N or another planner" if has_answered else "correct that, or choose another planner"
        raise UserError(f"the planner gave no usable plan ({error}); {advice}")


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, finished or not.")],
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the page there; default: report.html of the run.")
    ] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Write the HTML page of a run: the stories, and under each step its attempts with verdicts and reasons.

    Example: interleave report runs/requests
    """
    from imgen_common.run_folder.find import TOLD, find_run
    from interleave.pages.run import write_report

    page = write_report(find_run(run, runs, *MAKERS, TOLD), out)
    print(f"report: {page}")
    if open_page:
        typer.launch(str(page))


def load_run_config(configs: list[Path] | None, sets: list[str] | None) -> "RunConfig":
    from imgen_common.config import load
    from interleave.loop.config import RunConfig

    return load(RunConfig, configs or [], sets or [])
