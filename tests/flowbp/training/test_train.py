"""The trainer: what it computes does not depend on how the batch is cut, on the processes, or on being killed."""

import json
import math
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from families import folder_of
from forking import forked
from safetensors.torch import load_file, save_file
from tiers import tiers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowbp.config import OptimConfig, TrainConfig
from flowbp.core.types import Backbone
from flowbp.estimate import estimate_run
from flowbp.evaluation.evaluate import NotFiniteError
from flowbp.evaluation.sampling import generate_images
from flowbp.methods import METHODS
from flowbp.training import launch, loop, trainer
from flowbp.training.loading import LoadedModels, load_models
from flowbp.training.preflight import check_run
from flowbp.training.stage_clock import STAGES
from flowbp.training.state import TorchTrainState, make_optimizer
from flowbp.training.trainer import Trainer
from imgen_common.config import load
from imgen_common.errors import UserError

TOLERANCE = 1e-10
SMALL = [
    "num_inference_steps=12",
    "total_batch_size=4",
    "eval.every=0",
    "eval.num_prompts=2",
    "eval.num_inference_steps=2",
    "eval.guidance_scale=[1.0]",
]


def config_of(method: str, *sets: str) -> TrainConfig:
    return load(TrainConfig, [], [f"method={method}", *SMALL, *sets])


def gradients(config: TrainConfig, accelerator: Accelerator | None = None) -> dict[str, Tensor]:
    """The gradient of update 8 of the base model."""
    trainer = Trainer(config, parts(), accelerator or Accelerator(cpu=True))
    trainer.update = 7
    for p in trainer.models.parameters.values():
        p.grad = None
    trainer.compute_gradient()
    return {name: p.grad.clone() for name, p in trainer.models.parameters.items() if p.grad is not None}


@cache
def parts() -> LoadedModels:
    """In float64: batches of other sizes round otherwise, by 3e-6 of the gradient in float32."""
    loaded = load_models(config_of("refl"), torch.device("cpu"))
    backbone = loaded.backbone
    for module in (
        backbone.net,
        backbone.pipe.vae,
        backbone.pipe.text_encoder,
        *(r.model for r in loaded.rewards.values()),
    ):
        module.double()
    single = loaded.backbone.velocity
    loaded.backbone.velocity = lambda x, sigma, cond: single(x.double(), sigma.double(), cond)
    return loaded


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative L2 distance of two gradients."""
    assert a.keys() == b.keys()
    flat_a, flat_b = (torch.cat([g[k].double().flatten() for k in sorted(a)]) for g in (a, b))
    assert flat_a.norm() > 0
    return ((flat_a - flat_b).norm() / flat_a.norm()).item()


@pytest.mark.parametrize("method", tiers(METHODS, slow=["flowbp_bridge"]))
def test_accumulation_changes_nothing(method: str) -> None:
    whole, halves, singles = (gradients(config_of(method, f"per_device_batch_size={n}")) for n in (4, 2, 1))
    assert distance(whole, halves) < TOLERANCE
    assert distance(whole, singles) < TOLERANCE


@pytest.mark.parametrize("method", tiers(METHODS, slow=["flowbp_bridge"]))
def test_an_update_without_the_negative_in_its_sweep_is_the_same(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(method, "guidance_scale=3.5")
    ours = gradients(config)
    whole = Trainer._velocity
    monkeypatch.setattr(Trainer, "_velocity", lambda self, conds, **_: whole(self, conds))
    both = gradients(config)
    assert ours.keys() == both.keys()
    assert all(torch.equal(ours[name], both[name]) for name in ours)
    assert any(gradient.any() for gradient in ours.values())


@pytest.mark.parametrize("method", tiers(METHODS, slow=["flowbp_bridge"]))
def test_kept_graphs_give_the_same_gradient_and_metrics(method: str) -> None:
    for guided in ([], ["guidance_scale=3.5"], ["guidance_scale=3.5", "guidance.detach_negative=false"]):
        without, kept = (gradients(config_of(method, *guided, f"keep_graphs={n}")) for n in (0, 2))
        assert distance(without, kept) < TOLERANCE


@pytest.mark.parametrize(
    ("target", "used"),
    [("2.attn.add_q_proj", False), ("transformer_blocks.2.attn.add_q_proj", False), ("add_q_proj", True)],
)
def test_adapters_that_no_image_depends_on_are_refused(tmp_path: Path, target: str, used: bool) -> None:
    model = (f"model.ref={folder_of('sd3', tmp_path)}", "model.height=32", "model.width=32", "lora.rank=2")
    config = config_of("full", *model, f"lora.target_modules=[{target}]", "heldout=[]")
    with nullcontext() if used else pytest.raises(UserError, match=rf"{target}': no image depends on transformer_bl"):
        check_run(config, 1)


def first_update(*sets: str) -> dict[str, Tensor]:
    """The gradient of the first update of the model as it is trained, not in float64."""
    config = config_of("flowbp_bridge", "total_batch_size=2", "num_inference_steps=5", "heldout=[]", *sets)
    trainer = Trainer(config, load_models(config, torch.device("cpu")), Accelerator(cpu=True))
    trainer.embed_prompts(trainer.training_prompts())
    trainer.compute_gradient()
    return {name: p.grad for name, p in trainer.models.parameters.items() if p.grad is not None}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


RECOMPUTED = {"plain": [], "kept": ["keep_graphs=2"], "bfloat16": ["model.dtype=bfloat16"]}


@pytest.mark.parametrize("case", tiers(RECOMPUTED, slow=["plain", "kept"]))
def test_recomputed_blocks_have_the_same_gradient(case: str) -> None:
    kept, *others = (first_update(f"model.recompute={how}", *RECOMPUTED[case]) for how in ("none", "selective", "all"))
    assert all(same_bits(kept, other) for other in others)


@pytest.mark.slow
@pytest.mark.parametrize("sets", [[], ["guidance_scale=2", "keep_graphs=2", "model.recompute=selective"]])
def test_a_working_copy_in_bfloat16_gives_the_same_update(sets: list[str]) -> None:
    """And is made of every weight once per update."""
    casts = {}
    for copied in (True, False):
        with CountCasts() as counted:
            gradient = first_update("model.dtype=bfloat16", f"model.working_copy={str(copied).lower()}", *sets)
        casts[copied] = gradient, counted
    assert same_bits(casts[True][0], casts[False][0])
    sizes = {p.numel() for p in casts[True][0].values() if p.dim() == 2}
    often, once = (max(casts[copied][1].sizes[size] for size in sizes) for copied in (False, True))
    assert often > once > 0


class CountCasts(TorchDispatchMode):
    """How often tensors of each size are made bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and found.dtype == torch.bfloat16:
            self.sizes[found.numel()] += 1
        return found


@pytest.mark.parametrize(
    ("sets", "other"),
    [
        (["distributed.kind=fsdp2"], "distributed.kind fsdp2"),
        (["active_steps_per_forward=2"], "active_steps_per_forward 2"),
        (["regularise={kind: velocity, weight: 0.1}"], "regularise"),
    ],
)
def test_what_kept_graphs_do_not_go_with(sets: list[str], other: str) -> None:
    with pytest.raises(UserError, match=f"keep_graphs 2: not with {other}; set one to its default"):
        config_of("flowbp_sparse", "keep_graphs=2", *sets)


def counted_operations(*sets: str) -> float:
    """Operations of an update of two samples: of the first one, where they are counted, and of the next one."""
    small = ["total_batch_size=2", "per_device_batch_size=1", "heldout=[]", "guidance_scale=2"]
    config = config_of("flowbp_sparse", *small, *sets)
    trainer = Trainer(config, load_models(config, torch.device("cpu")), Accelerator(cpu=True))
    trainer.embed_prompts(trainer.training_prompts())
    first, second = ((m["tflops"] * m["seconds"] * 1e12, m) for m in (trainer.step(), trainer.step()))
    assert first[0] == pytest.approx(second[0], rel=1e-9)
    assert all(first[1][f"seconds_{stage}"] > 0 for stage in STAGES)
    assert "mfu" not in second[1]  # the peak of a CPU is not known
    trainer.clock.peak_tflops = 0.5
    third = trainer.step()
    assert third["mfu"] == 2 * third["tflops"]
    return first[0]


@pytest.mark.slow
def test_an_update_counts_its_operations_and_the_seconds_of_its_stages() -> None:
    config = config_of("flowbp_sparse", "total_batch_size=2", "heldout=[]", "guidance_scale=2")
    assert counted_operations() == pytest.approx(estimate_run(check_run(config, 1)).flops, rel=0.02)


def test_a_fused_optimizer_goes_on_from_a_checkpoint() -> None:
    """As on a GPU, by the kernel for CPUs; the same weights as without to rounding."""

    def state_of(*, fused: bool) -> TorchTrainState:
        torch.manual_seed(0)
        state = TorchTrainState(torch.nn.Linear(5, 3), optim, Accelerator(cpu=True), sync_each_backward=False)
        state.fused, state.optimizer = fused, make_optimizer(state.parameters, optim, fused=fused)
        return state

    def step(state: TorchTrainState, number: int) -> None:
        for p in state.parameters.values():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
        state.step(0.1, 1.0, 0.5)

    optim = OptimConfig()
    fused, plain = state_of(fused=True), state_of(fused=False)
    for number in range(3):
        kept = {group: {name: t.clone() for name, t in held.items()} for group, held in fused.state_dict().items()}
        step(fused, number)
        step(plain, number)
    resumed = state_of(fused=True)
    resumed.load_state_dict(kept, 2)
    step(resumed, 2)
    for name, p in fused.parameters.items():
        assert torch.equal(p, resumed.parameters[name])
        torch.testing.assert_close(p, plain.parameters[name])


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_matrices_are_multiplied_as_asked_in_a_training_alone(
    precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []
    monkeypatch.setattr(loop, "_train", lambda *_: seen.append(torch.get_float32_matmul_precision()))
    before = torch.get_float32_matmul_precision()
    launch.train(config_of("refl", f"matmul_precision={precision}"), tmp_path)
    assert seen == [precision]
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.exhaustive
def test_recomputed_operations_do_not_count() -> None:
    kept = counted_operations()
    assert counted_operations("model.gradient_checkpointing=true") == pytest.approx(kept, rel=1e-9)
    assert counted_operations("method.active.num_active_steps=2") < kept


@pytest.mark.exhaustive
@pytest.mark.parametrize("combine", ["weighted", "normalized"])
def test_one_reward_in_halves_is_the_whole(combine: str) -> None:
    one = "{name: a, ref: builtin:shapes/reward, loss: {kind: log_sigmoid, center: 22.3}, weight: 0.5}"
    both = f"rewards=[{one}, {one.replace('name: a', 'name: b')}]"
    halves = config_of("flowbp_bridge", both, f"combine={combine}")
    whole = config_of("flowbp_bridge")
    first = gradients(whole)
    named = parts().rewards
    twice = LoadedModels(
        **(vars(parts()) | {"rewards": {"a": named["reward"], "b": named["reward"], "heldout": named["heldout"]}})
    )
    trainer = Trainer(halves, twice, Accelerator(cpu=True))
    trainer.update = 7
    for p in trainer.models.parameters.values():
        p.grad = None
    metrics = trainer.compute_gradient()
    second = {name: p.grad.clone() for name, p in trainer.models.parameters.items() if p.grad is not None}
    assert distance(first, second) < TOLERANCE
    assert metrics["a"] == metrics["b"]
    assert ("gradient_a" in metrics) == ("cosine_a_b" in metrics) == (combine == "normalized")
    if combine == "normalized":
        assert metrics["cosine_a_b"] == pytest.approx(1)
        assert metrics["gradient_a"] == pytest.approx(metrics["gradient_b"])


def test_rewards_have_names_of_their_own() -> None:
    one = "{name: %s, ref: builtin:shapes/reward}"
    for names in (("a", "a"), ("heldout", "b"), ("verifier", "b")):
        listed = ", ".join(one % name for name in names)
        with pytest.raises(UserError, match="names of rewards must differ"):
            load(TrainConfig, [], [f"rewards=[{listed}]"])


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    forked(2, _worker, tmp_path, log=tmp_path / "log")
    for method in METHODS:
        assert distance(gradients(config_of(method)), load_file(tmp_path / f"{method}.safetensors")) < TOLERANCE


def _worker(folder: Path) -> None:
    """What each of the two processes of `test_two_processes_equal_one` runs."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    for method in METHODS:
        grads = gradients(config_of(method), accelerator)
        if accelerator.is_main_process:
            save_file({k: g.contiguous() for k, g in grads.items()}, folder / f"{method}.safetensors")
    accelerator.end_training()


def cut_block(backbone: Backbone) -> None:
    """The first block of the miniature computes without gradient, as one under re-entrant checkpointing may."""
    block = backbone.net.transformer_blocks[0]
    block.forward = torch.no_grad()(block.forward)


def freeze_one(backbone: Backbone) -> None:
    """A layer whose input and output are cut off."""
    layer = backbone.net.transformer_blocks[0].attn.to_q
    layer.forward = torch.no_grad()(layer.forward)


@pytest.mark.parametrize(("cut", "sets"), [(cut_block, []), (freeze_one, ["lora.rank=2"])])
def test_a_weight_without_gradient_ends_the_run_by_name(cut: Callable[[Backbone], None], sets: list[str]) -> None:
    """Before it changes a weight; zeros, which A of an adapter gets in the first update, are a gradient."""
    config = config_of("refl", *sets, "total_batch_size=1", "num_inference_steps=2", "method.active.num_active_steps=1")
    trainer = Trainer(config, load_models(config, torch.device("cpu")), Accelerator(cpu=True))
    trainer.compute_gradient()
    zeros = [name for name, p in trainer.models.parameters.items() if p.grad is not None and not p.grad.any()]
    assert any("lora_A" in name for name in zeros) == bool(sets)
    trainer.state.optimizer.zero_grad(set_to_none=True)
    cut(trainer.models.backbone)
    before = {name: p.detach().clone() for name, p in trainer.models.parameters.items()}
    with pytest.raises(UserError, match=r"no gradient reaches .*transformer_blocks\.0\."):
        trainer.step()
    assert all(torch.equal(p, before[name]) for name, p in trainer.models.parameters.items())


@pytest.mark.parametrize(
    ("update", "broken", "what", "advice"),
    [
        pytest.param(0, "velocity", "the network's latents", "check the weights of the model", marks=pytest.mark.slow),
        (7, "velocity", "the network's latents", "the weights have diverged; lower optim.learning_rate or optim.max_g"),
        (0, "decode", "the VAE's images", "check the weights of the VAE"),
        pytest.param(0, "reward", "the scores of reward", "check its weights", marks=pytest.mark.slow),
        pytest.param(
            *(7, "gradient", "the gradient", "lower optim.learning_rate or optim.max_grad_norm"),
            marks=pytest.mark.slow,
        ),
        (0, "gradient", "the gradient", "check the weights of the model and of the rewards, or compute in float32"),
    ],
)
def test_what_was_not_finite_first_is_said(
    monkeypatch: pytest.MonkeyPatch, update: int, broken: str, what: str, advice: str
) -> None:
    backbone, reward = parts().backbone, parts().rewards["reward"]
    if broken in ("velocity", "decode"):
        original = getattr(backbone, broken)
        monkeypatch.setattr(backbone, broken, lambda *values: original(*values) * math.nan)
    factor: Callable[[Tensor], Tensor] = {
        "reward": lambda scores: scores * math.inf,
        "gradient": lambda scores: scores + (scores * 0).sqrt(),  # finite, with a slope that is not
    }.get(broken, lambda scores: scores)
    spoiled = {**parts().rewards, "reward": lambda images, prompts: factor(reward(images, prompts))}
    models = LoadedModels(**(vars(parts()) | {"rewards": spoiled}))
    trainer = Trainer(config_of("refl", "total_batch_size=1"), models, Accelerator(cpu=True))
    trainer.update = update
    before = {name: p.detach().clone() for name, p in models.parameters.items()}
    with pytest.raises(NotFiniteError, match=f"^not finite: {what}.*; {advice}"):
        trainer.step()
    assert trainer.update == update
    assert all(torch.equal(before[name], p) for name, p in models.parameters.items())


def test_what_was_not_finite_is_told_to_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = parts().backbone
    decode = backbone.decode
    monkeypatch.setattr(backbone, "decode", lambda latents: decode(latents) * math.nan)
    rank = Trainer(config_of("refl", "total_batch_size=1"), parts(), Accelerator(cpu=True))
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(trainer, "gather_object", lambda own: json.loads(json.dumps([*own, *own])))  # plain data
    assert str(rank.find_not_finite()).startswith("not finite: the VAE's images")
    monkeypatch.setattr(backbone, "decode", decode)
    assert str(rank.find_not_finite()).startswith("not finite: the gradient")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_image_that_would_be_black_is_not_drawn(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    backbone = parts().backbone
    velocity = backbone.velocity
    monkeypatch.setattr(backbone, "velocity", lambda x, sigma, cond: velocity(x, sigma, cond) + value)
    with pytest.raises(UserError, match=r"^not finite: the network's latents; check the weights of the model"):
        generate_images(backbone, "a red circle", [0], (32, 32), 2, 1.0)
