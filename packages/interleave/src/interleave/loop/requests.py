"""Requests from a command line or a file: their words and images, checked and put into a run's store."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from imgen_common.errors import UserError, check_text, is_blank, nearest
from imgen_common.files import numbered_lines, write_atomic
from imgen_common.images import decode
from imgen_common.tables import check_no_token, describe_type, image_path, read_table
from interleave.protocols import HashedImage
from interleave.records import Request
from interleave.storage.images import ImageStore

REQUESTS = "requests.jsonl"
MAX_CHARACTERS = 20_000
"""Longest request."""


class ImagePart(BaseModel):
    """An image in the middle of a request's words; its path counts from the file's folder."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image: str


class RequestRow(BaseModel):
    """One line of a file of requests.  content: words and images in order, in the place of `text` and `images`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: str = ""
    content: list[str | ImagePart] = Field(default_factory=list)
    id: Annotated[str | None, BeforeValidator(lambda given: str(given) if type(given) is int else given)] = Field(
        default=None, min_length=1
    )
    images: Annotated[list[str], BeforeValidator(lambda given: [given] if isinstance(given, str) else given)] = Field(
        default_factory=list
    )
    category: str = ""

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, row: Any) -> Any:
        """Without the keys that pandas and datasets write where a row has no value: null, or an empty text."""
        return {key: value for key, value in row.items() if value not in (None, "")} if isinstance(row, dict) else row


def make_request(
    text: str,
    images: Sequence[Path | HashedImage],
    store: ImageStore,
    request_id: str | None = None,
    category: str = "",
) -> Request:
    """A request whose images are in the store.  Its id, unless given, is made of its content.

    Raises UserError for no words, too many, half a surrogate pair, or a file that is no image.
    """
    if is_blank(text):
        raise UserError("the request is empty; say what the story should be")
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"the request has {len(text)} characters; at most {MAX_CHARACTERS} are allowed; shorten it")
    check_text(text, "the request")
    given = (image if isinstance(image, HashedImage) else HashedImage.from_pil(decode(image)) for image in images)
    image_ids = tuple(store.put(one) for one in given)
    digest = hashlib.sha256(json.dumps([text, image_ids]).encode()).hexdigest()[:12]
    return Request(id=request_id or digest, text=text, image_ids=image_ids, category=category)


def make_interleaved_request(
    content: Sequence[str | Path | HashedImage],
    store: ImageStore,
    request_id: str | None = None,
    category: str = "",
) -> Request:
    """A request whose images stand between its words.  Raises UserError as `make_request`."""
    texts, images = [""], list[Path | HashedImage]()
    for part in content:
        if isinstance(part, str):
            texts[-1] += part
        else:
            images.append(part)
            texts.append("")
    text = texts[0] + "".join(f"[image {number}]{words}" for number, words in enumerate(texts[1:], 1))
    made = make_request(text, images, store, request_id, category)
    return made.model_copy(update={"texts": tuple(texts)}) if images else made


def read_requests(path: Path, store: ImageStore) -> list[Request]:
    """The requests of a file (see `read_table`): {"text", "id", "category", "images": [paths from its folder]}, or
    {"content": ["words", {"image": path}, ...]} where images stand between words.

    Raises UserError naming the line for another object, an id given twice, or an image that cannot be read.
    """
    requests: dict[str, Request] = {}
    for where, row in _rows(path):
        try:
            made = _make(row, path.parent, store)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if made.id in requests:
            what = f"id {made.id!r}" if row.id else "this request"
            remedy = "give every request an id of its own, as a .jsonl or a .csv has it, or remove one"
            raise UserError(f"{where}: {what} is there already; {remedy}")
        requests[made.id] = made
    if not requests:
        raise UserError(f"{path}: no requests in it; write one a line, or give rows with the key 'text'")
    return list(requests.values())


def _make(row: RequestRow, folder: Path, store: ImageStore) -> Request:
    if not row.content:
        return make_request(row.text, [image_path(folder, image) for image in row.images], store, row.id, row.category)
    if row.text or row.images:
        raise UserError("has content, and text or images beside it; give all of it in content")
    for words in (part for part in row.content if isinstance(part, str)):
        check_no_token(words, "content")
    content = [part if isinstance(part, str) else image_path(folder, part.image) for part in row.content]
    return make_interleaved_request(content, store, row.id, row.category)


def _rows(path: Path) -> Iterator[tuple[str, RequestRow]]:
    for where, row in read_table(path, "text"):
        try:
            yield where, RequestRow.model_validate(row)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"][:2]))  # behind it stands which of several types was tried
            got = f", got {describe_type(first['input'])}" if first["type"].endswith("_type") else ""
            hint = nearest(key, RequestRow.model_fields) if first["type"] == "extra_forbidden" else ""
            allowed = ", ".join(RequestRow.model_fields)
            place = f"{key}: " if key else ""
            raise UserError(f"{where}: {place}{first['msg']}{got}{hint}; allowed keys: {allowed}") from None


def save_requests(requests: Sequence[Request], run: Path) -> None:
    """Keep a run's requests in its folder, so that it can be resumed without their file."""
    write_atomic(run / REQUESTS, "".join(request.model_dump_json() + "\n" for request in requests))


def load_requests(run: Path) -> list[Request]:
    """The requests of a run.  Raises UserError if it was killed before they were written, or they cannot be read."""
    try:
        return [Request.model_validate_json(line) for _, line in numbered_lines(run / REQUESTS)]
    except (UserError, ValidationError):
        raise UserError(
            f"{run}: has no requests that can be read ({REQUESTS}): it was killed as it began (remove it, and start it "
            "again), or that file was changed (restore it)"
        ) from None
