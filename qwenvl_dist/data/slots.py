"""Batches from loader workers through memory that is shared once, instead of a file descriptor for each tensor.

torch opens, maps and hands over a file for every tensor that leaves a worker, which costs as much as decoding does.
Here a worker copies a batch into its next slot and sends where it lies; the training process copies it out.
"""

from __future__ import annotations

import mmap
import multiprocessing
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import get_worker_info

from qwenvl_dist.data.batch import CaptionBatch


@dataclass(frozen=True)
class _Part:
    """One tensor inside a slot."""

    start: int  # bytes
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SlottedBatch:
    """A batch whose tensors lie in a slot."""

    worker: int
    slot: int
    num_bytes: int
    parts: dict[str, _Part]
    rest: dict[str, Any]  # what is no tensor


class BatchSlots:
    """Shared memory of `depth` + 1 slots for each forked worker.

    DataLoader lets a worker run at most `depth` (its prefetch factor) batches ahead of the one that was taken last, so
    a slot is never written before it was copied out. Only once another worker is done can one be asked for more, and
    then it has at most one batch left, since the plan deals micro-batches in turn. Memory is only used where batches
    were written.
    """

    def __init__(self, workers: int, depth: int, slot_bytes: int) -> None:
        self.depth, self.slot_bytes = depth, -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._next = 0  # counted in each worker for itself
        shared = mmap.mmap(-1, workers * (depth + 1) * self.slot_bytes)
        self._slots = torch.frombuffer(shared, dtype=torch.uint8).view(workers, depth + 1, self.slot_bytes)

    @staticmethod
    def usable() -> bool:
        """Whether workers inherit memory: only forked ones do."""
        return multiprocessing.get_start_method() == "fork"

    def put(self, batch: CaptionBatch) -> CaptionBatch | SlottedBatch:
        """Copy a batch into the worker's next slot; one that is too large stays as it is."""
        tensors = sorted(
            batch.tensors().items(), key=lambda item: -item[1].element_size()
        )  # keeps int64 aligned
        end = sum(tensor.nbytes for _, tensor in tensors)
        worker = get_worker_info()
        assert worker is not None, "slots are for loader workers"
        if end > self.slot_bytes:
            return batch
        slot, self._next = self._next, (self._next + 1) % (self.depth + 1)
        parts, start = {}, 0
        for name, tensor in tensors:
            parts[name] = _Part(start, tensor.nbytes, tensor.dtype, tuple(tensor.shape))
            place = self._slots[worker.id, slot, start : start + tensor.nbytes]
            place.view(tensor.dtype).view(tensor.shape).copy_(tensor)
            start += tensor.nbytes
        rest = {name: value for name, value in vars(batch).items() if name not in parts}
        return SlottedBatch(worker.id, slot, end, parts, rest)

    def take(self, item: CaptionBatch | SlottedBatch, pin: bool) -> CaptionBatch:
        """Return the batch in memory of its own, page-locked if `pin`."""
        if isinstance(item, CaptionBatch):
            return item.pin_memory() if pin else item
        own = torch.empty(item.num_bytes, dtype=torch.uint8, pin_memory=pin)
        own.copy_(self._slots[item.worker, item.slot, : item.num_bytes])
        tensors = {
            name: own[part.start : part.start + part.num_bytes].view(part.dtype).view(part.shape)
            for name, part in item.parts.items()
        }
        return CaptionBatch(**tensors, **item.rest)
