"""Planned reads: the first stage of the pipeline, which walks the plan and brings the bytes of each sample."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from qwenvl_dist.data.batch import BadSampleRecord
from qwenvl_dist.data.index import (
    BadSample,
    Manifest,
    RawSample,
    ShardIndex,
    ShardReader,
    index_path,
    load_shard_index,
)
from qwenvl_dist.data.plan import Int64, Place, RunPlan, StepLayout, deal_by_length
from qwenvl_dist.errors import UserError


class ShardSet:
    """The shards of one packed folder, opened as the plan needs them.

    Only the indexes of the last `keep_open` shards stay in memory, so that memory does not grow with the data set.
    """

    def __init__(self, folder: str | Path, keep_open: int = 128) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        self.keep_open = keep_open
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()

    def __getstate__(self) -> dict:
        return {**vars(self), "_readers": OrderedDict()}  # open files stay with the process that opened them

    def _reader(self, shard: int) -> ShardReader:
        reader = self._readers.pop(shard, None)
        if reader is None:
            entry = self.manifest.shards[shard]
            path = self.folder / entry.name
            index = load_shard_index(index_path(path), entry.index_sha256)
            if len(index) != entry.samples:
                raise UserError(
                    f"{index_path(path)}: holds {len(index)} samples, the manifest says {entry.samples}: pack again"
                )
            reader = ShardReader(path, index)
            while len(self._readers) >= self.keep_open:
                self._readers.popitem(last=False)[1].close()
        self._readers[shard] = reader
        return reader

    def read(self, place: Place) -> RawSample:
        """Return the verified bytes of one sample. Raises BadSample."""
        try:
            return self._reader(place.shard).read(place.sample)
        except (OSError, ValueError, IndexError) as error:
            name = self.manifest.shards[place.shard].name
            raise BadSample(name, f"#{place.sample}", f"shard cannot be opened: {error}") from error

    def index(self, shard: int) -> ShardIndex:
        """Return a shard's index. Raises UserError or OSError when it cannot be read."""
        return self._reader(shard).index


class SampleLengths:
    """About how many tokens each sample has, from the index alone: nothing is decoded.

    Visual tokens are exact; text counts as characters / 4.5, the English captions' average under Qwen2's tokenizer.
    """

    CHARACTERS_PER_TOKEN = 4.5

    def __init__(self, shards: ShardSet, visual_tokens: Callable[[int, int], int]) -> None:
        self.shards, self.visual_tokens = shards, visual_tokens
        self._by_shard: OrderedDict[int, Int64] = OrderedDict()

    def of(self, shards: Int64, samples: Int64) -> Int64:
        """Return the (n,) lengths of samples; 0 where the shard is -1."""
        lengths = np.zeros(len(shards), np.int64)
        for shard in np.unique(shards[shards >= 0]).tolist():
            here = shards == shard
            lengths[here] = self._shard(shard)[samples[here]]
        return lengths

    def _shard(self, shard: int) -> Int64:
        lengths = self._by_shard.pop(shard, None)
        if lengths is None:
            lengths = self._measure(shard)
            while len(self._by_shard) >= self.shards.keep_open:
                self._by_shard.popitem(last=False)
        self._by_shard[shard] = lengths
        return lengths

    def _measure(self, shard: int) -> Int64:
        try:
            index = self.shards.index(shard)
        except (OSError, UserError):
            # Its samples will be bad ones wherever they are dealt to. A rank that alone cannot read it deals
            # differently, which `agree` finds before the step by the positions that all ranks hold together.
            return np.zeros(self.shards.manifest.shards[shard].samples, np.int64)
        sizes, which = np.unique(index.image_sizes, axis=0, return_inverse=True)
        visual = np.array([self.visual_tokens(w, h) for w, h in sizes.tolist()], np.int64)[which.reshape(-1)]
        until = np.concatenate([[0], np.cumsum(visual)])
        visual = until[index.image_starts[1:]] - until[index.image_starts[:-1]]
        return visual + (index.caption_lengths / self.CHARACTERS_PER_TOKEN).astype(np.int64)


@dataclass(frozen=True)
class PlannedSample:
    """What the plan put into one slot of a micro-batch: bytes, a sample that could not be read, or nothing."""

    position: int
    shard: str = ""
    raw: RawSample | None = None
    bad: BadSampleRecord | None = None


class PlannedSource(IterableDataset):
    """Samples of one rank in planned order, `micro_batch_size` after one another for each micro-batch.

    Worker w of W yields the micro-batches w, w + W, ... of this rank. DataLoader takes from its workers in turn, so the
    order that arrives does not depend on W. With `lengths` the samples of each global batch are dealt by length.
    """

    BLOCK = 1024  # positions that are looked up at once

    def __init__(
        self,
        shards: ShardSet,
        plan: RunPlan,
        layout: StepLayout,
        rank: int,
        start: int,
        steps: int,
        lengths: SampleLengths | None = None,
    ) -> None:
        self.shards, self.plan, self.layout, self.rank = shards, plan, layout, rank
        self.start, self.steps, self.lengths = start, steps, lengths

    def __iter__(self) -> Iterator[PlannedSample]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        layout = self.layout
        numbers = np.arange(first, self.steps * layout.grad_accum_steps, stride)
        per_number = layout.global_batch_size if self.lengths else layout.micro_batch_size
        block = max(1, self.BLOCK // per_number)
        for begin in range(0, len(numbers), block):
            positions = self._positions(numbers[begin : begin + block]).reshape(-1)
            found = (column.tolist() for column in (positions, *self.plan.find(positions)))
            for position, shard, sample in zip(*found, strict=True):
                if shard >= 0:
                    yield self._read(position, Place(shard, sample))
                else:
                    yield PlannedSample(position)

    def _positions(self, numbers: Int64) -> Int64:
        """Return the (n, micro_batch_size) positions of this rank's micro-batches of these numbers."""
        layout, size = self.layout, self.layout.global_batch_size
        steps, accumulations = np.divmod(numbers, layout.grad_accum_steps)
        first = layout.micro_batch_size * layout.micro_batch(self.rank, accumulations)
        slots = first[:, None] + np.arange(layout.micro_batch_size)
        if self.lengths is None:
            return self.start + steps[:, None] * size + slots
        steps, row = np.unique(steps, return_inverse=True)
        positions = self.start + steps[:, None] * size + np.arange(size)
        lengths = self.lengths.of(*self.plan.find(positions.reshape(-1))).reshape(positions.shape)
        row = row.reshape(-1, 1)
        return positions[row, deal_by_length(lengths)[row, slots]]

    def _read(self, position: int, place: Place) -> PlannedSample:
        shard = self.shards.manifest.shards[place.shard].name
        try:
            return PlannedSample(position, shard, raw=self.shards.read(place))
        except BadSample as error:
            return PlannedSample(position, shard, bad=BadSampleRecord(error.shard, error.key, error.reason))
