"""The replaceable parts of the loop, as Protocols, and the plain data that passes between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from imgen_common.images import content_hash, to_rgb
from interleave.records import FailureKind, Plan, Request, Scores, Verdict


class BackendError(Exception):
    """A model or service failed on one request, which touches no other.  The message fits on one line."""

    def __init__(self, kind: FailureKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    @property
    def description(self) -> str:
        """Kind and message, as records and messages show them."""
        return f"{self.kind}: {self}"


@dataclass(frozen=True)
class HashedImage:
    """An RGB image and the hash of its pixels.

    revised_prompt: what its generator says that it drew, where it rewrote the prompt it was given.
    """

    image: Image.Image = field(repr=False, compare=False)
    id: str
    revised_prompt: str | None = field(default=None, compare=False)

    @classmethod
    def from_pil(cls, image: Image.Image) -> "HashedImage":
        """`image` as RGB, whatever its mode (`to_rgb`), under its own hash."""
        rgb = to_rgb(image)
        return cls(rgb, content_hash(rgb))

    @classmethod
    def white(cls, width: int, height: int) -> "HashedImage":
        """A white image of that size in pixels."""
        return cls.from_pil(Image.new("RGB", (width, height), "white"))


class SystemText(str):
    """The text of a system turn; it stands first in a message."""


Message = tuple[str | HashedImage, ...]
"""One user turn: texts and images in the order in which the model reads them."""


def split_system(message: Message) -> tuple[str, Message]:
    """The text of the system turn, empty where there is none, and the user turn."""
    if message and isinstance(message[0], SystemText):
        return str(message[0]), message[1:]
    return "", message


@dataclass(frozen=True)
class Reply:
    """What a chat model answered.  `truncated`: it hit its limit of tokens.  `finish_reason`: as the server says.

    `token_probabilities`: where the model gives them, each answered token's text and its alternatives' probabilities.
    """

    text: str
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    truncated: bool = False
    finish_reason: str | None = None
    token_probabilities: tuple[tuple[str, Mapping[str, float]], ...] = ()


class Component(Protocol):
    """What all replaceable parts have."""

    @property
    def id(self) -> str:
        """Name and settings that answers depend on."""
        ...

    async def close(self) -> None:
        """Release connections and memory."""
        ...


class ChatModel(Component, Protocol):
    """A vision-language model that answers one user turn.  Raises BackendError."""

    async def chat(self, message: Message, seed: int) -> Reply:
        """The answer; equal messages and seeds give equal answers where the model allows it."""
        ...


@dataclass(frozen=True)
class GenerationRequest:
    """One image to make: from the prompt alone, or by editing `sources` (the last one is the one to change)."""

    prompt: str
    sources: tuple[HashedImage, ...]
    seed: int


class Generator(Component, Protocol):
    """Generates images.  Equal requests give equal images where the model allows it.  Raises BackendError."""

    @property
    def params(self) -> Mapping[str, Any]:
        """JSON-able settings that images depend on."""
        ...

    @property
    def max_sources(self) -> int:
        """How many images an edit may be given; 0: text to image only."""
        ...

    async def generate(self, request: GenerationRequest) -> HashedImage:
        """The image."""
        ...


def check_sources(generator: Generator, request: GenerationRequest) -> None:
    """Raises BackendError, `refused`, for more sources than the generator takes."""
    if len(request.sources) > generator.max_sources:
        what = f"{generator.id} was given {len(request.sources)} images, takes {generator.max_sources}"
        raise BackendError("refused", what)


@dataclass(frozen=True)
class PlannerAnswer:
    """A plan, or why there is none (`error`), with the model's own words and the template that asked for them."""

    plan: Plan | None
    raw: str
    error: str | None = None
    template: str = ""
    template_hash: str = ""
    finish_reason: str | None = None


class Planner(Component, Protocol):
    """Writes the steps.  Returns whether its answer can be read or not; raises BackendError if the model failed."""

    async def plan(self, request: Request, images: Sequence[HashedImage], seed: int) -> PlannerAnswer: ...


@dataclass(frozen=True)
class CriticInput:
    """What the critic is shown of one attempt.

    before: the latest accepted image, or a white one of the same size before the first; after: the candidate.
    is_edit: False where the story has no image yet, so that the candidate was made from words alone.
    `request` and `story` (the words and accepted images so far) are shown only by `critic.context: story`.
    """

    before: HashedImage
    after: HashedImage
    original_prompt: str
    prompt_used: str
    request: str = ""
    story: tuple[tuple[str, HashedImage | None], ...] = ()
    is_edit: bool = True


@dataclass(frozen=True)
class CriticAnswer:
    """A verdict, or why there is none (`error`), with the model's own words."""

    verdict: Verdict | None
    raw: str
    error: str | None = None
    success_probability: float | None = None
    finish_reason: str | None = None


class Critic(Component, Protocol):
    """Judges one attempt.  Returns whether its answer can be read or not; raises BackendError if the model failed."""

    async def judge(self, shown: CriticInput, seed: int) -> CriticAnswer: ...


class Judge(Component, Protocol):
    """Scores an image for training, evaluation and best-of selection.  Raises BackendError."""

    async def score(self, shown: CriticInput) -> Scores: ...


@dataclass(frozen=True)
class Components:
    """The parts that the loop joins.  Without a planner the request is the only prompt, without a critic no image is
    judged."""

    planner: Planner | None
    critic: Critic | None
    generator: Generator
    judge: Judge | None = None

    async def close(self) -> None:
        """Release all of them."""
        for part in (self.planner, self.critic, self.generator, self.judge):
            if part is not None:
                await part.close()
