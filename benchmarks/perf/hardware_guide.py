"""The memory and operations that the recipes need according to `flowbp estimate`, as a Markdown table.

The models are described by their published sizes (benchmarks.perf.pipelines), so neither weights nor a network are
needed.  None of these runs was carried out at this size.

    python -m benchmarks.perf.hardware_guide
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import typer
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from transformers import BlipConfig, CLIPConfig, CLIPImageProcessor, Qwen2VLConfig, Qwen2VLImageProcessor

from benchmarks.perf import pipelines
from flowbp import backbones
from flowbp.backbones.loading import mark_trainable
from flowbp.backbones.options import apply_model_options
from flowbp.config import TrainConfig
from flowbp.estimate import Estimate, estimate_run
from flowbp.estimate.traffic import sent_bytes
from flowbp.rewards.hpsv3 import TEMPLATE_FILE, PromptTemplate, ranking_head
from flowbp.rewards.loading import scoring_head
from flowbp.training import preflight
from imgen_common.config import load
from imgen_common.console import quiet_libraries
from imgen_common.errors import run_cli
from imgen_common.weights import HEAD_FILE
from scripts.miniature.world.vocabulary import clip_tokenizer, qwen_tokenizer

RECIPES = Path(__file__).parents[2] / "configs" / "flowbp"
ROWS = (
    ("sd3_5_medium", "lora_24gb", 1, ()),
    ("flux2_klein_base_4b", "lora_24gb", 1, ()),
    ("flux2_klein_base_4b", "edits_lora_24gb", 1, ()),
    ("z_image", "lora_32gb", 1, ()),
    ("z_image", "flowbp_bridge", 8, ()),
    ("flux2_dev", "lora_141gb", 1, ()),
    *((model, "flowbp_lagrange", 8, ()) for model in ("sd3_5_medium", "flux2_klein_base_4b")),
    *((model, "flowbp_lagrange", 8, ()) for model in ("flux2_klein_base_9b", "flux1_dev")),
    ("krea2", "lora_48gb", 1, ()),
    ("krea2", "flowbp_bridge", 8, ()),
    ("qwen_image_21", "lora_40gb", 1, ()),
    ("qwen_image_21", "flowbp_bridge", 8, ()),
    ("qwen_image", "lora_80gb", 1, ()),
    ("qwen_image", "flowbp_bridge", 8, ()),
    ("qwen_image_edit", "lora_80gb", 1, ()),
    ("qwen_image_edit", "flowbp_bridge", 8, ()),
)
"""Model, recipe, number of GPUs, and the settings that are changed in the recipe."""
NUM_GPUS = (8, 64)
LARGE_BATCH = "total_batch_size=64"
TRAFFIC_ROWS = (
    ("sd3_5_medium", "flowbp_lagrange", (LARGE_BATCH,)),
    ("sd3_5_medium", "flowbp_lagrange", (LARGE_BATCH, "distributed.kind=ddp")),
    ("flux2_klein_base_9b", "flowbp_lagrange", (LARGE_BATCH,)),
    ("flux1_dev", "flowbp_lagrange", (LARGE_BATCH,)),
    ("flux2_klein_base_4b", "lora_24gb", (LARGE_BATCH,)),
)
"""Model, recipe and settings, each for all of `NUM_GPUS`."""
FOLDERS = {
    **{("hpsv2", "hpsv2"): "h14", ("clip", "pickscore"): "h14", ("clipscore", "clipscore"): "l14"},
    **{("imagereward", "imagereward"): "blip", ("hpsv3", "hpsv3"): "qwen2_vl"},
}
"""Folder of each reward of the recipes by its score and name."""
PIPELINES: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "sd3_5_medium": pipelines.sd3_5_medium,
    "flux1_dev": pipelines.flux1_dev,
    "z_image": pipelines.z_image,
    "krea2": pipelines.krea2,
    "flux2_dev": pipelines.flux2_dev,
    "flux2_klein_base_4b": pipelines.flux2_klein_base_4b,
    "flux2_klein_base_9b": pipelines.flux2_klein_base_9b,
    "qwen_image": pipelines.qwen_image,
    "qwen_image_21": pipelines.qwen_image_21,
    "qwen_image_edit": pipelines.qwen_image_edit,
}


def write_clip_config(folder: Path, text: dict[str, int], vision: dict[str, int], projection_dim: int) -> None:
    """Writes the folder of a CLIP-based reward without weights."""
    CLIPConfig(
        text_config={"vocab_size": 49408, **text},
        vision_config={"patch_size": 14, **vision},
        projection_dim=projection_dim,
    ).save_pretrained(folder)
    pipelines.with_max_length(clip_tokenizer(), 77).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)


def tower_sizes(width: int, layers: int, heads: int) -> dict[str, int]:
    """Sizes of one transformer tower of CLIP."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width}
    return sizes | {"num_hidden_layers": layers, "num_attention_heads": heads}


def write_blip_config(folder: Path) -> None:
    """Writes the folder of ImageReward without weights: BLIP with ViT-L/16 and BERT base."""
    text = {"vocab_size": 30524, "encoder_hidden_size": 1024, **tower_sizes(768, 12, 12)}
    vision = {"image_size": 224, "patch_size": 16, **tower_sizes(1024, 24, 16)}
    BlipConfig(text_config=text, vision_config=vision).save_pretrained(folder)
    pipelines.with_max_length(clip_tokenizer(), 512).save_pretrained(folder)
    save_file(scoring_head(768).state_dict(), folder / HEAD_FILE)


def write_qwen2_vl_config(folder: Path) -> None:
    """Writes the folder of HPSv3 without weights: Qwen2-VL-7B."""
    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 151658}
    text = sizes | {"num_attention_heads": 28, "num_key_value_heads": 4}
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4}
    Qwen2VLConfig(text_config=text, vision_config=vision).save_pretrained(folder)
    qwen_tokenizer().save_pretrained(folder)
    Qwen2VLImageProcessor().save_pretrained(folder)
    (folder / TEMPLATE_FILE).write_text(PromptTemplate(before="", after="").model_dump_json())
    save_file(ranking_head(3584).state_dict(), folder / HEAD_FILE)


def write_models(root: Path) -> dict[str, int]:
    """Writes every model of the recipes without weights; returns the numbers of the transformers' parameters."""
    write_clip_config(root / "h14", tower_sizes(1024, 24, 16), tower_sizes(1280, 32, 16), 1024)
    write_clip_config(root / "l14", tower_sizes(768, 12, 12), tower_sizes(1024, 24, 16), 768)
    write_blip_config(root / "blip")
    write_qwen2_vl_config(root / "qwen2_vl")
    made = {name: pipelines.write_configs(make, root / name) for name, make in PIPELINES.items()}
    return {name: sum(p.numel() for p in pipeline.transformer.parameters()) for name, pipeline in made.items()}


def check_recipe(root: Path, model: str, recipe: str, gpus: int, changes: Sequence[str] = ()) -> preflight.CheckedRun:
    """A recipe, checked, with its models taken from what `write_models` wrote to `root`."""
    file = RECIPES / model / f"{recipe}.yaml"
    plain = load(TrainConfig, [file])
    sets = [f"model.ref={root / model}"]
    for part in ("rewards", "heldout"):
        sets += [f"{part}.{i}.ref={root / FOLDERS[one.score, one.name]}" for i, one in enumerate(getattr(plain, part))]
    prompts = _write_edit(root) if "edit" in f"{model} {recipe}" else "builtin:shapes/test"
    sets += [f"{key}={prompts}" for key in ("data.prompts", "eval.prompts", "eval.quick_prompts")]
    return preflight.check_run(load(TrainConfig, [file], [*sets, *changes]), gpus, estimate_only=True)


def estimate_recipe(root: Path, model: str, recipe: str, gpus: int, changes: Sequence[str] = ()) -> Estimate:
    """The estimate of a recipe."""
    return estimate_run(check_recipe(root, model, recipe, gpus, changes))


def print_traffic(root: Path) -> None:
    """Prints what each GPU sends in an update, for several numbers of GPUs and ways to share the weights."""
    print("| model | recipe | weights | " + " | ".join(f"GB sent by each of {n} GPUs" for n in NUM_GPUS) + " |")
    print("| --- | --- | --- |" + " --: |" * len(NUM_GPUS))
    for model, recipe, changes in TRAFFIC_ROWS:
        jobs = [check_recipe(root, model, recipe, gpus, changes) for gpus in NUM_GPUS]
        backbone = backbones.init_empty_weights(str(root / model))
        apply_model_options(backbone, jobs[0].config.model)
        mark_trainable(backbone.net, jobs[0].config)
        sent = " | ".join(f"{sent_bytes(backbone, job) / 1e9:,.1f}" for job in jobs)
        print(f"| {model} | {recipe} | {jobs[0].config.distributed.kind} | {sent} |", flush=True)


def _write_edit(root: Path) -> Path:
    """A file with one edit of an image of 512x512."""
    Image.new("RGB", (512, 512), "white").save(root / "source.png")
    (root / "edits.jsonl").write_text(json.dumps({"prompt": "make it red", "images": "source.png"}) + "\n")
    return root / "edits.jsonl"


def main() -> None:
    """Print the tables of docs/hardware.md and docs/scale.md, in about 8 minutes on one core."""
    quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        num_parameters = write_models(root)
        print("| model | recipe | GPUs | settings | peak GiB per GPU | GiB in an update | TFLOP per update and GPU |")
        print("| --- | --- | --: | --- | --: | --: | --: |")
        for model, recipe, gpus, changes in ROWS:
            estimate = estimate_recipe(root, model, recipe, gpus, changes)
            print(
                f"| {model} ({num_parameters[model] / 1e9:.2f} B) | {recipe} | {gpus} | {' '.join(changes) or '-'} | "
                f"{estimate.peak / 2**30:.1f} | {estimate.update_peak / 2**30:.1f} | {estimate.flops / 1e12:,.0f} |",
                flush=True,
            )
        print()
        print_traffic(root)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_cli(app, "benchmarks.perf.hardware_guide")
