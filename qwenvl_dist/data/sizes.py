"""How large a picture or a sample is for the model, from sizes alone. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qwenvl_dist.errors import UserError

if TYPE_CHECKING:
    from qwenvl_dist.config import PixelRange
    from qwenvl_dist.data.index import ShardIndex

MAX_ASPECT_RATIO = 200  # qwen_vl_utils.vision_process.MAX_RATIO
CHARACTERS_PER_TOKEN = 4.5  # of English captions under Qwen2's tokenizer, on average


class UnreadableImage(Exception):  # noqa: N818 (names the sample's state; counted, not fatal)
    """These bytes give no picture, or none that the model can take."""


@dataclass(frozen=True)
class ImageSizeRule:
    """From a picture's size to the model's: a fixed square side, or an area range with the aspect ratio kept."""

    side: int | None = None  # pixels
    min_pixels: int = 0
    max_pixels: int = 0
    factor: int = 28  # pixels a side of one visual token: patch_size x merge_size
    max_visual_tokens: int | None = None  # of all pictures of a sample; an area range shrinks to it

    def target(self, width: int, height: int) -> tuple[int, int]:
        """Return (height, width), multiples of `factor`.

        The area rule is `smart_resize` of Qwen's qwen_vl_utils (vision_process.py).
        """
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            raise UnreadableImage(f"{width}x{height} pixels: aspect ratio above {MAX_ASPECT_RATIO}")
        if self.side is not None:
            return self.side, self.side
        factor = self.factor
        rounded_h = max(factor, round(height / factor) * factor)
        rounded_w = max(factor, round(width / factor) * factor)
        if rounded_h * rounded_w > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            rounded_h = max(factor, math.floor(height / shrink / factor) * factor)
            rounded_w = max(factor, math.floor(width / shrink / factor) * factor)
        elif rounded_h * rounded_w < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            rounded_h = math.ceil(height * grow / factor) * factor
            rounded_w = math.ceil(width * grow / factor) * factor
        return rounded_h, rounded_w

    def targets(
        self, sizes: Sequence[tuple[int, int]], limit: int | None = None
    ) -> tuple[list[tuple[int, int]], bool]:
        """Return (height, width) for each (width, height) of a sample's pictures, and whether any was shrunk.

        Pictures that together take more visual tokens than `limit` or `max_visual_tokens` shrink in the same
        proportion, each to one token at least, as far as whole tokens allow with their aspect ratio kept. Raises
        UnreadableImage where that cannot be done.
        """
        wanted = [self.target(*size) for size in sizes]
        limits = [bound for bound in (limit, self.max_visual_tokens) if bound is not None]
        tokens = [height * width // self.factor**2 for height, width in wanted]
        total = sum(tokens)
        if not limits or total <= min(limits):
            return wanted, False
        limit = min(limits)
        if self.side is not None or limit < len(sizes):
            raise UnreadableImage(
                f"{len(sizes)} pictures of {total} visual tokens cannot shrink to {limit}"
                + ("" if self.side is None else f": all pictures are {self.side} pixels a side")
            )
        shares = [max(1, count * limit // total) for count in tokens]
        while (over := sum(shares) - limit) > 0:  # pictures of less than one token's share got one
            largest = shares.index(max(shares))
            shares[largest] -= min(over, shares[largest] - 1)
        return [self._within(*size, share) for size, share in zip(sizes, shares, strict=True)], True

    def _within(self, width: int, height: int, tokens: int) -> tuple[int, int]:
        """Return (height, width) of at most so many visual tokens."""
        most = min(self.max_pixels, tokens * self.factor**2)
        smaller = replace(self, min_pixels=min(self.min_pixels, most), max_pixels=most)
        rows, columns = (side // self.factor for side in smaller.target(width, height))
        # Qwen's rule leaves a long thin picture one token across, however many it has along; those give way.
        rows, columns = min(rows, max(1, tokens // columns)), min(columns, max(1, tokens // rows))
        return rows * self.factor, columns * self.factor

    def visual_tokens(self, width: int, height: int) -> int:
        """Return how many tokens a picture of this size becomes, 0 for one that is refused."""
        if not width or not height:
            return 0
        try:
            target_height, target_width = self.target(width, height)
        except UnreadableImage:
            return 0
        return target_height * target_width // self.factor**2

    @classmethod
    def of(
        cls,
        image_size: int | PixelRange,
        processor: Any,
        name: str = "data.image_size",
        max_visual_tokens: int | None = None,
    ) -> ImageSizeRule:
        """Return the rule of `image_size` in this model's units. Raises UserError, by `name`, where they do not fit."""
        image = processor.image_processor
        factor = image.patch_size * image.merge_size
        if not isinstance(image_size, int):
            return cls(None, image_size.min_pixels, image_size.max_pixels, factor, max_visual_tokens)
        if image_size % factor:
            raise UserError(f"{name} = {image_size}: this model needs a multiple of {factor} pixels")
        return cls(side=image_size, factor=factor)


def estimated_tokens(
    index: ShardIndex, visual_tokens: Callable[[int, int], int], limit: int | None = None
) -> NDArray[np.int64]:
    """Return the (samples, 2) visual tokens of a shard's samples and the tokens of their answers.

    Visual tokens are exact, `limit` at most; answers count as characters / CHARACTERS_PER_TOKEN.
    """
    sizes, which = np.unique(index.image_sizes, axis=0, return_inverse=True)
    visual = np.array([visual_tokens(w, h) for w, h in sizes.tolist()], np.int64)[which.reshape(-1)]
    until = np.concatenate([[0], np.cumsum(visual)])
    visual = until[index.image_starts[1:]] - until[index.image_starts[:-1]]
    if limit is not None:
        visual = np.minimum(visual, limit)
    text = (index.caption_lengths / CHARACTERS_PER_TOKEN).astype(np.int64)
    return np.stack([visual, text], axis=1)
