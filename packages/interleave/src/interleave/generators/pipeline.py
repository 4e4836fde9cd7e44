"""Any diffusers pipeline folder of a known family as a generator: drawing, editing, adapters, batches."""

import copy
import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from PIL import Image

from imgen_common import hub
from imgen_common.config import Config
from imgen_common.errors import UserError, nearest
from imgen_common.images import enlarge
from imgen_common.klein import text_layers
from interleave.batching import Batcher
from interleave.devices import device_of, dtype_of, out_of_memory
from interleave.generators import http
from interleave.parts import FailureKind, Job, PartFailed, Picture

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

MINIATURE = "builtin:shapes/generator"
SMALLEST_REFERENCE = 64
"""Shortest side in pixels of a reference that the FLUX.2 pipelines accept."""
MAX_REFERENCE_PIXELS = 64 * 10**6
"""Of one reference, once enlarged."""


class Settings(Config):
    """What a picture depends on besides model, prompt, sources and seed.  null: the pipeline's own default."""

    num_inference_steps: Annotated[int, Ge(1), Le(1000)] | None = None
    """Steps; null: 25 for the miniature."""
    guidance_scale: Annotated[float, Ge(0), Le(100)] | None = None
    """Guidance; 1 is none, but for guidance-distilled models; null: 2 for the miniature."""
    height: Annotated[int, Ge(8), Le(4096)] | None = None
    """Height of the picture in pixels; null: 32 for the miniature."""
    width: Annotated[int, Ge(8), Le(4096)] | None = None
    """Width of the picture in pixels; null: 32 for the miniature."""
    strength: Annotated[float, Gt(0), Le(1)] | None = None
    """How much of a source an image-to-image edit (SD3, FLUX.1) redraws: 1 is all of it."""
    negative_prompt: str | None = None
    """What not to draw, for the families that take it (SD3, Qwen-Image-Edit)."""

    def over(self, other: "Settings") -> "Settings":
        """These settings, and those of `other` where these have none."""
        fields = set(Settings.model_fields)
        return Settings(**other.model_dump(include=fields) | self.model_dump(include=fields, exclude_none=True))


class PipelineConfig(Settings):
    """A diffusers pipeline on this machine."""

    kind: Literal["pipeline"] = "pipeline"
    ref: str = MINIATURE
    """The model: `builtin:shapes/generator`, a folder, or `org/name@revision`; safetensors only."""
    lora: str | None = None
    """An adapter laid over it: a file or folder that `flowbp export` wrote, or any that diffusers loads."""
    lora_weight: Annotated[float, Ge(-10), Le(10)] = 1.0
    """Factor of the adapter."""
    max_references: Annotated[int, Ge(0), Le(16)] = 1
    """How many pictures an edit may be given, up to what the family takes; 0: text to image only."""
    reference_scale: Annotated[int, Ge(1), Le(16)] | None = None
    """Factor by which references are enlarged; null: the smallest that the pipeline accepts (FLUX.2: 64 pixels)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic; auto: bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; auto: the first GPU, else the CPU."""
    max_batch: Annotated[int, Ge(1), Le(256)] = 16
    """Most pictures drawn at once; halved where memory runs out."""


@dataclass(frozen=True)
class Family:
    """How a pipeline class wants to be called.

    edit: `references` (several for one picture, each its own position), `reference` (one per prompt), `alone` (one
    prompt per call), `image` (another pipeline, `img2img`, starts from the noised source).  guidance: its argument.
    negative: the negative prompt without which it has no guidance; None: it takes none.  canvas: it cannot draw without
    a picture and is given a white one.
    """

    edit: Literal["references", "reference", "alone", "image"]
    max_references: int = 1
    guidance: str = "guidance_scale"
    negative: str | None = None
    canvas: bool = False
    img2img: str = ""


FAMILIES: Mapping[str, Family] = {
    "Flux2KleinPipeline": Family("references", 10),
    "Flux2Pipeline": Family("references", 10),
    "FluxKontextPipeline": Family("reference"),
    "QwenImageEditPipeline": Family("alone", 1, "true_cfg_scale", " ", canvas=True),
    "QwenImageEditPlusPipeline": Family("alone", 3, "true_cfg_scale", " ", canvas=True),
    "StableDiffusion3Pipeline": Family("image", negative="", img2img="StableDiffusion3Img2ImgPipeline"),
    "FluxPipeline": Family("image", img2img="FluxImg2ImgPipeline"),
}
"""Families by the pipeline class that a folder's model_index.json names."""


class Painter:
    """A loaded pipeline: `draw` makes the pictures of like jobs in one call.  For one thread at a time."""

    def __init__(self, config: PipelineConfig) -> None:
        """Raises UserError for a model or adapter that cannot be had, or settings that its family does not take."""
        self.config = config
        folder = hub.resolve(config.ref)
        self.name, self.family = _family(config.ref, folder)
        if config.max_references > self.family.max_references:
            raise UserError(
                f"generator.max_references {config.max_references}: {self.name} takes {self.family.max_references} "
                "at most"
            )
        defaults = Settings(num_inference_steps=12, guidance_scale=2.0, height=32, width=32)
        self.settings = config.over(defaults if config.ref == MINIATURE else Settings())
        self.check(self.settings)
        self._device = device_of(config.device)
        self._dtype = dtype_of(config.dtype, self._device)
        self._pipe = _load(self.name, folder, self._dtype, self._device)
        files = [folder]
        if config.lora is not None:
            files.append(lay_over(self._pipe, config.lora, config.lora_weight))
        self._editor = self._pipe
        if self.family.edit == "references":
            self._pipe.prepare_image_latents = shared_out(self._pipe.prepare_image_latents)
        if self.family.edit == "image":
            self._editor = _class(self.family.img2img)(**self._pipe.components)
            self._editor.set_progress_bar_config(disable=True)
        self._fingerprint = fingerprint(files)
        self._most = config.max_batch

    @property
    def params(self) -> dict[str, Any]:
        """Everything that pictures depend on, as JSON."""
        chosen = self.config.model_dump(mode="json", include={"lora", "lora_weight", "reference_scale"})
        found = {"dtype": str(self._dtype).removeprefix("torch."), "weights": self._fingerprint}
        return self.settings.model_dump(mode="json") | chosen | found

    def check(self, settings: Settings) -> None:
        """Raises UserError for settings that the family does not take."""
        if settings.negative_prompt is not None and self.family.negative is None:
            raise UserError(f"negative_prompt: {self.name} takes none; leave it null")
        if settings.strength is not None and self.family.edit != "image":
            raise UserError(f"strength: {self.name} edits by reference and takes none; leave it null")

    def like(self, job: Job) -> tuple[tuple[int, int], ...]:
        """Jobs of equal `like` can share a call: as many sources, of the same sizes."""
        return tuple(source.image.size for source in job.sources)

    def draw(self, jobs: Sequence[Job], settings: Settings | None = None) -> list[Picture | PartFailed]:
        """A picture, or why there is none, for each of some like jobs.

        settings: over those of the configuration.  A picture does not depend on which others share its call.  Where
        memory runs out, the call is repeated with half as many, and so are later ones; where one job fails, the others
        go on without it.
        """
        chosen = self.settings if settings is None else settings.over(self.settings)
        if len(jobs) > self._most:
            return [one for i in range(0, len(jobs), self._most) for one in self.draw(jobs[i : i + self._most], chosen)]
        try:
            return [Picture.of(image) for image in self._call(jobs, chosen)]
        except PartFailed as error:
            failure = error
        except Exception as error:
            kind: FailureKind = "out_of_memory" if out_of_memory(error) else "broken"
            failure = PartFailed(kind, f"{self.config.ref}: {type(error).__name__}: {http.line(str(error))}")
            failure.__cause__ = error if kind == "broken" else error.with_traceback(None)  # whose frames hold tensors
        half = (len(jobs) + 1) // 2
        if failure.kind == "out_of_memory":
            self._most = half
            self._free()
        if len(jobs) == 1:
            return [failure]
        return self.draw(jobs[:half], chosen) + self.draw(jobs[half:], chosen)

    def close(self) -> None:
        """Let go of the model."""
        self._pipe = self._editor = None
        self._free()

    def _call(self, jobs: Sequence[Job], settings: Settings) -> list[Image.Image]:
        import torch

        if self.family.edit == "alone" and len(jobs) > 1:
            return [image for job in jobs for image in self._call([job], settings)]
        options = self._options(settings)
        options["prompt"] = [job.prompt for job in jobs] if self.family.edit != "alone" else jobs[0].prompt
        options["generator"] = [torch.Generator().manual_seed(job.seed) for job in jobs]
        references = [[self._reference(source) for source in job.sources] for job in jobs]
        if not jobs[0].sources:
            if self.family.canvas:
                options["image"] = Image.new("RGB", (settings.width or 1024, settings.height or 1024), "white")
            return self._pipe(**options).images
        if self.family.edit == "image" and settings.strength is not None:
            options["strength"] = settings.strength
        images = [image for one in references for image in one]
        options["image"] = images[0] if len(images) == 1 else images
        return self._editor(**options).images

    def _options(self, settings: Settings) -> dict[str, Any]:
        """Arguments of the pipeline that all jobs of a call share."""
        found: dict[str, Any] = {
            "num_inference_steps": settings.num_inference_steps,
            self.family.guidance: settings.guidance_scale,
            "height": settings.height,
            "width": settings.width,
        }
        if self.family.negative is not None:
            given = settings.negative_prompt
            found["negative_prompt"] = self.family.negative if given is None else given
        if self.family.edit == "reference" and settings.height and settings.width:
            found["max_area"] = settings.height * settings.width
        if self.name == "Flux2KleinPipeline":
            found |= klein_text(self._pipe)
        return {name: value for name, value in found.items() if value is not None}

    def _reference(self, picture: Picture) -> Image.Image:
        image, scale = picture.image, self.config.reference_scale
        if scale is None:
            scale = -(-SMALLEST_REFERENCE // min(image.size)) if self.family.edit == "references" else 1
        if image.width * image.height * scale**2 > MAX_REFERENCE_PIXELS:
            size = f"{image.width}x{image.height}"
            raise PartFailed("refused", f"a reference of {size} pixels, enlarged {scale} times, is too large")
        return enlarge(image, scale)

    def _free(self) -> None:
        if self._device.type == "cuda":
            import torch

            gc.collect()
            torch.cuda.empty_cache()


class PipelineGenerator:
    """A diffusers pipeline whose waiting jobs are drawn together."""

    def __init__(self, config: PipelineConfig, on_batch: Callable[[int], None] = lambda size: None) -> None:
        """on_batch: told how many jobs each batch has.  Raises UserError as `Painter`."""
        self._painter = painter = Painter(config)
        self._settings = painter.settings

        def draw(items: Sequence[tuple[Job, Settings]]) -> list[Picture | PartFailed]:
            on_batch(len(items))
            return painter.draw([job for job, _ in items], items[0][1])

        self._batcher: Batcher[tuple[Job, Settings], Picture] = Batcher(
            draw, config.max_batch, lambda item: (painter.like(item[0]), item[1])
        )

    @property
    def id(self) -> str:
        """The model's reference."""
        return self._painter.config.ref

    @property
    def params(self) -> Mapping[str, Any]:
        """Settings, adapter, and a fingerprint of the files."""
        return self._painter.params | self._settings.model_dump(mode="json")

    @property
    def max_sources(self) -> int:
        """`max_references`."""
        return self._painter.config.max_references

    def with_params(self, settings: Settings) -> "PipelineGenerator":
        """The same generator, model and batches with `settings` over its own.

        Raises UserError for settings that the family does not take.
        """
        self._painter.check(settings)
        other = copy.copy(self)
        other._settings = settings.over(self._settings)
        return other

    async def generate(self, job: Job) -> Picture:
        """The picture.  Raises PartFailed: refused (too many sources), out_of_memory, broken."""
        if len(job.sources) > self.max_sources:
            raise PartFailed("refused", f"{self.id} was given {len(job.sources)} pictures, takes {self.max_sources}")
        return await self._batcher((job, self._settings))

    async def close(self) -> None:
        """Let go of the model, once it is idle."""
        await self._batcher.close()
        self._painter.close()


def _family(ref: str, folder: Path) -> tuple[str, Family]:
    """Class name and family of a folder."""
    index = folder / "model_index.json"
    content = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    name = str(content.get("_class_name", "folder without model_index.json"))
    if name not in FAMILIES:
        raise UserError(f"{ref}: cannot draw with a {name}{nearest(name, FAMILIES)}; allowed: {', '.join(FAMILIES)}")
    return name, FAMILIES[name]


def _class(name: str) -> "type[DiffusionPipeline]":
    import diffusers

    return getattr(diffusers, name)


def _load(name: str, folder: Path, dtype: "torch.dtype", device: "torch.device") -> "DiffusionPipeline":
    """The pipeline.  No code of the folder is run."""
    kind = _class(name)
    absent = {part: None for part, value in kind.load_config(folder).items() if value in ([None, None], (None, None))}
    try:
        pipe = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True, **absent).to(
            device
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder}: not a {name} that can be loaded ({' '.join(str(error).split())[:300]})") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def klein_text(pipe: "DiffusionPipeline") -> dict[str, Any]:
    """What FLUX.2-klein is told of its text encoder: the tokens it takes and the layers that are read."""
    return {
        "max_sequence_length": min(512, pipe.tokenizer.model_max_length),
        "text_encoder_out_layers": text_layers(pipe.text_encoder.config, pipe.transformer.config.joint_attention_dim),
    }


def shared_out(prepare: Callable[..., "tuple[torch.Tensor, torch.Tensor]"]) -> "Callable[..., Any]":
    """FLUX.2's own step from references to tokens and positions, for several prompts with references of their own.

    The pipeline gives every prompt all references.  Here the first prompt gets the first of equally many, and so on, as
    if each had been drawn alone.  Every prompt must have equally many, of the same sizes.
    """
    import torch

    def prepared(images: "Sequence[torch.Tensor]", batch_size: int, **rest: Any) -> "tuple[torch.Tensor, torch.Tensor]":
        count = len(images) // batch_size
        own = (images[i * count : (i + 1) * count] for i in range(batch_size))
        tokens, positions = zip(*(prepare(images=list(few), batch_size=1, **rest) for few in own), strict=True)
        return torch.cat(tokens), torch.cat(positions)

    return prepared


def lay_over(pipe: "DiffusionPipeline", ref: str, weight: float) -> Path:
    """Add an adapter to the pipeline's own weights; its file.  Raises UserError where it does not fit as a whole."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    file, name = _adapter_file(hub.resolve(ref)), type(pipe).__name__
    try:
        keys = pipe.lora_state_dict(file.parent, weight_name=file.name)
        pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name="adapter")
    except (RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"lora {ref}: does not fit {name} ({' '.join(str(error).split())[:300]})") from error
    wanted = {key.partition(".lora_A.")[0] for key in keys if key.startswith("transformer.") and ".lora_A." in key}
    found = {
        f"transformer.{layer}" for layer, part in pipe.transformer.named_modules() if isinstance(part, BaseTunerLayer)
    }
    if not wanted or wanted - found:
        lost = sorted(wanted - found)[:2] or "none of its layers"
        raise UserError(f"lora {ref}: does not fit {name}, which has no {lost}; take one that was made for it")
    pipe.fuse_lora(lora_scale=weight)
    pipe.unload_lora_weights()
    return file


def _adapter_file(path: Path) -> Path:
    if path.is_file():
        return path
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise UserError(f"lora {path}: has {len(files)} *.safetensors files; give the one to use")
    return files[0]


def fingerprint(paths: Sequence[Path]) -> str:
    """Of the names, sizes and times of all files in some folders and files: changes where the model was changed."""
    digest = sha256()
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                about = file.stat()
                digest.update(f"{file.relative_to(path.parent)} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
