"""The model card of an exported run."""

from collections.abc import Mapping

from flowbp.backbones.licenses import license_of
from flowbp.config import ExportedWeights, ExportFormat, TrainConfig
from flowbp.evaluation.compare import describe_change, score_title
from flowbp.export.adapters import DIFFUSERS_FILE
from flowbp.export.comfyui import COMFYUI_FILE
from flowbp.training.runs import compare_base_and_trained
from imgen_common import hub
from imgen_common.config import to_yaml
from imgen_common.console import markdown_table
from imgen_common.files import local_path
from imgen_common.run_folder.folder import RunFolder

DESCRIPTIONS: dict[ExportFormat, str] = {
    "diffusers": f'Adapter. Load: `pipeline.load_lora_weights("FOLDER")`, file `{DIFFUSERS_FILE}`.',
    "comfyui": f"Adapter for ComfyUI: `{COMFYUI_FILE}`.",
    "merged": 'The whole pipeline. Load: `DiffusionPipeline.from_pretrained("FOLDER")`.',
}


def model_card(
    run: RunFolder,
    config: TrainConfig,
    to: ExportFormat,
    kept: ExportedWeights,
    step: int | None,
    model: str | None,
    drawn: Mapping[str, int | float],
) -> str:
    """The model card: what the weights are, how to load them, scores, licenses, the whole configuration.

    step: number of updates.  model: what the weights were merged into, if that is not the trained model.  drawn: how
    the images of its evaluations were, as the pipeline calls it; no steps where another model made them.
    """
    is_drawn = "num_inference_steps" in drawn
    sibling = f" by `{config.eval.model}`" if is_drawn and config.eval.model else ""
    merged = f" The adapter is merged into `{model}`, which was not trained." if model else ""
    models = [config.model.ref, model, config.eval.model if is_drawn else None, *(one.ref for one in config.scorers)]
    how = ", ".join(f"{name} {value:g}" for name, value in drawn.items())
    lines = [
        "---",
        "library_name: diffusers",
        "tags: [text-to-image, flowbp, reward-backpropagation]",
        *_base_model(config.model.ref),
        "---",
        f"# {run.path.name}",
        f"`{config.model.ref}` aligned with `{config.method.name}` by flowbp (reward backpropagation), "
        f"{step} update{'s' * (step != 1)}; the {kept} weights. {DESCRIPTIONS[to]}{merged}",
        f"Drawn{sibling} with {how}, as the pipeline names them.",
        "## Scores",
        _scores(run, config, kept, step) if is_drawn else "This model was not evaluated.",
        "## Licenses",
        *(f"- `{ref}`: {license_of(ref)}" for ref in dict.fromkeys(filter(None, models))),
        "## Configuration",
        "```yaml",
        to_yaml(config).rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _base_model(ref: str) -> list[str]:
    """The line of the hub's metadata, which takes no revision; none for a folder."""
    match = None if local_path(ref).exists() else hub.HUB_REF.fullmatch(ref)
    return [f"base_model: {match['repo']}"] if match else []


def _scores(run: RunFolder, config: TrainConfig, kept: ExportedWeights, step: int | None) -> str:
    if kept == "last" and config.ema > 0:  # the run evaluates the averaged weights
        return "The last weights were not evaluated."
    if step != run.latest_checkpoint():
        return "This checkpoint was not evaluated."
    changes = compare_base_and_trained(run.path)
    if not changes:
        return "The run was exported before its evaluation."
    rows = []
    for scale, scores in changes.items():
        for name, change in scores.items():
            text = describe_change(name, change)
            means = ["not finite" if value in ("nan", "inf", "-inf") else value for value in (text.before, text.after)]
            rows.append([f"{scale:g}", score_title(name), *means, text.interval, str(change.num)])
    return markdown_table(["guidance", "score", "before", "after", "change, 95 % interval", "prompts"], rows)
