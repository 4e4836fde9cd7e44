"""Chat models: each is one file with a configuration of its own `kind`, whose `build` makes it."""

from typing import Annotated

from pydantic import Field

from interleave.models.chat.endpoint import EndpointChatConfig
from interleave.models.chat.local import LocalChatConfig
from interleave.models.chat.scripted import ScriptedChatConfig

ChatConfig = Annotated[
    LocalChatConfig | EndpointChatConfig | ScriptedChatConfig,  # a new chat model is one more member
    Field(discriminator="kind"),
]
