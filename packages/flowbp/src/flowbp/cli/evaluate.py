"""`flowbp sample`, `flowbp eval`, `flowbp benchmark` and `flowbp table`."""

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowbp.cli.options import Json, Runs, Sets, Steps, checked_sets, print_notes, progress_bar, report_error_once
from imgen_common.console import spinner
from imgen_common.devices import announce_process
from imgen_common.errors import UserError, check_choice
from imgen_common.shutdown import message_when_stopped

if TYPE_CHECKING:
    from flowbp.evaluation.benchmarks.run import Benchmark
    from flowbp.evaluation.benchmarks.tables import BenchmarkRow

MAX_SEED = 2**63 - 1
"""Largest seed that a torch generator takes together with its negative."""
OF_EVAL = ("seed", "prompts", "num_prompts", "batch_size")
"""Keys of `eval` for which `flowbp benchmark` has options of the same names."""


def sample(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="Prompts, each in quotation marks.")],
    model: Annotated[str | None, typer.Option(metavar="REF", help="Generate with this model.")] = None,
    run: Annotated[str | None, typer.Option(metavar="RUN", help="Generate with the trained model of this run.")] = None,
    base: Annotated[bool, typer.Option("--base", help="With --run: use the model as it was before training.")] = False,
    steps: Steps = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance-scale", help="Guidance scale; 1 means no guidance.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the first image of every prompt.", min=-MAX_SEED, max=MAX_SEED)
    ] = 0,
    num: Annotated[
        int, typer.Option("--num-images", help="Images per prompt, from consecutive seeds.", min=1, max=256)
    ] = 4,
    size: Annotated[int | None, typer.Option(help="Height and width in pixels.", min=8, max=4096)] = None,
    images: Annotated[
        list[Path] | None, typer.Option("--image", metavar="FILE", help="An image to edit; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the images.")] = Path("images"),
    sets: Sets = None,
    runs: Runs = Path("runs"),
) -> None:
    """Generate images with a model or a run. Saves each image, and a grid of all of them. A seed gives the same image
    as the diffusers pipeline of the model with generator=torch.Generator().manual_seed(seed). What is not given is as
    in the run's evaluations, also for a model that `flowbp export --to merged` wrote. Existing files are kept;
    new files get higher numbers. With --image the prompts are instructions to edit, and each row of the grid begins
    with the image.

    Example:

    \b
      flowbp sample "a red circle left of a blue square" --run runs/flowbp_bridge
      flowbp sample "a red circle left of a blue square" --run runs/flowbp_bridge --base
      flowbp sample "two green triangles" --model builtin:shapes/generator --guidance-scale 2 --seed 7
      flowbp sample "make the circle green" --image circle.png --guidance-scale 2
    """
    with spinner("loading"):
        from flowbp.data.rows import edits_of_files
        from flowbp.evaluation import sources
        from imgen_common.files import make_folder

        if run is not None and model is not None:
            raise UserError("--run and --model: give one of them")
        if base and run is None:
            raise UserError("--base: is for --run; a model given by --model is untrained already")
        prompts = edits_of_files(prompts, images or [])
        chosen = next((ref for ref in (run, model) if ref is not None), "builtin:shapes/generator")
        source = sources.model_source(chosen, runs, checked_sets(sets, {"eval.seed": "--seed"}), base=base)
        config = source.config
        scale = config.eval_guidance_scales[0] if guidance is None else guidance
        sources.check_guidance_scale(scale)
        source.check()
        shape = (size, size) if size else (config.model.height, config.model.width)
        given, steps = steps, steps or config.eval.num_inference_steps
        make_folder(out)
        # from here on torch is needed
        from flowbp.data.edits import source_thumbnails
        from flowbp.evaluation import sampling
        from imgen_common.console import quiet_libraries
        from imgen_common.devices import device_of
        from imgen_common.images import grid, save_png, to_pil
    quiet_libraries()
    source.check_drawing(prompts, shape, steps)
    print_notes([*source.assumed_settings(size, given, guidance), *source.unread_prompts(prompts)])
    backbone, batch, seeds, cells = source.load(device_of("auto")), config.eval.batch_size, range(seed, seed + num), []
    with sampling.own_numbers(out, len(prompts)) as number, progress_bar() as on_progress:
        for index, prompt in enumerate(prompts):
            made = to_pil(sampling.generate_images(backbone, prompt, seeds, shape, steps, scale, batch))
            for which, image in zip(seeds, made, strict=True):
                save_png(image, out / f"{number + index:03d}-{sampling.slug(prompt)}-seed{which}.png")
            cells += [*source_thumbnails(prompt, made[0].size), *made]
            on_progress(source.label, index + 1, len(prompts))
        file = out / f"{number:03d}-grid.png"
        save_png(grid(cells, num + len(images or []), scale=max(1, 128 // shape[1]), gap=4), file)
    print(f"images: {num * len(prompts)} of {source.label} at guidance {scale:g} in {out}\ngrid: {file}")


def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, or a model reference.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="RUN_OR_MODEL", help="What to compare with; the default for a run is its base model."),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Prompts, as for eval.prompts: builtin:shapes/test or a file.")
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(help="Number of prompts to use.", min=1)] = None,
    guidance: Annotated[
        list[float] | None,
        typer.Option("--guidance-scale", help="Guidance scale; may be repeated. Default: the run's or model's own."),
    ] = None,
    sets: Sets = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Score a model, or compare two models on the same prompts and seeds. Prints the reward, the held-out reward and,
    for prompts of the miniature, the verifier by category. Differences have paired 95 % bootstrap intervals over
    prompts. A run is compared with the model that it started from.

    Example:

    \b
      flowbp eval runs/flowbp_bridge
      flowbp eval runs/flowbp_bridge --against runs/refl --guidance-scale 1 --guidance-scale 2
      flowbp eval builtin:shapes/generator --num-prompts 120 --json
    """
    with spinner("loading"):
        from flowbp.evaluation import sources as models

        for scale in guidance or []:
            models.check_guidance_scale(scale)
        extra = (("prompts", prompts), ("num_prompts", num_prompts), ("guidance_scale", guidance))
        given = [*(sets or []), *(f"eval.{key}={json.dumps(value)}" for key, value in extra if value not in (None, []))]
        sources = models.compared_sources(target, against, runs, given)
        config, labels = sources[-1].config, [source.label for source in sources]
        for source in sources:
            source.check(scorers=True)
        texts = models.evaluation_prompts(config)
        # from here on torch is needed
        from flowbp.cli import console
        from flowbp.evaluation import compare, sampling
        from imgen_common.console import quiet_libraries
    quiet_libraries()
    models.check_compared(sources, texts)
    named = {one.partition("=")[0] for one in given}
    of_all = named & {"eval.prompts", "eval.num_prompts"} != {"eval.prompts"}  # or of as many as were asked for
    left_out = [] if of_all else models.describe_left_out(config)
    print_notes([*sources[-1].assumed_settings(), *left_out])
    print_notes(dict.fromkeys(note for one in sources for note in one.unread_prompts(texts, scorers=True)))
    scales = guidance or sources[-1].eval_guidance_scales
    with progress_bar() as on_progress:
        found = [sampling.evaluate_model(one, texts, config, scales, on_progress) for one in sources]
    print_notes(compare.describe_not_finite(found))
    if len(found) == 1 and len(texts) < compare.MIN_PROMPTS:
        print_notes([f"too few prompts ({len(texts)}) for intervals that say much; give {compare.MIN_PROMPTS} or more"])
    if as_json:
        print(json.dumps({"prompts": config.eval.prompts, "results": compare.results_as_json(labels, found)}))
    elif len(found) == 1:
        console.print_mean_scores(*compare.mean_scores(found[0]), labels[0])
    else:
        changes, changes_by_category = compare.compare_evaluations(*found)
        console.print_comparison(changes, None, *labels)
        for scale, by_category in changes_by_category.items():
            if by_category:
                console.print_categories(by_category, f"Verifier by category at guidance {scale:g}")


def benchmark(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, or a model reference.")],
    prompts: Annotated[str, typer.Option(metavar="FILE", help="Prompts as for data.prompts, or GenEval's metadata.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to create, or to continue in.")],
    protocol: Annotated[str, typer.Option(help="hpdv2 (prompts and rewards), geneval or geneval_shapes.")] = "hpdv2",
    scores: Annotated[
        list[str] | None,
        typer.Option("--score", metavar="[NAME:]KIND=REF", help="What scores the images; may be repeated."),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="URL", help="Endpoint for ur_align and ur_iq; its key is FLOWBP_JUDGE_KEY.")
    ] = None,
    color_model: Annotated[str | None, typer.Option(metavar="REF", help="GenEval's CLIP ViT-L/14.")] = None,
    base: Annotated[bool, typer.Option("--base", help="For a run: use the model as it was before training.")] = False,
    images: Annotated[int | None, typer.Option(help="Images per prompt; default: 1 for hpdv2, else 4.", min=1)] = None,
    num_prompts: Annotated[int | None, typer.Option(help="Use only the first N prompts.", min=1)] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance-scale", help="Guidance scale; 1 means no guidance.")
    ] = None,
    steps: Steps = None,
    size: Annotated[int | None, typer.Option(help="Height and width in pixels.", min=8, max=4096)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images at a time; affects results only by rounding.", min=1)] = 4,
    yes: Annotated[bool, typer.Option("--yes", help="Ask the judge whatever it costs.")] = False,
    sets: Sets = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Generate and score the images of a whole prompt file as the papers do. Prints a table like theirs with 95 %
    intervals, and keeps images, scores, table.md and table.json in --out. The same command continues where it stopped;
    scores can be added to existing images. Under torchrun the processes share the work. Kinds of scores: rewards (clip,
    clipscore, hpsv2, ...), ur_align and ur_iq (REF is the name under which --judge serves UnifiedReward), geneval (REF
    is a Mask2Former for COCO instance segmentation), and geneval_shapes: the rules of GenEval on prompts of the
    miniature, judged by its verifier, not comparable with GenEval. What the judge will cost is printed first, and must
    be confirmed with --yes above --set judge.confirm_calls or judge.confirm_money (judge.prices.prompt, .completion).

    Example:

    \b
      flowbp benchmark builtin:shapes/generator --prompts builtin:shapes/test --num-prompts 100 --out scores/base \\
        --score clip=builtin:shapes/reward
      flowbp benchmark builtin:shapes/generator --protocol geneval_shapes --prompts builtin:shapes/test \\
        --out scores/geneval_shapes --score geneval_shapes=builtin:shapes/verifier
      flowbp benchmark my-run --prompts hpdv2.txt --out hpdv2/my-run --score hpsv2=rewards/hpsv2 \\
        --score pickscore:clip=yuvalkirstain/PickScore_v1 --score ur_iq=UnifiedReward --judge $JUDGE_URL
      torchrun --nproc_per_node 8 -m flowbp benchmark my-run --protocol geneval --prompts evaluation_metadata.jsonl \\
        --out geneval/my-run --score geneval=mask2former-swin-small-coco-instance --color-model clip-vit-large-patch14
    """
    announce_process()
    with spinner("loading"), report_error_once():
        from flowbp.evaluation.benchmarks import settings
        from flowbp.evaluation.sources import model_source
        from imgen_common.config import load

        sets = checked_sets(sets, {f"eval.{key}": f"--{key.replace('_', '-')}" for key in OF_EVAL})
        chosen = check_choice("--protocol", protocol, settings.BenchmarkProtocol)
        of_judge = [text for text in sets if text.startswith("judge.")]
        asking = load(settings.JudgeConfig, [], [text.removeprefix("judge.") for text in of_judge])
        asking = asking.model_copy(update={"url": judge or asking.url})
        sets = [text for text in sets if text not in of_judge]
        shape = [f"model.height={size}", f"model.width={size}"] if size else []
        source = model_source(target, runs, [*sets, *shape], base=base)
        request = settings.BenchmarkRequest(
            protocol=chosen,
            prompts=prompts,
            scorers=tuple(settings.parse_scorer(text, color_model) for text in scores or []),
            num_prompts=num_prompts,
            images=images,
            num_inference_steps=steps,
            guidance_scale=guidance,
            seed=seed,
        )
        settings.check_request(request, out, source, asking.url)
        # from here on torch is needed
        from flowbp.evaluation.benchmarks.run import prepare_benchmark
        from imgen_common.console import quiet_libraries

        quiet_libraries()
        work = prepare_benchmark(source, request, out, batch_size, asking)
        print_notes([*source.assumed_settings(size, steps, guidance), *work.unread_prompts()])
    with report_error_once():
        _run_benchmark(work, as_json, yes)


def _run_benchmark(work: "Benchmark", as_json: bool, yes: bool) -> None:
    """Makes what is missing, and prints the table on the main process."""
    from datetime import timedelta

    import torch
    from accelerate import PartialState

    from flowbp.evaluation.benchmarks.run import run_benchmark, run_on_all_processes
    from flowbp.evaluation.benchmarks.tables import write_table
    from imgen_common.judging.cost import confirm_cost

    def check_judge() -> None:
        if state.is_main_process and (cost := own.check_judge()).calls:
            confirm_cost(cost, own.judge, partial(print, file=sys.stderr), yes, "add --yes")

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    own = replace(work, device=state.device, rank=state.process_index)
    says = message_when_stopped(lambda: "stopped; the same command continues")
    try:
        run_on_all_processes(check_judge)
        with (
            says if state.is_main_process else nullcontext(),
            progress_bar() if state.is_main_process else nullcontext(own.on_progress) as on_progress,
        ):
            run_benchmark(replace(own, on_progress=on_progress), ["flowbp", *sys.argv[1:]], state)
    finally:
        state.destroy_process_group()
    if state.is_main_process:
        _print_table([write_table(own.out)], as_json)


def table(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER", help="Folders of flowbp benchmark.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """Show folders of flowbp benchmark as one table, with one row per folder. The columns are those of the papers:
    rewards, or the tasks of GenEval, with 95 % bootstrap intervals over prompts. An unfinished folder is shown with the
    scores that it has, and a note.

    Example:

    \b
      flowbp table geneval/base geneval/my-run
      flowbp table hpdv2/* --markdown
    """
    from flowbp.evaluation.benchmarks import tables

    rows = [tables.read_row(folder) for folder in folders]
    if markdown:
        print(tables.table_markdown(rows), end="")
    else:
        _print_table(rows, as_json)


def _print_table(rows: "Sequence[BenchmarkRow]", as_json: bool) -> None:
    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    from flowbp.cli import console

    console.print_benchmark(rows)
