"""Write a safetensors file in place: the header first, then each tensor's bytes where they belong."""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

COPY_BYTES = 8 << 20
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


@contextlib.contextmanager
def open_for_reading(path: Path) -> Iterator[int]:
    """Yield a descriptor."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class SafetensorsWriter:
    """Context manager over one new file, which is whole once `finish` has returned.

    Threads may write and copy at the same time.

    Args:
        path: must not exist.
        header: as `write_header` returns it, or another file's.
        size: of the whole file.
    """

    def __init__(self, path: Path, header: bytes, size: int) -> None:
        self.path = path
        self._header = header
        self._size = size
        self._descriptor = -1
        self._lock = threading.Lock()
        self._kernel_copy = hasattr(os, "copy_file_range")

    def __enter__(self) -> Self:
        """Create the file with its header, at its full size."""
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        os.ftruncate(self._descriptor, self._size)
        self._write(self._header, 0)
        self._written = len(self._header)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def finish(self) -> None:
        """Check that every byte was written, and bring the file to disk."""
        assert self._written == self._size, (self.path, self._written, self._size)
        os.fsync(self._descriptor)

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Put bytes at an offset of the file; every byte must be put exactly once."""
        self._write(data, offset)
        self._count(len(data))

    def start_writeback(self, offset: int, count: int) -> None:
        """Let the kernel begin to bring a range to the disk, so that `finish` has little left to wait for."""
        os.posix_fadvise(self._descriptor, offset, count, os.POSIX_FADV_DONTNEED)

    def copy(self, source: int, begin: int, offset: int, count: int) -> None:
        """Copy `count` bytes from offset `begin` of descriptor `source`, in the kernel where that works."""
        self._count(count)
        while count and self._kernel_copy:
            try:
                copied = os.copy_file_range(source, self._descriptor, count, begin, offset)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                copied = 0
            if copied == 0:
                self._kernel_copy = False
            begin, offset, count = begin + copied, offset + copied, count - copied
        while count:
            data = os.pread(source, min(count, COPY_BYTES), begin)
            if not data:
                raise OSError(errno.EIO, "the base's file ended early", str(self.path))
            self._write(data, offset)
            begin, offset, count = begin + len(data), offset + len(data), count - len(data)

    def _count(self, count: int) -> None:
        with self._lock:
            self._written += count

    def _write(self, data: memoryview | bytes, offset: int) -> None:
        view = memoryview(data).cast("B")
        while view:
            count = os.pwrite(self._descriptor, view, offset)
            view, offset = view[count:], offset + count
