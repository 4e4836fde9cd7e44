"""A chat model that gives scripted answers: for tests, and for runs without a model."""

import asyncio
import itertools
import zlib
from collections.abc import Callable
from typing import Annotated, Literal

from annotated_types import Ge, MinLen

from imgen_common.config import Config
from interleave.protocols import BackendError, Message, Reply


class ScriptedChatConfig(Config):
    """Answers in turn."""

    kind: Literal["scripted"] = "scripted"
    answers: Annotated[tuple[str, ...], MinLen(1)]
    """What it says, one after the other, then from the start again."""
    latency: Annotated[float, Ge(0)] = 0.0
    """Seconds per answer."""

    def build(self) -> "ScriptedChat":
        """The model."""
        answers, mark = itertools.cycle(self.answers), zlib.crc32(repr(self.answers).encode())
        return ScriptedChat(lambda message, seed: next(answers), self.latency, f"scripted {mark:08x}")


class ScriptedChat:
    """Answers with `say(message, seed)`: words, a whole reply, or a failure that is raised."""

    def __init__(
        self, say: Callable[[Message, int], str | Reply | BackendError], latency: float = 0.0, name: str = "scripted"
    ) -> None:
        self._say, self._latency, self.id = say, latency, name

    async def chat(self, message: Message, seed: int) -> Reply:
        """The scripted answer."""
        await asyncio.sleep(self._latency)
        answer = self._say(message, seed)
        if isinstance(answer, BackendError):
            raise answer
        return answer if isinstance(answer, Reply) else Reply(answer)

    async def close(self) -> None:
        """Nothing to release."""
