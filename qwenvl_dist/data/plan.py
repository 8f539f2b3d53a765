"""The order of a run as a pure function: (seed, epoch, position) -> (shard, sample). No I/O, no torch.

A run is one line of positions: position p belongs to epoch p // N and is the (p % N)-th sample of that epoch, where N
is the size of the data set. An optimizer step takes the next G = world x micro batch x accumulation positions. Ranks
and workers are only a view on that line, so changing their number changes nothing about which sample comes when.

An epoch's order: shards are sorted by a hash of (seed, epoch, shard), cut into windows of `shuffle_window` shards, and
the samples of a window are permuted by a keyed bijection. Everything is computed from the position alone, so that
resuming in the middle costs as much as starting. The arithmetic is written down here and pinned by golden values in
the tests; no library's random generator takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

PLAN_VERSION = 1  # raise it when an order changes: checkpoints carry it

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]
Number = TypeVar("Number", int, Int64)

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_SHARD_STREAM, _WINDOW_STREAM, _DRAW_STREAM = 1, 2, 3
_FEISTEL_ROUNDS = 6


def _mix(values: UInt64) -> UInt64:
    """Scramble 64-bit words: the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014, figure 16)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_key(*parts: int) -> int:
    """Fold integers into one 64-bit key; order matters."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = _mix(key + np.uint64((part * _GOLDEN + _GOLDEN) & _MASK))
    return int(key[0])


def permute(offsets: Int64, sizes: Int64, keys: UInt64) -> Int64:
    """Map each offset in [0, size) to another by the bijection that `key` selects.

    A balanced Feistel network over the next even power of two, walked until the value falls inside [0, size)
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). Arrays have equal length.
    """
    bits = np.zeros(len(sizes), np.uint64)
    remaining = np.maximum(sizes - 1, 0).astype(np.uint64)
    while remaining.any():
        bits += (remaining > 0).astype(np.uint64)
        remaining >>= np.uint64(1)
    half = np.maximum((bits + np.uint64(1)) >> np.uint64(1), np.uint64(1))
    low_mask = (np.uint64(1) << half) - np.uint64(1)

    result = offsets.astype(np.uint64)
    walking = np.flatnonzero(sizes > 1)
    while walking.size:
        h, mask, key = half[walking], low_mask[walking], keys[walking]
        left, right = result[walking] >> h, result[walking] & mask
        for round_number in range(_FEISTEL_ROUNDS):
            tweak = np.uint64((round_number * _GOLDEN) & _MASK)
            left, right = right, left ^ (_mix(right + key + tweak) & mask)
        value = (left << h) | right
        result[walking] = value
        walking = walking[value >= sizes[walking].astype(np.uint64)]
    return result.astype(np.int64)


class EpochOrder:
    """The order of one epoch over shards of the given sizes."""

    def __init__(
        self, shard_sizes: Sequence[int] | Int64, seed: int, epoch: int, window: int, shuffle: bool = True
    ):
        sizes = np.asarray(shard_sizes, np.int64)
        shards = np.arange(len(sizes), dtype=np.int64)
        if shuffle:
            start = np.uint64(hash_key(seed, epoch, _SHARD_STREAM))
            hashes = _mix(start + (shards.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))
            shards = np.argsort(hashes, kind="stable").astype(np.int64)
        self._shuffle, self._window = shuffle, window
        self._shards = shards
        self._shard_ends = np.cumsum(sizes[shards])
        self._shard_starts = self._shard_ends - sizes[shards]
        first = np.arange(0, len(sizes), window)
        self._window_starts = self._shard_starts[first]
        self._window_ends = self._shard_ends[np.minimum(first + window, len(sizes)) - 1]
        self._window_key = np.uint64(hash_key(seed, epoch, _WINDOW_STREAM))

    def locate(self, offsets: Int64) -> tuple[Int64, Int64]:
        """Return (shard, sample inside the shard) for each offset into the epoch."""
        places = offsets
        if self._shuffle:
            window = np.searchsorted(self._window_ends, offsets, side="right")
            starts = self._window_starts[window]
            keys = _mix(self._window_key + (window.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))
            places = starts + permute(offsets - starts, self._window_ends[window] - starts, keys)
        index = np.searchsorted(self._shard_ends, places, side="right")
        return self._shards[index], places - self._shard_starts[index]

    def window_of(self, offset: int) -> int:
        """Return the number of the window that an offset into the epoch lies in."""
        return int(np.searchsorted(self._window_ends, offset, side="right"))

    def window_shards(self, window: int) -> Int64:
        """Return the shards of a window, none for one past the last."""
        return self._shards[window * self._window : (window + 1) * self._window]


def first_samples(shard_sizes: Sequence[int] | Int64, limit: int | None) -> Int64:
    """Return the sizes of shards of which only the first `limit` samples over all are looked at; None for all."""
    sizes = np.asarray(shard_sizes, np.int64)
    return sizes if limit is None else np.clip(limit - (np.cumsum(sizes) - sizes), 0, sizes)


@dataclass(frozen=True)
class Place:
    """Where the sample of one position lies."""

    shard: int  # index into the manifest's shards
    sample: int  # index into the shard


@dataclass(frozen=True)
class SourceProgress:
    """How far a run is in one data set of a mixture."""

    samples: int  # of its own, consumed over all passes
    passes: float


class Plan(Protocol):
    """The line of positions of a run, over one data set (`RunPlan`) or several (`mixture.MixturePlan`)."""

    samples_per_epoch: int
    total_samples: int

    def find(self, positions: Int64) -> tuple[Int64, Int64]:
        """Return (shard, sample inside the shard) of each position; -1, -1 where the run has ended."""
        ...

    def parts_at(self, position: int) -> list[tuple[RunPlan, int]]:
        """Return the plan of each data set, and its own position when the run is at `position`."""
        ...

    def draw(self, position: int, place: Place, count: int) -> int:
        """Return which of `count` alternatives the sample at `place` takes at this position."""
        ...

    def progress(self, position: int) -> dict[str, SourceProgress]:
        """Return by name how far each data set of a mixture is when the run is at `position`; {} without one."""
        ...


class RunPlan:
    """All positions of a run of `epochs` passes over the data set."""

    def __init__(
        self,
        shard_sizes: Sequence[int] | Int64,
        *,
        seed: int,
        window: int,
        epochs: int = 1,
        shuffle: bool = True,
    ) -> None:
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._seed, self._window, self._shuffle = seed, window, shuffle
        self.samples_per_epoch = int(self._sizes.sum())
        self.total_samples = self.samples_per_epoch * epochs
        self._orders: dict[int, EpochOrder] = {}

    def order(self, epoch: int) -> EpochOrder:
        """Return the order of an epoch; those of the last two asked for are kept."""
        if epoch not in self._orders:
            while len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = EpochOrder(self._sizes, self._seed, epoch, self._window, self._shuffle)
        return self._orders[epoch]

    def find(self, positions: Int64) -> tuple[Int64, Int64]:
        """Return (shard, sample inside the shard) of each position; -1, -1 where the run has ended."""
        shards, samples = np.full((2, len(positions)), -1, np.int64)
        inside = np.flatnonzero(positions < self.total_samples)
        epochs, offsets = np.divmod(positions[inside], max(1, self.samples_per_epoch))
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            shards[inside[here]], samples[inside[here]] = self.order(epoch).locate(offsets[here])
        return shards, samples

    def locate(self, start: int, count: int) -> list[Place | None]:
        """Return the places of positions start .. start + count - 1; None where the run has ended."""
        pairs = zip(*self.find(np.arange(start, start + count, dtype=np.int64)), strict=True)
        return [Place(int(shard), int(sample)) if shard >= 0 else None for shard, sample in pairs]

    def draw(self, position: int, place: Place, count: int) -> int:
        """Return which of `count` alternatives the sample at `place` takes at this position.

        Over the epochs each comes once before any comes again, in an order of the sample's own.
        """
        cycle, turn = divmod(position // self.samples_per_epoch, count)
        key = hash_key(self._seed, _DRAW_STREAM, place.shard, place.sample, cycle)
        return int(permute(np.array([turn]), np.array([count]), np.array([key], np.uint64))[0])

    def parts_at(self, position: int) -> list[tuple[RunPlan, int]]:
        """Return this plan and the position: there is no other data set."""
        return [(self, position)]

    def progress(self, position: int) -> dict[str, SourceProgress]:
        """Return nothing: it is no mixture, and the run's own epoch says it all."""
        return {}

    def window(self, position: int) -> tuple[int, int]:
        """Return (epoch, window) of a position."""
        epoch, offset = divmod(position, self.samples_per_epoch)
        return epoch, self.order(epoch).window_of(offset)

    def shards_ahead(self, epoch: int, window: int) -> tuple[list[int], list[int]]:
        """Return the shards of a window and those of the next one, which may be the next epoch's first."""
        now, then = (self.order(epoch).window_shards(number).tolist() for number in (window, window + 1))
        if not then and (epoch + 1) * self.samples_per_epoch < self.total_samples:
            then = self.order(epoch + 1).window_shards(0).tolist()
        return now, then


def deal_by_length(lengths: Int64) -> Int64:
    """Return in which order the slots of each global batch are dealt, shortest first.

    Micro-batches of alike samples need less padding, and ranks that are at the same accumulation step get neighbours.
    Which samples a step takes is untouched, hence its gradient too. (steps, G) -> (steps, G), a permutation per row.
    """
    return np.argsort(lengths, axis=1, kind="stable")


@dataclass(frozen=True)
class Deal:
    """Which of a global batch's slots each of its micro-batches gets."""

    micro_batches: list[Int64]  # indices into the global batch, each once
    limit: int | None  # visual tokens a sample; None where no picture has to shrink


def deal_by_budget(visual: Int64, text: Int64, micro_batches: int, budget: int) -> Deal:
    """Deal a global batch to micro-batches of at most `budget` visual tokens, which take about the same time.

    Samples of like length stay together, so a micro-batch holds few long ones or many short ones; of all such deals
    that keep the budget, the one whose largest micro-batch, padding included, is smallest. Where none does, pictures of
    the step must shrink to the largest number of tokens a sample with which one is found.

    Args:
        visual: (G,) visual tokens of each sample.
        text: (G,) its other tokens.
        micro_batches: how many there are, G at most.
        budget: visual tokens of one micro-batch, at least G / micro_batches.
    """

    def fill(limit: int | None, area: int | None = None) -> list[Int64] | None:
        """Fill micro-batches from the longest sample on; None when there are not enough of them."""
        tokens = visual if limit is None else np.minimum(visual, limit)
        lengths = tokens + text
        order = np.argsort(-lengths, kind="stable")
        dealt, start = [], 0
        for left in range(micro_batches, 0, -1):
            end = len(order) - (left - 1)  # one for each that follows
            if area is not None:
                end = min(end, start + max(1, area // max(1, int(lengths[order[start]]))))
            held = np.cumsum(tokens[order[start:end]])
            end = start + int(np.searchsorted(held, budget, side="right"))
            if end == start:  # one sample alone is above the budget
                return None
            dealt.append(order[start:end])
            start = end
        return dealt if start == len(order) else None

    limit = None
    if fill(None) is None:
        most = int(visual.max())
        equal = budget * micro_batches // len(visual)  # with so few tokens each, equal counts fit
        limit = most - _first(lambda less: fill(most - less) is not None, 0, most - equal)
    largest = max(1, int((visual + text).max())) * len(visual)
    area = _first(lambda area: fill(limit, area) is not None, 1, largest)
    dealt = fill(limit, area)
    assert dealt is not None, "what fits without a bound fits the largest"
    return Deal(dealt[::-1], limit)  # shortest first, as `deal_by_length` has it


def _first(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Return the smallest number in [low, high] from which on `holds` is true; it is true for `high`."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def positions_digest(positions: Sequence[int] | range) -> int:
    """Return a sum over positions that tells one set from another, whatever their order; parts may be added up."""
    mixed = _mix(np.asarray(positions, np.int64).astype(np.uint64) + np.uint64(_GOLDEN))
    return int((mixed >> np.uint64(32)).sum(dtype=np.uint64))


@dataclass(frozen=True)
class StepLayout:
    """How the positions of one optimizer step are dealt to ranks and micro-batches.

    Micro-batch j of a step, j = accumulation index x world size + rank, holds positions j*B .. (j+1)*B - 1 of it. One
    rank with accumulation 4 and four ranks with accumulation 1 therefore run the very same micro-batches.
    """

    world_size: int
    micro_batch_size: int
    grad_accum_steps: int

    @property
    def global_batch_size(self) -> int:
        """Samples that one optimizer step consumes, over all ranks."""
        return self.world_size * self.micro_batch_size * self.grad_accum_steps

    def micro_batch(self, rank: int, accumulation: Number) -> Number:
        """Return the number of this micro-batch inside its step, over all ranks."""
        return accumulation * self.world_size + rank

    def steps(self, samples: int) -> int:
        """Return how many steps consume `samples` positions, the last one possibly with dummies."""
        return -(-max(samples, 0) // self.global_batch_size)
