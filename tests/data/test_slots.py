"""Batches through shared slots: equal to what went in, whatever their size."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from qwenvl_dist.data.batch import BadSampleRecord, CaptionBatch
from qwenvl_dist.data.slots import BatchSlots

BAD = (BadSampleRecord("a.tar", "k", "why"),)


def batch(number: int, pixels: int = 100, targets: int = 0) -> CaptionBatch:
    def some(*shape: int) -> torch.Tensor:
        return torch.full(shape, number, dtype=torch.int64)

    grids = ((1, 2, 2),)
    return CaptionBatch(
        input_ids=some(2, 3), labels=some(2, 3), position_ids=some(3, 2, 3),
        pixels=torch.full((pixels,), number % 256, dtype=torch.uint8), image_grid_thw=torch.tensor(grids),
        image_positions=some(1), target_positions=some(targets), target_ids=some(targets), grids=grids,
        keys=(str(number),), bad=BAD, positions=(number,),
    )  # fmt: skip


class Numbers(IterableDataset):
    """Batches 0, 1, 2 ... as a worker sends them; every fifth is larger than a slot."""

    def __init__(self, slots: BatchSlots) -> None:
        self.slots = slots

    def __iter__(self) -> Any:
        for number in range(40):
            yield self.slots.put(batch(number, 10_000 if number % 5 == 0 else 101, targets=number % 3))


@pytest.mark.parametrize("depth", [2, 5])
def test_batches_arrive_as_they_were_sent_also_when_taken_late(depth: int) -> None:
    slots = BatchSlots(workers=1, depth=depth, slot_bytes=2000)
    arrived = []
    direct = 0
    for item in DataLoader(Numbers(slots), batch_size=None, num_workers=1, prefetch_factor=depth):
        direct += isinstance(item, CaptionBatch)
        arrived.append(slots.take(item, pin=False))
    assert len(arrived) == 40 and direct == 8
    for number, got in enumerate(arrived):
        sent = batch(number, 10_000 if number % 5 == 0 else 101, targets=number % 3)
        for field in dataclasses.fields(CaptionBatch):
            ours, theirs = getattr(got, field.name), getattr(sent, field.name)
            if isinstance(theirs, torch.Tensor):
                assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), field.name
            else:
                assert ours == theirs
