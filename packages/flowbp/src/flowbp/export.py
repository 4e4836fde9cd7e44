"""What a run trained, in the files that others load: a diffusers adapter, a ComfyUI adapter, a merged pipeline."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from flowbp import backbones
from flowbp.compare import interval, number, title
from flowbp.config import TrainConfig
from flowbp.launch import summary
from flowbp.licences import licence
from flowbp.train import trained_weights
from imgen_common import hub
from imgen_common.config import to_yaml
from imgen_common.errors import UserError
from imgen_common.runs import RunFolder, whole_folder, write_atomic

Format = Literal["diffusers", "comfyui", "merged"]
Kept = Literal["average", "last"]
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
COMFYUI_FILE = "comfyui_lora.safetensors"


@dataclass(frozen=True)
class Adapter:
    """The update of one linear layer, weight += up @ down.  down: (rank, in).  up: (out, rank), its scale in it."""

    down: Tensor
    up: Tensor

    @property
    def update(self) -> Tensor:
        """What is added to the layer's weight, float32."""
        return self.up.float() @ self.down.float()


def export(run: Path, to: Format, out: Path, kept: Kept = "average", step: int | None = None) -> Path:
    """Writes the folder `out` with the weights and a model card; returns it.

    kept: the averaged weights, which are what the run evaluated, or those of the last update.  step: of the checkpoint
    that was made after so many updates; by default the last one.
    Raises UserError if `out` exists, there is no such checkpoint, or the run trained all weights and `to` wants an
    adapter.
    """
    config, weights = trained_weights(RunFolder.open(run, is_main=False), kept, step)
    if config.lora is None and to != "merged":
        raise UserError(f"{run}: trained all weights, so there is no adapter to export; use --to merged")
    with whole_folder(out) as fresh:
        if to == "merged":
            merged(config, weights).save_pretrained(fresh)
        elif to == "diffusers":
            save_file(as_diffusers(adapters(config, weights)), fresh / DIFFUSERS_FILE, {"format": "pt"})
        else:
            keys = as_comfyui(adapters(config, weights), family(config), outputs(config))
            save_file(keys, fresh / COMFYUI_FILE, {"format": "pt"})
        write_atomic(fresh / "README.md", card(run, config, to, kept, step))
    return out


def family(config: TrainConfig) -> str:
    """The pipeline class of the run's model."""
    index = hub.resolve(config.model.ref) / "model_index.json"
    return json.loads(index.read_text(encoding="utf-8"))["_class_name"]


def outputs(config: TrainConfig) -> dict[str, int]:
    """Outputs of every linear layer of the run's transformer."""
    modules = backbones.skeleton(config.model.ref).net.named_modules()
    return {name: module.out_features for name, module in modules if isinstance(module, nn.Linear)}


def adapters(config: TrainConfig, weights: Mapping[str, Tensor]) -> dict[str, Adapter]:
    """The adapters of a run by the name of their layer in the transformer."""
    assert config.lora is not None
    scale, found = config.lora.alpha / config.lora.rank, {}
    for name, down in weights.items():
        layer, part, _ = name.partition(".lora_A.")
        if part:
            up = weights[name.replace(".lora_A.", ".lora_B.")]
            found[layer] = Adapter(down.float().contiguous(), (scale * up.float()).contiguous())
    return found


def merged(config: TrainConfig, weights: Mapping[str, Tensor]) -> DiffusionPipeline:
    """The whole pipeline in float32 with what was trained in its transformer."""
    backbone = backbones.load(config.model.ref)
    with torch.no_grad():
        parameters = dict(backbone.net.named_parameters())
        if config.lora is None:
            for name, value in weights.items():
                parameters[name].copy_(value)
        else:
            for layer, adapter in adapters(config, weights).items():
                parameters[f"{layer}.weight"].add_(adapter.update)
    return backbone.pipe


# --- key names -------------------------------------------------------------------------------------------------------


def as_diffusers(found: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """What `pipeline.load_lora_weights` reads."""
    keys: dict[str, Tensor] = {}
    for layer, adapter in found.items():
        keys |= {f"transformer.{layer}.lora_A.weight": adapter.down, f"transformer.{layer}.lora_B.weight": adapter.up}
    return keys


def as_comfyui(found: Mapping[str, Adapter], pipeline: str, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """What ComfyUI reads: the original names of FLUX, with query, key and value as one layer; SD3 as in diffusers.

    widths: outputs of every linear layer of the transformer.
    """
    if pipeline == "StableDiffusion3Pipeline":
        return as_diffusers(found)
    left = dict(found)
    keys: dict[str, Tensor] = {}
    for theirs, ours in _flux_layers(found, flux2=pipeline == "Flux2KleinPipeline").items():
        parts = [left.pop(layer, None) for layer in ours]
        if any(parts):
            one = fused(parts, [widths[layer] for layer in ours])
            if pipeline == "Flux2KleinPipeline":
                name, down, up = f"diffusion_model.{theirs}", "lora_A", "lora_B"
            else:
                name, down, up = "lora_unet_" + theirs.replace(".", "_"), "lora_down", "lora_up"
            keys |= {f"{name}.{down}.weight": one.down, f"{name}.{up}.weight": one.up}
    if left:
        raise UserError(f"no ComfyUI name is known for the layers {sorted(left)[:4]}; export --to diffusers instead")
    return keys


def fused(parts: "list[Adapter | None]", widths: list[int]) -> Adapter:
    """Adapters of layers that read the same input as one of the layer that stacks their outputs: ranks add up.

    widths: outputs of each layer; those without an adapter get zeros.
    """
    there = [part for part in parts if part is not None]
    up = torch.zeros(sum(widths), sum(len(part.down) for part in there))
    row = column = 0
    for part, width in zip(parts, widths, strict=True):
        if part is not None:
            rank = len(part.down)
            up[row : row + width, column : column + rank] = part.up
            column += rank
        row += width
    return Adapter(torch.cat([part.down for part in there]), up)


def _flux_layers(found: Mapping[str, Adapter], *, flux2: bool) -> dict[str, list[str]]:
    """The original name of every layer of the blocks that have adapters, and the diffusers layers it is made of."""
    linear = {"in": "linear_in", "out": "linear_out"} if flux2 else {"in": "net.0.proj", "out": "net.2"}
    names: dict[str, list[str]] = {}
    for block in sorted({".".join(name.split(".")[:2]) for name in found if "blocks." in name}):
        kind, number = block.split(".")
        if kind == "transformer_blocks":
            double = f"double_blocks.{number}"
            for side, prefix, projection in (("img", "to_", "to_out.0"), ("txt", "add_", "to_add_out")):
                ends = ("q", "k", "v") if side == "img" else ("q_proj", "k_proj", "v_proj")
                names[f"{double}.{side}_attn.qkv"] = [f"{block}.attn.{prefix}{end}" for end in ends]
                names[f"{double}.{side}_attn.proj"] = [f"{block}.attn.{projection}"]
                mlp = f"{block}.ff" if side == "img" else f"{block}.ff_context"
                names[f"{double}.{side}_mlp.0"] = [f"{mlp}.{linear['in']}"]
                names[f"{double}.{side}_mlp.2"] = [f"{mlp}.{linear['out']}"]
        elif flux2:
            names[f"single_blocks.{number}.linear1"] = [f"{block}.attn.to_qkv_mlp_proj"]
            names[f"single_blocks.{number}.linear2"] = [f"{block}.attn.to_out"]
        else:
            parts = [f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v", f"{block}.proj_mlp"]
            names[f"single_blocks.{number}.linear1"] = parts
            names[f"single_blocks.{number}.linear2"] = [f"{block}.proj_out"]
    return names


# --- the card --------------------------------------------------------------------------------------------------------


def card(run: Path, config: TrainConfig, to: Format, kept: Kept, step: int | None) -> str:
    """The model card: what it is made of, how to load it, what was measured, the whole configuration."""
    what = {
        "diffusers": f'Adapter. Load: `pipeline.load_lora_weights("FOLDER")`, file `{DIFFUSERS_FILE}`.',
        "comfyui": f"Adapter for ComfyUI: `{COMFYUI_FILE}`.",
        "merged": 'The whole pipeline. Load: `DiffusionPipeline.from_pretrained("FOLDER")`.',
    }[to]
    updates = config.num_updates if step is None else step
    models = [config.model.ref, *(scorer.ref for scorer in config.scorers)]
    lines = [
        "---",
        "library_name: diffusers",
        "tags: [text-to-image, flowbp, reward-backpropagation]",
        *([f"base_model: {config.model.ref}"] if hub.HUB_REF.fullmatch(config.model.ref) else []),
        "---",
        f"# {run.name}",
        f"`{config.model.ref}` aligned with `{config.method.name}` by flowbp (reward backpropagation), "
        f"{updates} updates; the {kept} weights. {what}",
        "## Scores",
        *(_scores(run) if step in (None, config.num_updates) else ["Those of this checkpoint were not measured."]),
        "## Licences",
        *(f"- `{ref}`: {licence(ref)}" for ref in dict.fromkeys(models)),
        "## Configuration",
        "```yaml",
        to_yaml(config).rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _scores(run: Path) -> list[str]:
    found = summary(run)
    if not found:
        return ["The run was exported before its evaluation."]
    lines = ["| guidance | score | before | after | change, 95 % interval | prompts |", "|---|---|---|---|---|---|"]
    for scale, scores in found.items():
        for name, one in scores.items():
            means = f"{number(name, one.before)} | {number(name, one.after)}"
            lines.append(f"| {scale:g} | {title(name)} | {means} | {interval(name, one)} | {one.num} |")
    return lines


def push(folder: Path, repo: str) -> str:
    """Uploads an exported folder to a repository of the hub, made private if it is new; returns its address.

    The token is read from the environment (HF_TOKEN) or the hub's own login.  Raises UserError if the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        api = HfApi()
        address = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
    except (HfHubHTTPError, LocalTokenNotFoundError, ValueError) as error:
        raise UserError(f"--push {repo}: the hub refused ({str(error).splitlines()[0]}); check HF_TOKEN") from None
    return str(address)
