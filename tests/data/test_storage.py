"""Remote places: the same bytes as from disk, and every fault of a server by its name."""

import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from remote import HIT, HURRIED, KEYS, SHARDS, keys, open_cache, open_set, read_through, reasons

from qwenvl_dist.data import storage
from qwenvl_dist.data.cache import ShardCache
from qwenvl_dist.data.formats import read_coco_captions
from qwenvl_dist.data.index import Manifest
from qwenvl_dist.data.pack import pack
from qwenvl_dist.data.storage import (
    COALESCE_BYTES,
    LocalStorage,
    ReadPolicy,
    StorageError,
    coalesce,
    open_file,
    open_storage,
)
from qwenvl_dist.data.verify import Fault, verify
from qwenvl_dist.errors import UserError
from tests.http_server import FileServer

BAD_KEYS = KEYS[3:6]


pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.fixture
def memory(packed: Path) -> Iterator[str]:
    file_system = fsspec.filesystem("memory")
    for path in packed.iterdir():
        file_system.pipe_file(f"/shards/{path.name}", path.read_bytes())
    yield "memory://shards"
    file_system.rm("/shards", recursive=True)


@pytest.fixture(scope="module")
def s3(packed: Path) -> Iterator[str]:
    """A bucket that holds the shards, on a server of this machine."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        host, port = server.get_host_and_port()
        use_s3_server(patch, f"http://{host}:{port}")
        file_system = fsspec.filesystem("s3")
        file_system.mkdir("bucket")
        file_system.put(str(packed), "bucket/shards", recursive=True)
        yield "s3://bucket/shards"
        server.stop()
    file_system.clear_instance_cache()


def use_s3_server(patch: pytest.MonkeyPatch, url: str) -> None:
    values = {
        "ENDPOINT_URL": url,
        "ACCESS_KEY_ID": "a",
        "SECRET_ACCESS_KEY": "b",
        "DEFAULT_REGION": "us-east-1",
    }
    for name, value in values.items():
        patch.setenv(f"AWS_{name}", value)


# --- the same from everywhere ---


def assert_same_as_local(place: str, packed: Path, cache: ShardCache | None = None) -> None:
    here, there = read_through(open_set(packed), epochs=2), read_through(open_set(place, cache), epochs=2)
    assert there == here
    assert len(there) == 22 and not reasons(there)
    # After a fork and after pickling too: connections and threads stay behind.
    shards = pickle.loads(pickle.dumps(open_set(place, cache)))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"same" if read_through(shards) == here[:11] else b"other")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 10) == b"same"
    os.close(reading), os.close(writing)


def test_http_gives_what_the_disk_gives(server: FileServer, packed: Path, tmp_path: Path) -> None:
    assert_same_as_local(server.url, packed)
    server.requests.clear()
    assert_same_as_local(server.url + "/", packed, open_cache(tmp_path))
    assert {server.count(name) for name in (*SHARDS, *(f"{name}.idx" for name in SHARDS))} == {1}, (
        server.counts()
    )


def test_s3_gives_what_the_disk_gives(s3: str, packed: Path, tmp_path: Path) -> None:
    assert_same_as_local(s3, packed)
    assert_same_as_local(s3, packed, open_cache(tmp_path))


def test_whatever_fsspec_knows_gives_what_the_disk_gives(memory: str, packed: Path) -> None:
    assert_same_as_local(memory, packed)


def test_a_file_url_is_a_folder(packed: Path) -> None:
    assert_same_as_local(packed.as_uri(), packed)


def test_a_sample_is_one_request(server: FileServer) -> None:
    read_through(open_set(server.url))
    assert server.counts() == {
        "manifest.json": 1,
        **dict(zip(SHARDS, (3, 3, 3, 2), strict=True)),
        **{f"{name}.idx": 1 for name in SHARDS},
    }


def test_near_ranges_are_joined_and_far_ones_are_not() -> None:
    far = 20 + COALESCE_BYTES + 1
    assert coalesce([(10, 10), (far, 5), (0, 5), (12, 2)]) == [(0, 20, [2, 0, 3]), (far, 5, [1])]
    assert coalesce([(10, 10), (far - 1, 5)]) == [(10, far - 6, [0, 1])]
    assert coalesce([]) == []


@pytest.mark.parametrize("place", ["http", "s3", "memory"])
def test_ranges_at_the_end_are_cut_and_missing_files_are_named(
    place: str, packed: Path, server: FileServer, request: pytest.FixtureRequest
) -> None:
    url = server.url if place == "http" else request.getfixturevalue(place)
    there, here = open_storage(url, HURRIED), LocalStorage(packed)
    size = here.stat(HIT).size
    assert there.stat(HIT).size == size
    ranges = [(0, 700), (size - 10, 20), (size + 5, 3), (5, 0)]
    assert there.open(HIT).read_ranges(ranges) == here.open(HIT).read_ranges(ranges)
    assert there.read_bytes("manifest.json") == here.read_bytes("manifest.json")
    for ask in (there.stat, there.read_bytes, lambda name: there.open(name).read_ranges([(0, 4)])):
        with pytest.raises(FileNotFoundError):
            ask("nothing.tar")


# --- faults of a server ---

LASTING = {
    "whole": "shard cannot be read (the server answers 200 to a range request: it sends whole files only, which need "
    "data.cache_dir)",
    "wrong": "checksum differs",
    "reset": "shard cannot be read (the connection broke off, tried 3 times)",
    "short": "shard cannot be read (the connection broke off, tried 3 times)",
    "503": "shard cannot be read (the server answers 503 Service Unavailable, tried 3 times)",
    "403": "shard cannot be read (the server answers 403 Forbidden)",
    "404": "missing shard file",
    "stall": "shard cannot be read (no answer within 0.4 s, tried 3 times)",
    "html": "jpg: truncated, 0 of",
    "shifted": "shard cannot be read (the server answers with bytes",
}  # fmt: skip


@pytest.mark.parametrize("cached", [False, True], ids=["ranges", "cache"])
@pytest.mark.parametrize("fault", LASTING)
def test_a_lasting_fault_names_the_samples_of_its_shard_and_no_others(
    server: FileServer, packed: Path, tmp_path: Path, fault: str, cached: bool
) -> None:
    expected = read_through(open_set(packed))
    shards = open_set(server.url, open_cache(tmp_path) if cached else None)
    server.fail(HIT, fault)
    samples = read_through(shards)
    assert keys(samples) == keys(expected)
    # Whole files are what a cache wants.
    bad = [] if cached and fault in ("whole", "shifted") else BAD_KEYS
    assert sorted(reasons(samples)) == bad
    assert all(LASTING[fault] in reason for reason in reasons(samples).values())
    assert [s for s in samples if not s.bad] == [s for s in expected if s.raw and s.raw.key not in bad]


@pytest.mark.parametrize("cached", [False, True], ids=["ranges", "cache"])
@pytest.mark.parametrize(
    ("fault", "times"),
    [("wrong", 1), ("reset", 2), ("short", 2), ("503", 2), ("429", 1), ("stall", 1), ("redirect", 9)],
)
def test_a_passing_fault_changes_nothing(
    server: FileServer, packed: Path, tmp_path: Path, fault: str, times: int, cached: bool
) -> None:
    shards = open_set(server.url, open_cache(tmp_path) if cached else None)
    server.fail(HIT, fault, times)
    server.fail(HIT + ".idx", fault, times if fault != "wrong" else 0)
    assert read_through(shards) == read_through(open_set(packed))


def test_a_file_that_changes_while_it_is_read_is_named(server: FileServer) -> None:
    server.fail(HIT, "etag")
    bad = reasons(read_through(open_set(server.url)))
    assert len(bad) == 2 and set(bad) < set(BAD_KEYS)  # the first answer is what the others are held against
    assert all("changed on the server while it was read" in reason for reason in bad.values())


def test_an_index_that_cannot_be_read_names_the_samples_by_number(server: FileServer, packed: Path) -> None:
    shards = open_set(server.url)
    server.fail(HIT + ".idx", "503")
    bad = reasons(read_through(shards))
    assert set(bad) == {"#0", "#1", "#2"}
    assert all("503 Service Unavailable, tried 3 times" in reason for reason in bad.values())


def test_a_broken_download_goes_on_where_it_stopped(server: FileServer, packed: Path, tmp_path: Path) -> None:
    size = (packed / HIT).stat().st_size
    server.fail(HIT, "short", 2)
    with (tmp_path / "copy").open("w+b") as target:
        open_storage(server.url, HURRIED).download(HIT, target)
    assert (tmp_path / "copy").read_bytes() == (packed / HIT).read_bytes()
    ranges = [request.range for request in server.requests]
    assert ranges == [None, (size // 2, None), (size // 2 + (size - size // 2) // 2, None)]


def test_s3_answers_503_in_a_burst_and_for_good(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("s3fs")
    shutil.copytree(packed, tmp_path / "bucket" / "shards")
    with FileServer(tmp_path) as server:
        use_s3_server(monkeypatch, server.url)
        name = f"bucket/shards/{HIT}"
        server.fail(name, "503", 2)
        assert read_through(open_set("s3://bucket/shards")) == read_through(open_set(packed))
        server.fail(name, "503")
        bad = reasons(read_through(open_set("s3://bucket/shards")))
        assert sorted(bad) == BAD_KEYS
        assert all("tried 3 times" in reason for reason in bad.values())


def test_pauses_grow_and_a_servers_wish_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_PAUSE_SECONDS", 1.0)
    pauses: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", pauses.append)

    def fail() -> None:
        raise storage.TransientError("busy", pause_seconds=7 if len(pauses) == 1 else 0)

    with pytest.raises(StorageError, match="busy, tried 7 times"):
        ReadPolicy(1, 6).run(fail)
    assert 0.5 <= pauses[0] <= 1 and pauses[1] == 7 and 2 <= pauses[2] <= 4 and 4 <= pauses[3] <= 8
    assert pauses[5] == storage.LONGEST_PAUSE_SECONDS


# --- what a user does wrong ---


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("nosuch://x/y", "no back end reads nosuch://"),
        ("http:///folder", "names no host"),
        ("http://127.0.0.1:9/x", "cannot be read (no connection to the server"),
        ("memory://nothing", "holds no manifest.json"),
    ],
)
def test_a_url_that_leads_nowhere_is_named(location: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        Manifest.load(open_storage(location, HURRIED))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_back_end_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(protocol: str) -> None:
        raise ImportError(f"Install {protocol}fs to access {protocol.upper()}")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(
        UserError, match=r"s3:// is not installed: install it with `pip install 'qwenvl-dist\[s3\]'`"
    ):
        open_storage("s3://bucket/shards")
    with pytest.raises(UserError, match="gs:// is not installed: Install gsfs"):
        open_storage("gs://bucket/shards")


def test_secrets_in_a_url_are_sent_and_not_shown(server: FileServer) -> None:
    url = server.url.replace("//", "//user:word@") + "?signature=secret"
    shards = open_set(url)
    assert not reasons(read_through(shards))
    server.fail("manifest.json", "403")
    with pytest.raises(UserError) as error:
        open_set(url)
    assert "word" not in str(error.value) and "secret" not in str(error.value)


def test_the_place_of_a_file_is_its_folder(packed: Path) -> None:
    place, name = open_file("http://host/a/b%20c/captions.json?key=1")
    assert (place.location, name) == ("http://host/a/b%20c", "captions.json")
    place, name = open_file(packed / "manifest.json")
    assert place.stat(name).size == (packed / name).stat().st_size


# --- verify and pack ---


@pytest.mark.parametrize("place", ["http", "s3", "memory"])
def test_verify_finds_the_same_faults_everywhere(
    place: str, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(packed, damaged)
    data = bytearray((damaged / HIT).read_bytes())
    data[700] ^= 1
    (damaged / HIT).write_bytes(data)
    (damaged / SHARDS[2]).unlink()
    (damaged / SHARDS[3]).write_bytes((damaged / SHARDS[3]).read_bytes()[:1000])
    expected = verify(damaged)
    assert len(expected.bad) >= 6
    if place == "http":
        with FileServer(damaged) as server:
            assert verify(server.url, workers=2) == expected
            assert verify(server.url) == expected
        return
    url = request.getfixturevalue(place) + "-damaged"
    file_system, root = fsspec.core.url_to_fs(url)
    for path in damaged.iterdir():
        file_system.pipe_file(f"{root}/{path.name}", path.read_bytes())
    assert verify(url) == expected
    file_system.pipe_file(f"{root}/more.tar", b"x")
    assert verify(url).bad[0] == Fault("more.tar", None, "not in the manifest")
    file_system.rm(root, recursive=True)


def test_verify_names_a_shard_that_the_server_does_not_give(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    server.fail(HIT, "503")
    assert verify(server.url).bad == [
        Fault(HIT, None, "cannot be read (the server answers 503 Service Unavailable, tried 6 times)")
    ]


@pytest.mark.parametrize("place", ["s3", "memory"])
def test_pack_from_and_to_urls(
    place: str, packed: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = request.getfixturevalue(place) + "-packed"
    with FileServer(packed.parent / "coco") as server:
        samples = list(read_coco_captions(f"{server.url}/captions.json", f"{server.url}/images"))
        assert pack(samples, out, samples_per_shard=3, workers=2).shards_written == 4
        assert read_through(open_set(out)) == read_through(open_set(packed))
        assert verify(out).bad == []
        assert pack(samples, out, samples_per_shard=3).shards_written == 0
        with pytest.raises(UserError, match="was packed from another input"):
            pack(samples[1:], out, samples_per_shard=3)
        server.fail("images/000000000004.jpg", "404")
        with pytest.raises(UserError, match=r"images/000000000004.jpg: cannot be read \(no such file"):
            pack(samples, tmp_path / "out")
    file_system, root = fsspec.core.url_to_fs(out)
    file_system.rm(f"{root}/manifest.json")
    file_system.pipe_file(f"{root}/notes.txt", b"mine")
    with pytest.raises(UserError, match=r"holds other data \(notes.txt"):
        pack(
            list(read_coco_captions(*[packed.parent / "coco" / n for n in ("captions.json", "images")])), out
        )
    file_system.rm(root, recursive=True)


def test_pack_refuses_a_place_that_cannot_be_written(packed: Path) -> None:
    coco = packed.parent / "coco"
    with pytest.raises(UserError, match="--out http://host/x: cannot be written to"):
        pack(read_coco_captions(coco / "captions.json", coco / "images"), "http://host/x")
