"""Run folders as if they had been trained, and what their models draw."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from families import FAMILIES, size_of
from given import prompt_for

from flowbp import backbones
from flowbp.backbones.loading import load_trained_weights, mark_trainable
from flowbp.config import TrainConfig
from flowbp.evaluation import sampling
from imgen_common.config import load
from imgen_common.run_folder.folder import RunFolder

TEXT, JOINT = ", add_q_proj, add_k_proj, add_v_proj", ", to_qkv_mlp_proj, to_out"
"""Layers of FLUX.2 for text alone, and those of its blocks that read text and image as one."""
TARGETS = f"lora.target_modules=[to_q, to_k, to_v{TEXT}, to_out.0{JOINT}]"
"""Target modules of FLUX.2."""


ONE_STREAM = {"z_image": "feed_forward.w1, adaLN_modulation.0", "krea2": "ff.up, to_gate"}
ONE_STREAM |= {"qwen_image_21": "img_mlp.proj, img_mlp.out"}
"""Families of one stream of tokens, which have no layers for text alone, and other layers of theirs."""


def targets_of(family: str) -> str:
    """`TARGETS` for a family."""
    joint = JOINT if family.startswith("flux2") else ""
    return TARGETS.replace(TEXT, f", {ONE_STREAM[family]}" if family in ONE_STREAM else TEXT).replace(JOINT, joint)


def trained(place: Path, model: Path, *sets: str) -> Path:
    """A run folder whose weights are random but not nothing, as if it had been trained."""
    config = load(TrainConfig, [], [f"model.ref={model}", "name=run", *sets])
    parameters = mark_trainable(backbones.load(str(model)).net, config)
    rng = torch.Generator().manual_seed(1)
    average = {name: p.detach() + 0.3 * torch.randn(p.shape, generator=rng) for name, p in parameters.items()}
    last = {name: p.detach() for name, p in parameters.items()}
    with RunFolder.create(place / "run", config, ["flowbp"]) as run:
        run.save_checkpoint(1, {"weights": last, "ema": average, "optimizer": {}}, {})
    return place / "run"


def theirs(pipe: DiffusionPipeline, family: str) -> torch.Tensor:
    """What the unmodified pipeline generates."""
    pipe.set_progress_bar_config(disable=True)
    height, width = FAMILIES[family].size
    options = {"num_inference_steps": 3, "output_type": "pt", "height": height, "width": width}
    options |= FAMILIES[family].guided(1.0)
    return pipe(prompt="a red circle", generator=torch.Generator().manual_seed(3), **options).images[:, :3]


def ours(run: Path, model: Path, *, base: bool = False) -> torch.Tensor:
    backbone = backbones.load(str(model))
    if not base:
        load_trained_weights(backbone, run)
    return sampling.generate_images(backbone, prompt_for(backbone, "a red circle"), [3], size_of(backbone), 3, 1.0)
