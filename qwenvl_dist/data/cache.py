"""A node's own copies of shards: fetched once whatever the number of ranks and workers, bounded in size.

The cache can make a run faster, never change what it reads: whatever goes wrong here (no room, a full disk, a copy that
is not what the manifest names) ends in range reads from the remote place, and those decide what is a bad sample.

An entry is one file, `<key>.shard`, whose key hashes the URL and the sha256 that the manifest gives. It is fetched into
`<key>.<bytes>.part`, which counts as that many bytes from its start, then checked, forced to the disk and renamed. All
agreement between processes is by flock on these two files, which the kernel ends with the process:
- exclusive on a .part: its owner is fetching; without a lock it is the remains of a process that was killed
- shared on a .shard: a reader has pinned it; whoever evicts needs it exclusively, without waiting

Sizes are counted and entries evicted, least recently used first, under a lock of the whole folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import Any, BinaryIO

from qwenvl_dist.data.storage import ByteSource, Range, Storage, StorageError, pread_ranges
from qwenvl_dist.errors import UserError
from qwenvl_dist.files import fsync
from qwenvl_dist.logs import get_logger

log = get_logger(__name__)

OURS = re.compile(r"[0-9a-f]{40}\.(?:shard|(\d+)\.part)")
POLL_SECONDS = 0.05
REST_SECONDS = 60.0  # without another try after an error of the disk
GIB = 1 << 30


class Pinned:
    """An open entry that nobody evicts while this object lives."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def read_ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        """Return the bytes of each range, fewer at the end of the file."""
        return pread_ranges(self.descriptor, ranges)

    def read(self) -> bytes:
        """Return the whole entry."""
        return self.read_ranges([(0, os.fstat(self.descriptor).st_size)])[0]

    def sha256(self) -> str:
        """Return the hash of the whole entry as it is now."""
        with open(os.dup(self.descriptor), "rb") as file:  # noqa: PTH123
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()

    def __del__(self) -> None:
        os.close(self.descriptor)  # the lock goes with it


@dataclass(frozen=True)
class Wanted:
    """A remote file and what the manifest says it is."""

    storage: Storage
    name: str
    num_bytes: int | None  # None: not known before it is there
    sha256: str

    @property
    def key(self) -> str:
        """Return the name of its entry: never the file's own, which many data sets share."""
        return hashlib.sha256(f"{self.storage.location}/{self.name}\n{self.sha256}".encode()).hexdigest()[:40]


class _WrongContentError(StorageError):
    """What arrived is not what the manifest names."""


class ShardCache:
    """The entries of one folder on this node. Any number of processes and threads may use it at once."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._warned: dict[str, object] = {}
        self._resting_until = 0.0

    def prepare(self) -> None:
        """Make the folder. `UserError` when it cannot be made or written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._folder_lock():
                pass
        except OSError as error:
            raise UserError(
                f"data.cache_dir = {self.folder}: cannot be written ({error.strerror}); "
                "name a folder on this node's disk"
            ) from None

    def pin(self, wanted: Wanted, stopped: Callable[[], bool] = lambda: False) -> Pinned | None:
        """Return the entry, fetched when it is not there yet; None to read from the remote place instead."""
        if time.monotonic() < self._resting_until:
            return None
        try:
            return self._pin_or_fetch(wanted, stopped)
        except _WrongContentError as error:
            self._warn(
                wanted.name, f"{wanted.storage.location}/{wanted.name}: {error}: not cached, read in parts"
            )
        except StorageError:
            pass  # the range reads that follow meet the same fault and name it
        except OSError as error:
            self._resting_until = time.monotonic() + REST_SECONDS
            reason = error.strerror or str(error)
            self._warn(
                reason, f"data.cache_dir = {self.folder}: {reason}: reading shards in parts where they lie"
            )
        return None

    def drop(self, wanted: Wanted, pinned: Pinned) -> None:
        """Remove a damaged entry, unless another process has put a new one in its place."""
        with suppress(OSError):
            if _is_at(pinned.descriptor, self._entry(wanted)):
                self._entry(wanted).unlink()

    def _entry(self, wanted: Wanted) -> Path:
        return self.folder / f"{wanted.key}.shard"

    def _pin_or_fetch(self, wanted: Wanted, stopped: Callable[[], bool]) -> Pinned | None:
        entry = self._entry(wanted)
        part = self.folder / f"{wanted.key}.{wanted.num_bytes or 0}.part"
        while not stopped():
            pinned = self._pin_present(entry, wanted.num_bytes)
            if pinned is not None:
                return pinned
            descriptor = _lock_new(part)
            if descriptor is None:  # another process fetches it, or fails to
                time.sleep(POLL_SECONDS * random.uniform(0.5, 1))
                continue
            with open(descriptor, "r+b") as file:  # noqa: PTH123
                try:
                    if entry.exists():
                        continue
                    if not self._reserve(part, wanted.num_bytes or 0):
                        return None
                    self._fetch(wanted, file, stopped)
                    if wanted.num_bytes is None and not self._reserve(part, os.fstat(file.fileno()).st_size):
                        return None
                    part.replace(entry)
                    fsync(self.folder)
                    pinned = _share(file, entry)
                    if pinned is not None:
                        return pinned
                finally:
                    if _is_at(file.fileno(), part):  # not renamed
                        part.unlink()
        return None

    def _pin_present(self, entry: Path, num_bytes: int | None) -> Pinned | None:
        try:
            descriptor = os.open(entry, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        pinned = Pinned(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not _is_at(descriptor, entry):  # evicted in between
            return None
        if num_bytes is not None and os.fstat(descriptor).st_size != num_bytes:
            entry.unlink(missing_ok=True)
            return None
        with suppress(OSError):
            os.utime(descriptor)
        return pinned

    def _fetch(self, wanted: Wanted, file: BufferedRandom, stopped: Callable[[], bool]) -> None:
        """Fill `file`; what arrives damaged is asked for once more."""
        fault = None
        for _ in range(2):
            file.seek(0)
            file.truncate()
            target = _Target(file, wanted.num_bytes, stopped)
            wanted.storage.download(wanted.name, target)  # type: ignore[arg-type]
            file.flush()
            size = file.tell()
            if wanted.num_bytes is not None and size != wanted.num_bytes:
                fault = f"has {size} bytes, the manifest says {wanted.num_bytes}"
                continue
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() == wanted.sha256:
                os.fsync(file.fileno())
                return
            fault = "the content differs from the manifest (sha256)"
        raise _WrongContentError(fault)

    def _reserve(self, part: Path, num_bytes: int) -> bool:
        """Make room for a file of `num_bytes`, counting what others have reserved; False when too much is in use."""
        with self._folder_lock():
            others, stored, counted = [], 0, num_bytes
            for item in os.scandir(self.folder):
                ours = OURS.fullmatch(item.name)
                if ours and item.name != part.name:
                    with suppress(FileNotFoundError):
                        stat = item.stat()
                        size = max(stat.st_size, int(ours[1] or 0))
                        others.append((ours[1] is None, stat.st_mtime_ns, size, item.path))
                        counted, stored = counted + size, stored + stat.st_size
            limit = min(self.max_bytes, stored + shutil.disk_usage(self.folder).free)
            for is_entry, _, size, path in sorted(others):  # remains of killed processes come first
                if is_entry and counted <= limit:
                    break
                if _evict(Path(path)):
                    counted -= size
            if counted <= limit:
                return True
            part.unlink()
        if limit < self.max_bytes:
            self._warn(
                "disk",
                f"data.cache_dir = {self.folder}: the disk is full: reading shards in parts where they lie",
            )
        else:
            self._warn(
                "bound", f"data.cache_gib = {self.max_bytes / GIB:g}: does not hold the shards that are in use: "
                "reading those that do not fit in parts",
            )  # fmt: skip
        return False

    @contextmanager
    def _folder_lock(self) -> Iterator[None]:
        with (self.folder / "lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _warn(self, about: str, message: str) -> None:
        mine = object()
        if self._warned.setdefault(about, mine) is mine:  # also when several threads come at once
            log.warning("%s", message)


class _Target:
    """A file that takes no more than it should, and nothing once it is not wanted any more."""

    def __init__(self, file: BinaryIO, num_bytes: int | None, stopped: Callable[[], bool]) -> None:
        self._file, self._num_bytes, self._stopped = file, num_bytes, stopped
        self.tell, self.seek, self.truncate = file.tell, file.seek, file.truncate

    def write(self, data: bytes) -> int:
        if self._stopped():
            raise StorageError("not wanted any more")
        if self._num_bytes is not None and self.tell() + len(data) > self._num_bytes:
            raise _WrongContentError(f"has more than the {self._num_bytes} bytes that the manifest says")
        return self._file.write(data)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock_new(part: Path) -> int | None:
    """Return a descriptor of `part` that holds its lock, None when another one does."""
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(descriptor, part):
            return descriptor
    except BlockingIOError:
        pass
    os.close(descriptor)
    return None


def _share(file: BinaryIO, entry: Path) -> Pinned | None:
    """Turn the lock of who fetched into the pin of a reader; None when an eviction came in between."""
    descriptor = os.dup(file.fileno())  # the same lock
    pinned = Pinned(descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return pinned if _is_at(descriptor, entry) else None


def _evict(path: Path) -> bool:
    """Remove an entry that nobody has pinned, or a .part that nobody is filling."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                path.unlink()
                return True
        finally:
            os.close(descriptor)
    return False


class CachedFile:
    """A remote file, in the cache from the first read until `close`; read in parts when it has no place there."""

    def __init__(self, cache: ShardCache, wanted: Wanted) -> None:
        self.cache, self.wanted = cache, wanted
        self._remote: ByteSource = wanted.storage.open(wanted.name)
        self._pinned: Pinned | None = None
        self._refused = False
        self._checked = False  # a copy is hashed once: then damage was there when it was packed
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"cache": self.cache, "wanted": self.wanted}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def pin(self, stopped: Callable[[], bool] = lambda: False) -> Pinned | None:
        """Bring the file into the cache and keep it there until `close`."""
        with self._lock:
            if self._pinned is None and not self._refused:
                self._pinned = self.cache.pin(self.wanted, stopped)
                self._refused = self._pinned is None and not stopped()
            return self._pinned

    def read_ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        """Return the bytes of each range, fewer at the end of the file."""
        return (self.pin() or self._remote).read_ranges(ranges)

    def reread(self) -> bool:
        """Drop a copy that has rotted, so that it is fetched once more."""
        with self._lock:
            pinned = self._pinned
            if pinned is None:
                return self._remote.reread()
            if self._checked:
                return False
            self._checked = True
            if pinned.sha256() == self.wanted.sha256:
                return False
            self.cache.drop(self.wanted, pinned)
            self._pinned = None
            return True

    def close(self) -> None:
        """Unpin. A read that is under way keeps its pin to its end."""
        with self._lock:
            self._pinned, self._refused = None, False


Job = Callable[[Callable[[], bool]], object]  # can ask whether it should stop


class Prefetcher:
    """A thread that does jobs one after another, always those of the newest list, and ends with the last of them."""

    def __init__(self) -> None:
        self._jobs: Sequence[Job] = ()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def want(self, jobs: Sequence[Job]) -> None:
        """Do these next. The job under way goes on, unless there are no more."""
        with self._lock:
            self._jobs = jobs
            if jobs and self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()

    def _run(self) -> None:
        done: Sequence[Job] | None = None
        while True:
            with self._lock:
                if self._jobs is done or not self._jobs:
                    self._thread = None
                    return
                done = self._jobs
            for job in done:
                if self._jobs is done:
                    job(lambda: not self._jobs)
