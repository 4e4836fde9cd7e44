"""Edits: instructions with the images that they change, and what rewards see of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from PIL import Image

from imgen_common.errors import UserError, one_line
from imgen_common.images import from_pil, thumbnail

if TYPE_CHECKING:
    from torch import Tensor

    from flowbp.core.types import Backbone, Reward
    from imgen_common.shapes.edits import Edit as ShapesEdit


Sizes = tuple[tuple[int, int], ...]
"""(height, width) of each source image of an edit, as the family prepares it."""


@dataclass(frozen=True)
class Source:
    """An image that an instruction changes.  digest: of its pixels; size: (height, width); load: its pixels, RGB."""

    digest: str
    size: tuple[int, int]
    load: Callable[[], Image.Image]


class Edit(str):
    """An instruction with its source images: a prompt like any other, to whoever only reads its words.  As texts are,
    two edits are equal if their words are, whatever their sources.

    sources: in the order in which the instruction counts them; none where a prompt only brings an answer.  caption,
    source_caption: what the result should show, for rewards that do not see the sources, and what the sources do.
    answer: the one whose likelihood is a reward.  Where the data has none, the caption is the instruction itself, and
    the others are empty.  shapes: the edit of the shapes world that it stands for, by which the verifier judges.
    """

    sources: tuple[Source, ...]
    caption: str
    source_caption: str
    answer: str
    shapes: "ShapesEdit | None"

    def __new__(
        cls,
        instruction: str,
        sources: Sequence[Source],
        caption: str = "",
        source_caption: str = "",
        answer: str = "",
        shapes: "ShapesEdit | None" = None,
    ) -> "Edit":
        edit = super().__new__(cls, instruction)
        edit.sources, edit.caption, edit.source_caption = tuple(sources), caption or instruction, source_caption
        edit.answer, edit.shapes = answer, shapes
        return edit

    def __getnewargs__(self) -> tuple[Any, ...]:
        return str(self), self.sources, self.caption, self.source_caption, self.answer, self.shapes


def sources_of(prompt: str) -> tuple[Source, ...]:
    """The source images of a prompt; none where it is no edit."""
    return prompt.sources if isinstance(prompt, Edit) else ()


def caption_of(prompt: str) -> str:
    """What the image of a prompt should show."""
    return prompt.caption if isinstance(prompt, Edit) else prompt


def source_thumbnails(prompt: str, size: tuple[int, int]) -> list[Image.Image]:
    """The source images of a prompt within (width, height) `size`, to be shown beside its image."""
    return [thumbnail(source.load(), size) for source in sources_of(prompt)]


def describe_row(prompt: str) -> str:
    """All that a prompt is made of, as one text, to compare data by."""
    if not isinstance(prompt, Edit):
        return prompt
    texts = [prompt.caption, *(text for text in (prompt.source_caption, prompt.answer) if text)]
    return "\0".join([prompt, *texts, *(source.digest for source in prompt.sources)])


def check_edits(prompts: Sequence[str], backbone: "Backbone", *, one_layout: bool = False) -> list[Sizes]:
    """The layouts of the prompts' sources, from the fewest to the most pixels.

    Raises UserError unless the family takes the sources of all prompts, as many as they have.

    one_layout: whether all must have sources of the same number and sizes, as processes that share the weights of a
    network need, which have to evaluate it equally often.
    """
    layouts: dict[Sizes, str] = {}
    for prompt in prompts:
        found = sources_of(prompt)
        place = f"the prompt {one_line(prompt, 60)!r}"
        if len(found) < backbone.min_sources:
            raise UserError(
                f"{place} has no image, and {type(backbone.pipe).__name__} only edits; give every prompt one, of the "
                "training and of its evaluations, or take a family that needs none (flowbp families)"
            )
        if len(found) > backbone.max_sources > 0:
            raise UserError(
                f"{place} has {len(found)} images, and {type(backbone.pipe).__name__} takes {backbone.max_sources} at "
                "most; take out images"
            )
        try:
            layouts.setdefault(tuple(backbone.source_size(source.size) for source in found), place)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    if one_layout and len(layouts) > 1:
        (first, one), (second, other) = list(layouts.items())[:2]
        raise UserError(
            f"{one} has images of {_sizes(first)}, {other} of {_sizes(second)}; under distributed.kind fsdp2 or zero3 "
            "all must have the same: bring them to one size, or set distributed.kind to ddp"
        )
    return sorted(layouts, key=lambda layout: sum(height * width for height, width in layout))


def _sizes(layout: Sizes) -> str:
    return ", ".join(f"{width}x{height}" for height, width in layout) or "none"


def check_scored(rewards: "Iterable[Reward]", prompts: Sequence[str]) -> None:
    """Raises UserError where a reward cannot score images of some prompt; nothing is scored."""
    for reward in rewards:
        getattr(reward, "check_prompts", lambda given: None)(prompts)


def score_images(reward: "Reward", images: "Tensor", prompts: Sequence[str]) -> "Tensor":
    """Scores (b,) of images (b, 3, h, w) in [0, 1], differentiable.

    A reward that sees sources gets the instructions and, for each, its sources: tensors (3, h, w) in [0, 1].  Others
    get what the images should show.
    """
    if not getattr(reward, "sees_sources", False):
        return reward(images, [caption_of(prompt) for prompt in prompts])
    loaded = [tuple(from_pil([source.load()])[0].to(images.device) for source in sources_of(p)) for p in prompts]
    scores: Tensor = cast(Any, reward)(images, list(prompts), loaded)
    return scores
