"""The memory and operations that the recipes need according to `flowbp estimate`, as a Markdown table.

The models are described by their published sizes (benchmarks.perf.pipelines), so neither weights nor a network are
needed.  None of these runs was carried out at this size.

    python -m benchmarks.perf.hardware_guide
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from diffusers import DiffusionPipeline
from transformers import CLIPConfig, CLIPImageProcessor

from benchmarks.perf import pipelines
from flowbp.config import TrainConfig
from flowbp.estimate import estimate_run
from flowbp.training import preflight
from imgen_common.config import load
from imgen_common.console import quiet_libraries
from scripts.miniature.world.vocabulary import clip_tokenizer

RECIPES = Path(__file__).parents[2] / "configs" / "flowbp"
ROWS = (
    ("sd3_5_medium", "lora_24gb", 1, ()),
    ("flux2_klein_base_4b", "lora_24gb", 1, ()),
    ("sd3_5_medium", "flowbp_lagrange", 8, ()),
    ("sd3_5_medium", "flowbp_lagrange", 8, ("distributed.kind=fsdp2",)),
    ("flux2_klein_base_4b", "flowbp_lagrange", 8, ("distributed.kind=fsdp2",)),
    ("flux2_klein_base_9b", "flowbp_lagrange", 8, ("distributed.kind=fsdp2",)),
    ("flux1_dev", "flowbp_lagrange", 8, ("distributed.kind=fsdp2",)),
)
"""Model, recipe, number of GPUs, and the settings that are changed in the recipe."""
PIPELINES: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "sd3_5_medium": pipelines.sd3_5_medium,
    "flux1_dev": pipelines.flux1_dev,
    "flux2_klein_base_4b": pipelines.flux2_klein_base_4b,
    "flux2_klein_base_9b": pipelines.flux2_klein_base_9b,
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


def main() -> None:
    """Prints the table."""
    quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_clip_config(root / "h14", tower_sizes(1024, 24, 16), tower_sizes(1280, 32, 16), 1024)
        write_clip_config(root / "l14", tower_sizes(768, 12, 12), tower_sizes(1024, 24, 16), 768)
        num_parameters = {}
        for model, make in PIPELINES.items():
            pipeline = pipelines.write_configs(make, root / model)
            num_parameters[model] = sum(p.numel() for p in pipeline.transformer.parameters())
        print("| model | recipe | GPUs | settings | peak GiB a GPU | of which in an update | TFLOP an update and GPU |")
        print("| --- | --- | --: | --- | --: | --: | --: |")
        for model, recipe, gpus, changes in ROWS:
            sets = [f"model.ref={root / model}", f"rewards.0.ref={root / 'h14'}", f"heldout.0.ref={root / 'h14'}"]
            sets += [f"heldout.1.ref={root / 'l14'}", *changes]
            sets += [f"{key}=builtin:shapes/test" for key in ("data.prompts", "eval.prompts", "eval.quick_prompts")]
            config = load(TrainConfig, [RECIPES / model / f"{recipe}.yaml"], sets)
            estimate = estimate_run(preflight.check_run(config, gpus, estimate_only=True))
            print(
                f"| {model} ({num_parameters[model] / 1e9:.2f} B) | {recipe} | {gpus} | {' '.join(changes) or '-'} | "
                f"{estimate.peak / 2**30:.1f} | {estimate.update_peak / 2**30:.1f} | {estimate.flops / 1e12:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
