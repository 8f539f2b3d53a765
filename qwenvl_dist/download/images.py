"""Fetch a list of pictures: so many at a time, tried again, resumed; what could not be had is named.

A picture appears under its name once it arrived whole and decodes. `images.jsonl` has a line for each of them, and is
what a later run goes by.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import unquote, urlsplit, urlunsplit

from qwenvl_dist.data.storage import HttpStorage, ReadPolicy, StorageError, TransientError
from qwenvl_dist.download.url_list import CAPTIONS_NAME, FAILED_NAME, RECORD_NAME, UrlList, file_name
from qwenvl_dist.errors import UserError
from qwenvl_dist.files import fsync

PART_SUFFIX = ".part"
PATIENCE = ReadPolicy(timeout_seconds=30, longest_wish_seconds=300)
MAX_BYTES = 256 << 20  # of a picture


@dataclass(frozen=True)
class Fetched:
    """A picture that is here."""

    url: str
    file: str
    bytes: int
    sha256: str


@dataclass
class FetchReport:
    """What a run did. `failed` counts pictures, `rows_dropped` the rows of a CSV file that named one of these."""

    fetched: int = 0
    kept: int = 0
    failed: int = 0
    bytes: int = 0  # that were fetched
    rows_dropped: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)  # of failures


def fetch_images(
    urls: UrlList,
    out: Path,
    *,
    connections: int = 16,
    policy: ReadPolicy = PATIENCE,
    limit: int | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> FetchReport:
    """Fetch each picture of a list into a folder, those that an earlier run left there aside.

    With a CSV file, `captions.csv` in that folder is its copy with file names in place of URLs, without the rows whose
    picture failed. `failed.jsonl` names what failed, `{"url", "reason"}` a line, and is absent when nothing did.

    Args:
        urls: the list; a URL that stands there several times is fetched once.
        out: a folder that is new, empty, or from an earlier run.
        connections: requests under way at a time.
        policy: patience with each picture.
        limit: only so many different pictures, the first of the list.
        advance: called with 1 for each picture that is settled, kept ones too.
    """
    clashes = urls.clashes()
    _open_folder(out)
    report = FetchReport()
    with _locked_record(out) as record, _Failures(out / FAILED_NAME) as failures:
        known = _known(out)
        ready = {url: entry for url, entry in known.items() if entry.file == file_name(url, clashes)}
        fetcher = _Fetcher(out, policy, connections)
        lock = threading.Lock()
        bad: set[str] = set()

        def settle(url: str) -> None:
            old = ready.get(url)
            if old is not None and _is_there(out, old):
                with lock:
                    report.kept += 1
                    advance(1)
                return
            try:
                entry = fetcher.fetch(url, file_name(url, clashes))
            except StorageError as error:
                with lock:
                    bad.add(url)
                    failures.add(url, str(error))
                    advance(1)
                return
            with lock:
                ready[url] = entry
                record.write(json.dumps(vars(entry), ensure_ascii=False) + "\n")
                record.flush()
                report.fetched += 1
                report.bytes += entry.bytes
                advance(1)

        _run_threads(_distinct(urls, limit), settle, connections)
        report.failed, report.examples = len(bad), failures.examples
    if urls.column is not None:
        report.rows_dropped = _write_captions(urls, out, ready, limit)
    return report


def count_pictures(urls: UrlList, limit: int | None = None) -> int:
    """Return how many different pictures a list names."""
    return sum(1 for _ in _distinct(urls, limit))


def _distinct(urls: UrlList, limit: int | None) -> Iterator[str]:
    seen: set[bytes] = set()
    for url in urls:
        if limit is not None and len(seen) == limit:
            return
        digest = hashlib.sha256(url.encode()).digest()[:8]
        if digest not in seen:
            seen.add(digest)
            yield url


def _run_threads(items: Iterator[str], work: Callable[[str], None], count: int) -> None:
    """Call `work` on each item from `count` threads, which hold one each; the first error of any is raised."""
    lock, errors, stop = threading.Lock(), [], threading.Event()

    def loop() -> None:
        while not stop.is_set():
            try:
                with lock:
                    item = next(items, None)
                if item is None:
                    return
                work(item)
            except BaseException as error:  # raised by the thread that waits
                errors.append(error)
                stop.set()

    threads = [threading.Thread(target=loop, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:  # Ctrl-C: no new pictures; threads are daemons, and what they hold appears whole or not at all
        stop.set()
    if errors:
        raise errors[0]


class _Fetcher:
    """Fetches from any number of servers, their connections shared by all threads."""

    def __init__(self, out: Path, policy: ReadPolicy, connections: int) -> None:
        self._out, self._policy, self._connections = out, policy, connections
        self._servers: dict[tuple[str, str], HttpStorage] = {}
        self._lock = threading.Lock()

    def fetch(self, url: str, name: str) -> Fetched:
        """Return a picture that is on the disk under `name`. Raises StorageError."""
        storage, remote_name = self._storage(url)
        part = self._out / f"{name}{PART_SUFFIX}"
        tries = [0]

        def attempt() -> bytes:
            buffer = _BoundedBuffer()
            storage.download(
                remote_name, buffer
            )  # tries again by itself, and goes on where a connection broke
            data = buffer.getvalue()
            try:
                _check_picture(data)
            except ValueError as error:
                tries[0] += 1
                if tries[0] > 1:  # the same twice: so it lies on the server
                    raise StorageError(str(error)) from None
                raise TransientError(str(error)) from None
            return data

        data = self._policy.run(attempt)
        try:
            part.write_bytes(data)
            fsync(part)
            part.replace(self._out / name)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise _local_error(self._out / name, error) from None
        return Fetched(url, name, len(data), hashlib.sha256(data).hexdigest())

    def _storage(self, url: str) -> tuple[HttpStorage, str]:
        parts = urlsplit(url)
        folder, _, name = parts.path.rpartition("/")
        with self._lock:
            server = self._servers.get((parts.scheme, parts.netloc))
            location = urlunsplit(parts._replace(path=folder, fragment=""))
            storage = HttpStorage(location, self._policy, server, self._connections)
            self._servers.setdefault((parts.scheme, parts.netloc), storage)
        return storage, unquote(name)


class _BoundedBuffer(io.BytesIO):
    """Memory for one picture: an address may lead to something without end."""

    def write(self, data: Any, /) -> int:
        if self.tell() + len(data) > MAX_BYTES:
            raise StorageError(f"larger than {MAX_BYTES >> 20} MiB")
        return super().write(data)


def _check_picture(data: bytes) -> None:
    """ValueError unless the bytes are a whole picture: a server may cut a file, or send a page in its place."""
    from PIL import Image

    if not data:
        raise ValueError("the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except Exception as error:  # Pillow's readers raise whatever their format brings
        if data.lstrip()[:1] == b"<":
            raise ValueError("no picture but a page of text") from None
        raise ValueError(f"no whole picture ({_one_line(error)})") from None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return "no known format" if "cannot identify" in text else text[:120]


def _local_error(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be written ({error.strerror or error}); free some room or choose another --out"
    )


def _open_folder(out: Path) -> None:
    """Make the folder, or find that it is of an earlier run."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        others = sorted(path.name for path in out.iterdir())
    except OSError as error:
        raise _local_error(out, error) from None
    if others and RECORD_NAME not in others:
        raise UserError(
            f"{out}: holds other data ({', '.join(others[:3])}); --out must be a new or empty folder"
        )


@contextmanager
def _locked_record(out: Path) -> Iterator[TextIO]:
    """Open the record to add to it, as the only one who does."""
    try:
        with (out / RECORD_NAME).open("a", encoding="utf-8") as record:
            fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield record
    except BlockingIOError:
        raise UserError(
            f"{out}: another download is at work in it; wait for it, or choose another --out"
        ) from None


def _known(out: Path) -> dict[str, Fetched]:
    """Return what an earlier run recorded, and remove what it left half done."""
    record = out / RECORD_NAME
    known: dict[str, Fetched] = {}
    if record.exists():
        lines = record.read_bytes().split(b"\n")
        if lines[-1]:  # a line that a kill cut short
            with record.open("r+b") as file:
                file.truncate(record.stat().st_size - len(lines[-1]))
        for number, line in enumerate(lines[:-1], 1):
            try:
                entry = Fetched(**json.loads(line))
            except (ValueError, TypeError):
                raise UserError(
                    f"{record}, line {number}: is no entry of a download; remove the line"
                ) from None
            known[entry.url] = entry
    for leftover in out.glob(f"*{PART_SUFFIX}"):
        leftover.unlink()
    return known


def _is_there(out: Path, entry: Fetched) -> bool:
    try:
        return (out / entry.file).stat().st_size == entry.bytes
    except OSError:
        return False


class _Failures:
    """`failed.jsonl`, written as it happens; absent when nothing failed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.examples: list[dict[str, str]] = []

    def __enter__(self) -> _Failures:
        self._path.unlink(missing_ok=True)
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def add(self, url: str, reason: str) -> None:
        entry = {"url": url, "reason": reason}
        if len(self.examples) < 3:
            self.examples.append(entry)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _write_captions(urls: UrlList, out: Path, ready: dict[str, Fetched], limit: int | None) -> int:
    """Write the CSV file again with names of files here; return how many rows name a picture that is not here."""
    assert urls.column is not None
    wanted = None if limit is None else set(_distinct(urls, limit))
    target = out / CAPTIONS_NAME
    temporary = target.with_name(CAPTIONS_NAME + PART_SUFFIX)
    dropped = 0
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = None
        for _, row in urls.rows():
            writer = writer or csv.DictWriter(file, list(row))
            if not file.tell():
                writer.writeheader()
            url = row[urls.column].strip()
            if wanted is not None and url not in wanted:
                continue
            entry = ready.get(url)
            if entry is None or not (out / entry.file).exists():
                dropped += 1
                continue
            writer.writerow({**row, urls.column: entry.file})
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)
    return dropped
