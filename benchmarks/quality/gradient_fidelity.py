"""How close each method's gradient is to exact backpropagation through the whole rollout, and what it costs.

The unit is one prompt.  A gradient g is that of the mean loss over `--images` images of the prompt (each with its own
noise) with respect to all trained weights, as one vector; g_full is that of the method `full` at the same noise.  All
methods share the rollout.  Every method draws `--plans` plans per prompt, over which the numbers are averaged:

    cosine        mean over plans of cos(g, g_full)
    norm          mean over plans of |g| / |g_full|
    ... of the mean over plans       the same of the expected gradient, (sum over plans of g) / plans
    ... of the mean over all         one number: the gradient averaged over plans and prompts against g_full averaged
                                     over prompts, which is what a large batch sees

Brackets: 95 % percentile bootstrap over prompts.  Differences are paired by prompt.
Seconds: of the reward stage and the sweep of one gradient; the rollout costs `plain` evaluations in addition.

    python -m benchmarks.quality.gradient_fidelity
    python -m benchmarks.quality.gradient_fidelity --prompts 64 --set guidance_scale=2
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks.common import (
    choose_device,
    clock,
    describe_run,
    format_versions,
    result_file,
    write_json,
)
from flowbp.config import TrainConfig
from flowbp.core.axes.active import All, LateBiased, Stratified
from flowbp.core.axes.coupling import Every
from flowbp.core.axes.quadrature import Euler
from flowbp.core.engine import BackwardOptions, backpropagate, rollout
from flowbp.core.guidance import guided_velocity
from flowbp.core.noise import initial_noise
from flowbp.core.plan import Plan, RolloutSpec, draw_plan
from flowbp.core.types import Trajectory
from flowbp.methods import METHODS, Method
from flowbp.rewards.losses import reward_losses
from flowbp.training.loading import LoadedModels, load_models
from imgen_common.config import load
from imgen_common.console import markdown_table, quiet_libraries
from imgen_common.errors import UserError, run_cli
from imgen_common.files import write_atomic
from imgen_common.statistics import Interval, paired_bootstrap_interval
from imgen_common.streams import normal, numpy_generator

MODULE = "benchmarks.quality.gradient_fidelity"
EXACT = "full"
PAIRED_WITH = "flowbp_sparse"
"""Method whose cosine is subtracted, prompt by prompt."""
EXTRAS: Mapping[str, Method] = {
    **{
        f"stratified K=4, refill {refill}": Method(
            active=Stratified(num_active_steps=4), quadrature=Euler(refill=refill)
        )
        for refill in ("none", "inclusion")
    },
    **{
        f"late-biased K=4, refill {refill}": Method(
            active=LateBiased(num_active_steps=4), quadrature=Euler(refill=refill)
        )
        for refill in ("none", "mass", "inclusion")
    },
    "all steps, uncoupled": Method(active=All()),
    "all steps, damped alpha=0.5": Method(active=All(), coupling=Every(alpha=0.5)),
}
"""Rows beside the named methods: sampled sets of steps with each refill, K = N, and a damped adjoint."""
VARIANTS: Mapping[str, Method] = {**METHODS, **EXTRAS}


@dataclass(frozen=True)
class FidelitySize:
    """Numbers of prompts, images per prompt, and plans per prompt and method; the seed of noise and plans."""

    prompts: int = 32
    images: int = 4
    plans: int = 16
    seed: int = 0


@dataclass
class MethodFidelity:
    """Numbers of one method, one per prompt; `total` is the sum over prompts of the mean gradient over plans."""

    cosine: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    mean_cosine: list[float] = field(default_factory=list)
    mean_norm: list[float] = field(default_factory=list)
    gradient_forwards: list[float] = field(default_factory=list)
    plain_forwards: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    total: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True)
class FidelityRow:
    """Numbers of one method, averaged over prompts."""

    method: str
    gradient_forwards: float
    plain_forwards: float
    seconds: float
    cosine: Interval
    norm: Interval
    mean_cosine: Interval
    mean_norm: Interval
    over_paired: Interval
    total_cosine: float
    total_norm: float


class PromptRollout:
    """One prompt with its rollout, from which every plan starts."""

    def __init__(
        self, config: TrainConfig, parts: LoadedModels, size: FidelitySize, index: int, device: torch.device
    ) -> None:
        self.config, self.parts, self.size, self.index, self.device = config, parts, size, index, device
        self.texts = [parts.prompts[index % len(parts.prompts)]] * size.images
        pixels = (config.model.height, config.model.width)
        cond, negative = parts.embeddings(self.texts)
        backbone, guidance = parts.backbone, config.classifier_free_guidance
        given = (backbone.velocity, cond, negative, guidance, backbone.guidance_rescale)
        self.velocity = guided_velocity(*given)
        self.options = BackwardOptions(gradient_velocity=guided_velocity(*given, gradient_only=True))
        self.sigmas = parts.backbone.sigmas(config.num_inference_steps, pixels, config.train_sigmas)
        self.samples = range(index * size.images, (index + 1) * size.images)
        x_0 = initial_noise(parts.backbone, pixels, size.seed, "fidelity-noise", self.samples).to(device)
        every = frozenset(range(config.num_inference_steps))
        self.trajectory = rollout(
            self.velocity, x_0, self.sigmas, RolloutSpec(every, every, config.num_inference_steps)
        )

    def draw_plan(self, method: Method, number: int) -> Plan:
        """Plan `number` of this prompt."""
        rng = numpy_generator(self.size.seed, "fidelity-plan", self.index, number)
        return draw_plan(method, self.sigmas, rng)

    def gradient(self, plan: Plan, number: int) -> tuple[Tensor, float]:
        """(gradient as one vector, seconds) of a plan; `number` decides the noise of renoised copies."""
        parameters = list(self.parts.parameters.values())
        for p in parameters:
            p.grad = None

        def renoise(copy: int) -> Tensor:
            shape = self.trajectory.x_end.shape[1:]
            noise = [normal(shape, self.size.seed, "fidelity-renoise", i, number, copy) for i in self.samples]
            return torch.stack(noise).to(self.device)

        start = clock(self.device)
        backpropagate(plan, self._ending(plan), self.velocity, self._loss, noise=renoise, options=self.options)
        seconds = clock(self.device) - start
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]), seconds

    def _ending(self, plan: Plan) -> Trajectory:
        """The shared rollout, which ends at the step that the reward of this plan scores."""
        stop, whole = plan.reward_step, self.trajectory
        if stop == plan.num_inference_steps:
            return whole
        x = whole.states[stop] - plan.sigmas[stop] * whole.velocities[stop]
        return Trajectory(whole.sigmas, whole.states, whole.velocities, x)

    def _loss(self, x: Tensor, rows: slice) -> Tensor:
        reward = self.config.rewards[0]
        scores = self.parts.rewards[reward.name](self.parts.backbone.decode(x), self.texts[rows])
        return reward_losses(reward.loss, scores)


def compare_to_exact(prompt: PromptRollout, method: Method, exact: Tensor, found: MethodFidelity) -> None:
    """Adds the numbers of one prompt to `found`; equal plans are computed once."""
    known: dict[Plan, Tensor] = {}
    cosines, norms, seconds, forwards, plain = [], [], [], [], []
    total = torch.zeros_like(exact)
    for number in range(prompt.size.plans):
        plan = prompt.draw_plan(method, number)
        if plan.copies or plan not in known:
            known[plan], spent = prompt.gradient(plan, number)
            seconds.append(spent)
        g = known[plan]
        total += g / prompt.size.plans
        cosines.append(cosine(g, exact))
        norms.append(norm(g) / norm(exact))
        forwards.append(plan.num_gradient_forwards)
        plain.append(plan.num_plain_forwards)
    found.cosine.append(float(np.mean(cosines)))
    found.norm.append(float(np.mean(norms)))
    found.mean_cosine.append(cosine(total, exact))
    found.mean_norm.append(norm(total) / norm(exact))
    found.gradient_forwards.append(float(np.mean(forwards)))
    found.plain_forwards.append(float(np.mean(plain)))
    found.seconds.append(float(np.mean(seconds)))
    found.total = total if found.total is None else found.total + total


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two vectors."""
    return float(torch.dot(a.double(), b.double())) / (norm(a) * norm(b))


def norm(a: Tensor) -> float:
    """Euclidean norm, in float64: in float32 the rounding over millions of entries shows in the fourth decimal."""
    return float(a.double().norm())


def measure_fidelity(
    config: TrainConfig, parts: LoadedModels, size: FidelitySize, variants: Mapping[str, Method], device: torch.device
) -> dict[str, MethodFidelity]:
    """Measures every variant on every prompt.  Raises UserError where the exact gradient is zero or not finite."""
    found = {name: MethodFidelity() for name in variants}
    for index in range(size.prompts):
        prompt = PromptRollout(config, parts, size, index, device)
        exact, _ = prompt.gradient(prompt.draw_plan(METHODS[EXACT], 0), 0)
        if not norm(exact) > 0:
            raise UserError(
                f"prompt {prompt.texts[0]!r}: the norm of the exact gradient is {norm(exact):g}; there is nothing to "
                "compare"
            )
        for name, method in variants.items():
            compare_to_exact(prompt, method, exact, found[name])
        print(f"prompt {index + 1} of {size.prompts}", file=sys.stderr, flush=True)
    return found


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean over prompts with its 95 % bootstrap interval."""
    return paired_bootstrap_interval([0.0] * len(values), values)


def summarize(found: Mapping[str, MethodFidelity]) -> list[FidelityRow]:
    """Rows in descending order of cosine.  `found` must contain `EXACT` and `PAIRED_WITH`."""
    exact, base = found[EXACT].total, found[PAIRED_WITH].cosine
    assert exact is not None
    rows = []
    for name, one in found.items():
        assert one.total is not None
        rows.append(
            FidelityRow(
                method=name,
                gradient_forwards=float(np.mean(one.gradient_forwards)),
                plain_forwards=float(np.mean(one.plain_forwards)),
                seconds=float(np.mean(one.seconds)),
                cosine=mean_interval(one.cosine),
                norm=mean_interval(one.norm),
                mean_cosine=mean_interval(one.mean_cosine),
                mean_norm=mean_interval(one.mean_norm),
                over_paired=paired_bootstrap_interval(base, one.cosine),
                total_cosine=cosine(one.total, exact),
                total_norm=norm(one.total) / norm(exact),
            )
        )
    return sorted(rows, key=lambda row: -row.cosine.mean)


def format_table(rows: Sequence[FidelityRow]) -> str:
    """The table as Markdown."""
    header = ["method", "gradient forwards", "plain", "seconds", "cosine", "norm", "cosine, mean over plans"]
    header += ["norm, mean over plans", f"cosine less {PAIRED_WITH}", "cosine, mean over all", "norm, mean over all"]
    cells = []
    for row in rows:
        spreads = [row.cosine, row.norm, row.mean_cosine, row.mean_norm]
        cells.append(
            [
                row.method,
                f"{row.gradient_forwards:.1f}",
                f"{row.plain_forwards:.1f}",
                f"{row.seconds:.3f}",
                *(f"{v.mean:.3f} [{v.low:.3f}, {v.high:.3f}]" for v in spreads),
                f"{row.over_paired.mean:+.3f} [{row.over_paired.low:+.3f}, {row.over_paired.high:+.3f}]",
                f"{row.total_cosine:.3f}",
                f"{row.total_norm:.3f}",
            ]
        )
    return markdown_table(header, cells)


def run_gradient_fidelity(
    config: TrainConfig, size: FidelitySize, device: torch.device, output: Path
) -> list[FidelityRow]:
    """Measures, prints and writes `output` (JSON) and the same as Markdown beside it."""
    if min(size.prompts, size.images, size.plans) < 1:
        raise UserError(f"{size}: prompts, images and plans must be at least 1")
    torch.set_num_threads(1)
    quiet_libraries()
    start = clock(device)
    found = measure_fidelity(config, load_models(config, device), size, VARIANTS, device)
    rows, total = summarize(found), clock(device) - start
    environment = describe_run(MODULE, sys.argv[1:], device)
    text = f"{format_table(rows)}\n\n{describe_table(config, size, environment, total)}\n"
    print(text)
    per_prompt = {name: {k: v for k, v in vars(one).items() if k != "total"} for name, one in found.items()}
    content: dict[str, Any] = {"size": asdict(size), "seconds": total, "environment": environment}
    content |= {"config": config.model_dump(mode="json"), "rows": [asdict(row) for row in rows]}
    write_json(output, content | {"per_prompt": per_prompt})
    write_atomic(output.with_suffix(".md"), text)
    print(f"written to {output}")
    return rows


def describe_table(config: TrainConfig, size: FidelitySize, environment: Mapping[str, Any], total: float) -> str:
    """The caption of the table."""
    return (
        f"{size.prompts} prompts x {size.images} images, {size.plans} plans per prompt, "
        f"N = {config.num_inference_steps}, guidance {config.guidance_scale:g}, {config.model.ref}, seed {size.seed}. "
        "A gradient is that of the mean loss over the images of a prompt. Brackets: 95 % bootstrap over prompts, after "
        "averaging over plans. Seconds: of the reward stage and the sweep of one gradient, without the rollout. "
        f"{environment['hardware']}, one thread; "
        f"{format_versions(dict(environment))}; {total:.0f} s in all."
    )


def main(
    prompts: Annotated[int, typer.Option(help="Number of prompts of data.prompts.")] = FidelitySize.prompts,
    images: Annotated[int, typer.Option(help="Images per prompt in one gradient.")] = FidelitySize.images,
    plans: Annotated[int, typer.Option(help="Plans per prompt and method.")] = FidelitySize.plans,
    seed: Annotated[int, typer.Option(help="Seed of noise and plans.")] = FidelitySize.seed,
    config: Annotated[list[Path] | None, typer.Option(help="Recipe for model, reward, loss, guidance, N.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of the recipe.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    output: Annotated[Path | None, typer.Option(help="JSON file; by default named by the hardware.")] = None,
) -> None:
    """Cosine and norm ratio of every method's gradient to that of exact backpropagation."""
    where = choose_device(device)
    file = output or result_file("gradient_fidelity", where, "json")
    run_gradient_fidelity(
        load_recipe(config or [], sets or []), FidelitySize(prompts, images, plans, seed), where, file
    )


def load_recipe(files: Sequence[Path], sets: Sequence[str]) -> TrainConfig:
    """The recipe without held-out rewards, which would only cost time."""
    return load(TrainConfig, files, ["heldout=[]", *sets])


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_cli(app, MODULE)
