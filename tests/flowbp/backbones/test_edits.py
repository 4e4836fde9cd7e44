"""Edits in every family that takes source images: pictures, gradients, batches of several layouts, updates, resume."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux import pipeline_flux_kontext
from families import FAMILIES, SIZE, picture
from fields import relative
from given import INSTRUCTION, edit, prompt_for
from sweeps import assert_sweep_is_joint
from tiers import tiers

from flowbp import backbones
from flowbp.backbones.source_tokens import SIZES, TOKENS, pack_sources
from flowbp.config import ModelConfig, TrainConfig
from flowbp.core.guidance import guided_velocity
from flowbp.core.settings import Guidance
from flowbp.core.types import Backbone
from flowbp.data.edits import Edit, check_edits
from flowbp.data.embeddings import EmbeddingStore, PromptEmbeddings, SourceLatents, digest, fingerprint
from flowbp.evaluation import sampling
from flowbp.evaluation.benchmarks.run import prepare_benchmark
from flowbp.evaluation.benchmarks.settings import BenchmarkRequest, JudgeConfig
from flowbp.evaluation.sources import ModelSource
from flowbp.methods import METHODS
from flowbp.training import preflight
from flowbp.training.loading import load_models
from flowbp.training.trainer import Trainer
from imgen_common.config import load
from imgen_common.errors import UserError

EDITORS = [name for name, family in FAMILIES.items() if family.max_sources]
NEEDY = [name for name in EDITORS if FAMILIES[name].min_sources]


@pytest.fixture(autouse=True)
def small_resolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kontext's own resolutions have a million pixels, for tiny networks too many tokens."""
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(24, 16), (16, 16), (16, 24)])


def sources(backbone: Backbone) -> list[Edit]:
    """Edits of several sizes and numbers of sources, as far as the family takes them."""
    found = [edit(picture(64, 72)), edit(picture(150, 66, 1))]
    return [*found, edit(picture(64, 72, 2), picture(70, 64, 3))] if backbone.max_sources > 1 else found


def pipelines_own(folder: Path, given: Edit, guidance: float, seed: int) -> torch.Tensor:
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    family, images = FAMILIES[folder.name], [source.load() for source in given.sources]
    options = {"num_inference_steps": 3, "output_type": "pt", "height": SIZE[0], "width": SIZE[1]}
    options |= family.guided(guidance) | {"image": images if family.max_sources > 1 else images[0]}
    return pipe(prompt=str(given), generator=torch.Generator().manual_seed(seed), **options).images


SOON = {"default": ["flux2", "flux_kontext"], "slow": ["flux2_dev", *NEEDY]}


@pytest.mark.parametrize("folder", tiers(EDITORS, **SOON), indirect=True)
@pytest.mark.parametrize("guidance", [pytest.param(1.0, marks=pytest.mark.slow), 3.0])
def test_an_edit_is_the_pipelines_own(folder: Path, guidance: float, backbone: Backbone) -> None:
    if guidance != 1 and not FAMILIES[folder.name].true_guidance:
        pytest.skip("its pipeline has no guidance but the distilled one")
    plain = sampling.generate_images(backbone, prompt_for(backbone, INSTRUCTION), [5], SIZE, 3, guidance)
    for given in sources(backbone):
        ours = sampling.generate_images(backbone, given, [5], SIZE, 3, guidance)
        assert (ours - pipelines_own(folder, given, guidance, 5)).abs().max() < 1e-5
        assert (ours - plain).abs().max() > 1e-3  # the sources are seen


@pytest.mark.parametrize("folder", tiers(["flux2", "flux2_dev"], default=["flux2"]), indirect=True)
@pytest.mark.parametrize("size", [(1400, 1100), (64, 500), (2500, 700)])
def test_large_and_long_sources_are_prepared_as_the_pipeline_does(
    folder: Path, backbone: Backbone, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, seen = picture(*size), []
    pipe = backbone.pipe
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(pipe, "prepare_image_latents", lambda images, **given: seen.extend(images) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipe(image=[image], prompt=INSTRUCTION, num_inference_steps=1, **FAMILIES[folder.name].guided(1.0))
    ours = backbone.prepare_source(image)
    assert torch.equal(seen[0], ours)
    assert ours.shape[2:] == backbone.source_size((image.height, image.width))


@pytest.mark.parametrize("folder", EDITORS, indirect=True)
def test_samples_of_several_layouts_share_a_batch(backbone: Backbone) -> None:
    """Each velocity is the one that its sample has alone."""
    prompts = [*sources(backbone), prompt_for(backbone, "a red circle"), *sources(backbone)[:1]]
    embeddings = PromptEmbeddings(backbone)
    x = torch.cat([backbone.noise(1, SIZE, torch.Generator().manual_seed(i)) for i in range(len(prompts))])
    sigma = torch.linspace(0.9, 0.2, len(prompts))
    cond, negative = embeddings(prompts)
    assert len(cond[SIZES]) == len(negative["text"]) == len(prompts)
    together = guided_velocity(backbone.velocity, cond, negative, Guidance(scale=3))(x, sigma)
    for i, prompt in enumerate(prompts):
        alone = guided_velocity(backbone.velocity, *embeddings([prompt]), Guidance(scale=3))(
            x[i : i + 1], sigma[i : i + 1]
        )
        assert (together[i] - alone[0]).abs().max() < 1e-5


GRADIENTS = [(family, method) for family in EDITORS for method in METHODS]
SLOW = (("flux2", "flowbp_bridge"), ("flux_kontext", "flowbp_sparse"))
"""Those that are not left to the exhaustive tier."""


@pytest.mark.parametrize(
    ("folder", "method"),
    [pytest.param(*case, marks=pytest.mark.slow if case in SLOW else pytest.mark.exhaustive) for case in GRADIENTS],
    indirect=["folder"],
)
def test_the_sweep_over_edits_is_the_joint_graph(folder: Path, method: str) -> None:
    backbone = backbones.load(str(folder), dtype=torch.float64)
    cond, negative = PromptEmbeddings(backbone)([*sources(backbone)[:2], prompt_for(backbone, "a red circle")])
    assert_sweep_is_joint(backbone, cond, negative, Guidance(scale=2.5, detach_negative=False), method)


def rows(folder: Path, *, needy: bool) -> Path:
    """A file of edits and, unless the family needs one, of a prompt without an image."""
    for i in range(3):
        picture(64 + 8 * i, 72, i).save(folder / f"{i}.png")
    lines = [{"prompt": f"make it {color}", "images": f"{i}.png"} for i, color in enumerate(("red", "blue", "green"))]
    lines.append({"prompt": "a red circle"} | ({"images": "0.png"} if needy else {}))
    file = folder / "edits.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize("folder", tiers(EDITORS, slow=["flux2", "flux_kontext"]), indirect=True)
def test_updates_on_edits_do_not_depend_on_micro_batches_or_what_was_kept(folder: Path, tmp_path: Path) -> None:
    sets = [
        f"model={{ref: {folder}, height: {SIZE[0]}, width: {SIZE[1]}}}",
        f"data.prompts={rows(tmp_path, needy=folder.name in NEEDY)}",
    ]
    sets += [
        "total_batch_size=4",
        "num_inference_steps=4",
        "guidance_scale=2",
        "lora={rank: 2}",
        "method=flowbp_sparse",
    ]
    found = []
    for size, kept in ((4, 2**30), (1, 0)):
        config = load(TrainConfig, [], [*sets, f"per_device_batch_size={size}"])
        trainer = Trainer(config, load_models(config, torch.device("cpu")), Accelerator(cpu=True))
        trainer.models.embeddings._latents = SourceLatents(trainer.models.backbone, kept)
        metrics = trainer.compute_gradient()
        found.append(torch.cat([p.grad.flatten() for p in trainer.models.parameters.values()]))
        assert np.isfinite(metrics["loss"])
    assert found[0].norm() > 0
    assert relative(*found) < 1e-4


def test_packing_pads_and_remembers_sizes() -> None:
    a, b = torch.arange(12.0).reshape(2, 2, 3), torch.ones(2, 1, 2)
    packed = pack_sources([(a, b), (), (b,)])
    assert packed[TOKENS].shape == (3, 8, 2)
    assert packed[TOKENS][0, :6].tolist() == a.flatten(1).T.tolist()
    assert packed[TOKENS][1].eq(0).all()
    assert packed[SIZES].tolist() == [[[2, 3], [1, 2]], [[0, 0], [0, 0]], [[1, 2], [0, 0]]]
    assert pack_sources([(), ()]) == {}


@pytest.mark.parametrize("folder", ["sd3", "flux2"], indirect=True)
def test_what_a_family_does_not_take_is_refused(backbone: Backbone) -> None:
    one: Sequence[str] = [edit(picture(64, 64))]
    if backbone.max_sources == 0:
        with pytest.raises(UserError, match="StableDiffusion3Pipeline cannot edit; take out the images"):
            check_edits(one, backbone)
        with pytest.raises(UserError, match="cannot edit"):
            backbone.prepare_source(picture(64, 64))
    else:
        with pytest.raises(UserError, match="has 11 images, and Flux2KleinPipeline takes 10 at most"):
            check_edits([edit(*[picture(64, 64)] * 11)], backbone)
        with pytest.raises(UserError, match="640x64 pixels: one side may be at most 8 times the other"):
            check_edits([edit(picture(640, 64))], backbone)
        with pytest.raises(UserError, match=r"images of 64x64, .* of 96x64; under distributed.kind fsdp2 or zero3"):
            check_edits([*one, edit(picture(96, 64))], backbone, one_layout=True)
        check_edits([*one, edit(picture(96, 64))], backbone)


# families whose text encoder sees the sources -------------------------------------------------------------------------


LONG = "make" + " the circle green and" * 30
"""An instruction of more than 128 tokens."""


@pytest.mark.parametrize("folder", tiers(NEEDY, slow=["qwen_edit"]), indirect=True)
def test_long_and_empty_instructions_are_the_pipelines_own(folder: Path, backbone: Backbone) -> None:
    for given in (
        edit(picture(40, 56), text=LONG),
        edit(picture(40, 56), text=""),
        edit(picture(200, 80)),
        edit(picture(30, 70)),
    ):
        ours = sampling.generate_images(backbone, given, [5], SIZE, 3, 3.0)
        assert (ours - pipelines_own(folder, given, 3.0, 5)).abs().max() < 1e-5


@pytest.mark.parametrize("folder", tiers(NEEDY, slow=["qwen_edit_plus"]), indirect=True)
def test_embeddings_depend_on_the_sources(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    """Those of the empty prompt too; on disk as in memory."""
    prompts = [edit(picture(64, 72)), edit(picture(64, 72, 1)), edit(picture(64, 72), text="a red circle")]
    store = EmbeddingStore(tmp_path / "cache")
    embeddings = PromptEmbeddings(backbone, store, fingerprint(folder, backbone, ModelConfig()))
    cond, negative = embeddings(prompts)
    for one, same in ((cond, ()), (negative, ((0, 2),))):
        for i, k in ((0, 1), (0, 2), (1, 2)):
            assert torch.equal(one["text"][i], one["text"][k]) == ((i, k) in same)
    again = PromptEmbeddings(_without_text_encoder(backbone), EmbeddingStore(store.folder), embeddings._fingerprint)
    for one, other in zip((cond, negative), again(prompts), strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    (folder / "processor" / "a.txt").touch()
    assert fingerprint(folder, backbone, ModelConfig()) != embeddings._fingerprint
    (folder / "processor" / "a.txt").unlink()


def _without_text_encoder(backbone: Backbone) -> Backbone:
    other = copy.copy(backbone)
    other.pipe = copy.copy(backbone.pipe)
    other.unload_text_encoders()
    return other


@pytest.mark.parametrize("folder", ["flux2"], indirect=True)
def test_embeddings_of_other_families_are_those_of_the_words(backbone: Backbone) -> None:
    embeddings = PromptEmbeddings(backbone, fingerprint="mark")
    cond, negative = embeddings([edit(picture(64, 72)), edit(picture(64, 72, 1)), INSTRUCTION])
    assert set(embeddings._store) == {digest("mark", INSTRUCTION), digest("mark", "")}
    assert torch.equal(cond["text"][0], cond["text"][2])
    assert torch.equal(negative["text"][0], negative["text"][1])


@pytest.mark.parametrize("folder", tiers(NEEDY, slow=NEEDY), indirect=True)
def test_instructions_are_cut_where_the_limit_says(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "max_tokens", 12)
    (limit,) = backbone.prompt_limits().values()
    images = [picture(64, 72)] * backbone.max_sources
    tokens = sum(backbone.source_text_tokens(backbone.source_size((72, 64))) for _ in images)
    for count, is_read in ((limit.max_tokens, True), (limit.max_tokens + 1, False)):
        text = "a" + " a" * (count - 1)
        assert limit.num_longer([text]) == (not is_read)
        one, other = (backbone.encode_edit(text[:-1] + last, images) for last in "ab")
        assert one["text"].shape[:2] == (1, tokens + 12)
        assert one["mask"].all()
        assert torch.equal(one["text"], other["text"]) == (not is_read)
    short = backbone.encode_edit("a", images)
    assert not short["mask"].all()
    assert not short["text"][~short["mask"]].any()


@pytest.mark.parametrize("folder", tiers(NEEDY, slow=["qwen_edit"]), indirect=True)
def test_a_prompt_without_an_image_is_refused_before_the_run(folder: Path, tmp_path: Path) -> None:
    bones = backbones.init_empty_weights(str(folder))
    name = type(bones.pipe).__name__
    with pytest.raises(UserError, match=f"the prompt 'a red circle' has no image, and {name} only edits; give every"):
        check_edits([edit(picture(64, 64)), "a red circle"], bones)
    with pytest.raises(UserError, match=f"images, and {name} takes {bones.max_sources} at most"):
        check_edits([edit(*[picture(64, 64)] * 4)], bones)
    with pytest.raises(UserError, match="the image is 804x4; models take at most 200 times as wide as high"):
        check_edits([edit(picture(804, 4))], bones)
    sets = [f"model={{ref: {folder}, height: {SIZE[0]}, width: {SIZE[1]}}}"]
    config = load(TrainConfig, [], [*sets, f"data.prompts={rows(tmp_path, needy=True)}"])
    with pytest.raises(UserError, match="has no image"):  # of the evaluation, by default captions
        preflight.check_run(config, 1)
    request = BenchmarkRequest("hpdv2", "builtin:shapes/test", num_prompts=2, images=1)
    with pytest.raises(UserError, match="has no image"):
        prepare_benchmark(ModelSource("model", config, None), request, tmp_path / "out", 1, JudgeConfig())
