"""The four replaceable parts of the loop, as Protocols, and the plain data that passes between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from PIL import Image

from imgen_common.images import content_hash
from interleave.records import Plan, Request, Scores, Verdict

FailureKind = Literal["unreachable", "refused", "overloaded", "deadline", "garbage", "out_of_memory", "broken"]
"""unreachable: no connection.  refused: the endpoint said no for good (token, model name, request).  overloaded: it
said not now, more often than we asked again.  deadline: too slow.  garbage: it answered what cannot be read.
out_of_memory, broken: a local model failed."""


class PartFailed(Exception):
    """A part of the loop failed on one request; the others go on.  The message fits on one line."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Picture:
    """An RGB picture and the hash of its pixels."""

    image: Image.Image = field(repr=False, compare=False)
    id: str

    @classmethod
    def of(cls, image: Image.Image) -> "Picture":
        """`image` as RGB under its own hash."""
        rgb = image.convert("RGB")
        return cls(rgb, content_hash(rgb))


Message = tuple[str | Picture, ...]
"""One user turn: texts and pictures in the order in which the model reads them."""


@dataclass(frozen=True)
class Reply:
    """What a chat model answered.  `truncated`: it hit its limit of tokens.

    `token_probabilities`: where the model tells, each answered token's text and its alternatives' probabilities.
    """

    text: str
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    truncated: bool = False
    token_probabilities: tuple[tuple[str, Mapping[str, float]], ...] = ()


class ChatModel(Protocol):
    """A vision-language model that answers one user turn.  Raises PartFailed."""

    @property
    def id(self) -> str:
        """Name and settings that answers depend on."""
        ...

    async def chat(self, message: Message, seed: int) -> Reply:
        """The answer; equal messages and seeds give equal answers where the model allows it."""
        ...

    async def close(self) -> None:
        """Let go of connections and memory."""
        ...


@dataclass(frozen=True)
class Job:
    """One picture to make: from the prompt alone, or by editing `sources` (the last one is the one to change)."""

    prompt: str
    sources: tuple[Picture, ...]
    seed: int


class Generator(Protocol):
    """Anything that makes a picture.  Equal jobs give equal pictures where the model allows it.  Raises PartFailed."""

    @property
    def id(self) -> str:
        """The model's name."""
        ...

    @property
    def params(self) -> Mapping[str, Any]:
        """JSON-able settings that pictures depend on."""
        ...

    @property
    def max_sources(self) -> int:
        """How many pictures an edit may be given; 0: text to image only."""
        ...

    async def generate(self, job: Job) -> Picture:
        """The picture."""
        ...

    async def close(self) -> None:
        """Let go of connections and memory."""
        ...


@dataclass(frozen=True)
class PlannerAnswer:
    """A plan, or why there is none (`error`), with the model's own words and the template that asked for them."""

    plan: Plan | None
    raw: str
    error: str | None = None
    template: str = ""
    template_hash: str = ""


class Planner(Protocol):
    """Writes the steps.  A readable answer or not, it returns; it raises PartFailed when the model itself failed."""

    @property
    def id(self) -> str: ...

    async def plan(self, request: Request, pictures: Sequence[Picture], seed: int) -> PlannerAnswer: ...

    async def close(self) -> None: ...


@dataclass(frozen=True)
class Look:
    """What the critic is shown of one attempt.

    before: the latest accepted picture, or a white one of the same size before the first; after: the candidate.
    `request` and `story` (the words and accepted pictures so far) are shown only by `critic.context: story`.
    """

    before: Picture
    after: Picture
    original_prompt: str
    prompt_used: str
    request: str = ""
    story: tuple[tuple[str, Picture | None], ...] = ()


@dataclass(frozen=True)
class CriticAnswer:
    """A verdict, or why there is none (`error`), with the model's own words."""

    verdict: Verdict | None
    raw: str
    error: str | None = None
    success_probability: float | None = None


class Critic(Protocol):
    """Judges one attempt.  A readable answer or not, it returns; it raises PartFailed when the model itself failed."""

    @property
    def id(self) -> str: ...

    async def judge(self, look: Look, seed: int) -> CriticAnswer: ...

    async def close(self) -> None: ...


class Judge(Protocol):
    """Scores a picture for training, evaluation and best-of selection.  Raises PartFailed."""

    @property
    def id(self) -> str: ...

    async def score(self, look: Look) -> Scores: ...

    async def close(self) -> None: ...
