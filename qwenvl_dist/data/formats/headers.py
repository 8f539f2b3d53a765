"""How large pictures are, from their heads: as they are stored, and upright as EXIF has it."""

from __future__ import annotations

import io
import os
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from tempfile import TemporaryFile
from typing import TypeVar

from PIL import Image
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from qwenvl_dist.data.formats.sample import ImageRef, Picture

HEADER_BYTES = 1 << 17  # of a JPEG: where its size and EXIF stand
EXIF_ORIENTATION = 0x0112
READS_AT_A_TIME = 16
WAITING = 64  # items that are held while heads before them are read

Item = TypeVar("Item")
_HEADER = struct.Struct("<IIB")


@dataclass(frozen=True)
class Header:
    """A picture's size as it is stored, and its EXIF orientation, from 1 to 8."""

    width: int
    height: int
    orientation: int

    @property
    def is_quarter_turned(self) -> bool:
        """Whether EXIF turns it by a quarter."""
        return self.orientation in (5, 6, 7, 8)

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height of what the model sees."""
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
            orientation = image.getexif().get(EXIF_ORIENTATION, 1)
            return Header(width, height, int(orientation) if orientation in range(1, 9) else 1)
    except Exception:  # Pillow's parsers raise whatever a damaged header leads them to
        return None


def read_headers(
    row: Iterable[tuple[Item, Sequence[Picture]]], at_a_time: int = READS_AT_A_TIME
) -> Iterator[tuple[Item, list[Header | None]]]:
    """Yield each item with the headers of its pictures, several read at a time; None for one that cannot be read.

    No thread is left at the end: a process may fork then.
    """
    waiting: deque[tuple[Item, list[Future[Header | None]]]] = deque()
    pool = ThreadPoolExecutor(at_a_time)
    try:
        for item, pictures in row:
            if not pictures and not waiting:  # most rows ask for nothing
                yield item, []
                continue
            waiting.append((item, [pool.submit(read_header, picture) for picture in pictures]))
            while waiting and (len(waiting) > WAITING or all(head.done() for head in waiting[0][1])):
                yield _awaited(*waiting.popleft())
        while waiting:
            yield _awaited(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _awaited(item: Item, heads: list[Future[Header | None]]) -> tuple[Item, list[Header | None]]:
    return item, [head.result() for head in heads]


class HeaderLog:
    """The headers of the pictures that items of a long row ask for.

    `read` takes them from the pictures and notes them on disk; `recall` gives the same to the same row, without looking
    at a picture again.
    """

    def __init__(self, reads_at_a_time: int = READS_AT_A_TIME) -> None:
        self.reads_at_a_time = reads_at_a_time
        self._file = TemporaryFile(prefix="qwenvl-dist-")  # noqa: SIM115 (closed with this object)

    def read(
        self, row: Iterable[tuple[Item, Sequence[Picture]]]
    ) -> Iterator[tuple[Item, list[Header | None]]]:
        """Yield what `read_headers` does, and note it."""
        self._file.truncate(0)
        self._file.seek(0)
        for item, headers in read_headers(row, self.reads_at_a_time):
            for header in headers:
                self._file.write(_HEADER.pack(*((0, 0, 0) if header is None else astuple(header))))
            yield item, headers
        self._file.flush()

    def recall(
        self, row: Iterable[tuple[Item, Sequence[Picture]]]
    ) -> Iterator[tuple[Item, list[Header | None]]]:
        """Yield what `read` did for the same row."""
        place = 0
        for item, pictures in row:
            headers: list[Header | None] = []
            for _ in pictures:
                data = os.pread(self._file.fileno(), _HEADER.size, place)
                assert len(data) == _HEADER.size, "the input changed while it was packed"
                place += _HEADER.size
                header = Header(*_HEADER.unpack(data))
                headers.append(header if header.width else None)
            yield item, headers
