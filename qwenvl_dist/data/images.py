"""Picture bytes -> uint8 pixels at the model's size.

Equal to the hub's way (`transformers.image_utils.load_image`, `convert_to_rgb`, then Pillow's bicubic resize); JPEGs
take a faster decoder that gives the same pixels as Pillow's. One departure: 16 bits a channel are scaled to 8, where
Pillow's conversion cuts everything above 255 to white.
"""

from __future__ import annotations

import io
import math
import warnings

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.nn.functional import interpolate

from qwenvl_dist.data.sizes import UnreadableImage

EXIF_MARK = b"Exif\0\0"
EXIF_WITHIN = 1 << 17  # bytes: of two segments at most, and EXIF demands to be the first
EXIF_ORIENTATION = 0x0112


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB, transparent parts over white.

    As transformers' image processors do it: alpha of any mode counts, and a palette's, grey's or colour's that a PNG or
    GIF calls transparent. (qwen_vl_utils knows RGBA alone, and shows what other modes hide.)
    """
    if image.mode.startswith("I;16"):
        eight = np.asarray(image, np.float32) / 257  # 65535 -> 255
        return Image.fromarray(eight.round().astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
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
