"""A message in transformers' chat format."""

from typing import Any

from interleave.protocols import Message


def to_conversation(message: Message) -> list[dict[str, Any]]:
    """`message` as one user turn of transformers' chat format, with `PIL` images."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part.image}
        for part in message
    ]
    return [{"role": "user", "content": content}]
