"""Pipelines as generators: batches, references, settings, failures, on tiny random models of every family."""

import asyncio
import functools
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxImg2ImgPipeline,
    QwenImageImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
    ZImageImg2ImgPipeline,
)
from diffusers.pipelines.flux import pipeline_flux_kontext
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from tiny import drop_weight

from imgen_common.config import load
from imgen_common.errors import UserError, warn_once
from imgen_common.hub import SAMPLING_FILE
from imgen_common.run_folder.data import fingerprint
from interleave.models.generators.loading import load_pipeline
from interleave.models.generators.pipeline import (
    GenerationSettings,
    PipelineConfig,
    PipelineGenerator,
    PipelineRunner,
)
from interleave.protocols import BackendError, GenerationRequest, HashedImage
from tests.interleave.editors import PIPELINES, folder_of

SIZE = {"height": 32, "width": 48}
STEPS = 3
TEXT = {"flux2": {"max_sequence_length": 12, "text_encoder_out_layers": (1, 2, 3)}}
TEXT["flux2_dev"] = TEXT["flux2"]
IMAGE_TO_IMAGE = {
    "sd3": StableDiffusion3Img2ImgPipeline,
    "flux": FluxImg2ImgPipeline,
    "z_image": ZImageImg2ImgPipeline,
    "qwen_image": QwenImageImg2ImgPipeline,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name == "flux2" else pytest.mark.slow) for name in PIPELINES]
)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, place: Path) -> Path:
    return folder_of(family, place)


@pytest.fixture(scope="module")
def painter(folder: Path) -> PipelineRunner:
    return PipelineRunner(PipelineConfig(ref=str(folder), num_inference_steps=STEPS, **SIZE))


@pytest.fixture(scope="module")
def klein_folder(place: Path) -> Path:
    return folder_of("flux2", place / "klein")


@pytest.fixture
def klein(klein_folder: Path) -> PipelineRunner:
    return PipelineRunner(PipelineConfig(ref=str(klein_folder), num_inference_steps=STEPS, max_references=2, **SIZE))


@pytest.fixture(autouse=True)
def _small_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """The large models turn every reference into a million pixels; here they make 64x64 of them."""
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(64, 64)])
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        wanted = module.calculate_dimensions
        monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio, wanted=wanted: wanted(64 * 64, ratio))


def noise(seed: int, size: tuple[int, int] = (64, 80)) -> HashedImage:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return HashedImage.from_pil(Image.fromarray(pixels))


def pixels(picture: HashedImage | BackendError) -> np.ndarray:
    assert isinstance(picture, HashedImage), picture
    return np.asarray(picture.image, np.int16)


def same(one: HashedImage | BackendError, other: HashedImage | BackendError) -> bool:
    """But for rounding: a step of one grey level, in few places."""
    gap = np.abs(pixels(one) - pixels(other))
    return gap.max() <= 1 and gap.mean() < 0.01


@functools.cache
def unmodified(folder: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def alone(family: str, folder: Path, prompt: str, seed: int, **given: Any) -> HashedImage:
    """What the unmodified pipeline draws for one prompt."""
    pipe = unmodified(folder)
    if "image" in given and family in IMAGE_TO_IMAGE:
        pipe = IMAGE_TO_IMAGE[family](**pipe.components)
        if family == "z_image":  # takes images of the size that it generates
            given["image"] = given["image"].resize((SIZE["width"], SIZE["height"]), Image.Resampling.LANCZOS)
    options = SIZE | {"num_inference_steps": STEPS} | TEXT.get(family, {}) | given
    if family == "kontext":
        options["max_area"] = SIZE["height"] * SIZE["width"]
    if family.startswith("qwen"):
        options["negative_prompt"] = " "
    return HashedImage.from_pil(pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), **options).images[0])


PROMPTS = ["a red circle", "two blue squares above a green cross", "a yellow triangle"]


def test_an_image_does_not_depend_on_its_batch(family: str, folder: Path, painter: PipelineRunner) -> None:
    jobs = [GenerationRequest(prompt, (), seed) for seed, prompt in enumerate(PROMPTS)]
    drawn = painter.generate(jobs)
    assert pixels(drawn[0]).shape == (*SIZE.values(), 3)
    assert not same(drawn[0], drawn[1])
    assert all(same(picture, painter.generate([job])[0]) for picture, job in zip(drawn, jobs, strict=True))
    canvas = {"image": Image.new("RGB", (48, 32), "white")} if family.startswith("qwen_edit") else {}
    assert same(drawn[1], alone(family, folder, PROMPTS[1], 1, **canvas))


def test_edits_have_references_of_their_own(family: str, folder: Path, painter: PipelineRunner) -> None:
    jobs = [GenerationRequest(prompt, (noise(seed),), 7) for seed, prompt in enumerate(PROMPTS)]
    edited = painter.generate(jobs)
    assert all(same(picture, painter.generate([job])[0]) for picture, job in zip(edited, jobs, strict=True))
    assert same(edited[1], alone(family, folder, PROMPTS[1], 7, image=jobs[1].sources[0].image))
    assert not same(edited[1], painter.generate([GenerationRequest(PROMPTS[1], (noise(9),), 7)])[0])
    assert not same(edited[1], painter.generate([GenerationRequest(PROMPTS[1], (), 7)])[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["krea2", "qwen_image_21"])
def test_families_without_edits_generate_as_their_pipelines(name: str, place: Path) -> None:
    folder, size = folder_of(name, place / "newest"), {"height": 32, "width": 64}
    config = PipelineConfig(ref=str(folder), num_inference_steps=STEPS, guidance_scale=2.0, **size)
    runner = PipelineRunner(config)
    given = size | {"num_inference_steps": STEPS, runner.family.guidance: 2.0}
    given |= {"negative_prompt": runner.family.negative, "generator": torch.Generator().manual_seed(1)}
    drawn = runner.generate([GenerationRequest(prompt, (), seed) for seed, prompt in enumerate(PROMPTS)])
    assert same(drawn[1], HashedImage.from_pil(unmodified(folder)(prompt=PROMPTS[1], **given).images[0]))
    assert not same(drawn[0], drawn[1])
    assert same(drawn[1], runner.generate([GenerationRequest(PROMPTS[1], (), 1)])[0])
    assert runner.max_references == 0
    if name == "qwen_image_21":
        with pytest.raises(UserError, match="max_sequence_length: QwenImage21Pipeline takes none"):
            PipelineRunner(config.model_copy(update={"max_sequence_length": 9}))
    with pytest.raises(UserError, match=r"max_references 1: .* takes 0 at most"):
        PipelineRunner(config.model_copy(update={"max_references": 1}))


@pytest.mark.parametrize("name", ["flux2", pytest.param("qwen_edit_plus", marks=pytest.mark.slow)])
def test_several_references_make_one_image(name: str, place: Path) -> None:
    folder = folder_of(name, place / "several")
    painter = PipelineRunner(PipelineConfig(ref=str(folder), num_inference_steps=STEPS, max_references=3, **SIZE))
    jobs = [
        GenerationRequest(prompt, (noise(seed), noise(seed + 10, (96, 64))), seed)
        for seed, prompt in enumerate(PROMPTS)
    ]
    edited = painter.generate(jobs)
    for picture, job in zip(edited, jobs, strict=True):
        references = [source.image for source in job.sources]
        assert same(picture, alone(name, folder, job.prompt, job.seed, image=references))
    turned = GenerationRequest(jobs[0].prompt, jobs[0].sources[::-1], jobs[0].seed)
    assert not same(edited[0], painter.generate([turned])[0])


def test_small_references_are_enlarged_where_the_pipeline_needs_it(klein: PipelineRunner, klein_folder: Path) -> None:
    small = noise(0, (32, 48))
    large = small.image.resize((96, 64), Image.Resampling.NEAREST)
    assert same(
        klein.generate([GenerationRequest("a", (small,), 1)])[0], alone("flux2", klein_folder, "a", 1, image=large)
    )


def test_what_a_reference_costs_is_bounded(klein_folder: Path) -> None:
    painter = PipelineRunner(PipelineConfig(ref=str(klein_folder), num_inference_steps=1, reference_scale=16, **SIZE))
    (failure,) = painter.generate([GenerationRequest("a", (HashedImage.from_pil(Image.new("RGB", (800, 800))),), 1)])
    assert isinstance(failure, BackendError)
    assert failure.kind == "refused"
    assert "too large" in str(failure)


@pytest.mark.parametrize("size", [(300, 1), (8, 65), (8, 800)])
def test_a_reference_that_is_too_long_for_the_pipeline_is_refused(klein: PipelineRunner, size: tuple[int, int]) -> None:
    (failure,) = klein.generate([GenerationRequest("a", (HashedImage.from_pil(Image.new("RGB", size)),), 1)])
    assert isinstance(failure, BackendError)
    assert failure.kind == "refused"
    assert f"a reference of {size[0]}x{size[1]} pixels: one side may be at most 8 times the other" in str(failure)


def test_sides_that_a_family_would_round_are_refused(family: str, folder: Path, painter: PipelineRunner) -> None:
    for name, side in (("width", 33), ("height", 47)):
        with pytest.raises(UserError, match=rf"{name} {side}: .* generates multiples of \d+ pixels; give \d+ or \d+"):
            painter.check(GenerationSettings(**{name: side}))
        with pytest.raises(UserError, match=rf"{name} {side}: "):
            PipelineRunner(PipelineConfig(ref=str(folder), **{name: side}))
    painter.check(GenerationSettings(**SIZE))


def test_an_image_larger_than_the_positions_of_a_network_is_refused(tmp_path: Path) -> None:
    folder = folder_of("sd3", tmp_path)  # 32 positions of 4 pixels, as others have 192 of 16
    PipelineRunner(PipelineConfig(ref=str(folder), width=128, height=128))
    with pytest.raises(UserError, match=r"height 132: .* has positions for 128 pixels at most"):
        PipelineRunner(PipelineConfig(ref=str(folder), width=128, height=132))


def test_settings_reach_the_pipeline(family: str, folder: Path, painter: PipelineRunner) -> None:
    job = GenerationRequest(PROMPTS[0], (), 3)
    before = painter.generate([job])[0]
    assert not same(before, painter.generate([job], GenerationSettings(num_inference_steps=5))[0])
    assert pixels(painter.generate([job], GenerationSettings(height=48))[0]).shape == (48, 48, 3)
    argument = "true_cfg_scale" if family.startswith("qwen") else "guidance_scale"
    canvas = {"image": Image.new("RGB", (48, 32), "white")} if family.startswith("qwen_edit") else {}
    guided = painter.generate([job], GenerationSettings(guidance_scale=2.5))[0]
    assert same(guided, alone(family, folder, job.prompt, 3, **{argument: 2.5}, **canvas))
    short = painter.generate([job], GenerationSettings(max_sequence_length=7))[0]
    assert same(short, alone(family, folder, job.prompt, 3, max_sequence_length=7, **canvas))
    if family in ("flux2", "sd3", "flux"):  # others see no padding
        assert not same(before, short)
    assert same(before, painter.generate([job])[0])


def test_what_a_text_encoder_cuts_off_a_prompt_is_said_once(
    painter: PipelineRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(painter, "_cutting", set())
    settings = GenerationSettings(max_sequence_length=12)

    def draw(prompt: str) -> np.ndarray:
        (image,) = painter.generate([GenerationRequest(prompt, (), 0)], settings)
        return pixels(image)

    for count, reads_all in ((3, True), (60, painter.family.edit == "alone")):  # the pipelines of editors cut nothing
        assert np.array_equal(draw("a " * count + "b"), draw("a " * count + "c")) != reads_all
        said = [message for message in caplog.messages if message.startswith(f"the prompt '{'a ' * min(count, 29)}")]
        assert bool(said) != reads_all
    assert all("tokens that text_encoder" in message for message in said)
    assert len(set(said)) == len(said) <= 3
    if painter.family.negative is not None:
        monkeypatch.setattr(painter, "_cutting", set())
        painter.generate([GenerationRequest("a", (), 0)], GenerationSettings(negative_prompt="z " * 1200))
        assert any("the prompt 'z z z" in message for message in caplog.messages) == (painter.family.edit != "alone")


def test_settings_that_a_family_does_not_take_are_refused(family: str, folder: Path, painter: PipelineRunner) -> None:
    if painter.family.negative is None:
        with pytest.raises(UserError, match="takes none"):
            painter.check(GenerationSettings(negative_prompt="blurred"))
    else:
        job = GenerationRequest(PROMPTS[0], (), 3)
        assert not same(
            painter.generate([job])[0], painter.generate([job], GenerationSettings(negative_prompt="blurred"))[0]
        )
    if painter.family.edit == "image":
        edit = GenerationRequest(PROMPTS[0], (noise(1),), 3)
        assert not same(painter.generate([edit])[0], painter.generate([edit], GenerationSettings(strength=1.0))[0])
    else:
        with pytest.raises(UserError, match="strength"):
            PipelineRunner(PipelineConfig(ref=str(folder), strength=0.5))
    if painter.family.max_length == 512:
        with pytest.raises(UserError, match=r"max_sequence_length 768: \w+ takes 512 at most"):
            painter.check(GenerationSettings(max_sequence_length=768))
    with pytest.raises(UserError, match=f"at most|{painter.family.max_references}"):
        PipelineRunner(PipelineConfig(ref=str(folder), max_references=painter.family.max_references + 1))


def test_other_pipelines_devices_and_adapters_are_refused(klein_folder: Path, place: Path) -> None:
    with pytest.raises(UserError, match="device"):
        PipelineRunner(PipelineConfig(ref=str(klein_folder), device="toaster"))
    with pytest.raises(UserError, match="not a diffusers pipeline"):
        PipelineConfig(ref="builtin:shapes/reward").build()
    with pytest.raises(UserError, match="no such"):
        PipelineConfig(ref=str(place / "nowhere")).build()
    shutil.copytree(klein_folder, place / "other")
    index = place / "other" / "model_index.json"
    index.write_text(index.read_text().replace("Flux2KleinPipeline", "Flux2KleinPipelin"))
    with pytest.raises(UserError, match="did you mean 'Flux2KleinPipeline'"):
        PipelineConfig(ref=str(place / "other")).build()


def test_defaults_are_the_miniature_and_typos_fail() -> None:
    config = load(PipelineConfig, [], ["lora_weight=0.5"])
    assert (config.kind, config.ref, config.lora_weight) == ("pipeline", "builtin:shapes/generator", 0.5)
    with pytest.raises(UserError, match="did you mean 'guidance_scale'"):
        load(PipelineConfig, [], ["guidance_scal=2"])
    over = GenerationSettings(height=8).with_defaults(GenerationSettings(height=16, width=24))
    assert (over.height, over.width, over.strength) == (8, 24, None)


@dataclass
class Memory:
    """A pipeline whose memory holds `limit` images at once; an image's red is its seed."""

    limit: int
    sizes: list[int] = field(default_factory=list)

    def call(self, jobs: list[GenerationRequest], settings: GenerationSettings) -> list[Image.Image]:
        self.sizes.append(len(jobs))
        if len(jobs) > self.limit:
            raise torch.OutOfMemoryError("no room")
        return [Image.new("RGB", (4, 4), (job.seed, 0, 0)) for job in jobs]


def test_memory_that_runs_out_halves_the_batch(klein: PipelineRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(2)
    monkeypatch.setattr(PipelineRunner, "_call", memory.call)
    monkeypatch.setattr(klein._batches, "max_batch", 16)
    jobs = [GenerationRequest("a", (), seed) for seed in range(7)]
    drawn = klein.generate(jobs)
    assert [pixels(picture)[0, 0, 0] for picture in drawn] == list(range(7))
    memory.sizes.clear()
    klein.generate(jobs)
    assert max(memory.sizes) <= 2
    memory.limit = 0
    assert [failure.kind for failure in klein.generate(jobs[:2])] == ["out_of_memory"] * 2  # type: ignore[union-attr]


def test_padded_batches_have_one_size_until_memory_runs_out(
    klein: PipelineRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(8)
    monkeypatch.setattr(PipelineRunner, "_call", memory.call)
    monkeypatch.setattr(klein, "_pads_batches", True)
    monkeypatch.setattr(klein._batches, "max_batch", 8)
    for number in (1, 5, 8, 11):
        drawn = klein.generate([GenerationRequest("a", (), seed) for seed in range(number)])
        assert [pixels(picture)[0, 0, 0] for picture in drawn] == list(range(number))
    assert set(memory.sizes) == {8}
    memory.limit = 3
    assert len(klein.generate([GenerationRequest("a", (), seed) for seed in range(7)])) == 7
    assert memory.sizes[-1] <= memory.limit


@pytest.mark.exhaustive
def test_an_image_of_padded_batches_depends_on_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = PipelineRunner(PipelineConfig(num_inference_steps=6, max_batch=4, pad_batches=True))
    jobs = [GenerationRequest(prompt, (), seed) for seed in range(6) for prompt in ("a red circle", "two blue squares")]
    edits = [GenerationRequest("make the circle green", (noise(seed),), seed) for seed in range(6)]
    rng = np.random.default_rng(0)
    for asked in (jobs, edits):
        alone = [pixels(runner.generate([job])[0]) for job in asked]
        for _ in range(3):
            order = rng.permutation(len(asked))
            together = runner.generate([asked[i] for i in order])
            for i, picture in zip(order, together, strict=True):
                assert np.array_equal(pixels(picture), alone[i])


def test_a_job_that_breaks_does_not_break_its_batch(klein: PipelineRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(self: PipelineRunner, jobs: list[GenerationRequest], settings: GenerationSettings) -> list[Image.Image]:
        if any(job.prompt == "bad" for job in jobs):
            raise ValueError("not\nthis")
        return [Image.new("RGB", (4, 4), (job.seed, 0, 0)) for job in jobs]

    monkeypatch.setattr(PipelineRunner, "_call", call)
    monkeypatch.setattr(klein._batches, "max_batch", 16)
    drawn = klein.generate([GenerationRequest("bad" if seed == 3 else "good", (), seed) for seed in range(6)])
    assert [seed for seed, one in enumerate(drawn) if isinstance(one, BackendError)] == [3]
    failure = drawn[3]
    assert isinstance(failure, BackendError)
    assert failure.kind == "model_error"
    assert "not this" in str(failure)


def test_many_callers_share_batches(klein_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[int]] = []
    sizes: list[int] = []
    generator = PipelineGenerator(PipelineConfig(ref=str(klein_folder), max_batch=4, **SIZE), sizes.append)

    def call(self: PipelineRunner, jobs: list[GenerationRequest], settings: GenerationSettings) -> list[Image.Image]:
        batches.append([len(job.sources) for job in jobs])
        return [Image.new("RGB", (4, 4), (job.seed, 0, 0)) for job in jobs]

    monkeypatch.setattr(PipelineRunner, "_call", call)

    async def main() -> list[HashedImage | BaseException]:
        jobs = [GenerationRequest("a", (noise(seed),) * (seed % 2), seed) for seed in range(12)]
        jobs.append(GenerationRequest("a", (noise(0), noise(1)), 12))
        return await asyncio.gather(*(generator.generate(job) for job in jobs), return_exceptions=True)

    async def closing() -> list[HashedImage | BaseException]:
        try:
            return await main()
        finally:
            await generator.close()

    *drawn, refused = asyncio.run(closing())
    assert [pixels(picture)[0, 0, 0] for picture in drawn] == list(range(12))  # type: ignore[arg-type]
    assert isinstance(refused, BackendError)
    assert refused.kind == "refused"
    assert all(len(set(batch)) == 1 for batch in batches)
    assert max(map(len, batches)) == 4
    assert sizes == [len(batch) for batch in batches]


def test_the_same_model_generates_with_other_settings(klein_folder: Path) -> None:
    generator = PipelineGenerator(PipelineConfig(ref=str(klein_folder), num_inference_steps=1, **SIZE))
    other = generator.with_params(GenerationSettings(height=64))
    assert (generator.params["height"], other.params["height"], other.params["width"]) == (32, 64, 48)
    with pytest.raises(UserError, match="takes none"):
        generator.with_params(GenerationSettings(strength=0.5))

    async def main() -> list[HashedImage]:
        drawn = await asyncio.gather(
            *(one.generate(GenerationRequest("a", (), 1)) for one in (generator, other, generator))
        )
        await generator.close()
        return drawn

    assert [picture.image.height for picture in asyncio.run(main())] == [32, 64, 32]


def test_a_folder_that_says_how_to_generate_is_followed(place: Path) -> None:
    folder = folder_of("flux2", place / "sampling")
    own = {"height": 32, "width": 48, "num_inference_steps": 1, "guidance_scale": 1.5}
    (folder / SAMPLING_FILE).write_text(json.dumps(own))
    runner = PipelineRunner(PipelineConfig(ref=str(folder), width=32))
    assert runner.settings == GenerationSettings(**own | {"width": 32})
    (picture,) = runner.generate([GenerationRequest("a", (), 1)])
    assert isinstance(picture, HashedImage)
    assert picture.image.size == (32, 32)
    (folder / SAMPLING_FILE).write_text('{"height": "tall"}')
    with pytest.raises(UserError, match=r"damaged \(height: "):
        PipelineRunner(PipelineConfig(ref=str(folder)))


def test_a_changed_model_has_other_params(klein: PipelineRunner, klein_folder: Path) -> None:
    assert klein.params["weights"] == fingerprint(str(klein_folder))
    changed = klein_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    kept = changed.read_bytes()
    changed.write_bytes(kept)  # at another time, as downloads on two machines
    assert klein.params["weights"] == fingerprint(str(klein_folder))
    changed.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert klein.params["weights"] != fingerprint(str(klein_folder))
    changed.write_bytes(kept)


def test_a_part_that_is_a_linked_folder_belongs_to_the_model(klein_folder: Path, tmp_path: Path) -> None:
    model, parts = tmp_path / "model", [tmp_path / "step-200", tmp_path / "step-400"]
    shutil.copytree(klein_folder, model, ignore=shutil.ignore_patterns("transformer"))
    for number, part in enumerate(parts):
        weights = shutil.copytree(klein_folder / "transformer", part) / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + bytes([number]))
    found = set()
    for part in parts:
        (model / "transformer").unlink(missing_ok=True)
        (model / "transformer").symlink_to(part)
        found.add(fingerprint(str(model)))
    assert len(found) == 2


@pytest.mark.slow
def test_the_miniature_draws_what_it_is_reported() -> None:
    """Well above chance and below what it reached in training, over few images."""
    from imgen_common.images import from_pil
    from imgen_common.shapes.scene import balanced_specs
    from imgen_common.shapes.verify import accuracy, verify
    from imgen_common.streams import numpy_generator

    specs = balanced_specs(20, numpy_generator(0, "test"), "test")
    drawn = PipelineRunner(PipelineConfig()).generate(
        [GenerationRequest(spec.caption, (), seed) for seed, spec in enumerate(specs)]
    )
    images = from_pil([one.image for one in drawn if isinstance(one, HashedImage)])
    assert accuracy(verify(images, specs), specs)["all"] >= 0.5


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("two red circles", None),
        ("a lighthouse", "word 'lighthouse'"),
        ("un cercle bleu", "3 words 'un', 'cercle', 'bleu'"),
    ],
)
def test_words_that_the_miniature_does_not_know_are_said(
    prompt: str, unknown: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    async def generate() -> None:
        generator = PipelineConfig(num_inference_steps=1).build()
        await generator.generate(GenerationRequest(prompt, (), 0))
        await generator.close()

    asyncio.run(generate())
    assert [f"does not know the {unknown}, and what it generates" in said for said in caplog.messages] == (
        [True] if unknown else []
    )


def test_a_photo_is_no_source_for_the_miniature() -> None:
    async def edit(size: tuple[int, int]) -> HashedImage:
        generator = PipelineConfig(num_inference_steps=1).build()
        try:
            return await generator.generate(GenerationRequest("a red circle", (noise(0, size),), 0))
        finally:
            await generator.close()

    assert asyncio.run(edit((48, 32))).image.size == (32, 32)
    with pytest.raises(BackendError, match=r"edits images of 32x32 pixels, .* one of 800x600 .*; give one of 128 at m"):
        asyncio.run(edit((600, 800)))


@pytest.mark.parametrize("variant", ["fp16", pytest.param("ema", marks=pytest.mark.exhaustive)])
def test_weights_of_a_variant_are_loaded(klein_folder: Path, tmp_path: Path, variant: str) -> None:
    changed = Path(shutil.copytree(klein_folder, tmp_path / "changed"))
    for part in ("transformer", "text_encoder"):
        file = next((changed / part).glob("*.safetensors"))
        file.rename(file.with_suffix(f".{variant}.safetensors"))
    kind = "Flux2KleinPipeline"
    plain, other = (load_pipeline(kind, path, torch.float32, torch.device("cpu")) for path in (klein_folder, changed))
    for part in ("transformer", "text_encoder"):
        found, expected = (getattr(pipe, part).state_dict() for pipe in (other, plain))
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(("part", "name"), [("text_encoder", "mlp"), ("text_encoder", "embed_tokens"), ("vae", "conv")])
def test_a_weight_that_no_file_holds_is_not_made_up(klein_folder: Path, tmp_path: Path, part: str, name: str) -> None:
    changed = Path(shutil.copytree(klein_folder, tmp_path / "changed"))
    drop_weight(next((changed / part).glob("*.safetensors")), name)
    with pytest.raises(UserError, match=rf"changed/{part}: \d weights are missing, the first is "):
        PipelineRunner(PipelineConfig(ref=str(changed)))


@pytest.mark.parametrize("changed", [{"num_layers": 0}, {"num_single_layers": 0}])
def test_a_network_smaller_than_its_weights_is_refused(
    klein_folder: Path, tmp_path: Path, changed: dict[str, int]
) -> None:
    folder = Path(shutil.copytree(klein_folder, tmp_path / "changed"))
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    with pytest.raises(UserError, match=r"changed/transformer: \d+ weights have no place in the network of"):
        PipelineRunner(PipelineConfig(ref=str(folder)))


def test_a_setting_that_diffusers_does_not_know_is_said(
    klein_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(klein_folder, tmp_path / "changed"))
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"later": [1], "_diffusers_version": "99.0"}))
    warn_once.cache_clear()
    load_pipeline("Flux2KleinPipeline", folder, torch.float32, torch.device("cpu"))
    assert "does not know later and ignores it" in capsys.readouterr().err


@pytest.mark.parametrize("channels", [1, 8])
def test_an_autoencoder_of_another_model_is_refused(klein_folder: Path, tmp_path: Path, channels: int) -> None:
    folder = Path(shutil.copytree(klein_folder, tmp_path / "changed"))
    autoencoder = load_pipeline("Flux2KleinPipeline", klein_folder, torch.float32, torch.device("cpu")).components[
        "vae"
    ]
    autoencoder.from_config(autoencoder.config | {"latent_channels": channels}).save_pretrained(folder / "vae")
    with pytest.raises(UserError, match=rf"changed: the transformer reads \d+ channels, .* has {channels} of its own"):
        PipelineRunner(PipelineConfig(ref=str(folder)))


def test_a_folder_that_does_not_hold_what_it_says_is_refused(klein_folder: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(klein_folder, tmp_path / "changed"))
    (changed / "scheduler" / "scheduler_config.json").write_text(
        '{"use_karras_sigmas": 1, "use_exponential_sigmas": 1}'
    )
    with pytest.raises(UserError, match=r"not a Flux2KleinPipeline that can be loaded \(Only one of"):
        PipelineRunner(PipelineConfig(ref=str(changed)))
    file = next((changed / "vae").glob("*.safetensors"))
    with pytest.raises(UserError, match="is a single file; give a model folder"):
        PipelineRunner(PipelineConfig(ref=str(file)))
