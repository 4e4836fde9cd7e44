"""Networks load whole or not at all; published folders load, with tied weights, old buffers, parts of larger models."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from imgen_common import hub
from imgen_common.errors import UserError, warn_once
from imgen_common.hub.settings import warn_of_unknown_settings
from imgen_common.weights import load_whole

Weights = dict[str, torch.Tensor]
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP_SIZES = {"text_config": {**SIZES, "vocab_size": 8}, "vision_config": {**SIZES, "image_size": 8, "patch_size": 4}}


def qwen(**changed: Any) -> Qwen3Config:
    return Qwen3Config(**(SIZES | {"vocab_size": 8, "num_key_value_heads": 2, "head_dim": 8} | changed))


def t5() -> T5Config:
    return T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)


def saved(model: PreTrainedModel, folder: Path, drop: str = "", **added: torch.Tensor) -> Path:
    """The folder of a model, without the weight `drop`, and with others."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(
        {name: value for name, value in (load_file(file) | added).items() if name != drop}, file, {"format": "pt"}
    )
    return folder


@pytest.mark.slow
def test_tied_weights_may_be_there_once_or_twice(tmp_path: Path) -> None:
    model = Qwen3ForCausalLM(qwen(tie_word_embeddings=True))
    tied = model.state_dict()["model.embed_tokens.weight"]
    for name, added in {"once": {}, "twice": {"lm_head.weight": tied.clone()}}.items():
        found = load_whole(Qwen3ForCausalLM, saved(model, tmp_path / name, **added), dtype=torch.float32)
        assert torch.equal(found.lm_head.weight, tied)


def test_a_t5_may_name_its_embeddings_twice_and_have_a_decoder(tmp_path: Path) -> None:
    encoder = T5EncoderModel(t5())
    again = {"encoder.embed_tokens.weight": encoder.shared.weight.detach().clone()}
    twice = saved(encoder, tmp_path / "twice", **again)
    other = saved(encoder, tmp_path / "other", "shared.weight", **again)
    for folder in (twice, other):
        assert torch.equal(load_whole(T5EncoderModel, folder).shared.weight, encoder.shared.weight)
    load_whole(T5EncoderModel, saved(T5ForConditionalGeneration(t5()), tmp_path / "both"))


def test_old_buffers_and_parts_of_larger_models_load(tmp_path: Path) -> None:
    ids = {f"{part}_model.embeddings.position_ids": torch.arange(5)[None] for part in ("text", "vision")}
    folder = saved(CLIPModel(CLIPConfig(**CLIP_SIZES)), tmp_path / "clip", **ids)
    load_whole(CLIPModel, folder)
    load_whole(CLIPTextModelWithProjection, folder)
    frequencies = {f"layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(4) for layer in (0, 1)}
    load_whole(Qwen3Model, saved(Qwen3Model(qwen()), tmp_path / "qwen", **frequencies))
    load_whole(Qwen3Model, saved(Qwen3ForCausalLM(qwen()), tmp_path / "prefixed"))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (Qwen3ForCausalLM(qwen(tie_word_embeddings=True)), "model.embed_tokens.weight"),
        (Qwen3ForCausalLM(qwen()), "lm_head.weight"),
        (T5EncoderModel(t5()), "shared.weight"),
        (T5EncoderModel(t5()), "encoder.final_layer_norm.weight"),
        (CLIPModel(CLIPConfig(**CLIP_SIZES)), "logit_scale"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_missing_weight_is_named(model: PreTrainedModel, name: str, tmp_path: Path) -> None:
    folder = saved(model, tmp_path / "m", name)
    with pytest.raises(UserError, match=r"m: \d weights are missing, the first is \S+; copy weights and config"):
        load_whole(type(model), folder)


@pytest.mark.parametrize(
    ("part", "settings", "named"),
    [
        ("transformer", {"use_rope_v2": True, "_of_someone": 1}, "use_rope_v2"),
        ("vae", {"mean_of": [0.5], "_diffusers_version": "99.1.0.dev0"}, "mean_of"),
        ("transformer", {"later": 1, "_diffusers_version": None, "rope_scales": [1]}, "later, rope_scales"),
        ("transformer", {"use_rope_v2": False, "other": None, "more": []}, ""),
        ("transformer", {"pooled_projection_dim": 768}, ""),  # of Qwen-Image, as it is published
        ("scheduler", {"use_flow_sigmas": True}, "use_flow_sigmas"),
        ("vae", {"force_upcast": True}, ""),  # of FLUX.2
        ("vae", {"optimization_step": 45531, "_diffusers_version": "0.30.3"}, ""),  # of an EMA
    ],
)
def test_a_setting_that_diffusers_does_not_know_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, settings: dict[str, Any], named: str
) -> None:
    source = hub.resolve("builtin:shapes/generator")
    shutil.copy(source / "model_index.json", tmp_path)
    files = {name: f"{'scheduler_' * (name == 'scheduler')}config.json" for name in ("transformer", "vae", "scheduler")}
    for name, file in files.items():
        content = json.loads((source / name / file).read_text())
        content = content | {"_diffusers_version": diffusers.__version__} | (settings if name == part else {})
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(
            json.dumps({key: value for key, value in content.items() if (key, value) != ("_diffusers_version", None)})
        )
    warn_once.cache_clear()
    for _ in range(2):
        warn_of_unknown_settings(tmp_path)
    installed = f"the installed diffusers {diffusers.__version__} does not know {named} and ignores it"
    said = f"warning: {tmp_path / part / files[part]}: {installed}; perhaps the model is of a newer release"
    assert capsys.readouterr().err == (f"{said}: pip install -U diffusers\n" if named else "")
