"""Edits in every family that takes source images: pictures, gradients, batches of several layouts, updates, resume."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.pipelines.flux import pipeline_flux_kontext
from families import FAMILIES, SIZE
from fields import relative
from PIL import Image
from sweeps import assert_sweep_is_joint
from tiers import tiers

from flowbp import backbones
from flowbp.backbones.source_tokens import SIZES, TOKENS, pack_sources
from flowbp.config import TrainConfig
from flowbp.core.guidance import guided_velocity
from flowbp.core.settings import Guidance
from flowbp.core.types import Backbone
from flowbp.data.edits import Edit, Source, check_edits
from flowbp.data.embeddings import PromptEmbeddings, SourceLatents
from flowbp.evaluation import sampling
from flowbp.methods import METHODS
from flowbp.training.loading import load_models
from flowbp.training.trainer import Trainer
from imgen_common.config import load
from imgen_common.errors import UserError
from imgen_common.images import content_hash

EDITORS = [name for name, family in FAMILIES.items() if family.max_sources]
INSTRUCTION = "make the circle green"


@pytest.fixture(autouse=True)
def small_resolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kontext's own resolutions have a million pixels, for tiny networks too many tokens."""
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(24, 16), (16, 16), (16, 24)])


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def edit(*images: Image.Image, text: str = INSTRUCTION) -> Edit:
    return Edit(text, [Source(content_hash(one), (one.height, one.width), lambda one=one: one) for one in images])


def sources(backbone: Backbone) -> list[Edit]:
    """Edits of several sizes and numbers of sources, as far as the family takes them."""
    found = [edit(picture(64, 72)), edit(picture(90, 66, 1))]
    return [*found, edit(picture(64, 72, 2), picture(70, 64, 3))] if backbone.max_sources > 1 else found


def pipelines_own(folder: Path, given: Edit, guidance: float, seed: int) -> torch.Tensor:
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    family, images = FAMILIES[folder.name], [source.load() for source in given.sources]
    return pipe(
        image=images if family.max_sources > 1 else images[0],
        prompt=str(given),
        generator=torch.Generator().manual_seed(seed),
        num_inference_steps=3,
        output_type="pt",
        height=SIZE[0],
        width=SIZE[1],
        **family.guided(guidance),
    ).images


@pytest.mark.parametrize("folder", tiers(EDITORS, default=["flux2", "flux_kontext"], slow=["flux2_dev"]), indirect=True)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_an_edit_is_the_pipelines_own(folder: Path, guidance: float, backbone: Backbone) -> None:
    if guidance != 1 and not FAMILIES[folder.name].true_guidance:
        pytest.skip("its pipeline has no guidance but the distilled one")
    plain = sampling.generate_images(backbone, INSTRUCTION, [5], SIZE, 3, guidance)
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
    prompts = [*sources(backbone), "a red circle", *sources(backbone)[:1]]
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
TIER = {("flux2", "flowbp_bridge"): (), ("flux_kontext", "flowbp_sparse"): pytest.mark.slow}


@pytest.mark.parametrize(
    ("folder", "method"),
    [pytest.param(*case, marks=TIER.get(case, pytest.mark.exhaustive)) for case in GRADIENTS],
    indirect=["folder"],
)
def test_the_sweep_over_edits_is_the_joint_graph(folder: Path, method: str) -> None:
    backbone = backbones.load(str(folder), dtype=torch.float64)
    cond, negative = PromptEmbeddings(backbone)([*sources(backbone)[:2], "a red circle"])
    assert_sweep_is_joint(backbone, cond, negative, Guidance(scale=2.5, detach_negative=False), method)


def rows(folder: Path) -> Path:
    """A file of edits and of a prompt without an image."""
    for i in range(3):
        picture(64 + 8 * i, 72, i).save(folder / f"{i}.png")
    lines = [{"prompt": f"make it {color}", "images": f"{i}.png"} for i, color in enumerate(("red", "blue", "green"))]
    file = folder / "edits.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"prompt": "a red circle"}]))
    return file


@pytest.mark.parametrize("folder", tiers(EDITORS, default=["flux2"], slow=["flux_kontext"]), indirect=True)
def test_updates_on_edits_do_not_depend_on_micro_batches_or_what_was_kept(folder: Path, tmp_path: Path) -> None:
    sets = [f"model={{ref: {folder}, height: {SIZE[0]}, width: {SIZE[1]}}}", f"data.prompts={rows(tmp_path)}"]
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
        with pytest.raises(UserError, match="StableDiffusion3Pipeline cannot edit; take out the images, or train"):
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
