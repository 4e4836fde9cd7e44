"""The images of a page, each encoded once."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from imgen_common.errors import UserError
from imgen_common.images import data_uri
from imgen_common.page import text
from interleave.protocols import HashedImage

SIDES = (1024, 768, 512, 384, 256)
"""Longest sides to which larger pictures are reduced: the first at which all pictures of the page fit `PIXELS`."""
PIXELS = 40 * 10**6
"""Pixels that all reduced pictures of a page have together, at most, unless they are already at the least side."""

SMALL = 128
"""Longest side in pixels up to which a picture is shown enlarged, pixel by pixel, and kept exactly."""
WEBP_QUALITY = 85


# --- pictures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Encoded:
    """A picture ready for the page: its own size in pixels, and its data."""

    width: int
    height: int
    uri: str


class Shots:
    """The pictures of a page, each put into it once."""

    def __init__(
        self, image_ids: Iterable[str], pictures: Callable[[str], HashedImage], sides: Sequence[int] = SIDES
    ) -> None:
        """image_ids: all that will be shown.  pictures: as for `render`.  sides: longest sides, as `SIDES`."""
        ids = list(dict.fromkeys(image_ids))
        self.side = next((side for side in sides if len(ids) * side**2 <= PIXELS), sides[-1])
        """Longest side of a picture in the page."""
        with ThreadPoolExecutor() as pool:
            encoded = pool.map(lambda image_id: self._encode(image_id, pictures), ids)
            self._found = dict(zip(ids, encoded, strict=True))
        self._placed: set[str] = set()

    def _encode(self, image_id: str, pictures: Callable[[str], HashedImage]) -> _Encoded | str:
        try:
            image = pictures(image_id).image
        except UserError as error:
            return str(error)
        width, height = image.size
        if max(width, height) <= SMALL:
            return _Encoded(width, height, data_uri(image))
        reduced = image.copy()
        reduced.thumbnail((self.side, self.side), Image.Resampling.LANCZOS)
        return _Encoded(width, height, data_uri(reduced, WEBP_QUALITY))

    @property
    def any_small(self) -> bool:
        """Whether some are shown enlarged."""
        return any(isinstance(one, _Encoded) and max(one.width, one.height) <= SMALL for one in self._found.values())

    @property
    def any_reduced(self) -> bool:
        """Whether some were larger than the page shows them."""
        return any(isinstance(one, _Encoded) and max(one.width, one.height) > SMALL for one in self._found.values())

    def show(self, image_id: str, words: str) -> str:
        """The picture, described by `words`."""
        one = self._found[image_id]
        if isinstance(one, str):
            return f'<span class="missing">picture missing: {text(one)}</span>'
        name = f"p{image_id[:20]}"
        inside = f'<use href="#{name}"/>'
        if image_id not in self._placed:
            self._placed.add(image_id)
            size = f'width="{one.width}" height="{one.height}"'
            inside = f'<image id="{name}" {size} href="{one.uri}"/>'
        look = "shot pixels" if max(one.width, one.height) <= SMALL else "shot"
        return (
            f'<svg class="{look}" viewBox="0 0 {one.width} {one.height}" role="img" aria-label="{text(words)}">'
            f"{inside}</svg>"
        )
