"""Exports: what others load back draws the same image."""

import json
import re
import sys
from inspect import signature
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux_lora_to_diffusers,
    _convert_non_diffusers_flux2_lora_to_diffusers,
)
from families import FAMILIES, folder_of
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file, save_file
from tiers import tiers
from trained_runs import TARGETS, ours, targets_of, theirs, trained

from flowbp import backbones
from flowbp.backbones.licenses import license_of
from flowbp.config import TrainConfig
from flowbp.evaluation.compare import Change
from flowbp.evaluation.sources import model_source
from flowbp.export import export_run, push_to_hub
from flowbp.export.adapters import DIFFUSERS_FILE, Adapter
from flowbp.export.comfyui import COMFYUI_FILE, fuse_adapters, to_comfyui
from flowbp.export.model_card import model_card
from imgen_common.config import load
from imgen_common.errors import UserError, quoted
from imgen_common.hub import SAMPLING_FILE
from imgen_common.run_folder.data import hash_model, record_data
from imgen_common.run_folder.folder import RunFolder


@pytest.mark.parametrize("family", tiers(FAMILIES, default=["flux2"], slow=["sd3", "flux", "z_image"]))
def test_an_exported_adapter_generates_the_same_image_in_diffusers(family: str, tmp_path: Path) -> None:
    model = folder_of(family, tmp_path)
    run = trained(tmp_path, model, "lora={rank: 4, alpha: 2}", targets_of(family))
    out = export_run(run, "diffusers", tmp_path / "out")
    pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    assert (theirs(pipe, family) - ours(run, model)).abs().max() > 5e-3
    pipe.load_lora_weights(out, weight_name=DIFFUSERS_FILE)
    assert (theirs(pipe, family) - ours(run, model)).abs().max() < 1e-5
    text = (out / "README.md").read_text()
    assert TrainConfig().method.name in text
    assert "rank: 4" in text
    with pytest.raises(UserError, match="exists already"):
        export_run(run, "diffusers", out)


def test_nothing_is_merged_into_a_model_that_has_changed(tmp_path: Path) -> None:
    """Such as a newer revision of its repository."""
    model = folder_of("sd3", tmp_path)
    run = trained(tmp_path, model, "lora={rank: 2}")
    record_data(run, hash_model("model.ref", str(model)))
    file = next((model / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    name = max(tensors, key=lambda one: tensors[one].numel())
    save_file({**tensors, name: tensors[name] + 1}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.ref has changed since the run was started"):
        export_run(run, "merged", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("ema", "kept", "scored"), [(0.9, "ema", True), (0.9, "last", False), (0, "last", True)])
def test_a_card_shows_no_scores_of_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: float, kept: str, scored: bool
) -> None:
    """A run evaluates its averaged weights."""
    config = load(TrainConfig, [], [f"ema={ema}", "lora.rank=2"])
    found = {1.0: {"reward": Change(11.5, 12.5, 1.0, 0.9, 1.1, 20)}}
    monkeypatch.setattr(sys.modules["flowbp.export.model_card"], "compare_base_and_trained", lambda run: found)
    with RunFolder.create(tmp_path / "run", config) as run:
        text = model_card(run, config, "diffusers", kept, None, None, {"num_inference_steps": 4})  # type: ignore[arg-type]
    assert ("11.50" in text) == scored
    assert ("The last weights were not evaluated." in text) != scored


@pytest.mark.slow
def test_the_average_is_an_adapter_of_its_own(tmp_path: Path) -> None:
    """Beside that of the last update, in one pipeline, and that of an earlier checkpoint."""
    model = folder_of("flux2", tmp_path)
    run = trained(tmp_path, model, "lora={rank: 4, alpha: 2}", TARGETS)
    with RunFolder.open(run) as folder:
        tensors = folder.load_checkpoint(1).tensors
        later = {name: 2 * value for name, value in tensors["ema"].items()}
        folder.save_checkpoint(2, {"weights": tensors["ema"], "ema": later, "optimizer": {}}, {})
    pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    cases = {"ema": ("ema", None), "last": ("last", None), "early": ("ema", 1)}
    for name, (kept, step) in cases.items():
        out = export_run(run, "diffusers", tmp_path / name, kept, step)
        pipe.load_lora_weights(out, weight_name=DIFFUSERS_FILE, adapter_name=name)
    images = {}
    for name in cases:
        pipe.set_adapters(name)
        images[name] = theirs(pipe, "flux2")
    assert (images["ema"] - ours(run, model)).abs().max() < 1e-5
    assert (images["last"] - images["early"]).abs().max() < 1e-5  # as the checkpoints were made
    assert (images["ema"] - images["last"]).abs().max() > 5e-3
    of_adapter = {"height": 32, "width": 32, "max_sequence_length": backbones.load(str(model)).max_tokens}
    assert json.loads((tmp_path / "ema" / SAMPLING_FILE).read_text()) == of_adapter
    assert "1 update;" in (tmp_path / "early" / "README.md").read_text()
    # the run was stopped at update 2, of as many as its configuration says
    assert all(" 2 updates;" in (tmp_path / name / "README.md").read_text() for name in ("ema", "last"))
    with pytest.raises(UserError, match="no checkpoint of step 7; there are: 1, 2"):
        export_run(run, "diffusers", tmp_path / "none", step=7)


@pytest.mark.parametrize("family", tiers(FAMILIES, default=["flux2"], slow=["sd3", "flux", "z_image"]))
@pytest.mark.parametrize("lora", tiers(["null", "{rank: 4, alpha: 8}"], default=["null"], slow=["{rank: 4, alpha: 8}"]))
def test_a_merged_pipeline_generates_the_same_image(family: str, lora: str, tmp_path: Path) -> None:
    model = folder_of(family, tmp_path)
    run = trained(tmp_path, model, f"lora={lora}", *(["model.max_sequence_length=9"] if family == "sd3" else []))
    pipe = DiffusionPipeline.from_pretrained(export_run(run, "merged", tmp_path / "out"), dtype=torch.float32)
    assert (theirs(pipe, family) - ours(run, model)).abs().max() < 1e-5
    scale = {"flux": 3.5, "flux_kontext": 3.5, "flux2_dev": 4.0, "z_image": 0.0, "krea2": 0.0}.get(family, 1.0)
    own = {"height": 32, "width": 32, "num_inference_steps": 25, "guidance_scale": scale}
    has_length = "max_sequence_length" in signature(pipe.__call__).parameters
    own |= (
        {"max_sequence_length": 9 if family == "sd3" else backbones.load(str(model)).max_tokens} if has_length else {}
    )
    assert json.loads((tmp_path / "out" / SAMPLING_FILE).read_text()) == own
    drawn_with = ", ".join(f"{name} {value:g}" for name, value in sorted(own.items()))
    card = (tmp_path / "out" / "README.md").read_text()
    (line,) = re.findall(r"^Drawn with (.*), as the pipeline names them\.$", card, re.MULTILINE)
    assert ", ".join(sorted(line.split(", "))) == drawn_with
    drawn, of_run = (model_source(str(one), tmp_path).config for one in (tmp_path / "out", run))
    assert drawn.model.embedded_guidance == (scale if family in ("flux", "flux_kontext", "flux2_dev") else None)
    same = {"ref": str(tmp_path / "out"), "embedded_guidance": drawn.model.embedded_guidance}
    same["max_sequence_length"] = own.get("max_sequence_length")
    assert drawn.model == of_run.model.model_copy(update=same)
    assert (drawn.eval.num_inference_steps, drawn.eval_guidance_scales) == (25, of_run.eval_guidance_scales)
    if lora == "null":
        with pytest.raises(UserError, match="use --to merged"):
            export_run(run, "comfyui", tmp_path / "other")
    last = DiffusionPipeline.from_pretrained(export_run(run, "merged", tmp_path / "last", "last"), dtype=torch.float32)
    assert (theirs(last, family) - ours(run, model, base=True)).abs().max() < 1e-5


@pytest.mark.parametrize("family", tiers(["flux2", "sd3", "z_image"], default=["flux2"], slow=["sd3"]))
def test_a_comfyui_adapter_loads_back_through_diffusers(family: str, tmp_path: Path) -> None:
    model = folder_of(family, tmp_path)
    run = trained(tmp_path, model, "lora={rank: 4, alpha: 2}", targets_of(family))
    out = export_run(run, "comfyui", tmp_path / "out")
    if family == "flux2":
        keys = set(load_file(out / COMFYUI_FILE))
        assert "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight" in keys
        assert "diffusion_model.single_blocks.1.linear1.lora_B.weight" in keys
    pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.load_lora_weights(out, weight_name=COMFYUI_FILE)
    assert (theirs(pipe, family) - ours(run, model)).abs().max() < 1e-5


def random_adapter(outputs: int, inputs: int, seed: int) -> Adapter:
    rng = torch.Generator().manual_seed(seed)
    return Adapter(torch.randn(2, inputs, generator=rng), torch.randn(outputs, 2, generator=rng))


@pytest.mark.slow
def test_flux1_keys_come_back_through_diffusers_converter() -> None:
    """At the real widths, which the converter has written down; key and MLP of the single block have no adapter."""
    single, double = "single_transformer_blocks.7", "transformer_blocks.3"
    found = {f"{double}.attn.{end}": random_adapter(3072, 3072, i) for i, end in enumerate(("to_q", "to_k", "to_v"))}
    found |= {
        f"{double}.attn.to_out.0": random_adapter(3072, 3072, 5),
        f"{double}.ff.net.2": random_adapter(3072, 12288, 6),
    }
    found |= {
        f"{single}.attn.to_q": random_adapter(3072, 3072, 7),
        f"{single}.attn.to_v": random_adapter(3072, 3072, 8),
    }
    widths = {f"{single}.attn.to_k": 3072, f"{single}.proj_mlp": 12288} | {n: len(a.up) for n, a in found.items()}
    back = _convert_kohya_flux_lora_to_diffusers(to_comfyui(found, "FluxPipeline", widths))
    for layer, adapter in found.items():
        update = back[f"transformer.{layer}.lora_B.weight"] @ back[f"transformer.{layer}.lora_A.weight"]
        assert torch.allclose(update, adapter.update, atol=1e-4)
    silent = back[f"transformer.{single}.proj_mlp.lora_B.weight"] @ back[f"transformer.{single}.proj_mlp.lora_A.weight"]
    assert not silent.any()


def test_layers_without_a_name_are_refused() -> None:
    with pytest.raises(UserError, match="export --to diffusers instead"):
        to_comfyui({"pos_embed.proj": random_adapter(4, 4, 0)}, "Flux2KleinPipeline", {})


def test_fused_layers_stack_their_outputs() -> None:
    a, b = random_adapter(3, 5, 0), random_adapter(2, 5, 1)
    x = torch.randn(5)
    whole = fuse_adapters([a, None, b], [3, 4, 2]).update @ x
    assert torch.allclose(whole, torch.cat([a.update @ x, torch.zeros(4), b.update @ x]), atol=1e-5)
    converted = _convert_non_diffusers_flux2_lora_to_diffusers(
        to_comfyui({"transformer_blocks.0.attn.to_v": b}, "Flux2KleinPipeline",
                   {f"transformer_blocks.0.attn.{n}": 2 for n in ("to_q", "to_k", "to_v")})
    )  # fmt: skip
    assert not converted["transformer.transformer_blocks.0.attn.to_q.lora_B.weight"].any()


def test_licenses_are_known_or_said_not_to_be() -> None:
    assert license_of("black-forest-labs/FLUX.2-klein-base-4B@main") == "Apache-2.0"
    assert "non-commercial" in license_of("black-forest-labs/FLUX.2-klein-base-9B")
    assert "not known" in license_of("someone/something")
    assert license_of("cache/hub/models--black-forest-labs--FLUX.1-schnell/snapshots/741f7c") == "Apache-2.0"


@pytest.mark.parametrize(
    ("repo", "error"),
    [
        ("me/model", OfflineModeIsEnabled("offline mode is enabled\nunset HF_HUB_OFFLINE")),
        ("me/other", ConnectionResetError("connection reset by peer")),
        ("a b", None),
    ],
)
def test_an_upload_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo: str, error: Exception | None
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error or AssertionError

    if error is not None:
        monkeypatch.setattr(HfApi, "create_repo", fail)
    with pytest.raises(UserError, match=rf"--push {repo}: not uploaded \(.*\); check HF_TOKEN and the network") as said:
        push_to_hub(tmp_path, repo)
    assert f"then run `hf upload --private {quoted(repo)} {tmp_path}`" in str(said.value)
    assert "\n" not in str(said.value)


def test_an_upload_goes_to_the_repository_that_was_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name without an organization is made the user's own."""
    asked: list[str] = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, **_: RepoUrl(f"hub/me/{repo}", endpoint="hub"))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, *, repo_id, folder_path: asked.append(repo_id))
    push_to_hub(tmp_path, "model")
    assert asked == ["me/model"]


@pytest.mark.parametrize(
    ("ref", "base"), [("org/name@refs/pr/1", "org/name"), ("org/name", "org/name"), ("here/flux2", "")]
)
def test_a_card_names_the_base_as_the_hub_does(
    ref: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "flux2").mkdir(parents=True)
    config = load(TrainConfig, [], [f"model.ref={ref}", "lora.rank=2"])
    with RunFolder.create(tmp_path / "run", config, ["flowbp"]) as run:
        card = model_card(run, config, "diffusers", "ema", 1, None, {"height": 32})
    assert re.findall(r"^base_model: (.*)$", card, re.MULTILINE) == ([base] if base else [])
