"""Fixtures that several test folders share: the generated scenes and base, and the real material where it is."""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import command

# No test needs the network; a library that looks for a newer file on a hub would only wait.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what the drills take."""
    parser.addoption(
        "--kills", type=int, default=6, help="SIGKILLs in the checkpoint drill, over both stages"
    )
    parser.addoption(
        "--all-shapes",
        action="store_true",
        help="compare plans with trunc2b too, which takes ten minutes and 14 GiB",
    )


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of the real photos and of the real tokenizer and processor, read in place."""
    folder = Path(os.environ.get("QWENVL_SHARED", ROOT.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"no real material at {folder}; QWENVL_SHARED names the folder above data/")
    return folder


@pytest.fixture(scope="session")
def real_processor(shared_data: Path) -> Any:
    """The hub processor of Qwen2-VL, with its 152k tokens."""
    from qwenvl_dist.model.load import load_processor

    return load_processor(shared_data / "qwen2vl" / "Qwen2-VL-7B-Instruct")


@pytest.fixture(scope="session")
def scenes_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base in hub layout, with a tokenizer of its own for the captions of scenes."""
    from qwenvl_dist.synthetic.base import write_random_base

    return write_random_base(tmp_path_factory.mktemp("base") / "scenes", "scenes")


@pytest.fixture(scope="session")
def scenes_processor(scenes_base: Path) -> Any:
    """The processor of `scenes_base`."""
    from qwenvl_dist.model.load import load_processor

    return load_processor(scenes_base)


@pytest.fixture(scope="session")
def _scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from qwenvl_dist.synthetic.scenes import write_scenes

    return write_scenes(tmp_path_factory.mktemp("scenes") / "scenes", 40, validation_count=12)


def _pack(captions: Path, out: Path, samples_per_shard: int) -> Path:
    from qwenvl_dist.data.formats import read_coco_captions
    from qwenvl_dist.data.pack import pack

    pack(read_coco_captions(captions, captions.parent / "images"), out, samples_per_shard=samples_per_shard)
    return out


@pytest.fixture(scope="session")
def scene_shards(_scenes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 scenes of 56x56 pixels in shards of 13, 13, 13 and 1. Read only: copy it to change it."""
    return _pack(_scenes["train"], tmp_path_factory.mktemp("shards") / "train", 13)


@pytest.fixture(scope="session")
def scene_validation_shards(_scenes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 scenes of held-out pairs in shards of 7 and 5. Read only: copy it to change it."""
    return _pack(_scenes["validation"], tmp_path_factory.mktemp("shards") / "validation", 7)


@pytest.fixture(scope="session")
def photo_shards(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 290 real photos in five shards, packed by the command. Read only."""
    out = tmp_path_factory.mktemp("photos") / "shards"
    coco = shared_data / "coco"
    command(
        "shards", "pack", "--source", "coco", "--captions", coco / "captions.json", "--images", coco / "images",
        "--out", out, "--samples-per-shard", "64",
    )  # fmt: skip
    return out


@pytest.fixture(scope="session")
def tiny_base(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random base with the real tokenizer and processor, written by the command."""
    out = tmp_path_factory.mktemp("bases") / "tiny"
    text = shared_data / "qwen2vl" / "Qwen2-VL-7B-Instruct"
    command("synthetic", "base", "--out", out, "--shape", "tiny", "--text-files", text)
    return out
