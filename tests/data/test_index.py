import io
import json
import os
import pickle
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_coco import jpeg
from safetensors import safe_open

from qwenvl_dist.data.formats import caption_messages
from qwenvl_dist.data.index import (
    BadSample,
    Manifest,
    ShardEntry,
    ShardReader,
    build_shard_index,
    image_members,
    parse_shard_index,
    probe_image,
)
from qwenvl_dist.data.storage import LocalFile
from qwenvl_dist.errors import UserError

ANSWER = "A bus.&&A white bus."


def add(tar: tarfile.TarFile, name: str, data: bytes = b"x", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def make_tar(path: Path, num_samples: int = 3) -> Path:
    text = json.dumps({"messages": caption_messages("p", ANSWER)}).encode()
    with tarfile.open(path, "w") as tar:
        for i in range(num_samples):
            add(tar, f"k{i}.jpg", jpeg(i, width=20 + i, height=10))
            add(tar, f"k{i}.json", text)
    return path


def test_index_tells_where_members_lie_and_what_they_are(tmp_path):
    tar = make_tar(tmp_path / "a.tar")
    index = build_shard_index(tar)
    content = tar.read_bytes()
    assert index.keys == ["k0", "k1", "k2"]
    for i in range(3):
        member = index.members(i)["jpg"]
        assert content[member.offset : member.offset + member.size] == jpeg(i, width=20 + i, height=10)
        assert index.images(i).tolist() == [[20 + i, 10]]
        assert index.caption_lengths[i] == len(ANSWER)
    assert index.num_bytes == len(content)


def test_index_file_reads_back_equal_and_is_a_safetensors_file(tmp_path):
    index = build_shard_index(make_tar(tmp_path / "a.tar"))
    path = tmp_path / "a.tar.idx"
    path.write_bytes(index.to_bytes())
    with safe_open(path, "numpy") as file:
        [(name, metadata)] = file.metadata().items()
        assert file.get_tensor("sizes")[0] == len(jpeg(0, width=20, height=10))
    assert name == "qwenvl-dist-index"
    assert json.loads(metadata) == {
        "version": 2,
        "shard": "a.tar",
        "bytes": index.num_bytes,
        "samples": 3,
        "extensions": ["jpg", "json"],
    }
    again = parse_shard_index(index.to_bytes(), "a")
    assert again.to_bytes() == index.to_bytes()
    assert [again.sample(i) for i in range(3)] == [index.sample(i) for i in range(3)]


@pytest.mark.parametrize(
    "change",
    [
        {"offsets": np.array([0, 1024, 2048, 4096, 5120, 6144])},
        {"sizes": np.array([1, 1, 1, 1, 1, 100 << 30])},
        {"sizes": np.array([1, 1, 1, 1, 1, -1])},
        {"sizes": np.array([1, 1, 1, 1, 1, 2**63 - 1])},
        {"offsets": np.arange(512, 517)},
        {"member_starts": np.array([0, 2, 1, 6])},
        {"member_starts": np.array([1, 2, 4, 6])},
        {"member_starts": np.array([0, 2**63 - 1, -2, 6])},  # the differences overflow
        {"image_starts": np.array([0, 1, 2, 4])},
        {"extension_ids": np.array([0, 1, 0, 1, 0, 2])},
        {"extension_ids": np.array([0, 1, 0, 1, 0, -1])},
        {"caption_lengths": np.array([1, 2])},
        {"keys": ["k0", "k1"]},
        {"keys": ["k0", "/etc/k1", "k2"]},
        {"keys": ["k0", "a/../../k1", "k2"]},
        {"num_bytes": float("inf")},
        {"image_sizes": np.zeros((3, 3))},
    ],
)
def test_an_index_that_points_elsewhere_is_refused(tmp_path, change):
    index = build_shard_index(make_tar(tmp_path / "a.tar"))
    with pytest.raises(UserError, match="damaged"):
        parse_shard_index(replace(index, **change).to_bytes(), "a")


def test_an_index_of_another_version_or_kind_is_refused(tmp_path):
    data = build_shard_index(make_tar(tmp_path / "a.tar")).to_bytes()
    with pytest.raises(UserError, match="has version 3, this program reads 2"):
        parse_shard_index(data.replace(b'version\\":2', b'version\\":3'), "a")
    for other in (b"", b"{}", b'{"format":"qwenvl-dist-index","version":1}\n', data[:60], data[:-1]):
        with pytest.raises(UserError, match=r"is not a shard index|damaged"):
            parse_shard_index(other, "a")


def test_long_names_of_foreign_tars_are_indexed(tmp_path):
    for number, form in enumerate([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]):
        path = tmp_path / f"{number}.tar"
        key = "deep/" * 40 + "é" * 90
        with tarfile.open(path, "w", format=form) as tar:
            add(tar, f"{key}.jpg", jpeg(1))
        index = build_shard_index(path)
        assert index.keys == [key]
        assert ShardReader(LocalFile(path), index).read(0).images == [jpeg(1)]


def test_an_empty_tar_has_an_empty_index(tmp_path):
    tarfile.open(tmp_path / "a.tar", "w").close()
    index = build_shard_index(tmp_path / "a.tar")
    assert len(index) == 0
    assert len(parse_shard_index(index.to_bytes(), "a")) == 0


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("/etc/x.jpg", {}, "unsafe name"),
        ("../x.jpg", {}, "unsafe name"),
        ("a/../x.jpg", {}, "unsafe name"),
        ("x.jpg", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd", "size": 0}, "link"),
        ("x.jpg", {"type": tarfile.LNKTYPE, "linkname": "y.jpg", "size": 0}, "link"),
        ("a\0b.jpg", {"pax_headers": {"path": "a\0b.jpg"}}, "unsafe name"),
        ("x.jpg", {"type": tarfile.CHRTYPE, "size": 0}, "device"),
        ("x.jpg", {"type": tarfile.BLKTYPE, "size": 0}, "device"),
        ("x.jpg", {"type": tarfile.FIFOTYPE, "size": 0}, "device"),
    ],
)
def test_unsafe_members_are_refused(tmp_path, name, fields, reason):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "k0.jpg")
        add(tar, name, b"", **fields)
    with pytest.raises(UserError, match=reason):
        build_shard_index(tmp_path / "a.tar")


def test_damaged_tars_are_refused_instead_of_cut_short(tmp_path):
    content = make_tar(tmp_path / "a.tar").read_bytes()
    second = build_shard_index(tmp_path / "a.tar").members(1)["jpg"].offset - 512
    damaged = {
        "header": content[:second] + b"?" + content[second + 1 :],
        "truncated": content[: second + 700],
        "no end mark": content[:second],
        "page": b"<html>not found</html>",
        "empty": b"",
    }
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name.split()[0] if name == "truncated" else "restore it"):
            build_shard_index(tmp_path / name)


def with_header(content: bytes, position: int, field: int, data: bytes) -> bytes:
    """Put `data` into the header at `position`, its checksum mended: damage that only its meaning tells."""
    header = bytearray(content[position : position + 512])
    header[field : field + len(data)] = data
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:position] + bytes(header) + content[position + 512 :]


def binary(number: int) -> bytes:
    """A number as GNU tar writes those that are negative or too large for octal digits."""
    return (b"\xff" if number < 0 else b"\x80") + (number % (1 << 88)).to_bytes(11, "big")


SIZE, TYPE = 124, 156  # fields of a tar header


@pytest.mark.timeout(60)  # some made tarfile go round for ever
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({SIZE: binary(100 << 30)}, "truncated"),
        ({SIZE: binary(-512)}, "has -512 bytes"),
        ({SIZE: binary(-(2**62))}, "bytes"),
        ({SIZE: binary(100 << 30), TYPE: b"L"}, "a header of 107374182400 bytes"),
        ({SIZE: binary(100 << 30), TYPE: b"x"}, "a header of 107374182400 bytes"),
        ({SIZE: binary(-512), TYPE: b"g"}, "a header of -512 bytes"),
        ({SIZE: binary(-512), TYPE: b"5"}, "has -512 bytes"),
        ({SIZE: binary(-512), TYPE: b"Z"}, "has -512 bytes"),
        ({TYPE: b"S", 482: b"\1"}, "link or a device|damaged header"),
    ],
)
def test_absurd_headers_are_refused_at_once(tmp_path, fields, reason):
    content = make_tar(tmp_path / "a.tar").read_bytes()
    position = build_shard_index(tmp_path / "a.tar").members(1)["jpg"].offset - 512
    for field, data in fields.items():
        content = with_header(content, position, field, data)
    (tmp_path / "a.tar").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(UserError, match=reason):
        build_shard_index(tmp_path / "a.tar")
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_names_upon_names_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for _ in range(2000):
            add(tar, "././@LongLink", b"k\0", type=tarfile.GNUTYPE_LONGNAME)
    with pytest.raises(UserError, match="not a readable tar"):
        build_shard_index(tmp_path / "a.tar")


@pytest.mark.timeout(60)
def test_any_header_gives_an_index_or_a_clear_error(tmp_path):
    content = make_tar(tmp_path / "a.tar").read_bytes()
    index = build_shard_index(tmp_path / "a.tar")
    headers = [member.offset - 512 for i in range(3) for member in index.members(i).values()]
    random, refused = np.random.default_rng(0), 0
    for _ in range(1500):
        damaged = content
        for _ in range(random.integers(1, 4)):
            data = random.bytes(random.integers(1, 13))
            damaged = with_header(damaged, int(random.choice(headers)), int(random.integers(0, 500)), data)
        (tmp_path / "b.tar").write_bytes(damaged)
        try:
            parse_shard_index(build_shard_index(tmp_path / "b.tar").to_bytes(), "b")
        except UserError:
            refused += 1
    assert 100 < refused < 1400


def test_a_member_twice_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "k0.jpg")
        add(tar, "k0.jpg")
    with pytest.raises(UserError, match=r"k0\.jpg twice"):
        build_shard_index(tmp_path / "a.tar")


def test_a_flipped_byte_in_an_index_never_surprises(tmp_path):
    """It reads as an index, whose checksums then fail, or as a clear error."""
    intact = build_shard_index(make_tar(tmp_path / "a.tar")).to_bytes()
    for position in range(len(intact)):
        content = bytearray(intact)
        content[position] ^= 0x10
        with suppress(UserError):
            reader = ShardReader(LocalFile(tmp_path / "a.tar"), parse_shard_index(bytes(content), "a"))
            for i in range(len(reader)):
                with suppress(BadSample):
                    reader.read(i)


def test_images_come_in_the_order_of_their_numbers():
    assert image_members(["10.jpg", "2.png", "json", "0.webp", "seg.png"]) == ["0.webp", "2.png", "10.jpg"]
    assert image_members(["json", "jpg"]) == ["jpg"]
    assert image_members(["1.tiff", "json", "0.gif", "2.bmp"]) == ["0.gif", "1.tiff", "2.bmp"]


@pytest.mark.parametrize(
    ("kind", "extension"),
    [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp"), ("TIFF", "tif")],
)
def test_probe_goes_by_content(kind, extension):
    assert probe_image(jpeg(0, width=31, height=17, kind=kind)) == (extension, 31, 17)


@pytest.mark.parametrize("data", [b"", b"text", jpeg(0)[:20], jpeg(0, kind="PPM"), jpeg(0, kind="PNG")[:20]])
def test_probe_refuses_what_is_no_picture_for_a_shard(data):
    with pytest.raises(ValueError, match=r"picture|empty"):
        probe_image(data)


@pytest.fixture
def reader(tmp_path) -> ShardReader:
    tar = make_tar(tmp_path / "a.tar")
    return ShardReader(LocalFile(tar), build_shard_index(tar))


def test_reader_gives_the_bytes(reader):
    sample = reader.read(2)
    assert (sample.key, sample.images) == ("k2", [jpeg(2, width=22, height=10)])
    assert json.loads(sample.json)["messages"] == caption_messages("p", ANSWER)


def test_reader_names_what_is_wrong_and_reads_the_neighbours(reader):
    member = reader.index.members(1)["jpg"]
    with reader.source.path.open("r+b") as file:
        file.seek(member.offset + 5)
        file.write(b"\0\0")
    with pytest.raises(BadSample, match=r"a\.tar: k1: jpg: checksum differs"):
        reader.read(1)
    assert reader.read(0).key == "k0"
    assert reader.read(2).key == "k2"
    os.truncate(reader.source.path, reader.index.members(2)["jpg"].offset + 10)
    with pytest.raises(BadSample, match=r"k2: jpg: truncated, 10 of \d+ bytes"):
        reader.read(2)


def test_reader_of_a_missing_shard_names_the_sample(reader):
    reader.source.path.unlink()
    with pytest.raises(BadSample, match="k1: missing shard file"):
        reader.read(1)


def test_reader_survives_pickling_forks_and_threads(reader):
    expected = [reader.read(i).members for i in range(3)]
    assert [pickle.loads(pickle.dumps(reader)).read(i).members for i in range(3)] == expected
    error = pickle.loads(pickle.dumps(BadSample("s", "k", "r")))
    assert (error.shard, error.key, error.reason) == ("s", "k", "r")

    child = os.fork()
    if child == 0:
        os._exit(0 if [reader.read(i).members for i in range(3)] == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    reader.close()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda n: reader.read(n % 3).members, range(300)))
    assert results == [expected[n % 3] for n in range(300)]


def manifest(name: str = "a.tar", sha256: str = "0" * 64) -> Manifest:
    return Manifest([ShardEntry(name, 10240, sha256, "1" * 64, 3)], {"source": "coco"})


def test_manifest_reads_back_equal(tmp_path):
    manifest().write(tmp_path)
    loaded = Manifest.load(tmp_path)
    assert loaded == manifest()
    assert (loaded.samples, loaded.shard_sizes.tolist()) == (3, [3])
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_fingerprint_is_pinned_and_follows_the_content():
    assert manifest().fingerprint == "1bb8c48e0228c4c886fd4c34c854c6760eba0a2a76f40056d9fbb542f74388ec"
    assert manifest(sha256="2" * 64).fingerprint != manifest().fingerprint
    assert manifest(name="b.tar").fingerprint != manifest().fingerprint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "another folder"),
        ({"version": 2}, "version 2"),
        ({"samples": 4}, "do not fit"),
        ({"fingerprint": "x"}, "do not fit"),
        ({"shards": None}, "damaged"),
        (
            {"shards": [{"name": "../a.tar", "bytes": 1, "sha256": "", "index_sha256": "", "samples": 1}]},
            "plain file",
        ),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path, change, words):
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest().to_json(), **change}))
    with pytest.raises(UserError, match=words):
        Manifest.load(tmp_path)


def test_a_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        Manifest.load(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        Manifest.load(tmp_path / "nowhere")
