"""Training rows: read from a set's folder, measured in tokens, ordered, and made into what TRL's trainers read.

A dataset holds row numbers only; a row's pictures are read from the store when its batch is made.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from imgen_common.errors import UserError, nearest
from imgen_common.streams import numpy_generator
from interleave.agents.prompts import Template, render_critic
from interleave.datasets.rows import RlRow, Row, SftRow, parsed
from interleave.protocols import HashedImage
from interleave.storage.images import IMAGES, ImageStore
from interleave.training.batch_plan import GrpoSums
from interleave.training.config import GrpoConfig
from interleave.training.reward import CriticRow


@dataclass(frozen=True)
class GrpoJob:
    """A reinforcement that passed every check.  prompts: of the rows, in their order, rendered as at run time."""

    config: GrpoConfig
    rows: tuple[RlRow, ...]
    prompts: tuple[SftRow, ...]
    sums: GrpoSums

    @property
    def pictures(self) -> ImageStore:
        """Where the rows' pictures are."""
        return ImageStore(Path(self.config.data) / IMAGES)

    def item(self, number: int) -> dict[str, Any]:
        """What the trainer reads for a row."""
        prompt = self.prompts[number]
        return grpo_item(number, self.rows[number], prompt, {i: self.pictures.get(i) for i in prompt.image_ids})


@dataclass(frozen=True)
class Rows:
    """Supervised rows, with the store of their pictures and how many were left out for their length."""

    rows: tuple[SftRow, ...]
    pictures: ImageStore
    left_out: int = 0


def read_rows(folder: Path, name: str, kind: type[Row]) -> list[Row]:
    """The rows of `folder/NAME.jsonl`, checked: readable, their pictures there, an answer where one is taught.

    Raises UserError naming file and line.
    """
    path = folder / f"{name}.jsonl"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        others = [other.stem for other in folder.glob("*.jsonl")] if folder.is_dir() else []
        raise UserError(f"{path}: no such file{nearest(name, others)}; make it with interleave data build") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    store = ImageStore(folder / IMAGES)
    rows = [_row(line, kind, store, f"{path}:{number}") for number, line in enumerate(data.splitlines(), 1)]
    if not rows:
        raise UserError(f"{path}: holds no rows; give a set with at least one")
    return rows


def _row(line: bytes, kind: type[Row], store: ImageStore, where: str) -> Row:
    try:
        row = parsed(line, kind)
    except ValueError as error:
        raise UserError(f"{where}: {error}; mend or remove the row") from None
    if isinstance(row, SftRow) and not row.completion.strip():
        raise UserError(f"{where}: the answer is empty; mend or remove the row")
    for image_id in row.image_ids if isinstance(row, SftRow) else (row.before_id, row.after_id):
        if image_id not in store:
            raise UserError(f"{where}: its picture {image_id[:12]}... is not in {IMAGES}/; mend or remove the row")
    return row


# --- prompts ---------------------------------------------------------------------------------------------------------


def critic_prompt(row: RlRow, template: Template) -> SftRow:
    """The prompt of a reinforcement row, rendered as at run time, as a supervised row without an answer."""
    return SftRow.of(render_critic(template, row.named()), "")


def content(texts: Sequence[str]) -> list[dict[str, Any]]:
    """The parts of a user turn with places for pictures between the texts, as TRL takes them."""
    parts: list[dict[str, Any]] = []
    for index, text in enumerate(texts):
        if index:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def sft_item(row: SftRow, pictures: Mapping[str, HashedImage]) -> dict[str, Any]:
    """What TRL's SFTTrainer is given for a row."""
    return {
        "prompt": [{"role": "user", "content": content(row.texts)}],
        "completion": [{"role": "assistant", "content": row.completion}],
        "images": [pictures[image_id].image for image_id in row.image_ids],
    }


def grpo_item(number: int, row: RlRow, prompt: SftRow, pictures: Mapping[str, HashedImage]) -> dict[str, Any]:
    """What TRL's GRPOTrainer is given for a row; `row` comes back to the reward functions."""
    scored = CriticRow(
        id=str(number),
        original_prompt=row.original_prompt,
        prompt_used=row.prompt_used,
        before=pictures[row.before_id],
        after=pictures[row.after_id],
        is_t2i=row.is_t2i,
        success=row.evaluation.success,
        semantics=row.evaluation.semantics,
        quality=row.evaluation.quality,
    )
    return {
        "prompt": [{"role": "user", "content": content(prompt.texts)}],
        "images": [pictures[image_id].image for image_id in prompt.image_ids],
        "row": scored,
    }


def dataset(
    numbers: Sequence[int],
    ids_of: Callable[[int], Sequence[str]],
    item: Callable[[int, Mapping[str, HashedImage]], dict[str, Any]],
    store: ImageStore,
) -> Any:
    """A `datasets.Dataset` of row numbers that becomes `item(number, pictures)` when a batch is made."""
    from datasets import Dataset

    def made(batch: Mapping[str, Sequence[int]]) -> dict[str, list[Any]]:
        wanted = {image_id for number in batch["number"] for image_id in ids_of(number)}
        pictures = {image_id: store.get(image_id) for image_id in wanted}
        items = [item(number, pictures) for number in batch["number"]]
        return {key: [one[key] for one in items] for key in items[0]}

    return Dataset.from_dict({"number": list(numbers)}).with_transform(made)


# --- lengths ---------------------------------------------------------------------------------------------------------


def sized(processor: Any, max_pixels: int | None) -> Any:
    """`processor` with pictures limited as `LocalChat` does."""
    if max_pixels is not None:
        size = dict(processor.image_processor.size)
        processor.image_processor.size = size | {"longest_edge": max_pixels}
    return processor


def check_template(processor: Any, row: SftRow) -> None:
    """Raises UserError if the model's chat template does not put an answer in whole, after the prompt of run time."""
    user = {"role": "user", "content": content(row.texts)}
    said = {"role": "assistant", "content": [{"type": "text", "text": row.completion}]}
    asked = processor.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    whole = processor.apply_chat_template([user, said], tokenize=False)
    if not whole.startswith(asked + row.completion):
        raise UserError(
            "the model's chat template changes the answer (its <think> may be removed), so that what is taught is not "
            "what is asked for at run time; use a model whose template keeps it"
        )


def num_tokens(row: SftRow, processor: Any, size_of: Callable[[str], tuple[int, int]]) -> int:
    """Length of prompt and answer in tokens.  size_of: width and height of a picture by its id."""
    messages = [{"role": "user", "content": content(row.texts)}]
    if row.completion:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": row.completion}]})
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=not row.completion)
    reader = processor.image_processor
    patches = 0
    for image_id in row.image_ids:
        width, height = size_of(image_id)
        patches += reader.get_number_of_image_patches(height, width, {}) // reader.merge_size**2 - 1
    return len(processor.tokenizer(text, add_special_tokens=False).input_ids) + patches


def longest(rows: Sequence[SftRow], processor: Any, store: ImageStore) -> SftRow:
    """The row of most tokens."""
    lengths = _lengths(rows, processor, store)
    return rows[lengths.index(max(lengths))]


def _lengths(rows: Sequence[SftRow], processor: Any, store: ImageStore) -> list[int]:
    def size_of(image_id: str) -> tuple[int, int]:
        with Image.open(store.path(image_id)) as picture:  # the header alone
            return picture.size

    return [num_tokens(row, processor, size_of) for row in rows]


def short_enough(
    rows: Sequence[SftRow], processor: Any, store: ImageStore, max_length: int | None, answer: int = 0
) -> list[int]:
    """Numbers of the rows that, with `answer` tokens more, are not longer than `max_length`.

    Raises UserError if there are none.
    """
    if max_length is None:
        return list(range(len(rows)))
    lengths = [length + answer for length in _lengths(rows, processor, store)]
    kept = [number for number, length in enumerate(lengths) if length <= max_length]
    if not kept:
        shortest = min(lengths)
        raise UserError(f"max_length {max_length}: every row is longer, the shortest has {shortest} tokens; raise it")
    return kept


# --- order -----------------------------------------------------------------------------------------------------------


def is_mixed(rows: Sequence[SftRow]) -> bool:
    """Whether some rows have pictures and others have none."""
    return len({bool(row.image_ids) for row in rows}) == 2


def arranged(has_pictures: Sequence[bool], batch: int, epochs: int, seed: int | None) -> list[int]:
    """Row numbers for `epochs` passes in which every `batch` rows, over all processes, have pictures or none has.

    Under ZeRO-3 processes that differ in whether they run the vision tower wait for each other for ever.  In each pass
    every row comes once; a kind's last batch is filled up with rows of its kind.  seed: None keeps the order.
    """
    order: list[int] = []
    for epoch in range(epochs):
        rng = None if seed is None else numpy_generator(seed, "order", epoch)
        batches: list[list[int]] = []
        for kind in (False, True):
            rows = [number for number, pictured in enumerate(has_pictures) if pictured == kind]
            if rng is not None:
                rng.shuffle(rows)
            short = -len(rows) % batch
            rows += [rows[i % len(rows)] for i in range(short)]
            batches += [rows[i : i + batch] for i in range(0, len(rows), batch)]
        if rng is not None:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        order += [number for one in batches for number in one]
    return order
