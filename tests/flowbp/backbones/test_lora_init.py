"""`lora.init`: adapters of every form are taken up, exactly, or refused in one line."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from families import FAMILIES, folder_of, sides_of, size_of
from given import data_of, prompt_for
from safetensors.torch import load_file, save_file
from tiers import tiers
from torch import Tensor, nn
from trained_runs import TARGETS, ours, targets_of, theirs, trained

from flowbp.backbones import init_empty_weights
from flowbp.backbones.layer_names import original_layers
from flowbp.backbones.loading import read_trained_weights
from flowbp.backbones.lora import LayerAdapter, read_adapter, take_apart
from flowbp.config import TrainConfig
from flowbp.evaluation.sampling import generate_images
from flowbp.evaluation.sources import ModelSource, model_source
from flowbp.export import export_run
from flowbp.export.adapters import DIFFUSERS_FILE, Adapter, lora_adapters
from flowbp.export.comfyui import COMFYUI_FILE, fuse_adapters, to_comfyui
from flowbp.training.loading import load_models
from flowbp.training.preflight import check_run, hash_settings
from flowbp.training.runs import check_training
from imgen_common.config import load
from imgen_common.errors import UserError
from imgen_common.hub import WEIGHTS
from imgen_common.run_folder.data import check_data, record_data
from imgen_common.run_folder.folder import RunFolder

PIPELINES = {"sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline", "flux2": "Flux2KleinPipeline"}
PIPELINES |= {"flux_kontext": "FluxKontextPipeline", "z_image": "ZImagePipeline", "flux2_dev": "Flux2Pipeline"}
PIPELINES |= {"qwen_image": "QwenImagePipeline", "krea2": "Krea2Pipeline"}
PIPELINES |= {"qwen_image_21": "QwenImage21Pipeline"}
PIPELINES |= {"qwen_edit": "QwenImageEditPipeline", "qwen_edit_plus": "QwenImageEditPlusPipeline"}
RANK, ALPHA = 4, 2.0


def config_of(model: Path, init: Path | str, *sets: str) -> TrainConfig:
    size = [f"model.{side}={pixels}" for side, pixels in sides_of(model).items()]
    return load(TrainConfig, [], [f"model.ref={model}", *size, f"lora.init={init}", *data_of(model.name), *sets])


def drawn(config: TrainConfig) -> Tensor:
    """What the model draws before its first update."""
    models = load_models(check_run(config, 1).config, torch.device("cpu"), with_rewards=False)
    backbone = models.backbone
    return generate_images(backbone, prompt_for(backbone, "a red circle"), [3], size_of(backbone), 3, 1.0)


def adapters_of(run: Path) -> dict[str, Adapter]:
    config, weights = read_trained_weights(RunFolder.open(run, is_main=False))
    return lora_adapters(config, weights)


def as_peft(run: Path, out: Path, family: str) -> Path:
    keys = {}
    for layer, one in adapters_of(run).items():
        keys[f"base_model.model.{layer}.lora_A.weight"] = one.down
        keys[f"base_model.model.{layer}.lora_B.weight"] = one.up * (RANK / ALPHA)
    save_file(keys, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}))
    return out


def as_kohya(run: Path, out: Path, family: str) -> Path:
    """The layers of the original model, stacked at one rank, with their alphas."""
    adapters, keys = adapters_of(run), {}
    net = init_empty_weights(RunFolder.open(run, is_main=False).config(TrainConfig).model.ref).net
    widths = {name: module.out_features for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    same = {name: [name] for name in adapters}  # of families whose original names are those of diffusers
    for name, layers in (original_layers(adapters, PIPELINES[family]) or same).items():
        if any(layer in adapters for layer in layers):
            one = fuse_adapters([adapters.get(layer) for layer in layers], [widths[layer] for layer in layers])
            rank = len(one.down)
            key = "lora_unet_" + name.replace(".", "_")
            keys[f"{key}.lora_down.weight"], keys[f"{key}.lora_up.weight"] = one.down, one.up * 2
            keys[f"{key}.alpha"] = torch.tensor(rank / 2)
    save_file(keys, out / "kohya.safetensors")
    return out / "kohya.safetensors"


def as_diffusers(run: Path, out: Path, family: str) -> Path:
    return export_run(run, "diffusers", out / "exported")


def as_comfyui(run: Path, out: Path, family: str) -> Path:
    return export_run(run, "comfyui", out / "exported") / COMFYUI_FILE


FORMS: tuple[Callable[[Path, Path, str], Path], ...] = (as_diffusers, as_comfyui, as_peft, as_kohya)


@pytest.mark.parametrize("family", tiers(FAMILIES, slow=["flux2"]))
def test_an_adapter_of_every_form_draws_the_same_image(family: str, tmp_path: Path) -> None:
    model = folder_of(family, tmp_path)
    run = trained(tmp_path, model, f"lora={{rank: {RANK}, alpha: {ALPHA}}}", targets_of(family))
    expected, base = ours(run, model), ours(run, model, base=True)
    assert (expected - base).abs().max() > 5e-3
    nameless = family in ("krea2", "qwen_image_21")
    for form in [one for one in FORMS if not nameless or one != as_comfyui]:  # no names of these are known there
        place = tmp_path / form.__name__
        place.mkdir()
        config = config_of(model, form(run, place, family))
        job = check_run(config, 1)
        lora = job.config.lora
        assert lora is not None
        assert sum(job.lora_layers.values()) == len(adapters_of(run))
        assert (lora.rank, lora.rank_pattern, lora.alpha_pattern) == (RANK, {}, {}), form.__name__
        assert lora.alpha == {as_peft: ALPHA, as_kohya: RANK / 2}.get(form, RANK)
        assert (drawn(config) - expected).abs().max() < 1e-5, form.__name__


@pytest.mark.parametrize("family", tiers(["flux", "flux2"], default=["flux"], slow=["flux2"]))
def test_layers_outside_of_blocks_have_original_names_too(family: str, tmp_path: Path) -> None:
    net = FAMILIES[family].make().transformer
    linear = {name: module for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    ends = {name: module for name, module in linear.items() if "blocks" not in name}
    rng = torch.Generator().manual_seed(0)
    given = {
        name: Adapter(
            torch.randn(2, module.in_features, generator=rng), torch.randn(module.out_features, 2, generator=rng)
        )
        for name, module in ends.items()
    }
    keys = to_comfyui(given, PIPELINES[family], {name: module.out_features for name, module in linear.items()})
    save_file(keys, tmp_path / "a.safetensors")
    found = read_adapter(str(tmp_path / "a.safetensors"), net, PIPELINES[family])
    assert found.keys() == given.keys()
    for name, one in found.items():
        torch.testing.assert_close(one.up @ one.down, given[name].update, msg=name)
    (swapped,) = (one for key, one in keys.items() if "adaLN_modulation" in key and ("lora_up" in key or "_B" in key))
    assert torch.equal(swapped, torch.cat(given["norm_out.linear"].up.chunk(2)[::-1]))


class Lenient(dict):
    """A checkpoint that has every weight: those that are not given are zero."""

    def pop(self, key: str, *_: object) -> Tensor:
        return super().pop(key, torch.zeros(6))


def test_original_names_of_sd3_are_those_of_diffusers_converter(tmp_path: Path) -> None:
    """Every layer of a block, the swapped modulation of the last one among them; a kohya file has one rank for all."""
    net = init_empty_weights(str(folder_of("sd3", tmp_path))).net
    linear = {name: module for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    rng, keys = torch.Generator().manual_seed(0), {}
    original = Lenient({"context_embedder.weight": torch.zeros(32, 1)})
    for name, layers in original_layers(linear, PIPELINES["sd3"]).items():
        if all(layer in linear for layer in layers):
            down = torch.randn(2, linear[layers[0]].in_features, generator=rng)
            up = torch.randn(sum(linear[layer].out_features for layer in layers), 2, generator=rng)
            original[f"{name}.weight"] = 0.5 * up @ down
            key = "lora_unet_" + name.replace(".", "_")
            keys |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(1.0)}
    expected = convert_sd3_transformer_checkpoint_to_diffusers(original)
    save_file(keys, tmp_path / "kohya.safetensors")
    found = read_adapter(str(tmp_path / "kohya.safetensors"), net, PIPELINES["sd3"])
    assert set(found) == {name for name in linear if name.startswith("transformer_blocks.")}
    for layer, one in found.items():
        assert (one.rank, one.alpha) == (2, 1.0)
        torch.testing.assert_close(one.alpha / one.rank * one.up @ one.down, expected[f"{layer}.weight"], msg=layer)


@pytest.mark.slow
def test_ranks_and_alphas_of_single_layers_are_kept(tmp_path: Path) -> None:
    """As a file says them: in its matrices, alpha keys, PEFT's patterns or the header that diffusers writes."""
    model = folder_of("flux2", tmp_path)
    run = trained(tmp_path, model, f"lora={{rank: {RANK}, alpha: {RANK}}}", TARGETS)
    keys = load_file(export_run(run, "diffusers", tmp_path / "out") / DIFFUSERS_FILE)
    first = "transformer.transformer_blocks.0.attn.to_q"
    keys[f"{first}.lora_A.weight"] = keys[f"{first}.lora_A.weight"][:2].contiguous()
    keys[f"{first}.lora_B.weight"] = keys[f"{first}.lora_B.weight"][:, :2].contiguous()
    layer, images = first.removeprefix("transformer."), {}
    described = {"r": RANK, "lora_alpha": 4, "alpha_pattern": {"attn.to_q": 3}, "rank_pattern": {layer: 2}}
    scaled = keys | {f"{first}.alpha": torch.tensor(3.0)}
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in described.items()})}
    (tmp_path / "peft").mkdir()
    save_file(keys, tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(described))
    save_file(keys, tmp_path / "header.safetensors", header)
    save_file(scaled, tmp_path / "scaled.safetensors")
    for form in ("peft", "header.safetensors", "scaled.safetensors"):
        config = check_run(config_of(model, tmp_path / form), 1).config
        lora = config.lora
        assert lora is not None
        assert (lora.rank, lora.rank_pattern) == (RANK, {layer: 2})
        assert (lora.alpha, lora.alpha_pattern) == (4.0, {layer: 3.0})
        assert lora.scale_of(layer) == 1.5
        images[form] = drawn(config)
    assert torch.equal(images["peft"], images["header.safetensors"])
    assert torch.equal(images["peft"], images["scaled.safetensors"])
    # and what is trained from there is exported with the scale of each layer
    again = trained(tmp_path / "again", model, f"lora={lora.model_dump_json(exclude={'init'})}")
    pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.load_lora_weights(export_run(again, "diffusers", tmp_path / "twice"), weight_name=DIFFUSERS_FILE)
    assert (theirs(pipe, "flux2") - ours(again, model)).abs().max() < 1e-5


def test_what_is_stacked_at_one_rank_is_shared() -> None:
    """A kohya file that was trained on the stacked layer: every part has its rows of the whole, exactly."""
    rng = torch.Generator().manual_seed(0)
    whole = LayerAdapter(torch.randn(4, 5, generator=rng), torch.randn(6, 4, generator=rng), alpha=2.0)
    parts = take_apart(whole, [2, 3, 1])
    assert [one and one.rank for one in parts] == [4, 4, 4]
    assert torch.equal(torch.cat([one.up for one in parts if one]), whole.up)
    untrained = take_apart(LayerAdapter(whole.down, torch.zeros(6, 4), alpha=2.0), [2, 3, 1])
    assert [one and one.rank for one in untrained] == [4, 4, 4]
    whole.up[2:5] = 0
    assert [one and one.rank for one in take_apart(whole, [2, 3, 1])] == [4, None, 4]


DOWN, UP = (
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
    "transformer.transformer_blocks.0.attn.to_q.lora_B.weight",
)
GOOD = {DOWN: torch.ones(2, 32), UP: torch.ones(32, 2)}
BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "nothing": ({}, "it is empty; tried the forms of diffusers .* PEFT .* kohya .* and ComfyUI"),
    "weights": ({"a.weight": torch.ones(2)}, "no key is of a layer of Flux2Transformer2DModel .* begin with a.weight"),
    "text": (GOOD | {"text_encoder.q.lora_A.weight": torch.ones(2, 4)}, "1 of 3 keys are of no linear layer"),
    "dora": (GOOD | {DOWN.replace("lora_A", "lora_magnitude_vector"): torch.ones(2)}, "the first is .*magnitude"),
    "half": ({DOWN: GOOD[DOWN]}, r"has no lora_B \(up\)"),
    "ranks": (GOOD | {UP: torch.ones(32, 3)}, r"matrices of \[2, 32\] and \[32, 3\]; must be"),
    "other": (
        {DOWN: torch.ones(2, 64), UP: torch.ones(96, 2)},
        "64 inputs and 96 outputs; in this network .* 32 and 32",
    ),
    "nan": (GOOD | {UP: torch.full((32, 2), torch.nan)}, "no finite floating-point numbers"),
    "integers": (GOOD | {UP: torch.ones(32, 2, dtype=torch.int8)}, "no finite floating-point numbers"),
    "alpha": (GOOD | {UP.replace("lora_B.weight", "alpha"): torch.tensor(0.0)}, "has alpha 0.0; must be above 0"),
    "twice": (
        GOOD | {name.removeprefix("transformer."): value.clone() for name, value in GOOD.items()},
        "more than one adapter",
    ),
}


@pytest.fixture(scope="module")
def flux2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of("flux2", tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_does_not_fit_is_refused_in_one_line(case: str, flux2: Path, tmp_path: Path) -> None:
    tensors, message = BAD[case]
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=rf"lora\.init .*bad\.safetensors.*{message}") as said:
        check_run(config_of(flux2, tmp_path / "bad.safetensors"), 1)
    assert "\n" not in str(said.value)


def test_an_adapter_of_another_family_is_refused(flux2: Path, tmp_path: Path) -> None:
    run = trained(tmp_path, folder_of("flux", tmp_path), "lora={rank: 4}", targets_of("flux"))
    for to in ("diffusers", "comfyui"):
        out = export_run(run, to, tmp_path / to)
        with pytest.raises(UserError, match=r"Flux2Transformer2DModel|in this network"):
            check_run(config_of(flux2, next(out.glob("*.safetensors"))), 1)


def test_files_that_are_none_are_refused(flux2: Path, tmp_path: Path) -> None:
    (tmp_path / "pickle").mkdir()
    torch.save(GOOD, tmp_path / "pickle" / "adapter_model.bin")
    save_file(GOOD, tmp_path / "whole.safetensors")
    (tmp_path / "short.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-9])
    (tmp_path / "run").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        save_file(GOOD, tmp_path / "two" / f"{name}.safetensors")
    cases = {
        "none.safetensors": r"lora\.init: model .*none\.safetensors.*: no such file or folder",
        "pickle/adapter_model.bin": "read from safetensors files",
        "pickle": "only pickled weights",
        "short.safetensors": "is cut short",
        "run": "give an adapter, which `flowbp export --to diffusers` makes of a run",
        "two": r"2 safetensors files \(a\.safetensors, b\.safetensors\); give one of them",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message):
            check_run(config_of(flux2, tmp_path / name), 1)


@pytest.mark.slow
def test_settings_beside_the_adapter_that_are_not_its_own_are_refused(flux2: Path, tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "a.safetensors")
    for setting, message in {
        "lora.rank=8": "lora.rank 8: the adapter .* has 2; leave lora.rank out",
        "lora.alpha=1": "lora.alpha 1.0: .* has 2.0",
        "lora.rank_pattern={to_q: 4}": "lora.rank_pattern {'to_q': 4}: .* has {}",
        "lora.target_modules=[to_q, to_k]": "the first that differs is .*to_k; leave lora.target_modules out",
    }.items():
        with pytest.raises(UserError, match=message):
            check_run(config_of(flux2, tmp_path / "a.safetensors", setting), 1)
    with pytest.raises(UserError, match=r"lora\.rank_pattern: no layer with an adapter .* ends with 'to_y'"):
        check_run(load(TrainConfig, [], [f"model.ref={flux2}", "lora.rank_pattern={to_q: 4, to_y: 4}"]), 1)
    own = ("lora.rank=2", "lora.alpha=2", "lora.target_modules=[attn.to_q]")
    assert check_run(config_of(flux2, tmp_path / "a.safetensors", *own), 1).lora_layers == {"attn.to_q": 1}


@pytest.mark.slow
def test_peft_adapters_that_are_no_plain_lora_are_refused(flux2: Path, tmp_path: Path) -> None:
    save_file({name.replace("transformer.", "base_model.model.", 1): value for name, value in GOOD.items()},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    for options, message in (
        ({"peft_type": "LOHA"}, "is a LOHA adapter"),
        ({"use_dora": True}, "its use_dora is not supported"),
        ({"bias": "all"}, "its bias is not supported"),
        *(
            ({"init_lora_weights": start}, f"its init_lora_weights {start} changes the weights of the model")
            for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
        ),
        ({"lora_alpha": "many"}, "has alpha many"),
        ({"lora_alpha": 1, "alpha_pattern": {"(": 2}}, "its alpha_pattern is none of PEFT"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(options))
        with pytest.raises(UserError, match=message):
            check_run(config_of(flux2, tmp_path), 1)
    plain = {"lora_alpha": 3, "use_rslora": True, "init_lora_weights": "gaussian"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(plain))
    lora = check_run(config_of(flux2, tmp_path), 1).config.lora
    assert lora is not None
    assert lora.scale_of("transformer_blocks.0.attn.to_q") == pytest.approx(3 / 2**0.5)


@pytest.mark.parametrize(
    "described", [{"r": 64}, {"r": "2"}, {"r": 2, "rank_pattern": {"to_q": 1}}, {"r": 2, "rank_pattern": {"(": 2}}]
)
def test_a_description_of_another_rank_is_refused(tmp_path: Path, described: dict[str, Any]) -> None:
    net = torch.nn.ModuleDict({"to_q": torch.nn.Linear(4, 4)})
    parts = {
        "base_model.model.to_q.lora_A.weight": torch.ones(2, 4),
        "base_model.model.to_q.lora_B.weight": torch.ones(4, 2),
    }
    save_file(parts, tmp_path / "adapter_model.safetensors")

    def describe(options: dict[str, Any]) -> None:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8} | options))

    describe(described)
    with pytest.raises(UserError, match=r"to_q has rank 2, but its description says|its rank_pattern is none of PEFT"):
        read_adapter(str(tmp_path), net, "Flux2KleinPipeline")
    for good in ({"r": 2}, {}, {"r": 64, "rank_pattern": {"to_q": 2}}):
        describe(good)
        assert read_adapter(str(tmp_path), net, "Flux2KleinPipeline")["to_q"].alpha == 8
    for options, alpha in (({"r": 2}, peft.LoraConfig().lora_alpha), ({}, 2)):  # PEFT's default, the rank without any
        (tmp_path / "adapter_config.json").write_text(json.dumps(options))
        assert read_adapter(str(tmp_path), net, "Flux2KleinPipeline")["to_q"].alpha == alpha


def test_what_diffusers_and_peft_write_beside_an_adapter_is_read(tmp_path: Path) -> None:
    """diffusers' network describes its own adapter without the name of a component; PEFT's file may be renamed."""
    net = init_empty_weights("builtin:shapes/generator").net
    own = type(net).from_config(net.config)
    own.add_adapter(peft.LoraConfig(r=4, lora_alpha=16, target_modules=["to_q"]))
    own.save_lora_adapter(tmp_path / "own")
    layer = next(iter(read_adapter(str(tmp_path / "own"), net, "Flux2KleinPipeline")))
    module = net.get_submodule(layer)
    parts = {"A": torch.ones(4, module.in_features), "B": torch.ones(module.out_features, 4)}

    def saved(place: Path, start: str, header: dict[str, str] | None = None) -> Path:
        save_file({f"{start}{layer}.lora_{part}.weight": value for part, value in parts.items()}, place, header)
        return place

    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 16}))
    renamed = saved(tmp_path / "renamed.safetensors", "base_model.model.")
    for file, scale in (
        (tmp_path / "own", 4),
        (renamed, 4),
        (saved(tmp_path / "other.safetensors", "transformer."), 1),
    ):
        one = read_adapter(str(file), net, "Flux2KleinPipeline")[layer]
        assert one.alpha / one.rank == scale, file.name
    header = {"lora_adapter_metadata": json.dumps({"r": 4, "use_dora": True})}
    with pytest.raises(UserError, match="its use_dora is not supported"):
        read_adapter(str(saved(tmp_path / "dora.safetensors", "", header)), net, "Flux2KleinPipeline")


@pytest.mark.parametrize(
    ("family", "part", "missing"),
    [
        ("sd3", r"transformer_blocks\.2\.attn\..*", None),  # and of these add_q_proj, which no image depends on
        ("flux", "proj_out|.*attn.to_q", r"single_transformer_blocks\.0\.proj_out"),
    ],
)
def test_an_adapter_of_some_layers_is_taken_up_for_these_alone(
    family: str, part: str, missing: str | None, tmp_path: Path
) -> None:
    model = folder_of(family, tmp_path)
    net, keys = init_empty_weights(str(model)).net, {}
    linear = {name: one for name, one in net.named_modules() if isinstance(one, nn.Linear) and re.fullmatch(part, name)}
    for name, module in linear.items():
        keys[f"transformer.{name}.lora_A.weight"] = torch.ones(2, module.in_features)
        keys[f"transformer.{name}.lora_B.weight"] = torch.ones(module.out_features, 2)
    save_file(keys, tmp_path / "a.safetensors")
    config = config_of(model, tmp_path / "a.safetensors")
    if missing is None:
        assert sum(check_run(config, 1).lora_layers.values()) == len(linear)
    else:
        with pytest.raises(UserError, match=rf"lora\.init .*: has no {missing}, whose name ends as that of a layer"):
            check_run(config, 1)


def test_another_adapter_or_other_questions_in_their_place_are_noticed(tmp_path: Path) -> None:
    adapter, reward = tmp_path / "a.safetensors", tmp_path / "reward"
    save_file(GOOD, adapter)
    shutil.copytree(WEIGHTS / "reward", reward)
    (reward / "reward.json").write_text('{"template": "<image>{prompt}?"}')
    sets = [f"lora.init={adapter}", f"rewards=[{{ref: {reward}, name: asked, score: vlm}}]"]
    config = load(TrainConfig, [], sets)
    record_data(tmp_path, before := hash_settings(config))
    models = ("model.ref", "the reward asked", "the reward heldout")
    assert set(before) == {*models, *(f"the configuration of {name}" for name in models), "lora.init"}
    check_data(tmp_path, before)
    base = ModelSource("base", config, None, begun=tmp_path)
    save_file({name: 2 * value for name, value in GOOD.items()}, adapter)
    with pytest.raises(UserError, match=r"lora\.init has changed since the run was started; restore it"):
        check_data(tmp_path, hash_settings(config))
    with pytest.raises(UserError, match=r"lora\.init has changed"):
        base.load(torch.device("cpu"))
    save_file(GOOD, adapter)
    (reward / "reward.json").write_text('{"template": "<image>Is it {prompt}?"}')
    with pytest.raises(UserError, match="the configuration of the reward asked has changed since the run was started"):
        check_data(tmp_path, hash_settings(config))
    adapter.unlink()  # a run goes on without it
    assert "lora.init" not in hash_settings(config)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_another_model_in_its_place_is_noticed(part: str, tmp_path: Path) -> None:
    model, reward, run = tmp_path / "model", tmp_path / "reward", tmp_path / "run"
    shutil.copytree(WEIGHTS / "generator", model)
    shutil.copytree(WEIGHTS / "reward", reward)
    config = load(TrainConfig, [], [f"model.ref={model}", f"rewards=[{{ref: {reward}, name: seen, score: clip}}]"])
    RunFolder.create(run, config).close()
    record_data(run, before := hash_settings(config))
    (model / part / "notes.safetensors.bak").write_text("not read")
    assert hash_settings(config) == before
    file = next((model / part).glob("*.safetensors"))
    kept = file.read_bytes()
    file.write_bytes(kept[:-4] + bytes(4))
    for refused in (lambda: check_data(run, hash_settings(config)), lambda: _loaded(model_source(str(run), tmp_path))):
        with pytest.raises(UserError, match=r"model\.ref has changed since the run was started; restore it"):
            refused()
    other = model.rename(tmp_path / "other")  # asked for another by its name, it is what is wanted
    _loaded(model_source(str(run), tmp_path, [f"model.ref={other}"], base=True))
    (other / part / file.name).write_bytes(kept)
    other.rename(model)
    _loaded(model_source(str(run), tmp_path, base=True))
    for edited in ("scheduler/scheduler_config.json", "tokenizer/tokenizer.json"):
        kept = (model / edited).read_bytes()
        (model / edited).write_bytes(kept + b"\n")
        with pytest.raises(UserError, match=r"the configuration of model\.ref has changed since the run was started"):
            _loaded(model_source(str(run), tmp_path))
        (model / edited).write_bytes(kept)
    (model / "sampling.json").write_text("{}")  # of no part of the model
    assert hash_settings(config) == before
    seen = next(reward.glob("*.safetensors"))
    seen.write_bytes(seen.read_bytes()[:-4] + bytes(4))
    with pytest.raises(UserError, match=r"the reward seen has changed since the run was started; restore it"):
        check_data(run, hash_settings(config))


def _loaded(source: ModelSource) -> object:
    return source.load(torch.device("cpu"))


@pytest.mark.slow
def test_a_resumed_run_takes_its_checkpoint_and_not_the_adapter(flux2: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(GOOD, file)
    given = config_of(flux2, file, "name=run")
    config = check_training(given, tmp_path / "runs", None)[0].config
    path = tmp_path / "runs" / "run"
    RunFolder.create(path, config).close()
    recorded = load(TrainConfig, [path / "config.yaml"])
    assert recorded.lora == config.lora
    assert check_training(given, tmp_path / "runs", path)[0].config == config  # as `flowbp.train(config, resume=...)`
    # a run without a checkpoint begins again, and reads the adapter again
    file.unlink()
    with pytest.raises(UserError, match=r"lora\.init: .*no such file or folder"):
        check_training(recorded, tmp_path / "runs", path)
    with RunFolder.open(path) as run:
        run.save_checkpoint(1, {"weights": {}, "ema": {}, "optimizer": {}}, {})
    assert check_training(recorded, tmp_path / "runs", path)[0].config == config
    assert load_models(config, torch.device("cpu"), with_rewards=False, with_adapter=False).parameters
    with pytest.raises(UserError, match=r"lora\.init"):
        check_training(recorded.model_copy(update={"lora": None}), tmp_path / "runs", path)
