"""Picture bytes -> uint8 pixels at the model's size.

Equal to the hub's way (`transformers.image_utils.load_image`, then `qwen_vl_utils` with Pillow's bicubic resize);
JPEGs take a faster decoder that gives the same pixels as Pillow's. One departure: 16 bits a channel are scaled to 8,
where Pillow's conversion cuts everything above 255 to white.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.nn.functional import interpolate

from qwenvl_dist.errors import UserError

if TYPE_CHECKING:
    from qwenvl_dist.config import PixelRange

MAX_ASPECT_RATIO = 200  # qwen_vl_utils.vision_process.MAX_RATIO
EXIF_MARK = b"Exif\0\0"
EXIF_WITHIN = 1 << 17  # bytes: of two segments at most, and EXIF demands to be the first
EXIF_ORIENTATION = 0x0112


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


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB, transparent parts over white (as qwen_vl_utils does)."""
    if image.mode.startswith("I;16"):
        eight = np.asarray(image, np.float32) / 257  # 65535 -> 255
        return Image.fromarray(eight.round().astype(np.uint8)).convert("RGB")
    if image.mode == "RGBA":
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _is_turned(data: bytes) -> bool:
    """Whether a JPEG's EXIF says that it is to be turned or mirrored before it is looked at."""
    if data.find(EXIF_MARK, 0, EXIF_WITHIN) < 0:
        return False
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.getexif().get(EXIF_ORIENTATION, 1) in range(2, 9)
    except Exception:  # damaged tags say nothing; damaged pixels show below
        return False


def decode(data: bytes) -> NDArray[np.uint8]:
    """Return (height, width, 3) uint8 RGB, upright as EXIF says; of an animation the first frame.

    Raises UnreadableImage with the decoder's reason.
    """
    if simplejpeg.is_jpeg(data):
        try:
            height, width, colours = simplejpeg.decode_jpeg_header(data)[:3]
            # Simplejpeg's colour conversion and upsampling are libjpeg-turbo's defaults, as in Pillow: equal pixels.
            # It has no limit of size; Pillow below refuses what is beyond its own.
            fits = int(height) * int(width) <= (Image.MAX_IMAGE_PIXELS or math.inf)
            if colours in ("YCbCr", "Gray") and fits and not _is_turned(data):
                return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False)
        except ValueError:
            pass  # strict about flaws that Pillow tolerates; Pillow's answer below decides
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                return np.asarray(to_rgb(ImageOps.exif_transpose(image)))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(f"too large: {error}") from error
    except UnidentifiedImageError as error:
        reason = "not a picture" if data else "an empty file"
        raise UnreadableImage(f"cannot be decoded: {reason}") from error
    except Exception as error:  # Pillow's parsers raise whatever damaged bytes lead them to
        raise UnreadableImage(f"cannot be decoded: {str(error) or type(error).__name__}") from error


def resize(pixels: NDArray[np.uint8], height: int, width: int, exact: bool = True) -> torch.Tensor:
    """Return (3, height, width) uint8 by bicubic resize with antialias.

    `exact` is Pillow's own, as the hub's path has it. Otherwise torch's fixed-point kernel: a quarter of the time; over
    290 COCO photos at 280x280 every value is within one level but for 10 in 68 million, which are two levels off.
    """
    if pixels.shape[:2] == (height, width):
        image = torch.from_numpy(np.require(pixels, requirements=("C", "W"))).permute(2, 0, 1)
    elif exact:
        resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        image = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    else:
        image = torch.from_numpy(np.require(pixels, requirements=("C", "W"))).permute(2, 0, 1)
        # A channels-last uint8 input takes torch's vectorised fixed-point path.
        image = interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]
    return image.contiguous()
