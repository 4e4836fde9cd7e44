"""A folder of images, each under the hash of its pixels."""

import io
import re
from pathlib import Path

from PIL import Image

from imgen_common.errors import UserError
from imgen_common.files import write_atomic, writing
from imgen_common.images import MAX_OWN_BYTES, content_hash, decode
from interleave.protocols import HashedImage

IMAGES = "images"


class ImageStore:
    """A folder of PNG files, `ab/cd/abcd....png`.  Any number of threads and processes may share it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, image_id: str) -> Path:
        """The file of an image, whether it exists or not.  Raises UserError if `image_id` is not an image's id."""
        if not re.fullmatch("[0-9a-f]{64}", image_id):
            raise UserError(f"{image_id[:80]!r} is not the id of an image; an id is 64 hexadecimal digits")
        return self._folder / image_id[:2] / image_id[2:4] / f"{image_id}.png"

    def __contains__(self, image_id: str) -> bool:
        return self.path(image_id).is_file()

    def put(self, image: HashedImage) -> str:
        """Keep `image`, whole or not at all, unless it is there already; its id.

        Raises ValueError if its id is not that of its pixels, UserError if it cannot be written.
        """
        path = self.path(image.id)
        if path.is_file():
            return image.id
        # The pixels alone: what else an image carries (a transparent color, an orientation) would be written too.
        plain = Image.frombytes("RGB", image.image.size, image.image.tobytes())
        if content_hash(plain) != image.id:
            raise ValueError(f"image {image.id} has other pixels than its id says; make it by HashedImage.from_pil")
        buffer = io.BytesIO()
        plain.save(buffer, "PNG")
        with writing(self._folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, buffer.getvalue())
        return image.id

    def get(self, image_id: str) -> HashedImage:
        """The image.  Raises UserError if it is missing or its pixels are not those of its id."""
        path = self._existing(image_id)
        image = HashedImage.from_pil(decode(path, max_bytes=MAX_OWN_BYTES))
        if image.id != image_id:
            raise UserError(f"{path}: its pixels are not those it was stored with; remove it and make it again")
        return image

    def drop_unreadable(self, image_id: str) -> str | None:
        """Why an image cannot be read, whose file is then removed so that it can be stored anew; None if it can be."""
        try:
            self.get(image_id)
        except UserError as error:
            self.path(image_id).unlink(missing_ok=True)
            return str(error)
        return None

    def size(self, image_id: str) -> tuple[int, int]:
        """Width and height, of which only the file's header is read.  Raises UserError if it is missing or damaged."""
        path = self._existing(image_id)
        try:
            with Image.open(path, formats=["PNG"]) as image:
                return image.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{path}: not an image that can be read ({error}); remove it and make it again") from None

    def blank(self, image_id: str) -> HashedImage:
        """A white image of its size, under its id.  Raises UserError as `size`."""
        return HashedImage(Image.new("RGB", self.size(image_id), "white"), image_id)

    def copy(self, image_id: str, target: Path) -> None:
        """Write the image's file to `target`, whole or not at all.  Raises UserError if it is missing."""
        source = self._existing(image_id)
        with writing(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(target, source.read_bytes())

    def _existing(self, image_id: str) -> Path:
        path = self.path(image_id)
        if not path.is_file():
            raise UserError(f"{path}: no such image; it was removed, or belongs to another run")
        return path
