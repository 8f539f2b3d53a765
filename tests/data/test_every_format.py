"""The same photos and texts are the same samples, whatever format they come in."""

from pathlib import Path
from typing import Any

import pytest
from made_formats import FILES, pairs_of, write_webdataset

from qwenvl_dist.__main__ import main
from qwenvl_dist.data.formats import parse_sample_json
from qwenvl_dist.data.index import Manifest, ShardReader, load_shard_index
from qwenvl_dist.data.storage import LocalFile
from qwenvl_dist.data.verify import verify

Packed = dict[str, tuple[list[Any], int | str, list[bytes]]]


def samples_of(folder: Path) -> Packed:
    """Return messages, image id and pictures of each sample, by key."""
    found: Packed = {}
    for entry in Manifest.load(folder).shards:
        index = load_shard_index(folder / f"{entry.name}.idx", entry.index_sha256)
        reader = ShardReader(LocalFile(folder / entry.name), index)
        for i in range(len(index)):
            raw = reader.read(i)
            record = parse_sample_json(raw.json, len(raw.images))
            found[raw.key] = record["messages"], record["image_id"], raw.images
        reader.close()
    return found


def pack(source: str, given: Path, out: Path, *more: object) -> Packed:
    words = ("--source", source, "--input", given, "--out", out, "--samples-per-shard", 64, *more)
    assert main(["shards", "pack", *map(str, words)]) == 0
    return samples_of(out)


@pytest.fixture(scope="module")
def through_coco(real_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    out = tmp_path_factory.mktemp("coco") / "out"
    found = pack("coco", real_coco / "captions.json", out, "--images", real_coco / "images")
    assert len(found) == 290
    assert verify(out).bad == []
    return found


@pytest.mark.parametrize("name", FILES)
def test_the_real_photos_give_the_same_samples(
    name: str, tmp_path: Path, real_coco: Path, through_coco: Packed
) -> None:
    source, write = FILES[name]
    images = real_coco / "images"
    given = write(pairs_of(real_coco / "captions.json"), images, tmp_path)
    assert pack(source, given, tmp_path / "out", "--images", images) == through_coco


def test_the_real_photos_give_the_same_samples_from_the_shards_of_another_program(
    tmp_path: Path, real_coco: Path, through_coco: Packed
) -> None:
    write_webdataset(pairs_of(real_coco / "captions.json"), real_coco / "images", tmp_path)
    assert main(["shards", "index", str(tmp_path)]) == 0
    assert samples_of(tmp_path) == through_coco
