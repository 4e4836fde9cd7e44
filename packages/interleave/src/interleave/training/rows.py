"""Training rows: reading them from a set's folder, measuring them in tokens, ordering them, and making TRL's examples.

A dataset holds row numbers only; the images of a row are read from the store when its batch is made.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgen_common.devices import launched_process
from imgen_common.errors import UserError, is_blank, nearest, one_line, warn_once
from imgen_common.http.chat import OPEN
from imgen_common.images import shape_problem
from imgen_common.streams import numpy_generator
from interleave.agents.prompts import Template, render_critic, without_reasoning
from interleave.datasets.rows import (
    RlRow,
    Row,
    SftRow,
    parse_row,
    placeholder_image,
    read_lines,
    text_problems,
)
from interleave.protocols import HashedImage
from interleave.storage.images import IMAGES, ImageStore
from interleave.training.batch_plan import GrpoBatchPlan
from interleave.training.config import GrpoConfig, TrainingConfig
from interleave.training.reward import RecordedAttempt

LoadImage = Callable[[str], HashedImage]
"""Gives the image of an id."""


@dataclass(frozen=True)
class FirstRow:
    """The first row that is trained on: its prompt as the model reads it, with one token for each image, and the
    answer that is learned, empty where the model writes it."""

    prompt: str
    completion: str = ""

    def lines(self) -> list[str]:
        """For a terminal, without what could rewrite it."""
        parts = {"first prompt, as the model reads it:": self.prompt, "the answer that is learned:": self.completion}
        return [
            line
            for title, text in parts.items()
            if text
            for line in (title, *(f"  {one_line(line, limit=None)}" for line in text.splitlines()), "")
        ]


@dataclass(frozen=True)
class GrpoJob:
    """A GRPO training run that passed every check.

    prompts: of the rows in their order, rendered as at run time.  opened: what the chat template begins each answer
    with (`opened_by_template`).
    """

    config: GrpoConfig
    rows: tuple[RlRow, ...]
    prompts: tuple[SftRow, ...]
    batch_plan: GrpoBatchPlan
    opened: str = ""

    def example(self, number: int, load: LoadImage) -> dict[str, Any]:
        """The example of a row for TRL's GRPOTrainer, which passes `row` on to the reward functions."""
        row, prompt = self.rows[number], self.prompts[number]
        attempt = RecordedAttempt(
            id=str(number),
            original_prompt=row.original_prompt,
            prompt_used=row.prompt_used,
            before=load(row.before_id),
            after=load(row.after_id),
            is_t2i=row.is_t2i,
            success=row.evaluation.success,
            semantics=row.evaluation.semantics,
            quality=row.evaluation.quality,
        )
        return {
            "prompt": chat_turns(prompt),
            "images": [load(image_id).image for image_id in prompt.image_ids],
            "row": attempt,
        }


def image_store(config: TrainingConfig) -> ImageStore:
    """The store that holds the images of the rows."""
    return ImageStore(Path(config.data) / IMAGES)


def rows_file(folder: Path, name: str) -> Path:
    """`folder/NAME.jsonl`.  Raises UserError if there is none."""
    path = folder / f"{name}.jsonl"
    if folder.is_file():
        raise UserError(f"data {folder}: is a file; give the folder of the set that has it, {folder.parent}")
    if not path.is_file():
        others = [other.stem for other in folder.glob("*.jsonl")] if folder.is_dir() else []
        made = "make it with interleave data build, or of files in other formats with interleave data import"
        raise UserError(f"{path}: no such file{nearest(name, others)}; {made}")
    return path


def read_rows(folder: Path, name: str, kind: type[Row], *, reasoning: bool = True) -> list[Row]:
    """The rows of `folder/NAME.jsonl`; the answers of supervised ones without what was thought unless `reasoning`.

    Raises UserError naming file and line where a row cannot be read, an image is missing or an answer is empty.
    """
    path = rows_file(folder, name)
    store = ImageStore(folder / IMAGES)
    rows = [_read_row(line, kind, reasoning, store, f"{path}:{number}") for number, line in read_lines(path)]
    if not rows:
        raise UserError(f"{path}: holds no rows; give a set with at least one")
    return rows


def _read_row(line: bytes, kind: type[Row], reasoning: bool, store: ImageStore, where: str) -> Row:
    try:
        row = parse_row(line, kind)
        if isinstance(row, SftRow) and not reasoning:
            row = row.model_copy(update={"completion": without_reasoning(row.completion)})
        if isinstance(row, SftRow) and (problem := next(text_problems(row), None)):
            raise ValueError(problem)
        if isinstance(row, RlRow) and is_blank(row.original_prompt):
            raise ValueError("original_prompt is empty")
        for image_id in row.image_ids if isinstance(row, SftRow) else (row.before_id, row.after_id):
            if image_id not in store:
                raise ValueError(f"its image {image_id[:12]}... is not in {IMAGES}/")
            if wrong := shape_problem(*store.size(image_id)):
                raise ValueError(f"its image {image_id[:12]}... {wrong}")
    except (ValueError, UserError) as error:
        raise UserError(f"{where}: {error}; fix or remove the row (interleave data check names all)") from None
    return row


def critic_prompt(row: RlRow, template: Template) -> SftRow:
    """The prompt of a row for GRPO, rendered as at run time, as a supervised row without an answer."""
    return SftRow.from_message(render_critic(template, row.critic_input(placeholder_image)), "")


def chat_turns(row: SftRow) -> list[dict[str, Any]]:
    """The turns of user and, where a row has an answer, assistant, with a place for each image."""
    content: list[dict[str, Any]] = []
    for index, text in enumerate(row.texts):
        content += [{"type": "image"}] if index else []
        content += [{"type": "text", "text": text}] if text else []
    turns = [{"role": "user", "content": content}]
    if row.completion:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": row.completion}]})
    return turns


def sft_example(row: SftRow, load: LoadImage) -> dict[str, Any]:
    """The example of a row for TRL's SFTTrainer."""
    return {
        "prompt": chat_turns(row)[:1],
        "completion": [{"role": "assistant", "content": row.completion}],
        "images": [load(image_id).image for image_id in row.image_ids],
    }


def build_dataset(
    numbers: Sequence[int], example: Callable[[int, LoadImage], dict[str, Any]], store: ImageStore
) -> Any:
    """A `datasets.Dataset` of row numbers, each of which becomes its example when its batch is made."""
    from datasets import Dataset

    def make_examples(batch: Mapping[str, Sequence[int]]) -> dict[str, list[Any]]:
        load = functools.cache(store.get)  # each image of a batch is read once
        examples = [example(number, load) for number in batch["number"]]
        return {key: [one[key] for one in examples] for key in examples[0]}

    return Dataset.from_dict({"number": list(numbers)}).with_transform(make_examples)


def opened_by_template(processor: Any, row: SftRow, options: Mapping[str, Any] | None = None) -> str:
    """`<think>` where the chat template opens it for the model, which then does not say it, as of Qwen3-VL-Thinking;
    else nothing.  Run time puts it before the answer, too.  options: of the template."""
    return OPEN if rendered_prompt(processor, row, options).rstrip().endswith(OPEN) else ""


def rendered_prompt(processor: Any, row: SftRow, options: Mapping[str, Any] | None = None) -> str:
    """What the model reads before its answer, as its chat template writes it; one token stands for each image."""
    prompt: str = processor.apply_chat_template(
        chat_turns(row)[:1], tokenize=False, add_generation_prompt=True, **(options or {})
    )
    return prompt


def check_chat_template(processor: Any, row: SftRow) -> None:
    """Raises UserError unless the chat template renders the prompt of run time and after it the unchanged answer."""
    whole = processor.apply_chat_template(chat_turns(row), tokenize=False)
    if not whole.startswith(rendered_prompt(processor, row) + row.completion):
        raise UserError(
            "the model's chat template changes the answer (it may remove <think>), so that the model would not learn "
            "what is asked for at run time; use a model whose template keeps the answer"
        )


def num_tokens(row: SftRow, processor: Any, store: ImageStore) -> int:
    """Length of prompt and answer in tokens.  Raises UserError where the model's processor cannot say it."""
    text = processor.apply_chat_template(chat_turns(row), tokenize=False, add_generation_prompt=not row.completion)
    image_processor = processor.image_processor
    num_extra = 0
    for image_id in row.image_ids:
        if not all(hasattr(image_processor, name) for name in ("get_number_of_image_patches", "merge_size")):
            raise UserError(
                f"model: its {type(image_processor).__name__} does not say how many tokens an image takes; take a "
                "model of Qwen's or GLM's; or train with max_length: null, and without --dry-run"
            )
        width, height = store.size(image_id)
        try:
            patches = image_processor.get_number_of_image_patches(height, width, {})
        except ValueError as error:
            raise UserError(
                f"image {image_id[:12]}...: {width}x{height}: the model does not take it ({error})"
            ) from None
        num_extra += patches // image_processor.merge_size**2 - 1  # the text has one token for each image
    return len(processor.tokenizer(text, add_special_tokens=False).input_ids) + num_extra


def select_by_length(
    rows: Sequence[SftRow], processor: Any, store: ImageStore, max_length: int | None, answer: int = 0
) -> list[int]:
    """Numbers of the rows that have at most `max_length` tokens, `answer` more included; how many have not is said.

    Raises UserError if there are none.
    """
    if max_length is None:
        return list(range(len(rows)))
    lengths = [num_tokens(row, processor, store) + answer for row in rows]
    kept = [number for number, length in enumerate(lengths) if length <= max_length]
    if not kept:
        raise UserError(
            f"max_length {max_length}: every row is longer, the shortest has {min(lengths)} tokens; raise it"
        )
    if len(kept) < len(rows) and launched_process(os.environ).rank == 0:
        longest = f"the longest has {max(lengths)}"
        warn_once(
            f"{len(rows) - len(kept)} of {len(rows)} rows have more than max_length {max_length} tokens and are "
            f"left out; {longest}"
        )
    return kept


def has_both_kinds(rows: Sequence[SftRow]) -> bool:
    """Whether some rows have images and others have none."""
    return len({bool(row.image_ids) for row in rows}) == 2


def order_by_kind(has_images: Sequence[bool], batch: int, epochs: int, seed: int | None) -> list[int]:
    """Row numbers for `epochs` passes in which each `batch` rows, over all processes, either all have images or none.

    Under ZeRO-3, processes that differ in whether they run the vision tower would wait for each other forever.  Each
    pass has every row once; the last batch of a kind is filled up with rows of its kind.  seed: None keeps the order.
    """
    order: list[int] = []
    for epoch in range(epochs):
        rng = None if seed is None else numpy_generator(seed, "order", epoch)
        batches: list[list[int]] = []
        for kind in (False, True):
            rows = [number for number, has_image in enumerate(has_images) if has_image == kind]
            if rng is not None:
                rng.shuffle(rows)
            rows += [rows[i % len(rows)] for i in range(-len(rows) % batch)]
            batches += [rows[i : i + batch] for i in range(0, len(rows), batch)]
        if rng is not None:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        order += [number for one in batches for number in one]
    return order
