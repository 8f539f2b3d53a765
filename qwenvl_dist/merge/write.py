"""Write the output's weight files in one pass: copy or merge each tensor, hash it, and count what changed."""

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from qwenvl_dist.merge.apply_lora import (
    TORCH_DTYPES,
    BlockBuffers,
    Change,
    TensorPlan,
    merged_rows,
    read_into,
    read_rows,
    row_blocks,
)
from qwenvl_dist.merge.parallel import for_each
from qwenvl_dist.merge.safetensors_writer import (
    COPY_BYTES,
    SafetensorsWriter,
    Stage,
    TensorStream,
    open_for_reading,
)
from qwenvl_dist.model.base_folder import DTYPE_BYTES, BaseFolder, SafetensorsFile, write_header

READ_AHEAD_BYTES = 16 << 20


def output_bytes(plan: TensorPlan) -> int:
    """Return the size of a tensor in the output."""
    return plan.entry.nbytes // DTYPE_BYTES[plan.entry.dtype] * DTYPE_BYTES[plan.dtype]


@dataclass(frozen=True)
class FilePlan:
    """One weight file of the output: the base's file, with the same tensors in the same order."""

    source: SafetensorsFile
    header: bytes
    plans: list[TensorPlan]

    @property
    def name(self) -> str:
        """Name in the folder."""
        return self.source.path.name

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(map(output_bytes, self.plans))


def plan_files(base: BaseFolder, plans: dict[str, TensorPlan]) -> list[FilePlan]:
    """Return the output's files; a header whose types stay is the base's, byte for byte."""
    files = []
    for file in base.files.values():
        own = [plans[name] for name in file.tensors]
        header = file.header
        if any(plan.dtype != plan.entry.dtype for plan in own):
            header = write_header({plan.name: (plan.dtype, plan.entry.shape) for plan in own}, file.metadata)
        files.append(FilePlan(file, header, own))
    return files


class _OpenFile:
    """A file being written, its base's file beside it."""

    def __init__(self, plan: FilePlan, folder: Path) -> None:
        self.plan = plan
        self.records: list[dict[str, Any]] = []
        self.writer = SafetensorsWriter(folder / plan.name, plan.header, plan.size)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.source = self._stack.enter_context(open_for_reading(self.plan.source.path))
        self._stack.enter_context(self.writer)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def write_files(
    files: list[FilePlan],
    folder: Path,
    finished: Callable[[str, list[dict[str, Any]]], None],
    advance: Callable[[int], None],
) -> None:
    """Write all files at once, tensor by tensor in parallel; call `finished` for each that is on the disk.

    Memory: a few row blocks a thread. The longest tensors' files come first, since one thread does a tensor.
    """
    files = sorted(files, key=lambda file: -max(map(output_bytes, file.plans), default=0))
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(_OpenFile(file, folder)) for file in files]
        syncing = stack.enter_context(ThreadPoolExecutor(1))  # a disk's queue need not hold up the arithmetic
        waiting = []

        def finish(file: _OpenFile) -> None:
            file.writer.finish()
            finished(file.plan.name, file.records)

        def done(place: tuple[_OpenFile, TensorPlan, int], record: dict[str, Any]) -> None:
            file, plan, _ = place
            file.records.append(record)
            advance(output_bytes(plan))
            if len(file.records) == len(file.plan.plans):
                waiting.append(syncing.submit(finish, file))

        for_each([place for file in opened for place in _places(file)], _write_tensor, done)
        waiting += [syncing.submit(finish, file) for file in opened if not file.plan.plans]
        for future in waiting:
            future.result()


def _places(file: _OpenFile) -> list[tuple[_OpenFile, TensorPlan, int]]:
    """Return each tensor of a file with its offset in the output."""
    offset, places = len(file.plan.header), []
    for plan in file.plan.plans:
        places.append((file, plan, offset))
        offset += output_bytes(plan)
    return places


_own = threading.local()  # of a thread: its stage


def _write_tensor(place: tuple[_OpenFile, TensorPlan, int]) -> dict[str, Any]:
    """Write one tensor; return its record: name and sha256, and of a merged one what changed."""
    file, plan, offset = place
    if not hasattr(_own, "stage"):
        _own.stage = Stage()
    _read_ahead(file.source, plan.entry.begin, READ_AHEAD_BYTES)
    if plan.copied and file.writer.clone(file.source, plan.entry.begin, offset, plan.entry.nbytes):
        return _copy_tensor(plan, file.source, _own.stage, None)
    stream = _own.stage.open(file.writer, offset)
    if plan.copied:
        return _copy_tensor(plan, file.source, _own.stage, stream)
    return _compute_tensor(plan, file.source, stream)


def _read_ahead(source: int, begin: int, count: int) -> None:
    """Let the disk fetch a range: the kernel's own window is small, and threads that share a file confuse it."""
    os.posix_fadvise(source, begin, count, os.POSIX_FADV_WILLNEED)


def _copy_tensor(plan: TensorPlan, source: int, stage: Stage, stream: TensorStream | None) -> dict[str, Any]:
    """Hash a tensor on its way into the stream; there is none when the file has the tensor already."""
    digest = hashlib.sha256()
    for begin in range(0, plan.entry.nbytes, COPY_BYTES):
        count = min(COPY_BYTES, plan.entry.nbytes - begin)
        _read_ahead(source, plan.entry.begin + begin + READ_AHEAD_BYTES, count)
        block = stream.space(count) if stream else stage.memory(count)[:count]
        read_into(source, block, plan.entry.begin + begin, plan.entry.file)
        digest.update(block)
    if stream:
        stream.finish()
    return {"name": plan.name, "sha256": digest.hexdigest()}


def _compute_tensor(plan: TensorPlan, source: int, stream: TensorStream) -> dict[str, Any]:
    digest, change, buffers = hashlib.sha256(), Change(plan), BlockBuffers(plan)
    dtype = TORCH_DTYPES[plan.dtype]
    row_bytes = plan.entry.nbytes // max(1, plan.rows)
    for begin, end in row_blocks(plan):
        _read_ahead(
            source, plan.entry.begin + begin * row_bytes + READ_AHEAD_BYTES, (end - begin) * row_bytes
        )
        base = read_rows(source, plan.entry, plan.columns, begin, end, buffers.base)
        weight = buffers.exact[: end - begin].copy_(base)
        change.add_base(weight)
        exact = merged_rows(plan, weight, begin, end)
        data = stream.space(exact.numel() * dtype.itemsize)
        rounded = torch.frombuffer(data, dtype=dtype).view(exact.shape).copy_(exact)  # the one rounding
        if plan.merged:
            change.add(buffers, base, exact, rounded)
        digest.update(data)
    stream.finish()
    line = change.line() if plan.merged else {"name": plan.name}
    return {**line, "sha256": digest.hexdigest()}
