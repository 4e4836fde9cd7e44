"""Chat models: a local vision-language model, an OpenAI-compatible endpoint, a script."""

from typing import Annotated

from pydantic import Field

from interleave.chat.endpoint import EndpointChat, EndpointChatConfig
from interleave.chat.local import LocalChat, LocalChatConfig
from interleave.chat.scripted import ScriptedChat, ScriptedChatConfig
from interleave.parts import ChatModel

ChatConfig = Annotated[LocalChatConfig | EndpointChatConfig | ScriptedChatConfig, Field(discriminator="kind")]

__all__ = [
    "ChatConfig",
    "EndpointChat",
    "EndpointChatConfig",
    "LocalChat",
    "LocalChatConfig",
    "ScriptedChat",
    "ScriptedChatConfig",
    "make",
]


def make(config: LocalChatConfig | EndpointChatConfig | ScriptedChatConfig) -> ChatModel:
    """The model that `config` names, loaded.  Raises UserError where it cannot be had."""
    match config:
        case LocalChatConfig():
            return LocalChat(config)
        case EndpointChatConfig():
            return EndpointChat(config)
        case ScriptedChatConfig():
            return ScriptedChat.of(config)
