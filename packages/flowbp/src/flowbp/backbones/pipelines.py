"""What the families share: diffusers pipelines from folders, image sizes, noise levels, decoding."""

import copy
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from flowbp.core.settings import GuidanceRescale, NoiseLevels
from flowbp.core.types import Cond, Layout
from imgen_common import hub
from imgen_common.errors import UserError, one_line
from imgen_common.hub.settings import check_channels
from imgen_common.prompt_limits import PromptLimit, check_vocabularies, prompt_limits, text_encoder_names
from imgen_common.weights import loading, read_json

LEVEL_TOLERANCE = 1e-5
"""By how much rounding may lift a noise level above 1."""
P = TypeVar("P", bound=DiffusionPipeline)
EULER = "FlowMatchEulerDiscreteScheduler"
"""The one scheduler that is sampled; its other options only choose the noise levels, which it computes itself."""
NOT_SAMPLED = ("stochastic_sampling", "invert_sigmas")
"""Options of it that change the steps themselves, or their direction: refused."""
OPTION_KINDS = {
    bool: ("true or false", (bool,)),
    int: ("a whole number", (int,)),
    float: ("a number", (int, float)),
    str: ("a text", (str,)),
}
"""By the type of its options' defaults: what they are in words, and which types they may have."""
RESPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
"""Options of it that replace the noise levels it is given."""


def load_pipeline(
    kind: type[P],
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
    net_device: torch.device | str | None = None,
) -> P:
    """A frozen pipeline in `dtype` (float32 by default), every network in eval mode.  No code of the folder is run.

    net_device: where the transformer goes, if not to `device`; on "meta" its weights are not read.
    """
    dtype, given = dtype or torch.float32, {}
    if net_device == "meta":
        empty = _empty_component(folder / "transformer", *kind.load_config(folder)["transformer"])
        given["transformer"] = empty.to(dtype)
    with loading(f"{folder}: not a {kind.__name__} that can be loaded"):
        given |= hub.load_networks(folder, skip=tuple(given), dtype=dtype)
        pipe = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True, **given)
    check_vocabularies(pipe.components, str(folder))
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            where = device if net_device is None or name != "transformer" else net_device
            part.to(where).eval().requires_grad_(False)
    return pipe


def load_transformer(kind: type[P], folder: Path, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """The transformer of a folder alone, frozen."""
    skip = [name for name in kind.load_config(folder) if name != "transformer"]
    with loading(f"{folder}: not a {kind.__name__} that can be loaded"):
        net = hub.load_networks(folder, skip=skip, dtype=dtype)["transformer"]
    return net.to(device).eval().requires_grad_(False)


def check_scheduler(ref: str, folder: Path, entry: object) -> None:
    """Raises UserError unless the steps of a pipeline's scheduler are those that are taken here.

    entry: of the scheduler in model_index.json.
    """
    if entry != ["diffusers", EULER]:
        name = entry[-1] if isinstance(entry, list) and entry else entry
        raise UserError(
            f"{ref}: scheduler {name}: only {EULER} is sampled exactly; name that one in model_index.json and in "
            "scheduler/scheduler_config.json if the model was trained with it"
        )
    settings = read_json(folder / "scheduler" / "scheduler_config.json", folder)
    for field, parameter in signature(FlowMatchEulerDiscreteScheduler).parameters.items():
        what, kinds = OPTION_KINDS.get(type(parameter.default), ("", ()))
        value = settings.get(field)
        if kinds and value is not None and type(value) not in kinds:
            shown = one_line(json.dumps(value), 40)
            raise UserError(f"{ref}: scheduler/scheduler_config.json {field} {shown}: must be {what}; correct it")
    for field in NOT_SAMPLED:
        if settings.get(field):
            raise UserError(f"{ref}: scheduler/scheduler_config.json {field} true: is not sampled; set it to false")
    if settings.get("use_beta_sigmas") and find_spec("scipy") is None:
        raise UserError(f"{ref}: scheduler/scheduler_config.json use_beta_sigmas: needs scipy; pip install scipy")


def init_empty_pipeline(kind: type[P], folder: Path) -> P:
    """The pipeline of a folder with every weight on the meta device; only its JSON files are read."""
    with loading(f"{folder}: not a {kind.__name__} that can be loaded"):
        parts = {
            name: _empty_component(folder / name, *value)
            if isinstance(value, list | tuple) and len(value) == 2 and not isinstance(value[0], int)
            else value
            for name, value in kind.load_config(folder).items()
            if not name.startswith("_")
        }
        pipe = kind(**parts)
    check_vocabularies(pipe.components, str(folder))
    return pipe


def _empty_component(folder: Path, library: str | None, name: str | None) -> Any:
    if library is None or name is None:
        return None
    kind = getattr(importlib.import_module(library), name, None)
    if kind is None:
        raise UserError(
            f"{folder}: the installed {library} has no {name}; install the release the folder was made with"
        )
    with loading(f"{folder}: not a {name} that can be loaded"):
        with torch.device("meta"):
            if issubclass(kind, ModelMixin):
                return kind.from_config(kind.load_config(folder))
            if issubclass(kind, PreTrainedModel):
                return kind(AutoConfig.from_pretrained(folder))
        return kind.from_pretrained(folder)


def autocast(x: Tensor, bfloat16: bool) -> torch.autocast:
    """A context in which matrices are multiplied in bfloat16 where asked for; norms, times and sums stay float32."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16)


class PipelineBackbone(ABC):
    """What the families' adapters share: a diffusers pipeline whose transformer is trained (see `Backbone`)."""

    max_tokens = 512
    """Tokens to which the longest-reading text encoder pads and cuts a prompt: by default as the pipeline does."""
    min_sources = 0
    """Source images that every prompt must have; 0: it may have none."""
    max_sources = 0
    """Source images that an edit may have; 0: the family cannot edit."""
    reads_sources = False
    """Whether the text encoder sees the sources: then `encode_edit` embeds, otherwise `encode`."""
    embedded_guidance = 3.5
    """Guidance input of a guidance-distilled network, unless another is set: the pipeline's own default."""
    guidance_rescale: GuidanceRescale = "none"
    """What becomes of a guided velocity: by default as in the pipeline."""
    guidance_kind: ClassVar[str] = "classifier-free"
    """How its images are guided, in words."""
    pixels_per_token: ClassVar[int] = 4
    """Pixels of the latents whose channels the transformer is given as one; 1: those of one, which it puts together."""

    def __init__(self, pipe: Any) -> None:
        """Raises UserError where the transformer does not read what the autoencoder makes."""
        check_channels(pipe.transformer.config, pipe.vae.config, self.pixels_per_token, "")
        self.pipe, self.net, self.bfloat16 = pipe, pipe.transformer, False

    @property
    def unused_layers(self) -> tuple[str, ...]:
        """Names of layers of the network that no image depends on, and that hence get no gradient."""
        return ()

    def set_max_tokens(self, length: int) -> None:
        """Sets `max_tokens`.  Raises UserError where the text encoder does not read so many."""
        self.max_tokens = length

    def guidance_input(self, sigma: Tensor) -> Tensor | None:
        """What a guidance-distilled network is given beside noise levels; None for others."""
        embeds = self.pipe.transformer.config.guidance_embeds
        return torch.full_like(sigma, self.embedded_guidance) if embeds else None

    def pipeline_guidance(self, scale: float) -> float:
        """What the pipeline's own `guidance_scale` (or `true_cfg_scale`) must be for guidance at `scale` here."""
        return scale

    @abstractmethod
    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(c, h, w) for images of `size` (height, width) pixels."""

    def source_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) to which a source image of `size` is brought.  Raises UserError where it cannot be."""
        raise self._cannot_edit()

    def prepare_source(self, image: Image.Image) -> Float[Tensor, "1 3 h w"]:
        """What `encode_source` takes.  Raises UserError as `source_size`."""
        raise self._cannot_edit()

    def encode_edit(self, instruction: str, sources: Sequence[Image.Image]) -> Cond:
        """Conditioning of one instruction, (1, ...), whose sources the text encoder sees."""
        raise self._cannot_edit()

    def source_text_tokens(self, size: tuple[int, int]) -> int:
        """Tokens of text that stand for a source, prepared at `size`; 0 where the text encoder does not see it."""
        return 0

    @torch.no_grad()
    def encode_source(self, pixels: Float[Tensor, "1 3 h w"]) -> Float[Tensor, "c rows columns"]:
        """Latents of a prepared source image, one token in each place: the pipeline's, normalized as it does."""
        vae = self.pipe.vae
        latents: Tensor = self.pipe._encode_vae_image(pixels.to(vae.device, vae.dtype), generator=None)
        return latents[0]

    def velocity_of_layout(self, x: Tensor, sigma: Tensor, cond: Cond, layout: Layout) -> Tensor:
        """`velocity` of samples that all have sources of one layout."""
        raise self._cannot_edit()

    def _cannot_edit(self) -> UserError:
        return UserError(
            f"{type(self.pipe).__name__} cannot edit; take out the images (data.images=null reads none), or train a "
            "family that can (flowbp families)"
        )

    @abstractmethod
    def shift(self, steps: int, size: tuple[int, int]) -> float | None:
        """The `mu` of the scheduler's shift for so many steps and this size; None where its shift is fixed."""

    def has_linear_levels(self) -> bool:
        """Whether the pipeline itself starts from linspace(1, 1/N, N), and not from the scheduler's own spacing."""
        return not self.pipe.scheduler.config.get("use_flow_sigmas")

    def linear_levels(self, steps: int) -> list[float]:
        """From 1 to 1/steps, before any shift."""
        return np.linspace(1.0, 1 / steps, steps).tolist()

    def sigmas(self, steps: int, size: tuple[int, int], levels: NoiseLevels = "pipeline") -> Float[Tensor, " n_plus_1"]:
        """Noise levels, shifted as the scheduler says, then 0.

        levels: `pipeline`, those at which the pipeline samples; `linear`, linspace(1, 1/N, N) before the shift, on
        which the code of FlowBP (arXiv 2606.11075) trains.  The two differ for SD3.5 only, whose last level at 25 steps
        is 0.0089 or 0.111.  Raises UserError for `linear` with a scheduler that spaces its levels anew.
        """
        linear = levels == "linear"
        respaced = [key for key in RESPACED if self.pipe.scheduler.config.get(key)] if linear else []
        if respaced:
            raise UserError(
                f"train_sigmas linear: the model's scheduler has {respaced[0]}, which spaces noise levels anew; "
                "set train_sigmas to pipeline"
            )
        given = self.linear_levels(steps) if linear or self.has_linear_levels() else None
        return noise_levels(self.pipe.scheduler, steps, given, self.shift(steps, size))

    def noise(self, batch: int, size: tuple[int, int], rng: torch.Generator) -> Float[Tensor, "b c h w"]:
        """Standard normal float32 latents, drawn as the pipeline draws them."""
        return torch.randn(batch, *self.latent_shape(size), generator=rng, device=rng.device)

    def decode(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 height width"]:
        """Images in [0, 1], differentiable (but for the clamp)."""
        config = self.pipe.vae.config
        return decode(self.pipe.vae, x / config.scaling_factor + config.shift_factor)

    def prompt_limits(self) -> dict[str, PromptLimit]:
        """How much of a prompt each text encoder reads, by its name; before they are unloaded."""
        return prompt_limits(self.pipe, self.max_tokens)

    def unload_text_encoders(self) -> None:
        """Removes the text encoders; `encode` does not work afterwards."""
        for name in text_encoder_names(self.pipe):
            setattr(self.pipe, name, None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def grid_size(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Rows and columns of `patch` x `patch` pixels in an image.  Raises UserError where they do not divide it."""
    if size[0] % patch or size[1] % patch or min(size) < patch:
        raise UserError(f"image size {size[0]}x{size[1]}: height and width must be multiples of {patch}")
    return size[0] // patch, size[1] // patch


def noise_levels(
    scheduler: FlowMatchEulerDiscreteScheduler, steps: int, sigmas: list[float] | None, mu: float | None
) -> Float[Tensor, " n_plus_1"]:
    """The scheduler's own levels, shifted as it says: from `sigmas`, or from its own spacing where that is None.

    Raises UserError unless they fall from at most 1 to 0.
    """
    scheduler = copy.deepcopy(scheduler)
    with loading("scheduler/scheduler_config.json: cannot be used"), np.errstate(all="ignore"):
        scheduler.set_timesteps(steps, sigmas=sigmas, mu=mu)
        levels = scheduler.sigmas.float().cpu()
    if not (levels.isfinite().all() and levels[0] <= 1 + LEVEL_TOLERANCE and (levels.diff() < 0).all()):
        raise UserError(
            f"scheduler/scheduler_config.json: the {steps} noise levels do not fall from at most 1 to 0: "
            f"{levels[:3].tolist()} ...; correct its shift and sigmas"
        )
    return levels


def flux_time(scheduler: FlowMatchEulerDiscreteScheduler, sigma: Tensor) -> Tensor:
    """What FLUX's transformers get for a noise level: their pipelines divide the scheduler's time by 1000."""
    unit = scheduler.config.num_train_timesteps / 1000
    return sigma if unit == 1 else sigma * unit


def resolution_shift(scheduler: FlowMatchEulerDiscreteScheduler, tokens: int) -> float:
    """The shift `mu` for images of so many tokens, as the pipelines compute it."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    known = scheduler.config
    points = (known.base_image_seq_len, known.max_image_seq_len, known.base_shift, known.max_shift)
    names = "base_image_seq_len, max_image_seq_len, base_shift, max_shift"
    with loading(f"scheduler/scheduler_config.json: {names} cannot be {points}"):
        return float(calculate_shift(tokens, *points))


def decode(vae: Any, latents: Float[Tensor, "b c *t h w"]) -> Float[Tensor, "b channels *t height width"]:
    """Images, or t frames, in [0, 1] of the autoencoder's own latents, float32 or finer, differentiable (but for the
    clamp): three colors and, of some autoencoders, opacity.  vae: of diffusers, or what decodes as one."""
    images = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    return (images.to(torch.promote_types(images.dtype, torch.float32)) / 2 + 0.5).clamp(0, 1)


def positions(device: torch.device, *axes: int) -> Int[Tensor, "tokens axes"]:
    """Integer coordinates of all tokens of a box, row-major.  bfloat16 would merge those above 256."""
    return torch.cartesian_prod(*(torch.arange(n, device=device) for n in axes)).view(-1, len(axes))
