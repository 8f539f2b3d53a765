"""Write a folder from all ranks: under its name it is whole, and until then it has another.

Every rank writes its files and forces them to the disk; size and sha256 are of the bytes as they were handed over, so
a disk that lost some is found out by the next reader. Rank 0 gathers them, adds the manifest as the last file, renames.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from qwenvl_dist.checkpoints.manifest import write_manifest
from qwenvl_dist.files import fsync

if TYPE_CHECKING:
    from qwenvl_dist.distributed import HostGroup

BLOCK_BYTES = 8 << 20  # of a file on its way to rank 0
_LEFTOVER = re.compile(r"\.step-\d+\.(partial|removed|stale)")

Write = Callable[[IO[bytes]], Any]  # puts the content of one file into it


class PublishFailed(Exception):  # noqa: N818
    """Some rank could not write; no folder was published. Raised on all ranks with the same words."""


def partial_folder(final: Path) -> Path:
    """Return where a folder is put together before it gets its name."""
    return final.with_name(f".{final.name}.partial")


def remove_leftovers(checkpoints: Path) -> list[str]:
    """Remove what a kill left half written or half removed; return the names. One process at a time."""
    found = [path for path in sorted(checkpoints.glob(".step-*")) if _LEFTOVER.fullmatch(path.name)]
    for path in found:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in found]


def remove_whole(folder: Path, suffix: str) -> None:
    """Remove a folder such that a kill in the middle leaves no half of it under its name."""
    gone = folder.with_name(f".{folder.name}.{suffix}")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def publish(
    group: HostGroup, final: Path, files: Mapping[str, Write], manifest: Mapping[str, Any], remote: list[int]
) -> None:
    """Write the files of all ranks, by their paths in the folder, and publish it. Collective.

    Args:
        group: used by this call alone while it runs.
        final: the folder's name; one that stands there, not whole, is replaced.
        files: of this rank.
        manifest: all of it but `files`; rank 0's counts.
        remote: ranks that do not see rank 0's disk: it writes for them.

    Raises:
        PublishFailed: on all ranks; what was written is removed.
    """
    partial = partial_folder(final)
    written: dict[str, Any] = {}
    failure = ""
    try:
        if group.rank in remote:
            _send_files(group, files)
        else:
            for name, write in files.items():
                with _hashed_file(partial / name) as file:
                    write(file)
                written[name] = file.description
    except OSError as error:
        failure = f"rank {group.rank}: {describe(error)}"
    if group.rank == 0:
        for rank in remote:
            try:
                written |= _receive_files(group, rank, partial)
            except OSError as error:
                failure = failure or f"rank 0, for rank {rank}: {describe(error)}"
    answers = group.gather((failure, written))
    failures = [failure for failure, _ in answers if failure]
    if group.rank == 0:
        try:
            if not failures:
                listed = {name: entry for _, part in answers for name, entry in part.items()}
                _give_name(partial, final, {**manifest, "files": dict(sorted(listed.items()))})
        except OSError as error:
            failures = [f"rank 0: {describe(error)}"]
        if failures:
            shutil.rmtree(partial, ignore_errors=True)
    failures = group.from_main(failures)
    if failures:
        raise PublishFailed("; ".join(failures))


def describe(error: OSError) -> str:
    """Say in a few words what the disk answered."""
    place = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{place}"


def _give_name(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    for folder in {(partial / name).parent for name in manifest["files"]}:
        fsync(folder)
    write_manifest(partial, manifest)
    if final.exists():  # an invalid one, which the resume passed over
        remove_whole(final, "stale")
    partial.rename(final)
    fsync(final.parent)


class _HashedFile:
    """A file that counts and hashes what it is given. An error is kept for the end: whoever writes goes on in vain."""

    def __init__(self, path: Path) -> None:
        self.path, self.error = path, None
        self._size, self._hash = 0, hashlib.sha256()
        self._file: IO[bytes] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("wb")
        except OSError as error:
            self.error = error

    @property
    def description(self) -> dict[str, Any]:
        return {"size": self._size, "sha256": self._hash.hexdigest()}

    def write(self, data: bytes | memoryview) -> int:
        if self._file and self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
            self._size += len(data)
            self._hash.update(data)
        return len(data)

    def flush(self) -> None:
        """Nothing: `close` forces it all to the disk."""

    def close(self) -> None:
        try:
            if self._file:
                with self._file:
                    if self.error is None:
                        self._file.flush()
                        os.fsync(self._file.fileno())
        except OSError as error:
            self.error = self.error or error
        if self.error:
            self.error.filename = self.error.filename or str(self.path)
            raise self.error


@contextmanager
def _hashed_file(path: Path) -> Iterator[Any]:
    file = _HashedFile(path)
    yield file
    file.close()


class _SentFile:
    """A file whose blocks go to rank 0; an empty block ends it."""

    def __init__(self, group: HostGroup) -> None:
        self._group, self._waiting = group, bytearray()

    def write(self, data: bytes | memoryview) -> int:
        for start in range(0, len(data), BLOCK_BYTES):
            self._waiting += data[start : start + BLOCK_BYTES]
            if len(self._waiting) >= BLOCK_BYTES:
                self.flush()
        return len(data)

    def flush(self) -> None:
        if self._waiting:
            self._group.send(self._waiting, to=0)
            self._waiting = bytearray()

    def close(self) -> None:
        self.flush()
        self._group.send(b"", to=0)


def _send_files(group: HostGroup, files: Mapping[str, Write]) -> None:
    for name, write in files.items():
        group.send(name.encode(), to=0)
        file = _SentFile(group)
        write(file)  # type: ignore[arg-type]
        file.close()
    group.send(b"", to=0)


def _receive_files(group: HostGroup, rank: int, folder: Path) -> dict[str, Any]:
    """Write what `rank` sends; takes in all of it before an error is raised."""
    written: dict[str, Any] = {}
    failure: OSError | None = None
    while name := group.receive(rank).decode():
        file = _HashedFile(folder / name)
        while block := group.receive(rank):
            file.write(block)
        try:
            file.close()
        except OSError as error:
            failure = failure or error
        written[name] = file.description
    if failure:
        raise failure
    return written
