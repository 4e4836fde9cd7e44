"""Rollouts in another precision, or compiled: what they evaluate, and what the gradient then is."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from families import FAMILIES, SIZE, folder_of
from tiers import tiers
from torch import Tensor, nn

from flowbp.backbones.rollout import Float8Linear, RolloutNetwork, check_rollout, to_float8
from flowbp.config import TrainConfig
from flowbp.config.rollout import RolloutConfig
from flowbp.core import engine
from flowbp.core.types import Cond
from flowbp.estimate.memory import FakeModels, WeightSizes
from flowbp.training import trainer as training
from flowbp.training.loading import LoadedModels, load_models
from flowbp.training.trainer import Trainer
from imgen_common.config import load
from imgen_common.errors import UserError
from imgen_common.memory import FlopCounter, held, nbytes

CPU = torch.device("cpu")
SMALL = ["method=full", "num_inference_steps=4", "total_batch_size=2", "heldout=[]"]


def models_of(*sets: str) -> tuple[TrainConfig, LoadedModels]:
    config = load(TrainConfig, [], [*SMALL, *sets])
    return config, load_models(config, CPU)


def trainer_of(*sets: str) -> Trainer:
    config, models = models_of(*sets)
    trainer = Trainer(config, models, Accelerator(cpu=True))
    trainer.embed_prompts(trainer.training_prompts())
    return trainer


def gradient(trainer: Trainer) -> Tensor:
    """Of an update, and removed from the weights."""
    trainer.compute_gradient()
    return take(trainer)


def take(trainer: Trainer) -> Tensor:
    found = [p.grad.flatten() for p in trainer.models.parameters.values() if p.grad is not None]
    for p in trainer.models.parameters.values():
        p.grad = None
    return torch.cat(found)


def distance(one: Tensor, other: Tensor) -> float:
    assert one.norm() > 0
    return ((one.float() - other.float()).norm() / one.norm()).item()


def inputs(models: LoadedModels, size: tuple[int, int]) -> tuple[Tensor, Tensor, Cond]:
    x = models.backbone.noise(2, size, torch.Generator().manual_seed(0))
    return x, torch.tensor([0.9, 0.2]), models.backbone.encode(["a red circle", "two blue crosses"])


@pytest.mark.slow
def test_the_gradient_is_that_of_a_rollout_whose_rounding_errors_are_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the whole rollout, against one joint graph of  x + h (v(x) + e),  e = the rounded v(x) - v(x)."""
    trainer = trainer_of("rollout.dtype=fp8", "guidance_scale=2", "guidance.detach_negative=false")
    ends = []

    def kept(*given: object, **named: object) -> object:
        ends.append(engine.rollout(*given, **named).x_end)  # type: ignore[arg-type]
        return engine.rollout(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "rollout", kept)
    ours = gradient(trainer)
    prompts, x = trainer._samples(range(2))
    conds = trainer.models.embeddings(prompts)
    exact, rounded = trainer._velocity(conds), trainer._rollout_velocity(conds)
    levels = trainer.sigmas.tolist()
    for sigma, target in pairwise(levels):
        time = torch.full((2,), sigma)
        with torch.no_grad():
            error = rounded(x, time) - exact(x, time)
        assert error.norm() > 0
        x = x + (target - sigma) * (exact(x, time) + error)
    assert distance(ends[0], x.detach()) < 1e-5  # the images are those of the rounded rollout
    loss = trainer._score(prompts, x, slice(0, 2)).losses.mean(1).sum()
    (trainer.config.classifier_free_guidance.backward_scale * loss).backward()
    assert distance(ours, take(trainer)) < 1e-4


@pytest.mark.slow
def test_steps_whose_graph_is_kept_are_not_rounded() -> None:
    plain, all_kept = (gradient(trainer_of(*sets)) for sets in ([], ["rollout.dtype=fp8", "keep_graphs=4"]))
    assert distance(plain, all_kept) < 1e-6
    assert distance(plain, gradient(trainer_of("rollout.dtype=fp8", "keep_graphs=1"))) > 1e-3


COPIES = {
    "fp8": ["rollout.dtype=fp8"],
    "bfloat16": ["rollout.dtype=bfloat16"],
    "fp8, adapters": ["rollout.dtype=fp8", "lora.rank=2", "model.dtype=bfloat16"],
    "bfloat16, adapters": ["rollout.dtype=bfloat16", "lora.rank=2"],
}


@pytest.mark.parametrize("case", tiers(COPIES, default=["fp8"], slow=["bfloat16, adapters"]))
def test_a_copy_follows_the_weights(case: str) -> None:
    """After an update it is what would be made anew; the network itself stays what it was without one."""
    sets = COPIES[case]
    trainer = trainer_of("optim.learning_rate=0.01", *sets)
    models, config = trainer.models, trainer.config
    assert models.rollout is not None
    _, plain = models_of(*sets[1:])
    given = inputs(plain, (32, 32))
    with torch.no_grad():
        assert torch.equal(models.backbone.velocity(*given), plain.backbone.velocity(*given))
    for _ in range(2):
        trainer.step()  # adapters of zeros do nothing at first
    with torch.no_grad():
        stale = models.rollout.velocity(*given)
        models.rollout.refresh()
        fresh = models.rollout.velocity(*given)
        exact = models.backbone.velocity(*given)
    assert torch.equal(fresh, RolloutNetwork(models.backbone, config.rollout).velocity(*given))
    assert distance(exact, fresh) < distance(exact, stale)
    shared = {id(p) for p in models.backbone.net.parameters()}
    assert {id(p) for p in models.rollout.net.parameters() if p.requires_grad} <= shared


AMPLIFYING = ("qwen_edit", "qwen_edit_plus", "qwen_image_21")
"""Families whose tiny random networks make much of small differences."""


@pytest.mark.parametrize("family", tiers(FAMILIES, default=["sd3"]))
@pytest.mark.parametrize(
    "sets",
    [[], pytest.param(["lora.rank=2"], marks=pytest.mark.slow), ["lora.rank=2", "model.dtype=bfloat16"]],
    ids=" ".join,
)
def test_every_family_rolls_out_in_low_precision(family: str, sets: list[str], tmp_path: Path) -> None:
    size = FAMILIES[family].size
    where = [f"model.ref={folder_of(family, tmp_path)}", f"model.height={size[0]}", f"model.width={size[1]}"]
    for dtype in ("bfloat16", "fp8"):
        if f"model.dtype={dtype}" in sets:
            continue
        _, models = models_of(*where, *sets, f"rollout.dtype={dtype}")
        given = inputs(models, size)
        assert models.rollout is not None
        with torch.no_grad():
            exact, found = models.backbone.velocity(*given), models.rollout.velocity(*given)
            models.backbone.bfloat16 = True
            rounded = models.backbone.velocity(*given)
        most = {"bfloat16": 0.05, "fp8": 0.15}[dtype] * (5 if family in AMPLIFYING else 1)
        assert 0 < distance(exact, found) < most
        if dtype == "bfloat16":
            assert torch.equal(found, rounded)  # autocast would have made the same copies in every evaluation


def test_8_bit_floats_keep_what_they_can_hold() -> None:
    """Small integers are exact, others are rounded to 4 significant bits; a row of zeros stays."""
    layer, x = nn.Linear(16, 32), torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    whole = torch.randint(-7, 8, (32, 16), generator=torch.Generator().manual_seed(1)).float()
    whole[:, 0] = 7
    with torch.no_grad():
        layer.weight.copy_(whole)
        layer.bias.zero_()
        exact = torch.randint(-7, 8, x.shape, generator=torch.Generator().manual_seed(2)).float()
        exact[..., 0] = 7
        exact[0, 0] = 0
        assert torch.equal(Float8Linear(layer)(exact), layer(exact).bfloat16())
    values, scale = to_float8(x.flatten(0, 1))
    off = ((values.float() * scale).view(x.shape) - x).abs()
    assert (off <= x.abs() / 16 + scale.view(3, 5, 1) * 2**-10).all()


def test_operations_in_8_bit_floats_are_counted() -> None:
    layer, x = nn.Linear(32, 16), torch.randn(3, 32)
    counts = []
    for one in (layer, Float8Linear(layer)):
        with FlopCounter() as counted:
            one(x)
        counts.append(counted.flops)
    assert counts == [2 * 3 * 32 * 16] * 2


@pytest.mark.parametrize("case", COPIES)
def test_an_estimate_counts_the_copy(case: str) -> None:
    config, models = models_of(*COPIES[case])
    assert models.rollout is not None
    own = {id(t) for t in held([models.backbone.net])}
    copied = nbytes(t for t in held([models.rollout.net]) if id(t) not in own)
    found = WeightSizes.of(FakeModels(config), config, 1)
    assert found.static["rollout copy"] == found.startup["rollout copy"] == copied > 0


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["rollout.dtype=fp8", "distributed.kind=fsdp2"], "rollout: not under distributed.kind fsdp2"),
        (["rollout.compile=default", "distributed.kind=zero2"], "rollout: not under distributed.kind zero2"),
        (["rollout.dtype=fp8", "lora.rank=2", "model.quantization=int8"], "fp8: not with model.quantization int8"),
        (["rollout.dtype=bfloat16", "model.dtype=bfloat16"], "bfloat16: not with model.dtype bfloat16"),
    ],
)
def test_what_rollouts_do_not_go_with(sets: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(TrainConfig, [], sets)


def test_what_this_machine_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_rollout(RolloutConfig(dtype="fp8", compile="default"))
    with pytest.raises(UserError, match="CUDA graphs need a CUDA device, torch sees none; set it to default"):
        check_rollout(RolloutConfig(compile="reduce-overhead"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(UserError, match=r"needs a GPU of compute capability 8\.9 .* this one has 8\.0; set it to bf"):
        check_rollout(RolloutConfig(dtype="fp8"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [None, "fp8"])
def test_compiled_rollouts_are_equal_to_rounding(mode: str, dtype: str | None, tmp_path: Path) -> None:
    """By inductor; on a CPU a graph is the compiled network alone.  Nothing else is compiled."""
    torch._dynamo.reset()
    _, models = models_of(f"model.ref={folder_of('sd3', tmp_path)}", "model.height=16", "model.width=24")
    given = inputs(models, SIZE)
    plain = RolloutNetwork(models.backbone, RolloutConfig(dtype=dtype))
    rolled = RolloutNetwork(models.backbone, RolloutConfig(dtype=dtype, compile=mode))
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        models.backbone.velocity(*given)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
        found, expected = rolled.velocity(*given), plain.velocity(*given)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    # kernels round in another order, which 8-bit floats amplify
    assert distance(expected, found) < (1e-5 if dtype is None else 0.05)
