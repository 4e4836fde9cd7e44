"""Published models and their licenses, as their pages state them; a model that is not here must be looked up."""

import re
from typing import NamedTuple

KNOWN_LICENSES = (
    (r"black-forest-labs/FLUX\.2-klein-(base-)?4B", "Apache-2.0"),
    (r"black-forest-labs/FLUX\.2-klein-(base-)?9B", "FLUX non-commercial"),
    (r"black-forest-labs/FLUX\.2-dev", "FLUX non-commercial"),
    (r"black-forest-labs/FLUX\.1-(Kontext-)?dev", "FLUX.1-dev non-commercial"),
    (r"black-forest-labs/FLUX\.1-schnell", "Apache-2.0"),
    (r"Tongyi-MAI/Z-Image(-Turbo)?", "Apache-2.0"),
    (r"krea/Krea-2-(Raw|Turbo)", "Krea 2 Community"),
    (r"Qwen/Qwen-Image(-2512|-Edit|-Edit-2509|-Edit-2511)?", "Apache-2.0"),
    (r"Qwen/Qwen-Image-2\.1", "Qwen Research"),
    (r"stabilityai/stable-diffusion-3(\.5)?-.*", "Stability AI Community"),
    (r"builtin:shapes/.*", "Apache-2.0"),
)


def name_of(ref: str) -> str:
    """A model reference without its revision; for a folder in the hub's cache the `org/name` that it is a copy of."""
    cached = re.findall(r"(?:^|/)models--([\w.-]+?)--([\w.-]+)", ref)
    return "/".join(cached[-1]) if cached else ref.split("@")[0]


def license_of(ref: str) -> str:
    """The license of a model reference, whatever the revision, or a text that says that it is not known."""
    known = [license for form, license in KNOWN_LICENSES if re.fullmatch(form, name_of(ref))]
    return known[0] if known else "not known; see the model's own page, or whoever made the folder"


class PublishedModel(NamedTuple):
    """A model that can be trained.

    pipeline: class of its pipeline.  billions: parameters of its transformer / 1e9.  lora_gb: memory of one GPU for
    which configs/flowbp has a recipe with adapters; None: it has none.
    """

    ref: str
    pipeline: str
    billions: float
    lora_gb: int | None = None


PUBLISHED = (
    PublishedModel("stabilityai/stable-diffusion-3.5-medium", "StableDiffusion3Pipeline", 2.24, 24),
    PublishedModel("black-forest-labs/FLUX.2-klein-base-4B", "Flux2KleinPipeline", 3.88, 24),
    PublishedModel("Tongyi-MAI/Z-Image", "ZImagePipeline", 6.15, 32),
    PublishedModel("Qwen/Qwen-Image-2.1", "QwenImage21Pipeline", 7.12, 40),
    PublishedModel("black-forest-labs/FLUX.2-klein-base-9B", "Flux2KleinPipeline", 9.08),
    PublishedModel("black-forest-labs/FLUX.1-dev", "FluxPipeline", 11.90),
    PublishedModel("black-forest-labs/FLUX.1-Kontext-dev", "FluxKontextPipeline", 11.90),
    PublishedModel("krea/Krea-2-Raw", "Krea2Pipeline", 12.82, 48),
    PublishedModel("Qwen/Qwen-Image", "QwenImagePipeline", 20.43, 80),
    PublishedModel("Qwen/Qwen-Image-Edit", "QwenImageEditPipeline", 20.43, 80),
    PublishedModel("Qwen/Qwen-Image-Edit-2511", "QwenImageEditPlusPipeline", 20.43),
    PublishedModel("black-forest-labs/FLUX.2-dev", "Flux2Pipeline", 32.22, 141),
)
"""Models whose sizes are known here; others of the same families can be trained too."""
