"""Images and scores of a published model or of a trained run, outside of training."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowbp.backbones.source_tokens import pack_sources
from flowbp.config import TrainConfig
from flowbp.core.types import Backbone, repeat_batch
from flowbp.data.edits import check_edits, sources_of
from flowbp.data.embeddings import PromptEmbeddings, SourceLatents, encode_one, negative_of
from flowbp.data.prompts import is_shapes_source
from flowbp.data.rows import edits_of_files
from flowbp.evaluation.evaluate import Evaluation, EvaluationTask, decode_finite, evaluate, generate_latents
from flowbp.evaluation.sources import ModelSource, model_source
from imgen_common.devices import device_of
from imgen_common.errors import UserError, check_text, warn_once


def generate_images(
    backbone: Backbone,
    prompt: str,
    seeds: Sequence[int],
    size: tuple[int, int],
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int | None = None,
) -> Tensor:
    """Images (b, 3, h, w) of one prompt, or edits of its sources, one per seed.  batch_size: drawn at once; None: all.

    A seed gives the image that the diffusers pipeline of the family generates with
    `generator=torch.Generator().manual_seed(seed)`.  Raises UserError where the family does not take the sources, or
    the model's images are not finite.
    """
    check_edits([prompt], backbone)
    noise = torch.cat([backbone.noise(1, size, torch.Generator().manual_seed(seed)) for seed in seeds])
    sources = pack_sources([[*map(SourceLatents(backbone), sources_of(prompt))]])
    cond = {**encode_one(backbone, prompt), **sources}
    negative = {**encode_one(backbone, negative_of(backbone, prompt)), **sources}
    images = []
    for part in noise.split(batch_size or len(seeds)):
        conds = repeat_batch(cond, len(part))
        latents = generate_latents(backbone, conds, negative, part, size, num_inference_steps, guidance_scale)
        images.append(decode_finite(backbone, latents))
    return torch.cat(images)


def sample(
    source: str | Path,
    prompts: str | Sequence[str],
    seeds: Sequence[int] = (0,),
    runs: str | Path = "runs",
    images: str | Path | Sequence[str | Path] = (),
) -> Tensor:
    """Images (prompts x seeds, 3, h, w) in [0, 1], prompt by prompt, of a run or of a model reference.

    source: a run folder, its name under `runs`, or a model as in `model.ref`; size, steps and guidance scale are those
    of its configuration.  images: files that every prompt edits.
    Raises UserError if there is no such run or model, it does not take the images, or there is no prompt or no seed.
    """
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not len(texts) or not len(seeds):
        raise UserError(f"{'seeds' if len(texts) else 'prompts'}: give at least one")
    for text in texts:
        check_text(text, "prompts")
    files = [images] if isinstance(images, str | Path) else images
    edits = edits_of_files(texts, [Path(image) for image in files])
    model = model_source(str(source), Path(runs))
    for note in model.assumed_settings():
        warn_once(note)
    config = model.config
    size, steps = (config.model.height, config.model.width), config.eval.num_inference_steps
    model.check_drawing(edits, size, steps)
    backbone = model.load(device_of("auto"))
    scale = config.eval_guidance_scales[0]
    batch = config.eval.batch_size
    return torch.cat([generate_images(backbone, one, seeds, size, steps, scale, batch) for one in edits])


def next_file_number(folder: Path) -> int:
    """The first number that is larger than any with which a file name in the folder begins."""
    found = [re.match(r"\.?(\d+)-", path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(match[1]) + 1 for match in found if match), default=0)


@contextlib.contextmanager
def own_numbers(folder: Path, count: int) -> Iterator[int]:
    """Within it `count` numbers, from that which it gives, are of this process: other ones take higher numbers."""
    while True:
        with contextlib.ExitStack() as marks:
            first = next_file_number(folder)
            try:
                for number in range(first, first + count):
                    mark = folder / f".{number:03d}-taken"
                    mark.open("x").close()
                    marks.callback(mark.unlink, missing_ok=True)
            except FileExistsError:
                continue  # another process took it between the two
            yield first
            return


def slug(text: str) -> str:
    """A prompt as part of a file name, which has at most 255 bytes."""
    words = "-".join(re.findall(r"\w+", text.lower()))[:60]
    return words.encode()[:180].decode(errors="ignore") or "image"


def evaluate_model(
    source: ModelSource,
    prompts: Sequence[str],
    config: TrainConfig,
    scales: Sequence[float],
    on_progress: Callable[[str, int, int], None],
) -> dict[float, Evaluation]:
    """Evaluations of one model by guidance scale, with the rewards, seeds and sizes of `config`."""
    device = device_of("auto")
    backbone = source.load(device)
    embeddings = PromptEmbeddings(backbone)
    embeddings.add(prompts)
    backbone.unload_text_encoders()
    rewards = {scorer.name: scorer.load(device) for scorer in config.scorers}  # in the memory that these have left
    task = EvaluationTask(prompts, rewards, verify=is_shapes_source(config.eval.prompts))

    def at(scale: float) -> Evaluation:
        def progress(done: int) -> None:
            on_progress(f"{source.label}, guidance {scale:g}", done, len(prompts))

        return evaluate(backbone, embeddings, task, config, scale, on_progress=progress)

    return {scale: at(scale) for scale in scales}
