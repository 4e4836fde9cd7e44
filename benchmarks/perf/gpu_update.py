"""An update at the size of Stable Diffusion 3.5 medium and of FLUX.2-klein-base-4B, on one GPU, with random weights.

The pipelines have their published sizes (benchmarks.perf.pipelines) and random weights; nothing is downloaded.  The
text encoders have their published width but only as many layers as the adapter reads: they embed the prompts and are
then unloaded, so that the transformer reads text of the published shape.  The reward is the miniature's, which is tiny:
the benchmark measures the generator and its autoencoder.

Cost: for each number K of N = 25 active steps of FlowBP-Sparse (batch 1, LoRA, bfloat16, 512x512, no gradient
checkpointing), the peak memory and the seconds of a whole update (rollout, reward, backward, AdamW), with flowbp's
sweep and with the joint graph of the papers, as tests/flowbp/oracle.py executes it.  `-` means out of memory.
Rate: operations of rollout and sweep (counted as `flowbp estimate` counts them, recomputed ones included) over their
seconds, against the rate of a bfloat16 matrix product on the same device.
Fit: real updates of the published LoRA recipe for 24 GB, beside what `flowbp estimate` says of it.

Memory is torch.cuda.max_memory_allocated.  The exit code is 1 if a claim fails.  `--tiny` runs the same code at tiny
sizes on a CPU, where memory is that of live storages; its numbers mean nothing, so it checks no claim.

    python -m benchmarks.perf.gpu_update
    python -m benchmarks.perf.gpu_update --models sd3_5_medium --counts 1,8
    python -m benchmarks.perf.gpu_update --tiny
"""

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

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
from benchmarks.perf import pipelines
from benchmarks.perf.sweep_memory import Executor, flowbp_sparse, import_oracle
from flowbp import backbones
from flowbp.backbones.loading import mark_trainable
from flowbp.backbones.options import apply_model_options
from flowbp.config import TrainConfig
from flowbp.core.engine import BackwardOptions, backpropagate, rollout, sweep
from flowbp.core.guidance import guided_velocity
from flowbp.core.plan import Plan, draw_plan
from flowbp.core.types import Velocity
from flowbp.data.embeddings import PromptEmbeddings
from flowbp.estimate import FakeModels, estimate_run, measure_updates, network_tensors, trace_stages
from flowbp.rewards.losses import reward_losses
from flowbp.training import preflight
from flowbp.training.loading import LoadedModels, load_rewards
from flowbp.training.trainer import Trainer
from imgen_common.config import load
from imgen_common.console import markdown_table, quiet_libraries
from imgen_common.errors import UserError, run_cli
from imgen_common.memory import LiveBytes, nbytes
from imgen_common.streams import normal, numpy_generator

MODULE = "benchmarks.perf.gpu_update"
RECIPES = Path(__file__).parents[2] / "configs" / "flowbp"
EXECUTORS: tuple[Executor, ...] = ("sweep", "joint")
GROWTH_LIMIT, SHARE_LIMIT, ESTIMATE_LIMIT, FIT_BYTES = 1.05, 0.45, 0.1, 24 * 10**9
PROMPTS = ("a red circle", "two blue crosses")
RATE_BATCH, RATE_ACTIVE = 8, 4

MODELS: Mapping[str, Callable[[pipelines.Size], DiffusionPipeline]] = {
    "sd3_5_medium": pipelines.sd3_5_medium,
    "flux2_klein_base_4b": pipelines.flux2_klein_base_4b,
}

# The updates that are measured ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Sizes of one run of the benchmark.

    size: height and width of the images.  matrix: side of the matrices whose product gives the reference rate.
    batch: images of the rate measurement.
    """

    tiny: bool
    size: int
    num_steps: int
    matrix: int
    repeats: int
    batch: int

    def config(self, folder: Path, *sets: str) -> TrainConfig:
        """The configuration of a case: LoRA as in the recipe, FlowBP-Sparse, one reward; `sets` change it."""
        common = [f"model.ref={folder}", f"model.height={self.size}", f"model.width={self.size}"]
        common += ["model.dtype=bfloat16", "lora={rank: 32, alpha: 32}", "heldout=[]"]
        common += ["method=flowbp_sparse", "method.active.num_active_steps=1"]
        common += [f"num_inference_steps={self.num_steps}", "total_batch_size=1", "eval.batch_size=1"]
        return load(TrainConfig, [], [*common, *sets])


FULL = Setting(tiny=False, size=512, num_steps=25, matrix=8192, repeats=3, batch=RATE_BATCH)
TINY = Setting(tiny=True, size=32, num_steps=25, matrix=128, repeats=1, batch=2)


def make_random_trainer(config: TrainConfig, device: torch.device) -> Trainer:
    """A trainer of the model with random weights, which are made on the device."""
    backbone = backbones.init_empty_weights(config.model.ref)
    backbone.bfloat16 = True
    for part in backbone.pipe.components.values():
        if isinstance(part, nn.Module):
            part.to(torch.bfloat16).to_empty(device=device).requires_grad_(False).eval()
            fill_randomly(part)
    apply_model_options(backbone, config.model)
    parameters = mark_trainable(backbone.net, config)
    parts = LoadedModels(backbone, load_rewards(config, device), list(PROMPTS), PromptEmbeddings(backbone), parameters)
    return Trainer(config, parts, Accelerator(cpu=device.type == "cpu"))


@torch.no_grad()
def fill_randomly(network: nn.Module) -> None:
    """Sets weights of about the magnitude that training gives them; scales of norms and running variances are 1."""
    for name, p in network.named_parameters():
        if p.dim() > 1:
            p.normal_(std=p[0].numel() ** -0.5)
        else:
            p.fill_(float(name.endswith("weight")))
    for name, buffer in network.named_buffers():
        buffer.fill_(float(name.endswith("running_var")))


class RandomUpdate:
    """Updates of one trainer with either executor and any number K of active steps."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, config = trainer, trainer.config
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(config.total_batch_size)]
        cond, negative = trainer.models.embeddings(prompts)
        trainer.models.backbone.unload_text_encoders()
        backbone = trainer.models.backbone
        given = (backbone.velocity, cond, negative, config.classifier_free_guidance, backbone.guidance_rescale)
        self.velocity: Velocity = guided_velocity(*given)
        self.options = BackwardOptions(gradient_velocity=guided_velocity(*given, gradient_only=True))
        shape = (config.total_batch_size, *backbone.latent_shape(trainer.size))
        self.x_0 = normal(shape, 0, "noise").to(trainer.accelerator.device)
        (reward,) = config.rewards

        def loss(x: Tensor, rows: slice) -> Tensor:
            scores = trainer.models.rewards[reward.name](backbone.decode(x), prompts[rows])
            return reward_losses(reward.loss, scores)

        self.loss = loss

    def plan(self, num_active: int) -> Plan:
        """A plan with `num_active` active steps."""
        return draw_plan(flowbp_sparse(num_active), self.trainer.sigmas, numpy_generator(0, "plan", num_active))

    def run(self, executor: Executor, num_active: int) -> None:
        """Runs rollout, reward, backward pass and AdamW."""
        plan = self.plan(num_active)
        if executor == "sweep":
            trajectory = rollout(self.velocity, self.x_0, self.trainer.sigmas, plan.rollout_spec)
            backpropagate(plan, trajectory, self.velocity, self.loss, options=self.options)
        else:
            oracle = import_oracle()
            run = oracle.roll(self.velocity, self.x_0, self.trainer.sigmas.to(self.x_0))
            oracle.backpropagate_jointly(flowbp_sparse(num_active), plan, run, self.loss)
        self.trainer.state.step(1e-6, 1.0, 0.9)

    def rollout_and_sweep(self, num_active: int) -> None:
        """Runs rollout and sweep alone."""
        plan = self.plan(num_active)
        trajectory = rollout(self.velocity, self.x_0, self.trainer.sigmas, plan.rollout_spec)
        given = self.options.gradient_velocity
        sweep(plan, trajectory, self.velocity, torch.ones_like(self.x_0), gradient_velocity=given)


# Measurements ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Peak bytes and seconds of a whole update; both are None where it ran out of memory."""

    peak: int | None
    seconds: float | None


@dataclass(frozen=True)
class CostRow:
    """The cost of an update of one model at one K."""

    model: str
    num_active: int
    sweep: Cost
    joint: Cost


@dataclass(frozen=True)
class Rate:
    """TFLOP/s of rollout and sweep (`reached`) and of a matrix product (`matrices`)."""

    model: str
    batch: int
    num_active: int
    reached: float
    matrices: float

    @property
    def share(self) -> float:
        """The reached rate as a share of that of the matrix product."""
        return self.reached / self.matrices


@dataclass(frozen=True)
class RecipeFit:
    """Peak bytes of real updates of the recipe for 24 GB, measured and estimated by `flowbp estimate`.

    seconds: of an update of `batch` images.
    """

    model: str
    batch: int
    measured: int
    estimated: int
    seconds: float

    @property
    def error(self) -> float:
        """Relative error of the estimate."""
        return self.estimated / self.measured - 1


def measure_cost(update: RandomUpdate, executor: Executor, num_active: int, repeats: int) -> Cost:
    """The cost of an update, after a first one that allocates AdamW's moments."""
    device = update.x_0.device
    work = partial(update.run, executor, num_active)
    try:
        if device.type == "cuda":
            work()
            torch.cuda.reset_peak_memory_stats(device)
            times = [time_call(work, device) for _ in range(repeats)]
            return Cost(torch.cuda.max_memory_allocated(device), statistics.median(times))
        known = network_tensors(update.trainer)
        with LiveBytes(known) as live:
            work()
        return Cost(nbytes(known) + live.peak, time_call(work, device))
    except torch.cuda.OutOfMemoryError:
        update.trainer.models.backbone.net.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return Cost(None, None)


def measure_costs(
    name: str, folder: Path, setting: Setting, device: torch.device, counts: Sequence[int]
) -> list[CostRow]:
    """The costs of both executors at every K."""
    update = RandomUpdate(make_random_trainer(setting.config(folder), device))
    rows = []
    for num_active in counts:
        costs = {executor: measure_cost(update, executor, num_active, setting.repeats) for executor in EXECUTORS}
        rows.append(CostRow(name, num_active, costs["sweep"], costs["joint"]))
    return rows


def measure_matrix_rate(side: int, device: torch.device) -> float:
    """TFLOP/s of a product of two square bfloat16 matrices, the best of several timings."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    torch.mm(a, b)

    def multiply() -> None:
        for _ in range(10):
            torch.mm(a, b)

    return 10 * 2 * side**3 / min(time_call(multiply, device) for _ in range(5)) / 1e12


def measure_rate(name: str, folder: Path, setting: Setting, device: torch.device) -> Rate:
    """The rate at a batch, with gradient checkpointing so that it fits."""
    config = setting.config(folder, f"total_batch_size={setting.batch}", "model.gradient_checkpointing=true")
    run, models = preflight.check_run(config, 1, estimate_only=True), FakeModels(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        models.allocate()
        stages, _ = trace_stages(models, run, setting.batch)
    flops = config.num_inference_steps * stages["rollout"].flops + RATE_ACTIVE * stages["swept step"].flops
    update = RandomUpdate(make_random_trainer(config, device))
    update.rollout_and_sweep(RATE_ACTIVE)
    work = partial(update.rollout_and_sweep, RATE_ACTIVE)
    seconds = statistics.median(time_call(work, device) for _ in range(setting.repeats))
    return Rate(name, setting.batch, RATE_ACTIVE, flops / seconds / 1e12, measure_matrix_rate(setting.matrix, device))


def measure_fit(name: str, folder: Path, setting: Setting, device: torch.device) -> RecipeFit:
    """The recipe for 24 GB with the reward and the prompts of the miniature instead of its own."""
    sets = [f"model.ref={folder}", f"model.height={setting.size}", f"model.width={setting.size}", "heldout=[]"]
    sets += ["rewards=[{ref: builtin:shapes/reward}]"]
    sets += [f"{key}=builtin:shapes/test" for key in ("data.prompts", "eval.prompts", "eval.quick_prompts")]
    batch = ["total_batch_size=2"] if setting.tiny else []
    config = load(TrainConfig, [RECIPES / name / "lora_24gb.yaml"], [*sets, *batch])
    estimated = estimate_run(preflight.check_run(config, 1, estimate_only=True)).update_peak
    peak, seconds = measure_updates(make_random_trainer(config, device))
    return RecipeFit(name, config.total_batch_size, peak, estimated, seconds)


# Claims and tables ----------------------------------------------------------------------------------------------------


def check_claims(rows: Sequence[CostRow], rates: Sequence[Rate], fits: Sequence[RecipeFit]) -> list[Claim]:
    """The claims about growth with K, about the rate, and about the recipe for 24 GB and its estimate."""
    claims = []
    for name in dict.fromkeys(row.model for row in rows):
        few, *_, many = (row for row in rows if row.model == name)
        growth = many.sweep.peak / few.sweep.peak if few.sweep.peak and many.sweep.peak else float("inf")
        text = f"{name}: peak of the sweep at K={many.num_active} <= {GROWTH_LIMIT} x that at K={few.num_active}"
        claims.append(Claim(text, growth, growth <= GROWTH_LIMIT))
    for rate in rates:
        if rate.model == "sd3_5_medium":
            text = (
                f"{rate.model}: rollout and sweep at batch {rate.batch} reach >= {SHARE_LIMIT:.0%} of the matrix rate"
            )
            claims.append(Claim(text, rate.share, rate.share >= SHARE_LIMIT))
    for fit in fits:
        if fit.model == "sd3_5_medium":
            text = f"{fit.model}: peak GB of the recipe for 24 GB"
            claims.append(Claim(text, fit.measured / 1e9, fit.measured < FIT_BYTES))
        text = f"{fit.model}: `flowbp estimate` is within {ESTIMATE_LIMIT:.0%} of that peak"
        claims.append(Claim(text, fit.error, abs(fit.error) <= ESTIMATE_LIMIT))
    return claims


def format_tables(rows: Sequence[CostRow], rates: Sequence[Rate], fits: Sequence[RecipeFit]) -> str:
    """The three tables as Markdown."""

    def format_gigabytes(size: int | None) -> str:
        return "-" if size is None else f"{size / 1e9:.4g}"

    def format_seconds(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds:.3f}"

    costs = markdown_table(
        ["model", "steps K", "sweep GB", "joint GB", "sweep s", "joint s"],
        [
            [row.model, str(row.num_active), *(format_gigabytes(c.peak) for c in (row.sweep, row.joint))]
            + [format_seconds(c.seconds) for c in (row.sweep, row.joint)]
            for row in rows
        ],
    )
    rate_table = markdown_table(
        ["model", "batch", "steps K", "TFLOP/s", "matrices", "share"],
        [
            [r.model, str(r.batch), str(r.num_active), f"{r.reached:.4g}", f"{r.matrices:.4g}", f"{r.share:.1%}"]
            for r in rates
        ],
    )
    fit_table = markdown_table(
        ["model", "batch", "GB", "estimated GB", "error", "s"],
        [
            [
                fit.model,
                str(fit.batch),
                format_gigabytes(fit.measured),
                format_gigabytes(fit.estimated),
                f"{fit.error:+.1%}",
                format_seconds(fit.seconds),
            ]
            for fit in fits
        ],
    )
    return "\n\n".join([costs, rate_table, fit_table])


def run_gpu_update(
    setting: Setting, device: torch.device, names: Sequence[str], counts: Sequence[int], output: Path
) -> bool:
    """Measures, prints and writes `output`; returns whether all claims hold.  At tiny sizes it checks none."""
    if wrong := [name for name in names if name not in MODELS]:
        raise UserError(f"--models {', '.join(wrong)}: unknown; allowed: {', '.join(MODELS)}")
    if len(set(counts)) < 2 or min(counts) < 1 or max(counts) > setting.num_steps:
        raise UserError(f"--counts {list(counts)}: give at least two numbers of steps in 1..{setting.num_steps}")
    quiet_libraries()
    rows: list[CostRow] = []
    rates, fits = [], []
    with TemporaryDirectory() as root:
        for name in names:
            folder = Path(root) / name
            pipelines.write_configs(partial(MODELS[name], "tiny" if setting.tiny else "shallow"), folder)
            rows += measure_costs(name, folder, setting, device, sorted(set(counts)))
            rates.append(measure_rate(name, folder, setting, device))
            fits.append(measure_fit(name, folder, setting, device))
    environment = describe_run(MODULE, sys.argv[1:], device)
    print(f"{hardware_name(device)}, bfloat16; {format_versions(environment)}; {setting}\n")
    print(f"{format_tables(rows, rates, fits)}\n")
    claims = [] if setting.tiny else check_claims(rows, rates, fits)
    for claim in claims:
        print(claim)
    if setting.tiny:
        print(f"tiny sizes on a {device.type}: the code runs; these numbers mean nothing, so no claim is checked")
    content = {"setting": asdict(setting), "rows": [asdict(row) for row in rows], "rates": [asdict(r) for r in rates]}
    content |= {"fits": [asdict(fit) for fit in fits], "claims": [asdict(claim) for claim in claims]}
    write_json(output, content | {"environment": environment})
    print(f"\nwritten to {output}")
    return all(claim.holds for claim in claims)


def main(
    models: Annotated[str, typer.Option(help="Names of models, separated by commas.")] = ",".join(MODELS),
    counts: Annotated[str, typer.Option(help="Numbers K of active steps, separated by commas.")] = "1,4,8,25",
    size: Annotated[int, typer.Option(help="Height and width of the images.")] = FULL.size,
    repeats: Annotated[int, typer.Option(help="Repetitions of each timing.", min=1)] = FULL.repeats,
    output: Annotated[Path | None, typer.Option(help="JSON file; by default named by the hardware.")] = None,
    tiny: Annotated[bool, typer.Option(help="Tiny sizes on the CPU, to see that the code works.")] = False,
) -> None:
    """Memory, time and rate of an update at published sizes on one GPU, and what `flowbp estimate` says of it."""
    device = choose_device("cpu" if tiny else "auto")
    if device.type != "cuda" and not tiny:
        raise UserError("needs a CUDA device and torch finds none; run it on a GPU or with --tiny to see that it works")
    setting = TINY if tiny else replace(FULL, size=size, repeats=repeats)
    file = output or result_file("gpu_update-tiny" if tiny else "gpu_update", device, "json")
    if not run_gpu_update(setting, device, models.split(","), [int(k) for k in counts.split(",")], file):
        raise typer.Exit(1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_cli(app, MODULE)
