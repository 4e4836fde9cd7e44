"""The images of a page, each encoded once and put into it once."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from PIL import Image

from imgen_common.errors import UserError
from imgen_common.images import data_uri
from interleave.protocols import HashedImage

SIDES = (1024, 768, 512, 384, 256)
"""Longest sides to which larger images are reduced: the first at which all images of the page fit `PIXELS`."""
PIXELS = 40 * 10**6
"""Pixels that all reduced images of a page have together, at most, unless they are already at the least side."""
SMALL = 128
"""Longest side in pixels up to which an image is shown enlarged, pixel by pixel, and kept exactly."""
WEBP_QUALITY = 85


@dataclass(frozen=True)
class PageImage:
    """An image in a page, of its own size in pixels.

    name: by which the page refers to it.  uri: its data; "" where the page has it already.  error: why it is missing.
    """

    name: str
    width: int = 0
    height: int = 0
    uri: str = ""
    error: str = ""

    @property
    def is_small(self) -> bool:
        """Whether it is shown enlarged."""
        return max(self.width, self.height) <= SMALL


class PageImages:
    """The images of a page."""

    def __init__(
        self, image_ids: Iterable[str], load: Callable[[str], HashedImage], sides: Sequence[int] = SIDES
    ) -> None:
        """image_ids: all that will be shown.  load: as for `render_stories`.  sides: longest sides, as `SIDES`."""
        ids = list(dict.fromkeys(image_ids))
        self.side = next((side for side in sides if len(ids) * side**2 <= PIXELS), sides[-1])
        """Longest side of an image in the page."""
        with ThreadPoolExecutor() as pool:
            encoded = pool.map(lambda image_id: self._encode(image_id, load), ids)
            self._images = dict(zip(ids, encoded, strict=True))
        self._placed: set[str] = set()

    def _encode(self, image_id: str, load: Callable[[str], HashedImage]) -> PageImage:
        name = f"p{image_id[:20]}"
        try:
            image = load(image_id).image
        except UserError as error:
            return PageImage(name, error=str(error))
        width, height = image.size
        if max(width, height) <= SMALL:
            return PageImage(name, width, height, data_uri(image))
        reduced = image.copy()
        reduced.thumbnail((self.side, self.side), Image.Resampling.LANCZOS)
        return PageImage(name, width, height, data_uri(reduced, WEBP_QUALITY))

    @property
    def any_small(self) -> bool:
        """Whether some are shown enlarged."""
        return any(not one.error and one.is_small for one in self._images.values())

    @property
    def any_reduced(self) -> bool:
        """Whether some were larger than the page shows them."""
        return any(not one.error and not one.is_small for one in self._images.values())

    def place(self, image_id: str) -> PageImage:
        """The image, with its data the first time."""
        image = self._images[image_id]
        if image_id in self._placed:
            return replace(image, uri="")
        self._placed.add(image_id)
        return image
