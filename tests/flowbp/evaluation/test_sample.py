"""Images outside of training: seeds mean what they mean to diffusers, files are kept, names are safe."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline
from families import folder_of, picture
from safetensors.torch import save_file
from trained_runs import trained

from flowbp import backbones
from flowbp.config import Scorer, TrainConfig
from flowbp.evaluation import evaluate as evaluation
from flowbp.evaluation import sampling
from flowbp.evaluation.sources import ModelSource, compared_sources, model_source
from flowbp.training.preflight import unread_prompts
from imgen_common import hub
from imgen_common.config import load
from imgen_common.errors import UserError
from imgen_common.run_folder.folder import RunFolder

GENERATOR = "builtin:shapes/generator"
SIZE = (32, 32)


@pytest.fixture(scope="module")
def pipeline() -> Flux2KleinPipeline:
    pipe = Flux2KleinPipeline.from_pretrained(hub.resolve(GENERATOR), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_gives_the_image_of_the_pipeline(pipeline: Flux2KleinPipeline, guidance: float, seed: int) -> None:
    backbone = backbones.load(GENERATOR)
    prompt = "a red circle left of a blue square"
    ours = sampling.generate_images(backbone, prompt, [seed], SIZE, 6, guidance)
    theirs = pipeline(
        prompt=prompt,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=6,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        max_sequence_length=backbone.max_tokens,
        text_encoder_out_layers=backbone.text_layers,
    ).images
    assert (ours - theirs).abs().max() < 1e-5


def test_an_image_does_not_depend_on_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, drawn = backbones.load(GENERATOR), list[int]()
    decode = backbone.decode
    monkeypatch.setattr(backbone, "decode", lambda latents: drawn.append(len(latents)) or decode(latents))
    together = sampling.generate_images(backbone, "two green squares", [3, 4, 5], SIZE, 4, 2.0)
    by_twos = sampling.generate_images(backbone, "two green squares", [3, 4, 5], SIZE, 4, 2.0, batch_size=2)
    assert drawn == [3, 2, 1]
    assert (together - by_twos).abs().max() < 1e-5
    alone = sampling.generate_images(backbone, "two green squares", [4], SIZE, 4, 2.0)
    assert (together[1:2] - alone).abs().max() < 1e-5


def test_the_skeleton_has_the_noise_levels_and_layers_of_the_model() -> None:
    bones, whole = backbones.init_empty_weights(GENERATOR), backbones.load(GENERATOR)
    assert torch.equal(bones.sigmas(25, SIZE), whole.sigmas(25, SIZE))
    assert [name for name, _ in bones.net.named_parameters()] == [name for name, _ in whole.net.named_parameters()]
    assert all(p.is_meta for p in bones.net.parameters())
    with pytest.raises(UserError, match="multiples of"):
        bones.latent_shape((33, 32))


def test_the_skeleton_refuses_what_loading_refuses() -> None:
    with pytest.raises(UserError, match=r"not a diffusers pipeline: the folder has no model_index\.json"):
        backbones.init_empty_weights("builtin:shapes/reward")


@pytest.mark.parametrize(
    ("pipeline", "embeds", "expected"),
    [("ZImagePipeline", False, (5.0, None)), ("FluxPipeline", True, (1.0, 4.0)),
     pytest.param("FluxPipeline", False, (1.0, None), marks=pytest.mark.slow),
     pytest.param("Flux2KleinPipeline", False, (4.0, None), marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_model_is_drawn_as_its_folder_says(
    tmp_path: Path, pipeline: str, embeds: bool, expected: tuple[float, float | None]
) -> None:
    folder = shutil.copytree(hub.resolve(GENERATOR), tmp_path / "model")
    own = {"height": 24, "width": 16, "num_inference_steps": 7, "guidance_scale": 4.0, "max_sequence_length": 40}
    (folder / hub.SAMPLING_FILE).write_text(json.dumps(own))
    for name, change in (
        ("model_index.json", {"_class_name": pipeline}),
        ("transformer/config.json", {"guidance_embeds": embeds}),
    ):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
    config = model_source(str(folder), tmp_path).config
    assert (config.model.height, config.model.width, config.model.max_sequence_length) == (24, 16, 40)
    assert (config.guidance_scale, config.model.embedded_guidance) == expected
    assert config.eval.num_inference_steps == 7
    assert model_source(str(folder), tmp_path, ["model.height=8"]).config.model.height == 8
    assert model_source(str(folder), tmp_path).eval_guidance_scales == (*dict.fromkeys((expected[0], 1.0, 2.0)),)
    (tmp_path / "adapter").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter" / "pytorch_lora_weights.safetensors")
    (tmp_path / "adapter" / hub.SAMPLING_FILE).write_text('{"height": 48, "width": 32, "max_sequence_length": 9}')
    sets = [f"lora.init={tmp_path / 'adapter'}", "model.width=8"]
    drawn = model_source(str(folder), tmp_path, sets).config
    assert (drawn.model.height, drawn.model.width, drawn.model.max_sequence_length) == (48, 8, 9)
    assert drawn.eval.num_inference_steps == 7
    notes = unread_prompts(load(TrainConfig, [], [f"model.ref={hub.resolve(GENERATOR)}", *sets]))
    said = "lora.init was exported with 9 tokens of a prompt, this run reads 12; model.max_sequence_length=9 reads"
    assert [said in note for note in notes].count(True) == 1
    sets.append("model.max_sequence_length=9")
    assert not any(
        "was exported with" in note for note in unread_prompts(load(TrainConfig, [], [f"model.ref={GENERATOR}", *sets]))
    )
    (folder / hub.SAMPLING_FILE).unlink()
    scales = {"": (1.0, 2.0), "guidance_scale=3": (3.0, 1.0, 2.0), "eval.guidance_scale=[4]": (4.0,)}
    for given, found in scales.items():
        assert model_source(str(folder), tmp_path, [given] if given else []).eval_guidance_scales == found
    (folder / hub.SAMPLING_FILE).write_text('{"height": "tall"}')
    with pytest.raises(UserError, match=r"sampling\.json: damaged"):
        model_source(str(folder), tmp_path)


@pytest.mark.parametrize(
    ("name", "said"), [("flux-schnell", False), ("Turbo", False), ("model", True), ("model", False)]
)
def test_a_step_distilled_model_may_draw(tmp_path: Path, name: str, said: bool) -> None:
    folder = shutil.copytree(hub.resolve(GENERATOR), tmp_path / name)
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": said}))
    source = model_source(str(folder), tmp_path)
    assert source.config.model.allow_distilled == (said or name != "model")
    assert source.unread_prompts(["a red circle"]) == []  # the model is not refused


def test_one_prompt_and_one_image_may_stand_for_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sampling, "generate_images", lambda backbone, prompt, *rest: torch.zeros(1, 3, 8, 8) + len(prompt)
    )
    assert [*sampling.sample(GENERATOR, "a red circle")[:, 0, 0, 0]] == [12]
    picture(8, 8).save(tmp_path / "a.png")
    assert len(sampling.sample(GENERATOR, "make it green", images=str(tmp_path / "a.png"))) == 1
    for given, said in (({"prompts": []}, "prompts"), ({"prompts": "a", "seeds": ()}, "seeds")):
        with pytest.raises(UserError, match=f"{said}: give at least one"):
            sampling.sample(GENERATOR, **given)


@pytest.mark.parametrize(
    ("sets", "images", "said"),
    [
        (["model.height=30"], 0, "height and width must be multiples of 8"),
        (["model.embedded_guidance=3"], 0, "is not guidance-distilled"),
        (["lora.rank=2", "eval.model=builtin:shapes/reward"], 0, "not a diffusers pipeline"),
        (["model.attention=flash"], 0, "needs a CUDA device|not installed"),
        ([], 20, "has 20 images, and Flux2KleinPipeline takes"),
    ],
)
def test_what_a_model_does_not_draw_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sets: list[str], images: int, said: str
) -> None:
    file = tmp_path / "a.png"
    picture(8, 8).save(file)
    monkeypatch.setattr(ModelSource, "load", lambda *_: pytest.fail("weights are read"))
    monkeypatch.setattr(sampling, "model_source", lambda ref, runs: model_source(ref, runs, sets))
    with pytest.raises(UserError, match=said):
        sampling.sample(GENERATOR, "a red circle", images=[file] * images)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sample", "a red circle", "--size", "500"], "image size 500x500: height and width must be multiples of 8"),
        (["eval", GENERATOR, "--set", "model.width=500"], "image size 32x500"),
        (["eval", GENERATOR, "--set", "model.embedded_guidance=3"], "is not guidance-distilled"),
    ],
)
def test_commands_refuse_it_then_too(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flowbp: Callable[..., tuple[int, str, str]],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ModelSource, "load", lambda *_: pytest.fail("weights are read"))
    code, _, told = flowbp(*words)
    assert code == 2
    assert said in " ".join(told.split())


def test_prompts_that_a_reward_cannot_score_are_refused_before_any_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, flowbp: Callable[..., tuple[int, str, str]]
) -> None:
    class Reward:
        def check_prompts(self, prompts: list[str]) -> None:
            raise UserError(f"{len(prompts)} prompts bring no answer")

    monkeypatch.setattr(ModelSource, "load", lambda *_: pytest.fail("weights are read"))
    monkeypatch.setattr(Scorer, "load", lambda self, device: Reward())
    code, _, told = flowbp("eval", GENERATOR, "--num-prompts", "3")
    assert (code, "3 prompts bring no answer" in told) == (2, True)


def test_text_encoders_are_gone_while_images_are_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in training, so that a run can be evaluated on the card that trained it; and before rewards are loaded."""
    source, prompts = model_source(GENERATOR, Path()), ["a red circle", "two blue crosses"]
    drawn: list[bool] = []

    def draw(backbone: Any, *rest: object) -> torch.Tensor:
        drawn.append(backbone.pipe.text_encoder is not None)
        return torch.zeros(2, *backbone.latent_shape(SIZE))

    monkeypatch.setattr(evaluation, "generate_latents", draw)
    backbone, load = source.load(torch.device("cpu")), Scorer.load
    monkeypatch.setattr(ModelSource, "load", lambda *_: backbone)
    monkeypatch.setattr(
        Scorer, "load", lambda *given: drawn.append(backbone.pipe.text_encoder is not None) or load(*given)
    )
    sampling.evaluate_model(source, prompts, source.config, (1.0, 2.0), lambda *_: None)
    assert drawn == [False] * (len(source.config.scorers) + 2)


def test_a_run_that_goes_on_meanwhile_is_drawn_as_it_was_found(tmp_path: Path) -> None:
    run = trained(tmp_path, hub.resolve(GENERATOR), "lora.rank=2")
    source = model_source(str(run), tmp_path)
    hashes = source.hashes()
    with RunFolder.open(run) as folder:
        tensors = folder.load_checkpoint(1).tensors
        later = {name: torch.zeros_like(value) for name, value in tensors["ema"].items()}
        folder.save_checkpoint(2, {"weights": later, "ema": later, "optimizer": {}}, {})
    drawn = dict(source.load(torch.device("cpu")).net.named_parameters())
    assert all(torch.equal(drawn[name], value) for name, value in tensors["ema"].items())
    assert source.hashes() == hashes != model_source(str(run), tmp_path).hashes()


def test_an_image_has_no_more_patches_than_stable_diffusion_has_positions(tmp_path: Path) -> None:
    backbone = backbones.init_empty_weights(str(folder_of("sd3", tmp_path)))
    assert backbone.latent_shape((128, 64)) == (4, 64, 32)
    with pytest.raises(UserError, match="image size 64x132: this model has positions for sides of 128 pixels at most"):
        backbone.latent_shape((64, 132))


def test_what_is_compared_reads_as_much_of_a_prompt(tmp_path: Path) -> None:
    def lengths(target: str, against: str, *sets: str) -> list[int | None]:
        found = compared_sources(target, against, tmp_path, sets)
        return [source.config.model.max_sequence_length for source in found]

    short = "model.max_sequence_length=8"
    assert lengths(GENERATOR, GENERATOR, short) == [8, 8]
    own = shutil.copytree(hub.resolve(GENERATOR), tmp_path / "own")
    (own / hub.SAMPLING_FILE).write_text('{"max_sequence_length": 10}')
    assert lengths(GENERATOR, str(own), short) == [10, 8]
    assert lengths(GENERATOR, str(own), "model.dtype=bfloat16") == [10, 10]
    assert lengths(str(own), GENERATOR) == [10, 10]
    index = own / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "ZImagePipeline"}))
    (own / hub.SAMPLING_FILE).unlink()
    assert lengths(GENERATOR, str(own), short) == [None, 8]


def test_a_model_is_drawn_as_the_run_that_it_is_compared_with(tmp_path: Path) -> None:
    config = load(TrainConfig, [], ["model.dtype=bfloat16", "model.max_sequence_length=8"])
    RunFolder.create(tmp_path / "run", config, ["flowbp", "train"]).close()
    for sets, dtype in (([], "bfloat16"), (["model.dtype=float32"], "float32")):
        for pair in (("run", GENERATOR), (GENERATOR, "run")):
            found = [source.config.model for source in compared_sources(*pair, tmp_path, sets)]
            assert {(model.dtype, model.max_sequence_length) for model in found} == {(dtype, 8)}
    shutil.copytree(tmp_path / "run", tmp_path / "other" / "run")
    pair = [str(tmp_path / "other" / "run"), str(tmp_path / "run")]
    assert [source.label for source in compared_sources(pair[1], pair[0], tmp_path)] == pair


def test_what_a_model_is_compared_with_is_drawn_like_it(tmp_path: Path) -> None:
    folder = shutil.copytree(hub.resolve(GENERATOR), tmp_path / "distilled")
    for name, change in (
        ("transformer/config", {"guidance_embeds": True}),
        ("model_index", {"_class_name": "Flux2Pipeline"}),
    ):
        about = folder / f"{name}.json"
        about.write_text(json.dumps(json.loads(about.read_text()) | change))
    (folder / hub.SAMPLING_FILE).unlink()
    sets = ["model.embedded_guidance=2", "model.dtype=bfloat16", "guidance.rescale=norm"]
    other = compared_sources(str(folder), str(folder), tmp_path, sets)[0].config
    assert (other.model.embedded_guidance, other.model.dtype, other.guidance.rescale) == (2, "bfloat16", "norm")
    (folder / hub.SAMPLING_FILE).write_text('{"guidance_scale": 3}')
    assert compared_sources(GENERATOR, str(folder), tmp_path, sets)[0].config.model.embedded_guidance == 3
    plain = compared_sources(str(folder), GENERATOR, tmp_path, sets)[0].config  # of another pipeline
    assert (plain.model.embedded_guidance, plain.model.dtype) == (None, "float32")


@pytest.mark.slow
def test_a_run_is_compared_with_its_base_under_equal_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flowbp: Callable[..., tuple[int, str, str]]
) -> None:
    run = trained(tmp_path, hub.resolve(GENERATOR), "lora.rank=2", "guidance_scale=3")
    drawn: list[ModelSource] = []
    scales: list[tuple[float, ...]] = []

    def evaluate(source: ModelSource, prompts: Any, config: Any, at: Any, on_progress: Any) -> Any:
        drawn.append(source)
        scales.append(tuple(at))
        return {}

    monkeypatch.setattr(sampling, "evaluate_model", evaluate)
    for command in (["eval", str(run)], ["eval", str(run), "--against", str(run)]):
        assert flowbp(*command, "--set", "model.dtype=bfloat16", "--json")[0] == 0
    assert [source.config.model.dtype for source in drawn] == ["bfloat16"] * 4
    assert [source.run is None for source in drawn] == [True, False, False, False]
    assert set(scales) == {(3.0, *drawn[-1].config.eval.guidance_scale)}
    with pytest.raises(UserError, match=r"^lora: .* has adapters of its own"):
        model_source(str(run), tmp_path, ["lora.init=other.safetensors"])


def test_settings_of_the_miniature_are_named_where_another_model_is_drawn_with_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flowbp: Callable[..., tuple[int, str, str]],
) -> None:
    folder = shutil.copytree(hub.resolve(GENERATOR), tmp_path / "own")
    assert model_source(str(folder), tmp_path).assumed_settings() == []  # its sampling.json says them
    (folder / hub.SAMPLING_FILE).write_text('{"height": 32, "guidance_scale": 2}')
    (note,) = model_source(str(folder), tmp_path).assumed_settings()
    assert "is drawn with model.width 32, eval.num_inference_steps 25, the miniature's" in note
    monkeypatch.setattr(sampling, "generate_images", lambda *_: torch.zeros(1, 3, 32, 32))
    command = ("sample", "a red circle", "--model", folder, "--num-images", 1, "--out", tmp_path / "images")
    assert f"note: {note}" in flowbp(*command)[2]
    assert "the miniature's" not in flowbp(*command, "--size", 32, "--num-inference-steps", 2)[2]
    sampling.sample(folder, ["a red circle"])
    assert note in capsys.readouterr().err
    known = model_source(str(folder), tmp_path, ["model.width=1024"])
    assert known.assumed_settings(steps=50) == []
    assert model_source(GENERATOR, tmp_path).assumed_settings() == []


def test_files_are_numbered_on(tmp_path: Path) -> None:
    assert sampling.next_file_number(tmp_path / "none") == 0
    (tmp_path / "007-a-red-circle-seed0.png").touch()
    (tmp_path / "notes.txt").touch()
    assert sampling.next_file_number(tmp_path) == 8
    before = sorted(tmp_path.iterdir())
    with sampling.own_numbers(tmp_path, 3) as first, sampling.own_numbers(tmp_path, 2) as second:
        assert (first, second) == (8, 11)
    assert sorted(tmp_path.iterdir()) == before


def test_a_number_that_another_process_takes_meanwhile_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = iter([0, 5])
    (tmp_path / ".001-taken").touch()
    monkeypatch.setattr(sampling, "next_file_number", lambda folder: next(looked))
    with sampling.own_numbers(tmp_path, 2) as number:
        assert number == 5
        assert sorted(path.name for path in tmp_path.iterdir()) == [".001-taken", ".005-taken", ".006-taken"]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [("A red circle!", "a-red-circle"), ("../../etc/passwd", "etc-passwd"), ("§", "image"), ("x" * 99, "x" * 60)],
)
def test_prompts_become_safe_file_names(prompt: str, name: str) -> None:
    assert sampling.slug(prompt) == name


@pytest.mark.parametrize("letter", ["a", "ж", "中", "\U00020000"])
def test_file_names_fit_into_255_bytes(letter: str) -> None:
    for prompt in (letter * 500, f"{letter}{letter} " * 90):
        name = f"000000-{sampling.slug(prompt)}-seed{2**63}.png"
        assert len(name.encode()) <= 255
        assert letter in name
