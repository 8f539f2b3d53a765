"""A random base of the smallest shape, an adapter on it, and shards of generated pictures of several sizes."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from qwenvl_dist.data.formats import ImageRef, Sample, caption_messages
from qwenvl_dist.data.pack import pack
from qwenvl_dist.synthetic.scenes import captions, draw_scene, scene

SIZES = [(56, 56), (140, 84), (63, 120), (224, 56), (112, 112), (97, 131), (56, 84)]  # width, height


@pytest.fixture(scope="session")
def base(scenes_base: Path) -> Path:
    return scenes_base


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One picture a size, as JPEG and PNG."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for number, size in enumerate(SIZES):
        path = folder / f"{number}.{'png' if number % 2 else 'jpg'}"
        draw_scene(scene(number, 0, size=224)).resize(size, Image.Resampling.BICUBIC).save(path)
        paths.append(path)
    return paths


@pytest.fixture(scope="session")
def references() -> list[str]:
    return [captions(scene(number, 0), "plain")[0] for number in range(len(SIZES))]


@pytest.fixture(scope="session")
def shards(pictures: list[Path], references: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 3, 3 and 1 samples; image ids 100, 101, ..., the last sample has none."""
    folder = tmp_path_factory.mktemp("shards") / "packed"
    samples = [
        Sample(
            f"sample{number}",
            caption_messages("COCO Yes:", references[number]),
            [ImageRef(path)],
            None if number == len(pictures) - 1 else 100 + number,
            "test",
        )
        for number, path in enumerate(pictures)
    ]
    pack(samples, folder, samples_per_shard=3)
    return folder


def write_adapter(base: Path, folder: Path, *, targets: tuple[str, ...] = ("q_proj", "up_proj")) -> Path:
    """Write a peft folder whose adapter changes what the base says."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(7)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=list(targets), init_lora_weights=False)
    tuned = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    tuned.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(base, tmp_path_factory.mktemp("adapter") / "peft")


@pytest.fixture(scope="session")
def hub_text_files(shared_data: Path) -> Path:
    """The published tokenizer and processor files."""
    return shared_data / "qwen2vl" / "Qwen2-VL-7B-Instruct"


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")
