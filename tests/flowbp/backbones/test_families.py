"""What every backbone must do, on tiny random models of each family: a new one is one line in `families.FAMILIES`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from families import FAMILIES, SIZE
from fields import gradient, relative
from oracle import backpropagate_jointly, roll
from tiers import tiers

from flowbp import backbones
from flowbp.backbones.loading import mark_trainable
from flowbp.config import LoraConfig, TrainConfig
from flowbp.core.engine import backpropagate, rollout
from flowbp.core.guidance import guided_velocity
from flowbp.core.plan import draw_plan
from flowbp.core.settings import Guidance
from flowbp.core.types import Backbone
from flowbp.evaluation import sampling
from flowbp.methods import METHODS
from flowbp.training.loading import load_models
from flowbp.training.trainer import Trainer
from imgen_common.config import load
from imgen_common.errors import UserError

PROMPTS = ["a red circle", "two blue crosses"]


def theirs(folder: Path, steps: int, guidance: float, seed: int, output: str) -> tuple[DiffusionPipeline, torch.Tensor]:
    """The unmodified pipeline and what it makes of the first prompt."""
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps, "output_type": output, "height": SIZE[0], "width": SIZE[1]}
    options |= FAMILIES[folder.name].guided(guidance)
    return pipe, pipe(prompt=PROMPTS[0], generator=torch.Generator().manual_seed(seed), **options).images


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_an_image_is_the_pipelines_own(backbone: Backbone, folder: Path, guidance: float) -> None:
    ours = sampling.generate_images(backbone, PROMPTS[0], [5], SIZE, 4, guidance)
    _, expected = theirs(folder, 4, guidance, 5, "pt")
    assert ours.shape == expected.shape == (1, 3, *SIZE)
    assert ours.std() > 0.01
    assert (ours - expected).abs().max() < 1e-5


@pytest.mark.parametrize("steps", [4, 25])
def test_noise_levels_are_the_pipelines_own(backbone: Backbone, folder: Path, steps: int) -> None:
    pipe, _ = theirs(folder, steps, 1.0, 0, "latent")
    sigmas = backbone.sigmas(steps, SIZE)
    assert torch.equal(sigmas, pipe.scheduler.sigmas)
    assert sigmas.shape == (steps + 1,)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0


def test_a_cached_velocity_is_the_reforwarded_one(backbone: Backbone) -> None:
    cond = backbone.encode(PROMPTS)
    x = backbone.noise(2, SIZE, torch.Generator().manual_seed(0))
    assert x.shape == (2, *backbone.latent_shape(SIZE))
    sigma = torch.full((2,), 0.6)
    for dtype in (torch.float32, torch.bfloat16):
        backbone.bfloat16 = dtype == torch.bfloat16
        with torch.no_grad():
            cached = backbone.velocity(x, sigma, cond)
        again = backbone.velocity(x.clone().requires_grad_(), sigma, cond)
        backbone.bfloat16 = False
        assert torch.equal(cached, again)
        assert cached.shape == x.shape


def test_samples_do_not_see_each_other(backbone: Backbone) -> None:
    cond = backbone.encode(PROMPTS)
    x = backbone.noise(2, SIZE, torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.9, 0.2])
    both = backbone.velocity(x, sigma, cond)
    for i in range(2):
        alone = backbone.velocity(x[i : i + 1], sigma[i : i + 1], {k: v[i : i + 1] for k, v in cond.items()})
        assert torch.allclose(alone, both[i : i + 1], atol=1e-5)
    assert not torch.allclose(both[0], both[1], atol=1e-3)


def test_the_skeleton_is_the_model_without_weights(backbone: Backbone, folder: Path) -> None:
    bones = backbones.init_empty_weights(str(folder))
    assert torch.equal(bones.sigmas(7, SIZE), backbone.sigmas(7, SIZE))
    assert bones.latent_shape(SIZE) == backbone.latent_shape(SIZE)
    names = {name: p.shape for name, p in backbone.net.named_parameters()}
    assert {name: p.shape for name, p in bones.net.named_parameters()} == names
    assert all(p.is_meta for p in bones.net.parameters())
    with pytest.raises(UserError, match="multiples of"):
        bones.latent_shape((17, 24))


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_gradient_reaches_every_trained_weight(folder: Path, lora: LoraConfig | None) -> None:
    backbone = backbones.load(str(folder))
    parameters = mark_trainable(backbone.net, TrainConfig(lora=lora))
    for name, parameter in parameters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)  # they start at zero, and so hide the other factor
    x = backbone.noise(2, SIZE, torch.Generator().manual_seed(0))
    v = backbone.velocity(x, torch.tensor([0.9, 0.2]), backbone.encode(PROMPTS))
    (v * torch.randn(v.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    silent = [name for name, p in parameters.items() if p.grad is None or not p.grad.any()]
    unused = ("2.attn.add_q_proj.", "2.attn.norm_added_q.")  # the last block of SD3 drops its text after reading it
    assert [name for name in silent if not any(part in name for part in unused)] == []
    assert bool(parameters)
    assert (lora is None) == ("lora" not in next(iter(parameters)))


GUIDANCE = {"unguided": Guidance(), "guided": Guidance(scale=3.0, detach_negative=False)}
JOINT = [f"{method} {how}" for method in METHODS for how in GUIDANCE]


@pytest.mark.parametrize("case", tiers(JOINT, default=["flowbp_bridge guided", "draft_lv unguided"]))
def test_the_sweep_is_the_joint_graph(folder: Path, case: str) -> None:
    method, how = case.split()
    backbone = backbones.load(str(folder), dtype=torch.float64)
    backbone.net.requires_grad_(True)
    cond, negative = backbone.encode(PROMPTS), backbone.encode([""])
    velocity = guided_velocity(backbone.velocity, cond, negative, GUIDANCE[how])
    rng = np.random.default_rng(0)
    sigmas = backbone.sigmas(12, SIZE).double()
    drawn = draw_plan(METHODS[method], sigmas.tolist(), rng)
    x_0 = backbone.noise(2, SIZE, torch.Generator().manual_seed(0)).double()
    eps = torch.randn(max(drawn.copies, 1), *x_0.shape, generator=torch.Generator().manual_seed(1)).double()

    def loss(x: torch.Tensor, rows: slice) -> torch.Tensor:
        return backbone.decode(x).pow(2).mean((1, 2, 3))

    backpropagate(drawn, rollout(velocity, x_0, sigmas, drawn.rollout_spec), velocity, loss, noise=eps)
    swept = gradient(backbone.net)
    backbone.net.zero_grad()
    backpropagate_jointly(METHODS[method], drawn, roll(velocity, x_0, sigmas), loss, eps)
    assert swept.norm() > 0
    assert relative(swept, gradient(backbone.net)) < 1e-10


def test_decoding_is_differentiable(backbone: Backbone) -> None:
    x = backbone.noise(1, SIZE, torch.Generator().manual_seed(0)).requires_grad_()
    images = backbone.decode(x)
    images.sum().backward()
    assert images.shape == (1, 3, *SIZE)
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.any()


@pytest.mark.parametrize("lora", ["null", "{rank: 2}"])
def test_an_update_in_bfloat16_trains_float32_weights(folder: Path, lora: str) -> None:
    """Frozen weights are bfloat16 under adapters; the cached velocity is still the re-forwarded one, bit for bit."""
    sets = [f"model={{ref: {folder}, height: {SIZE[0]}, width: {SIZE[1]}, dtype: bfloat16}}", f"lora={lora}"]
    sets += [
        "total_batch_size=2",
        "num_inference_steps=6",
        "guidance_scale=2",
        "guidance.batched=false",
        "method=leapalign",
    ]
    config = load(TrainConfig, [], sets)
    parts = load_models(config, torch.device("cpu"))
    trainer = Trainer(config, parts, Accelerator(cpu=True))
    assert {p.dtype for p in parts.parameters.values()} == {torch.float32}
    frozen = {p.dtype for name, p in parts.backbone.net.named_parameters() if name not in parts.parameters}
    assert frozen == (set() if lora == "null" else {torch.bfloat16})
    before = {name: p.detach().clone() for name, p in parts.parameters.items()}
    metrics = trainer.step()
    assert metrics["grad_norm"] > 0
    moved = [name for name, p in parts.parameters.items() if not torch.equal(p, before[name])]
    assert moved
    cond, negative = parts.embeddings(PROMPTS)
    velocity = guided_velocity(parts.backbone.velocity, cond, negative, config.classifier_free_guidance)
    x, sigma = parts.backbone.noise(2, SIZE, torch.Generator().manual_seed(0)), torch.full((2,), 0.6)
    with torch.no_grad():
        cached = velocity(x, sigma)
    assert torch.equal(cached, velocity(x.clone().requires_grad_(), sigma))
    found = trainer.evaluate(PROMPTS, "prompts", 2.0)
    assert all(abs(score) < 1e3 for score in found.scores["reward"])
