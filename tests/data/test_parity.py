"""The real photos through our path and through the hub's: `qwen_vl_utils`, then the model's own processor."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from qwen_vl_utils.vision_process import process_vision_info

from qwenvl_dist.data.batch import Example
from qwenvl_dist.data.formats import read_coco_captions
from qwenvl_dist.data.index import RawSample
from qwenvl_dist.data.sizes import ImageSizeRule
from qwenvl_dist.data.stream import SampleEncoder
from qwenvl_dist.model.pixels import PixelSettings, pixel_values

PHOTOS = 290


def read_photos(shared_data: Path) -> Iterator[tuple[RawSample, Path]]:
    """Each photo as the packer would put it into a shard, and its file."""
    coco = shared_data / "coco"
    for sample in read_coco_captions(coco / "captions.json", coco / "images"):
        yield (
            RawSample(sample.key, {"jpg": sample.images[0].read(), "json": sample.to_json()}),
            sample.images[0].path,
        )


def hub(processor: Any, raw: RawSample, path: Path, **size: int) -> Any:
    messages = json.loads(raw.json)["messages"]
    messages[0]["content"][0].update(image=str(path), **size)
    text = processor.apply_chat_template(messages, tokenize=False)
    images, _ = process_vision_info(messages)
    return processor(text=[text], images=images, return_tensors="pt")


def levels_apart(example: Example, theirs: torch.Tensor, settings: PixelSettings) -> torch.Tensor:
    """The distance of the tower's input from the hub's, in uint8 levels."""
    ours = pixel_values(torch.from_numpy(example.pixels), example.grids, settings)
    assert ours.dtype == torch.float32 and ours.shape == theirs.shape
    patch = 2 * settings.patch_size**2
    deviation = torch.tensor(settings.std).repeat_interleave(patch) * 255
    return (ours - theirs).abs() * deviation


def test_all_photos_give_the_hubs_ids_and_pixels(real_processor: Any, shared_data: Path) -> None:
    settings = PixelSettings.of(real_processor)
    rule = ImageSizeRule(side=280)
    exact = SampleEncoder(real_processor, rule, 8192)
    fast = SampleEncoder(real_processor, rule, 8192, exact_resize=False)
    count = two_levels = 0
    for raw, path in read_photos(shared_data):
        theirs = hub(real_processor, raw, path, resized_height=280, resized_width=280)
        example = exact.encode(raw)
        assert example.chat.input_ids.tolist() == theirs["input_ids"][0].tolist(), raw.key
        assert [list(grid) for grid in example.grids] == theirs["image_grid_thw"].tolist(), raw.key
        # The same levels; the normalising arithmetic may round its last bit another way.
        assert levels_apart(example, theirs["pixel_values"], settings).max() < 1e-3, raw.key
        apart = fast.picture(raw.images[0])[0].astype(np.int16) - example.pixels
        assert abs(apart).max() <= 2, raw.key
        two_levels += int((abs(apart) == 2).sum())
        count += 1
    assert count == PHOTOS
    assert two_levels <= 20  # of 68 million values


@pytest.mark.parametrize("bounds", [(50176, 401408), (313600, 627200), (3136, 12544)])
def test_photos_in_a_pixel_range_give_the_hubs_ids_and_pixels(
    real_processor: Any, shared_data: Path, bounds: tuple[int, int]
) -> None:
    low, high = bounds
    settings = PixelSettings.of(real_processor)
    encoder = SampleEncoder(real_processor, ImageSizeRule(None, low, high), 8192)
    photos = list(read_photos(shared_data))
    grids = set()
    for raw, path in (photos[0], photos[7]):
        theirs = hub(real_processor, raw, path, min_pixels=low, max_pixels=high)
        example = encoder.encode(raw)
        assert example.chat.input_ids.tolist() == theirs["input_ids"][0].tolist()
        assert [list(grid) for grid in example.grids] == theirs["image_grid_thw"].tolist()
        assert levels_apart(example, theirs["pixel_values"], settings).max() < 1e-3
        grids.update(example.grids)
    assert all(low <= rows * columns * 14 * 14 <= high for _, rows, columns in grids)


def test_grey_photos_are_among_them(shared_data: Path) -> None:
    modes = []
    for _, path in read_photos(shared_data):
        with Image.open(path) as image:
            modes.append(image.mode)
    assert len(modes) == PHOTOS and {"RGB", "L"} == set(modes)


def test_pictures_of_different_sizes_become_pixel_values_one_after_another() -> None:
    settings = PixelSettings(
        (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), patch_size=14, merge_size=2, temporal_patch_size=2
    )
    grids = [(1, 4, 4), (1, 4, 4), (1, 2, 6), (1, 4, 4)]
    sizes = [3 * rows * columns * 14 * 14 for _, rows, columns in grids]
    flat = torch.from_numpy(np.random.default_rng(0).integers(0, 256, sum(sizes), dtype=np.uint8))
    together = pixel_values(flat, grids, settings)
    apart = [
        pixel_values(piece, [grid], settings) for piece, grid in zip(flat.split(sizes), grids, strict=True)
    ]
    assert torch.equal(together, torch.cat(apart))
    assert together.shape == (3 * 16 + 12, 3 * 2 * 14 * 14)
