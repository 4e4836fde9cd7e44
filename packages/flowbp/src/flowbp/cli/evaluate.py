"""`flowbp sample`, `flowbp eval`, `flowbp benchmark` and `flowbp table`."""

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from flowbp.cli.options import Json, Runs, Sets, check_choice, progress_bar, report_error_once, spinner
from imgen_common.errors import UserError

if TYPE_CHECKING:
    from flowbp.config import TrainConfig
    from flowbp.evaluation.benchmarks.run import Benchmark
    from flowbp.evaluation.benchmarks.tables import BenchmarkRow
    from flowbp.evaluation.sampling import ModelSource


# --- images and scores -----------------------------------------------------------------------------------------------


def sample(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Prompts; by default eight of the evaluation.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="REF", help="Model to generate with.")] = None,
    run: Annotated[str | None, typer.Option(metavar="RUN", help="Run whose trained model to generate with.")] = None,
    base: Annotated[bool, typer.Option("--base", help="With --run: use the model as it was before training.")] = False,
    steps: Annotated[
        int | None, typer.Option("--num-inference-steps", help="Denoising steps.", min=1, max=1000)
    ] = None,
    guidance: Annotated[float | None, typer.Option("--guidance-scale", help="Guidance scale; 1: no guidance.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image of every prompt.")] = 0,
    num: Annotated[
        int, typer.Option("--num-images", help="Images per prompt, from consecutive seeds.", min=1, max=256)
    ] = 4,
    size: Annotated[int | None, typer.Option(help="Height and width in pixels.", min=8, max=4096)] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the images.")] = Path("images"),
    runs: Runs = Path("runs"),
) -> None:
    """Generate images with a model or a run. Saves each image, and all of them as one grid. A seed gives the image that
    the diffusers pipeline of the model generates with generator=torch.Generator().manual_seed(seed). Files that
    exist are kept; new ones get higher numbers.

    Example:

    \b
      flowbp sample "a red circle left of a blue square" --run runs/flowbp_bridge
      flowbp sample "a red circle left of a blue square" --run runs/flowbp_bridge --base
      flowbp sample "two green triangles" --model builtin:shapes/generator --guidance-scale 2 --seed 7
    """
    with spinner("loading"):
        from flowbp.evaluation import sampling

        source = sampling.model_source(_run_or_model(run, model, base), runs, base=base)
        scale = source.config.guidance_scale if guidance is None else guidance
        sampling.check_guidance_scale(scale)
        texts = prompts or sampling.evaluation_prompts(source.config)[:8]
    shape = (size, size) if size else (source.config.model.height, source.config.model.width)
    steps = steps or source.config.eval.num_inference_steps
    grid = _generate(source, texts, range(seed, seed + num), shape, steps, scale, out)
    print(f"{len(texts) * num} images of {source.label} at guidance {scale:g} in {out}\ngrid: {grid}")


def _run_or_model(run: str | None, model: str | None, base: bool) -> str:
    if run and model:
        raise UserError("--run and --model: give one of them")
    if base and not run:
        raise UserError("--base: is for --run; a model given by --model is untrained already")
    return run or model or "builtin:shapes/generator"


def _generate(
    source: "ModelSource", prompts: list[str], seeds: range, shape: tuple[int, int], steps: int, scale: float, out: Path
) -> Path:
    """Writes the images and their grid; returns the file of the grid."""
    from flowbp.evaluation import sampling
    from imgen_common.console import quiet_libraries
    from imgen_common.devices import device_of

    quiet_libraries()
    backbone = source.load(device_of("auto"))
    number, saved = sampling.next_file_number(out), []
    out.mkdir(parents=True, exist_ok=True)
    with progress_bar() as on_progress:
        for index, prompt in enumerate(prompts):
            names = [f"{number + index:03d}-{sampling.slug(prompt)}-seed{seed}.png" for seed in seeds]
            images = sampling.generate_images(backbone, prompt, seeds, shape, steps, scale)
            saved += sampling.save_images(images, out, names)
            on_progress(source.label, index + 1, len(prompts))
    grid = out / f"{number:03d}-grid.png"
    sampling.save_grid(saved, grid, len(seeds))
    return grid


def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, or a model reference.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="RUN_OR_MODEL", help="What to compare with; by default, for a run, its base model."),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Prompts, as eval.prompts: builtin:shapes/test or a file.")
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(help="How many of the prompts.", min=1)] = None,
    guidance: Annotated[
        list[float] | None, typer.Option("--guidance-scale", help="Guidance scale; may be repeated.")
    ] = None,
    sets: Sets = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Score a model, or compare two. Uses the same prompts and seeds for both: reward, held-out reward and, for prompts
    of the shapes world, the verifier by category. Differences have paired 95 % bootstrap intervals over prompts. A run
    is compared with the model it started from.

    Example:

    \b
      flowbp eval runs/flowbp_bridge
      flowbp eval runs/flowbp_bridge --against runs/refl --guidance-scale 1 --guidance-scale 2
      flowbp eval builtin:shapes/generator --num-prompts 120 --json
    """
    with spinner("loading"):
        from flowbp.evaluation import sampling

        for scale in guidance or []:
            sampling.check_guidance_scale(scale)
        extra = (("prompts", prompts), ("num_prompts", num_prompts), ("guidance_scale", guidance))
        given = [f"eval.{key}={json.dumps(value)}" for key, value in extra if value]
        sources = [sampling.model_source(target, runs, [*(sets or []), *given])]
        if against:
            sources.insert(0, sampling.model_source(against, runs))
        elif sources[0].run is not None:
            sources.insert(0, sampling.model_source(target, runs, base=True))
    config = sources[-1].config
    _print_scores([source.label for source in sources], _score(sources, config), config, as_json)


def _score(sources: list["ModelSource"], config: "TrainConfig") -> list[Any]:
    """Evaluations of every model by guidance scale."""
    from flowbp.evaluation import sampling
    from flowbp.training.loading import load_rewards
    from imgen_common.console import quiet_libraries
    from imgen_common.devices import device_of

    prompts = sampling.evaluation_prompts(config)
    quiet_libraries()
    rewards, scales = load_rewards(config, device_of("auto")), config.eval.guidance_scale
    with progress_bar() as on_progress:
        return [sampling.evaluate_model(one, prompts, rewards, config, scales, on_progress) for one in sources]


def _print_scores(labels: list[str], found: list[Any], config: "TrainConfig", as_json: bool) -> None:
    from flowbp.cli import console
    from flowbp.evaluation.compare import compare_evaluations, mean_scores, results_as_json

    if as_json:
        print(json.dumps({"prompts": config.eval.prompts, "results": results_as_json(labels, found)}))
    elif len(found) == 1:
        console.print_mean_scores(*mean_scores(found[0]), labels[0])
    else:
        changes, changes_by_category = compare_evaluations(*found)
        console.print_comparison(changes, None, *labels)
        for scale, by_category in changes_by_category.items():
            if by_category:
                console.print_categories(by_category, f"Verifier by category at guidance {scale:g}")


# --- the protocols of the papers -------------------------------------------------------------------------------------


def benchmark(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, or a model reference.")],
    prompts: Annotated[str, typer.Option(metavar="FILE", help="Prompts (.txt, .jsonl), or GenEval's metadata.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to make, or to continue in.")],
    protocol: Annotated[str, typer.Option(help="hpdv2 (prompts and rewards) or geneval.")] = "hpdv2",
    scores: Annotated[
        list[str] | None,
        typer.Option("--score", metavar="[NAME:]KIND=REF", help="What scores the images; may be repeated."),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="URL", help="Endpoint for ur_align and ur_iq; its key: FLOWBP_JUDGE_KEY.")
    ] = None,
    color_model: Annotated[str | None, typer.Option(metavar="REF", help="GenEval's CLIP ViT-L/14.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Of a run: use the model as it was before training.")] = False,
    images: Annotated[int | None, typer.Option(help="Images per prompt; hpdv2: 1, geneval: 4.", min=1)] = None,
    num_prompts: Annotated[int | None, typer.Option(help="Use only the first prompts.", min=1)] = None,
    guidance: Annotated[float | None, typer.Option("--guidance-scale", help="Guidance scale; 1: no guidance.")] = None,
    steps: Annotated[
        int | None, typer.Option("--num-inference-steps", help="Denoising steps.", min=1, max=1000)
    ] = None,
    size: Annotated[int | None, typer.Option(help="Height and width in pixels.", min=8, max=4096)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images at a time; changes results by rounding at most.", min=1)] = 4,
    sets: Sets = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
) -> None:
    """Generate and score the images of a whole prompt file as the papers do. Prints their table with 95 % intervals,
    and keeps images, scores, table.md and table.json in --out. The same command continues where it stopped; scores can
    be added to existing images. Under torchrun the processes share the work. Kinds of scores: rewards (clip, clipscore,
    hpsv2, ...), ur_align and ur_iq (REF: the name under which --judge serves UnifiedReward), geneval (REF: a
    Mask2Former of COCO instances).

    Example:

    \b
      flowbp benchmark builtin:shapes/generator --prompts builtin:shapes/test --num-prompts 100 --out scores/base \\
        --score clip=builtin:shapes/reward
      flowbp benchmark my-run --prompts hpdv2.txt --out hpdv2/my-run --score hpsv2=rewards/hpsv2 \\
        --score pickscore:clip=yuvalkirstain/PickScore_v1 --score ur_iq=UnifiedReward --judge $JUDGE_URL
      torchrun --nproc_per_node 8 -m flowbp benchmark my-run --protocol geneval --prompts evaluation_metadata.jsonl \\
        --out geneval/my-run --score geneval=mask2former-swin-small-coco-instance --color-model clip-vit-large-patch14
    """
    with spinner("loading"), report_error_once():
        from typing import get_args

        from flowbp.evaluation.benchmarks import settings
        from flowbp.evaluation.benchmarks.run import prepare_benchmark
        from flowbp.evaluation.sampling import model_source
        from imgen_common.console import quiet_libraries

        check_choice("--protocol", protocol, get_args(settings.BenchmarkProtocol))
        quiet_libraries()
        shape = [f"model.height={size}", f"model.width={size}"] if size else []
        source = model_source(target, runs, [*(sets or []), *shape], base=base)
        request = settings.BenchmarkRequest(
            protocol=cast(settings.BenchmarkProtocol, protocol),
            prompts=prompts,
            scorers=tuple(settings.parse_scorer(text, color_model) for text in scores or []),
            num_prompts=num_prompts,
            images=images,
            num_inference_steps=steps,
            guidance_scale=guidance,
            seed=seed,
        )
        work = prepare_benchmark(source, request, out, batch_size, judge)
    with report_error_once():
        _run_benchmark(work, as_json)


def _run_benchmark(work: "Benchmark", as_json: bool) -> None:
    """Makes what is missing, and prints the table on the main process."""
    from dataclasses import replace
    from datetime import timedelta

    import torch
    from accelerate import PartialState

    from flowbp.evaluation.benchmarks.run import run_benchmark
    from flowbp.evaluation.benchmarks.tables import write_table

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    own = replace(work, device=state.device, rank=state.process_index)
    try:
        with progress_bar() if state.is_main_process else nullcontext(own.on_progress) as on_progress:
            run_benchmark(replace(own, on_progress=on_progress), ["flowbp", *sys.argv[1:]], state)
    except KeyboardInterrupt:
        if state.is_main_process:
            print("\nstopped; the same command continues", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        state.destroy_process_group()
    if state.is_main_process:
        _print_table([write_table(own.out)], as_json)


def table(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER", help="Folders of flowbp benchmark.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """Show folders of flowbp benchmark as one table, one row each. Columns are those of the papers: rewards, or the
    tasks of GenEval, with 95 % bootstrap intervals over prompts. A folder that is not finished is shown as far as it
    is, with a note.

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
        from flowbp.evaluation.benchmarks.tables import table_as_json

        print(json.dumps(table_as_json(rows)))
        return
    from flowbp.cli import console

    console.print_benchmark(rows)
