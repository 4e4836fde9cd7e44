"""`flowbp export`, `flowbp prefetch` and `flowbp convert-reward`."""

import re
from pathlib import Path
from typing import Annotated

import typer

from flowbp.cli.options import Runs
from imgen_common.console import spinner
from imgen_common.errors import UserError, check_choice


def prefetch(
    refs: Annotated[list[str], typer.Argument(metavar="REF", help="org/name[@revision], a folder or builtin:...")],
) -> None:
    """Download models so that they can be used without a network. The command checks that they are complete and prints
    the folder of each; with HF_HUB_OFFLINE=1 it only checks. Gated repositories need `hf auth login` or HF_TOKEN.

    Example:

    \b
      flowbp prefetch black-forest-labs/FLUX.2-klein-base-4B yuvalkirstain/PickScore_v1
    """
    from imgen_common import hub
    from imgen_common.shutdown import ended_at_once

    with ended_at_once("stopped; the same command continues the download"):
        for ref in refs:
            print(hub.prefetch(ref))


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or its name under --runs.")],
    to: Annotated[str, typer.Option("--to", help="diffusers or comfyui (adapters), or merged (a whole pipeline).")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to create; default: RUN/export-FORMAT.")
    ] = None,
    weights: Annotated[str, typer.Option(help="ema (averaged, as evaluated by the run) or last.")] = "ema",
    step: Annotated[int | None, typer.Option(help="Update of the checkpoint to export; by default the last.")] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="REF", help="Merge the adapter into this distilled sibling of the trained model."),
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Upload the folder to this repository; needs HF_TOKEN.")
    ] = None,
    runs: Runs = Path("runs"),
) -> None:
    """Write the trained weights of a run as files that other programs can load, with a model card that holds the
    configuration, scores and licenses. By default it exports the averaged weights, with which the run was evaluated.

    Example:

    \b
      flowbp export miniature-lora --to diffusers
      flowbp export sd3_5_medium-lora --to comfyui --out my-lora --step 150
      flowbp export flowbp_bridge --to merged --push me/my-model
      flowbp export klein-lora --to merged --model black-forest-labs/FLUX.2-klein-4B
    """
    with spinner("exporting"):
        from flowbp.config import ExportedWeights, ExportFormat
        from flowbp.evaluation.sources import check_export
        from imgen_common.files import check_is_new
        from imgen_common.run_folder.find import find_run

        chosen, kept = check_choice("--to", to, ExportFormat), check_choice("--weights", weights, ExportedWeights)
        path = find_run(run, runs, "flowbp train")
        if push is not None:
            _check_push(push)
        target = out or path / f"export-{to}"
        check_is_new(target)
        check_export(path, chosen, step, model)
        # from here on torch is needed
        from flowbp import export
        from imgen_common.console import quiet_libraries

        quiet_libraries()
        folder = export.export_run(path, chosen, target, kept, step, model)
    print(f"exported as {chosen}: {folder}")
    if push is not None:
        print(f"pushed: {export.push_to_hub(folder, push)}")


def _check_push(repo: str) -> None:
    """Raises UserError where nothing can be uploaded to a repository, as without a token."""
    from huggingface_hub import get_token

    from imgen_common.hub import offline

    if not re.fullmatch(r"(?:[\w.-]+/)?[\w.-]{1,96}", repo, re.ASCII):
        raise UserError(f"--push {repo}: must be ORG/NAME, the repository to upload to")
    if name := offline():
        raise UserError(f"--push {repo}: {name} is set, so that nothing can be uploaded; unset it")
    if get_token() is None:
        raise UserError(f"--push {repo}: needs a token; run `hf auth login`, or set HF_TOKEN")


def convert_reward(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="hpsv2, hpsv3, imagereward or aesthetic.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The published checkpoint (.pt, .pth, .safetensors).")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to create.")],
    companion: Annotated[
        str,
        typer.Option(
            "--with",
            metavar="REF",
            help="What the checkpoint lacks: for hpsv2 the tokenizer of any CLIP, for hpsv3 Qwen2-VL-7B-Instruct, "
            "for imagereward the tokenizer of google-bert/bert-base-uncased, for aesthetic the whole CLIP ViT-L/14.",
        ),
    ],
    prompt_source: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Required for hpsv3: hpsv3/dataset/data_collator_qwen.py of the published package hpsv3 1.0.0, which "
            "holds the text around a prompt. The file is parsed, not run.",
        ),
    ] = None,
) -> None:
    """Convert a published reward checkpoint, often a pickle, to a folder of safetensors that rewards.0.ref can name.
    It reads only tensors in plain containers; no code in the checkpoint is run. PickScore and CLIP need no conversion.

    Example:

    \b
      flowbp convert-reward hpsv2 HPS_v2.1_compressed.pt rewards/hpsv2 --with openai/clip-vit-large-patch14
      flowbp convert-reward hpsv3 HPSv3.safetensors rewards/hpsv3 --with Qwen/Qwen2-VL-7B-Instruct \\
        --prompt-source hpsv3/dataset/data_collator_qwen.py
      flowbp convert-reward imagereward ImageReward.pt rewards/imagereward --with google-bert/bert-base-uncased
      flowbp train --set rewards.0.score=hpsv2 --set rewards.0.ref=rewards/hpsv2
    """
    with spinner("converting"):
        from flowbp.rewards import ConvertibleReward, check_conversion
        from imgen_common.files import check_is_new

        chosen: ConvertibleReward = check_choice("KIND", kind, ConvertibleReward)
        check_is_new(out)
        check_conversion(chosen, file, companion, prompt_source)
        # from here on torch is needed
        from flowbp.rewards.convert import convert_checkpoint
        from imgen_common.console import quiet_libraries

        quiet_libraries()
        folder = convert_checkpoint(chosen, file, companion, out, prompt_source)
    print(f"reward: {folder}")
