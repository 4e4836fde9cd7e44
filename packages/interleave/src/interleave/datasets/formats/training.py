"""The reference's files of training rows: ShareGPT for SFT, JSON lines for GRPO."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from imgen_common.files import write_atomic, writing
from interleave.agents.prompts import IMAGE_MARKER
from interleave.datasets.files import (
    ImageImporter,
    RowError,
    check_json,
    copy_image,
    read_each,
    read_items,
    to_json,
    validate,
    write_json,
)
from interleave.datasets.rows import Evaluation, RlRow, SftRow
from interleave.storage.images import ImageStore

WHITE_PATH = "data/interleave/white.png"
"""A reinforcement row is an image made from nothing if its first path has this in it."""


# --- supervised rows -------------------------------------------------------------------------------------------------


ROLES = {"human": "user", "gpt": "assistant"}
"""Roles of the older form {conversations: [{from, value}]}, as they are called in {messages: [{role, content}]}."""


class _Turn(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: Annotated[Literal["user", "assistant"], BeforeValidator(lambda role: ROLES.get(str(role), role))] = Field(
        validation_alias=AliasChoices("role", "from")
    )
    content: str = Field(validation_alias=AliasChoices("content", "value"))

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, turn: Any) -> Any:
        """Without keys such as `tool_calls`, which a table has for every turn once one turn has it."""
        return {key: value for key, value in turn.items() if value is not None} if isinstance(turn, dict) else turn


def _unpack(value: object) -> object:
    """A list or an object that a table without nested columns holds as JSON."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _several(value: object) -> object:
    """A list of images, also of the one that LLaVA's items have, or of none."""
    value = _unpack(value)
    return value if isinstance(value, list) else [value] if value else []


class _SharegptItem(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    messages: Annotated[list[_Turn], BeforeValidator(_unpack)] = Field(
        validation_alias=AliasChoices("messages", "conversations")
    )
    images: Annotated[list[str | dict[str, Any]], BeforeValidator(_several)] = Field(
        default=[], validation_alias=AliasChoices("images", "image")
    )
    trajectory_id: str | None = None


UNREAD = ("system", "tools", "videos", "video", "audios", "audio", "image")
"""What other programs keep beside the messages of an item and show to the model, too."""


def read_sft(file: Path, root: Path, images: ImageStore, left_out: list[str] | None = None) -> Iterator[SftRow]:
    """Rows of planner_sft.json or critic_sft.json; in `left_out`, why a row is left out.

    Raises UserError, without `left_out` for the first row that cannot be read.
    """
    reader = ImageImporter(root, images)

    def make(where: str, value: object) -> SftRow:
        item = validate(_SharegptItem, value, where)
        if [turn.role for turn in item.messages] != ["user", "assistant"]:
            raise RowError(f"{where}: messages must be one of the user and one of the assistant")
        extra = item.model_extra or {}
        if lost := [key for key in UNREAD if _unpack(extra.get(key))]:
            what = f"has {', '.join(lost)} beside its messages, for which rows have no place"
            raise RowError(f"{where}: {what}; write the words into the user's turn, or remove the key")
        user, assistant = item.messages
        texts = tuple(user.content.split(IMAGE_MARKER))
        if len(texts) != len(item.images) + 1:
            raise RowError(f"{where}: {len(texts) - 1} {IMAGE_MARKER} markers for {len(item.images)} images")
        row = SftRow(
            texts=texts,
            image_ids=tuple(reader.import_image(path, where) for path in item.images),
            completion=assistant.content,
            trajectory_id=item.trajectory_id,
            extra=extra,
        )
        return check_json(row, where)

    return read_each(read_items(file), make, left_out)


def write_sft(rows: Iterable[SftRow], file: Path, images: ImageStore) -> None:
    """Write the rows, and their images to `images/` beside the file."""
    items = [
        {
            **row.extra,
            **({"trajectory_id": row.trajectory_id} if row.trajectory_id is not None else {}),
            "messages": [
                {"role": "user", "content": IMAGE_MARKER.join(row.texts)},
                {"role": "assistant", "content": row.completion},
            ],
            "images": [copy_image(file, f"images/{image_id}.png", image_id, images) for image_id in row.image_ids],
        }
        for row in rows
    ]
    write_json(file, items)


# --- reinforcement rows ----------------------------------------------------------------------------------------------


class _RlLine(BaseModel):
    model_config = ConfigDict(extra="allow")
    origin_prompt: str
    rewritten_prompt: Annotated[str, BeforeValidator(lambda prompt: prompt or "")] = ""
    origin_image_path: str
    edited_image_path: str
    evaluation: Annotated[Evaluation, BeforeValidator(_unpack)]


def read_rl(file: Path, root: Path, images: ImageStore, left_out: list[str] | None = None) -> Iterator[RlRow]:
    """Rows for the critic's reinforcement learning; in `left_out`, why a row is left out.

    Raises UserError, without `left_out` for the first row that cannot be read.
    """
    reader = ImageImporter(root, images)

    def make(where: str, value: object) -> RlRow:
        line = validate(_RlLine, value, where)
        is_t2i = WHITE_PATH in line.origin_image_path
        after = reader.import_image(line.edited_image_path, where)
        row = RlRow(
            original_prompt=line.origin_prompt,
            prompt_used=line.rewritten_prompt,
            before_id=reader.import_source(line.origin_image_path, after, is_t2i, where),
            after_id=after,
            is_t2i=is_t2i,
            evaluation=line.evaluation,
            extra=line.model_extra or {},
        )
        return check_json(row, where)

    return read_each(read_items(file), make, left_out)


def write_rl(rows: Iterable[RlRow], file: Path, images: ImageStore) -> None:
    """Write the rows, and their images to `images/` beside the file."""
    lines = []
    for row in rows:
        before = f"images/{row.before_id}/{WHITE_PATH}" if row.is_t2i else f"images/{row.before_id}.png"
        line = {
            **row.extra,
            "origin_prompt": row.original_prompt,
            "rewritten_prompt": row.prompt_used,
            "origin_image_path": copy_image(file, before, row.before_id, images),
            "edited_image_path": copy_image(file, f"images/{row.after_id}.png", row.after_id, images),
            "evaluation": row.evaluation.model_dump(mode="json"),
        }
        lines.append(to_json(line))
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, "".join(lines))
