"""One true update of Stable Diffusion 3.5 medium on a CPU, with random weights of the published sizes.

What a machine without a GPU can say of a model of real size: LoRA of rank 32 in bfloat16, 256 x 256 pixels, N = 4 steps
of which K = 1 and 2 are active (FlowBP-Sparse), batch 1, no gradient checkpointing.  For each K an update (rollout,
reward, backward, AdamW) is made with flowbp's sweep and with the joint graph of the papers (tests/flowbp/oracle.py).
Memory is that of live storages, beside what `flowbp estimate` says of the same configuration.  One evaluation of the
network is compared with the same call of diffusers' transformer.

The exit code is 1 if a claim fails.  It needs about 10 GB of memory and ten minutes of computing.

    python -m benchmarks.perf.real_size
    python -m benchmarks.perf.real_size --tiny        # tiny sizes, to see that the code works
"""

import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer

from benchmarks.common import Claim, describe_run, format_versions, hardware_name, result_file, write_json
from benchmarks.perf import pipelines
from benchmarks.perf.gpu_update import (
    EXECUTORS,
    FULL,
    GROWTH_LIMIT,
    TINY,
    CostRow,
    RandomUpdate,
    Setting,
    make_random_trainer,
    measure_cost,
)
from flowbp.backbones.families.sd3 import SD3
from flowbp.estimate import estimate_run
from flowbp.training import preflight
from imgen_common.console import markdown_table, quiet_libraries
from imgen_common.errors import run_cli

MODULE = "benchmarks.perf.real_size"
NAME = "sd3_5_medium"
COUNTS = (1, 2)
ESTIMATE_LIMIT = 0.1


def velocity_difference(update: RandomUpdate) -> float:
    """Largest difference of one velocity from diffusers' own call, relative to the largest value."""
    backbone = update.trainer.models.backbone
    assert isinstance(backbone, SD3)
    cond, _ = update.trainer.models.embeddings(["a red circle"])
    sigma = torch.full((1,), 0.5)
    with torch.no_grad():
        ours = backbone.velocity(update.x_0, sigma, cond)
        with torch.autocast("cpu", torch.bfloat16):
            text, pooled = cond["text"], cond["pooled"]
            given = {"encoder_hidden_states": text, "pooled_projections": pooled, "timestep": 1000 * sigma}
            theirs = backbone.net(update.x_0, **given).sample
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def estimated_peak(setting: Setting, folder: Path, num_active: int) -> int:
    """Peak bytes of an update by `flowbp estimate`."""
    config = setting.config(folder, f"method.active.num_active_steps={num_active}")
    return estimate_run(preflight.check_run(config, 1, estimate_only=True)).update_peak


def check_claims(rows: list[CostRow], estimates: dict[int, int], difference: float) -> list[Claim]:
    """That the sweep does not grow with K, that the estimate is right, and that the network is diffusers'."""
    few, many = rows[0], rows[-1]
    growth = (many.sweep.peak or 0) / (few.sweep.peak or 1)  # None where memory ran out, which a CPU does not tell
    claims = [
        Claim(f"peak of the sweep at K={many.num_active} <= {GROWTH_LIMIT} x K=1", growth, growth <= GROWTH_LIMIT)
    ]
    for row in rows:
        error = estimates[row.num_active] / (row.sweep.peak or 0) - 1
        text = f"K={row.num_active}: `flowbp estimate` is within {ESTIMATE_LIMIT:.0%} of the sweep's peak"
        claims.append(Claim(text, error, abs(error) <= ESTIMATE_LIMIT))
    return [*claims, Claim("difference of one velocity from diffusers' call", difference, difference == 0)]


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file; by default named by the hardware.")] = None,
    tiny: Annotated[bool, typer.Option(help="Tiny sizes, to see that the code works.")] = False,
) -> None:
    """Memory and time of an update of SD3.5-M at its real size on a CPU, and what `flowbp estimate` says of it."""
    quiet_libraries()
    device = torch.device("cpu")
    setting = replace(TINY, num_steps=4) if tiny else replace(FULL, size=256, num_steps=4)
    with TemporaryDirectory() as root:
        folder = Path(root) / NAME
        pipelines.write_configs(partial(pipelines.sd3_5_medium, "tiny" if tiny else "shallow"), folder)
        estimates = {count: estimated_peak(setting, folder, count) for count in COUNTS}
        update = RandomUpdate(make_random_trainer(setting.config(folder), device))
        difference = velocity_difference(update)
        rows = []
        for count in COUNTS:
            sweep, joint = (measure_cost(update, executor, count, repeats=1) for executor in EXECUTORS)
            rows.append(CostRow(NAME, count, sweep, joint))
    environment = describe_run(MODULE, sys.argv[1:], device)
    header = ["steps K", "sweep GB", "estimated GB", "joint GB", "sweep CPU s", "joint CPU s"]
    lines = [
        [str(row.num_active)]
        + [f"{size / 1e9:.3f}" for size in (row.sweep.peak or 0, estimates[row.num_active], row.joint.peak or 0)]
        + [f"{cost.seconds:.1f}" for cost in (row.sweep, row.joint)]
        for row in rows
    ]
    print(f"{hardware_name(device)}, {torch.get_num_threads()} threads, bfloat16; {format_versions(environment)}\n")
    print(f"{markdown_table(header, lines)}\n")
    claims = check_claims(rows, estimates, difference)
    print("\n".join(map(str, claims)))
    file = output or result_file("real_size-tiny" if tiny else "real_size", device, "json")
    content = {"setting": asdict(setting), "rows": [asdict(row) for row in rows], "estimates": estimates}
    write_json(file, content | {"claims": [asdict(claim) for claim in claims], "environment": environment})
    print(f"\nwritten to {file}")
    if not tiny and not all(claim.holds for claim in claims):
        raise typer.Exit(1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_cli(app, MODULE)
