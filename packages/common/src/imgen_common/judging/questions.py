"""What a judge is asked, and what comes back."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from imgen_common.http import HttpError, Refusal
from imgen_common.images import content_hash

Message = tuple[str | Image.Image, ...]
"""One user turn: texts and RGB images in the order in which the model reads them."""


class Unreadable(ValueError):
    """An answer that is not of the form that was asked for.  The message says what is wrong, on one line."""


class JudgeError(Exception):
    """The judge gave no answer to one question.  The message fits on one line.

    kind: `refused` (its words are the message), `timeout`, `malformed_response`, `server_error`, ... as of
    `imgen_common.http`, and `bad_request` where not the model or its filter refused, but the server did not take the
    request, as for its size.  is_outage: whether it would answer no other question either.
    """

    def __init__(self, kind: str, message: str, *, is_outage: bool = False) -> None:
        super().__init__(message)
        self.kind, self.is_outage = kind, is_outage

    @classmethod
    def of_http(cls, error: HttpError) -> "JudgeError":
        """What the failure of an endpoint says of a question.  A key, an address or a quota that it does not accept
        would end every other question too."""
        is_of_server = error.kind == "refused" and not error.is_denied and not isinstance(error, Refusal)
        kind = "bad_request" if is_of_server else error.kind
        return cls(kind, str(error), is_outage=error.is_outage or error.is_denied)


@dataclass(frozen=True)
class Question:
    """One call of a judge about an item.

    name: it differs among the questions of an item.  parse: an answer's value, which JSON can hold; raises Unreadable.
    system: text of the system turn; empty: there is none.  sample: number among equal questions that are asked anew,
    where several answers are wanted.  tries: how often it is asked until an answer can be read.
    answer_tokens: how long an answer is about, for the estimate of costs.  example: a value that an estimate puts in
    the place of the answer, where a later question depends on it.
    """

    name: str
    message: Message
    parse: Callable[[str], Any] = field(compare=False)
    system: str = ""
    sample: int = 0
    tries: int = 3
    answer_tokens: int = 100
    example: Any = None

    def shown(self) -> str:
        """sha256 (hex) of the words and images, whoever is asked."""
        parts = [part if isinstance(part, str) else {"image": content_hash(part)} for part in self.message]
        return hashlib.sha256(json.dumps([self.system, parts]).encode()).hexdigest()

    def key(self, judge: str) -> str:
        """sha256 (hex) of everything that an answer of the judge of that id depends on."""
        return hashlib.sha256(json.dumps([judge, self.shown(), self.sample]).encode()).hexdigest()


@dataclass(frozen=True)
class JudgeReply:
    """The words of one call, and the tokens that it cost, as the server counts them (0: it does not say).

    ending: how the answer ended where that was not by itself, such as `cut off after 4096 tokens`.  is_cut_off: whether
    it is that; then what stands in it before the end of its thoughts is no answer.
    """

    text: str
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    ending: str = ""
    is_cut_off: bool = False


class JudgeModel(Protocol):
    """A chat model that answers questions."""

    @property
    def id(self) -> str:
        """Name and settings that answers depend on."""
        ...

    async def ask(self, system: str, message: Message, seed: int) -> JudgeReply:
        """The answer.  Raises JudgeError."""
        ...

    async def close(self) -> None:
        """Release connections and memory."""
        ...
