"""A chat model of the loop as a judge of benchmarks."""

import asyncio

from imgen_common.config import Config
from imgen_common.judging.escaping import JOINER
from imgen_common.judging.questions import JudgeError, JudgeReply
from imgen_common.judging.questions import Message as JudgeMessage
from interleave.agents.prompts import CONTROL_TOKEN
from interleave.models.chat.endpoint import EndpointChat, EndpointChatConfig
from interleave.protocols import BackendError, ChatModel, HashedImage, SystemText

OUTAGES = ("unreachable", "rate_limited")
"""Failures after which no other question would be answered either: their requests were repeated for minutes."""


class ChatModelJudge:
    """Asks a chat model."""

    def __init__(self, model: ChatModel) -> None:
        self.model, self.id = model, model.id

    async def ask(self, system: str, message: JudgeMessage, seed: int) -> JudgeReply:
        """The answer.  Raises JudgeError."""
        turn = tuple(_spell(part) if isinstance(part, str) else HashedImage.from_pil(part) for part in message)
        try:
            reply = await self.model.chat((SystemText(system), *turn) if system else turn, seed)
        except BackendError as failure:
            raise JudgeError(failure.kind, str(failure), is_outage=failure.kind in OUTAGES) from None
        return JudgeReply(reply.text, reply.num_prompt_tokens, reply.num_completion_tokens)

    async def close(self) -> None:
        """Release the model."""
        await self.model.close()


def _spell(text: str) -> str:
    """The text, with a control token that the model under test wrote, such as `<|im_end|>`, spelled out; nothing else
    changes, so that the authors' questions reach the judge as they are."""
    return CONTROL_TOKEN.sub(lambda token: token[0][0] + JOINER + token[0][1:], text)


def check_judge(config: Config) -> None:
    """Asks an endpoint once, as the run will ask it.  Raises UserError if it does not answer."""
    if not isinstance(config, EndpointChatConfig):
        return

    async def check(judge: EndpointChat) -> None:
        try:
            await judge.check()
        finally:
            await judge.close()

    asyncio.run(check(config.build()))
