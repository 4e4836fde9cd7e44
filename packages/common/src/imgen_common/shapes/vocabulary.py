"""What the built-in models know: outside the world of shapes, what they answer means nothing."""

import json
import re
from collections.abc import Iterable, Sequence
from functools import cache

from imgen_common.hub import BUILTIN, WEIGHTS
from imgen_common.shapes import scene, wording
from imgen_common.shapes.scene import COLOURS, SHAPES, plural
from imgen_common.shapes.wording import CHANGES

WORLD = " in ".join(f"{', '.join(names[:-1])} and {names[-1]}" for names in ([*map(plural, SHAPES)], [*COLOURS]))
"""What the images of the world show."""
VERIFIER = f"{BUILTIN}shapes/verifier"
"""What the verifier is called beside the models."""
MAX_LISTED = 5
MAX_SIDE = 128
"""Longest side in pixels of a source that the built-in generator edits."""
_WORD = re.compile(r"[^\W_]+")
_MIXED = re.compile(r"\w+ mixed with \w+")
"""In riddles, which name other colors than they mean."""


@cache
def _known_words(ref: str) -> frozenset[str]:
    """The words of the world that are tokens of a built-in model; others, as `star`, are parts of words.  Of the
    verifier, which has none, all."""
    if ref == VERIFIER:
        return _world_words()
    folder = WEIGHTS / ref.removeprefix(BUILTIN)
    file = next(path for path in (folder / "tokenizer" / "tokenizer.json", folder / "tokenizer.json") if path.is_file())
    tokens = json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"]
    words = {token.removeprefix("Ġ").removesuffix("</w>") for token in tokens}
    return frozenset(word for word in words if {word, word.lower()} & _world_words())


@cache
def _world_words() -> frozenset[str]:
    """All words of captions, requests and riddles."""
    texts = [value for module in (scene, wording) for name, value in vars(module).items() if name.isupper()]
    said = re.sub(r"\{\w+\}", " ", str([*texts, *map(plural, SHAPES)]))
    return frozenset(word for word in _WORD.findall(said) if word.isalpha())


def describe_unknown_words(ref: str, text: str) -> str | None:
    """A sentence that names the words of `text` which the built-in model `ref` does not know, or says that it has none.

    None where it knows them all, and for every other model.
    """
    if not ref.startswith(BUILTIN):
        return None
    known, words = _known_words(ref), _WORD.findall(text)
    if text and not words:
        return f"{ref} knows nothing but {WORLD}; there is no word in what it is given"
    unknown = [word for word in dict.fromkeys(words) if word not in known]
    if not unknown:
        return None
    listed = ", ".join(map(repr, unknown[:MAX_LISTED])) + (", ..." if len(unknown) > MAX_LISTED else "")
    what = "word" if len(unknown) == 1 else f"{len(unknown)} words"
    remedy = "; write it in small letters" if any(word.lower() in known for word in unknown) else ""
    return f"{ref} knows nothing but {WORLD}; it does not know the {what} {listed}{remedy}"


def find_left_out(text: str, prompts: Sequence[str]) -> list[str]:
    """The shapes and colors that a request names, and none of the prompts of its plan."""
    named = {word: name for name in (*SHAPES, *COLOURS) for word in (name, plural(name))}
    planned = {named.get(word) for word in _WORD.findall(" ".join(prompts).lower())}
    asked = [named[word] for word in _WORD.findall(_MIXED.sub(" ", text.lower())) if word in named]
    return [name for name in dict.fromkeys(asked) if name not in planned]


def describe_missing_image(ref: str, text: str) -> str | None:
    """A sentence about a request to the built-in model `ref`, without images, that begins by changing something.

    None for every other request, and for every other model.
    """
    if not ref.startswith(BUILTIN) or not text.lstrip().startswith(CHANGES):
        return None
    return f"{ref} draws the first step of a story on a blank image, where there is nothing to change"


def describe_large_image(ref: str, sizes: Iterable[tuple[int, int]]) -> str | None:
    """A sentence about the first of some sources (width, height) that the built-in model `ref` would take minutes for.

    None where there is none, and for every other model.
    """
    if not ref.startswith(BUILTIN):
        return None
    large = next((size for size in sizes if max(size) > MAX_SIDE), None)
    if large is None:
        return None
    return (
        f"{ref} edits images of 32x32 pixels, and would take minutes for one of {large[0]}x{large[1]} to make nothing "
        f"of it; give one of {MAX_SIDE} at most, or a CONFIG with another generator"
    )
