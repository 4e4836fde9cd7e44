"""How close each method's gradient is to exact backpropagation through the whole rollout, and what it costs.

Unit: one prompt.  A gradient is that of the mean loss over `--pictures` pictures of the prompt (own noise each), with
respect to all trained weights, as one vector g; g_full is that of the method `full` at the same noise.  All methods
share the rollout.  For every prompt `--plans` plans are drawn per method, and these are averaged over:

    cosine        mean over plans of cos(g, g_full)
    norm          mean over plans of |g| / |g_full|
    ... of the mean over plans       the same of the expected gradient, (sum over plans of g) / plans
    ... of the mean over all         one number: the gradient averaged over plans and prompts against g_full averaged
                                     over prompts, which is what a large batch sees

Brackets: 95 % percentile bootstrap over prompts.  Differences are paired by prompt.
Seconds: reward stage and sweep alone, per gradient; the rollout costs `plain` evaluations besides.

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
    clock,
    device_of,
    result_file,
    stamp,
    versions,
    write_json,
)
from flowbp.config import TrainConfig
from flowbp.core.axes.active import All, LateBiased, Stratified
from flowbp.core.axes.coupling import Every
from flowbp.core.axes.quadrature import Euler
from flowbp.core.engine import backpropagate, rollout
from flowbp.core.guidance import guided_velocity
from flowbp.core.noise import initial_noise
from flowbp.core.plan import Plan, RolloutSpec, draw_plan
from flowbp.core.types import Trajectory
from flowbp.methods import METHODS, Method
from flowbp.training.loading import LoadedModels, load_models
from flowbp.training.reward_stage import reward_losses
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
"""Rows beside the named methods: a drawn set against its refills, K = N, and a damped adjoint."""
VARIANTS: Mapping[str, Method] = {**METHODS, **EXTRAS}


@dataclass(frozen=True)
class Size:
    """How many prompts, pictures of each, and plans; the seed of noise and plans."""

    prompts: int = 32
    pictures: int = 4
    plans: int = 16
    seed: int = 0


@dataclass
class Measured:
    """One method: a number per prompt everywhere; `total` is the sum over prompts of the mean gradient over plans."""

    cosine: list[float] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    mean_cosine: list[float] = field(default_factory=list)
    mean_norm: list[float] = field(default_factory=list)
    gradient_forwards: list[float] = field(default_factory=list)
    plain_forwards: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    total: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Row:
    """One method, averaged over prompts."""

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


class Prompt:
    """One prompt with its rollout, from which every plan starts."""

    def __init__(self, config: TrainConfig, parts: LoadedModels, size: Size, index: int, device: torch.device) -> None:
        self.config, self.parts, self.size, self.index, self.device = config, parts, size, index, device
        self.texts = [parts.prompts[index % len(parts.prompts)]] * size.pictures
        pixels = (config.model.height, config.model.width)
        cond, negative = parts.embeddings(self.texts)
        self.velocity = guided_velocity(parts.backbone.velocity, cond, negative, config.classifier_free_guidance)
        self.sigmas = parts.backbone.sigmas(config.num_inference_steps, pixels)
        self.samples = range(index * size.pictures, (index + 1) * size.pictures)
        x_0 = initial_noise(parts.backbone, pixels, size.seed, "fidelity-noise", self.samples).to(device)
        every = frozenset(range(config.num_inference_steps))
        self.trajectory = rollout(
            self.velocity, x_0, self.sigmas, RolloutSpec(every, every, config.num_inference_steps)
        )

    def draw(self, method: Method, number: int) -> Plan:
        """Plan `number` of this prompt."""
        rng = numpy_generator(self.size.seed, "fidelity-plan", self.index, number)
        return draw_plan(method, self.sigmas, rng)

    def gradient(self, drawn: Plan, number: int) -> tuple[Tensor, float]:
        """(gradient as one vector, seconds) of a plan; `number` names the noise of renoised copies."""
        parameters = list(self.parts.parameters.values())
        for p in parameters:
            p.grad = None

        def renoise(copy: int) -> Tensor:
            shape = self.trajectory.x_end.shape[1:]
            draws = [normal(shape, self.size.seed, "fidelity-renoise", i, number, copy) for i in self.samples]
            return torch.stack(draws).to(self.device)

        start = clock(self.device)
        backpropagate(drawn, self._ending(drawn), self.velocity, self._loss, noise=renoise)
        spent = clock(self.device) - start
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]), spent

    def _ending(self, drawn: Plan) -> Trajectory:
        """The shared rollout, ended where the reward of this plan looks."""
        stop, whole = drawn.reward_step, self.trajectory
        if stop == drawn.num_inference_steps:
            return whole
        x = whole.states[stop] - drawn.sigmas[stop] * whole.velocities[stop]
        return Trajectory(whole.sigmas, whole.states, whole.velocities, x)

    def _loss(self, x: Tensor, rows: slice) -> Tensor:
        reward = self.config.rewards[0]
        scores = self.parts.rewards[reward.name](self.parts.backbone.decode(x), self.texts[rows])
        return reward_losses(reward.loss, scores)


def compare(prompt: Prompt, method: Method, exact: Tensor, found: Measured) -> None:
    """Adds one prompt to what was measured of a method; equal plans are computed once."""
    known: dict[Plan, Tensor] = {}
    cosines, norms, seconds, forwards, plain = [], [], [], [], []
    total = torch.zeros_like(exact)
    for number in range(prompt.size.plans):
        drawn = prompt.draw(method, number)
        if drawn.copies or drawn not in known:
            known[drawn], spent = prompt.gradient(drawn, number)
            seconds.append(spent)
        g = known[drawn]
        total += g / prompt.size.plans
        cosines.append(cosine(g, exact))
        norms.append(length(g) / length(exact))
        forwards.append(drawn.num_gradient_forwards)
        plain.append(drawn.num_plain_forwards)
    found.cosine.append(float(np.mean(cosines)))
    found.norm.append(float(np.mean(norms)))
    found.mean_cosine.append(cosine(total, exact))
    found.mean_norm.append(length(total) / length(exact))
    found.gradient_forwards.append(float(np.mean(forwards)))
    found.plain_forwards.append(float(np.mean(plain)))
    found.seconds.append(float(np.mean(seconds)))
    found.total = total if found.total is None else found.total + total


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between two vectors."""
    return float(torch.dot(a.double(), b.double())) / (length(a) * length(b))


def length(a: Tensor) -> float:
    """Euclidean norm; in float32 its rounding over millions of entries shows in the fourth decimal."""
    return float(a.double().norm())


def measure(
    config: TrainConfig, parts: LoadedModels, size: Size, variants: Mapping[str, Method], device: torch.device
) -> dict[str, Measured]:
    """Every variant on every prompt."""
    found = {name: Measured() for name in variants}
    for index in range(size.prompts):
        prompt = Prompt(config, parts, size, index, device)
        exact, _ = prompt.gradient(prompt.draw(METHODS[EXACT], 0), 0)
        if not length(exact) > 0:
            raise UserError(f"prompt {prompt.texts[0]!r}: the exact gradient is {length(exact):g}; nothing to compare")
        for name, method in variants.items():
            compare(prompt, method, exact, found[name])
        print(f"prompt {index + 1} of {size.prompts}", file=sys.stderr, flush=True)
    return found


def interval(values: Sequence[float]) -> Interval:
    """Mean over prompts with its 95 % bootstrap interval."""
    return paired_bootstrap_interval([0.0] * len(values), values)


def summarise(found: Mapping[str, Measured]) -> list[Row]:
    """Rows by cosine, the exact one first.  Needs `full` and the method that differences are taken from."""
    exact, base = found[EXACT].total, found[PAIRED_WITH].cosine
    assert exact is not None
    rows = []
    for name, one in found.items():
        assert one.total is not None
        rows.append(
            Row(
                method=name,
                gradient_forwards=float(np.mean(one.gradient_forwards)),
                plain_forwards=float(np.mean(one.plain_forwards)),
                seconds=float(np.mean(one.seconds)),
                cosine=interval(one.cosine),
                norm=interval(one.norm),
                mean_cosine=interval(one.mean_cosine),
                mean_norm=interval(one.mean_norm),
                over_paired=paired_bootstrap_interval(base, one.cosine),
                total_cosine=cosine(one.total, exact),
                total_norm=length(one.total) / length(exact),
            )
        )
    return sorted(rows, key=lambda row: -row.cosine.mean)


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
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


def run(config: TrainConfig, size: Size, device: torch.device, output: Path) -> list[Row]:
    """Measures, prints, writes `output` (JSON) and the same as Markdown beside it."""
    if min(size.prompts, size.pictures, size.plans) < 1:
        raise UserError(f"{size}: prompts, pictures and plans must be at least 1")
    torch.set_num_threads(1)
    quiet_libraries()
    start = clock(device)
    found = measure(config, load_models(config, device), size, VARIANTS, device)
    rows, total = summarise(found), clock(device) - start
    environment = stamp(MODULE, sys.argv[1:], device)
    text = f"{markdown(rows)}\n\n{caption(config, size, environment, total)}\n"
    print(text)
    per_prompt = {name: {k: v for k, v in vars(one).items() if k != "total"} for name, one in found.items()}
    content: dict[str, Any] = {"size": asdict(size), "seconds": total, "environment": environment}
    content |= {"config": config.model_dump(mode="json"), "rows": [asdict(row) for row in rows]}
    write_json(output, content | {"per_prompt": per_prompt})
    write_atomic(output.with_suffix(".md"), text)
    print(f"written to {output.name}")
    return rows


def caption(config: TrainConfig, size: Size, environment: Mapping[str, Any], total: float) -> str:
    """What the numbers are of."""
    return (
        f"{size.prompts} prompts x {size.pictures} pictures, {size.plans} plans a prompt, "
        f"N = {config.num_inference_steps}, guidance {config.guidance_scale:g}, {config.model.ref}, seed {size.seed}. "
        "A gradient is of the mean loss "
        "over the pictures of a prompt; brackets: 95 % bootstrap over prompts, after averaging over plans. Seconds: "
        f"reward stage and sweep of one gradient, without the rollout. {environment['hardware']}, one thread; "
        f"{versions(dict(environment))}; {total:.0f} s in all."
    )


def main(
    prompts: Annotated[int, typer.Option(help="Prompts, from the start of data.prompts.")] = Size.prompts,
    pictures: Annotated[int, typer.Option(help="Pictures of a prompt in one gradient.")] = Size.pictures,
    plans: Annotated[int, typer.Option(help="Plans drawn per prompt and method.")] = Size.plans,
    seed: Annotated[int, typer.Option(help="Seed of noise and plans.")] = Size.seed,
    config: Annotated[list[Path] | None, typer.Option(help="Recipe for model, reward, loss, guidance, N.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="A key of it, such as guidance_scale=2.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    output: Annotated[Path | None, typer.Option(help="JSON file; by default named by the hardware.")] = None,
) -> None:
    """Cosine and norm ratio of every method's gradient to exact backpropagation."""
    where = device_of(device)
    file = output or result_file("gradient_fidelity", where, "json")
    run(recipe_of(config or [], sets or []), Size(prompts, pictures, plans, seed), where, file)


def recipe_of(files: Sequence[Path], sets: Sequence[str]) -> TrainConfig:
    """What is compared: the first reward alone, held-out ones would only cost time."""
    return load(TrainConfig, files, ["heldout=[]", *sets])


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_cli(app, MODULE)
