"""CaptionBatch: one micro-batch on one rank, its fields and shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwenvl_dist.data.chat import IGNORE, EncodedChat, Grid


@dataclass(frozen=True)
class BadSampleRecord:
    """A sample that could not be used, as it is reported."""

    shard: str
    key: str
    reason: str


class Adjustment(StrEnum):
    """What was done to a sample that was too large for the recipe's limits."""

    CUT = "cut"  # the end of its answer was left out
    SHRUNK = "shrunk"  # its pictures were made smaller
    DROPPED = "dropped"  # its slot holds a dummy


@dataclass(frozen=True)
class Example:
    """One sample, ready to be batched. A dummy has no key and no label; a bad sample is a dummy with a record."""

    key: str | None
    chat: EncodedChat
    grids: tuple[Grid, ...]
    pixels: NDArray[np.uint8]  # (bytes,): the pictures one after another, each (3, height, width)
    bad: BadSampleRecord | None = None
    position: int | None = None  # in the run; None for a row that the plan does not know
    features: Tensor | None = None  # (visual tokens, hidden) bfloat16, then there are no pixels
    adjusted: tuple[Adjustment, ...] = ()


@dataclass(frozen=True)
class CaptionBatch:
    """One micro-batch on one rank.

    Sequences are padded on the right. Attention is causal and no target looks at padding, so there is no mask. Where
    answers share a prefix, `segments` says who may look at whom: at segment 0 and at one's own.
    """

    input_ids: Tensor  # (batch, seq) int64
    labels: Tensor  # (batch, seq) int64, -100 = no loss
    position_ids: Tensor  # (3, batch, seq) int64
    pixels: Tensor  # (bytes,) uint8: all pictures one after another, each (3, height, width)
    image_grid_thw: Tensor  # (images, 3) int64, in patches
    image_positions: (
        Tensor  # (visual tokens,) int64 into the flattened (batch * seq), in the order of the pictures
    )
    target_positions: (
        Tensor  # (targets,) int64 into the flattened (batch * seq): where the next token is learned
    )
    target_ids: Tensor  # (targets,) int64: that next token
    grids: tuple[Grid, ...]  # image_grid_thw on the host
    keys: tuple[str, ...]  # real samples only
    bad: tuple[BadSampleRecord, ...]
    positions: tuple[int, ...]  # of the run, one a slot, dummies past the end of the run too
    # (batch, seq) int64: 0 for the prefix and padding, k for the k-th answer; None where no row has several
    segments: Tensor | None = None
    # (visual tokens, hidden) bfloat16: what the tower gave for the pictures; then there are no pixels
    features: Tensor | None = None
    adjusted: tuple[Adjustment, ...] = ()  # one for each thing that was done to a sample

    @property
    def target_tokens(self) -> int:
        """How many tokens carry loss."""
        return len(self.target_ids)

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields that are tensors, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def _map(self, function) -> CaptionBatch:
        return replace(self, **{name: function(tensor) for name, tensor in self.tensors().items()})

    def pin_memory(self) -> CaptionBatch:
        """Return the batch in page-locked memory."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> CaptionBatch:
        """Return the batch on `device`, without waiting for the copy."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))


def collate(examples: Sequence[Example], dummy: Example, pad_token: int, image_token: int) -> CaptionBatch:
    """Pad examples to one batch.

    A batch without any picture gets one dummy row more: the vision tower then runs on every rank in every micro-batch,
    which ZeRO-3's collective gathers need. With features, which the dummy then has too, no rank ever runs it.
    """
    rows = list(examples)
    if dummy.features is None and not any(row.grids for row in rows):
        rows.append(dummy)
    lengths = np.array([len(row.chat.input_ids) for row in rows])
    shape = (len(rows), int(lengths.max()))
    input_ids = np.full(shape, pad_token, np.int64)
    labels = np.full(shape, IGNORE, np.int64)
    position_ids = np.zeros((3, *shape), np.int64)
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        input_ids[number, :length] = row.chat.input_ids
        labels[number, :length] = row.chat.labels
        position_ids[:, number, :length] = row.chat.position_ids
    grids = tuple(grid for row in rows for grid in row.grids)
    learned = labels[:, 1:] != IGNORE
    row_index, column = np.nonzero(learned)
    segments = None
    if any(row.chat.segments is not None for row in rows):
        segments = np.zeros(shape, np.int64)
        for number, row in enumerate(rows):
            if row.chat.segments is not None:
                segments[number, : lengths[number]] = row.chat.segments
                # An answer's first token is learned where the shared prefix ends.
                first = (row_index == number) & (np.diff(segments[number])[column] > 0)
                column[first] = np.flatnonzero(row.chat.segments == 0)[-1]
    return CaptionBatch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        pixels=torch.from_numpy(np.concatenate([row.pixels for row in rows])),
        image_grid_thw=torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
        image_positions=torch.from_numpy(np.flatnonzero(input_ids == image_token)),
        target_positions=torch.from_numpy(row_index * shape[1] + column),
        target_ids=torch.from_numpy(labels[:, 1:][learned]),
        segments=None if segments is None else torch.from_numpy(segments),
        grids=grids,
        keys=tuple(row.key for row in rows if row.key is not None),
        bad=tuple(row.bad for row in rows if row.bad is not None),
        positions=tuple(row.position for row in rows if row.position is not None),
        features=None
        if dummy.features is None
        else torch.cat([row.features for row in rows if row.features is not None]),
        adjusted=tuple(what for row in rows for what in row.adjusted),
    )
