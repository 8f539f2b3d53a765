"""Several data sets in one run, as a pure function of the position. No I/O, no torch.

An epoch of the run takes c_s samples of source s, the same in each epoch: the recipe says how many passes that are, or
its share of the epoch. The k-th of them stands at the time (k + 1/2) / c_s of the epoch, and the epoch is all sources
merged by that time: each is spread evenly from the first step to the last. Of equal times the source with the earlier
name comes first.

Each source has a plan of its own, with a key from (seed, name). Its samples of epoch e are positions e * c_s to
(e + 1) * c_s of that plan, so passes go on from one epoch of the run to the next, and each pass names every sample
once. Which position of the run is which of a source's is found by counting, in whole numbers, how many samples of each
stand before it; nothing of an epoch is stored, and any position can be the first.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qwenvl_dist.data.plan import Int64, Place, Plan, RunPlan, SourceProgress, hash_key
from qwenvl_dist.errors import UserError

if TYPE_CHECKING:
    from qwenvl_dist.config import DataConfig

MOST_SAMPLES = 1 << 30  # of one source in an epoch
TIME_BITS = 31  # of an epoch's finest time; with them a product of counts and times fits into 63 bits


@dataclass(frozen=True)
class Source:
    """One data set of a mixture."""

    name: str
    shard_sizes: Int64
    samples_per_epoch: int  # of the run, at least 1


class Interleave:
    """The order in which an epoch takes `counts[s]` samples of each source s.

    Any stretch from the start of the epoch holds its share of source s, w = counts[s] / total of the stretch, to within
    1/2 + w (S - 2) / 2 samples with S sources: half a sample of two, less than one of three.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        assert all(0 < count <= MOST_SAMPLES for count in counts), counts
        self.counts = np.array(counts, np.int64)
        self.total = int(self.counts.sum())
        # The epoch in 2^bits cells: at most one sample of each source in one, and seldom two of different ones.
        self._bits = min(TIME_BITS, (64 * self.total - 1).bit_length())

    def _started(self, cells: Int64) -> Int64:
        """Return how many samples of each source have a time before these cells begin: (sources, n)."""
        half_a_sample = 1 << self._bits  # in units of 1 / 2^(bits + 1)
        return (2 * self.counts[:, None] * cells + half_a_sample - 1) >> (self._bits + 1)

    def _cells(self, offsets: Int64) -> tuple[Int64, Int64, Int64]:
        """Find the cell of each place of the epoch.

        Returns the samples of each source before the cell (sources, n), the turn of its sample in the cell (sources, n)
        or -1 where it has none there, and how many samples of the cell stand before the place (n,).
        """
        size, sources = 1 << self._bits, len(self.counts)
        middle, margin = offsets * (size / self.total), (sources / 2 + 1) * size / self.total + 2
        low = np.clip(middle - margin, 0, size).astype(np.int64)
        high = np.clip(middle + margin, 0, size).astype(np.int64)
        while (low < high).any():  # the last cell with no more samples before it than the place has
            half = (low + high + 1) // 2
            fits = self._started(half).sum(axis=0) <= offsets
            low, high = np.where(fits, half, low), np.where(fits, high, half - 1)
        before = self._started(low)
        is_here = self._started(low + 1) > before
        turns = np.where(is_here, 0, -1)
        shared = np.flatnonzero(is_here.sum(axis=0) > 1)
        if shared.size:  # by their exact times (2k + 1) / (2 count), cross-multiplied; then by source
            here, odd = is_here[:, shared], 2 * before[:, shared] + 1
            for source in range(sources):
                own, others = odd[source] * self.counts[:, None], odd * self.counts[source]
                earlier = others < own
                earlier[:source] |= others[:source] == own[:source]
                turns[source, shared] = np.where(here[source], (earlier & here).sum(axis=0), -1)
        return before, turns, offsets - before.sum(axis=0)

    def before(self, offsets: Int64) -> Int64:
        """Return how many samples of each source stand before these places of the epoch: (sources, n)."""
        before, turns, passed = self._cells(offsets)
        return before + ((turns >= 0) & (turns < passed))

    def locate(self, offsets: Int64) -> tuple[Int64, Int64]:
        """Return (source, number inside it) of each place of the epoch."""
        before, turns, passed = self._cells(offsets)
        sources = (turns == passed).argmax(axis=0)
        return sources, before[sources, np.arange(len(offsets))]


class MixturePlan:
    """All positions of a run of `epochs` epochs over several data sets.

    Shards are numbered through, those of the first source first.
    """

    def __init__(self, sources: Sequence[Source], *, seed: int, window: int, epochs: int = 1) -> None:
        self.sources = list(sources)
        self._interleave = Interleave([source.samples_per_epoch for source in sources])
        self.samples_per_epoch = self._interleave.total
        self.total_samples = self.samples_per_epoch * epochs
        sizes = [int(np.sum(source.shard_sizes)) for source in sources]
        self._plans = [
            RunPlan(
                source.shard_sizes,
                seed=source_seed(seed, source.name),
                window=window,
                epochs=-(-source.samples_per_epoch * epochs // size),
            )
            for source, size in zip(sources, sizes, strict=True)
        ]
        shards = [len(source.shard_sizes) for source in sources]
        self._first_shards = (np.cumsum(shards) - shards).tolist()

    def find(self, positions: Int64) -> tuple[Int64, Int64]:
        """Return (shard, sample inside the shard) of each position; -1, -1 where the run has ended."""
        shards, samples = np.full((2, len(positions)), -1, np.int64)
        inside = np.flatnonzero(positions < self.total_samples)
        epochs, offsets = np.divmod(positions[inside], self.samples_per_epoch)
        sources, numbers = self._interleave.locate(offsets)
        own = epochs * self._interleave.counts[sources] + numbers
        for source in np.unique(sources).tolist():
            here = sources == source
            found, samples[inside[here]] = self._plans[source].find(own[here])
            shards[inside[here]] = found + self._first_shards[source]
        return shards, samples

    def own_positions(self, position: int) -> list[int]:
        """Return how many samples of each source stand before a position of the run."""
        epoch, offset = divmod(position, self.samples_per_epoch)
        before = self._interleave.before(np.array([offset]))[:, 0]
        return (epoch * self._interleave.counts + before).tolist()

    def parts_at(self, position: int) -> list[tuple[RunPlan, int]]:
        """Return each source's plan and its own position when the run is at `position`."""
        return list(zip(self._plans, self.own_positions(position), strict=True))

    def draw(self, position: int, place: Place, count: int) -> int:
        """Return which of `count` alternatives the sample at `place` takes: by the passes of its own data set."""
        source = bisect.bisect_right(self._first_shards, place.shard) - 1
        own = Place(place.shard - self._first_shards[source], place.sample)
        return self._plans[source].draw(self.own_positions(position)[source], own, count)

    def progress(self, position: int) -> dict[str, SourceProgress]:
        """Return by name how far each source is when the run is at `position`."""
        return {
            source.name: SourceProgress(own, own / plan.samples_per_epoch)
            for source, (plan, own) in zip(self.sources, self.parts_at(position), strict=True)
        }


def source_seed(seed: int, name: str) -> int:
    """Return the key of a source's own plan: it does not depend on which others there are."""
    return hash_key(seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


def samples_per_epoch(data: DataConfig, samples: Sequence[int]) -> list[int]:
    """Return how many samples of each training set an epoch of the run takes.

    By `epochs` so many passes; by `weight` its share of as many samples as all sets hold together. Raises UserError
    where a set is empty, or too small or too large a part of an epoch.
    """
    sets = data.training_sets
    for each, held in zip(sets, samples, strict=True):
        if not held:
            raise UserError(f"{each}: holds no samples; pack some first")
    if not data.mixture:
        return list(samples)
    weights = sum(each.weight or 0 for each in sets)
    counts = []
    for each, held in zip(sets, samples, strict=True):
        if each.weight is None:
            assert each.epochs is not None, "the recipe demands one of the two"
            said, exact = f"epochs = {each.epochs:g} of {held} samples", each.epochs * held
        else:
            said, exact = f"weight = {each.weight:g} of {weights:g}", each.weight / weights * sum(samples)
        count = math.floor(exact + 0.5)
        if not 0 < count <= MOST_SAMPLES:
            rule = "less than one sample" if count < 1 else f"more than {MOST_SAMPLES:,} samples"
            raise UserError(
                f"{each.key}: {said} is {rule} in an epoch; {'raise' if count < 1 else 'lower'} it, or drop the entry"
            )
        counts.append(count)
    return counts


def make_plan(data: DataConfig, shard_sizes: Sequence[Int64], counts: Sequence[int], epochs: int = 1) -> Plan:
    """Return the plan of the recipe's training sets, of which an epoch takes `counts` samples each.

    A set that stands alone keeps the order that `data.seed` alone gives.
    """
    if not data.mixture:
        return RunPlan(shard_sizes[0], seed=data.seed, window=data.shuffle_window, epochs=epochs)
    sources = [
        Source(each.name, sizes, count)
        for each, sizes, count in zip(data.training_sets, shard_sizes, counts, strict=True)
    ]
    return MixturePlan(sources, seed=data.seed, window=data.shuffle_window, epochs=epochs)
