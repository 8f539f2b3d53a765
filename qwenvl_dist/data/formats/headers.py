"""How large pictures are, from their heads: as they are stored, and upright as EXIF has it."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from qwenvl_dist.data.formats.sample import ImageRef, Picture

HEADER_BYTES = 1 << 17  # of a JPEG: where its size and EXIF stand
EXIF_ORIENTATION = 0x0112
READS_AT_A_TIME = 16

Size = tuple[int, int]  # width and height in pixels


@dataclass(frozen=True)
class Header:
    """A picture's size as it is stored, and its EXIF orientation."""

    width: int
    height: int
    orientation: int

    @property
    def is_quarter_turned(self) -> bool:
        """Whether EXIF turns it by a quarter."""
        return self.orientation in (5, 6, 7, 8)

    @property
    def upright(self) -> Size:
        """The size of what the model sees."""
        return (self.height, self.width) if self.is_quarter_turned else (self.width, self.height)


def read_header(picture: Picture) -> Header | None:
    """Return what a picture's header says; None when it cannot be read, which the packer will say."""
    try:
        data = _head(picture) if isinstance(picture, ImageRef) else b""
        header = _parse(data) if data.startswith(b"\xff\xd8") else None
        return header or _parse(picture.read())  # other formats may have EXIF at their end
    except OSError:
        return None


def _head(ref: ImageRef) -> bytes:
    if ref.storage is None:
        with ref.path.open("rb") as file:
            return file.read(HEADER_BYTES)
    (data,) = ref.storage.open(str(ref.path)).read_ranges([(0, HEADER_BYTES)])
    return data


def _parse(data: bytes) -> Header | None:
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if isinstance(image, TiffImageFile):  # whose size Pillow gives upright
                width, height = image.tag_v2[IMAGEWIDTH], image.tag_v2[IMAGELENGTH]
            return Header(width, height, orientation=image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # Pillow's parsers raise whatever a damaged header leads them to
        return None
