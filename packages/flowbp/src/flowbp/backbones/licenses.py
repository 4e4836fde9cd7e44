"""Licenses of published models, as their pages state them; a model that is not here must be looked up."""

import re

KNOWN_LICENSES = (
    (r"black-forest-labs/FLUX\.2-klein-(base-)?4B", "Apache-2.0"),
    (r"black-forest-labs/FLUX\.2-klein-(base-)?9B", "FLUX non-commercial"),
    (r"black-forest-labs/FLUX\.2-dev", "FLUX non-commercial"),
    (r"black-forest-labs/FLUX\.1-dev", "FLUX.1-dev non-commercial"),
    (r"black-forest-labs/FLUX\.1-schnell", "Apache-2.0"),
    (r"Tongyi-MAI/Z-Image(-Turbo)?", "Apache-2.0"),
    (r"Qwen/Qwen-Image(-2512)?", "Apache-2.0"),
    (r"stabilityai/stable-diffusion-3(\.5)?-.*", "Stability AI Community"),
    (r"builtin:shapes/.*", "Apache-2.0"),
)


def license_of(ref: str) -> str:
    """The license of a model reference, whatever the revision, or a text that says that it is not known."""
    known = [license for form, license in KNOWN_LICENSES if re.fullmatch(form, ref.split("@")[0])]
    return known[0] if known else "not known; see the model's own page"
