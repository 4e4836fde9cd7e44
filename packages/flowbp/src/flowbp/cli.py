"""The command `flowbp`.  Nothing heavy is imported before a command runs, so that `--help` answers at once."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from imgen_common.errors import UserError, run_cli

if TYPE_CHECKING:
    from flowbp.benchmark import Benchmark
    from flowbp.config import TrainConfig
    from flowbp.inference import Subject
    from flowbp.launch import Job
    from flowbp.plan import Plan
    from flowbp.progress import Silent
    from flowbp.tables import Row

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Align a text-to-image flow-matching model to a differentiable reward by reward backpropagation.\n\n"
    "Example: flowbp train",
)

Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the configuration; may be given again."),
]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder that holds the run folders.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines, and nothing else.")]


def main() -> None:
    """Entry point of `flowbp` and of `python -m flowbp`."""
    run_cli(app, "flowbp")


# --- train -----------------------------------------------------------------------------------------------------------


@app.command()
def train(
    configs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="CONFIG", help="YAML files, later ones over earlier ones; none: the miniature."),
    ] = None,
    sets: Sets = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Go on with a run, from its last checkpoint.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print what would be done, load no weights.")
    ] = False,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Train a model by reward backpropagation. Without arguments a miniature model of coloured shapes is trained on the
    CPU in minutes. The run folder holds configuration, metrics, checkpoints, evaluations before and after, and a
    report. Ctrl-C saves and stops; --resume goes on exactly where it stopped. Under torchrun and accelerate launch all
    processes share the batch, and with distributed.kind=fsdp2, zero2 or zero3 the weights.

    Example:

    \b
      flowbp train
      flowbp train --set method=flowbp_bridge --set method.coupling.alpha=0.3
      flowbp train my.yaml --set optim.lr=3e-5 --dry-run
      flowbp train --resume runs/flowbp_bridge
      torchrun --nproc_per_node 2 -m flowbp train
      torchrun --nproc_per_node 8 -m flowbp train my.yaml --set distributed.kind=fsdp2
    """
    with _told_once():
        _train(configs or [], sets or [], resume, dry_run, runs, as_json, int(os.environ.get("RANK", "0")) == 0)


def _train(
    files: list[Path], sets: list[str], resume: str | None, dry_run: bool, runs: Path, as_json: bool, is_main: bool
) -> None:
    _refuse_method_as_file(files)
    with _busy("checking"):
        from flowbp import launch
        from flowbp.config import TrainConfig
        from imgen_common.config import load
        from imgen_common.libraries import quiet_libraries
        from imgen_common.runs import find_run

        run_path = find_run(resume, runs) if resume else None
        config = launch.resumed_config(run_path, files, sets) if run_path else load(TrainConfig, files, sets)
        if run_path:
            launch.check_resume(run_path, config)
        path = run_path or launch.new_path(config, runs)
        quiet_libraries()
        launch.check_launcher(config.distributed.kind, os.environ)
        job = launch.check(config, int(os.environ.get("WORLD_SIZE", "1")))
        launch.check_disk(job, path, resume=run_path is not None)
    if not dry_run:
        _run(job, runs, run_path, as_json, is_main)
    elif is_main:
        _print_dry_run(job, path, as_json)


def _refuse_method_as_file(files: list[Path]) -> None:
    """`flowbp train refl` is nearly right: say what is."""
    for file in files:
        if not file.suffix and not file.exists():
            from flowbp.methods import METHODS

            if str(file) in METHODS:
                raise UserError(f"{file}: no such file; to choose the method write --set method={file}")


def _print_dry_run(job: "Job", path: Path, as_json: bool) -> None:
    from flowbp import launch, show

    numbers = launch.arithmetic(job)
    plan = job.plans[0]
    if as_json:
        content = {"run": str(path), "config": job.config.model_dump(mode="json"), "arithmetic": numbers}
        print(json.dumps(content | {"plan": _plan_json(plan)}))
        return
    show.dry_run(job.config, numbers, str(path))
    show.plan(job.config.method, plan, f"{job.config.method.name}: the plan of the first update")


def _plan_json(plan: "Plan") -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(plan) | {
        "num_gradient_forwards": plan.num_gradient_forwards,
        "num_plain_forwards": plan.num_plain_forwards,
    }


def _run(job: "Job", runs: Path, resume: Path | None, as_json: bool, is_main: bool) -> None:
    """Trains, and tells about it on the main process."""
    import torch
    from accelerate import Accelerator

    from flowbp import launch, progress
    from flowbp import train as training

    start = time.monotonic()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    run = launch.open_run(job, runs, ["flowbp", *sys.argv[1:]], accelerator, resume=resume)
    scores = [scorer.name for scorer in job.config.scorers]
    reporter = progress.reporter(job.config.num_updates, scores, is_main=is_main, as_json=as_json)
    if isinstance(reporter, progress.JsonLines):
        reporter.event("start", run=str(run.path), num_updates=job.config.num_updates)
    elif is_main:
        print(f"run folder: {run.path}", flush=True)
    try:
        with run, reporter:
            training.train(job.config, run, accelerator, reporter)
    except KeyboardInterrupt:
        if is_main:
            print(f"\nstopped; go on with: flowbp train --resume {run.path}", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        accelerator.end_training()
    if is_main:
        _finish(job.config, run.path, reporter, time.monotonic() - start)


def _finish(config: "TrainConfig", run: Path, reporter: "Silent", seconds: float) -> None:
    """The report, and what it says in short."""
    from flowbp import launch, progress, report, show
    from flowbp.compare import as_json

    page = report.write(run)
    found = launch.summary(run)
    if isinstance(reporter, progress.JsonLines):
        results = [{"guidance": scale, "scores": as_json(scores)} for scale, scores in found.items()]
        reporter.event("done", run=str(run), report=str(page), seconds=seconds, results=results)
        return
    print()
    show.summary(found, config.guidance.scale, "base", "trained")
    print(f"\n{progress.clock(seconds)}\nrun folder: {run}\nreport:     {page}")


@app.command()
def plan(
    configs: Annotated[
        list[Path] | None, typer.Argument(metavar="CONFIG", help="As of flowbp train; none: the miniature.")
    ] = None,
    sets: Sets = None,
    gpus: Annotated[int, typer.Option(help="Processes, one per GPU.", min=1)] = 1,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="What a GPU has, such as 24GiB or 80GB.")] = None,
    tflops: Annotated[float, typer.Option(help="Rate that a GPU is assumed to reach, in TFLOP/s.", min=0.001)] = 400.0,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Make two real updates here, and compare. Needs the weights.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what a run needs before it begins: memory of a GPU by part, arithmetic and time of an update, disk, licences.
    No weights are read and no GPU is needed: one step of every stage is traced with tensors that have shapes and no
    content. Where torch sees no GPU, what the CPU's operations would hold is counted. Allocators' fragments and
    the GPU's own context (about half a GB) come on top. With --memory it says whether it fits, and which settings
    would help most.

    Example:

    \b
      flowbp plan configs/flowbp/sd3_5_medium/lora_24gb.yaml --memory 24GiB
      flowbp plan configs/flowbp/flux1_dev/flowbp_bridge.yaml --gpus 8 --memory 80GB --set distributed.kind=fsdp2
      flowbp plan --calibrate
    """
    with _busy("tracing"):
        from flowbp import estimate, launch
        from flowbp.config import TrainConfig
        from flowbp.inference import device
        from imgen_common.config import load
        from imgen_common.libraries import quiet_libraries

        limit = estimate.size_of(memory) if memory else None
        quiet_libraries()

        def config_of(changes: Sequence[str] = ()) -> "TrainConfig":
            return load(TrainConfig, configs or [], [*(sets or []), *changes])

        job = launch.check(config_of(), gpus, here=calibrate)
        found = estimate.estimate(job)
        advice = estimate.advise(config_of, gpus, found.peak) if limit and found.peak > limit else None
        measured = estimate.measure(job.config, device()) if calibrate else None
    content = estimate.as_json(job, found, tflops, limit, advice, measured)
    if as_json:
        print(json.dumps(content))
        return
    from flowbp import show

    show.needs(content)


# --- methods and plans -----------------------------------------------------------------------------------------------


@app.command()
def methods(as_json: Json = False) -> None:
    """List the named methods. Each is a value on the same axes (what the reward sees, which steps carry gradient, with
    which weights, where the state itself does), so every key below `method` can be changed by --set.

    Example:

    \b
      flowbp methods
      flowbp methods --json
    """
    from flowbp.explain import methods_table

    rows = methods_table()
    if as_json:
        print(json.dumps(rows))
        return
    from flowbp import show

    show.methods(rows)


@app.command()
def explain(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="Name of a method (see flowbp methods).")],
    steps: Annotated[int | None, typer.Option(help="Denoising steps; by default 25.", min=2, max=1000)] = None,
    seed: Annotated[int, typer.Option(help="Seed of a run; its first plan is drawn.")] = 0,
    model: Annotated[
        str | None, typer.Option(metavar="REF", help="Take the noise levels of this model instead of linear ones.")
    ] = None,
    shift: Annotated[float, typer.Option(help="Shift of the linear noise levels; 1: none.")] = 1.0,
    sets: Sets = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the plan into this .png, .svg or .pdf too.")
    ] = None,
) -> None:
    """Draw one plan of a method and show it. It tells which steps carry gradient, with which weights, the legs and
    their quadrature nodes, where the state is coupled, what the reward sees, and how many network evaluations it takes.

    Example:

    \b
      flowbp explain flowbp_lagrange --seed 3
      flowbp explain flowbp_bridge --model builtin:shapes/generator --picture plan.png
      flowbp explain flowbp_sparse --set method.active.num_steps=6 --shift 3
    """
    from flowbp import show
    from flowbp.methods import get
    from flowbp.plan import plan as draw_plan
    from imgen_common.streams import numpy_generator

    kind = _picture_kind(picture)
    get(method)
    config = _explained(method, steps, sets or [])
    sigmas = _levels(config, model, shift)
    plan = draw_plan(config.method, sigmas, numpy_generator(seed, "plan", 0))
    heading = f"{method}: {plan.num_steps} steps, seed {seed}, {model or f'linear noise levels, shift {shift:g}'}"
    show.plan(config.method, plan, heading)
    if picture is not None:
        from flowbp.explain import picture as draw_picture

        picture.write_bytes(draw_picture(plan, heading, kind))
        print(f"\npicture: {picture}")


def _picture_kind(picture: Path | None) -> str:
    kind = picture.suffix.lstrip(".").lower() if picture else "png"
    if kind not in ("png", "svg", "pdf"):
        raise UserError(f"--picture {picture}: must end in .png, .svg or .pdf")
    if picture is not None and not picture.absolute().parent.is_dir():
        raise UserError(f"--picture {picture}: there is no folder {picture.parent}; make it first")
    return kind


def _explained(method: str, steps: int | None, sets: Sequence[str]) -> "TrainConfig":
    from flowbp.config import TrainConfig
    from imgen_common.config import load

    return load(TrainConfig, [], [f"method={method}", *sets, *([f"num_steps={steps}"] if steps else [])])


def _levels(config: "TrainConfig", model: str | None, shift: float) -> Sequence[float]:
    """Noise levels of a model, or linear ones."""
    from flowbp.explain import linear_grid

    if shift <= 0:
        raise UserError(f"--shift {shift:g}: must be above 0")
    if model is None:
        return linear_grid(config.num_steps, shift)
    if shift != 1:
        raise UserError("--shift: a model brings its own noise levels; give --model or --shift")
    from flowbp import backbones
    from imgen_common.libraries import quiet_libraries

    quiet_libraries()
    sigmas = backbones.skeleton(model).sigmas(config.num_steps, (config.model.height, config.model.width))
    return [float(sigma) for sigma in sigmas]


# --- pictures and scores ---------------------------------------------------------------------------------------------


@app.command()
def sample(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="What to draw; none: eight of the evaluation.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="REF", help="Model to draw with.")] = None,
    run: Annotated[str | None, typer.Option(metavar="RUN", help="Run whose trained model to draw with.")] = None,
    base: Annotated[bool, typer.Option("--base", help="With --run: the model as it was before training.")] = False,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1, max=1000)] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1: none.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture of every prompt.")] = 0,
    num: Annotated[int, typer.Option(help="Pictures per prompt, from consecutive seeds.", min=1, max=256)] = 4,
    size: Annotated[int | None, typer.Option(help="Height and width in pixels.", min=8, max=4096)] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the pictures.")] = Path("pictures"),
    runs: Runs = Path("runs"),
) -> None:
    """Draw pictures with a model or a run. Each is saved, and all of them as one grid. A seed gives the
    picture that the model's diffusers pipeline draws with generator=torch.Generator().manual_seed(seed). Files that
    exist are kept; new ones are numbered on.

    Example:

    \b
      flowbp sample "a red circle left of a blue square" --run runs/flowbp_bridge
      flowbp sample "a red circle left of a blue square" --run runs/flowbp_bridge --base
      flowbp sample "two green triangles" --model builtin:shapes/generator --guidance 2 --seed 7
    """
    with _busy("loading"):
        from flowbp import inference

        one = inference.subject(_run_or_model(run, model, base), runs, base=base)
        scale = one.config.guidance.scale if guidance is None else guidance
        inference.check_scale(scale)
        texts = prompts or inference.evaluation_prompts(one.config)[:8]
    shape = (size, size) if size else (one.config.model.height, one.config.model.width)
    grid = _draw(one, texts, range(seed, seed + num), shape, steps or one.config.eval.steps, scale, out)
    print(f"{len(texts) * num} pictures of {one.label} at guidance {scale:g} in {out}\ngrid: {grid}")


def _draw(
    one: "Subject", texts: list[str], seeds: range, shape: tuple[int, int], steps: int, scale: float, out: Path
) -> Path:
    """Writes the pictures and their grid; returns the grid's file."""
    from flowbp import inference
    from imgen_common.libraries import quiet_libraries

    quiet_libraries()
    backbone = one.load(inference.device())
    number, rows = inference.next_number(out), []
    out.mkdir(parents=True, exist_ok=True)
    with _bar() as tick:
        for place, prompt in enumerate(texts):
            names = [f"{number + place:03d}-{inference.slug(prompt)}-seed{seed}.png" for seed in seeds]
            rows += inference.save(inference.draw(backbone, prompt, seeds, shape, steps, scale), out, names)
            tick(one.label, place + 1, len(texts))
    grid = out / f"{number:03d}-grid.png"
    inference.save_grid(rows, grid, len(seeds))
    return grid


def _run_or_model(run: str | None, model: str | None, base: bool) -> str:
    if run and model:
        raise UserError("--run and --model: give one of them")
    if base and not run:
        raise UserError("--base: is for --run; a model given by --model is untrained already")
    return run or model or "builtin:shapes/generator"


@app.command("eval")
def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, or a model reference.")],
    against: Annotated[
        str | None, typer.Option(metavar="RUN_OR_MODEL", help="What to compare with; of a run: its base model.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Prompts, as eval.prompts: builtin:shapes/test or a file.")
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(help="How many of them.", min=1)] = None,
    guidance: Annotated[list[float] | None, typer.Option(help="Guidance scale; may be given again.")] = None,
    sets: Sets = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Score a model, or compare two. Same prompts, same seeds: reward, held-out reward and, for prompts of the shapes
    world, the verifier by category. Differences come with paired 95 % bootstrap intervals over prompts. A run
    is compared with the model it started from.

    Example:

    \b
      flowbp eval runs/flowbp_bridge
      flowbp eval runs/flowbp_bridge --against runs/refl --guidance 1 --guidance 2
      flowbp eval builtin:shapes/generator --num-prompts 120 --json
    """
    with _busy("loading"):
        from flowbp import inference

        for scale in guidance or []:
            inference.check_scale(scale)
        extra = (("prompts", prompts), ("num_prompts", num_prompts), ("guidance", guidance))
        given = [f"eval.{key}={json.dumps(value)}" for key, value in extra if value]
        subjects = [inference.subject(target, runs, [*(sets or []), *given])]
        if against:
            subjects.insert(0, inference.subject(against, runs))
        elif subjects[0].run is not None:
            subjects.insert(0, inference.subject(target, runs, base=True))
    config = subjects[-1].config
    _print_scores([one.label for one in subjects], _score(subjects, config), config, as_json)


def _score(subjects: list["Subject"], config: "TrainConfig") -> list[Any]:
    """Evaluations of every subject by guidance scale."""
    from flowbp import inference
    from flowbp.train import load_rewards
    from imgen_common.libraries import quiet_libraries

    texts = inference.evaluation_prompts(config)
    quiet_libraries()
    scorers = load_rewards(config, inference.device())
    with _bar() as tick:
        return [inference.score(one, texts, scorers, config, config.eval.guidance, tick) for one in subjects]


def _print_scores(labels: list[str], found: list[Any], config: "TrainConfig", as_json: bool) -> None:
    from flowbp import inference, show

    if as_json:
        print(json.dumps({"prompts": config.eval.prompts, "results": inference.results(labels, found)}))
    elif len(found) == 1:
        show.levels(*inference.single(found[0]), labels[0])
    else:
        pairs, groups = inference.paired(*found)
        show.summary(pairs, None, *labels)
        for scale, changed in groups.items():
            if changed:
                show.categories(changed, f"Verifier by category at guidance {scale:g}")


@app.command()
def benchmark(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, or a model reference.")],
    prompts: Annotated[str, typer.Option(metavar="FILE", help="Prompts (.txt, .jsonl), or GenEval's metadata.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to make, or to go on with.")],
    protocol: Annotated[str, typer.Option(help="hpdv2 (prompts and rewards) or geneval.")] = "hpdv2",
    scores: Annotated[
        list[str] | None,
        typer.Option("--score", metavar="[NAME:]KIND=REF", help="What scores the pictures; may be given again."),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="URL", help="Endpoint for ur_align and ur_iq; its key: FLOWBP_JUDGE_KEY.")
    ] = None,
    colours: Annotated[str | None, typer.Option(metavar="REF", help="GenEval's CLIP ViT-L/14.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Of a run: the model as it was before training.")] = False,
    images: Annotated[int | None, typer.Option(help="Pictures per prompt; hpdv2: 1, geneval: 4.", min=1)] = None,
    num_prompts: Annotated[int | None, typer.Option(help="Only the first ones.", min=1)] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1: none.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1, max=1000)] = None,
    size: Annotated[int | None, typer.Option(help="Height and width in pixels.", min=8, max=4096)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Pictures at a time; results differ by rounding at most.", min=1)] = 4,
    sets: Sets = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Draw and score a whole prompt file as the papers do. Prints their table with 95 % intervals and keeps pictures,
    scores, table.md and table.json in --out. Given again the command goes on where it stopped; scores may be added to
    pictures that are there. Under torchrun the processes share the work. Kinds of scores: rewards (clip, clipscore,
    hpsv2, ...), ur_align and ur_iq (REF: the name under which --judge serves UnifiedReward), geneval (REF: a
    Mask2Former of COCO instances).

    Example:

    \b
      flowbp benchmark builtin:shapes/generator --prompts builtin:shapes/test --num-prompts 100 --out scores/base \\
        --score clip=builtin:shapes/reward
      flowbp benchmark my-run --prompts hpdv2.txt --out hpdv2/my-run --score hpsv2=rewards/hpsv2 \\
        --score pickscore:clip=yuvalkirstain/PickScore_v1 --score ur_iq=UnifiedReward --judge $JUDGE_URL
      torchrun --nproc_per_node 8 -m flowbp benchmark my-run --protocol geneval --prompts evaluation_metadata.jsonl \\
        --out geneval/my-run --score geneval=mask2former-swin-small-coco-instance --colours clip-vit-large-patch14
    """
    with _busy("loading"), _told_once():
        from typing import get_args

        from flowbp import benchmark as work
        from flowbp import inference
        from imgen_common.libraries import quiet_libraries

        _one_of("--protocol", protocol, get_args(work.Protocol))
        quiet_libraries()
        shape = [f"model.height={size}", f"model.width={size}"] if size else []
        one = inference.subject(target, runs, [*(sets or []), *shape], base=base)
        scale = one.config.guidance.scale if guidance is None else guidance
        inference.check_scale(scale)
        kind = cast(work.Protocol, protocol)
        texts = work.read_prompts(kind, prompts, one.config.data.key, num_prompts)
        scorers = [work.parse_scorer(text, colours) for text in scores or []]
        numbers = {"images": images or work.IMAGES[kind], "steps": steps or one.config.eval.steps, "seed": seed}
        config = work.configuration(one, kind, prompts, texts, scorers, guidance=scale, **numbers)
        work.check(config, judge)
    with _told_once():
        _benchmark(work.Benchmark(one, config, texts, out, batch_size, judge), as_json)


def _benchmark(given: "Benchmark", as_json: bool) -> None:
    """Does what is missing, and shows the table on the main process."""
    from dataclasses import replace
    from datetime import timedelta

    import torch
    from accelerate import PartialState

    from flowbp import benchmark, tables

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    own = replace(given, device=state.device, rank=state.process_index)
    try:
        with _bar() if state.is_main_process else nullcontext(own.tick) as tick:
            benchmark.run(replace(own, tick=tick), ["flowbp", *sys.argv[1:]], state)
    except KeyboardInterrupt:
        if state.is_main_process:
            print("\nstopped; the same command goes on", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        state.destroy_process_group()
    if state.is_main_process:
        _print_table([tables.write(own.out)], as_json)


@app.command()
def table(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER", help="Folders of flowbp benchmark.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """Show folders of flowbp benchmark as one table, a row each. Columns are the papers': rewards, or GenEval's tasks,
    with 95 % bootstrap intervals over prompts. A folder that is not finished is shown as far as it is, and said so.

    Example:

    \b
      flowbp table geneval/base geneval/my-run
      flowbp table hpdv2/* --markdown
    """
    from flowbp import tables

    rows = [tables.row_of(folder) for folder in folders]
    if markdown:
        print(tables.markdown(rows), end="")
    else:
        _print_table(rows, as_json)


def _print_table(rows: "Sequence[Row]", as_json: bool) -> None:
    if as_json:
        from flowbp import tables

        print(json.dumps(tables.as_json(rows)))
        return
    from flowbp import show

    show.benchmark(rows)


@contextmanager
def _told_once() -> Iterator[None]:
    """Of an error that all processes have, only the first one tells."""
    try:
        yield
    except UserError:
        if os.environ.get("RANK", "0") == "0":
            raise
        raise typer.Exit(2) from None


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """tick(label, done, total): a progress bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("loading", total=None)

        def tick(label: str, done: int, total: int) -> None:
            bar.update(task, description=label, completed=done, total=total)

        yield tick


@contextmanager
def _busy(text: str) -> Iterator[None]:
    """A turning mark on standard error, where that is a terminal: libraries take seconds to load."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


# --- reports and downloads -------------------------------------------------------------------------------------------


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, finished or not.")],
    open_page: Annotated[bool, typer.Option("--open", help="Open the report in the browser.")] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Write the report of a run anew. RUN/report.html is one page without outside parts, with the result
    before and after, pictures at equal seeds, categories, curves, a plan, configuration and environment.

    Example:

    \b
      flowbp report runs/flowbp_bridge --open
    """
    from flowbp import report as reports
    from imgen_common.runs import find_run

    page = reports.write(find_run(run, runs))
    print(page)
    if open_page:
        import webbrowser

        webbrowser.open(page.absolute().as_uri())


@app.command()
def prefetch(
    refs: Annotated[list[str], typer.Argument(metavar="REF", help="org/name[@revision], a folder or builtin:...")],
) -> None:
    """Download models for use without a network. Checks that they are whole, and prints the folder of each.

    Example:

    \b
      flowbp prefetch black-forest-labs/FLUX.2-klein-base-4B yuvalkirstain/PickScore_v1
    """
    from imgen_common import hub

    for ref in refs:
        print(hub.prefetch(ref))


@app.command("export")
def export_run(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or its name under --runs.")],
    to: Annotated[str, typer.Option("--to", help="diffusers or comfyui (adapters), or merged (a whole pipeline).")],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The folder to make; RUN/export-FORMAT.")] = None,
    weights: Annotated[str, typer.Option(help="average (what was evaluated) or last.")] = "average",
    step: Annotated[int | None, typer.Option(help="Checkpoint to take, by its update; by default the last.")] = None,
    push: Annotated[str | None, typer.Option(metavar="ORG/NAME", help="Upload it there; needs HF_TOKEN.")] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Write what a run trained in files that others load, with a model card: configuration, scores, licences. The
    averaged weights are written, which are what the run evaluated, unless --weights says otherwise.

    Example:

    \b
      flowbp export miniature-lora --to diffusers
      flowbp export sd3_5_medium-lora --to comfyui --out my-lora --step 150
      flowbp export flowbp_bridge --to merged --push me/my-model
    """
    with _busy("exporting"):
        from typing import get_args

        from flowbp import export
        from imgen_common.libraries import quiet_libraries
        from imgen_common.runs import find_run

        _one_of("--to", to, get_args(export.Format))
        _one_of("--weights", weights, get_args(export.Kept))
        quiet_libraries()
        path = find_run(run, runs)
        form, kept = cast(export.Format, to), cast(export.Kept, weights)
        folder = export.export(path, form, out or path / f"export-{to}", kept, step)
    print(folder)
    if push is not None:
        print(export.push(folder, push))


def _one_of(option: str, given: str, allowed: Sequence[str]) -> None:
    """Raises UserError with the nearest name unless `given` is allowed."""
    from imgen_common.errors import nearest

    if given not in allowed:
        raise UserError(f"{option} {given!r}: unknown{nearest(given, allowed)}; allowed: {', '.join(allowed)}")


@app.command("convert-reward")
def convert_reward(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="hpsv2, hpsv3, imagereward or aesthetic.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The published checkpoint (.pt, .pth, .safetensors).")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    companion: Annotated[
        str,
        typer.Option(
            "--with",
            metavar="REF",
            help="Where the checkpoint's other half is: for hpsv2 any CLIP tokenizer, for hpsv3 Qwen2-VL-7B-Instruct, "
            "for imagereward the tokenizer of bert-base-uncased, for aesthetic the whole CLIP ViT-L/14.",
        ),
    ],
    prompt_source: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="For hpsv3 only, and needed there: hpsv3/dataset/data_collator_qwen.py of the published package hpsv3 "
            "1.0.0, for the words around a prompt. It is parsed, not run.",
        ),
    ] = None,
) -> None:
    """Make a published reward checkpoint, often a pickle, a folder of safetensors that rewards.0.ref can name. Only
    tensors in plain containers are read from it; nothing in it is run. PickScore and CLIP need no conversion.

    Example:

    \b
      flowbp convert-reward hpsv2 HPS_v2.1_compressed.pt rewards/hpsv2 --with openai/clip-vit-large-patch14
      flowbp convert-reward hpsv3 HPSv3.safetensors rewards/hpsv3 --with Qwen/Qwen2-VL-7B-Instruct \\
        --prompt-source hpsv3/dataset/data_collator_qwen.py
      flowbp convert-reward imagereward ImageReward.pt rewards/imagereward --with bert-base-uncased
      flowbp train --set rewards.0.score=hpsv2 --set rewards.0.ref=rewards/hpsv2
    """
    with _busy("converting"):
        from typing import get_args

        from flowbp.rewards.convert import Convertible, convert
        from imgen_common.libraries import quiet_libraries

        _one_of("KIND", kind, get_args(Convertible))
        quiet_libraries()
        folder = convert(cast(Convertible, kind), file, companion, out, prompt_source)
    print(folder)
