"""The node's cache: one download whoever asks, nothing half-written, bounded, never other bytes than there."""

import contextlib
import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from remote import HIT, KEYS, SHARDS, keys, open_cache, open_set, pack_small, read_through, reasons

from qwenvl_dist.data import cache as cache_module
from qwenvl_dist.data.cache import Pinned, Prefetcher, ShardCache, Wanted
from qwenvl_dist.data.index import Manifest
from qwenvl_dist.data.plan import RunPlan
from qwenvl_dist.data.storage import ReadPolicy, open_storage
from qwenvl_dist.errors import UserError
from tests.http_server import FileServer
from tests.ranks import ROOT

pytestmark = pytest.mark.usefixtures("short_pauses")


def wanted(url: str, name: str = HIT) -> Wanted:
    place = open_storage(url, ReadPolicy(5, 1))
    (entry,) = [entry for entry in Manifest.load(place).shards if entry.name == name]
    return Wanted(place, name, entry.num_bytes, entry.sha256)


def files(cache: ShardCache, suffix: str) -> list[Path]:
    return sorted(cache.folder.glob(f"*{suffix}"))


def total_bytes(cache: ShardCache) -> int:
    total = 0
    for path in (*files(cache, ".shard"), *files(cache, ".part")):
        with contextlib.suppress(FileNotFoundError):  # a thread may still be at work
            total += path.stat().st_size
    return total


# --- many processes ---

# Pins a file, says so, and holds it until its stdin ends.
HOLDER = """
import sys
from pathlib import Path
from qwenvl_dist.data.cache import ShardCache, Wanted
from qwenvl_dist.data.storage import ReadPolicy, open_storage
folder, max_bytes, url, name, num_bytes, sha256 = sys.argv[1:]
cache = ShardCache(Path(folder), int(max_bytes))
pinned = cache.pin(Wanted(open_storage(url, ReadPolicy(5, 1)), name, int(num_bytes), sha256))
print("none" if pinned is None else pinned.sha256(), flush=True)
sys.stdin.read()
"""


def start_holder(cache: ShardCache, url: str, name: str = HIT) -> subprocess.Popen[str]:
    target = wanted(url, name)
    arguments = [cache.folder, cache.max_bytes, url, name, target.num_bytes, target.sha256]
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_racing_processes_download_once(server: FileServer, tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    sha256 = wanted(server.url).sha256
    server.delay_seconds = 0.1
    holders = [start_holder(cache, server.url) for _ in range(4)]
    assert [holder.communicate()[0] for holder in holders] == [f"{sha256}\n"] * 4
    assert server.count(HIT) == 1
    assert len(files(cache, ".shard")) == 1 and not files(cache, ".part")


def test_a_killed_download_is_taken_over(server: FileServer, tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    sha256 = wanted(server.url).sha256
    server.fail(HIT, "stall", 1)  # the first one sits in its download
    first = start_holder(cache, server.url)
    wait_until(lambda: server.count(HIT) == 1)
    second = start_holder(cache, server.url)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(timeout=1.5)  # it waits for the first
    assert server.count(HIT) == 1
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert second.communicate()[0] == f"{sha256}\n"
    assert server.count(HIT) == 2
    assert len(files(cache, ".shard")) == 1 and not files(cache, ".part")


def test_remains_of_a_killed_download_are_removed_by_the_next_one(server: FileServer, tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    remains = cache.folder / f"{'0' * 40}.{cache.max_bytes}.part"  # it had reserved all there is
    remains.write_bytes(b"half")
    mine = cache.folder / "notes.part"
    mine.write_bytes(b"not the cache's")
    assert cache.pin(wanted(server.url)) is not None
    assert not remains.exists() and mine.exists()


# --- bounds ---


def test_least_recently_used_entries_go_first(server: FileServer, tmp_path: Path) -> None:
    targets = [wanted(server.url, name) for name in SHARDS[:3]]
    sizes = [target.num_bytes or 0 for target in targets]
    cache = open_cache(tmp_path, sum(sizes) - 1)
    for target in (targets[0], targets[1], targets[0], targets[2]):
        assert cache.pin(target) is not None  # and let go at once
        time.sleep(0.01)  # file times are that coarse
    assert total_bytes(cache) <= cache.max_bytes
    server.requests.clear()
    for target in (targets[0], targets[2]):
        assert cache.pin(target) is not None
    assert not server.counts()
    assert cache.pin(targets[1]) is not None
    assert server.count(SHARDS[1]) == 1


def test_a_pinned_entry_is_never_evicted_and_one_that_does_not_fit_is_read_in_parts(
    server: FileServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = wanted(server.url, SHARDS[0]), wanted(server.url, SHARDS[1])
    cache = open_cache(tmp_path, max(first.num_bytes or 0, second.num_bytes or 0))
    holder = start_holder(cache, server.url, SHARDS[0])
    assert holder.stdout is not None and holder.stdout.readline().strip() == first.sha256
    for _ in range(3):
        assert cache.pin(second) is None
    assert [path.name for path in files(cache, ".shard")] == [f"{first.key}.shard"]
    assert not files(cache, ".part")
    assert server.count(SHARDS[1]) == 0  # nothing is fetched in vain
    assert capsys.readouterr().err.count("does not hold the shards that are in use") == 1
    holder.kill()  # its pin goes with it
    holder.communicate()
    assert cache.pin(second) is not None
    assert [path.name for path in files(cache, ".shard")] == [f"{second.key}.shard"]


def test_a_pass_through_a_cache_that_is_too_small_gives_the_same(
    server: FileServer, packed: Path, tmp_path: Path
) -> None:
    expected = read_through(open_set(packed), epochs=2)
    largest = max(entry.num_bytes for entry in Manifest.load(packed).shards)
    for max_bytes in (1, largest + 10_000, 2 * largest + 20_000):
        cache = open_cache(tmp_path / str(max_bytes), max_bytes)
        assert read_through(open_set(server.url, cache), epochs=2) == expected
        # An index, whose size is not known before, lies there until it is seen to be too large.
        wait_until(lambda: total_bytes(cache) <= max_bytes)  # noqa: B023


def test_shards_on_shared_storage_are_staged_too(packed: Path, tmp_path: Path) -> None:
    cache = open_cache(tmp_path / "node")
    assert read_through(open_set(packed, cache)) == read_through(open_set(packed))
    assert len(files(cache, ".shard")) == 2 * len(SHARDS)  # with their indexes
    storage = tmp_path / "storage"
    shutil.copytree(packed, storage)
    (storage / HIT).unlink()
    damaged = open_set(storage, open_cache(tmp_path / "other"))
    assert sorted(reasons(read_through(damaged))) == KEYS[3:6]


# --- what goes wrong ---


def test_a_full_disk_ends_in_range_reads_and_one_warning(
    server: FileServer, packed: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip

    def full(self: Any, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_module._Target, "write", full)
    cache = open_cache(tmp_path)
    assert read_through(open_set(server.url, cache)) == read_through(open_set(packed))
    assert total_bytes(cache) == 0
    message = (
        f"data.cache_dir = {cache.folder}: No space left on device: reading shards in parts where they lie"
    )
    assert capsys.readouterr().err == f"warning: {message}\n"


def test_a_disk_that_would_not_hold_a_shard_is_not_filled(
    server: FileServer, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = cache_module.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage)
    cache = open_cache(tmp_path)
    assert cache.pin(wanted(server.url)) is None
    assert server.count(HIT) == 0


@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_a_rotten_entry_is_dropped_and_fetched_once_more(
    server: FileServer, packed: Path, tmp_path: Path, damage: str
) -> None:
    cache = open_cache(tmp_path)
    expected = read_through(open_set(packed))
    assert read_through(open_set(server.url, cache)) == expected
    entry = cache.folder / f"{wanted(server.url).key}.shard"
    content = entry.read_bytes()
    if damage == "bit":
        entry.write_bytes(content[:700] + bytes([content[700] ^ 1]) + content[701:])
    elif damage == "cut":
        os.truncate(entry, 700)
    else:
        entry.unlink()
    server.requests.clear()
    assert read_through(open_set(server.url, cache)) == expected
    assert server.counts() == {"manifest.json": 1, HIT: 1}
    assert entry.read_bytes() == content


def test_a_shard_that_is_not_the_manifests_hits_the_same_samples_as_on_disk(
    packed: Path, tmp_path: Path
) -> None:
    """Replaced after it was packed: the whole does not fit, but most samples do."""
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(packed, damaged)
    content = bytearray((damaged / HIT).read_bytes())
    content[700] ^= 1
    (damaged / HIT).write_bytes(content)
    (damaged / SHARDS[2]).write_bytes((damaged / SHARDS[2]).read_bytes() + bytes(512))
    with FileServer(damaged) as server:
        cache = open_cache(tmp_path)
        shards = open_set(server.url, cache)
        samples = read_through(shards, epochs=2)
        expected = read_through(open_set(damaged), epochs=2)
        assert keys(samples) == keys(expected)
        assert reasons(samples) == reasons(expected) and set(reasons(samples)) == {KEYS[3]}
        assert len(files(cache, ".shard")) == 2 + 4  # two shards, four indexes
        assert server.count(HIT, whole=True) <= 2 * 2  # twice each time that the plan comes to it


def test_two_data_sets_with_the_same_names_have_entries_of_their_own(
    server: FileServer, packed: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = pack_small(tmp_path / "other")
    cache = open_cache(tmp_path)
    with FileServer(other) as second:
        for url in (server.url, second.url):
            assert read_through(open_set(url, cache)) == read_through(open_set(packed))
    assert len(files(cache, ".shard")) == 2 * 2 * 4


def test_a_folder_that_cannot_be_written_is_a_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache_dir = .*file/cache: cannot be written"):
        ShardCache(tmp_path / "file" / "cache", 1).prepare()


# --- ahead of the plan ---


def test_the_window_and_the_next_one_are_fetched_and_pinned_and_the_rest_let_go(
    server: FileServer, tmp_path: Path
) -> None:
    cache = open_cache(tmp_path)
    shards = open_set(server.url, cache)
    plan = RunPlan(shards.manifest.shard_sizes, seed=3, window=1, epochs=2)
    order = [plan.shards_ahead(0, window)[0][0] for window in range(4)] + [plan.shards_ahead(1, 0)[0][0]]
    ends = [0]
    for shard in order[:4]:
        ends.append(ends[-1] + shards.manifest.shards[shard].samples)

    def pinned() -> set[int]:
        return {shard for shard, file in shards._cached.items() if file._pinned is not None}

    for number, position in enumerate(ends[:4]):
        shards.expect(plan, position, share=0)
        wait_until(lambda number=number: pinned() == {order[number], order[number + 1]})
    assert all(server.count(name, whole=True) == 1 for name in SHARDS)
    # Whoever has no room at all evicts what is not pinned, and no more.
    assert ShardCache(cache.folder, 1).pin(replace(wanted(server.url), sha256="0" * 64)) is None
    still_there = {f"{wanted(server.url, SHARDS[shard]).key}.shard" for shard in pinned()}
    assert {path.name for path in files(cache, ".shard")} == still_there
    shards.release()
    assert pinned() == set()


def test_the_plan_knows_what_comes_next() -> None:
    plan = RunPlan([2, 0, 3, 1, 4], seed=1, window=2, epochs=2)
    seen = []
    for epoch in range(2):
        windows = [plan.shards_ahead(epoch, window) for window in range(3)]
        assert sorted(shard for now, _ in windows for shard in now) == [0, 1, 2, 3, 4]
        assert [then for _, then in windows[:2]] == [now for now, _ in windows[1:]]
        seen.append(windows)
    assert seen[0][2][1] == seen[1][0][0] and seen[1][2][1] == []
    for position, place in enumerate(plan.locate(0, plan.total_samples)):
        assert place is not None
        assert place.shard in plan.shards_ahead(*plan.window(position))[0]


def test_prefetching_follows_the_newest_list_and_stops_when_nothing_is_wanted() -> None:
    done: list[str] = []
    started, go_on, stopped = threading.Event(), threading.Event(), threading.Event()

    def first(is_stopped: Callable[[], bool]) -> None:
        started.set()
        assert go_on.wait(10) and not is_stopped()
        done.append("first")

    def last(is_stopped: Callable[[], bool]) -> None:
        wait_until(is_stopped)
        stopped.set()

    prefetcher = Prefetcher()
    prefetcher.want([first, lambda _: done.append("old")])
    assert started.wait(10)
    prefetcher.want([lambda _: done.append("new"), last])
    go_on.set()
    wait_until(lambda: done == ["first", "new"])
    prefetcher.want([])
    assert stopped.wait(10)
    wait_until(lambda: prefetcher._thread is None)
    prefetcher.want([lambda _: done.append("again")])
    wait_until(lambda: done[-1] == "again")


def test_a_pin_outlives_the_file_object_that_made_it() -> None:
    reading, writing = os.pipe()
    os.close(writing)
    pinned = Pinned(reading)
    del pinned
    with pytest.raises(OSError):
        os.fstat(reading)


def test_a_target_takes_no_more_than_the_manifest_says() -> None:
    target = cache_module._Target(io.BytesIO(), 5, lambda: False)
    target.write(b"12345")
    with pytest.raises(OSError, match="has more than the 5 bytes"):
        target.write(b"6")
