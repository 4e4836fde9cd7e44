"""Whether the settings of a model's parts fit each other, and the libraries know them."""

import inspect
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imgen_common.errors import UserError, one_line, warn_once
from imgen_common.weights import QUANTIZED, read_json

OLD_SETTINGS = ("pooled_projection_dim", "force_upcast", QUANTIZED[0])
"""Keys of published files of Qwen-Image and FLUX.2 that their classes have no more, and that of quantized weights."""
PATCHES = (("patch_size",) * 2, ("merge_size", "spatial_merge_size"), ("temporal_patch_size",) * 2)
"""Settings of the image processor, and of the vision tower in config.json, that must agree where patches are merged:
other processors have a patch_size of another form, or of another meaning."""


def check_autoencoder(ref: str, folder: Path) -> None:
    """Raises UserError unless an autoencoder's config.json has the numbers by which latents are scaled and shifted.

    diffusers fills one that is missing with that of Stable Diffusion 1, or with none.
    """
    settings = read_json(folder / "vae" / "config.json", folder)
    for name, above in (("scaling_factor", 0.0), ("shift_factor", -math.inf)):
        value = settings.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not above < value < math.inf:
            shown = one_line(json.dumps(value), 40) if name in settings else "is missing"
            what = "a number above 0" if name == "scaling_factor" else "a number"
            raise UserError(f"{ref}: vae/config.json {name} {shown}: must be {what}; copy that file again")


def check_channels(transformer: Mapping[str, Any], autoencoder: Mapping[str, Any], pixels: int, where: str) -> None:
    """Raises UserError where a transformer does not read what an autoencoder makes, by the configurations of both.

    pixels: of the latents, whose channels the transformer is given as one token; 1: those of one, which it puts
    together itself.
    """
    read, made = transformer["in_channels"], autoencoder.get("latent_channels") or autoencoder.get("z_dim")
    if made is not None and read != pixels * made:
        raise UserError(
            f"{where}the transformer reads {read} channels, and the autoencoder has {made} of its own, which makes "
            f"{pixels * made}; copy transformer/ and vae/ from one place"
        )


def check_patches(image_processor: Any, folder: Path, ref: str) -> None:
    """Raises UserError unless images are cut as the vision tower reads them."""
    tower = read_json(folder / "config.json", folder).get("vision_config") or {}
    for name, theirs in PATCHES if hasattr(image_processor, "merge_size") else ():
        given, read = getattr(image_processor, name, None), tower.get(theirs)
        if None not in (given, read) and given != read:
            raise UserError(
                f"{ref}: its image processor has {name} {given}, its vision tower {theirs} {read}; copy "
                "preprocessor_config.json and config.json from one place"
            )


def warn_of_unknown_settings(folder: Path) -> None:
    """Warns of what a diffusers folder sets for its networks and its scheduler that the installed release does not know
    and so ignores, unless an earlier release wrote it."""
    import diffusers

    index, installed = read_json(folder / "model_index.json"), diffusers.__version__
    for part, name in (("transformer", "config.json"), ("vae", "config.json"), ("scheduler", "scheduler_config.json")):
        entry, file = index.get(part), folder / part / name
        kind = getattr(diffusers, str(entry[-1]), None) if isinstance(entry, list) and entry else None
        settings = read_json(file, folder) if kind is not None and file.exists() else {}
        versions = (settings.get("_diffusers_version", installed), installed)
        made_by, here = ([int(number) for number in re.findall(r"\d+", str(text))[:2]] for text in versions)
        known = {*OLD_SETTINGS, *(() if kind is None else inspect.signature(kind).parameters)}
        unknown = [key for key, value in settings.items() if value and key[:1] != "_" and key not in known]
        if unknown and made_by >= here:
            warn_once(
                f"{file}: the installed diffusers {installed} does not know {one_line(', '.join(unknown))} and ignores "
                "it; perhaps the model is of a newer release: pip install -U diffusers"
            )
