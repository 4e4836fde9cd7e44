"""`eval.model`: evaluations draw with a distilled sibling, which carries the very adapter that is trained."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from families import FAMILIES, SIZE, folder_of, size_of
from given import prompt_for
from tiers import tiers
from trained_runs import TARGETS, targets_of, theirs, trained

from flowbp.backbones import init_empty_weights
from flowbp.backbones.loading import load_backbone, load_eval_backbone
from flowbp.config import TrainConfig
from flowbp.estimate.memory import FakeModels, WeightSizes
from flowbp.evaluation.sampling import generate_images
from flowbp.evaluation.sources import model_source
from flowbp.export import export_run
from flowbp.training.loading import load_models
from flowbp.training.preflight import check_run
from flowbp.training.trainer import Trainer
from imgen_common.config import load
from imgen_common.errors import UserError


def sibling_of(model: Path, place: Path) -> Path:
    """The same shapes with other weights and another scheduler; FLUX.2 says in its model_index.json that it is one."""
    pipe = DiffusionPipeline.from_pretrained(model)
    rng = torch.Generator().manual_seed(7)
    for parameter in pipe.transformer.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=rng)
    pipe.save_pretrained(place / "sibling")
    index = place / "sibling" / "model_index.json"
    content = json.loads(index.read_text())
    if "is_distilled" in content:
        index.write_text(json.dumps(content | {"is_distilled": True}))
    return place / "sibling"


def small(model: Path, sibling: Path | str, *sets: str) -> TrainConfig:
    size = (f"model.height={SIZE[0]}", f"model.width={SIZE[1]}", "num_inference_steps=6", "total_batch_size=2")
    evaluation = (f"eval.model={sibling}", "eval.guidance_scale=[1.5]", "eval.num_inference_steps=3")
    more = ("lora={rank: 4, alpha: 2}", TARGETS, "guidance_scale=2", "max_train_steps=2")
    return load(TrainConfig, [], [f"model.ref={model}", *size, *evaluation, *more, *sets])


@pytest.mark.parametrize("family", tiers(list(FAMILIES), default=["flux2"], slow=["sd3", "flux"]))
def test_the_trained_adapter_draws_on_the_sibling(family: str, tmp_path: Path) -> None:
    model = folder_of(family, tmp_path)
    sibling = sibling_of(model, tmp_path)
    run = trained(tmp_path, model, *(f"{k}={v}" for k, v in (("eval.model", sibling), ("lora", "{rank: 4, alpha: 2}"))),
                  "eval.guidance_scale=[1.0]", targets_of(family))  # fmt: skip
    source = model_source(str(run), tmp_path)
    backbone = source.load(torch.device("cpu"))
    prompt = prompt_for(backbone, "a red circle")
    ours = generate_images(backbone, prompt, [3], size_of(backbone), 3, 1.0)
    merged = export_run(run, "merged", tmp_path / "merged", model=str(sibling))
    assert "which was not trained" in (merged / "README.md").read_text()
    if family == "flux2":  # its pipeline asks for other inputs once it is distilled
        index = merged / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": False}))
    pipe = DiffusionPipeline.from_pretrained(merged, dtype=torch.float32)
    assert (theirs(pipe, family) - ours).abs().max() < 1e-5
    base = generate_images(model_source(str(run), tmp_path, base=True).load(torch.device("cpu")),
                           prompt, [3], size_of(backbone), 3, 1.0)  # fmt: skip
    assert (ours - base).abs().max() > 5e-3
    assert (theirs(DiffusionPipeline.from_pretrained(model, dtype=torch.float32), family) - base).abs().max() > 5e-3


@pytest.mark.parametrize("family", tiers(["krea2", "qwen_image_21"], default=["krea2"], slow=["qwen_image_21"]))
def test_noise_levels_follow_the_settings_of_the_siblings_pipeline(family: str, tmp_path: Path) -> None:
    setting = {"krea2": {"is_distilled": True}, "qwen_image_21": {"sample_sigmas": [1.0, 0.7, 0.4]}}[family]
    model = folder_of(family, tmp_path)
    sibling = shutil.copytree(model, tmp_path / "sibling")
    index = sibling / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | setting))
    config = load(TrainConfig, [], [f"model.ref={model}", f"eval.model={sibling}", "lora.rank=2"])
    backbone = load_backbone(config, torch.device("cpu"))
    both = (backbone, load_eval_backbone(config, backbone, torch.device("cpu")))
    levels = [one.sigmas(3, (64, 64)).tolist() for one in both]
    assert levels[1] == init_empty_weights(str(sibling), distilled=True).sigmas(3, (64, 64)).tolist() != levels[0]
    assert backbone.sigmas(3, (64, 64)).tolist() == levels[0]  # the trained model's own stay


def test_what_is_exported_as_the_base_does_not_draw_as_its_sibling_was_evaluated(tmp_path: Path) -> None:
    model = folder_of("flux2", tmp_path)
    sibling = shutil.copytree(model, tmp_path / "sibling")
    run = trained(tmp_path, model, f"eval.model={sibling}", "lora.rank=2", TARGETS, "eval.num_inference_steps=4")
    said = {}
    for name, to, ref in (
        ("base", "merged", None),
        ("sibling", "merged", str(sibling)),
        ("adapter", "diffusers", None),
    ):
        out = export_run(run, to, tmp_path / f"as-{name}", model=ref)  # type: ignore[arg-type]
        said[name] = (json.loads((out / "sampling.json").read_text()), (out / "README.md").read_text())
    assert "num_inference_steps" not in said["base"][0]
    assert said["sibling"][0]["num_inference_steps"] == 4
    assert "This model was not evaluated." in said["base"][1]
    for name in ("sibling", "adapter"):
        assert f"Drawn by `{sibling}` with" in said[name][1]


@pytest.mark.slow
def test_training_changes_what_evaluations_draw(tmp_path: Path) -> None:
    """The adapter is one, its averages too; training itself does not know of the sibling."""
    model = folder_of("flux2", tmp_path)
    sibling, images, weights = sibling_of(model, tmp_path), {}, {}
    for name, ref in (("own", "null"), ("sibling", sibling)):
        config = check_run(small(model, ref, "ema=0.5", "optim.learning_rate=0.1"), 1).config
        trainer = Trainer(config, load_models(config, torch.device("cpu")), Accelerator(cpu=True))
        trainer.embed_prompts([*trainer.training_prompts(), "a red circle"])
        for update in range(2):
            with trainer.state.ema_weights():
                images[name, update] = trainer.evaluate(["a red circle"], "file", 1.5).images
            trainer.step()
        weights[name] = trainer.state.state_dict()["weights"]
    assert all(torch.equal(value, weights["own"][name]) for name, value in weights["sibling"].items())
    assert (images["sibling", 0] - images["sibling", 1]).abs().max() > 1e-4
    assert (images["sibling", 0] - images["own", 0]).abs().max() > 1e-3


@pytest.mark.slow
def test_an_estimate_counts_the_second_transformer(tmp_path: Path) -> None:
    model = folder_of("flux2", tmp_path)
    configs = [small(model, ref, "heldout=[]") for ref in ("null", sibling_of(model, tmp_path))]
    own, both = (WeightSizes.of(FakeModels(config), config, 1) for config in configs)
    second = {"eval.model": own.static["frozen weights"]}
    assert (both.static, both.startup) == (own.static | second, own.startup | second)


@pytest.mark.slow
def test_a_model_that_is_no_sibling_is_refused(tmp_path: Path) -> None:
    model = folder_of("flux2", tmp_path)
    with pytest.raises(UserError, match=r"eval\.model .*flux: is a FluxPipeline; must be a Flux2KleinPipeline"):
        check_run(small(model, folder_of("flux", tmp_path)), 1)
    sibling = sibling_of(model, tmp_path)
    with pytest.raises(UserError, match="step-distilled"):
        check_run(small(sibling, "null"), 1)
    allowed = small(sibling, "null", "model.allow_distilled=true")
    assert load_models(check_run(allowed, 1).config, torch.device("cpu")).parameters
    config = sibling / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_single_layers": 3}))
    with pytest.raises(UserError, match=r"eval\.model .*other shapes: single_.*missing"):
        check_run(small(model, sibling), 1)
    for sets in (["lora.rank=2", "distributed.kind=fsdp2"], []):
        with pytest.raises(UserError, match=r"eval\.model takes adapters and whole weights only"):
            load(TrainConfig, [], ["eval.model=sibling", *sets])
    run = trained(tmp_path, model, "lora={rank: 4, alpha: 2}", TARGETS)
    with pytest.raises(UserError, match=r"--model .*: only an adapter is merged into another model"):
        export_run(run, "diffusers", tmp_path / "out", model=str(model))
    with pytest.raises(UserError, match=r"--model .*: its transformer has other shapes"):
        export_run(run, "merged", tmp_path / "out", model=str(sibling))
