"""Memory while packing does not grow with the annotation file."""

import base64
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.ranks import ROOT

WORDS = "A man with a red helmet on a small moped on a dirt road, and more that is told of him. " * 24
SMALL, LARGE = 1_000, 12_000  # samples: 2 and 25 MB
# Samples without pictures are packed; the others are read as `pack` does it, all for faults, then a shard's at a time.
READ = """
import itertools, re, sys
from functools import partial
from pathlib import Path
from qwenvl_dist.data.formats import READERS, PackInput
from qwenvl_dist.data.grounding import GroundingReader
source, path, images = sys.argv[1:]
readers = {**READERS, "grounding": partial(GroundingReader, task="all_objects")}
reader = readers[source](PackInput(path, images, allow_missing=True))
if source == "messages":
    from qwenvl_dist.data.pack import pack
    pack(reader, Path(images, f"{len(reader)}"), samples_per_shard=500)
samples = iter(reader)
while source != "messages" and list(itertools.islice(samples, 500)):
    pass
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())
print(len(reader), peak.group(1))
"""


def coco(count: int) -> str:
    ids = [number * 7919 % 1_000_003 for number in range(count)]
    images = [{"id": i, "file_name": f"{i:012d}.jpg"} for i in ids]
    captions = [{"image_id": i, "caption": WORDS} for i in reversed(ids)]
    return json.dumps({"images": images, "annotations": captions})


def instances(count: int, corners: Callable[[int], int] = lambda number: 160) -> str:
    """One object in each picture, whose outline has so many corners."""
    ids = [number * 7919 % 1_000_003 for number in range(count)]
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": 640, "height": 480} for i in ids]
    objects = [
        {
            "image_id": i,
            "category_id": 1,
            "bbox": [1, 2, 30, 40],
            "segmentation": [[100.25, 200.5] * corners(n)],
        }
        for n, i in enumerate(reversed(ids))
    ]
    return json.dumps({"images": images, "annotations": objects, "categories": [{"id": 1, "name": "dog"}]})


def one_large_outline(count: int) -> str:
    return instances(count, lambda number: 1_500_000 if count == LARGE and number == 7 else 4)


def llava(count: int) -> str:
    turns = [{"from": "human", "value": "<image>\nCOCO Yes:"}, {"from": "gpt", "value": WORDS}]
    return json.dumps([{"id": n, "image": f"{n}.jpg", "conversations": turns} for n in range(count)])


def messages(count: int) -> str:
    said = [{"role": "user", "content": "What is there?"}, {"role": "assistant", "content": WORDS}]
    return "\n".join(json.dumps({"messages": said, "id": n}) for n in range(count))


def boxes_in_pixels(count: int) -> str:
    """One box in each picture, which is in the record itself."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    image = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    turns = [{"from": "human", "value": WORDS}, {"from": "gpt", "value": "<bbox>"}]
    record = {"image": image, "conversations": turns, "objects": {"bbox": [[1, 2, 3, 4]]}}
    return json.dumps([record] * count)


def captions_csv(count: int) -> str:
    return "image_path,caption\n" + "".join(f'{n}.jpg,"{WORDS}"\n' for n in range(count))


def peak_bytes(source: str, path: Path, images: Path, count: int) -> int:
    words = [sys.executable, "-c", READ, source, str(path), str(images)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    found, kib = map(int, done.stdout.split())
    assert found == count
    return kib * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("source", "make"),
    [
        ("coco", coco),
        ("grounding", instances),
        ("grounding", one_large_outline),
        ("llava", llava),
        ("llava", boxes_in_pixels),
        ("messages", messages),
        ("csv", captions_csv),
    ],
)
def test_memory_does_not_grow_with_the_annotations(
    source: str, make: Callable[[int], str], tmp_path: Path
) -> None:
    peaks, sizes = [], []
    for count in (SMALL, LARGE):
        path = tmp_path / f"{count}.txt"
        path.write_text(make(count))
        sizes.append(path.stat().st_size)
        peaks.append(peak_bytes(source, path, tmp_path, count))
    assert sizes[1] - sizes[0] > 20e6
    growth = peaks[1] - peaks[0]
    assert growth < (sizes[1] - sizes[0]) / 2, (
        f"{growth / 1e6:.0f} MB more for {sizes[1] / 1e6:.0f} MB of text"
    )
