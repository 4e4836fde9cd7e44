"""Chat models: each is one file with a configuration of its own `kind`, whose `build` makes it."""

from typing import Annotated

from pydantic import Field

from interleave.models.chat.endpoint import EndpointChatConfig
from interleave.models.chat.local import LocalChatConfig
from interleave.models.chat.scripted import ScriptedChatConfig
from interleave.protocols import ChatModel

__all__ = ["ChatConfig", "build_chat_model"]

ChatConfig = Annotated[
    LocalChatConfig | EndpointChatConfig | ScriptedChatConfig,  # a new chat model is one more member
    Field(discriminator="kind"),
]


def build_chat_model(config: ChatConfig) -> ChatModel:
    """The model that `config` describes, loaded.  Raises UserError where it cannot be had."""
    return config.build()
