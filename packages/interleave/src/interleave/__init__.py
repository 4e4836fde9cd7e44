"""Interleaved text-image sequences from any image generator: a planner writes the steps, a critic judges each image.

Source: InterleaveThinker, arXiv 2606.13679.  The names below are imported when they are first used, so that
`import interleave` is quick; docs/tutorials/python.md shows them at work.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imgen_common.config import load as load_config
    from interleave.loop.config import LoopConfig, RunConfig
    from interleave.loop.engine import Engine
    from interleave.loop.functions import StoryResult, tell_story
    from interleave.protocols import BackendError, Components

_PLACES = {
    "BackendError": "interleave.protocols",
    "Components": "interleave.protocols",
    "Engine": "interleave.loop.engine",
    "LoopConfig": "interleave.loop.config",
    "RunConfig": "interleave.loop.config",
    "StoryResult": "interleave.loop.functions",
    "load_config": "imgen_common.config",
    "tell_story": "interleave.loop.functions",
}
__all__ = [
    "BackendError",
    "Components",
    "Engine",
    "LoopConfig",
    "RunConfig",
    "StoryResult",
    "load_config",
    "tell_story",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'interleave' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_PLACES[name]), "load" if name == "load_config" else name)
