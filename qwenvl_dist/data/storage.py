"""Where files lie: a folder, a web server, an object store. One way to read any of them.

`open_storage(location)` picks by scheme: a path or file:// is a `LocalStorage`, http(s):// an `HttpStorage`, s3:// and
all else that fsspec knows an `FsspecStorage`. HTTP does not go through fsspec: its back end takes a 200 with the whole
file for the answer to a range request. Here a range must come back as 206 with the very Content-Range that was asked.

Every error of a remote place is a `StorageError` whose text says why, the same text for the same cause, without secrets
that a URL may hold. All classes can be pickled and used after a fork: connections are opened once a process.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from qwenvl_dist.errors import UserError

Range = tuple[int, int]  # offset, size in bytes
Result = TypeVar("Result")

COALESCE_BYTES = 64 * 1024  # ranges with a smaller gap between them are one request
CHUNK_BYTES = 1 << 20
CONNECT_SECONDS = 10.0
TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.25, 15.0


class StorageError(OSError):
    """A file could not be had from where it lies."""


class MissingFileError(StorageError, FileNotFoundError):
    """There is no such file."""


class TransientError(StorageError):
    """Worth another try, after `pause_seconds` at the least."""

    def __init__(self, reason: str, pause_seconds: float = 0) -> None:
        super().__init__(reason)
        self.pause_seconds = pause_seconds


@dataclass(frozen=True)
class ReadPolicy:
    """How patient to be with a remote place."""

    timeout_seconds: float = 60  # without a byte
    retries: int = 5  # after the first try, with growing pauses
    longest_wish_seconds: float = LONGEST_PAUSE_SECONDS  # a server's Retry-After above it is cut to it

    def run(self, action: Callable[[], Result]) -> Result:
        """Return what `action` returns, tried again while it fails in a way that may pass."""
        for attempt in itertools.count():
            try:
                return action()
            except TransientError as error:
                if attempt == self.retries:
                    tried = f", tried {attempt + 1} times" if attempt else ""
                    raise StorageError(f"{error}{tried}") from None
                pause = (
                    FIRST_PAUSE_SECONDS * 2**attempt * random.uniform(0.5, 1)
                )  # ranks must not come in step
                wish = min(error.pause_seconds, self.longest_wish_seconds)
                time.sleep(max(min(LONGEST_PAUSE_SECONDS, pause), wish))
        raise AssertionError("unreachable")


@dataclass(frozen=True)
class FileStat:
    """What a place tells of a file without sending it."""

    size: int
    modified_ns: int | None  # None where it is not known


class ByteSource(Protocol):
    """One file, read in parts."""

    def read_ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        """Return the bytes of each range, fewer at the end of the file. Raises OSError."""
        ...

    def reread(self) -> bool:
        """Tell whether reading again may give other bytes, and see to it that it does."""
        ...

    def close(self) -> None:
        """Let go of what is open; a later read opens it again."""
        ...


class Storage(Protocol):
    """A folder of files somewhere; names are relative to it. Errors are OSErrors."""

    location: str  # as it may be shown

    def read_bytes(self, name: str) -> bytes:
        """Return a whole small file."""
        ...

    def stat(self, name: str) -> FileStat:
        """Return what is known of a file."""
        ...

    def open(self, name: str) -> ByteSource:
        """Return a file to read in parts; touches nothing before the first read."""
        ...

    def download(self, name: str, target: BinaryIO) -> None:
        """Copy a whole file into the empty `target`. An error in writing is an OSError, but no StorageError."""
        ...

    def names(self) -> list[str] | None:
        """Return the names of all files, None where that cannot be asked."""
        ...


def open_storage(location: str | Path, policy: ReadPolicy = ReadPolicy()) -> Storage:
    """Return the storage at a path or URL. `UserError` when nothing installed can read such a URL."""
    scheme = scheme_of(location)
    if scheme is None:
        return LocalStorage(Path(location))
    if scheme == "file":
        return LocalStorage(Path(unquote(urlsplit(str(location)).path)))
    if scheme in ("http", "https"):
        return HttpStorage(str(location), policy)
    return FsspecStorage(str(location), policy)


def open_file(location: str | Path, policy: ReadPolicy = ReadPolicy()) -> tuple[Storage, str]:
    """Return the storage that a file lies in, and the file's name there."""
    if scheme_of(location) is None:
        path = Path(location)
        return LocalStorage(path.parent), path.name
    parts = urlsplit(str(location))
    folder, _, name = parts.path.rpartition("/")
    return open_storage(urlunsplit(parts._replace(path=folder)), policy), unquote(name)


def scheme_of(location: str | Path) -> str | None:
    """Return the scheme of a URL in lower case, None for a path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.:-]*)://", location) if isinstance(location, str) else None
    return match.group(1).lower() if match else None


def is_remote(location: str | Path) -> bool:
    """Tell whether a location is a URL other than file://."""
    return scheme_of(location) not in (None, "file")


class LocalStorage:
    """A folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.location = str(folder)

    def read_bytes(self, name: str) -> bytes:
        """Return a whole file."""
        return (self.folder / name).read_bytes()

    def stat(self, name: str) -> FileStat:
        """Return size and time of change."""
        stat = (self.folder / name).stat()
        return FileStat(stat.st_size, stat.st_mtime_ns)

    def open(self, name: str) -> ByteSource:
        """Return a file to read in parts."""
        return LocalFile(self.folder / name)

    def download(self, name: str, target: BinaryIO) -> None:
        """Copy a file."""
        try:
            file = (self.folder / name).open("rb")
        except OSError as error:
            raise StorageError(f"cannot be read ({error.strerror})") from error
        with file:
            while chunk := _read_chunk(file):
                target.write(chunk)

    def names(self) -> list[str]:
        """Return the files of the folder."""
        return sorted(path.name for path in self.folder.iterdir() if path.is_file())


def _read_chunk(file: BinaryIO) -> bytes:
    try:
        return file.read(CHUNK_BYTES)
    except OSError as error:  # not one of the target's
        raise StorageError(f"cannot be read ({error.strerror})") from error


class LocalFile:
    """A file on disk. Safe in threads, after a fork and after pickling: opened once a process, at the first read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptors: dict[int, int] = {}  # process id -> file descriptor

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_descriptors": {}}

    def read_ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        """Return the bytes of each range, fewer at the end of the file."""
        return pread_ranges(self._descriptor(), ranges)

    def reread(self) -> bool:
        """A disk gives the same bytes again."""
        return False

    def close(self) -> None:
        """Close the file."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _descriptor(self) -> int:
        process = os.getpid()
        descriptor = self._descriptors.get(process)
        if descriptor is None:
            opened = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            descriptor = self._descriptors.setdefault(process, opened)
            if descriptor != opened:  # another thread was first
                os.close(opened)
        return descriptor

    def __del__(self) -> None:
        self.close()


def pread_ranges(descriptor: int, ranges: Sequence[Range]) -> list[bytes]:
    """Return the bytes of each range of an open file, fewer at its end."""
    num_bytes = os.fstat(descriptor).st_size  # a damaged size must not make us allocate it
    return [_pread(descriptor, max(0, min(size, num_bytes - offset)), offset) for offset, size in ranges]


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    data = os.pread(descriptor, size, offset)
    if len(data) == size:
        return data
    pieces = [data]  # the kernel hands out at most 2 GiB at once, and network file systems sometimes less
    missing = size - len(data)
    while missing and pieces[-1]:
        pieces.append(os.pread(descriptor, missing, offset + size - missing))
        missing -= len(pieces[-1])
    return b"".join(pieces)


class _RemoteStorage(ABC):
    """What the remote places have in common."""

    location: str

    @abstractmethod
    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Return `size` bytes at `offset`, fewer at the end of the file."""

    def open(self, name: str) -> ByteSource:
        """Return a file to read in parts."""
        return RemoteFile(self, name)


class RemoteFile:
    """A remote file, read in parts; neighbouring parts come with one request."""

    def __init__(self, storage: _RemoteStorage, name: str) -> None:
        self.storage, self.name = storage, name

    def read_ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        """Return the bytes of each range, fewer at the end of the file."""
        result = [b""] * len(ranges)
        for offset, size, members in coalesce(ranges):
            data = self.storage.read_range(self.name, offset, size)
            for i in members:
                start = ranges[i][0] - offset
                result[i] = data[start : start + ranges[i][1]]
        return result

    def reread(self) -> bool:
        """What was damaged on its way may arrive whole the next time."""
        return True

    def close(self) -> None:
        """Nothing is open: connections belong to the storage."""


def coalesce(ranges: Sequence[Range]) -> list[tuple[int, int, list[int]]]:
    """Join ranges with small gaps between them; return (offset, size, numbers of the ranges inside)."""
    joined: list[tuple[int, int, list[int]]] = []
    for i in sorted(range(len(ranges)), key=lambda i: ranges[i]):
        offset, size = ranges[i]
        if joined and offset <= joined[-1][0] + joined[-1][1] + COALESCE_BYTES:
            begin, length, members = joined[-1]
            joined[-1] = (begin, max(length, offset + size - begin), [*members, i])
        else:
            joined.append((offset, size, [i]))
    return joined


class HttpStorage(_RemoteStorage):
    """A folder on a web server. A query in the location, such as a signature, goes with every request."""

    def __init__(
        self,
        location: str,
        policy: ReadPolicy = ReadPolicy(),
        connections: HttpStorage | None = None,  # of this other folder on the same server are used too
        max_idle_connections: int = 8,
    ) -> None:
        parts = urlsplit(location)
        if not parts.hostname:
            raise UserError(f"{location}: names no host; write it like https://host/folder")
        host = parts.netloc.rpartition("@")[2]
        self.location = urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
        self.policy = policy
        self._query = f"?{parts.query}" if parts.query else ""
        self._login = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else None
        self._max_idle_connections = max_idle_connections
        self._pools: dict[int, Any] = {} if connections is None else connections._pools  # by process id
        self._seen: dict[str, tuple[int, str | None]] = {}  # name -> size, etag

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pools": {}}

    def read_bytes(self, name: str) -> bytes:
        """Return a whole file."""
        return self.policy.run(lambda: self._read_all(self._request("GET", name, {200})))

    def stat(self, name: str) -> FileStat:
        """Return size and time of change, from a HEAD request."""
        from email.utils import parsedate_to_datetime

        headers = self.policy.run(lambda: self._answer(self._request("HEAD", name, {200})).headers)
        modified = parsedate_to_datetime(value) if (value := headers.get("Last-Modified")) else None
        size = headers.get("Content-Length", "")
        if not size.isdigit():
            raise StorageError("the server does not tell the file's size")
        return FileStat(int(size), int(modified.timestamp() * 1e9) if modified else None)

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, fewer at the end of the file."""
        return self.policy.run(lambda: self._read_range(name, offset, size)) if size else b""

    def _read_range(self, name: str, offset: int, size: int) -> bytes:
        last = offset + size - 1
        response = self._request("GET", name, {200, 206, 416}, {"Range": f"bytes={offset}-{last}"})
        if response.status == 416:  # all of it lies behind the end
            self._answer(response)
            return b""
        num_bytes = self._check_range(response, name, offset, last)
        data = self._read_all(response)
        if len(data) != num_bytes:
            raise TransientError("the connection broke off")
        return data

    def _check_range(self, response: Any, name: str, offset: int, last: int | None) -> int:
        """Return how many bytes a 206 holds; StorageError unless they are those that were asked for."""
        content_range = response.headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", content_range)
        fault = None
        if response.status == 200:
            fault = "the server answers 200 to a range request: it sends whole files only, which need data.cache_dir"
        elif match is None:
            fault = f"the server answers a range request with Content-Range {content_range!r}"
        else:
            first, end, total = map(int, match.groups())
            if first != offset or end != min(total - 1 if last is None else last, total - 1):
                fault = f"the server answers with bytes {first}-{end}, asked were those from {offset}"
            else:
                now = (total, response.headers.get("ETag"))
                seen = self._seen.setdefault(name, now)
                if seen != now:
                    fault = f"changed on the server while it was read: size, etag were {seen}, are {now}"
        if fault is not None or match is None:
            response.close()
            raise StorageError(fault)
        return int(match[2]) - int(match[1]) + 1

    def download(self, name: str, target: BinaryIO) -> None:
        """Copy a file; what has arrived when the connection breaks is not asked for again."""
        etag: list[str | None] = [None]

        def attempt() -> None:
            have = target.tell()
            headers = {"Range": f"bytes={have}-", "If-Range": etag[0]} if have and etag[0] else {}
            response = self._request("GET", name, {200, 206} if headers else {200}, headers)
            if response.status == 206:
                self._check_range(response, name, have, None)
            else:
                target.seek(0)
                target.truncate()
                etag[0] = response.headers.get("ETag")
                etag[0] = None if (etag[0] or "").startswith("W/") else etag[0]  # weak ones cannot join parts
            for chunk in self._chunks(response):
                target.write(chunk)

        self.policy.run(attempt)

    def names(self) -> None:
        """Web servers have no listing."""

    def _request(
        self, method: str, name: str, expected: set[int], headers: Mapping[str, str | None] | None = None
    ) -> Any:
        """Return the response, its body unread. StorageError for every other status."""
        import urllib3.exceptions

        url = f"{self.location}/{quote(name)}{self._query}"
        try:
            response = self._pool().request(method, url, headers=headers, preload_content=False)
        except urllib3.exceptions.HTTPError as error:
            raise self._transient(error) from None
        if response.status in expected:
            return response
        response.close()
        if response.status in (404, 410):
            raise MissingFileError(f"no such file ({response.status})")
        reason = f"the server answers {response.status} {response.reason or ''}".rstrip()
        if response.status in TRANSIENT_STATUS:
            raise TransientError(reason, _wish_seconds(response.headers.get("Retry-After", "")))
        raise StorageError(reason)

    def _chunks(self, response: Any) -> Any:
        import urllib3.exceptions

        stream = response.stream(CHUNK_BYTES, decode_content=False)
        while True:
            try:
                chunk = next(stream, None)
            except urllib3.exceptions.HTTPError as error:
                response.close()
                raise self._transient(error) from None
            if chunk is None:
                response.release_conn()
                return
            yield chunk

    def _read_all(self, response: Any) -> bytes:
        return b"".join(self._chunks(response))

    def _answer(self, response: Any) -> Any:
        """Read an answer to its end for its headers' sake."""
        self._read_all(response)
        return response

    def _transient(self, error: Exception) -> TransientError:
        from urllib3 import exceptions

        cause = getattr(error, "reason", None) or error
        if isinstance(cause, exceptions.NewConnectionError):
            return TransientError("no connection to the server")
        if isinstance(cause, exceptions.TimeoutError):
            return TransientError(f"no answer within {self.policy.timeout_seconds:g} s")
        if isinstance(cause, exceptions.ProtocolError):
            return TransientError("the connection broke off")
        return TransientError(f"{type(cause).__name__}: {cause}".replace(self._query or "\0", ""))

    def _pool(self) -> Any:
        pool = self._pools.get(os.getpid())
        if pool is None:
            from urllib.request import getproxies, proxy_bypass

            import urllib3

            timeout = self.policy.timeout_seconds
            headers = urllib3.make_headers(basic_auth=self._login, user_agent="qwenvl-dist")
            options: dict[str, Any] = {
                "headers": {**headers, "Accept-Encoding": "identity"},
                "timeout": urllib3.Timeout(connect=min(CONNECT_SECONDS, timeout), read=timeout),
                "retries": urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5),
                "maxsize": self._max_idle_connections,
            }
            parts = urlsplit(self.location)
            proxy = getproxies().get(parts.scheme)
            if proxy and not proxy_bypass(parts.hostname or ""):
                pool = urllib3.ProxyManager(proxy, **options)
            else:
                pool = urllib3.PoolManager(**options)
            pool = self._pools.setdefault(os.getpid(), pool)
        return pool


def _wish_seconds(retry_after: str) -> float:
    """Return how long a server asks to be left alone: a number of seconds or a date; 0 for what is neither."""
    if retry_after.isdigit():
        return float(retry_after)
    from email.utils import parsedate_to_datetime

    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0


class FsspecStorage(_RemoteStorage):
    """A folder in whatever fsspec has a back end for: s3, gs, az, hf ... Credentials are the back end's matter."""

    def __init__(self, location: str, policy: ReadPolicy = ReadPolicy()) -> None:
        import fsspec

        self.location, self.policy = location.rstrip("/"), policy
        self._file_systems: dict[int, Any] = {}  # process id -> the back end
        scheme = scheme_of(location) or ""
        try:
            for part in scheme.split("::"):
                fsspec.get_filesystem_class(part)
        except ValueError:
            raise UserError(
                f"{location}: no back end reads {scheme}://; a path, http(s)://, s3:// or another of fsspec's"
            ) from None
        except ImportError as error:
            extra = (
                "install it with `pip install 'qwenvl-dist[s3]'`" if scheme in ("s3", "s3a") else str(error)
            )
            raise UserError(
                f"{location}: the package that reads {scheme}:// is not installed: {extra}"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_file_systems": {}}

    def read_bytes(self, name: str) -> bytes:
        """Return a whole file."""
        return self._run(lambda fs, root: fs.cat_file(f"{root}/{name}"))

    def stat(self, name: str) -> FileStat:
        """Return size and time of change."""
        info = self._run(lambda fs, root: fs.info(f"{root}/{name}"))
        modified = info.get("LastModified") or info.get("created")
        return FileStat(
            int(info["size"]), int(modified.timestamp() * 1e9) if hasattr(modified, "timestamp") else None
        )

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset` on, fewer at the end of the file."""
        if not size:
            return b""

        def read(fs: Any, root: str) -> bytes:
            try:
                return fs.cat_file(f"{root}/{name}", start=offset, end=offset + size)
            except OSError as error:
                if error.errno != errno.EINVAL:  # S3's way to say that all of it lies behind the end
                    raise
                return b""

        return self._run(read)

    def download(self, name: str, target: BinaryIO) -> None:
        """Copy a file, in big pieces of which each is tried again."""
        size, piece = self.stat(name).size, 16 * CHUNK_BYTES
        for offset in range(0, size, piece):
            target.write(self.read_range(name, offset, min(piece, size - offset)))

    def names(self) -> list[str]:
        """Return the names of all files, also when there is no such folder."""
        try:
            found = self._run(lambda fs, root: fs.ls(root, detail=True, refresh=True))
        except FileNotFoundError:
            return []
        return sorted(str(entry["name"]).rpartition("/")[2] for entry in found if entry["type"] == "file")

    def upload(self, source: Path, name: str) -> None:
        """Copy a local file here, over what is there."""
        self._run(lambda fs, root: fs.put_file(str(source), f"{root}/{name}"))

    def _run(self, action: Callable[[Any, str], Result]) -> Result:
        def attempt() -> Result:
            try:
                return action(*self._open())
            except FileNotFoundError:
                raise MissingFileError("no such file") from None
            except (PermissionError, NotImplementedError, ImportError) as error:
                raise StorageError(f"{type(error).__name__}: {error}") from None
            except Exception as error:  # each back end has errors of its own
                raise TransientError(f"{type(error).__name__}: {error}") from None

        return self.policy.run(attempt)

    def _open(self) -> tuple[Any, str]:
        process = os.getpid()
        if process not in self._file_systems:
            from fsspec.core import url_to_fs

            options: dict[str, Any] = {"skip_instance_cache": True}
            is_s3 = scheme_of(self.location) in ("s3", "s3a")
            if is_s3:
                timeout = self.policy.timeout_seconds
                limits = {"connect_timeout": min(CONNECT_SECONDS, timeout), "read_timeout": timeout}
                options["config_kwargs"] = {
                    **limits,
                    "retries": {"max_attempts": 0},
                    "max_pool_connections": 32,
                }
                options["use_listings_cache"] = False
            opened = url_to_fs(self.location, **options)
            if is_s3:
                opened[0].retries = 1  # it is `policy` that tries again
            self._file_systems[process] = opened
        file_system, root = self._file_systems[process]
        return file_system, str(root).rstrip("/")
