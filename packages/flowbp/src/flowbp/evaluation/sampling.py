"""Images and scores of a published model or of a trained run, outside of training."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowbp.config import TrainConfig
from flowbp.core.types import Backbone, Reward, repeat_batch
from flowbp.data.embeddings import PromptEmbeddings
from flowbp.data.prompts import is_shapes_source
from flowbp.evaluation.evaluate import Evaluation, EvaluationTask, decode_finite, evaluate, generate_latents
from flowbp.evaluation.sources import ModelSource, model_source
from imgen_common.devices import device_of
from imgen_common.errors import check_text


def generate_images(
    backbone: Backbone,
    prompt: str,
    seeds: Sequence[int],
    size: tuple[int, int],
    num_inference_steps: int,
    guidance_scale: float,
) -> Tensor:
    """Images (b, 3, h, w) of one prompt, one per seed.

    A seed gives the image that the diffusers pipeline of the family generates with
    `generator=torch.Generator().manual_seed(seed)`.  Raises UserError where the model's images are not finite.
    """
    noise = torch.cat([backbone.noise(1, size, torch.Generator().manual_seed(seed)) for seed in seeds])
    cond = repeat_batch(backbone.encode([prompt]), len(seeds))
    negative = backbone.encode([""])
    latents = generate_latents(backbone, cond, negative, noise, size, num_inference_steps, guidance_scale)
    return decode_finite(backbone, latents)


def sample(
    source: str | Path, prompts: Sequence[str], seeds: Sequence[int] = (0,), runs: str | Path = "runs"
) -> Tensor:
    """Images (prompts x seeds, 3, h, w) in [0, 1], prompt by prompt, of a run or of a model reference.

    source: a run folder, its name under `runs`, or a model as in `model.ref`; size, steps and guidance scale are those
    of its configuration.  Raises UserError if there is no such run or model.
    """
    for text in prompts:
        check_text(text, "prompts")
    model = model_source(str(source), Path(runs))
    config, backbone = model.config, model.load(device_of("auto"))
    size, steps = (config.model.height, config.model.width), config.eval.num_inference_steps
    images = [generate_images(backbone, text, seeds, size, steps, config.eval_guidance_scales[0]) for text in prompts]
    return torch.cat(images)


def next_file_number(folder: Path) -> int:
    """The first number that is larger than any with which a file name in the folder begins."""
    found = [re.match(r"(\d+)-", path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(match[1]) + 1 for match in found if match), default=0)


def slug(text: str) -> str:
    """A prompt as part of a file name, which has at most 255 bytes."""
    words = "-".join(re.findall(r"\w+", text.lower()))[:60]
    return words.encode()[:180].decode(errors="ignore") or "image"


def evaluate_model(
    source: ModelSource,
    prompts: Sequence[str],
    rewards: dict[str, Reward],
    config: TrainConfig,
    scales: Sequence[float],
    on_progress: Callable[[str, int, int], None],
) -> dict[float, Evaluation]:
    """Evaluations of one model by guidance scale, with the seeds and sizes of `config`."""
    backbone = source.load(device_of("auto"))
    embeddings = PromptEmbeddings(backbone)
    task = EvaluationTask(prompts, rewards, verify=is_shapes_source(config.eval.prompts))

    def at(scale: float) -> Evaluation:
        def progress(done: int) -> None:
            on_progress(f"{source.label}, guidance {scale:g}", done, len(prompts))

        return evaluate(backbone, embeddings, task, config, scale, on_progress=progress)

    return {scale: at(scale) for scale in scales}
