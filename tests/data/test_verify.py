import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from made_coco import make_coco

from qwenvl_dist.data.formats import read_coco_captions
from qwenvl_dist.data.index import (
    Manifest,
    ShardEntry,
    build_shard_index,
    index_path,
    load_shard_index,
)
from qwenvl_dist.data.pack import pack
from qwenvl_dist.data.verify import Fault, verify
from qwenvl_dist.errors import UserError
from qwenvl_dist.files import sha256_of

SHARDS = ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
KEYS = [f"{i:012d}" for i in range(1, 8)]
HIT = SHARDS[1]  # of KEYS[3:6]


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("intact")
    coco = make_coco(folder / "coco", 7)
    pack(read_coco_captions(coco.captions, coco.images), folder / "out", samples_per_shard=3)
    return folder / "out"


@pytest.fixture
def packed(tmp_path, intact) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "packed"))


def bad(folder: Path) -> list[Fault]:
    report = verify(folder)
    json.dumps(report.to_json())
    return report.bad


def put(path: Path, position: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(data)


def test_intact_shards_are_good(intact):
    for workers in (1, 2):
        report = verify(intact, workers)
        assert report.to_json() == {"shards": 3, "samples": 7, "bad": []}


def spans(index) -> list[tuple[int, int]]:
    """From a sample's first header to the end of its last padding."""
    result = []
    for i in range(len(index)):
        members = list(index.members(i).values())
        last = members[-1]
        result.append((members[0].offset - 512, last.offset + last.size + -last.size % 512))
    return result


def test_a_flipped_byte_anywhere_names_its_sample(packed):
    """Header, picture, JSON, padding: every byte belongs to a sample; behind the last, to none."""
    tar = packed / HIT
    index = load_shard_index(index_path(tar))
    content = tar.read_bytes()
    for position in [*range(0, 1100, 7), *range(1100, len(content), 61), *range(148, 156), len(content) - 1]:
        put(tar, position, bytes([content[position] ^ 0x01]))
        expected = [
            key for key, (begin, end) in zip(index.keys, spans(index), strict=True) if begin <= position < end
        ]
        faults = bad(packed)
        assert [(fault.shard, fault.key) for fault in faults] == [(HIT, key) for key in expected or [None]], (
            position
        )
        put(tar, position, content[position : position + 1])
    assert bad(packed) == []


def test_truncation_anywhere_names_all_that_is_cut(packed):
    tar = packed / HIT
    index = load_shard_index(index_path(tar))
    content = tar.read_bytes()
    for size in range(0, len(content), 512):
        os.truncate(tar, size)
        cut = [
            key
            for key, i in zip(index.keys, range(3), strict=True)
            if any(member.offset + member.size > size for member in index.members(i).values())
        ]
        assert [(fault.shard, fault.key) for fault in bad(packed)] == [(HIT, key) for key in cut or [None]], (
            size
        )
        tar.write_bytes(content)


def test_a_zeroed_block_names_the_samples_it_hits(packed):
    index = load_shard_index(index_path(packed / HIT))
    (_, end), _, _ = spans(index)
    put(packed / HIT, end - 512, bytes(1024))  # the end of one sample, the header of the next
    assert [fault.key for fault in bad(packed)] == KEYS[3:5]


def test_missing_parts_are_named(packed):
    (packed / SHARDS[0]).unlink()
    (packed / (HIT + ".idx")).unlink()
    (packed / SHARDS[2]).unlink()
    (packed / (SHARDS[2] + ".idx")).unlink()
    faults = [(fault.shard, fault.key, fault.reason) for fault in bad(packed)]
    assert faults == [
        *((SHARDS[0], key, "missing shard file") for key in KEYS[:3]),
        (HIT, None, f"missing index file {HIT}.idx"),
        (SHARDS[2], None, f"missing index file {SHARDS[2]}.idx"),
        (SHARDS[2], None, "missing shard file"),
    ]


def test_a_flipped_byte_in_an_index_is_found_and_its_sample_named(packed):
    path = packed / (HIT + ".idx")
    content = path.read_bytes()
    for position in range(0, len(content), 5):
        put(path, position, bytes([content[position] ^ 0x01]))
        assert {fault.shard for fault in bad(packed)} == {HIT}, position
        put(path, position, content[position : position + 1])
    index = load_shard_index(path)
    for column in ("crcs", "offsets", "sizes", "caption_lengths"):
        changed = getattr(index, column).copy()
        changed[changed.size // 2] -= 1  # of the middle sample
        path.write_bytes(replace(index, **{column: changed}).to_bytes())
        assert [fault.key for fault in bad(packed)][:1] == [KEYS[4]], column
    path.write_bytes(content)


def test_manifest_faults_are_found(packed):
    path = packed / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"samples": 3', b'"samples": 4', 1))
    assert [fault.shard for fault in bad(packed)] == ["manifest.json"]
    path.unlink()
    faults = bad(packed)
    assert [fault.shard for fault in faults] == ["manifest.json"]
    put(packed / HIT, 700, b"????")
    assert [(fault.shard, fault.key) for fault in bad(packed)] == [("manifest.json", None), (HIT, KEYS[3])]
    assert verify(packed).samples == 7


def test_extra_and_foreign_files_are_found(packed):
    shutil.copy(packed / HIT, packed / "other.tar")
    (packed / SHARDS[2]).write_text("<html>not found</html>")
    faults = [(fault.shard, fault.key) for fault in bad(packed)]
    assert faults == [("other.tar", None), (SHARDS[2], KEYS[6])]


def test_a_shard_that_was_replaced_is_found(packed):
    for name in (SHARDS[0], SHARDS[0] + ".idx"):
        shutil.copy(packed / name, packed / name.replace("000000", "000001"))
    faults = bad(packed)
    assert {fault.shard for fault in faults} == {HIT}
    assert faults


def replace_shard(folder: Path, tar: Path) -> None:
    """Make manifest and index agree with a changed tar, as a faulty packer would."""
    index = build_shard_index(tar)
    index_path(tar).write_bytes(index.to_bytes())
    entry = ShardEntry(
        tar.name, index.num_bytes, sha256_of(tar), sha256_of(index_path(tar)), samples=len(index)
    )
    manifest = Manifest.load(folder)
    Manifest([entry if shard.name == tar.name else shard for shard in manifest.shards]).write(folder)


def test_duplicate_keys_over_shards_are_named(packed):
    shutil.copy(packed / SHARDS[0], packed / HIT)
    replace_shard(packed, packed / HIT)
    assert bad(packed) == [Fault(HIT, key, f"duplicate key, first in {SHARDS[0]}") for key in KEYS[:3]]


def test_well_packed_nonsense_is_named(packed):
    """Checksums fit; the JSON speaks of an audio, and the picture is a text."""
    index = load_shard_index(index_path(packed / HIT))
    picture, text = index.members(0)["jpg"], index.members(1)["json"]
    put(packed / HIT, picture.offset, b"A" * picture.size)
    content = (packed / HIT).read_bytes()[text.offset : text.offset + text.size]
    put(packed / HIT, text.offset, content.replace(b'"type": "image"', b'"type": "audio"'))
    replace_shard(packed, packed / HIT)
    assert [(fault.key, fault.reason) for fault in bad(packed)] == [
        (KEYS[3], "jpg: not a readable picture"),
        (KEYS[4], "json: messages[0] has a part that is neither an image nor a text"),
    ]


def test_a_truncated_jpeg_is_named(tmp_path):
    coco = make_coco(tmp_path / "coco", 3)
    path = coco.images / "000000000002.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    pack(read_coco_captions(coco.captions, coco.images), tmp_path / "out")
    (fault,) = bad(tmp_path / "out")
    assert fault.key == "000000000002"
    assert "jpg: cannot be decoded (image file is truncated" in fault.reason


def test_only_a_folder_that_cannot_be_shards_is_an_error(tmp_path):
    for folder, words in [(tmp_path / "nowhere", "no such folder"), (tmp_path, "holds no shards")]:
        with pytest.raises(UserError, match=words):
            verify(folder)
