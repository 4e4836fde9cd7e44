"""Writes trained weights as files that other programs load.  Knows nothing of the command line."""

import json
from collections.abc import Mapping
from inspect import signature
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from flowbp import backbones
from flowbp.backbones.loading import read_trained_weights
from flowbp.config import ExportedWeights, ExportFormat, TrainConfig
from flowbp.evaluation.sources import check_export
from flowbp.export.adapters import DIFFUSERS_FILE, lora_adapters, merge_weights, to_diffusers
from flowbp.export.comfyui import COMFYUI_FILE, to_comfyui
from flowbp.export.model_card import model_card
from imgen_common.errors import UserError, one_line, quoted
from imgen_common.files import atomic_folder, write_atomic
from imgen_common.hub import SAMPLING_FILE, SIZE_AND_LENGTH
from imgen_common.run_folder.folder import RunFolder


def export_run(
    run: Path,
    to: ExportFormat,
    out: Path,
    kept: ExportedWeights = "ema",
    step: int | None = None,
    model: str | None = None,
) -> Path:
    """Writes the folder `out` with the weights and a model card; returns it.

    kept: the averaged weights, which are those that the run evaluated, or those of the last update.  step: number of
    updates after which the checkpoint was made; by default the last one.  model: a distilled sibling of the trained
    model, into which an adapter is merged instead.
    Raises UserError if `out` exists, there is no such checkpoint, the run trained all weights and `to` wants an
    adapter, `model` does not fit, or the weights of the trained model have changed since.
    """
    check_export(run, to, step, model)
    opened = RunFolder.open(run, is_main=False)
    step = opened.latest_checkpoint() if step is None else step
    config, weights = read_trained_weights(opened, kept, step)
    sampling = _sampling(config, to, model)
    with atomic_folder(out) as folder:
        if to == "merged":
            merge_weights(config, weights, model).save_pretrained(folder)
            _write_sampling(folder, sampling)
        elif to == "diffusers":
            save_file(to_diffusers(lora_adapters(config, weights)), folder / DIFFUSERS_FILE, {"format": "pt"})
            # steps and guidance are of the model, which may be a distilled one
            _write_sampling(folder, {name: sampling[name] for name in SIZE_AND_LENGTH if name in sampling})
        else:
            empty = backbones.init_empty_weights(config.model.ref, distilled=True)
            widths = {name: m.out_features for name, m in empty.net.named_modules() if isinstance(m, nn.Linear)}
            keys = to_comfyui(lora_adapters(config, weights), type(empty.pipe).__name__, widths)
            save_file(keys, folder / COMFYUI_FILE, {"format": "pt"})
        card = model_card(opened, config, to, kept, step, model, sampling)
        write_atomic(folder / "README.md", card)
    return out


def _sampling(config: TrainConfig, to: ExportFormat, model: str | None) -> dict[str, int | float]:
    """How the run generated the images of its evaluations; for a model that it did not draw them with, their size and
    the length of prompts alone."""
    distilled = config.model.embedded_guidance if model is None else None
    backbone = backbones.init_empty_weights(model or config.model.ref, embedded_guidance=distilled, distilled=True)
    found: dict[str, int | float] = {"height": config.model.height, "width": config.model.width}
    if "max_sequence_length" in signature(backbone.pipe.__call__).parameters:
        found["max_sequence_length"] = config.model.max_sequence_length or backbone.max_tokens
    # an adapter was drawn with eval.model, if that is set, and a whole pipeline is one of both
    if to != "merged" or (model or config.model.ref) == (config.eval.model or config.model.ref):
        scale = backbone.pipeline_guidance(config.eval_guidance_scales[0])
        found |= {"num_inference_steps": config.eval.num_inference_steps, "guidance_scale": scale}
    return found


def _write_sampling(folder: Path, sampling: Mapping[str, float]) -> None:
    write_atomic(folder / SAMPLING_FILE, json.dumps(sampling, indent=2) + "\n")


def push_to_hub(folder: Path, repo: str) -> str:
    """Uploads an exported folder to a repository of the hub; returns its address.  A new repository is private.

    The token comes from the environment (HF_TOKEN) or the login of the hub.  Raises UserError if the hub refuses, or
    cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder)  # a name alone is the user's own
    except Exception as error:  # the client's HTTP library, and with it the errors that leak, change between versions
        reason = one_line(str(error) or type(error).__name__)
        again = f"check HF_TOKEN and the network, then run `hf upload --private {quoted(repo)} {quoted(folder)}`"
        raise UserError(f"--push {repo}: not uploaded ({reason}); {again}") from error
    return str(address)
