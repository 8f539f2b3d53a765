"""Planned reads: the first stage of the pipeline, which walks the plan and brings the bytes of each sample."""

from __future__ import annotations

import resource
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from qwenvl_dist.data.batch import BadSampleRecord
from qwenvl_dist.data.cache import CachedFile, Job, Prefetcher, ShardCache, Wanted
from qwenvl_dist.data.index import (
    BadSample,
    Manifest,
    RawSample,
    ShardEntry,
    ShardIndex,
    ShardReader,
    check_shard_index,
    read_shard_index,
)
from qwenvl_dist.data.plan import (
    Deal,
    Int64,
    Place,
    Plan,
    StepLayout,
    deal_by_budget,
    deal_by_length,
)
from qwenvl_dist.data.sizes import estimated_tokens
from qwenvl_dist.data.storage import LocalStorage, Storage, open_storage
from qwenvl_dist.errors import UserError

READ_AHEAD = 8  # samples that are asked for at a time from a remote place, a loader worker
GOLDEN_SECTION = 0.6180339887498949


@dataclass(frozen=True)
class Slot:
    """What the plan puts where."""

    micro_batch: int  # of this rank, counted from the start
    position: int
    place: Place | None  # None where the run has ended
    max_visual_tokens: int | None  # of this sample, so that its micro-batch keeps its budget


class Shards(Protocol):
    """Where the samples of a plan are read: one data set (`ShardSet`) or several (`joined.JoinedShards`)."""

    manifest: Manifest
    is_remote: bool  # some of them at least
    keep_open: int  # indexes that stay in memory

    @property
    def parts(self) -> list[ShardSet]:
        """Return the data sets one by one, in the order in which their shards are numbered."""
        ...

    def stored(self, shard: int) -> tuple[Storage, ShardEntry, dict[str, Any] | None]:
        """Return where a shard lies, what its own manifest says of it, and how its texts are read."""
        ...

    def expect(self, plan: Plan, position: int, share: int) -> None:
        """Hear where the plan is."""
        ...

    def release(self) -> None:
        """Hear that the plan is done with."""
        ...

    def read(self, place: Place) -> RawSample:
        """Return the verified bytes of one sample. Raises BadSample."""
        ...

    def index(self, shard: int) -> ShardIndex:
        """Return a shard's index. Raises UserError or OSError when it cannot be read."""
        ...


class ShardSet:
    """The shards of one packed data set, opened as the plan needs them. Safe in threads.

    Only the indexes of the last `keep_open` shards stay in memory, so that memory does not grow with the data set. With
    a cache, shards are pinned in it from when the plan needs them (`expect`) until it does no longer.
    """

    def __init__(
        self, place: str | Path | Storage, cache: ShardCache | None = None, keep_open: int = 128
    ) -> None:
        self.storage = open_storage(place) if isinstance(place, (str, Path)) else place
        self.manifest = Manifest.load(self.storage)
        self.is_remote = not isinstance(self.storage, LocalStorage)
        self.cache = cache
        self.keep_open = keep_open
        self._reset()

    def require_pictures(self) -> None:
        """Raise UserError where the shards hold features, for work that needs the pictures themselves."""
        if self.manifest.features is not None:
            raise UserError(
                f"{self.storage.location}: holds vision features, this needs pictures; "
                "name the shards that `shards encode` read"
            )

    def _reset(self) -> None:
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        self._cached: dict[int, CachedFile] = {}
        self._expected: tuple[int, int] | None = None  # epoch, window
        self._prefetcher = Prefetcher()
        self._lock = threading.Lock()
        self._index_locks = [threading.Lock() for _ in range(4 * READ_AHEAD)]  # by shard, in turn

    def __getstate__(self) -> dict:
        own = {"_readers", "_cached", "_expected", "_prefetcher", "_lock", "_index_locks"}  # of this process
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._reset()

    @property
    def parts(self) -> list[ShardSet]:
        """Return this one alone."""
        return [self]

    def stored(self, shard: int) -> tuple[Storage, ShardEntry, dict[str, Any] | None]:
        """Return where a shard lies, what the manifest says of it, and how its texts are read."""
        return self.storage, self.manifest.shards[shard], self.manifest.texts

    def expect(self, plan: Plan, position: int, share: int) -> None:
        """Hear where the plan is: bring the shards of this window and the next into the cache, let the others go.

        Each process begins at another place, by the number `share`, so that they do not all wait for one shard.
        """
        if self.cache is None or position >= plan.total_samples:
            return
        ((own, place),) = plan.parts_at(position)
        if own.window(place) == self._expected:
            return
        self._expected = own.window(place)
        windows = own.shards_ahead(*self._expected)
        wanted = [shard for shards in windows for shard in _rotated(shards, share)]
        _allow_open_files(len(wanted))
        with self._lock:
            gone = {shard: self._cached.pop(shard) for shard in set(self._cached) - set(wanted)}
            for shard, file in gone.items():
                self._readers.pop(shard, None)
                file.close()
            files = [self._cached_file(shard) for shard in wanted]
        jobs: list[Job] = []
        for shard, file in zip(wanted, files, strict=True):
            jobs += [partial(self.cache.pin, self._wanted_index(shard)), file.pin]
        self._prefetcher.want(jobs)

    def release(self) -> None:
        """Hear that the plan is done with: stop fetching, let all shards go."""
        self._prefetcher.want(())
        with self._lock:
            self._expected = None
            for file in self._cached.values():
                file.close()

    def _cached_file(self, shard: int) -> CachedFile:
        """Return the shard as the cache gives it. Under the lock."""
        assert self.cache is not None
        if shard not in self._cached:
            entry = self.manifest.shards[shard]
            self._cached[shard] = CachedFile(
                self.cache, Wanted(self.storage, entry.name, entry.num_bytes, entry.sha256)
            )
        return self._cached[shard]

    def _wanted_index(self, shard: int) -> Wanted:
        entry = self.manifest.shards[shard]
        return Wanted(self.storage, f"{entry.name}.idx", None, entry.index_sha256)

    def _reader(self, shard: int) -> ShardReader:
        with self._index_locks[shard % len(self._index_locks)]:  # no index is loaded by two threads
            with self._lock:
                if shard in self._readers:
                    self._readers.move_to_end(shard)
                    return self._readers[shard]
            index = self._load_index(shard)
            with self._lock:
                return self._keep(shard, index)

    def _keep(self, shard: int, index: ShardIndex) -> ShardReader:
        """Make a reader and keep it. Under the lock."""
        while len(self._readers) >= self.keep_open:
            _, oldest = self._readers.popitem(last=False)
            if self.cache is None:  # else it is the plan that says when a shard is done with
                oldest.close()
        name = self.manifest.shards[shard].name
        source = self.storage.open(name) if self.cache is None else self._cached_file(shard)
        self._readers[shard] = ShardReader(source, index)
        return self._readers[shard]

    def _load_index(self, shard: int) -> ShardIndex:
        entry = self.manifest.shards[shard]
        wanted = self._wanted_index(shard)
        name = f"{self.storage.location}/{wanted.name}"
        pinned = self.cache.pin(wanted) if self.cache is not None else None
        if pinned is None:
            index = read_shard_index(self.storage, entry.name, entry.index_sha256)
        else:
            index = check_shard_index(pinned.read(), name, entry.index_sha256)
        if len(index) != entry.samples:
            raise UserError(
                f"{name}: holds {len(index)} samples, the manifest says {entry.samples}: pack again"
            )
        return index

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


def _rotated(shards: list[int], share: int) -> list[int]:
    start = int(share * GOLDEN_SECTION % 1 * len(shards))  # spreads any run of numbers evenly
    return shards[start:] + shards[:start]


def _allow_open_files(count: int) -> None:
    """Raise this process's own limit when `count` more files would come near it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 512
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


class SampleLengths:
    """About how many tokens each sample has, from the index alone: nothing is decoded.

    Visual tokens are exact, or the `limit` to which a sample's pictures are shrunk; text is estimated.
    """

    def __init__(
        self, shards: Shards, visual_tokens: Callable[[int, int], int], limit: int | None = None
    ) -> None:
        self.shards, self.visual_tokens, self.limit = shards, visual_tokens, limit
        self._by_shard: OrderedDict[int, Int64] = OrderedDict()

    def of(self, shards: Int64, samples: Int64) -> Int64:
        """Return the (n, 2) visual and text tokens of samples; those of a dummy where the shard is -1."""
        lengths = _dummies(len(shards))
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
            return _dummies(self.shards.manifest.shards[shard].samples)
        return estimated_tokens(index, self.visual_tokens, self.limit)


def _dummies(count: int) -> Int64:
    """Return the (count, 2) tokens of dummies: a picture of one visual token, so that a budget counts it."""
    return np.tile(np.array([1, 0], np.int64), (count, 1))


@dataclass(frozen=True)
class PlannedSample:
    """What the plan put into one slot of a micro-batch: bytes, a sample that could not be read, or nothing."""

    slot: Slot
    shard: str = ""
    raw: RawSample | None = None
    bad: BadSampleRecord | None = None


class PlannedSource(IterableDataset):
    """Samples of one rank in planned order, those of a micro-batch after one another.

    Worker w of W yields the micro-batches w, w + W, ... of this rank. DataLoader takes from its workers in turn, so the
    order that arrives does not depend on W. With `lengths` the samples of each global batch are dealt by length, and
    with a `budget` so that no micro-batch holds more visual tokens than that; else each holds `micro_batch_size`.
    """

    BLOCK = 1024  # positions that are looked up at once

    def __init__(
        self,
        shards: Shards,
        plan: Plan,
        layout: StepLayout,
        rank: int,
        start: int,
        steps: int,
        lengths: SampleLengths | None = None,
        budget: int | None = None,
    ) -> None:
        assert budget is None or lengths is not None, "a budget needs lengths"
        self.shards, self.plan, self.layout, self.rank = shards, plan, layout, rank
        self.start, self.steps, self.lengths, self.budget = start, steps, lengths, budget

    def __iter__(self) -> Iterator[PlannedSample]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        numbers = np.arange(first, self.steps * self.layout.grad_accum_steps, stride)
        slots = self._slots(numbers, share=self.rank * stride + first)
        try:
            yield from _ahead(self._read, slots) if self.shards.is_remote else map(self._read, slots)
        finally:
            self.shards.release()

    def _slots(self, numbers: Int64, share: int) -> Iterator[Slot]:
        """Yield what these micro-batches of this rank hold, and tell the shards where the plan is."""
        layout = self.layout
        # Where slots are dealt over a whole step, each of its micro-batches looks all of them up.
        per_number = layout.global_batch_size if self.lengths else layout.micro_batch_size
        block = max(1, self.BLOCK // per_number)
        for begin in range(0, len(numbers), block):
            some = numbers[begin : begin + block]
            dealt = self._budgeted(some) if self.budget else [(row, None) for row in self._positions(some)]
            positions = np.concatenate([row for row, _ in dealt])
            found = zip(*(column.tolist() for column in self.plan.find(positions)), strict=True)
            for number, (row, limit) in zip(some.tolist(), dealt, strict=True):
                step_begins = self.start + number // layout.grad_accum_steps * layout.global_batch_size
                self.shards.expect(self.plan, step_begins, share)
                for position, (shard, sample) in zip(row.tolist(), islice(found, len(row)), strict=True):
                    yield Slot(number, position, Place(shard, sample) if shard >= 0 else None, limit)

    def _budgeted(self, numbers: Int64) -> list[tuple[Int64, int | None]]:
        """Return the positions of this rank's micro-batches of these numbers, and how large a sample may be there."""
        assert self.lengths is not None and self.budget is not None
        layout, size = self.layout, self.layout.global_batch_size
        deals: dict[int, tuple[Int64, Deal]] = {}
        dealt = []
        for number in numbers.tolist():
            step, accumulation = divmod(number, layout.grad_accum_steps)
            if step not in deals:
                positions = self.start + step * size + np.arange(size)
                visual, text = self.lengths.of(*self.plan.find(positions)).T
                micro_batches = size // layout.micro_batch_size
                deals[step] = positions, deal_by_budget(visual, text, micro_batches, self.budget)
            positions, deal = deals[step]
            dealt.append(
                (positions[deal.micro_batches[layout.micro_batch(self.rank, accumulation)]], deal.limit)
            )
        return dealt

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
        lengths = self.lengths.of(*self.plan.find(positions.reshape(-1))).sum(axis=1).reshape(positions.shape)
        row = row.reshape(-1, 1)
        return positions[row, deal_by_length(lengths)[row, slots]]

    def _read(self, slot: Slot) -> PlannedSample:
        if slot.place is None:
            return PlannedSample(slot)
        shard = self.shards.manifest.shards[slot.place.shard].name
        try:
            return PlannedSample(slot, shard, raw=self.shards.read(slot.place))
        except BadSample as error:
            return PlannedSample(slot, shard, bad=BadSampleRecord(error.shard, error.key, error.reason))


def _ahead(read: Callable[[Slot], PlannedSample], slots: Iterable[Slot]) -> Iterator[PlannedSample]:
    """Yield what `read` gives for each slot, in order, some of it already asked for meanwhile."""
    pool = ThreadPool(READ_AHEAD)
    waiting: deque[AsyncResult] = deque()
    try:
        for slot in slots:
            waiting.append(pool.apply_async(read, (slot,)))
            if len(waiting) > READ_AHEAD:
                yield waiting.popleft().get()
        while waiting:
            yield waiting.popleft().get()
    finally:
        pool.close()
