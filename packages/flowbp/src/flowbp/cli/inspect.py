"""`flowbp methods`, `flowbp families`, `flowbp explain` and `flowbp report`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowbp.cli.options import Json, Runs, Sets
from imgen_common.errors import UserError

if TYPE_CHECKING:
    from flowbp.config import TrainConfig


def methods(as_json: Json = False) -> None:
    """List the named methods. Each is a choice on the same axes: what the reward sees, which steps carry gradient, with
    which weights, and where gradient passes through the state. Every choice is a key below `method`, which flowbp train
    and flowbp explain can change with --set method.KEY=VALUE.

    Example:

    \b
      flowbp methods
      flowbp methods --json
    """
    from flowbp.reports.explain import methods_table

    rows = methods_table()
    if as_json:
        print(json.dumps(rows))
        return
    from flowbp.cli import console

    console.print_methods(rows)


def families(as_json: Json = False) -> None:
    """List the model families that can be trained, by their published models: license, guidance, parameters of the
    transformer in billions, how many source images an edit may have (0: it cannot edit), and the memory of the one GPU
    for which configs/flowbp has a recipe with adapters (-: it has none). Guidance is classifier-free (guidance_scale;
    "1 + pipeline's" where the pipeline counts it from 0, "rescaled" where it keeps the norm of the conditional
    velocity) or distilled, an input of the model (model.embedded_guidance). flowbp estimate says what your own
    configuration needs.

    Example:

    \b
      flowbp families
      flowbp families --json
    """
    from imgen_common.console import quiet_libraries, spinner

    with spinner("counting the weights of each family ...") as say:
        say("counting the weights of each family ...")
        quiet_libraries()
        from flowbp.backbones import families_table

        rows = families_table()
    if as_json:
        print(json.dumps(rows))
        return
    from flowbp.cli import console

    console.print_families(rows)


def explain(
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help="Name of a method (see flowbp methods), or a .yaml of flowbp train.")
    ],
    steps: Annotated[
        int | None,
        typer.Option("--num-inference-steps", help="Number of denoising steps; by default 25.", min=2, max=1000),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the run whose first plan is shown.")] = 0,
    model: Annotated[
        str | None, typer.Option(metavar="REF", help="Use the noise levels of this model instead of linear ones.")
    ] = None,
    shift: Annotated[float, typer.Option(help="Shift of the linear noise levels; 1 means no shift.")] = 1.0,
    sets: Sets = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a figure of the plan (.png, .svg or .pdf).")
    ] = None,
) -> None:
    """Show one plan of a method: which steps carry gradient, with which weights, the legs and their quadrature nodes,
    where the state is coupled, what the reward sees, and how many network evaluations it takes.

    Example:

    \b
      flowbp explain flowbp_lagrange --seed 3
      flowbp explain flowbp_bridge --model builtin:shapes/generator --figure plan.png
      flowbp explain flowbp_sparse --set method.active.num_active_steps=6 --shift 3
      flowbp explain configs/flowbp/miniature/lora.yaml
    """
    from flowbp.cli import console
    from flowbp.config import TrainConfig
    from flowbp.core.plan import draw_plan
    from flowbp.methods import get_method
    from imgen_common.config import load
    from imgen_common.files import write_atomic
    from imgen_common.streams import numpy_generator

    kind = _figure_kind(figure)
    changes = [*(sets or []), *([f"num_inference_steps={steps}"] if steps else [])]
    if Path(method).suffix in (".yaml", ".yml"):
        config = load(TrainConfig, [Path(method)], changes)
    else:
        get_method(method)
        config = load(TrainConfig, [], [f"method={method}", *changes])
    sigmas = _noise_levels(config, model, shift)
    plan = draw_plan(config.method, sigmas, numpy_generator(seed, "plan", 0))
    levels = model or f"linear noise levels, shift {shift:g}"
    if model is None and Path(method).suffix in (".yaml", ".yml"):
        levels += f" (a run has those of its model: --model {config.model.ref})"
    heading = f"{config.method.name}: {plan.num_inference_steps} steps, seed {seed}, {levels}"
    console.print_plan(config, plan, heading)
    if figure is not None:
        from flowbp.reports.figure import plot_plan

        write_atomic(figure, plot_plan(plan, heading, kind))
        print(f"\nfigure: {figure}")


def _figure_kind(figure: Path | None) -> str:
    kind = figure.suffix.lstrip(".").lower() if figure else "png"
    if kind not in ("png", "svg", "pdf"):
        raise UserError(f"--figure {figure}: must end in .png, .svg or .pdf")
    if figure is not None and not figure.absolute().parent.is_dir():
        raise UserError(f"--figure {figure}: there is no folder {figure.parent}; make it first")
    return kind


def _noise_levels(config: "TrainConfig", model: str | None, shift: float) -> Sequence[float]:
    from flowbp.reports.explain import linear_sigmas

    if not 0.001 <= shift <= 1000:
        raise UserError(f"--shift {shift:g}: must be from 0.001 to 1000")
    if model is None:
        return linear_sigmas(config.num_inference_steps, shift)
    if shift != 1:
        raise UserError("--shift: a model has its own noise levels; give --model or --shift")
    from imgen_common import hub
    from imgen_common.console import quiet_libraries

    hub.resolve(model, weights=False)  # before torch is imported
    from flowbp import backbones

    quiet_libraries()
    size = (config.model.height, config.model.width)
    backbone = backbones.init_empty_weights(model, distilled=True)
    return backbone.sigmas(config.num_inference_steps, size, config.train_sigmas).tolist()


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, finished or not.")],
    open_page: Annotated[bool, typer.Option("--open", help="Open the report in the browser.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the page there; default: report.html of the run.")
    ] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Write the report of a run again. RUN/report.html is a single page that needs no other file. It shows the results
    before and after training, images at equal seeds, categories, curves, a plan, the configuration and the environment.

    Example:

    \b
      flowbp report runs/flowbp_bridge --open
      flowbp report runs/flowbp_bridge --out page.html
    """
    from imgen_common.run_folder.find import find_run

    path = find_run(run, runs, "flowbp train")  # before torch is imported
    from flowbp.reports import report as reports

    page = reports.write_report(path, out)
    print(f"report: {page}")
    if open_page:
        import webbrowser

        webbrowser.open(page.absolute().as_uri())
