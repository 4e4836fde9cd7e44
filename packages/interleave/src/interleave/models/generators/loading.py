"""The diffusers pipelines that can be generators: how they are called, loaded, adapted and prepared for batches."""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from imgen_common import hub
from imgen_common.console import quiet_libraries
from imgen_common.errors import UserError, nearest, one_line
from imgen_common.hub.adapters import check_plain_start, parse_adapter_key
from imgen_common.hub.settings import check_autoencoder, check_channels, warn_of_unknown_settings
from imgen_common.prompt_limits import check_vocabularies, text_encoder_names, text_layers
from imgen_common.weights import ADAPTER_CONFIG, loading, read_json

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class PipelineFamily:
    """How a pipeline class wants to be called.

    edit: `references` (several for one image, each its own position), `reference` (one per prompt), `alone` (one prompt
    per call), `image` (another pipeline, `img2img`, starts from the noised source), `none` (no edits).  guidance: its
    argument.
    pixels_per_token: of the latents, whose channels its transformer reads as one token; 1: it puts them together.
    negative: the negative prompt without which it has no guidance; None: it takes none.  needs_image: it cannot
    generate without an image and is given a white one.  has_length: it takes the number of tokens that are read,
    at most `max_length`.
    """

    edit: Literal["references", "reference", "alone", "image", "none"]
    max_references: int = 1
    guidance: str = "guidance_scale"
    pixels_per_token: int = 4
    negative: str | None = None
    needs_image: bool = False
    has_length: bool = True
    max_length: int = 1024
    img2img: str = ""


FAMILIES: Mapping[str, PipelineFamily] = {
    "Flux2KleinPipeline": PipelineFamily("references", 10),
    "Flux2Pipeline": PipelineFamily("references", 10),
    "FluxKontextPipeline": PipelineFamily("reference", max_length=512),
    "QwenImageEditPipeline": PipelineFamily("alone", 1, "true_cfg_scale", negative=" ", needs_image=True),
    "QwenImageEditPlusPipeline": PipelineFamily("alone", 3, "true_cfg_scale", negative=" ", needs_image=True),
    "QwenImage21Pipeline": PipelineFamily(
        "alone", 0, "true_cfg_scale", pixels_per_token=1, negative=" ", has_length=False
    ),
    "Krea2Pipeline": PipelineFamily("none", 0, negative=""),
    "QwenImagePipeline": PipelineFamily(
        "image", guidance="true_cfg_scale", negative=" ", img2img="QwenImageImg2ImgPipeline"
    ),
    "StableDiffusion3Pipeline": PipelineFamily(
        "image", pixels_per_token=1, negative="", max_length=512, img2img="StableDiffusion3Img2ImgPipeline"
    ),
    "ZImagePipeline": PipelineFamily("image", pixels_per_token=1, negative="", img2img="ZImageImg2ImgPipeline"),
    "FluxPipeline": PipelineFamily("image", max_length=512, img2img="FluxImg2ImgPipeline"),
}
"""Families by the pipeline class that a folder's model_index.json names; a new one is one line here."""


UNREAD_OPTIONS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save")
"""Options of PEFT that scale an adapter otherwise than by lora_alpha / r, or are more than scale B A."""


NO_LORA = re.compile(r"\.(diff|diff_b|hada_[wt]\w+|lokr_w\w+|oft_\w+|w_norm|b_norm|dora_scale)$")
"""Ends of the names of what others train beside LoRA: whole changes of weights and biases, LoHa, LoKr, OFT, norms,
DoRA."""


def family_of(ref: str, folder: Path) -> tuple[str, PipelineFamily]:
    """Class name and family of a model's folder.  Raises UserError for another kind of model."""
    name = str(hub.pipeline_index(ref, folder).get("_class_name"))
    if name not in FAMILIES:
        allowed = ", ".join(FAMILIES)
        raise UserError(f"{ref}: cannot generate with a {name}{nearest(name, FAMILIES)}; allowed: {allowed}")
    return name, FAMILIES[name]


def load_pipeline(name: str, folder: Path, dtype: "torch.dtype", device: "torch.device") -> "DiffusionPipeline":
    """The pipeline of class `name`.  No code of the folder is run.  Raises UserError if it cannot be loaded."""
    import diffusers

    quiet_libraries()
    kind = getattr(diffusers, name)
    components = kind.load_config(folder)
    if components.get("vae", ("", ""))[1] == "AutoencoderKL":  # others normalize latents by numbers for each channel
        check_autoencoder(str(folder), folder)
    warn_of_unknown_settings(folder)
    absent = {part: None for part, value in components.items() if value in ([None, None], (None, None))}
    with loading(f"{folder}: not a {name} that can be loaded"):
        given = absent | hub.load_networks(folder, dtype=dtype)
        pipe = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True, **given)
        pipe = pipe.to(device)
    check_vocabularies(pipe.components, str(folder))
    check_channels(pipe.transformer.config, pipe.vae.config, FAMILIES[name].pixels_per_token, f"{folder}: ")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def size_multiple(pipe: "DiffusionPipeline") -> int:
    """Of how many pixels the sides of an image are multiples: patches of the autoencoder's factor, 2x2 by default."""
    return pipe.vae_scale_factor * getattr(pipe, "patch_size", 2)


def largest_side(pipe: "DiffusionPipeline") -> int | None:
    """Most pixels of a side for which the network has positions, as those of Stable Diffusion 3 have; None: any."""
    positions = pipe.transformer.config.get("pos_embed_max_size")
    return None if positions is None else positions * size_multiple(pipe)


def img2img_pipeline(name: str, pipe: "DiffusionPipeline") -> "DiffusionPipeline":
    """The pipeline of class `name` over the networks of `pipe`."""
    import diffusers

    editor = getattr(diffusers, name)(**pipe.components)
    editor.set_progress_bar_config(disable=True)
    return editor


def load_lora(pipe: "DiffusionPipeline", file: Path, what: str, weight: float) -> None:
    """Fuse an adapter, `what` in messages, into the pipeline's weights.  Raises UserError where it does not fit."""
    from safetensors import safe_open

    with safe_open(file, "pt") as content:
        metadata = content.metadata() or {}
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (it is no mapping)
    # what diffusers leaves out of some pipelines, and which is there as zeros too
    more = [name for name, tensor in tensors.items() if NO_LORA.search(name) and tensor.any()]
    if more:
        raise UserError(f"{what}: has {more[0]}, which is no part of a plain LoRA and is not read; give a plain LoRA")
    check_plain_start(_header_options(metadata), what)
    ranks = {name: len(tensor) for name, tensor in tensors.items() if ".lora_A." in name}
    weight *= _described_scale(file, [*tensors], ranks, what)
    try:
        # a header of diffusers says how it is scaled, which only that reads
        plain = {} if "lora_adapter_metadata" in metadata else _named_as_here(pipe, tensors)
        if not plain:
            _check_nothing_is_lost(pipe, tensors, what)
        given: dict[str, Any] = {"pretrained_model_name_or_path_or_dict": plain or file.parent}
        given |= {} if plain else {"weight_name": file.name}
        keys = pipe.lora_state_dict(**given)
        pipe.load_lora_weights(**given, adapter_name="adapter")
        _check_lora_keys(pipe, keys, what)
        # by default diffusers fuses the transformer alone in some pipelines whose text encoders it loads adapters for
        pipe.fuse_lora(components=pipe._lora_loadable_modules, lora_scale=weight)
    except (RuntimeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        raise UserError(f"{what}: does not fit {type(pipe).__name__} ({one_line(str(error))})") from error
    pipe.unload_lora_weights()


def _named_as_here(pipe: "DiffusionPipeline", tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """An adapter all of whose layers have their names in diffusers, whatever its trainer puts before them, under the
    keys that every pipeline loads, its alphas in the factors B; empty for another, which diffusers has to convert."""
    networks = {name: getattr(pipe, name) for name in ("transformer", *text_encoder_names(pipe))}
    layers = [(name, layer) for name, part in networks.items() if part is not None for layer, _ in part.named_modules()]
    targets = {
        f"{name}.{layer}".replace(".", "_").removeprefix("transformer_"): f"{name}.{layer}" for name, layer in layers
    }
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        _, part, layer = parse_adapter_key(key.replace(".text_model.", "."), targets) or ("", "", None)
        if layer is None:
            return {}
        found.setdefault(layer, {})[part] = tensor
    keys: dict[str, torch.Tensor] = {}
    for layer, parts in found.items():
        scale = float(parts["alpha"]) / len(parts["down"]) if {"alpha", "down"} <= parts.keys() else 1.0
        halves = {"A": parts.get("down"), "B": parts.get("up")}
        keys |= {
            f"{layer}.lora_{half}.weight": one * scale if half == "B" and scale != 1 else one
            for half, one in halves.items()
            if one is not None
        }
    return keys


def _check_nothing_is_lost(pipe: "DiffusionPipeline", tensors: "Mapping[str, torch.Tensor]", what: str) -> None:
    """Raises UserError where a part of an adapter has no counterpart, or diffusers would leave it out without a word.

    It does so of layers outside of blocks and of T5 for FLUX.1 and FLUX.2 alone, and refuses in other pipelines what it
    does not know.  It is asked to convert numbers of the modules in the place of their factors.
    """
    import torch

    modules: dict[str, dict[str, str]] = {}
    for key in tensors:
        module, part, _ = parse_adapter_key(key, {}) or ("", "", None)
        modules.setdefault(module, {})[part] = key
    modules = {module: parts for module, parts in modules.items() if module and parts.keys() != {"alpha"}}
    if halves := [module for module, parts in modules.items() if not {"down", "up"} <= parts.keys()]:
        raise UserError(f"{what}: has one of two factors (lora_A, lora_B) of {halves[0]}; download or copy it again")
    if "Flux" not in type(pipe).__name__ or not modules:
        return
    numbers = {module: float(number) for number, module in enumerate(modules, 2)}
    marked = dict(tensors)
    for module, parts in modules.items():
        rank = len(tensors[parts["down"]])
        for part, value in {"down": 1.0, "up": numbers[module], "alpha": float(rank)}.items():
            if part in parts:
                marked[parts[part]] = torch.full(tensors[parts[part]].shape, value)  # which may be changed in place
    kept = {float(one.flatten()[0]) for one in pipe.lora_state_dict(marked).values() if one.dim() == 2}
    lost = [module for module, number in numbers.items() if number not in kept]
    for module in lost:  # some files hold text encoders as zeros
        if tensors[modules[module]["up"]].any() and tensors[modules[module]["down"]].any():
            raise UserError(
                f"{what}: diffusers loads adapters of {type(pipe).__name__} without {module}; give one without such "
                "layers, as the result would be another one"
            )


def _header_options(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The options of PEFT that diffusers writes into an adapter's header, without their component's name."""
    try:
        content = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        return {key.rpartition(".")[2]: value for key, value in content.items()}
    except (ValueError, AttributeError, RecursionError):
        return {}  # diffusers says what is wrong with it


def _described_scale(file: Path, names: Sequence[str], ranks: Mapping[str, int], what: str) -> float:
    """lora_alpha / r of the description that PEFT writes beside an adapter, which diffusers does not read.

    ranks: of the factors A, by their names, all of which must be r.
    """
    described = file.with_name(ADAPTER_CONFIG)
    is_peft = file.name == hub.ADAPTER_FILES[0] or any(name.startswith("base_model.model.") for name in names)
    if not (is_peft and described.exists()):
        return 1.0
    options = read_json(described)
    if unread := [name for name in UNREAD_OPTIONS if options.get(name)]:
        raise UserError(f"{what}: its {unread[0]} in {ADAPTER_CONFIG} is not supported; give a plain LoRA")
    check_plain_start(options, what)
    rank, alpha = options.get("r"), options.get("lora_alpha")
    if not (isinstance(rank, int) and isinstance(alpha, int | float) and rank > 0):
        raise UserError(f"{what}: {ADAPTER_CONFIG} must have the numbers r and lora_alpha; copy it again")
    if other := [name for name, of_factor in ranks.items() if of_factor != rank]:
        raise UserError(
            f"{what}: {other[0]} has rank {ranks[other[0]]}, but {ADAPTER_CONFIG} says {rank}; copy both from one place"
        )
    return alpha / rank


def _check_lora_keys(pipe: "DiffusionPipeline", keys: Collection[str], what: str) -> None:
    """Raises UserError unless every layer of an adapter has both of its factors, and is in the pipeline."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    # CLIP has no `text_model` any more; diffusers loads the published names, which have it
    names = [key.replace(".text_model.", ".") for key in keys]
    down, up = ({name.partition(half)[0] for name in names if half in name} for half in (".lora_A.", ".lora_B."))
    if halves := sorted(down ^ up):
        # loaded, the other factor would be what it was initialized with: zeros or random numbers
        raise UserError(f"{what}: has one of two factors (lora_A, lora_B) of {halves[0]}; download or copy it again")
    networks = {name: part for name, part in pipe.components.items() if hasattr(part, "named_modules")}
    found = {
        f"{name}.{layer}".replace(".text_model.", ".")
        for name, part in networks.items()
        for layer, module in part.named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    missing = sorted(down - found)
    if missing or not down:
        fit = f"does not fit {type(pipe).__name__}, which has"
        raise UserError(
            f"{what}: {fit} {f'no {missing[:2]}' if missing else 'none of its layers'}; take one that was made for it"
        )


def flux2_text_options(pipe: "DiffusionPipeline") -> dict[str, Any]:
    """Arguments of FLUX.2 for its text encoder: the tokens it takes and the layers that are read."""
    tokenizer = getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)  # FLUX.2-dev has a processor around it
    text = pipe.text_encoder.config.get_text_config()
    return {
        "max_sequence_length": min(512, tokenizer.model_max_length),
        "text_encoder_out_layers": text_layers(text, pipe.transformer.config.joint_attention_dim),
    }


def split_references(prepare: Callable[..., "tuple[torch.Tensor, torch.Tensor]"]) -> "Callable[..., Any]":
    """FLUX.2's step from references to tokens and positions, for prompts with equally many references of their own.

    The pipeline gives every prompt all references; here each gets its own, as if its image were generated alone.
    """
    import torch

    def prepared(images: "Sequence[torch.Tensor]", batch_size: int, **rest: Any) -> "tuple[torch.Tensor, torch.Tensor]":
        count = len(images) // batch_size
        own = (images[i * count : (i + 1) * count] for i in range(batch_size))
        tokens, positions = zip(*(prepare(images=list(few), batch_size=1, **rest) for few in own), strict=True)
        return torch.cat(tokens), torch.cat(positions)

    return prepared
