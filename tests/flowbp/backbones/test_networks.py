"""Switches for memory and speed: the same gradient, or a clear refusal."""

from functools import partialmethod
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from families import SIZE, folder_of, sides_of, size_of
from given import data_of, encode
from torch import Tensor

from flowbp import backbones
from flowbp.backbones import options
from flowbp.config import ModelConfig, TrainConfig
from flowbp.core.types import Backbone
from flowbp.training.loading import load_models
from flowbp.training.trainer import Trainer
from imgen_common.config import load
from imgen_common.errors import UserError
from imgen_common.memory import LiveBytes, pieces

PROMPTS = ["a red circle", "two blue crosses"]


def model_of(size: tuple[int, int] = SIZE, **changes: object) -> ModelConfig:
    return ModelConfig.model_validate({"height": size[0], "width": size[1], **changes})


def distance(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    assert one.norm() > 0
    return ((one - other).norm() / one.norm()).item()


# the autoencoder ------------------------------------------------------------------------------------------------------


def loss(backbone: Backbone, x: Tensor) -> Tensor:
    return backbone.decode(x).pow(2).mean()


def decoded(folder: Path, **vae: object) -> tuple[Backbone, Tensor, Tensor]:
    """A backbone with these switches, latents of two images, and the gradient of a loss at them."""
    backbone = backbones.load(str(folder), dtype=torch.float64)
    options.apply_model_options(backbone, model_of(size_of(folder), vae=vae))
    x = backbone.noise(2, size_of(backbone), torch.Generator().manual_seed(0)).double().requires_grad_()
    return backbone, x, torch.autograd.grad(loss(backbone, x), x)[0]


@pytest.fixture
def recomputable(folder: Path) -> Path:
    """A family whose autoencoder can be recomputed."""
    if folder.name in ("krea2", "qwen_image", "qwen_image_21", "qwen_edit", "qwen_edit_plus"):
        with pytest.raises(UserError, match=r"vae.gradient_checkpointing: AutoencoderKLQwenImage(21)? has none"):
            decoded(folder, gradient_checkpointing=True)
        pytest.skip("its autoencoder has no checkpointing")
    return folder


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"tile": 8, "slicing": True},
        *(pytest.param(one, marks=pytest.mark.exhaustive) for one in ({"slicing": True}, {"tile": 16})),
    ],
    ids=str,
)
def test_a_checkpointed_decoder_has_the_same_gradient(recomputable: Path, switches: dict[str, object]) -> None:
    _, _, plain = decoded(recomputable, **switches)
    _, _, again = decoded(recomputable, **switches, gradient_checkpointing=True)
    assert distance(plain, again) < 1e-12


def test_slices_are_the_whole_and_tiles_are_not(folder: Path) -> None:
    _, _, whole = decoded(folder)
    assert distance(whole, decoded(folder, slicing=True)[2]) < 1e-12
    if folder.name != "qwen_image_21":  # whose tiles would have 64 pixels, as its images here
        assert distance(whole, decoded(folder, tile=8)[2]) > 1e-3


def test_a_decoder_of_its_own_precision_decodes_almost_the_same(folder: Path) -> None:
    backbone, _, rounded = decoded(folder, dtype="bfloat16")
    assert backbone.pipe.vae.dtype == torch.bfloat16
    assert backbone.net.dtype == torch.float64
    assert 1e-12 < distance(decoded(folder)[2], rounded) < 0.1


def test_the_gradient_through_tiles_is_that_of_their_image(recomputable: Path) -> None:
    backbone, x, gradient = decoded(recomputable, tile=8, gradient_checkpointing=True)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    with torch.no_grad():
        step = 1e-5 * direction
        slope = (loss(backbone, x + step) - loss(backbone, x - step)) / 2e-5
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


@pytest.mark.slow
def test_checkpointing_and_tiles_lower_what_a_decoding_holds(recomputable: Path) -> None:
    def held(**vae: object) -> int:
        backbone, x, _ = decoded(recomputable, **vae)
        with LiveBytes([x, *backbone.pipe.vae.parameters()]) as live:
            torch.autograd.grad(loss(backbone, x), x)
        return live.peak

    whole, checkpointed = held(), held(gradient_checkpointing=True)
    assert checkpointed < whole
    assert held(gradient_checkpointing=True, tile=8) < checkpointed


@pytest.mark.parametrize("side", [12, 24, 4096])
def test_tiles_that_do_not_fit_are_refused(folder: Path, side: int) -> None:
    multiple, longer = (64, 64) if folder.name == "qwen_image_21" else (8, 24)
    said = f"model.vae.tile {side}: must be a multiple of {multiple} pixels and less than .* {longer}"
    with pytest.raises(UserError, match=said):
        options.apply_model_options(
            backbones.init_empty_weights(str(folder)), model_of(size_of(folder), vae={"tile": side})
        )


# attention ------------------------------------------------------------------------------------------------------------


def swept(folder: Path, attention: str | None, compiled: bool = False) -> Tensor:
    """The gradient of one velocity."""
    backbone = backbones.load(str(folder))
    options.apply_model_options(backbone, model_of(size_of(folder), attention=attention))
    if compiled:
        options.compile_blocks(backbone.net)
    backbone.net.requires_grad_(True)
    x = backbone.noise(2, size_of(backbone), torch.Generator().manual_seed(0))
    backbone.velocity(x, torch.tensor([0.9, 0.2]), encode(backbone, PROMPTS)).pow(2).sum().backward()
    return torch.cat([p.grad.flatten() for p in backbone.net.parameters() if p.grad is not None])


def test_kernels_of_attention_agree(folder: Path) -> None:
    if folder.name.startswith(("sd3", "z_image", "qwen_")):
        with pytest.raises(UserError, match=r"Transformer2DModel has no choice of backends.*set it to null"):
            swept(folder, "native")
        return
    usual = swept(folder, None)
    kernels = ["native", "_native_flash", "_native_math"]
    if folder.name == "krea2":
        kernels.remove("_native_flash")
        with pytest.raises(UserError, match=r"attention _native_flash: takes no mask, .* set it to native"):
            swept(folder, "_native_flash")
    found = {name: swept(folder, name) for name in kernels}
    assert all(distance(usual, one) < 1e-5 for one in found.values())
    assert not torch.equal(found["native"], found["_native_math"])  # the choice reaches the kernel


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sage", "quantized and has no backward pass"),
        ("_sage_qk_int8_pv_fp16_cuda", "quantized and has no backward pass"),
        ("flash_hub", "would fetch a kernel from the hub"),
        ("nativ", "native"),
    ],
)
def test_kernels_that_cannot_train_are_refused(name: str, said: str) -> None:
    with pytest.raises(UserError, match=f"model.attention.*{said}"):
        load(TrainConfig, [], [f"model.attention={name}"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="they work here")
def test_what_this_machine_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="needs a CUDA device"):
        options.check_machine(model_of(attention="_native_cudnn"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="flash_attn is not installed"):
        options.check_machine(model_of(attention="flash"))
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="torchao is not installed; run: uv pip install torchao"):
        options.check_machine(model_of(quantization="int8"))
    with pytest.raises(UserError, match="torchao is not installed"):
        options.quantize(torch.nn.Linear(2, 2))


# 8-bit and compiled blocks --------------------------------------------------------------------------------------------


def config_of(folder: Path, *sets: str) -> TrainConfig:
    common = [
        f"model.ref={folder}",
        *(f"model.{side}={pixels}" for side, pixels in sides_of(folder).items()),
        "num_inference_steps=6",
        "total_batch_size=4",
    ]
    common += data_of(folder.name)
    return load(TrainConfig, [], [*common, "method=flowbp_bridge", "guidance_scale=1.5", *sets])


def trainer_of(config: TrainConfig) -> Trainer:
    """With adapters that say something, so that both of their factors have a gradient."""
    parts = load_models(config, torch.device("cpu"))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in parts.parameters.values():
            p.add_(0.02 * torch.randn(p.shape, generator=rng))
    return Trainer(config, parts, Accelerator(cpu=True))


def update(trainer: Trainer) -> Tensor:
    trainer.compute_gradient()
    return torch.cat([p.grad.flatten() for p in trainer.models.parameters.values() if p.grad is not None])


@pytest.mark.parametrize(("sets", "kind"), [([], "lora"), (["lora.rank=2", "distributed.kind=fsdp2"], "ddp")])
def test_a_quantized_base_needs_adapters_and_whole_weights(sets: list[str], kind: str) -> None:
    with pytest.raises(UserError, match=f"model.quantization int8 goes with adapters and whole weights only.*{kind}"):
        load(TrainConfig, [], ["model.quantization=int8", *sets])


def test_compiled_blocks_that_are_cut_up_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.compile: not under distributed\.kind fsdp2"):
        load(TrainConfig, [], ["model.compile=true", "distributed.kind=fsdp2"])


@pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_train_over_an_8_bit_base(folder: Path, dtype: str) -> None:
    sets = ["lora.rank=2", f"model.dtype={dtype}", "model.gradient_checkpointing=true"]
    plain = update(trainer_of(config_of(folder, *sets)))
    trainer = trainer_of(config_of(folder, *sets, "model.quantization=int8"))
    net = trainer.models.backbone.net
    weights = [m.weight for block in options.blocks_of(net) for m in block.modules() if hasattr(m, "base_layer")]
    before = [next(pieces(weight)).clone() for weight in weights]
    assert {piece.dtype for piece in before} == {torch.int8}
    assert distance(plain, update(trainer)) < 0.1  # 8 bits are not 16
    silent = [name for name, p in trainer.models.parameters.items() if p.grad is None or not p.grad.any()]
    assert [name for name in silent if "2.attn.add_q_proj." not in name] == []
    trainer.step()
    assert all(torch.equal(next(pieces(w)), kept) for w, kept in zip(weights, before, strict=True))


@pytest.mark.exhaustive
@pytest.mark.parametrize(("family", "backend"), [("flux2", "aot_eager"), ("sd3", "eager")])
def test_compiled_blocks_have_the_same_gradient(
    family: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under adapters and with recomputed blocks; without inductor, which would compile for minutes."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
    folder = folder_of(family, tmp_path)
    sets = ["lora.rank=2", "model.gradient_checkpointing=true"]
    plain = update(trainer_of(config_of(folder, *sets)))
    torch._dynamo.utils.counters.clear()
    trainer = trainer_of(config_of(folder, *sets, "model.compile=true"))
    assert distance(plain, update(trainer)) < 1e-4
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


@pytest.mark.exhaustive
def test_inductors_kernels_have_the_same_gradient(tmp_path: Path) -> None:
    """Of one pass; they round in another order."""
    folder = folder_of("flux2", tmp_path)
    assert distance(swept(folder, None), swept(folder, None, compiled=True)) < 1e-4
