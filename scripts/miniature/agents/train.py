"""Supervised training of the miniature's agents by TRL's SFTTrainer, on rows that are made during training.

The dataset holds indices.  The collator makes the rows of a batch, each batch from its own random stream, and encodes
them as processor and chat template would (a test compares), but faster.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from imgen_common.config import Config
from imgen_common.shapes.stories import sample_story
from imgen_common.streams import numpy_generator
from interleave.agents.prompts import render_plan, render_verdict
from interleave.datasets.teachers import make_plan, make_verdict
from interleave.models.chat.local import to_conversation
from interleave.protocols import Message
from scripts.miniature.agents import models
from scripts.miniature.agents.cases import CaseSampler
from scripts.miniature.agents.data import Case, critic_message, planner_message, read_cases

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
    from trl import SFTConfig

IGNORED = -100
IMAGE_TOKENS = (32 // models.PATCH // models.MERGE) ** 2

Batch = tuple[Sequence[Message], Sequence[str], Tensor | None]
"""Prompts, answers, and the images (n, 3, 32, 32) of the prompts as uint8, in order."""


class TrainingRecipe(Config):
    """Length and rate of one agent's training."""

    steps: int
    """Updates."""
    batch: int
    """Rows of an update."""
    lr: float
    """Peak rate of AdamW, after a linear warm-up; a cosine leads to zero."""
    warmup: int = 100
    """Updates of warm-up."""
    seed: int
    """Seed of weights and rows."""
    save_every: int = 100
    """Updates between checkpoints."""
    riddles: float = 0.0
    """Share of the planner's batches that are riddles."""
    lengths: tuple[float, float, float, float] = (0.25, 0.25, 0.25, 0.25)
    """Shares of the planner's batches of stories of one to four steps; a batch has stories of one length."""
    drawn: tuple[float, float] = (0.4, 0.8)
    """Share of generated images among those of the critic, at the first update and at the last."""
    size: models.ModelSize
    """The model."""


PLANNER = TrainingRecipe(
    steps=800, batch=32, lr=2e-3, seed=31, riddles=0.35, lengths=(0.15, 0.25, 0.35, 0.25), size=models.PLANNER
)
PLANNER_LONGER = TrainingRecipe(
    steps=900, batch=32, lr=1.5e-3, seed=32, riddles=0.45, lengths=(0.08, 0.17, 0.35, 0.40), size=models.PLANNER
)
"""Continues from `PLANNER`, mostly on long stories."""
CRITIC = TrainingRecipe(steps=1600, batch=32, lr=1.5e-3, seed=41, size=models.CRITIC)
CRITIC_LONGER = {
    "critic-longer": TrainingRecipe(steps=700, batch=32, lr=1e-3, seed=42, drawn=(0.7, 0.85), size=models.CRITIC),
    "critic-last": TrainingRecipe(steps=1500, batch=32, lr=1e-3, seed=43, drawn=(0.8, 0.85), size=models.CRITIC),
    "critic-sure": TrainingRecipe(
        steps=500, batch=32, lr=6e-4, warmup=40, seed=44, drawn=(0.8, 0.85), size=models.CRITIC
    ),
    "critic-surest": TrainingRecipe(
        steps=800, batch=32, lr=7e-4, warmup=40, seed=45, drawn=(0.8, 0.85), size=models.CRITIC
    ),
    "critic-firm": TrainingRecipe(
        steps=700, batch=32, lr=1e-3, warmup=40, seed=46, drawn=(0.85, 0.85), size=models.CRITIC
    ),
    "critic-named": TrainingRecipe(
        steps=1200, batch=32, lr=1.2e-3, warmup=40, seed=47, drawn=(0.6, 0.8), size=models.CRITIC
    ),
    "critic-apart": TrainingRecipe(
        steps=1300, batch=32, lr=1.2e-3, warmup=40, seed=48, drawn=(0.6, 0.8), size=models.CRITIC
    ),
    "critic-moved": TrainingRecipe(
        steps=1300, batch=32, lr=1.2e-3, warmup=40, seed=49, drawn=(0.8, 0.85), size=models.CRITIC
    ),
    "critic-told": TrainingRecipe(
        steps=600, batch=32, lr=8e-4, warmup=40, seed=50, drawn=(0.85, 0.85), size=models.CRITIC
    ),
}
"""Stages that continue from `CRITIC` after the pretraining of `vision`, each from the one before, mostly on generated
images.

The report changed while the shipped weights were trained: before `critic-firm` it did not state for each wanted
thing whether it is there; before `critic-named` it had two tokens per thing; before `critic-apart` the embeddings of
`models.NAMES` were means of color and shape, which made equal tokens hard to distinguish from similar ones, and were
initialized again.  `critic-moved` was the first stage with shifted images, `critic-told` with `UNCHANGED` ones."""


def planner_batches(recipe: TrainingRecipe) -> Callable[[int], Batch]:
    """The planner's rows of an update."""

    def rows(step: int) -> Batch:
        rng = numpy_generator(recipe.seed, "planner", step)
        count = int(rng.choice(len(recipe.lengths), p=recipe.lengths)) + 1
        riddle = bool(rng.random() < recipe.riddles)
        stories = [sample_story(rng, "train", count, riddle) for _ in range(recipe.batch)]
        return [planner_message(s.request) for s in stories], [render_plan(make_plan(s)) for s in stories], None

    return rows


def critic_batches(recipe: TrainingRecipe, cases: CaseSampler) -> Callable[[int], Batch]:
    """The critic's rows of an update: generated and rendered images with the verifier's verdicts."""

    def rows(step: int) -> Batch:
        rng = numpy_generator(recipe.seed, "critic", step)
        share = float(np.interp(step, (0, recipe.steps), recipe.drawn))
        return make_critic_batch([cases.sample(rng, share) for _ in range(recipe.batch)])

    return rows


def make_critic_batch(cases: Sequence[Case]) -> Batch:
    """Rows of given cases, with the answers that the verifier's readings imply."""
    verdicts = [
        make_verdict(*found, case.original, case.used) for case, found in zip(cases, read_cases(cases), strict=True)
    ]
    white = torch.full((3, 32, 32), 255, dtype=torch.uint8)
    images = [p for case in cases for p in (white if case.before is None else case.before, case.after)]
    return [critic_message(case) for case in cases], list(map(render_verdict, verdicts)), torch.stack(images)


def to_patches(images: Tensor) -> Tensor:
    """What the processor makes of images (n, 3, 32, 32) uint8: (64 n, 96), in [-1, 1], merged patches together."""
    n, side = len(images), 32 // models.PATCH // models.MERGE
    x = (images.float() / 255 - 0.5) / 0.5
    x = x.reshape(n, 3, side, models.MERGE, models.PATCH, side, models.MERGE, models.PATCH)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)[..., None, :, :].expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
    return x.reshape(n * 64, -1)


def encode_batch(words: "Qwen2Tokenizer", rows: Batch) -> dict[str, Tensor]:
    """A batch for the model: prompt, answer, end of turn; only the last two have labels; padded on the right."""
    messages, answers, images = rows
    prompts = [
        words.apply_chat_template(to_conversation(m), tokenize=False, add_generation_prompt=True) for m in messages
    ]
    prompts = [p.replace("<|image_pad|>", "<|image_pad|>" * IMAGE_TOKENS) for p in prompts]
    asked = words(prompts).input_ids
    said = words([answer + "<|im_end|>\n" for answer in answers]).input_ids
    longest = max(len(a) + len(s) for a, s in zip(asked, said, strict=True))
    ids = torch.full((len(asked), longest), words.pad_token_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, (a, s) in enumerate(zip(asked, said, strict=True)):
        ids[i, : len(a) + len(s)] = torch.tensor(a + s)
        mask[i, : len(a) + len(s)] = 1
        labels[i, len(a) : len(a) + len(s)] = torch.tensor(s)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if images is not None:
        batch["pixel_values"] = to_patches(images)
        batch["image_grid_thw"] = torch.tensor([[1, 8, 8]]).expand(len(images), -1)
        batch["mm_token_type_ids"] = (ids == words.convert_tokens_to_ids("<|image_pad|>")).int()
    return batch


def training_arguments(folder: Path, recipe: TrainingRecipe) -> "SFTConfig":
    """The recipe as arguments of TRL's trainer."""
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(folder / "checkpoints"),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch,
        learning_rate=recipe.lr,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup,
        adam_beta2=0.98,
        weight_decay=0.01,
        logging_steps=20,
        save_steps=recipe.save_every,
        save_total_limit=1,
        seed=recipe.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=False,
        max_length=None,
        report_to="none",
        disable_tqdm=True,
    )


def train_agent(folder: Path, recipe: TrainingRecipe, rows: Callable[[int], Batch], start: Path | None = None) -> None:
    """Trains (or resumes) in `folder`; leaves a transformers folder in `folder/model` and a log in `log.jsonl`.

    Does nothing where `folder/model` is there already.
    start: a folder of weights to start from; None starts from fresh weights.
    """
    from datasets import Dataset
    from transformers.trainer_utils import get_last_checkpoint
    from trl import SFTTrainer

    if (folder / "model").exists():
        return
    torch.manual_seed(recipe.seed)
    folder.mkdir(parents=True, exist_ok=True)
    processor = models.processor()
    words = processor.tokenizer
    model = models.load_model(start, recipe.size, words)

    def collate(items: Sequence[Mapping[str, int]]) -> dict[str, Tensor]:
        return encode_batch(words, rows(items[0]["index"] // recipe.batch))

    arguments = training_arguments(folder, recipe)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"index": range(recipe.steps * recipe.batch)}),
        data_collator=collate,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(arguments.output_dir))
    lines: list[dict[str, Any]] = trainer.state.log_history
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_model(model, processor, folder)


def save_model(model: "Qwen3VLForConditionalGeneration", processor: "Qwen3VLProcessor", folder: Path) -> None:
    """Writes both to `folder/model` atomically."""
    new = folder / "model.new"
    model.save_pretrained(new)
    processor.save_pretrained(new)
    new.rename(folder / "model")
