"""Write a safetensors file in place: the header first, then each tensor's bytes where they belong.

Large writes go past the page cache (O_DIRECT) where the file system takes that: the kernel's copy of every page and its
bookkeeping cost more CPU than the merge's arithmetic, and writes that it puts off stall all threads at once later.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

COPY_BYTES = 4 << 20  # of one write; larger ones gained nothing
ALIGNMENT = max(4096, mmap.PAGESIZE)  # of offsets, sizes and memory of a write past the page cache
_NOT_HERE = {
    errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.ENOTTY, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF,
}  # fmt: skip
_FICLONERANGE = 0x4020940D  # <linux/fs.h>, see ioctl_ficlonerange(2)


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

    Threads may write at the same time.

    Args:
        path: must not exist.
        header: as `write_header` returns it, or another file's.
        size: of the whole file.
    """

    def __init__(self, path: Path, header: bytes, size: int) -> None:
        self.path = path
        self._header = header
        self._size = size
        self._descriptor = self._direct = -1
        self._lock = threading.Lock()
        self._clones = True

    def __enter__(self) -> Self:
        """Create the file with its header, at its full size."""
        flags = os.O_WRONLY | os.O_CLOEXEC
        self._descriptor = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o666)
        with contextlib.suppress(OSError, AttributeError):  # a file system, or a system, without it
            self._direct = os.open(self.path, flags | os.O_DIRECT)
        try:
            self._reserve()
            self._pwrite(self._header, 0)
        except OSError:
            self.__exit__()
            raise
        self._written = len(self._header)
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in (self._descriptor, self._direct):
            if descriptor >= 0:
                os.close(descriptor)

    def _reserve(self) -> None:
        """Take the file's room on the disk now: threads that write into holes past the cache wait for each other.

        Not by posix_fallocate, which writes every block where the file system cannot reserve.
        """
        with contextlib.suppress(AttributeError):  # another C library
            if ctypes.CDLL(None, use_errno=True).fallocate(
                self._descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(self._size)
            ):
                error = ctypes.get_errno()
                if error == errno.ENOSPC:
                    os.ftruncate(self._descriptor, 0)  # else what it could get stays taken
                    raise OSError(error, os.strerror(error), str(self.path))
        os.ftruncate(self._descriptor, self._size)

    def finish(self) -> None:
        """Check that every byte was written, and bring the file to disk."""
        assert self._written == self._size, (self.path, self._written, self._size)
        os.fsync(self._descriptor)

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Put bytes at an offset of the file; every byte must be put exactly once."""
        view = memoryview(data).cast("B")
        self._count(len(view))
        head = min(-offset % ALIGNMENT, len(view))
        end = head + (len(view) - head) // ALIGNMENT * ALIGNMENT
        self._pwrite(view[:head], offset)
        self._write_past_cache(view[head:end], offset + head)
        self._pwrite(view[end:], offset + end)

    def clone(self, source: int, begin: int, offset: int, count: int) -> bool:
        """Share blocks of the file behind descriptor `source` where the file system can; tell whether it did.

        Only for ranges that begin at the same place of a block in both files.
        """
        head = -begin % ALIGNMENT
        inner = (count - head) // ALIGNMENT * ALIGNMENT
        if not self._clones or inner <= 0 or (begin - offset) % ALIGNMENT:
            return False
        try:
            range_ = struct.pack("=qQQQ", source, begin + head, inner, offset + head)
            fcntl.ioctl(self._descriptor, _FICLONERANGE, range_)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            self._clones = False
            return False
        for start, size in ((0, head), (head + inner, count - head - inner)):
            data = os.pread(source, size, begin + start)
            if len(data) != size:
                raise OSError(errno.EIO, "the base's file ended early", str(self.path))
            self._pwrite(data, offset + start)
        self._count(count)
        return True

    def _count(self, count: int) -> None:
        with self._lock:
            self._written += count

    def _write_past_cache(self, view: memoryview, offset: int) -> None:
        """Write an aligned range; its memory must be aligned too, or the kernel refuses and the page cache takes it."""
        while view and self._direct >= 0:
            try:
                count = os.pwrite(self._direct, view, offset)
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                break
            view, offset = view[count:], offset + count
            if count % ALIGNMENT:  # the disk is full: the next call says so
                break
        self._pwrite(view, offset)

    def _pwrite(self, view: memoryview | bytes, offset: int) -> None:
        view = memoryview(view)
        while view:
            count = os.pwrite(self._descriptor, view, offset)
            view, offset = view[count:], offset + count


class Stage:
    """Aligned memory in which a tensor's bytes gather on their way into the file, one after the other."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, COPY_BYTES + ALIGNMENT)

    def open(self, writer: SafetensorsWriter, offset: int) -> "TensorStream":
        """Return a stream to `offset` of the writer's file; only one at a time."""
        return TensorStream(self, writer, offset)

    def memory(self, size: int) -> memoryview:
        """Return at least `size` bytes, the same ones each time; what they hold stays."""
        if size > len(self._memory):
            held, self._memory = self._memory, mmap.mmap(-1, -(-size // ALIGNMENT) * ALIGNMENT)
            self._memory[: len(held)] = held[:]
        return memoryview(self._memory)


class TensorStream:
    """The bytes of one tensor, in order. Memory at position p holds the byte that goes to `_start + p` of the file."""

    def __init__(self, stage: Stage, writer: SafetensorsWriter, offset: int) -> None:
        self._stage, self._writer = stage, writer
        self._start = offset // ALIGNMENT * ALIGNMENT
        self._first = self._end = offset - self._start

    def space(self, count: int) -> memoryview:
        """Return the memory of the tensor's next `count` bytes, to be filled before the next call."""
        if self._end + count > COPY_BYTES:
            self._flush(self._end // ALIGNMENT * ALIGNMENT)
        memory = self._stage.memory(self._end + count)
        begin, self._end = self._end, self._end + count
        return memory[begin : self._end]

    def finish(self) -> None:
        """Write what has not been written."""
        self._flush(self._end)

    def _flush(self, until: int) -> None:
        if until <= self._first:
            return
        memory = self._stage.memory(self._end)
        self._writer.write(memory[self._first : until], self._start + self._first)
        left = self._end - until
        memory[:left] = memory[until : self._end]
        self._start, self._first, self._end = self._start + until, 0, left
