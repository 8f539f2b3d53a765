"""Planned reads: the first stage of the pipeline, which walks the plan and brings the bytes of each sample."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import IterableDataset, get_worker_info

from qwenvl_dist.data.batch import BadSampleRecord
from qwenvl_dist.data.index import BadSample, Manifest, RawSample, ShardReader, index_path, load_shard_index
from qwenvl_dist.data.plan import Place, RunPlan, StepLayout


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
            reader = ShardReader(path, load_shard_index(index_path(path), entry.index_sha256))
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


@dataclass(frozen=True)
class PlannedSample:
    """What the plan put into one slot of a micro-batch: bytes, a sample that could not be read, or nothing."""

    shard: str = ""
    raw: RawSample | None = None
    bad: BadSampleRecord | None = None


class PlannedSource(IterableDataset):
    """Samples of one rank in planned order, `micro_batch_size` after one another for each micro-batch.

    Worker w of W yields the micro-batches w, w + W, ... of this rank. DataLoader takes from its workers in turn, so the
    order that arrives does not depend on W.
    """

    def __init__(
        self, shards: ShardSet, plan: RunPlan, layout: StepLayout, rank: int, start: int, steps: int
    ) -> None:
        self.shards, self.plan, self.layout, self.rank = shards, plan, layout, rank
        self.start, self.steps = start, steps

    def __iter__(self) -> Iterator[PlannedSample]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        layout = self.layout
        for number in range(first, self.steps * layout.grad_accum_steps, stride):
            step, accumulation = divmod(number, layout.grad_accum_steps)
            micro_batch = layout.micro_batch(self.rank, accumulation)
            position = self.start + step * layout.global_batch_size + micro_batch * layout.micro_batch_size
            for place in self.plan.locate(position, layout.micro_batch_size):
                yield self._read(place)

    def _read(self, place: Place | None) -> PlannedSample:
        if place is None:
            return PlannedSample()
        shard = self.shards.manifest.shards[place.shard].name
        try:
            return PlannedSample(shard, raw=self.shards.read(place))
        except BadSample as error:
            return PlannedSample(shard, bad=BadSampleRecord(error.shard, error.key, error.reason))
