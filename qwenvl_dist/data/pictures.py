"""Pictures of packed samples for people to look at: found by key, made small, put into a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection

from PIL import Image

from qwenvl_dist.data.images import decode
from qwenvl_dist.data.index import BadSample
from qwenvl_dist.data.plan import Place
from qwenvl_dist.data.source import Shards
from qwenvl_dist.errors import UserError

THUMBNAIL_SIDE = 480  # pixels; shown at half of it, for dense screens


def find_pictures(shards: Shards, keys: Collection[str]) -> dict[str, bytes]:
    """Return the original bytes of the first picture of each of these samples that can be read.

    Keys are looked up in the indexes; only what is wanted is read.
    """
    wanted, found = set(keys), {}
    for number in range(len(shards.manifest.shards)):
        if not wanted:
            break
        try:
            here = [(i, key) for i, key in enumerate(shards.index(number).keys) if key in wanted]
        except (OSError, UserError):
            continue
        for i, key in here:
            wanted.discard(key)
            try:
                images = shards.read(Place(number, i)).images
            except BadSample:
                continue
            if images:
                found[key] = images[0]
    return found


def thumbnail(data: bytes, side: int = THUMBNAIL_SIDE) -> Image.Image:
    """Return a picture of at most `side` pixels a side. Raises UnreadableImage."""
    image = Image.fromarray(decode(data))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def picture_uri(data: bytes) -> str:
    """Return a small JPEG of a picture as a data URI. Raises UnreadableImage."""
    buffer = io.BytesIO()
    thumbnail(data).save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
