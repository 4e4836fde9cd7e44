"""What every backbone must do, on tiny random models of each family: a new one is one line in `families.FAMILIES`."""

import copy
import json
import re
import shutil
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from families import FAMILIES, folder_of, sides_of, size_of
from given import data_of, encode, prompt_for
from safetensors.torch import load_file, save_file
from sweeps import assert_sweep_is_joint
from tiers import tiers
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from flowbp import backbones
from flowbp.backbones import pipelines
from flowbp.backbones.families.sd3 import SD3
from flowbp.backbones.loading import mark_trainable
from flowbp.backbones.options import apply_model_options
from flowbp.config import LoraConfig, ModelConfig, TrainConfig
from flowbp.core.engine import rollout
from flowbp.core.guidance import guided_velocity
from flowbp.core.plan import RolloutSpec
from flowbp.core.settings import Guidance
from flowbp.core.types import LENGTHS, Backbone
from flowbp.evaluation import sampling
from flowbp.evaluation.evaluate import generate_latents
from flowbp.methods import METHODS
from flowbp.training import preflight
from flowbp.training.loading import load_models
from flowbp.training.trainer import Trainer
from imgen_common import hub
from imgen_common.config import load
from imgen_common.errors import UserError

PROMPTS = ["a red circle", "two blue crosses"]
MISFITS = ("deeper", "prefixed", "other shape")
"""How weights may differ from what config.json says."""


@pytest.fixture
def sd3_folder(tmp_path: Path, published_sd3: Path) -> Path:
    """The JSON files of a tiny SD3, to be changed."""
    return Path(shutil.copytree(published_sd3, tmp_path / "sd3"))


@pytest.fixture(scope="module")
def published_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD3, saved."""
    return folder_of("sd3", tmp_path_factory.mktemp("schedulers"))


def small(folder: Path) -> list[str]:
    """Settings for a tiny model."""
    height, width = size_of(folder)
    return [f"model={{ref: {folder}, height: {height}, width: {width}}}", *data_of(folder.name)]


def theirs(
    folder: Path, steps: int, guidance: float, seed: int, output: str, **changed: Any
) -> tuple[DiffusionPipeline, torch.Tensor]:
    """The unmodified pipeline and what it makes of the first prompt."""
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps, "output_type": output, **sides_of(folder)}
    options |= {"prompt": PROMPTS[0]} | FAMILIES[folder.name].guided(guidance) | changed
    images = pipe(generator=torch.Generator().manual_seed(seed), **options).images
    return pipe, images[:, :3] if output == "pt" else images  # some have a channel of opacity


@pytest.mark.parametrize(
    "how", tiers(["deeper", "prefixed", "other shape"], default=["deeper"], slow=["prefixed", "other shape"])
)
@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_weights_that_do_not_fit_are_found_before_a_run(how: str, part: str, sd3_folder: Path) -> None:
    about, file = sd3_folder / part / "config.json", next((sd3_folder / part).glob("*.safetensors"))
    if how == "deeper":
        key = "num_layers" if part == "transformer" else "num_hidden_layers"
        config = json.loads(about.read_text())
        about.write_text(json.dumps(config | {key: config[key] + 1}))
    else:
        weights = load_file(file)
        if how == "prefixed":
            weights = {f"module.{name}": value for name, value in weights.items()}
        else:
            name = next(name for name, value in weights.items() if value.ndim == 1)
            weights[name] = torch.zeros(len(weights[name]) + 1)
        save_file(weights, file, {"format": "pt"})
    for check in (hub.prefetch, lambda ref: preflight.check_run(load(TrainConfig, [], small(Path(ref))), 1)):
        with pytest.raises(UserError, match=f"{part}: .*weights are missing, the first is|shape|do not fit"):
            check(str(sd3_folder))
    preflight.check_run(load(TrainConfig, [], small(sd3_folder)), 1, estimate_only=True)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_an_image_is_the_pipelines_own(backbone: Backbone, folder: Path, guidance: float) -> None:
    if guidance != 1 and not FAMILIES[folder.name].true_guidance:
        pytest.skip("its pipeline has no guidance but the distilled one")
    ours = sampling.generate_images(backbone, prompt_for(backbone, PROMPTS[0]), [5], size_of(backbone), 4, guidance)
    _, expected = theirs(folder, 4, guidance, 5, "pt")
    assert ours.shape == expected.shape == (1, 3, *size_of(backbone))
    assert ours.std() > 0.01
    assert (ours - expected).abs().max() < 1e-5
    assert isinstance(backbone, pipelines.PipelineBackbone)
    if backbone.guidance_kind == "distilled":
        assert backbone.pipeline_guidance(guidance) == backbone.embedded_guidance
    else:
        given = FAMILIES[folder.name].guided(guidance)
        assert backbone.pipeline_guidance(guidance) == given.get("guidance_scale", given.get("true_cfg_scale", 1))


@pytest.mark.parametrize("steps", [4, 25])
def test_noise_levels_are_the_pipelines_own(backbone: Backbone, folder: Path, steps: int) -> None:
    pipe, _ = theirs(folder, steps, 1.0, 0, "latent")
    sigmas = backbone.sigmas(steps, size_of(backbone))
    assert torch.equal(sigmas, pipe.scheduler.sigmas)
    assert sigmas.shape == (steps + 1,)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0


@pytest.mark.parametrize("max_tokens", [None, 9])
def test_a_backbone_knows_what_its_text_encoders_read(
    backbone: Backbone, max_tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if max_tokens is not None:
        monkeypatch.setattr(backbone, "max_tokens", max_tokens)
    limits, lengths = backbone.prompt_limits(), defaultdict[int, set[int]](set)
    assert set(limits) == {name for name in backbone.pipe.components if name.startswith("text_encoder")}
    for limit in limits.values():
        texts = ["a" + " a" * (limit.max_tokens - missing) for missing in (1, 0)]
        assert [limit.num_longer([text]) for text in ("", *texts)] == [0, 0, 1]
        if len(limits) == 1 and not backbone.reads_sources:
            for text, is_read in zip(texts, (True, False), strict=True):
                first, other = (encode(backbone, [text[:-1] + last])["text"] for last in "ab")
                assert (first.shape != other.shape or not torch.equal(first, other)) == is_read
    if backbone.reads_sources:
        return  # it cuts what was tokenized: see the tests of edits
    tokenize = PreTrainedTokenizerBase.__call__

    def recording(tokenizer: PreTrainedTokenizerBase, *texts: Any, **given: Any) -> Any:
        if given.get("truncation"):
            lengths[id(tokenizer)].add(given["max_length"])
        return tokenize(tokenizer, *texts, **given)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", recording)
    encode(backbone, PROMPTS)
    assert lengths == {id(limit.tokenizer): {limit.max_length} for limit in limits.values()}


SCHEDULERS = {
    "static": {"shift": 5.0},
    "dynamic": {"use_dynamic_shifting": True, "base_shift": 0.3, "max_shift": 1.4, "base_image_seq_len": 64},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "terminal": {"shift": 2.0, "shift_terminal": 0.1},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True, "use_dynamic_shifting": True},
    "own spacing": {"use_flow_sigmas": True, "shift": 3.0},
    "hundred": {"num_train_timesteps": 100, "shift": 3.0},
    "no shift": {"max_image_seq_len": 1024},
}
"""Configurations of a scheduler beside those of the published models."""
if find_spec("scipy"):
    SCHEDULERS["beta"] = {"use_beta_sigmas": True}


@pytest.mark.parametrize("name", tiers(list(SCHEDULERS), default=["terminal", "own spacing", "hundred"]))
def test_every_configuration_of_the_scheduler_is_sampled_as_the_pipeline_does(
    backbone: Backbone, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(SCHEDULERS[name])
    monkeypatch.setattr(backbone.pipe, "scheduler", scheduler)
    backbone.pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "output_type": "pt", **sides_of(folder)}
    generator = torch.Generator().manual_seed(5)
    expected = backbone.pipe(
        prompt=PROMPTS[0], generator=generator, **options, **FAMILIES[folder.name].guided(1.0)
    ).images[:, :3]
    assert torch.equal(backbone.sigmas(3, size_of(backbone)), scheduler.sigmas)
    ours = sampling.generate_images(backbone, prompt_for(backbone, PROMPTS[0]), [5], size_of(backbone), 3, 1.0)
    assert (ours - expected).abs().max() < 1e-5


REFUSED = {
    "FlowMatchHeunDiscreteScheduler": {},
    "FlowMatchLCMScheduler": {},
    "DPMSolverMultistepScheduler": {"use_flow_sigmas": True},
    "UniPCMultistepScheduler": {"use_flow_sigmas": True},
    "stochastic_sampling": {"stochastic_sampling": True},
    "invert_sigmas": {"invert_sigmas": True},
    "Only one of": {"use_karras_sigmas": True, "use_exponential_sigmas": True},
    "time_shift_type": {"time_shift_type": "quadratic"},
    "noise levels do not fall": {"shift": 0.0},
    "shift_terminal.*noise levels|noise levels": {"shift_terminal": 1.0},
    'shift "three": must be a number': {"shift": "three"},
    "base_image_seq_len": {"use_dynamic_shifting": True, "base_image_seq_len": 4096},
    "num_train_timesteps|can be loaded": {"num_train_timesteps": 0},
    'use_karras_sigmas "false": must be true or false': {"use_karras_sigmas": "false"},
    'stochastic_sampling "false": must be true or false': {"stochastic_sampling": "false"},
    r"num_train_timesteps 1000\.0: must be a whole number": {"num_train_timesteps": 1000.0},
    'max_image_seq_len "4096": must be a whole number': {"max_image_seq_len": "4096"},
    "shift true: must be a number": {"shift": True},
}
"""What is not sampled as the pipeline would: settings by the words that name them."""


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_sampled_exactly_is_refused(sd3_folder: Path, reason: str) -> None:
    index, file = sd3_folder / "model_index.json", sd3_folder / "scheduler" / "scheduler_config.json"
    name = reason if reason.endswith("Scheduler") else "FlowMatchEulerDiscreteScheduler"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", name]}))
    file.write_text(json.dumps({"_class_name": name} | REFUSED[reason]))
    with pytest.raises(UserError, match=reason):
        backbones.init_empty_weights(str(sd3_folder)).sigmas(4, size_of(sd3_folder))


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("scaling_factor", None, "null"),
        ("scaling_factor", 0, "0"),
        ("scaling_factor", "1.5", '"1.5"'),
        ("scaling_factor", ..., "is missing"),
        ("scaling_factor", True, "true"),
        ("shift_factor", None, "null"),
        ("shift_factor", ..., "is missing"),
        ("shift_factor", float("nan"), "NaN"),
    ],
)
def test_latents_are_not_scaled_by_what_is_no_number(name: str, value: object, shown: str, sd3_folder: Path) -> None:
    file = sd3_folder / "vae" / "config.json"
    settings = json.loads(file.read_text()) | {name: value}
    file.write_text(json.dumps({key: given for key, given in settings.items() if given is not ...}))
    with pytest.raises(UserError, match=rf"vae/config\.json {name} {shown}: must be a number"):
        backbones.init_empty_weights(str(sd3_folder))


def test_an_autoencoder_of_another_model_is_refused(sd3_folder: Path) -> None:
    file = sd3_folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"latent_channels": 1}))
    with pytest.raises(UserError, match=r"transformer reads 4 channels, and the autoencoder has 1 of its own"):
        backbones.init_empty_weights(str(sd3_folder))


def test_a_tokenizer_with_more_words_than_embeddings_is_refused(sd3_folder: Path) -> None:
    file = sd3_folder / "text_encoder" / "config.json"
    settings = json.loads(file.read_text())
    tokenizer = CLIPTokenizer.from_pretrained(sd3_folder / "tokenizer")
    tokenizer.add_tokens(["<for images>"], special_tokens=True)
    tokenizer.save_pretrained(sd3_folder / "tokenizer")
    backbones.init_empty_weights(str(sd3_folder))
    file.write_text(json.dumps(settings | {"vocab_size": settings["vocab_size"] - 1}))
    with pytest.raises(UserError, match=r"text_encoder: its tokenizer has \d+ words, its CLIP\w+ embeddings of \d+"):
        backbones.init_empty_weights(str(sd3_folder))


def test_beta_sigmas_need_scipy(sd3_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sd3_folder / "scheduler" / "scheduler_config.json").write_text('{"use_beta_sigmas": true}')
    monkeypatch.setattr(pipelines, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="use_beta_sigmas: needs scipy; pip install scipy"):
        backbones.init_empty_weights(str(sd3_folder))


VARIANTS = {
    "all": {
        "transformer": "fp16",
        "vae": "fp16",
        "text_encoder": "fp16",
        "text_encoder_2": "fp16",
        "text_encoder_3": "fp16",
    },
    "one": {"vae": "bf16"},
    "two": {"transformer": "fp16", "text_encoder_3": "ema"},
}
"""Components of which there is a variant only."""


@pytest.mark.parametrize("name", tiers(list(VARIANTS), default=["two"]))
def test_weights_of_a_variant_are_loaded(sd3_folder: Path, published_sd3: Path, name: str) -> None:
    expected = backbones.load(str(published_sd3)).pipe.components
    for part, variant in VARIANTS[name].items():
        file = next((sd3_folder / part).glob("*.safetensors"))
        file.rename(file.with_suffix(f".{variant}.safetensors"))
    for part, found in backbones.load(str(sd3_folder)).pipe.components.items():
        if isinstance(found, torch.nn.Module):
            theirs = expected[part].state_dict()
            assert all(torch.equal(value, theirs[key]) for key, value in found.state_dict().items())


def test_a_plain_file_is_preferred_to_a_variant_of_another_component(sd3_folder: Path) -> None:
    """As `from_pretrained(variant=...)` would not: it takes the variant wherever there is one."""
    plain = sd3_folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({k: v + 1 for k, v in load_file(plain).items()}, plain.with_suffix(".fp16.safetensors"), {"format": "pt"})
    (sd3_folder / "transformer" / plain.name).rename(sd3_folder / "transformer" / f"{plain.stem}.fp16.safetensors")
    found = backbones.load(str(sd3_folder)).pipe.vae.state_dict()
    assert all(torch.equal(found[key], value) for key, value in load_file(plain).items())


@pytest.mark.parametrize("how", tiers(["missing", "other names", "other shape"], default=["missing"]))
def test_weights_that_do_not_fit_are_refused(sd3_folder: Path, how: str) -> None:
    file = sd3_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = sorted(weights)[5]
    changed = {"missing": {}, "other names": {"x": torch.zeros(1)}, "other shape": {name: torch.zeros(3)}}[how]
    kept = {} if how == "other names" else {key: value for key, value in weights.items() if key != name}
    save_file(kept | changed, file, {"format": "pt"})
    said = r"transformer: \d+ weights are missing, the first is |weights do not fit its config.json: "
    with pytest.raises(UserError, match=said):
        backbones.load(str(sd3_folder))


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_3", "vae"])
def test_a_weight_that_no_file_holds_is_not_made_up(sd3_folder: Path, part: str) -> None:
    file = next((sd3_folder / part).glob("*.safetensors"))
    weights = load_file(file)
    name = next(key for key in sorted(weights) if weights[key].ndim > 1)
    save_file({key: value for key, value in weights.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"/{part}: 1 weights are missing, the first is .*; copy weights and config"):
        backbones.load(str(sd3_folder))


@pytest.mark.parametrize(
    ("part", "changed"), [("transformer", {"qk_norm": None}), ("vae", {"mid_block_add_attention": False})]
)
def test_a_network_smaller_than_its_weights_is_refused(sd3_folder: Path, part: str, changed: dict[str, Any]) -> None:
    file = sd3_folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(UserError, match=rf"/{part}: \d+ weights have no place in the network of config.json, the"):
        backbones.load(str(sd3_folder))


SD3_LINEAR = (1, 0.986301, 0.971831, 0.956522, 0.940299, 0.923077)
"""First levels of SD3.5 on which the code of FlowBP trains, at 25 steps."""


@pytest.mark.parametrize("steps", [2, 8, 25])
def test_linear_levels_are_those_that_the_papers_code_trains_on(backbone: Backbone, steps: int) -> None:
    """linspace(1, 1/N, N) with the shift of the model: other levels than the pipeline's for SD3 alone."""
    found, own = (backbone.sigmas(steps, size_of(backbone), levels) for levels in ("linear", "pipeline"))
    s = np.linspace(1, 1 / steps, steps)
    if isinstance(backbone, SD3):
        assert found.numpy() == pytest.approx(np.append(3 * s / (1 + 2 * s), 0), abs=1e-6)
        assert found[-2] > 5 * own[-2]
        if steps == 25:
            assert found[:6].numpy() == pytest.approx(np.array(SD3_LINEAR), abs=1e-6)
            assert found[-2] == pytest.approx(0.111111, abs=1e-6)
            assert own[-2] == pytest.approx(0.008929, abs=1e-6)
    else:
        assert torch.equal(found, own)


@pytest.mark.parametrize("key", ["use_karras_sigmas", "use_exponential_sigmas"])
def test_linear_levels_need_a_scheduler_that_keeps_them(backbone: Backbone, key: str) -> None:
    pipe = copy.copy(backbone.pipe)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **{key: True})
    with pytest.raises(UserError, match=f"train_sigmas linear: the model's scheduler has {key}"):
        type(backbone)(pipe).sigmas(4, size_of(backbone), "linear")


@pytest.mark.parametrize("folder", ["sd3"], indirect=True)
def test_training_and_its_evaluation_have_levels_of_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = [*small(folder), "train_sigmas=linear"]
    config = load(TrainConfig, [], [*sets, "num_inference_steps=6", "eval.num_inference_steps=3", "total_batch_size=1"])
    trainer = Trainer(config, load_models(config, torch.device("cpu")), Accelerator(cpu=True))
    backbone, asked = trainer.models.backbone, []
    assert torch.equal(trainer.sigmas, backbone.sigmas(6, size_of(backbone), "linear"))
    assert preflight.check_run(config, 1).sigmas == tuple(trainer.sigmas.tolist())
    sigmas = backbone.sigmas
    monkeypatch.setattr(backbone, "sigmas", lambda *given: asked.append(given) or sigmas(*given))
    trainer.evaluate(PROMPTS[:1], "prompts", 1.0)
    assert asked == [(3, size_of(backbone))]


SAME_IMAGE = (
    *(("flux", 512), ("flux_kontext", 512)),  # their default
    *((family, length) for family in ("z_image", "krea2", "qwen_image") for length in (100, 512)),
    ("z_image", 7),
)
"""Families that see no padding, at lengths that do not cut the prompt: 7 tokens of krea2 are the end of the template
and two of the prompt, and the last of qwen_image's template is the eighth."""
UNCUT = ("qwen_edit", "qwen_edit_plus", "qwen_image_21")
"""Families whose pipelines read prompts of any length."""
PADDED = [(family, length) for family in FAMILIES if family not in UNCUT for length in (7, 100, 512)]


@pytest.mark.parametrize(
    ("folder", "length"),
    [
        pytest.param(
            *case, marks=[] if case in (("sd3", 512), ("flux2", 7), ("flux2", 100)) else pytest.mark.exhaustive
        )
        for case in PADDED
    ],
    indirect=["folder"],
)
def test_prompts_are_padded_to_the_length_that_is_set(folder: Path, length: int) -> None:
    """As the pipeline does when it is asked for that length; SD3 puts 13 tokens of CLIP before those of T5."""
    backbone = backbones.load(str(folder))
    if folder.name.startswith("flux2") and length > 12:
        with pytest.raises(UserError, match=rf"max_sequence_length {length}: the model reads at most 12 tokens"):
            apply_model_options(backbone, ModelConfig(max_sequence_length=length))
        return
    default = sampling.generate_images(backbone, prompt_for(backbone, PROMPTS[0]), [5], size_of(backbone), 3, 1.0)
    apply_model_options(backbone, ModelConfig(max_sequence_length=length))
    assert encode(backbone, PROMPTS)["text"].shape[1] == length + (13 if folder.name == "sd3" else 0)
    ours = sampling.generate_images(backbone, prompt_for(backbone, PROMPTS[0]), [5], size_of(backbone), 3, 1.0)
    expected = theirs(folder, 3, 1.0, 5, "pt", max_sequence_length=length)[1]
    assert (ours - expected).abs().max() < 1e-5
    assert torch.allclose(ours, default, atol=1e-5) == ((folder.name, length) in SAME_IMAGE)


def test_a_cached_velocity_is_the_reforwarded_one(backbone: Backbone) -> None:
    cond = encode(backbone, PROMPTS)
    x = backbone.noise(2, size_of(backbone), torch.Generator().manual_seed(0))
    assert x.shape == (2, *backbone.latent_shape(size_of(backbone)))
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
    cond = encode(backbone, PROMPTS)
    x = backbone.noise(2, size_of(backbone), torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.9, 0.2])
    both = backbone.velocity(x, sigma, cond)
    for i in range(2):
        alone = backbone.velocity(x[i : i + 1], sigma[i : i + 1], {k: v[i : i + 1] for k, v in cond.items()})
        assert torch.allclose(alone, both[i : i + 1], atol=1e-5)
    assert not torch.allclose(both[0], both[1], atol=1e-3)


def test_the_skeleton_is_the_model_without_weights(backbone: Backbone, folder: Path) -> None:
    bones = backbones.init_empty_weights(str(folder))
    assert torch.equal(bones.sigmas(7, size_of(backbone)), backbone.sigmas(7, size_of(backbone)))
    assert bones.latent_shape(size_of(backbone)) == backbone.latent_shape(size_of(backbone))
    names = {name: p.shape for name, p in backbone.net.named_parameters()}
    assert {name: p.shape for name, p in bones.net.named_parameters()} == names
    assert all(p.is_meta for p in bones.net.parameters())
    with pytest.raises(UserError, match="multiples of"):
        bones.latent_shape((17, size_of(backbone)[1]))


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_gradient_reaches_every_trained_weight(folder: Path, lora: LoraConfig | None) -> None:
    backbone = backbones.load(str(folder))
    parameters = mark_trainable(backbone.net, TrainConfig(lora=lora))
    for name, parameter in parameters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)  # they start at zero, and so hide the other factor
    x = backbone.noise(2, size_of(backbone), torch.Generator().manual_seed(0))
    v = backbone.velocity(x, torch.tensor([0.9, 0.2]), encode(backbone, PROMPTS))
    (v * torch.randn(v.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    silent = [name for name, p in parameters.items() if p.grad is None or not p.grad.any()]
    assert [name for name in silent if not name.startswith(backbone.unused_layers)] == []
    assert bool(parameters)
    assert (lora is None) == ("lora" not in next(iter(parameters)))


MISSED = {
    "to_q, to_kk": "with 'to_kk'; did you mean 'to_k'?; frequent are",
    "to_q, norm_out, ffn": "with 'norm_out'; did you mean 'norm_out.linear'?, 'ffn'; frequent are",
    ".to_v, To_k": "with '.to_v'; did you mean 'to_v'?, 'To_k'; did you mean 'to_k'?;",
    "nothing": "with 'nothing';",
    "transformer.transformer_blocks.0.attn.to_q": "with 'transformer.transformer_blocks.0.attn.to_q'; did you mean "
    "'transformer_blocks.0.attn.to_q'?",
    "": "with any of them: [];",
    "to_qkv_mlp_proj": "with 'to_qkv_mlp_proj'",
    "to_q, to_k, to_v, to_out": "with 'to_out'; did you mean 'to_out.0'?",
}


@pytest.mark.parametrize("folder", ["sd3"], indirect=True)
def test_target_modules_that_match_no_layer_are_named(folder: Path) -> None:
    net = backbones.init_empty_weights(str(folder)).net
    for targets, said in MISSED.items():
        config = load(TrainConfig, [], [f"lora.target_modules=[{targets}]"])
        with pytest.raises(UserError, match=re.escape(f"no linear layer has a name that ends {said}")):
            mark_trainable(net, config)


@pytest.mark.parametrize("folder", ["sd3"], indirect=True)
@pytest.mark.slow
def test_layers_are_counted_by_target_module(folder: Path) -> None:
    """The defaults are of several families, and may match none in one of them."""

    def layers(*sets: str) -> object:
        return preflight.check_run(load(TrainConfig, [], [*small(folder), *sets]), 1).lora_layers

    assert layers() == {}
    assert layers("lora.rank=2") == {
        **{"to_q": 4, "to_k": 4, "to_v": 4, "to_out.0": 4},
        **{"to_qkv_mlp_proj": 0, "to_out": 0},
    }
    assert layers("lora.target_modules=[attn.to_q, transformer_blocks.1.ff.net.2]") == {
        "attn.to_q": 3,
        "transformer_blocks.1.ff.net.2": 1,
    }


GUIDANCE = {
    "unguided": Guidance(),
    "guided": Guidance(scale=3.0, detach_negative=False),
    "detached": Guidance(scale=3.0),
}
JOINT = [f"{method} {how}" for method in METHODS for how in GUIDANCE]


@pytest.mark.parametrize("case", tiers(JOINT, default=["flowbp_bridge guided"]))
def test_the_sweep_is_the_joint_graph(folder: Path, case: str) -> None:
    method, how = case.split()
    backbone = backbones.load(str(folder), dtype=torch.float64)
    backbone.set_max_tokens(12)
    assert_sweep_is_joint(backbone, encode(backbone, PROMPTS), encode(backbone, [""]), GUIDANCE[how], method)


LONG = "a red circle and" + " two blue crosses" * 15
"""More than 32 tokens, to which Z-Image fills texts up: then those of a batch have several lengths."""


@pytest.mark.parametrize("folder", ["flux2_dev"], indirect=True)
def test_distilled_guidance_is_an_input(folder: Path) -> None:
    """An image at the pipeline's own guidance and at another; true guidance goes around it in the sweep."""
    for guidance in (None, 2.5):
        backbone = backbones.load(str(folder), embedded_guidance=guidance)
        ours = sampling.generate_images(backbone, prompt_for(backbone, PROMPTS[0]), [5], size_of(backbone), 3, 1.0)
        given = {} if guidance is None else {"guidance_scale": guidance}
        assert (ours - theirs(folder, 3, 1.0, 5, "pt", **given)[1]).abs().max() < 1e-5
    exact = backbones.load(str(folder), dtype=torch.float64)
    assert exact.embedded_guidance == 4
    assert_sweep_is_joint(exact, encode(exact, PROMPTS), encode(exact, [""]), GUIDANCE["guided"], "flowbp_bridge")


@pytest.mark.parametrize("folder", ["z_image"], indirect=True)
@pytest.mark.slow
def test_texts_of_several_lengths_are_seen_whole(folder: Path) -> None:
    """A guided image has a long and an empty text in one evaluation; the sweep has both with their guidance."""
    backbone = backbones.load(str(folder), dtype=torch.float64)
    cond, negative = backbone.encode([PROMPTS[0], LONG]), encode(backbone, [""])
    assert [*cond[LENGTHS].tolist(), *negative[LENGTHS].tolist()] == [4, 50, 2]
    assert_sweep_is_joint(backbone, cond, negative, GUIDANCE["guided"], "flowbp_bridge")
    backbone = backbones.load(str(folder))
    for guidance in (1.0, 3.0):
        ours = sampling.generate_images(backbone, LONG, [5], size_of(backbone), 3, guidance)
        assert (ours - theirs(folder, 3, guidance, 5, "pt", prompt=LONG)[1]).abs().max() < 1e-5
    cut = ModelConfig(max_sequence_length=20)
    apply_model_options(backbone, cut)
    assert backbone.encode([LONG])[LENGTHS].tolist() == [20]


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["qwen_image_21"], indirect=True)
def test_qwen_image_21_is_the_pipelines_own(folder: Path, backbone: Backbone) -> None:
    """Long and empty prompts, each at its own length; the model's own levels where it has as many."""
    size = size_of(backbone)
    for prompt in (PROMPTS[0], LONG, ""):
        for guidance in (1.0, 3.0):
            ours = sampling.generate_images(backbone, prompt, [5], size, 3, guidance)
            assert (ours - theirs(folder, 3, guidance, 5, "pt", prompt=prompt)[1]).abs().max() < 1e-5
    cond = backbone.encode([PROMPTS[0], LONG])
    assert cond[LENGTHS].tolist() == [11, 57]
    backbone.set_max_tokens(20)
    cut = backbone.encode([LONG])
    backbone.set_max_tokens(512)
    assert cut[LENGTHS].tolist() == [20]
    assert torch.allclose(cut["text"], cond["text"][1:, :20], atol=1e-5)
    x, time, text = backbone.noise(2, size, torch.Generator().manual_seed(0)), torch.tensor([0.9, 0.2]), cond["text"]
    rows, columns = x.shape[2:]
    is_image = torch.arange(11 + rows * columns) >= 11
    rotary = backbone.net.pos_embed([(1, rows, columns)], is_image, device=x.device)
    alike = {"text": text[:1].expand(2, -1, -1), LENGTHS: torch.tensor([11, 11])}
    traced = backbone.traceable(x, time, alike["text"][:, :11], rotary)
    assert torch.allclose(backbone.velocity(x, time, alike), traced, atol=1e-5)
    linear = backbone.sigmas(3, size)
    index = folder / "model_index.json"
    content = index.read_text()
    index.write_text(json.dumps(json.loads(content) | {"sample_sigmas": [1.0, 0.9, 0.4]}))
    try:
        own = backbones.load(str(folder))
        assert torch.equal(own.sigmas(3, size), theirs(folder, 3, 1.0, 0, "latent")[0].scheduler.sigmas)
        assert torch.equal(own.sigmas(3, size, "linear"), linear)
        assert torch.equal(own.sigmas(4, size), backbone.sigmas(4, size))
        assert not torch.equal(own.sigmas(3, size), linear)
    finally:
        index.write_text(content)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["krea2"], indirect=True)
def test_long_empty_and_distilled_krea_is_the_pipelines_own(folder: Path, backbone: Backbone) -> None:
    """Padding lies between a prompt and the end of the template; a step-distilled model has a shift of its own."""
    for prompt in (LONG, ""):
        for guidance in (1.0, 3.0):
            ours = sampling.generate_images(backbone, prompt, [5], size_of(backbone), 3, guidance)
            assert (ours - theirs(folder, 3, guidance, 5, "pt", prompt=prompt)[1]).abs().max() < 1e-5
    index = folder / "model_index.json"
    content = index.read_text()
    own = backbone.sigmas(4, size_of(backbone))
    index.write_text(json.dumps(json.loads(content) | {"is_distilled": True}))
    try:
        with pytest.raises(UserError, match="step-distilled, as its model_index"):
            backbones.load(str(folder))
        found = backbones.load(str(folder), distilled=True).sigmas(4, size_of(backbone))
        assert torch.equal(found, theirs(folder, 4, 1.0, 0, "latent")[0].scheduler.sigmas)
        assert (found - own).abs().max() > 0.01
    finally:
        index.write_text(content)


@pytest.mark.parametrize("folder", ["qwen_image"], indirect=True)
def test_the_sweep_of_a_rescaled_velocity_takes_the_value_of_a_detached_negative(folder: Path) -> None:
    backbone = backbones.load(str(folder), dtype=torch.float64)
    backbone.set_max_tokens(12)
    assert backbone.guidance_rescale == "norm"
    cond = encode(backbone, PROMPTS), encode(backbone, [""])
    assert_sweep_is_joint(backbone, *cond, GUIDANCE["detached"], "flowbp_bridge")


@pytest.mark.parametrize("folder", ["qwen_image"], indirect=True)
def test_guidance_is_rescaled_in_training_and_evaluation_as_it_is_set(folder: Path) -> None:
    def latents(*sets: str) -> list[torch.Tensor]:
        config = load(TrainConfig, [], [*small(folder), "guidance_scale=3", "model.max_sequence_length=12", *sets])
        trainer = Trainer(config, load_models(config, torch.device("cpu"), with_rewards=False), Accelerator(cpu=True))
        conds = trainer.models.embeddings(PROMPTS)
        noise = trainer.models.backbone.noise(2, size_of(trainer.models.backbone), torch.Generator().manual_seed(0))
        sampled = generate_latents(trainer.models.backbone, *conds, noise, size_of(trainer.models.backbone), 2, 3.0)
        velocity, sigmas = trainer._velocity(conds), trainer.sigmas[[0, 12, -1]]
        return [sampled, rollout(velocity, noise, sigmas, RolloutSpec(frozenset(), frozenset(), 2)).x_end]

    default, norm, none = latents(), latents("guidance.rescale=norm"), latents("guidance.rescale=none")
    for one, other, plain in zip(default, norm, none, strict=True):
        assert torch.equal(one, other)
        assert (one - plain).abs().max() > 1e-3


def test_decoding_is_differentiable(backbone: Backbone) -> None:
    x = backbone.noise(1, size_of(backbone), torch.Generator().manual_seed(0)).requires_grad_()
    images = backbone.decode(x)
    images.sum().backward()
    assert images.shape == (1, 3, *size_of(backbone))
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.any()


@pytest.mark.parametrize("lora", tiers(["null", "{rank: 2}"], slow=["{rank: 2}"]))
def test_an_update_in_bfloat16_trains_float32_weights(folder: Path, lora: str) -> None:
    """Frozen weights are bfloat16 under adapters; the cached velocity is still the re-forwarded one, bit for bit."""
    sets = [*small(folder), "model.dtype=bfloat16", f"lora={lora}"]
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
    kept = set(getattr(parts.backbone.net, "_keep_in_fp32_modules", None) or ())  # by diffusers, in float32
    others = {name: p for name, p in parts.backbone.net.named_parameters() if name not in parts.parameters}
    frozen = {p.dtype for name, p in others.items() if not kept & set(name.split("."))}
    assert frozen == (set() if lora == "null" else {torch.bfloat16})
    before = {name: p.detach().clone() for name, p in parts.parameters.items()}
    metrics = trainer.step()
    assert metrics["grad_norm"] > 0
    moved = [name for name, p in parts.parameters.items() if not torch.equal(p, before[name])]
    assert moved
    prompts = [prompt_for(parts.backbone, text) for text in PROMPTS]
    cond, negative = parts.embeddings(prompts)
    velocity = guided_velocity(parts.backbone.velocity, cond, negative, config.classifier_free_guidance)
    x, sigma = parts.backbone.noise(2, size_of(parts.backbone), torch.Generator().manual_seed(0)), torch.full((2,), 0.6)
    with torch.no_grad():
        cached = velocity(x, sigma)
    assert torch.equal(cached, velocity(x.clone().requires_grad_(), sigma))
    found = trainer.evaluate(prompts, "prompts", 2.0)
    assert all(abs(score) < 1e3 for score in found.scores["reward"])
