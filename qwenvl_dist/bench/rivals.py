"""The usual ways from a sample to the model's input, as their users write them. Each yields how many pictures came.

All of them start from the samples' bytes in memory, so that none waits for a disk. The hub's processors know an area,
not a side: for a square of S pixels they get S * S as least and most area, which gives at most as many visual tokens.
"""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler
from webdataset.compat import WebDataset

from qwenvl_dist.data.formats import parse_sample_json
from qwenvl_dist.data.index import RawSample
from qwenvl_dist.data.sizes import ImageSizeRule
from qwenvl_dist.errors import UserError

MAPPED_AT_ONCE = 16  # samples in one Dataset.map


def hub_processor(base: Path, rule: ImageSizeRule, backend: str) -> Any:
    """Return the hub's processor with its `torchvision` (fast) or `pil` (slow) picture processor."""
    from transformers import AutoImageProcessor, AutoProcessor

    processor = AutoProcessor.from_pretrained(base)
    low, high = (rule.min_pixels, rule.max_pixels) if rule.side is None else (rule.side**2,) * 2
    # Not `size=...`: min_pixels and max_pixels of the model's own file would silently win over it.
    processor.image_processor = AutoImageProcessor.from_pretrained(
        base, backend=backend, min_pixels=low, max_pixels=high
    )
    size = processor.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (low, high), f"the size did not arrive: {size}"
    return processor


class Photos(Dataset):
    """(messages, [PIL images]) of one sample."""

    def __init__(self, samples: Sequence[RawSample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> tuple[list, list[Image.Image]]:
        raw = self.samples[number]
        pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in raw.images]
        return parse_sample_json(raw.json, len(raw.images))["messages"], pictures


class HubCollate:
    """Rows of (messages, images) -> the processor's padded tensors and labels."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, rows: Sequence[tuple[list, list[Image.Image]]]) -> dict[str, Any]:
        """Return what the model's forward takes."""
        texts = [self.processor.apply_chat_template(messages, tokenize=False) for messages, _ in rows]
        images = [picture for _, pictures in rows for picture in pictures]
        inputs = self.processor(text=texts, images=images or None, padding=True, return_tensors="pt")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        return {**inputs, "labels": labels}


def hub_in_workers(
    samples: Sequence[RawSample], processor: Any, batch_size: int, workers: int
) -> Iterator[int]:
    """A map-style data set, the processor as collate function, float32 `pixel_values` through the queue."""
    for batch in DataLoader(
        Photos(samples),
        batch_size,
        sampler=RandomSampler(samples, replacement=True, num_samples=1 << 40),
        collate_fn=HubCollate(processor),
        num_workers=workers,
    ):
        yield len(batch["image_grid_thw"]) if "image_grid_thw" in batch else 0


def _pictures_of(sample: dict[str, Any]) -> tuple[list, list[Image.Image]]:
    """Return what `Photos` gives, from a sample that webdataset has decoded."""
    return sample["json"]["messages"], [value for value in sample.values() if isinstance(value, Image.Image)]


def plain_webdataset(shards: Sequence[Path], processor: Any, batch_size: int, workers: int) -> Iterator[int]:
    """Webdataset's own reading, `shuffle(1000)` and PIL decoding, then the same processor."""
    read: Any = WebDataset([str(path) for path in shards], shardshuffle=100, empty_check=False)
    rows = read.repeat().shuffle(1000).decode("pil").map(_pictures_of)
    pipeline = rows.batched(batch_size, collation_fn=HubCollate(processor), partial=False)
    # More workers than shards would leave some without any, for ever asking.
    for batch in DataLoader(pipeline, batch_size=None, num_workers=min(workers, len(shards))):
        yield len(batch["image_grid_thw"]) if "image_grid_thw" in batch else 0


def dataset_map(samples: Sequence[RawSample], processor: Any, side: int | None) -> Iterator[int]:
    """The article's preprocessing before training, on one core: `Dataset.map` into Arrow columns of Python lists."""
    try:
        import datasets
    except ImportError:
        raise UserError("the `datasets` library is not installed; pip install datasets") from None
    from qwen_vl_utils import process_vision_info

    datasets.disable_progress_bars()

    def process(example: dict[str, str]) -> dict[str, Any]:
        messages = copy.deepcopy(conversations[example["key"]])
        text = processor.apply_chat_template(messages, tokenize=False)
        images = process_vision_info(messages)[0]
        inputs = processor(text=[text], images=images, padding=True, return_tensors="pt")
        return {name: tensor.tolist() for name, tensor in inputs.items()}

    size = {} if side is None else {"resized_height": side, "resized_width": side}
    with tempfile.TemporaryDirectory() as folder:
        conversations = {
            str(number): _with_files(raw, Path(folder), str(number), size)
            for number, raw in enumerate(samples)
            if raw.images
        }
        endless = cycle(conversations)
        while True:
            keys = list(islice(endless, MAPPED_AT_ONCE))
            rows = datasets.Dataset.from_dict({"key": keys})
            # A fingerprint of our own: hashing the function would be timed with it.
            mapped = rows.map(process, remove_columns=["key"], new_fingerprint="bench")
            yield sum(len(grids) for grids in mapped["image_grid_thw"])


def _with_files(raw: RawSample, folder: Path, name: str, size: dict[str, int]) -> list[dict[str, Any]]:
    """Return the messages with each picture written to a file and named, as qwen_vl_utils wants it."""
    messages = parse_sample_json(raw.json, len(raw.images))["messages"]
    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    for number, (part, data) in enumerate(zip(parts, raw.images, strict=True)):
        path = folder / f"{name}.{number}.jpg"
        path.write_bytes(data)
        part.update(image=str(path), **size)
    return messages
