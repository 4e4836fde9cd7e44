"""Peak memory and time of an update's backward pass against the number K of active steps: sweep and joint graph.

The sweep is `flowbp.core.engine`; the joint graph is the papers' surrogate, one graph over all active steps, as the
tests' oracle executes it.  Method FlowBP-Sparse, random weights, a plain loss instead of a reward: what is compared is
the part that depends on K.  The rollout before it is not measured; both need it.

Memory on a CPU: processes of their own for every case (forked from a server that has only imported the libraries), each
one's peak resident set (VmHWM, reset before) less the resident set just before the backward pass, and the median of
them.  There every tensor is a mapping of its own (M_MMAP_THRESHOLD), so that what is freed leaves the resident set at
once and fragmentation is not counted.  On a GPU: torch.cuda.max_memory_allocated less what was allocated before.
Beside it what a dispatch mode counts: the peak of live tensor bytes, temporary memory inside kernels left out, and the
floating-point operations.  These do not depend on the machine.
Time: both in one process, in turns, with the allocator as it comes; the median over repetitions.

Exit code 1 if a claim fails.  With --quick the claims are about what is counted: a few MB and hundredths of a second
are as coarse as a kernel's pages and a busy machine's clock.

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

from benchmarks.common import clock, device_of, hardware, result_file, stamp, versions, write_json
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
"""What the server that measuring processes are forked from imports beforehand."""
HEAD_DIM, CHANNELS, TEXT_DIM, TEXT_TOKENS = 32, 16, 64, 16


@dataclass(frozen=True)
class Sizes:
    """A transformer of `double` and `single` blocks of width 32 `heads`, and what it is run on."""

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
    """MB (10^6 bytes) above what was there before the backward pass, measured and of live tensors alone; operations."""

    peak: float
    live: float
    flops: int


@dataclass(frozen=True)
class Row:
    """One K.  Peaks in MB, seconds the median over repetitions, ratio the median of sweep / joint."""

    num_active: int
    sweep: Peak
    joint: Peak
    sweep_seconds: float
    joint_seconds: float
    ratio: float


@dataclass(frozen=True)
class Claim:
    """A statement, the number that decides it, and whether it holds."""

    text: str
    value: float
    holds: bool


# What is run ----------------------------------------------------------------------------------------------------------


def network(sizes: Sizes, device: torch.device) -> nn.Module:
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


def velocity_of(net: nn.Module, sizes: Sizes, device: torch.device) -> Velocity:
    """The network as a velocity over random text, for any number of tokens."""
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


def loss(x: Tensor, rows: slice) -> Tensor:
    """Something whose gradient is no constant."""
    return torch.tanh(x).square().flatten(1).mean(1)


def sparse(num_active: int) -> Method:
    """FlowBP-Sparse with K active steps."""
    return METHODS["flowbp_sparse"].model_copy(update={"active": LateBiased(num_active_steps=num_active)})


class Update:
    """One update of the random network, ready for its backward pass by either executor."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self.net = network(sizes, device)
        self.velocity = velocity_of(self.net, sizes, device)
        self.sigmas = torch.linspace(1, 0, sizes.num_steps + 1)

    def prepare(self, executor: Executor, num_active: int, tokens: int | None = None) -> Callable[[], None]:
        """The backward pass after its rollout, to be run any number of times; both executors get the same plan."""
        shape = (self.sizes.batch, tokens or self.sizes.tokens, CHANNELS)
        x_0 = normal(shape, self.sizes.seed, "noise").to(self.device)
        method = sparse(num_active)
        drawn = draw_plan(method, self.sigmas, numpy_generator(self.sizes.seed, "plan", num_active))
        return self._joint(method, drawn, x_0) if executor == "joint" else self._sweep(drawn, x_0)

    def clear(self) -> None:
        """As after an optimizer's step: no gradients, and no memory for them."""
        self.net.zero_grad(set_to_none=True)

    def _sweep(self, drawn: Plan, x_0: Tensor) -> Callable[[], None]:
        trajectory = rollout(self.velocity, x_0, self.sigmas, drawn.rollout_spec)

        def backward() -> None:
            backpropagate(drawn, trajectory, self.velocity, loss)

        return backward

    def _joint(self, method: Method, drawn: Plan, x_0: Tensor) -> Callable[[], None]:
        oracle = joint_graph()
        run = oracle.roll(self.velocity, x_0, self.sigmas.to(x_0))

        def backward() -> None:
            oracle.backpropagate_jointly(method, drawn, run, loss)

        return backward


def joint_graph() -> Any:
    """The tests' joint-graph executor, which is no part of the product."""
    folder = str(Path(__file__).parents[2] / "tests" / "flowbp")
    if folder not in sys.path:
        sys.path.append(folder)
    import oracle  # type: ignore[import-not-found]

    return oracle


# Memory ---------------------------------------------------------------------------------------------------------------


def counted(update: Update, backward: Callable[[], None]) -> tuple[float, int]:
    """MB of live tensors at their peak in one backward pass, and its floating-point operations."""
    update.clear()
    with LiveBytes(held([update.net])) as live:
        backward()
    return live.peak / 1e6, live.flops


def resident(field: Literal["VmRSS", "VmHWM"]) -> float:
    """Resident set of this process, or its peak, in MB.  Raises UserError where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise UserError("memory on a CPU is read from /proc; run on Linux, or with --device cuda")
    found = re.search(rf"{field}:\s*(\d+) kB", status.read_text())
    assert found
    return int(found[1]) * 1024 / 1e6


def cpu_peak(sizes: Sizes, executor: Executor, num_active: int) -> Peak:
    """What a process of its own does: small warm-up, rollout, backward pass measured; once more counted."""
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 65536)
    update = Update(sizes, torch.device("cpu"))
    update.prepare(executor, 1, tokens=16)()
    backward = update.prepare(executor, num_active)
    update.clear()
    libc.malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    backward()
    peak = resident("VmHWM") - before
    return Peak(peak, *counted(update, backward))


def cuda_peak(update: Update, executor: Executor, num_active: int) -> Peak:
    """Peak of allocated memory over what was allocated before the backward pass."""
    backward = update.prepare(executor, num_active)
    update.clear()
    torch.cuda.synchronize(update.device)
    torch.cuda.reset_peak_memory_stats(update.device)
    before = torch.cuda.memory_allocated(update.device)
    backward()
    torch.cuda.synchronize(update.device)
    peak = (torch.cuda.max_memory_allocated(update.device) - before) / 1e6
    return Peak(peak, *counted(update, backward))


def peaks(sizes: Sizes, device: torch.device, counts: Sequence[int], repeats: int) -> dict[tuple[Executor, int], Peak]:
    """Of every executor and K; on a CPU medians over processes, since the kernel may take pages of one away."""
    cases = [(executor, k) for k in counts for executor in EXECUTORS]
    if device.type == "cuda":
        update = Update(sizes, device)
        return {case: cuda_peak(update, *case) for case in cases}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        found = {case: [pool.submit(cpu_peak, sizes, *case).result() for _ in range(repeats)] for case in cases}
    return {
        case: replace(several[0], peak=statistics.median(p.peak for p in several)) for case, several in found.items()
    }


# Time -----------------------------------------------------------------------------------------------------------------


def seconds(update: Update, backward: Callable[[], None]) -> float:
    """Of one backward pass."""
    update.clear()
    start = clock(update.device)
    backward()
    return clock(update.device) - start


def times(update: Update, num_active: int, repeats: int) -> tuple[float, float, float]:
    """Medians over repetitions of the sweep's seconds, the joint graph's, and of their ratio; who is first changes."""
    backward = {executor: update.prepare(executor, num_active) for executor in EXECUTORS}
    pairs = []
    for repeat in range(repeats):
        order = EXECUTORS[:: 1 if repeat % 2 else -1]
        found = {executor: seconds(update, backward[executor]) for executor in order}
        pairs.append((found["sweep"], found["joint"]))
    sweep, joint = zip(*pairs, strict=True)
    return statistics.median(sweep), statistics.median(joint), statistics.median(a / b for a, b in pairs)


# What is claimed ------------------------------------------------------------------------------------------------------


def measure(sizes: Sizes, device: torch.device, counts: Sequence[int], repeats: int) -> list[Row]:
    """All rows; memory first, so that its processes fork from one that has computed nothing."""
    memory = peaks(sizes, device, counts, repeats)
    update = Update(sizes, device)
    times(update, min(counts), 1)  # warm-up
    return [Row(k, memory["sweep", k], memory["joint", k], *times(update, k, repeats)) for k in counts]


def claims(rows: Sequence[Row], as_counted: bool = False) -> list[Claim]:
    """What the architecture states, of the memory and time measured or of the bytes and operations counted."""

    def memory(peak: Peak) -> float:
        return peak.live if as_counted else peak.peak

    few, many = rows[0], rows[-1]
    growth = memory(many.sweep) / memory(few.sweep)
    slope, fit = linear_fit([row.num_active for row in rows], [memory(row.joint) for row in rows])
    several = [row for row in rows if row.num_active >= 2]
    ratio = statistics.median(row.sweep.flops / row.joint.flops if as_counted else row.ratio for row in several)
    what, cost = ("live memory", "operations") if as_counted else ("peak", "time")
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


def linear_fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """(slope, R^2) of the least-squares line; R^2 is 0 where y does not vary."""
    slope, offset = np.polyfit(x, y, 1)
    spread = np.var(y)
    residual = np.var(np.asarray(y) - slope * np.asarray(x) - offset)
    return float(slope), float(1 - residual / spread) if spread > 0 else 0.0


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
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


def run(
    sizes: Sizes, device: torch.device, counts: Sequence[int], repeats: int, output: Path, as_counted: bool = False
) -> bool:
    """Measures, prints, writes; whether all claims hold.  Raises UserError for a K that is not in 1..N."""
    if not counts or min(counts) < 1 or max(counts) > sizes.num_steps or len(set(counts)) < 3:
        raise UserError(f"--counts {list(counts)}: give at least three numbers of steps in 1..{sizes.num_steps}")
    torch.set_num_threads(1)
    rows = measure(sizes, device, sorted(set(counts)), repeats)
    stated = claims(rows, as_counted)
    environment = stamp(MODULE, sys.argv[1:], device)
    print(f"{hardware(device)}, one thread, float32; {versions(environment)}; {sizes}\n\n{markdown(rows)}\n")
    for claim in stated:
        print(f"{'holds' if claim.holds else 'FAILS'}: {claim.text}: {claim.value:.6g}")
    method = "max_memory_allocated" if device.type == "cuda" else "VmHWM of a process, less VmRSS before; medians"
    content = {"sizes": asdict(sizes), "repeats": repeats, "memory": method, "rows": [asdict(row) for row in rows]}
    write_json(output, content | {"claims": [asdict(claim) for claim in stated], "environment": environment})
    print(f"\nwritten to {output.name}")
    return all(claim.holds for claim in stated)


def main(
    counts: Annotated[str, typer.Option(help="Numbers K of active steps, with commas.")] = "1,2,4,8,16,25",
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
    quick: Annotated[bool, typer.Option(help="Tiny sizes, K = 1, 2, 4; claims on what is counted.")] = False,
) -> None:
    """Peak memory and time of an update's backward pass against K: the sweep and the joint graph of the papers."""
    sizes = QUICK if quick else Sizes(num_steps, batch, tokens, heads, double, single, seed)
    where = device_of(device)
    chosen = [1, 2, 4] if quick else [int(k) for k in counts.split(",")]
    file = output or result_file("sweep_memory-quick" if quick else "sweep_memory", where, "json")
    if not run(sizes, where, chosen, repeats, file, as_counted=quick):
        raise typer.Exit(1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_cli(app, MODULE)
