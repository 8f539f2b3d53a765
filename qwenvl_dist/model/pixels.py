"""uint8 pictures -> pixel_values, on the model's device.

What leaves a loader worker is one byte a channel; normalising, the doubled frame and the patches (8 times the bytes in
float32) are made where they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PixelSettings:
    """The numbers of preprocessor_config.json that turn levels into the tower's input."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    patch_size: int
    merge_size: int
    temporal_patch_size: int

    @classmethod
    def of(cls, processor: Any) -> PixelSettings:
        """Take the settings from a hub processor."""
        image = processor.image_processor
        return cls(
            tuple(image.image_mean), tuple(image.image_std), image.patch_size, image.merge_size,
            image.temporal_patch_size,
        )  # fmt: skip


def patchify(images: Tensor, settings: PixelSettings) -> Tensor:
    """Cut (n, 3, height, width) into (n * patches, 3 * temporal * patch * patch), in the tower's order.

    Patches of one merge block (merge x merge) follow one another, blocks go row by row; a still picture fills all
    frames of its temporal patch. The same layout as transformers' Qwen2VLImageProcessor.
    """
    count, channels, height, width = images.shape
    patch, merge = settings.patch_size, settings.merge_size
    rows, columns = height // (patch * merge), width // (patch * merge)
    blocks = images.reshape(count, channels, rows, merge, patch, columns, merge, patch)
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)  # n, row, column, merge row, merge column, channel, y, x
    frames = blocks.unsqueeze(6).expand(*blocks.shape[:6], settings.temporal_patch_size, patch, patch)
    return frames.reshape(count * rows * columns * merge * merge, -1)


def pixel_values(pixels: Tensor, grids: Sequence[tuple[int, int, int]], settings: PixelSettings) -> Tensor:
    """Return (patches, 3 * temporal * patch * patch) float32 from the flat uint8 pictures of a batch."""
    mean = torch.tensor(settings.mean, dtype=torch.float32, device=pixels.device)[:, None, None]
    std = torch.tensor(settings.std, dtype=torch.float32, device=pixels.device)[:, None, None]
    parts, start = [], 0
    for (_, rows, columns), same in groupby(grids):
        count = len(list(same))
        height, width = rows * settings.patch_size, columns * settings.patch_size
        size = count * 3 * height * width
        images = pixels[start : start + size].view(count, 3, height, width)
        parts.append(patchify((images.float() - 255 * mean) / (255 * std), settings))
        start += size
    assert start == pixels.numel(), "grids and pixel bytes disagree"
    return parts[0] if len(parts) == 1 else torch.cat(parts)
