"""The anchor to the base model: its base, its gradient in an update, what it costs, and that it is off."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from families import FAMILIES, folder_of, sides_of
from given import data_of
from tiers import tiers
from torch import Tensor

from flowbp import backbones
from flowbp.config import TrainConfig
from flowbp.core.engine import rollout
from flowbp.core.guidance import guided_velocity
from flowbp.core.plan import Plan, draw_plan
from flowbp.core.types import Backbone
from flowbp.estimate import estimate_run
from flowbp.estimate.memory import FakeModels, WeightSizes
from flowbp.training.loading import load_models
from flowbp.training.preflight import check_run, update_arithmetic
from flowbp.training.trainer import Trainer
from imgen_common.config import load
from imgen_common.errors import UserError
from imgen_common.streams import numpy_generator

LORA = ("lora={rank: 4}", "lora.target_modules=[to_q, to_k, to_v, to_out.0, to_qkv_mlp_proj, to_out]")
WEIGHT = "regularise.weight=30"


def config_of(model: Path, *sets: str) -> TrainConfig:
    size = [f"model.{side}={pixels}" for side, pixels in sides_of(model).items()]
    size += ["num_inference_steps=5", "total_batch_size=2"]
    more = ("method.active.num_active_steps=3", "guidance_scale=2", "heldout=[]", "optim.learning_rate=0.01")
    return load(TrainConfig, [], [f"model.ref={model}", *size, *more, *data_of(model.name), *sets])


def trainer_of(config: TrainConfig) -> Trainer:
    return Trainer(config, load_models(config, torch.device("cpu")), Accelerator(cpu=True))


def gradient(trainer: Trainer) -> tuple[Tensor, dict[str, float]]:
    """Of the trainer's next update, which it does not make."""
    trainer.state.optimizer.zero_grad(set_to_none=True)
    metrics = trainer.compute_gradient()
    found = {name: p.grad for name, p in trainer.models.parameters.items() if p.grad is not None}
    return torch.cat([found[name].flatten() for name in sorted(found)]), metrics


@pytest.fixture(scope="module")
def flux2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of("flux2", tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("family", tiers(list(FAMILIES), default=["flux2"], slow=["sd3", "flux"]))
@pytest.mark.parametrize("sets", [LORA, ("lora=null",)], ids=["lora", "full"])
def test_before_the_first_update_nothing_is_added(family: str, sets: tuple[str, ...], tmp_path: Path) -> None:
    """The base is the network itself, bit for bit; without the setting there is no such metric."""
    model = folder_of(family, tmp_path)
    plain, metrics = gradient(trainer_of(config_of(model, *sets)))
    assert "regularise" not in metrics
    anchored, metrics = gradient(trainer_of(config_of(model, *sets, WEIGHT)))
    assert metrics["regularise"] == 0
    assert torch.equal(anchored, plain)


def distance(trainer: Trainer, base: Backbone, plan: Plan) -> float:
    """R as it is written, of the samples of the trainer's next update."""
    config, models = trainer.config, trainer.models
    prompts, x_0 = trainer._samples(range(trainer.update * 2, trainer.update * 2 + 2))
    ours, theirs = (
        guided_velocity(one.velocity, *models.embeddings(prompts), config.classifier_free_guidance)
        for one in (models.backbone, base)
    )
    states = rollout(ours, x_0, trainer.sigmas, plan.rollout_spec).states
    with torch.no_grad():
        squares = [
            (ours(states[term.step], s) - theirs(states[term.step], s)).square().mean()
            for term in plan.terms
            for s in [trainer.sigmas[term.step].expand(2)]
        ]
    return torch.stack(squares).mean().item()


@pytest.mark.parametrize("sets", [pytest.param(LORA, marks=pytest.mark.slow), ("lora=null",)], ids=["lora", "full"])
def test_the_gradient_of_the_distance_is_added(flux2: Path, sets: tuple[str, ...]) -> None:
    """After updates the base is still the model as it was read; the gradient is linear in the weight."""
    found = {}
    for weight in (0, 30, 60):
        trainer = trainer_of(config_of(flux2, *sets, *([f"regularise.weight={weight}"] if weight else [])))
        rng = torch.Generator().manual_seed(0)
        for _, p in sorted(trainer.models.parameters.items()):
            p.data += 0.2 * torch.randn(p.shape, generator=rng)
        found[weight] = gradient(trainer)
    plan = draw_plan(trainer.config.method, trainer.sigmas, numpy_generator(0, "plan", 0))
    assert any(term.coupling for term in plan.terms)
    expected = distance(trainer, backbones.load(str(flux2)), plan)
    assert expected > 1e-3
    assert found[60][1]["regularise"] == pytest.approx(expected, rel=1e-5)
    added = found[30][0] - found[0][0]
    assert added.norm() > 0.1 * found[0][0].norm()
    torch.testing.assert_close(found[60][0] - found[0][0], 2 * added, rtol=1e-3, atol=1e-4 * added.abs().max().item())


@pytest.mark.slow
def test_micro_batches_and_shared_forwards_change_nothing(flux2: Path) -> None:
    found = []
    for sets in ([], ["per_device_batch_size=1"], ["active_steps_per_forward=3"]):
        trainer = trainer_of(config_of(flux2, *LORA, WEIGHT, *sets))
        rng = torch.Generator().manual_seed(0)
        for _, p in sorted(trainer.models.parameters.items()):
            p.data += 0.2 * torch.randn(p.shape, generator=rng)
        found.append(gradient(trainer))
    for other, metrics in found[1:]:
        assert (other - found[0][0]).norm() < 1e-4 * found[0][0].norm()
        assert metrics["regularise"] == pytest.approx(found[0][1]["regularise"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sets", [LORA, ("lora=null",)], ids=["lora", "full"])
def test_a_resumed_run_has_the_same_base(flux2: Path, sets: tuple[str, ...]) -> None:
    config = config_of(flux2, *sets, WEIGHT)
    trainer = trainer_of(config)
    trainer.step()
    expected, metrics = gradient(trainer)
    assert metrics["regularise"] > 0
    again = trainer_of(config)
    again.restore(1, trainer.state.state_dict())
    assert torch.equal(gradient(again)[0], expected)


@pytest.mark.slow
def test_its_evaluations_are_counted(flux2: Path) -> None:
    before, after = (update_arithmetic(check_run(config_of(flux2, *LORA, *sets), 1)) for sets in ((), (WEIGHT,)))
    key = "evaluations_per_image_"
    assert after[f"{key}with_gradient"] == before[f"{key}with_gradient"] + 1  # one coupled step
    # guidance runs two branches: both of the base at three active steps, and the negative one beside that with gradient
    assert after[f"{key}without_gradient"] == before[f"{key}without_gradient"] + 2 * 3 + 3
    config = config_of(flux2, "lora=null", WEIGHT)
    sizes = WeightSizes.of(FakeModels(config), config, 1)
    assert sizes.static["base copy"] == sizes.startup["base copy"] == sizes.static["trained weights"] > 0


@pytest.mark.exhaustive
def test_an_estimate_counts_its_operations_and_no_second_graph(flux2: Path) -> None:
    ours, theirs = (estimate_run(check_run(config_of(flux2, *LORA, *sets), 1)) for sets in ((), (WEIGHT,)))
    assert theirs.static == ours.static
    assert theirs.flops > 1.1 * ours.flops
    assert 0 <= theirs.activation["swept step"] - ours.activation["swept step"] < 2**16


def test_a_copy_of_a_sharded_network_is_refused() -> None:
    for kind in ("fsdp2", "zero2", "zero3"):
        with pytest.raises(UserError, match=rf"regularise: .* of distributed\.kind {kind}; set lora"):
            load(TrainConfig, [], [WEIGHT, f"distributed.kind={kind}"])
        load(TrainConfig, [], [WEIGHT, f"distributed.kind={kind}", "lora.rank=4"])
    with pytest.raises(UserError, match="renamed; write regularise"):
        load(TrainConfig, [], ["regularize.weight=1"])
    with pytest.raises(UserError, match=r"regularise\.weight"):
        load(TrainConfig, [], ["regularise.weight=0"])
