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

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qwenvl_dist.data.plan import Int64, Plan, RunPlan, SourceProgress, hash_key
from qwenvl_dist.errors import UserError

if TYPE_CHECKING:
    from qwenvl_dist.config import DataConfig

MOST_SAMPLES = 1 << 30  # of one source in an epoch: the product of two must fit into 62 bits


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

    def ranks(self, source: int, numbers: Int64) -> Int64:
        """Return where in the epoch the samples of these numbers of one source stand."""
        count = int(self.counts[source])
        found = numbers.copy()
        for other, others in enumerate(self.counts.tolist()):
            if other == source:
                continue
            # j of the other stands before k where (2j + 1) / (2 others) < (2k + 1) / (2 count), or is equal and its
            # source the earlier one.
            twice = (2 * numbers + 1) * others - count
            if other < source:
                found += twice // (2 * count) + 1
            else:
                found += -(-twice // (2 * count))
        return found

    def before(self, offsets: Int64) -> Int64:
        """Return how many samples of each source stand before these places of the epoch: (sources, n)."""
        found = np.empty((len(self.counts), len(offsets)), np.int64)
        margin = len(self.counts) // 2 + 2  # the bound of the class, and what a float may be off
        for source, count in enumerate(self.counts.tolist()):
            share = (offsets * (count / self.total)).astype(np.int64)
            low, high = np.clip(share - margin, 0, count), np.clip(share + margin, 0, count)
            while (low < high).any():  # the first number that does not stand before
                middle = (low + high) // 2
                earlier = (self.ranks(source, middle) < offsets) & (low < high)
                low, high = (
                    np.where(earlier, middle + 1, low),
                    np.where(earlier, high, np.minimum(middle, high)),
                )
            found[source] = low
        return found

    def locate(self, offsets: Int64) -> tuple[Int64, Int64]:
        """Return (source, number inside it) of each place of the epoch."""
        before = self.before(offsets)
        sources = np.full(len(offsets), -1, np.int64)
        for source, count in enumerate(self.counts.tolist()):
            here = (before[source] < count) & (self.ranks(source, before[source]) == offsets)
            sources[here] = source
        assert (sources >= 0).all(), "a place of the epoch has a sample"
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
