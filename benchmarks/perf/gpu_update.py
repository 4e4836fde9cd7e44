"""An update at the size of Stable Diffusion 3.5 medium and of FLUX.2-klein-base-4B, on one GPU, with random weights.

What is built: the published sizes (below, with where each number comes from) over diffusers' classes, weights drawn at
random on the device, nothing downloaded.  Text encoders have one layer or as few as the adapter reads, and the real
width: prompts are embedded with them, then they are let go, so that the network sees text of the real shape.  The
reward is the miniature's, tiny: what is measured is the generator and its autoencoder.

Per K of N = 25 active steps of FlowBP-Sparse, batch 1, adapters, bfloat16, 512x512, nothing recomputed in the backward
pass: the most memory that a whole update holds (rollout, reward, backward, AdamW), and its seconds, with flowbp's sweep
and with the papers' joint graph, as the tests' oracle executes it.  `-` is out of memory.
Rate: operations of rollout and sweep (counted as `flowbp estimate` counts them, recomputed ones too) over their
seconds, against the rate of a product of bfloat16 matrices measured here.
Fit: the published adapter recipe for 24 GB, real updates, beside what `flowbp estimate` says of it.

Memory is torch.cuda.max_memory_allocated; exit code 1 if a claim fails.  `--tiny` runs the same code at tiny sizes on a
CPU, where memory is that of storages that live; its numbers mean nothing and no claim is made.

    python -m benchmarks.perf.gpu_update
    python -m benchmarks.perf.gpu_update --models sd3_5_medium --counts 1,8
    python -m benchmarks.perf.gpu_update --tiny
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from benchmarks.common import clock, device_of, hardware, result_file, stamp, versions, write_json
from benchmarks.perf.sweep_memory import Claim, Executor, joint_graph, sparse
from flowbp import backbones
from flowbp.backbones.lora import mark_trainable
from flowbp.backbones.options import apply_model_options
from flowbp.config import TrainConfig
from flowbp.core.engine import backpropagate, rollout, sweep
from flowbp.core.guidance import guided_velocity
from flowbp.core.plan import Plan, draw_plan
from flowbp.core.types import Velocity
from flowbp.data.embeddings import PromptEmbeddings
from flowbp.estimate import FakeModels as Traced
from flowbp.estimate import estimate_run, measure_updates, network_tensors, trace_stages
from flowbp.training import preflight
from flowbp.training.loading import LoadedModels, load_rewards
from flowbp.training.reward_stage import reward_losses
from flowbp.training.trainer import Trainer
from imgen_common.config import load
from imgen_common.console import markdown_table, quiet_libraries
from imgen_common.errors import UserError, run_cli
from imgen_common.memory import LiveBytes, nbytes
from imgen_common.shapes.vocabulary import clip_tokenizer, qwen_tokenizer
from imgen_common.streams import normal, numpy_generator

MODULE = "benchmarks.perf.gpu_update"
RECIPES = Path(__file__).parents[2] / "configs" / "flowbp"
EXECUTORS: tuple[Executor, ...] = ("sweep", "joint")
GROWTH_LIMIT, SHARE_LIMIT, PLAN_LIMIT, FIT_BYTES = 1.05, 0.45, 0.1, 24 * 10**9
PROMPTS = ("a red circle", "two blue crosses")
RATE_BATCH, RATE_ACTIVE = 8, 4

# Sizes: facts of the published config.json files, as the classes' arguments ------------------------------------------

SD3_TRANSFORMER: dict[str, Any] = {
    # stabilityai/stable-diffusion-3.5-medium, transformer/config.json: 24 layers of 24 heads x 64, the first 13 with a
    # second attention of the picture alone
    **{"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24},
    **{"attention_head_dim": 64, "num_attention_heads": 24, "caption_projection_dim": 1536},
    **{"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 384},
    **{"qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
}
SD3_VAE: dict[str, Any] = {
    # its vae/config.json: 16 channels, no 1x1 convolutions around the latents
    **{"latent_channels": 16, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 1024},
    **{"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4},
    **{"use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.5305, "shift_factor": 0.0609},
}
FLUX2_TRANSFORMER: dict[str, Any] = {
    # black-forest-labs/FLUX.2-klein-base-4B, transformer/config.json: 5 double and 20 single blocks of 24 heads x 128,
    # text of three depths of Qwen3-4B (3 x 2560), no guidance input; the rest are diffusers' defaults for FLUX.2
    **{"in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128},
    **{"num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False},
}
TINY_TRANSFORMER: dict[str, dict[str, Any]] = {
    "sd3_5_medium": {
        **{"sample_size": 32, "pos_embed_max_size": 32, "num_layers": 3, "attention_head_dim": 8},
        **{"num_attention_heads": 4, "joint_attention_dim": 32, "caption_projection_dim": 32},
        **{"pooled_projection_dim": 32, "dual_attention_layers": (0,)},
    },
    "flux2_klein_base_4b": {
        **{"in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16},
        **{"num_attention_heads": 2, "joint_attention_dim": 48, "timestep_guidance_channels": 16},
        **{"axes_dims_rope": (4, 4, 4, 4)},
    },
}
TINY_VAE: dict[str, Any] = {
    **{"latent_channels": 4, "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4},
    **{"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
}


def sd3(tiny: bool) -> DiffusionPipeline:
    """The pipeline of SD3.5-M, to be made on the meta device.

    Widths of the text encoders: CLIP-L 768, CLIP-G 1280, T5-XXL 4096; 77 tokens of CLIP and 256 of T5.
    """
    widths = (16, 16, 32) if tiny else (768, 1280, 4096)
    tokens = 13 if tiny else 77
    changes = TINY_TRANSFORMER["sd3_5_medium"] | {"in_channels": 4, "out_channels": 4} if tiny else {}
    vae = {**SD3_VAE, **TINY_VAE} if tiny else SD3_VAE
    t5 = T5Config(vocab_size=1000, d_model=widths[2], d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**(SD3_TRANSFORMER | changes)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(**vae),
        text_encoder=clip(widths[0], tokens),
        tokenizer=told(clip_tokenizer(), tokens),
        text_encoder_2=clip(widths[1], tokens),
        tokenizer_2=told(clip_tokenizer(), tokens),
        text_encoder_3=T5EncoderModel(t5),
        tokenizer_3=told(clip_tokenizer(), 256),
    )


def clip(width: int, tokens: int) -> CLIPTextModelWithProjection:
    """A CLIP text encoder of two layers: the pipeline reads the last but one."""
    sizes = {"hidden_size": width, "projection_dim": width, "intermediate_size": 32, "num_attention_heads": 2}
    return CLIPTextModelWithProjection(
        CLIPTextConfig(vocab_size=1000, num_hidden_layers=2, max_position_embeddings=tokens, **sizes)
    )


def flux2(tiny: bool) -> DiffusionPipeline:
    """The pipeline of FLUX.2-klein-base-4B, to be made on the meta device; 512 tokens of text of width 2560."""
    tokenizer = qwen_tokenizer()
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32}
    qwen = Qwen3Config(
        vocab_size=1000,
        hidden_size=16 if tiny else 2560,
        num_hidden_layers=4,
        pad_token_id=tokenizer.pad_token_id,
        **heads,
    )
    changes = TINY_TRANSFORMER["flux2_klein_base_4b"] if tiny else {}
    return Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(**(FLUX2_TRANSFORMER | changes)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKLFlux2(**(TINY_VAE if tiny else {})),
        text_encoder=Qwen3ForCausalLM(qwen),
        tokenizer=told(tokenizer, 12 if tiny else 512),
        is_distilled=False,
    )


def told(tokenizer: PreTrainedTokenizerBase, tokens: int) -> PreTrainedTokenizerBase:
    """A tokenizer that cuts and pads to so many tokens."""
    tokenizer.model_max_length = tokens
    return tokenizer


MODELS: dict[str, Callable[[bool], DiffusionPipeline]] = {"sd3_5_medium": sd3, "flux2_klein_base_4b": flux2}


def described(name: str, tiny: bool, place: Path) -> Path:
    """A diffusers folder without weights, which is all that `flowbp estimate` reads."""
    with torch.device("meta"):
        pipe = MODELS[name](tiny)
    folder = place / name
    pipe.save_config(folder)
    for part, value in pipe.components.items():
        if isinstance(value, PreTrainedModel):
            value.config.save_pretrained(folder / part)
        elif isinstance(value, PreTrainedTokenizerBase):
            value.save_pretrained(folder / part)
        elif value is not None:
            value.save_config(folder / part)
    return folder


# What is run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Pictures of `size` x `size`; matrix: side of the matrices whose product sets the rate."""

    tiny: bool
    size: int
    num_steps: int
    matrix: int
    repeats: int
    batch: int

    def config(self, folder: Path, *sets: str) -> TrainConfig:
        """What a case trains: adapters as in the recipe, FlowBP-Sparse, one reward."""
        common = [f"model.ref={folder}", f"model.height={self.size}", f"model.width={self.size}"]
        common += [
            "model.dtype=bfloat16",
            f"num_inference_steps={self.num_steps}",
            "method=flowbp_sparse",
            "heldout=[]",
        ]
        common += [
            "lora={rank: 32, alpha: 32}",
            "method.active.num_active_steps=1",
            "total_batch_size=1",
            "eval.batch_size=1",
        ]
        return load(TrainConfig, [], [*common, *sets])


FULL = Setting(tiny=False, size=512, num_steps=25, matrix=8192, repeats=3, batch=RATE_BATCH)
TINY = Setting(tiny=True, size=32, num_steps=25, matrix=128, repeats=1, batch=2)


def random_trainer(config: TrainConfig, device: torch.device) -> Trainer:
    """A trainer of the described model with random weights, made on the device."""
    backbone = backbones.init_empty_weights(config.model.ref)
    backbone.bfloat16 = True
    for part in backbone.pipe.components.values():
        if isinstance(part, nn.Module):
            part.to(torch.bfloat16).to_empty(device=device).requires_grad_(False).eval()
            fill(part)
    apply_model_options(backbone, config.model)
    parameters = mark_trainable(backbone.net, config)
    parts = LoadedModels(backbone, load_rewards(config, device), list(PROMPTS), PromptEmbeddings(backbone), parameters)
    return Trainer(config, parts, Accelerator(cpu=device.type == "cpu"))


@torch.no_grad()
def fill(network: nn.Module) -> None:
    """Random weights of about the size that training gives them; scales of norms and running variances are 1."""
    for name, p in network.named_parameters():
        if p.dim() > 1:
            p.normal_(std=p[0].numel() ** -0.5)
        else:
            p.fill_(float(name.endswith("weight")))
    for name, buffer in network.named_buffers():
        buffer.fill_(float(name.endswith("running_var")))


class Update:
    """Updates of one trainer by either executor, at any K."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, config = trainer, trainer.config
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(config.total_batch_size)]
        cond, negative = trainer.models.embeddings(prompts)
        trainer.models.backbone.unload_text_encoders()
        backbone = trainer.models.backbone
        self.velocity: Velocity = guided_velocity(backbone.velocity, cond, negative, config.classifier_free_guidance)
        shape = (config.total_batch_size, *backbone.latent_shape(trainer.size))
        self.x_0 = normal(shape, 0, "noise").to(trainer.accelerator.device)
        (reward,) = config.rewards

        def loss(x: Tensor, rows: slice) -> Tensor:
            scores = trainer.models.rewards[reward.name](backbone.decode(x), prompts[rows])
            return reward_losses(reward.loss, scores)

        self.loss = loss

    def drawn(self, num_active: int) -> Plan:
        """A plan with K active steps."""
        return draw_plan(sparse(num_active), self.trainer.sigmas, numpy_generator(0, "plan", num_active))

    def whole(self, executor: Executor, num_active: int) -> None:
        """Rollout, reward, backward and AdamW."""
        drawn = self.drawn(num_active)
        if executor == "sweep":
            trajectory = rollout(self.velocity, self.x_0, self.trainer.sigmas, drawn.rollout_spec)
            backpropagate(drawn, trajectory, self.velocity, self.loss)
        else:
            oracle = joint_graph()
            run = oracle.roll(self.velocity, self.x_0, self.trainer.sigmas.to(self.x_0))
            oracle.backpropagate_jointly(sparse(num_active), drawn, run, self.loss)
        self.trainer.state.step(1e-6, 1.0, 0.9)

    def passes(self, num_active: int) -> None:
        """Rollout and sweep alone."""
        drawn = self.drawn(num_active)
        trajectory = rollout(self.velocity, self.x_0, self.trainer.sigmas, drawn.rollout_spec)
        sweep(drawn, trajectory, self.velocity, torch.ones_like(self.x_0))


# What is measured -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """The most bytes held, and seconds, of a whole update; null: out of memory."""

    peak: int | None
    seconds: float | None


@dataclass(frozen=True)
class Row:
    """One model and K."""

    model: str
    num_active: int
    sweep: Cost
    joint: Cost


@dataclass(frozen=True)
class Rate:
    """TFLOP/s: of rollout and sweep, and of a product of matrices; share: the first of the second."""

    model: str
    batch: int
    num_active: int
    reached: float
    matrices: float

    @property
    def share(self) -> float:
        """Of the measured rate."""
        return self.reached / self.matrices


@dataclass(frozen=True)
class Fit:
    """Bytes of real updates of the recipe for 24 GB: measured, and as `flowbp estimate` has them.  seconds: of an
    update of `batch` pictures."""

    model: str
    batch: int
    measured: int
    planned: int
    seconds: float

    @property
    def error(self) -> float:
        """Of the plan, relative."""
        return self.planned / self.measured - 1


def cost(update: Update, executor: Executor, num_active: int, repeats: int) -> Cost:
    """After one update that makes AdamW's moments."""
    device = update.x_0.device
    work = partial(update.whole, executor, num_active)
    try:
        if device.type == "cuda":
            work()
            torch.cuda.reset_peak_memory_stats(device)
            times = [seconds(work, device) for _ in range(repeats)]
            return Cost(torch.cuda.max_memory_allocated(device), statistics.median(times))
        known = network_tensors(update.trainer)
        with LiveBytes(known) as live:
            work()
        return Cost(nbytes(known) + live.peak, seconds(work, device))
    except torch.cuda.OutOfMemoryError:
        update.trainer.models.backbone.net.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return Cost(None, None)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one piece of work."""
    start = clock(device)
    work()
    return clock(device) - start


def rows_of(name: str, folder: Path, setting: Setting, device: torch.device, counts: Sequence[int]) -> list[Row]:
    """Both executors at every K."""
    update = Update(random_trainer(setting.config(folder), device))
    found = []
    for num_active in counts:
        one = {executor: cost(update, executor, num_active, setting.repeats) for executor in EXECUTORS}
        found.append(Row(name, num_active, one["sweep"], one["joint"]))
    return found


def matrix_rate(side: int, device: torch.device) -> float:
    """TFLOP/s of products of two square bfloat16 matrices: the best of several."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    torch.mm(a, b)
    times = []
    for _ in range(5):
        start = clock(device)
        for _ in range(10):
            torch.mm(a, b)
        times.append((clock(device) - start) / 10)
    return 2 * side**3 / min(times) / 1e12


def rate_of(name: str, folder: Path, setting: Setting, device: torch.device) -> Rate:
    """Of a batch, blocks recomputed in the backward pass so that it fits."""
    config = setting.config(folder, f"total_batch_size={setting.batch}", "model.gradient_checkpointing=true")
    job, traced = preflight.check_run(config, 1, estimate_only=True), Traced(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        traced.allocate()
        stages, _ = trace_stages(traced, job, setting.batch)
    flops = config.num_inference_steps * stages["rollout"].flops + RATE_ACTIVE * stages["swept step"].flops
    update = Update(random_trainer(config, device))
    update.passes(RATE_ACTIVE)
    took = statistics.median(seconds(partial(update.passes, RATE_ACTIVE), device) for _ in range(setting.repeats))
    return Rate(name, setting.batch, RATE_ACTIVE, flops / took / 1e12, matrix_rate(setting.matrix, device))


def fit_of(name: str, folder: Path, setting: Setting, device: torch.device) -> Fit:
    """The recipe for 24 GB, with the miniature's reward and prompts in the place of those that are not here."""
    sets = [f"model.ref={folder}", f"model.height={setting.size}", f"model.width={setting.size}", "heldout=[]"]
    sets += ["rewards=[{ref: builtin:shapes/reward}]", *(f"{key}=builtin:shapes/test" for key in PROMPT_KEYS)]
    batch = ["total_batch_size=2"] if setting.tiny else []
    config = load(TrainConfig, [RECIPES / name / "lora_24gb.yaml"], [*sets, *batch])
    planned = estimate_run(preflight.check_run(config, 1, estimate_only=True)).update_peak
    peak, took = measure_updates(random_trainer(config, device))
    return Fit(name, config.total_batch_size, peak, planned, took)


PROMPT_KEYS = ("data.prompts", "eval.prompts", "eval.quick_prompts")


# What is claimed ------------------------------------------------------------------------------------------------------


def claims(rows: Sequence[Row], rates: Sequence[Rate], fits: Sequence[Fit]) -> list[Claim]:
    """What `Done when` of the issue states."""
    stated = []
    for name in dict.fromkeys(row.model for row in rows):
        few, *_, many = (row for row in rows if row.model == name)
        growth = many.sweep.peak / few.sweep.peak if few.sweep.peak and many.sweep.peak else float("inf")
        text = f"{name}: peak of the sweep at K={many.num_active} <= {GROWTH_LIMIT} x that at K={few.num_active}"
        stated.append(Claim(text, growth, growth <= GROWTH_LIMIT))
    for rate in rates:
        if rate.model == "sd3_5_medium":
            text = (
                f"{rate.model}: rollout and sweep at batch {rate.batch} reach >= {SHARE_LIMIT:.0%} of the matrix rate"
            )
            stated.append(Claim(text, rate.share, rate.share >= SHARE_LIMIT))
    for fit in fits:
        if fit.model == "sd3_5_medium":
            text = f"{fit.model}: recipe for 24 GB, GB held"
            stated.append(Claim(text, fit.measured / 1e9, fit.measured < FIT_BYTES))
        text = f"{fit.model}: `flowbp estimate` is within {PLAN_LIMIT:.0%} of that"
        stated.append(Claim(text, fit.error, abs(fit.error) <= PLAN_LIMIT))
    return stated


def markdown(rows: Sequence[Row], rates: Sequence[Rate], fits: Sequence[Fit]) -> str:
    """The tables."""

    def gigabytes(size: int | None) -> str:
        return "-" if size is None else f"{size / 1e9:.4g}"

    def taken(time: float | None) -> str:
        return "-" if time is None else f"{time:.3f}"

    by_k = markdown_table(
        ["model", "steps K", "sweep GB", "joint GB", "sweep s", "joint s"],
        [
            [row.model, str(row.num_active), *(gigabytes(c.peak) for c in (row.sweep, row.joint))]
            + [taken(c.seconds) for c in (row.sweep, row.joint)]
            for row in rows
        ],
    )
    by_rate = markdown_table(
        ["model", "batch", "steps K", "TFLOP/s", "matrices", "share"],
        [
            [r.model, str(r.batch), str(r.num_active), f"{r.reached:.4g}", f"{r.matrices:.4g}", f"{r.share:.1%}"]
            for r in rates
        ],
    )
    by_fit = markdown_table(
        ["model", "batch", "GB", "planned GB", "error", "s"],
        [
            [f.model, str(f.batch), gigabytes(f.measured), gigabytes(f.planned), f"{f.error:+.1%}", taken(f.seconds)]
            for f in fits
        ],
    )
    return "\n\n".join([by_k, by_rate, by_fit])


def run(setting: Setting, device: torch.device, names: Sequence[str], counts: Sequence[int], output: Path) -> bool:
    """Measures, prints, writes; whether all claims hold, or none is made."""
    if wrong := [name for name in names if name not in MODELS]:
        raise UserError(f"--models {', '.join(wrong)}: unknown; allowed: {', '.join(MODELS)}")
    if len(set(counts)) < 2 or min(counts) < 1 or max(counts) > setting.num_steps:
        raise UserError(f"--counts {list(counts)}: give at least two numbers of steps in 1..{setting.num_steps}")
    quiet_libraries()
    rows: list[Row] = []
    rates, fits = [], []
    with TemporaryDirectory() as place:
        for name in names:
            folder = described(name, setting.tiny, Path(place))
            rows += rows_of(name, folder, setting, device, sorted(set(counts)))
            rates.append(rate_of(name, folder, setting, device))
            fits.append(fit_of(name, folder, setting, device))
    environment = stamp(MODULE, sys.argv[1:], device)
    print(f"{hardware(device)}, bfloat16; {versions(environment)}; {setting}\n\n{markdown(rows, rates, fits)}\n")
    stated = [] if setting.tiny else claims(rows, rates, fits)
    for claim in stated:
        print(f"{'holds' if claim.holds else 'FAILS'}: {claim.text}: {claim.value:.6g}")
    if setting.tiny:
        print(f"tiny sizes on a {device.type}: the code runs; these numbers mean nothing, and no claim is made")
    content = {"setting": asdict(setting), "rows": [asdict(row) for row in rows], "rates": [asdict(r) for r in rates]}
    content |= {"fits": [asdict(fit) for fit in fits], "claims": [asdict(claim) for claim in stated]}
    write_json(output, content | {"environment": environment})
    print(f"\nwritten to {output.name}")
    return all(claim.holds for claim in stated)


def main(
    models: Annotated[str, typer.Option(help="Names, with commas.")] = ",".join(MODELS),
    counts: Annotated[str, typer.Option(help="Numbers K of active steps, with commas.")] = "1,4,8,25",
    size: Annotated[int, typer.Option(help="Height and width of the pictures.")] = FULL.size,
    repeats: Annotated[int, typer.Option(help="Repetitions of each timing.", min=1)] = FULL.repeats,
    output: Annotated[Path | None, typer.Option(help="JSON file; by default named by the hardware.")] = None,
    tiny: Annotated[bool, typer.Option(help="Tiny sizes, wherever it runs: whether the code works.")] = False,
) -> None:
    """Memory, time and rate of an update at real sizes on one GPU, and what `flowbp estimate` says of it."""
    device = device_of("cpu" if tiny else "auto")
    if device.type != "cuda" and not tiny:
        raise UserError("needs a CUDA device, torch sees none; run it on a GPU, or with --tiny to see that it works")
    setting = TINY if tiny else replace(FULL, size=size, repeats=repeats)
    file = output or result_file("gpu_update-tiny" if tiny else "gpu_update", device, "json")
    if not run(setting, device, models.split(","), [int(k) for k in counts.split(",")], file):
        raise typer.Exit(1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_cli(app, MODULE)
