"""Any diffusers pipeline folder of a known family as a generator: text to image, edits, adapters, batches."""

import copy
import gc
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from inspect import signature
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, Le
from PIL import Image

from imgen_common import hub
from imgen_common.config import Config
from imgen_common.devices import device_of, dtype_of
from imgen_common.errors import UserError, one_line
from imgen_common.files import read_json
from imgen_common.images import enlarge
from imgen_common.prompt_limits import prompt_limits
from imgen_common.run_folder.data import fingerprint
from imgen_common.shapes.vocabulary import describe_large_image, describe_unknown_words
from imgen_common.weights import ADAPTER_CONFIG
from interleave.models.concurrency import Batcher, FittingBatches
from interleave.models.generators.loading import (
    family_of,
    flux2_text_options,
    img2img_pipeline,
    largest_side,
    load_lora,
    load_pipeline,
    size_multiple,
    split_references,
)
from interleave.protocols import BackendError, GenerationRequest, HashedImage, check_sources

log = logging.getLogger(__name__)
Item = tuple[GenerationRequest, "GenerationSettings"]
SMALLEST_REFERENCE = 64
"""Shortest side in pixels of a reference that the FLUX.2 pipelines accept."""
MAX_REFERENCE_RATIO = 8
"""Of the longer side of a reference to the shorter one, which the FLUX.2 pipelines accept."""
MAX_REFERENCE_PIXELS = 64 * 10**6
"""Of one reference, once enlarged."""


class GenerationSettings(Config):
    """What an image depends on besides model, prompt, sources and seed.  null: what the sampling.json in the
    folder of the adapter or of the model says, if `flowbp export` wrote one, else the pipeline's own default."""

    num_inference_steps: Annotated[int, Ge(1), Le(1000)] | None = None
    """Steps; the miniature's own are 12."""
    guidance_scale: Annotated[float, Ge(0), Le(100)] | None = None
    """Guidance as the pipeline counts it; 1 is none (Z-Image, Krea 2: 0), but for guidance-distilled models; the
    miniature's own is 2."""
    height: Annotated[int, Ge(8), Le(4096)] | None = None
    """Height of the image in pixels; the miniature's own is 32."""
    width: Annotated[int, Ge(8), Le(4096)] | None = None
    """Width of the image in pixels; the miniature's own is 32."""
    strength: Annotated[float, Gt(0), Le(1)] | None = None
    """How much of a source an image-to-image edit (SD3, Z-Image, FLUX.1) generates anew: 1 is all of it."""
    max_sequence_length: Annotated[int, Ge(1), Le(1024)] | None = None
    """Tokens of a prompt that the text encoder reads (Stable Diffusion 3: T5); pipelines allow 512 at most, those of
    Qwen-Image 1024."""
    negative_prompt: str | None = None
    """What the image must not show, for the families that take it (SD3, Z-Image, Krea 2, Qwen-Image)."""

    def with_defaults(self, other: "GenerationSettings") -> "GenerationSettings":
        """These settings, and those of `other` where these have none."""
        fields = set(GenerationSettings.model_fields)
        own = self.model_dump(include=fields, exclude_none=True)
        return GenerationSettings(**other.model_dump(include=fields) | own)


class PipelineConfig(GenerationSettings):
    """A diffusers pipeline on this machine."""

    kind: Literal["pipeline"] = "pipeline"
    ref: str = "builtin:shapes/generator"
    """The model: `builtin:shapes/generator`, a folder, or `org/name@revision`; safetensors only."""
    lora: str | None = None
    """An adapter that is fused into it: a file or folder that `flowbp export` wrote, of PEFT, or any that diffusers
    loads; also `org/name@revision`, with `/FILE.safetensors` behind it where a repository has several."""
    lora_weight: Annotated[float, Ge(-10), Le(10)] = 1.0
    """Factor of the adapter."""
    max_references: Annotated[int, Ge(0), Le(16)] | None = None
    """How many images an edit may be given, up to what the family takes; 0: text to image only; null: 1, or 0 for a
    family that makes no edits here (Krea 2, Qwen-Image-2.1)."""
    reference_scale: Annotated[int, Ge(1), Le(16)] | None = None
    """Factor by which references are enlarged; null: the smallest that the pipeline accepts (FLUX.2: 64 pixels)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic; auto: bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; auto: the first GPU, else the CPU."""
    max_batch: Annotated[int, Ge(1), Le(256)] = 16
    """Most images generated at once; halved where memory runs out."""
    pad_batches: bool = False
    """Whether every call generates `max_batch` images, copies among them where fewer are asked for: then an image does
    not depend on which others it is generated with.  Otherwise it may differ by rounding, seldom and by 1 of 255."""

    def build(self) -> "PipelineGenerator":
        """The generator, its model loaded.  Raises UserError where it cannot be had."""
        return PipelineGenerator(self)


class PipelineRunner:
    """A loaded pipeline, which generates the images of like requests in one call.  For one thread at a time."""

    def __init__(self, config: PipelineConfig) -> None:
        """Raises UserError for a model or adapter that cannot be had, or settings that its family does not take."""
        self.config = config
        self.name, self.family = family_of(config.ref, hub.resolve(config.ref, weights=False))
        folder = hub.resolve(config.ref)  # which downloads tens of gigabytes
        most = self.family.max_references
        self.max_references = min(1, most) if config.max_references is None else config.max_references
        if self.max_references > most:
            raise UserError(f"generator.max_references {self.max_references}: {self.name} takes {most} at most")
        adapters = [] if config.lora is None else [hub.resolve_adapter(config.lora, "lora")]
        own = GenerationSettings()
        for file in (place / hub.SAMPLING_FILE for place in (folder, *(adapter.parent for adapter in adapters))):
            own = read_json(file, GenerationSettings).with_defaults(own) if file.exists() else own
        self.settings = config.with_defaults(own)
        # until the model is loaded
        self._multiple = 1
        self._largest: int | None = None
        self.check(self.settings)
        self._device = device_of(config.device)
        self._dtype = dtype_of(config.dtype, self._device)
        self._pipe = self._editor = load_pipeline(self.name, folder, self._dtype, self._device)
        self._multiple, self._largest = size_multiple(self._pipe), largest_side(self._pipe)
        self.check(self.settings)
        for adapter in adapters:
            load_lora(self._pipe, adapter, f"lora {config.lora}", config.lora_weight)
        if self.family.edit == "references":
            self._pipe.prepare_image_latents = split_references(self._pipe.prepare_image_latents)
        if self.family.edit == "image":
            self._editor = img2img_pipeline(self.family.img2img, self._pipe)
        described = [file for one in adapters if (file := one.with_name(ADAPTER_CONFIG)).exists()]
        self._fingerprint = fingerprint(config.ref, [*adapters, *described])
        self._cutting: set[str] = set()
        self._pads_batches = config.pad_batches and self.family.edit != "alone"
        self._batches = FittingBatches(self._generate_together, config.max_batch, config.ref, self._free_memory)

    @property
    def params(self) -> dict[str, Any]:
        """Everything that images depend on, as JSON."""
        chosen = self.config.model_dump(mode="json", include={"lora", "lora_weight", "reference_scale"})
        found = {"dtype": str(self._dtype).removeprefix("torch."), "weights": self._fingerprint}
        return self.settings.model_dump(mode="json") | chosen | found

    def check(self, settings: GenerationSettings) -> None:
        """Raises UserError for settings that the family does not take."""
        if settings.negative_prompt is not None and self.family.negative is None:
            raise UserError(f"negative_prompt: {self.name} takes none; leave it null")
        if settings.strength is not None and self.family.edit != "image":
            raise UserError(f"strength: {self.name} edits by reference and takes none; leave it null")
        if settings.max_sequence_length is not None and not self.family.has_length:
            raise UserError(f"max_sequence_length: {self.name} takes none; leave it null")
        if (settings.max_sequence_length or 0) > (most := self.family.max_length):
            raise UserError(f"max_sequence_length {settings.max_sequence_length}: {self.name} takes {most} at most")
        for name, side in (("height", settings.height), ("width", settings.width)):
            if side is not None and side % self._multiple:
                below = side // self._multiple * self._multiple
                raise UserError(
                    f"{name} {side}: {self.name} generates multiples of {self._multiple} pixels; give "
                    + " or ".join(str(near) for near in (below, below + self._multiple) if near)
                )
            if side is not None and self._largest is not None and side > self._largest:
                raise UserError(f"{name} {side}: {self.name} has positions for {self._largest} pixels at most")

    def generate(
        self, requests: Sequence[GenerationRequest], settings: GenerationSettings | None = None
    ) -> list[HashedImage | BackendError]:
        """An image, or why there is none, for each of some requests with as many sources of the same sizes.

        settings: over those of the configuration.  An image depends on how many share its call by rounding alone, and
        not at all with `pad_batches`; where memory runs out or one request fails, see `FittingBatches`.
        """
        chosen = self.settings if settings is None else settings.with_defaults(self.settings)
        self._warn_of_cut_prompts([request.prompt for request in requests], chosen)
        return self._batches([(request, chosen) for request in requests])

    def close(self) -> None:
        """Release the model."""
        self._pipe = self._editor = None
        self._free_memory()

    def _generate_together(self, items: Sequence[Item]) -> list[HashedImage]:
        requests, settings = [request for request, _ in items], items[0][1]
        num_copies = self._batches.max_batch - len(requests) if self._pads_batches else 0
        try:
            with np.errstate(invalid="raise"):  # diffusers turns what is not finite into black pixels
                images = self._call([*requests, *requests[-1:] * num_copies], settings)
        except FloatingPointError:
            message = "the image is not finite; check the weights of the model, or set generator.dtype=float32"
            raise BackendError("model_error", message) from None
        return [HashedImage.from_pil(image) for image in images[: len(requests)]]

    def _call(self, requests: Sequence[GenerationRequest], settings: GenerationSettings) -> list[Image.Image]:
        """The pipeline's images for requests with equally many sources."""
        import torch

        if self.family.edit == "alone" and len(requests) > 1:
            return [image for request in requests for image in self._call([request], settings)]
        arguments = self._shared_arguments(settings)
        arguments["prompt"] = [request.prompt for request in requests]
        if self.family.edit == "alone":
            arguments["prompt"] = requests[0].prompt
        arguments["generator"] = [torch.Generator().manual_seed(request.seed) for request in requests]
        references = [self._reference(source) for request in requests for source in request.sources]
        if not references:
            if self.family.needs_image:
                size = (settings.width or 1024, settings.height or 1024)
                arguments["image"] = Image.new("RGB", size, "white")
            return self._pipe(**arguments).images
        if self.family.edit == "image" and settings.strength is not None:
            arguments["strength"] = settings.strength
        if self.family.edit == "image" and settings.height and settings.width:
            # as the editors do by themselves; that of Z-Image does not
            size = (settings.width, settings.height)
            references = [image.resize(size, Image.Resampling.LANCZOS) for image in references]
        arguments["image"] = references[0] if len(references) == 1 else references
        return self._editor(**arguments).images

    def _shared_arguments(self, settings: GenerationSettings) -> dict[str, Any]:
        """Arguments of the pipeline that all requests of a call share."""
        found: dict[str, Any] = {
            "num_inference_steps": settings.num_inference_steps,
            self.family.guidance: settings.guidance_scale,
            "height": settings.height,
            "width": settings.width,
            "max_sequence_length": settings.max_sequence_length,
        }
        if self.family.negative is not None:
            given = settings.negative_prompt
            found["negative_prompt"] = self.family.negative if given is None else given
        if self.family.edit == "reference" and settings.height and settings.width:
            found["max_area"] = settings.height * settings.width
        own = flux2_text_options(self._pipe) if self.name in ("Flux2KleinPipeline", "Flux2Pipeline") else {}
        return own | {name: value for name, value in found.items() if value is not None}

    def _warn_of_cut_prompts(self, prompts: Sequence[str], settings: GenerationSettings) -> None:
        """Says once of each text encoder that it does not read all of a prompt, or of the negative one."""
        if self.family.edit == "alone":  # their pipelines read all of it
            return
        length = self._shared_arguments(settings).get("max_sequence_length")
        length = length or signature(self._pipe.__call__).parameters["max_sequence_length"].default
        for name, limit in prompt_limits(self._pipe, length).items():
            texts = [] if name in self._cutting else [*prompts, settings.negative_prompt or ""]
            cut = [text for text in texts if limit.num_longer([text])]
            if cut:
                self._cutting.add(name)
                shown, what = one_line(cut[0], 60), f"{limit.max_tokens} tokens that {name} of {self.config.ref} reads"
                log.warning(
                    "the prompt %r is longer than the %s; its rest, and that of others, is ignored", shown, what
                )

    def _reference(self, source: HashedImage) -> Image.Image:
        image, scale = source.image, self.config.reference_scale
        if scale is None:
            scale = -(-SMALLEST_REFERENCE // min(image.size)) if self.family.edit == "references" else 1
        if image.width * image.height * scale**2 > MAX_REFERENCE_PIXELS:
            size = f"{image.width}x{image.height}"
            raise BackendError("refused", f"a reference of {size} pixels, enlarged {scale} times, is too large")
        if self.family.edit == "references" and max(image.size) > MAX_REFERENCE_RATIO * min(image.size):
            message = (
                f"a reference of {image.width}x{image.height} pixels: one side may be at most {MAX_REFERENCE_RATIO} "
                "times the other; cut it, or add a margin"
            )
            raise BackendError("refused", message)
        return enlarge(image, scale)

    def _free_memory(self) -> None:
        if self._device.type == "cuda":
            import torch

            gc.collect()
            torch.cuda.empty_cache()


class PipelineGenerator:
    """A diffusers pipeline that answers waiting requests together."""

    def __init__(self, config: PipelineConfig, on_batch: Callable[[int], None] = lambda size: None) -> None:
        """on_batch: called with the number of requests of each batch.  Raises UserError as `PipelineRunner`."""
        self._runner = runner = PipelineRunner(config)
        self._settings = runner.settings
        self.id, self.max_sources = config.ref, runner.max_references

        def generate(items: Sequence[Item]) -> list[HashedImage | BackendError]:
            on_batch(len(items))
            return runner.generate([request for request, _ in items], items[0][1])

        self._batcher: Batcher[Item, HashedImage] = Batcher(generate, config.max_batch, self._batch_key)

    @staticmethod
    def _batch_key(item: Item) -> Hashable:
        """Requests of equal keys can share a call: as many sources, of the same sizes, and equal settings."""
        return tuple(source.image.size for source in item[0].sources), item[1]

    @property
    def params(self) -> Mapping[str, Any]:
        """Settings, adapter, and a fingerprint of the files."""
        return self._runner.params | self._settings.model_dump(mode="json")

    def with_params(self, settings: GenerationSettings) -> "PipelineGenerator":
        """The same model and batches, `settings` over its own.  Raises UserError as `PipelineRunner.check`."""
        self._runner.check(settings)
        other = copy.copy(self)
        other._settings = settings.with_defaults(self._settings)
        return other

    async def generate(self, request: GenerationRequest) -> HashedImage:
        """The image.  Raises BackendError: refused (too many sources), out_of_memory, model_error."""
        check_sources(self, request)
        if unknown := describe_unknown_words(self.id, request.prompt):
            log.warning("%s, and what it generates for them means nothing", unknown)
        if large := describe_large_image(self.id, (source.image.size for source in request.sources)):
            raise BackendError("refused", large)
        return await self._batcher((request, self._settings))

    async def close(self) -> None:
        """Release the model, once it is idle."""
        await self._batcher.close()
        self._runner.close()
