"""Generated pictures and COCO captions files for the data tests."""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg(seed: int, width: int = 24, height: int = 16, kind: str = "JPEG") -> bytes:
    """A picture of noise, so that every byte of it matters."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


@dataclass
class Coco:
    """A COCO captions file and its pictures."""

    captions: Path
    images: Path
    content: dict

    def write(self, **changes: object) -> "Coco":
        self.content.update(changes)
        self.captions.write_text(json.dumps(self.content))
        return self


def make_coco(folder: Path, num_images: int, captions_per_image: int = 2) -> Coco:
    images = folder / "images"
    images.mkdir(parents=True)
    content: dict = {"images": [], "annotations": []}
    for image_id in range(1, num_images + 1):
        name = f"{image_id:012d}.jpg"
        (images / name).write_bytes(jpeg(image_id, width=16 + image_id % 7, height=16))
        content["images"].append({"id": image_id, "file_name": name})
        for number in range(captions_per_image):
            caption = f"Picture {image_id}, told {number}."
            content["annotations"].append(
                {"id": 100 * image_id + number, "image_id": image_id, "caption": caption}
            )
    return Coco(folder / "captions.json", images, content).write()
