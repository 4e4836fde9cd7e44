"""Adapters in a generator's pipeline: all of one counts, as its trainer scaled it, or it is refused."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from imgen_common import hub
from imgen_common.errors import UserError
from interleave.models.generators.loading import load_lora, load_pipeline
from interleave.models.generators.pipeline import PipelineConfig
from interleave.models.hashes import check_models, hash_models
from tests.interleave.editors import folder_of

LAYER, LAYER_OF_KOHYA = "transformer_blocks.0.attn.to_q", "lora_unet_double_blocks_0_img_attn_proj"


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of("flux2", tmp_path_factory.mktemp("klein"))


def loaded(folder: Path) -> DiffusionPipeline:
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    return load_pipeline(name, folder, torch.float32, torch.device("cpu"))


def factors(pipe: DiffusionPipeline, component: str, layer: str) -> dict[str, Tensor]:
    module, rng = getattr(pipe, component).get_submodule(layer), torch.Generator().manual_seed(0)
    shapes = {"A": (2, module.in_features), "B": (module.out_features, 2)}
    return {
        f"{component}.{layer}.lora_{one}.weight": torch.randn(shape, generator=rng) for one, shape in shapes.items()
    }


@pytest.mark.parametrize("older", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_text_encoder_s_part_of_an_adapter_counts(older: bool, tmp_path: Path) -> None:
    """FLUX.1's adapters have one for CLIP, whose layers have other names since transformers 5."""
    pipe = loaded(folder_of("flux", tmp_path))
    layers = {"transformer": LAYER, "text_encoder": "encoder.layers.0.self_attn.q_proj"}
    keys: dict[str, Tensor] = {}
    for component, layer in layers.items():
        keys |= factors(pipe, component, layer)
    before = {
        component: getattr(pipe, component).get_submodule(layer).weight.clone() for component, layer in layers.items()
    }
    start = "text_encoder." + "text_model." * older
    save_file({key.replace("text_encoder.", start): one for key, one in keys.items()}, tmp_path / "a.safetensors")
    load_lora(pipe, tmp_path / "a.safetensors", "lora a", 0.5)
    for component, layer in layers.items():
        down, up = (keys[f"{component}.{layer}.lora_{part}.weight"] for part in "AB")
        added = getattr(pipe, component).get_submodule(layer).weight - before[component]
        torch.testing.assert_close(added, 0.5 * up @ down, rtol=1e-4, atol=1e-5)


def test_what_is_not_read_is_refused_and_peft_s_alpha_is_read(klein: Path, tmp_path: Path) -> None:
    pipe = loaded(klein)
    plain, module = factors(pipe, "transformer", LAYER), pipe.transformer.get_submodule(LAYER)
    wide = torch.ones(module.out_features)

    def fused(keys: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
        before, file = module.weight.clone(), tmp_path / "any.safetensors"
        save_file(keys, file)
        (tmp_path / "adapter_config.json").write_text(json.dumps(options))
        load_lora(pipe, file, "lora any", 1.0)
        return pipe.transformer.get_submodule(LAYER).weight - before

    of_peft = {key.replace("transformer.", "base_model.model.", 1): one for key, one in plain.items()}
    down, up = plain.values()
    for keys, options, scale in ((plain, {}, 1), (of_peft, {"r": 2, "lora_alpha": 8}, 4)):
        torch.testing.assert_close(fused(keys, options), scale * up @ down, rtol=1e-4, atol=1e-5)
    for keys, options, message in (
        (plain | {f"transformer.{LAYER}.dora_scale": wide}, {}, "dora_scale, which is no part of a plain LoRA"),
        (plain | {f"transformer.{LAYER}.lokr_w1": wide}, {}, "lokr_w1, which is no part of a plain LoRA"),
        (of_peft, {"r": 2, "use_rslora": True}, "its use_rslora in adapter_config.json is not supported"),
        (of_peft, {"r": 2, "lora_alpha": 2, "init_lora_weights": "PiSSA_niter_4"}, "its init_lora_weights PiSSA_niter"),
        (of_peft, {"r": 8, "lora_alpha": 8}, "has rank 2, but adapter_config.json says 8; copy both from one place"),
        (of_peft, {"r": "2"}, "must have the numbers r and lora_alpha"),
        (plain | {f"transformer.{LAYER}.lora_B.bias": wide}, {}, "does not fit Flux2KleinPipeline .*lora_bias"),
    ):
        with pytest.raises(UserError, match=f"^lora any: .*{message}"):
            fused(keys, options)
    said = json.dumps({"transformer.r": 2, "transformer.init_lora_weights": "olora"})
    save_file(plain, tmp_path / "any.safetensors", {"format": "pt", "lora_adapter_metadata": said})
    with pytest.raises(UserError, match=r"^lora any: its init_lora_weights olora changes the weights of the model"):
        load_lora(pipe, tmp_path / "any.safetensors", "lora any", 1.0)


@pytest.mark.parametrize("family", ["flux", pytest.param("sd3", marks=pytest.mark.slow)])
def test_layers_named_as_in_diffusers_count_as_their_trainer_scaled_them(family: str, tmp_path: Path) -> None:
    """diffusers itself drops some of the alphas, and takes some forms in some pipelines only."""
    pipe = loaded(folder_of(family, tmp_path))
    down, up = factors(pipe, "transformer", LAYER).values()
    for start, halves, alpha in (
        ("transformer.", ("lora_down", "lora_up"), 1.0),  # OneTrainer
        ("lora_transformer_", ("lora_down", "lora_up"), 1.0),
        ("base_model.model.", ("lora_A", "lora_B"), None),  # PEFT
        ("diffusion_model.", ("lora_A", "lora_B"), 4.0),
        ("", ("lora.down", "lora.up"), None),
    ):
        before = pipe.transformer.get_submodule(LAYER).weight.clone()
        layer = start + (LAYER.replace(".", "_") if start.endswith("_") else LAYER)
        keys = {f"{layer}.{half}.weight": one for half, one in zip(halves, (down, up), strict=True)}
        save_file(keys | ({f"{layer}.alpha": torch.tensor(alpha)} if alpha else {}), tmp_path / "a.safetensors")
        load_lora(pipe, tmp_path / "a.safetensors", "lora a", 1.0)
        added = pipe.transformer.get_submodule(LAYER).weight - before
        torch.testing.assert_close(added, (alpha or 2) / 2 * up @ down, rtol=1e-4, atol=1e-5)


def test_what_diffusers_leaves_out_is_refused(klein: Path, tmp_path: Path) -> None:
    """T5 of FLUX.1, and layers of FLUX.2 outside of blocks, in kohya's names."""
    file = tmp_path / "a.safetensors"

    def refusal(pipe: DiffusionPipeline, *layers: str, value: float = 1.0) -> str:
        keys = {f"{LAYER_OF_KOHYA}.lora_{one}.weight": torch.ones(32, 32) for one in ("down", "up")}
        for layer in layers:
            keys |= {f"{layer}.lora_{one}.weight": torch.full((2, 2), value) for one in ("down", "up")}
            keys |= {f"{layer}.alpha": torch.tensor(1.0)}
        save_file(keys, file)
        with nullcontext() if not value else pytest.raises(UserError) as said:
            load_lora(pipe, file, "lora a", 1.0)
        return str(said.value) if said else ""

    flux = loaded(folder_of("flux", tmp_path))
    clip = "lora_te1_text_model_encoder_layers_0_self_attn_"
    keys = {f"{LAYER_OF_KOHYA}.lora_{one}.weight": torch.ones(32, 32) for one in ("down", "up")}
    for layer in (f"{clip}q_proj", f"{clip}out_proj"):
        keys |= {f"{layer}.lora_{one}.weight": torch.ones(16, 16) for one in ("down", "up")}
        keys |= {f"{layer}.alpha": torch.tensor(8.0)}
    save_file(keys, file)
    module = flux.text_encoder.get_submodule("encoder.layers.0.self_attn.q_proj")
    before = module.weight.clone()
    load_lora(flux, file, "lora a", 1.0)
    now = flux.text_encoder.get_submodule("encoder.layers.0.self_attn.q_proj").weight
    torch.testing.assert_close(now - before, torch.full((16, 16), 8.0))
    t5 = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    assert f"loads adapters of FluxPipeline without {t5}" in refusal(flux, t5)
    assert not refusal(flux, t5, value=0.0)
    assert "does not fit FluxPipeline" in refusal(flux, "lora_transformer_a", "lora_te2_b")
    assert "without lora_unet_single_stream_modulation_lin" in refusal(
        loaded(klein), "lora_unet_single_stream_modulation_lin"
    )
    save_file({f"{LAYER_OF_KOHYA}.lora_down.weight": torch.ones(2, 32)}, file)
    with pytest.raises(UserError, match=f"one of two factors .* of {LAYER_OF_KOHYA}"):
        load_lora(flux, file, "lora a", 1.0)


@pytest.mark.parametrize("end", ["diff", "diff_b", "hada_w1_a"])
def test_what_is_no_lora_is_not_left_out(end: str, tmp_path: Path) -> None:
    """diffusers leaves it out of FLUX.1's adapters without a word."""
    pipe = loaded(folder_of("flux", tmp_path))
    other = "transformer_blocks.0.attn.to_k"
    keys = factors(pipe, "transformer", LAYER)
    for value, refused in ((1.0, True), (0.0, False)):
        save_file(keys | {f"transformer.{other}.{end}": torch.full((4,), value)}, tmp_path / "a.safetensors")
        with (
            pytest.raises(UserError, match=f"has transformer.{other}.{end}, which is no part")
            if refused
            else nullcontext()
        ):
            load_lora(pipe, tmp_path / "a.safetensors", "lora a", 1.0)


def test_a_generator_without_the_scale_of_its_latents_is_refused(tmp_path: Path) -> None:
    folder = folder_of("flux", tmp_path)
    about = folder / "vae" / "config.json"
    about.write_text(json.dumps({k: v for k, v in json.loads(about.read_text()).items() if k != "scaling_factor"}))
    with pytest.raises(UserError, match=r"vae/config.json scaling_factor is missing: must be a number above 0"):
        loaded(folder)


@pytest.mark.parametrize(("length", "said"), [(None, "says no model_max_length"), (99, "says 99 tokens")])
def test_a_tokenizer_longer_than_clip_reads_is_refused(length: int | None, said: str, tmp_path: Path) -> None:
    folder = folder_of("flux", tmp_path)
    about = folder / "tokenizer" / "tokenizer_config.json"
    settings = {k: v for k, v in json.loads(about.read_text()).items() if k != "model_max_length"}
    about.write_text(json.dumps(settings | ({"model_max_length": length} if length else {})))
    with pytest.raises(UserError, match=rf"tokenizer/tokenizer_config.json {said}, and text_encoder reads 13"):
        loaded(folder)


def test_a_run_is_bound_to_how_its_model_says_it_draws(tmp_path: Path) -> None:
    folder = shutil.copytree(hub.resolve("builtin:shapes/generator"), tmp_path / "model")
    (tmp_path / "lora").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "lora" / "adapter_model.safetensors")
    about, config = (
        tmp_path / "lora" / "adapter_config.json",
        PipelineConfig(ref=str(folder), lora=str(tmp_path / "lora")),
    )
    about.write_text('{"lora_alpha": 8}')
    before = hash_models({"generator": config})
    about.write_text('{"lora_alpha": 64}')
    (folder / hub.SAMPLING_FILE).write_text('{"num_inference_steps": 3}')
    now = hash_models({"generator": config})
    changed = {"sampling.json of generator", "the configuration of generator.lora"}
    assert {key for key in now if now[key] != before.get(key)} == changed


def test_weights_of_a_pipeline_of_another_family_are_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[bool] = []
    monkeypatch.setattr(hub, "resolve", lambda ref, *, weights=True, **_: wanted.append(weights) or tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    config = PipelineConfig(ref="org/name")
    for act in (config.build, lambda: check_models({"generator": config})):
        with pytest.raises(UserError, match="org/name: cannot generate with a StableDiffusionXLPipeline"):
            act()
    assert wanted == [False, False]
