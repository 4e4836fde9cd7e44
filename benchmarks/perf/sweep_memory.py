"""Peak memory and time of an update's backward pass against the number K of active steps: sweep and joint graph.

The sweep is `flowbp.core.engine`.  The joint graph is the surrogate of the papers, one graph over all active steps, as
tests/flowbp/oracle.py executes it.  The method is FlowBP-Sparse with random weights and a plain loss instead of a
reward: the benchmark compares the part that depends on K.  It does not measure the rollout, which both need.

Memory on a CPU: every case runs in processes of its own (forked from a server that has only imported the libraries).
The result is the median over processes of the peak resident set (VmHWM, reset before) minus the resident set just
before the backward pass.  Every tensor is a mapping of its own there (M_MMAP_THRESHOLD), so that freed memory leaves
the resident set at once and fragmentation does not count.
Memory on a GPU: torch.cuda.max_memory_allocated minus the memory that was allocated before.
Counts: a dispatch mode gives the peak of live tensor bytes (without temporary memory inside kernels) and the
floating-point operations.  These do not depend on the machine.
Time: both executors run in one process, in turns, with the default allocator; results are medians over repetitions.

The exit code is 1 if a claim fails.  With --quick the claims are about the counts, because a few MB and hundredths of a
second are as coarse as the pages of the kernel and the clock of a busy machine.

    python -m benchmarks.perf.sweep_memory
    python -m benchmarks.perf.sweep_memory --tokens 2048 --heads 8 --repeats 5
"""

import contextlib
import ctypes
import multiprocessing
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn

from benchmarks.common import (
    Claim,
    choose_device,
    describe_run,
    format_versions,
    hardware_name,
    result_file,
    time_call,
    write_json,
)
from flowbp.core.axes.active import LateBiased
from flowbp.core.engine import backpropagate, rollout
from flowbp.core.plan import Plan, draw_plan
from flowbp.core.types import Velocity
from flowbp.methods import METHODS, Method
from imgen_common.console import markdown_table
from imgen_common.errors import UserError, run_cli
from imgen_common.memory import LiveBytes, held
from imgen_common.streams import normal, numpy_generator

MODULE = "benchmarks.perf.sweep_memory"
Executor = Literal["sweep", "joint"]
EXECUTORS: tuple[Executor, ...] = ("sweep", "joint")
GROWTH_LIMIT, TIME_LIMIT, FIT_LIMIT = 1.15, 1.1, 0.98
M_MMAP_THRESHOLD = -3
"""Name of the setting in glibc's mallopt."""
PRELOADED = ["benchmarks.common", "diffusers.models.transformers.transformer_flux2", "flowbp.core.engine"]
"""Modules that the server imports from which the measuring processes are forked."""
HEAD_DIM, CHANNELS, TEXT_DIM, TEXT_TOKENS = 32, 16, 64, 16


@dataclass(frozen=True)
class Sizes:
    """Sizes of a transformer of `double` and `single` blocks of width 32 `heads`, and of its input."""

    num_steps: int = 25
    batch: int = 1
    tokens: int = 1024
    heads: int = 3
    double: int = 1
    single: int = 3
    seed: int = 0


QUICK = Sizes(num_steps=4, tokens=1024, heads=1, double=1, single=2)


@dataclass(frozen=True)
class Peak:
    """Memory of a backward pass in MB (10^6 bytes) above what was allocated before it, and its operations.

    peak: measured.  live: of live tensors alone.
    """

    peak: float
    live: float
    flops: int


@dataclass(frozen=True)
class MemoryRow:
    """Peaks and times at one K.  Seconds are medians over repetitions; ratio is the median of sweep / joint."""

    num_active: int
    sweep: Peak
    joint: Peak
    sweep_seconds: float
    joint_seconds: float
    ratio: float


# The network and its backward pass ------------------------------------------------------------------------------------


def make_network(sizes: Sizes, device: torch.device) -> nn.Module:
    """A random Flux2 transformer."""
    torch.manual_seed(sizes.seed)
    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=CHANNELS,
        num_layers=sizes.double,
        num_single_layers=sizes.single,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=sizes.heads,
        joint_attention_dim=TEXT_DIM,
        timestep_guidance_channels=64,
        axes_dims_rope=(8, 8, 8, 8),
        mlp_ratio=3.0,
        guidance_embeds=False,
    ).to(device)


def make_velocity(net: nn.Module, sizes: Sizes, device: torch.device) -> Velocity:
    """The network as a velocity conditioned on random text, for any number of tokens."""
    text = normal((sizes.batch, TEXT_TOKENS, TEXT_DIM), sizes.seed, "text").to(device)

    def ids(count: int, axis: int) -> Tensor:
        one_hot = torch.nn.functional.one_hot(torch.tensor([axis]), 4)
        return (one_hot * torch.arange(count)[:, None]).to(device)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return net(
            hidden_states=x,
            encoder_hidden_states=text,
            timestep=sigma,
            img_ids=ids(x.shape[1], 2),
            txt_ids=ids(TEXT_TOKENS, 3),
            return_dict=False,
        )[0]

    return velocity


def bounded_loss(x: Tensor, rows: slice) -> Tensor:
    """A loss (n,) whose gradient is not constant."""
    return torch.tanh(x).square().flatten(1).mean(1)


def flowbp_sparse(num_active: int) -> Method:
    """FlowBP-Sparse with K active steps."""
    return METHODS["flowbp_sparse"].model_copy(update={"active": LateBiased(num_active_steps=num_active)})


class BackwardPass:
    """The backward pass of one update of a random network, by either executor."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self.net = make_network(sizes, device)
        self.velocity = make_velocity(self.net, sizes, device)
        self.sigmas = torch.linspace(1, 0, sizes.num_steps + 1)

    def prepare(self, executor: Executor, num_active: int, tokens: int | None = None) -> Callable[[], None]:
        """Runs the rollout; returns the backward pass, which can run any number of times.

        Both executors get the same plan.
        """
        shape = (self.sizes.batch, tokens or self.sizes.tokens, CHANNELS)
        x_0 = normal(shape, self.sizes.seed, "noise").to(self.device)
        method = flowbp_sparse(num_active)
        plan = draw_plan(method, self.sigmas, numpy_generator(self.sizes.seed, "plan", num_active))
        return self._joint(method, plan, x_0) if executor == "joint" else self._sweep(plan, x_0)

    def clear_gradients(self) -> None:
        """Frees the gradients, as after a step of the optimizer."""
        self.net.zero_grad(set_to_none=True)

    def _sweep(self, plan: Plan, x_0: Tensor) -> Callable[[], None]:
        trajectory = rollout(self.velocity, x_0, self.sigmas, plan.rollout_spec)

        def backward() -> None:
            backpropagate(plan, trajectory, self.velocity, bounded_loss)

        return backward

    def _joint(self, method: Method, plan: Plan, x_0: Tensor) -> Callable[[], None]:
        oracle = import_oracle()
        run = oracle.roll(self.velocity, x_0, self.sigmas.to(x_0))

        def backward() -> None:
            oracle.backpropagate_jointly(method, plan, run, bounded_loss)

        return backward


def import_oracle() -> Any:
    """The module tests/flowbp/oracle.py, which executes the joint graph and is not part of flowbp."""
    folder = str(Path(__file__).parents[2] / "tests" / "flowbp")
    if folder not in sys.path:
        sys.path.append(folder)
    import oracle  # type: ignore[import-not-found]

    return oracle


# Memory ---------------------------------------------------------------------------------------------------------------


def count_live_bytes(update: BackwardPass, backward: Callable[[], None]) -> tuple[float, int]:
    """(peak of live tensors in MB, floating-point operations) of one backward pass."""
    update.clear_gradients()
    with LiveBytes(held([update.net])) as live:
        backward()
    return live.peak / 1e6, live.flops


def resident_set(field: Literal["VmRSS", "VmHWM"]) -> float:
    """Resident set of this process, or its peak, in MB.  Raises UserError where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise UserError("memory on a CPU is read from /proc; run on Linux, or with --device cuda")
    found = re.search(rf"{field}:\s*(\d+) kB", status.read_text())
    assert found
    return int(found[1]) * 1024 / 1e6


def measure_cpu_peak(sizes: Sizes, executor: Executor, num_active: int) -> Peak:
    """Measures one case in this process: a small warm-up, the rollout, the backward pass, and a second one to count."""
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 65536)
    update = BackwardPass(sizes, torch.device("cpu"))
    update.prepare(executor, 1, tokens=16)()
    backward = update.prepare(executor, num_active)
    update.clear_gradients()
    libc.malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = resident_set("VmRSS")
    backward()
    peak = resident_set("VmHWM") - before
    return Peak(peak, *count_live_bytes(update, backward))


def measure_cuda_peak(update: BackwardPass, executor: Executor, num_active: int) -> Peak:
    """Measures one case on a GPU: the peak of allocated memory above what was allocated before the backward pass."""
    backward = update.prepare(executor, num_active)
    update.clear_gradients()
    torch.cuda.synchronize(update.device)
    torch.cuda.reset_peak_memory_stats(update.device)
    before = torch.cuda.memory_allocated(update.device)
    backward()
    torch.cuda.synchronize(update.device)
    peak = (torch.cuda.max_memory_allocated(update.device) - before) / 1e6
    return Peak(peak, *count_live_bytes(update, backward))


def measure_peaks(
    sizes: Sizes, device: torch.device, counts: Sequence[int], repeats: int
) -> dict[tuple[Executor, int], Peak]:
    """Peaks of every executor and K.

    On a CPU they are medians over processes, since the kernel may reclaim pages of a single one.
    """
    cases = [(executor, k) for k in counts for executor in EXECUTORS]
    if device.type == "cuda":
        update = BackwardPass(sizes, device)
        return {case: measure_cuda_peak(update, *case) for case in cases}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        found = {case: [pool.submit(measure_cpu_peak, sizes, *case).result() for _ in range(repeats)] for case in cases}
    return {
        case: replace(several[0], peak=statistics.median(p.peak for p in several)) for case, several in found.items()
    }


# Time -----------------------------------------------------------------------------------------------------------------


def measure_times(update: BackwardPass, num_active: int, repeats: int) -> tuple[float, float, float]:
    """Medians over repetitions of (seconds of the sweep, seconds of the joint graph, ratio of both).

    The executors take turns at being first.
    """
    backward = {executor: update.prepare(executor, num_active) for executor in EXECUTORS}
    pairs = []
    for repeat in range(repeats):
        order = EXECUTORS[:: 1 if repeat % 2 else -1]
        seconds = {}
        for executor in order:
            update.clear_gradients()
            seconds[executor] = time_call(backward[executor], update.device)
        pairs.append((seconds["sweep"], seconds["joint"]))
    sweep, joint = zip(*pairs, strict=True)
    return statistics.median(sweep), statistics.median(joint), statistics.median(a / b for a, b in pairs)


# Claims and table -----------------------------------------------------------------------------------------------------


def measure_rows(sizes: Sizes, device: torch.device, counts: Sequence[int], repeats: int) -> list[MemoryRow]:
    """A row for every K.  Memory comes first, so that its processes fork from one that has computed nothing."""
    memory = measure_peaks(sizes, device, counts, repeats)
    update = BackwardPass(sizes, device)
    measure_times(update, min(counts), 1)  # warm-up
    return [MemoryRow(k, memory["sweep", k], memory["joint", k], *measure_times(update, k, repeats)) for k in counts]


def check_claims(rows: Sequence[MemoryRow], from_counts: bool = False) -> list[Claim]:
    """The claims about measured memory and time, or with `from_counts` about counted bytes and operations."""

    def memory(peak: Peak) -> float:
        return peak.live if from_counts else peak.peak

    few, many = rows[0], rows[-1]
    growth = memory(many.sweep) / memory(few.sweep)
    slope, fit = fit_line([row.num_active for row in rows], [memory(row.joint) for row in rows])
    several = [row for row in rows if row.num_active >= 2]
    ratio = statistics.median(row.sweep.flops / row.joint.flops if from_counts else row.ratio for row in several)
    what, cost = ("live memory", "operations") if from_counts else ("peak", "time")
    return [
        Claim(
            f"sweep: {what} at K={many.num_active} <= {GROWTH_LIMIT} x {what} at K={few.num_active}",
            growth,
            growth <= GROWTH_LIMIT,
        ),
        Claim(f"joint graph: {what} rises with K, MB a step > 0", slope, slope > 0),
        Claim(f"joint graph: its rise is linear, R^2 > {FIT_LIMIT}", fit, fit > FIT_LIMIT),
        Claim(f"{cost} sweep / joint <= {TIME_LIMIT}, median over K >= 2", ratio, ratio <= TIME_LIMIT),
    ]


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """(slope, R^2) of the least-squares line; R^2 is 0 where y does not vary."""
    slope, offset = np.polyfit(x, y, 1)
    spread = np.var(y)
    residual = np.var(np.asarray(y) - slope * np.asarray(x) - offset)
    return float(slope), float(1 - residual / spread) if spread > 0 else 0.0


def format_table(rows: Sequence[MemoryRow]) -> str:
    """The table as Markdown."""
    header = ["K", "sweep MB", "joint MB", "sweep live MB", "joint live MB", "sweep s", "joint s", "time ratio"]
    cells = [
        [
            str(row.num_active),
            *(f"{p:.1f}" for p in (row.sweep.peak, row.joint.peak)),
            *(f"{p:.1f}" for p in (row.sweep.live, row.joint.live)),
            *(f"{s:.3f}" for s in (row.sweep_seconds, row.joint_seconds)),
            f"{row.ratio:.3f}",
        ]
        for row in rows
    ]
    return markdown_table(header, cells)


def run_sweep_memory(
    sizes: Sizes, device: torch.device, counts: Sequence[int], repeats: int, output: Path, from_counts: bool = False
) -> bool:
    """Measures, prints and writes `output`; returns whether all claims hold.

    Raises UserError for a K that is not in 1..N.
    """
    if not counts or min(counts) < 1 or max(counts) > sizes.num_steps or len(set(counts)) < 3:
        raise UserError(f"--counts {list(counts)}: give at least three numbers of steps in 1..{sizes.num_steps}")
    torch.set_num_threads(1)
    rows = measure_rows(sizes, device, sorted(set(counts)), repeats)
    claims = check_claims(rows, from_counts)
    environment = describe_run(MODULE, sys.argv[1:], device)
    print(f"{hardware_name(device)}, one thread, float32; {format_versions(environment)}; {sizes}\n")
    print(f"{format_table(rows)}\n")
    for claim in claims:
        print(claim)
    method = "max_memory_allocated" if device.type == "cuda" else "VmHWM of a process, less VmRSS before; medians"
    content = {"sizes": asdict(sizes), "repeats": repeats, "memory": method, "rows": [asdict(row) for row in rows]}
    write_json(output, content | {"claims": [asdict(claim) for claim in claims], "environment": environment})
    print(f"\nwritten to {output}")
    return all(claim.holds for claim in claims)


def main(
    counts: Annotated[str, typer.Option(help="Numbers K of active steps, separated by commas.")] = "1,2,4,8,16,25",
    num_steps: Annotated[int, typer.Option(help="Steps N of the rollout.")] = Sizes.num_steps,
    batch: Annotated[int, typer.Option(help="Samples.")] = Sizes.batch,
    tokens: Annotated[int, typer.Option(help="Tokens of a sample.")] = Sizes.tokens,
    heads: Annotated[int, typer.Option(help="Attention heads of 32 channels.")] = Sizes.heads,
    double: Annotated[int, typer.Option(help="Double-stream blocks.")] = Sizes.double,
    single: Annotated[int, typer.Option(help="Single-stream blocks.")] = Sizes.single,
    seed: Annotated[int, typer.Option(help="Seed of weights, noise and plans.")] = 0,
    repeats: Annotated[int, typer.Option(help="Repetitions of each measurement.", min=1)] = 3,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    output: Annotated[Path | None, typer.Option(help="JSON file; by default named by the hardware.")] = None,
    quick: Annotated[bool, typer.Option(help="Tiny sizes, K = 1, 2, 4; the claims are about the counts.")] = False,
) -> None:
    """Peak memory and time of an update's backward pass against K: the sweep and the joint graph of the papers."""
    sizes = QUICK if quick else Sizes(num_steps, batch, tokens, heads, double, single, seed)
    where = choose_device(device)
    chosen = [1, 2, 4] if quick else [int(k) for k in counts.split(",")]
    file = output or result_file("sweep_memory-quick" if quick else "sweep_memory", where, "json")
    if not run_sweep_memory(sizes, where, chosen, repeats, file, from_counts=quick):
        raise typer.Exit(1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_cli(app, MODULE)
