"""How well one epoch is mixed: our plan, webdataset's `shuffle(1000)` and a full permutation.

    python benchmarks/shuffle_quality.py [--shards 1024] [--samples-per-shard 1000] [--svg FILE]

webdataset's own filter runs on a simulated stream: shards in random order, their samples one after another, as one
loader worker reads them. Prints a table; the picture shows for the first samples of the epoch which shard (in the
order in which shards are read) each comes from.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from webdataset import filters

from qwenvl_dist.data.plan import EpochOrder

Int64 = NDArray[np.int64]
MICRO_BATCH = 4
GLOBAL_BATCH = 256


def plan(shards: int, per_shard: int, window: int) -> Int64:
    """Return the epoch as numbers of samples in the data set."""
    order = EpochOrder([per_shard] * shards, seed=0, epoch=0, window=window)
    shard, sample = order.locate(np.arange(shards * per_shard))
    return shard * per_shard + sample


def webdataset_shuffle(shards: int, per_shard: int, buffer: int) -> Int64:
    """Return the epoch of `WebDataset(..., shardshuffle=True).shuffle(buffer)` in one worker."""
    generator = random.Random(0)
    names = list(range(shards))
    generator.shuffle(names)
    stream = (name * per_shard + sample for name in names for sample in range(per_shard))
    shuffled = filters.shuffle(buffer, rng=generator)(stream)
    return np.fromiter(shuffled, np.int64, shards * per_shard)


def distinct(epoch: Int64, per_shard: int, size: int) -> float:
    """Return how many different shards a batch of `size` has, on average."""
    batches = np.sort(epoch[: len(epoch) // size * size].reshape(-1, size) // per_shard, axis=1)
    return float((np.diff(batches, axis=1) > 0).sum(axis=1).mean() + 1)


def spread(epoch: Int64, per_shard: int) -> float:
    """Return how far a shard's samples lie apart in the epoch, relative to a full permutation's.

    The standard deviation of their positions, averaged over shards, divided by that of a uniform draw: 1 is perfect,
    0 means that each shard is read in one piece.
    """
    position = np.empty(len(epoch))
    position[epoch] = np.arange(len(epoch)) / len(epoch)
    return float(position.reshape(-1, per_shard).std(axis=1).mean() * np.sqrt(12))


def neighbours(epoch: Int64, per_shard: int) -> float:
    """Return the rank correlation, inside shards, of a sample's place in its shard with its place in the epoch.

    0: nothing is left of the order in which a shard was packed; 1: the shard comes in that very order.
    """
    position = np.empty(len(epoch), np.int64)
    position[epoch] = np.arange(len(epoch))
    ranks = position.reshape(-1, per_shard).argsort(axis=1).argsort(axis=1)
    packed = np.arange(per_shard)
    return float(np.mean([np.corrcoef(packed, row)[0, 1] for row in ranks]))


def whole(epoch: Int64) -> float:
    """Return the rank correlation of the place in the data set with the place in the epoch."""
    return float(np.corrcoef(np.arange(len(epoch)), epoch)[0, 1])


def picture(epochs: dict[str, Int64], per_shard: int, shown: int = 500) -> str:
    """Return an SVG: one panel an order, position across, shard (in reading order) up."""
    wide, high, gap = 300, 160, 20
    panels = []
    for number, (name, epoch) in enumerate(epochs.items()):
        first_seen = np.unique(epoch // per_shard, return_index=True)
        rank = np.empty(len(first_seen[0]), np.int64)
        rank[np.argsort(first_seen[1])] = np.arange(len(first_seen[0]))
        reach = min(len(rank), 128)
        step = max(1, len(epoch) // shown // 8)  # an eighth of the epoch
        at = np.arange(0, len(epoch) // 8, step)
        places = rank[epoch[at] // per_shard]
        dots = "".join(
            f'<circle cx="{a * wide * 8 / len(epoch):.1f}" cy="{high - p * high / reach:.1f}" r="0.8"/>'
            for a, p in zip(at.tolist(), places.tolist(), strict=True)
            if p < reach
        )
        left, top = gap + number % 2 * (wide + gap), 2 * gap + number // 2 * (high + 2 * gap)
        panels.append(
            f'<g transform="translate({left},{top})"><text y="-5">{name}</text>'
            f'<rect width="{wide}" height="{high}" fill="none" stroke="#999"/>{dots}</g>'
        )
    rows = -(-len(epochs) // 2)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12" fill="#235" '
        f'width="{2 * wide + 3 * gap}" height="{rows * (high + 2 * gap) + gap}">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(panels)}</svg>\n'
    )


def main() -> None:
    """Print the table, and write the picture when asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shards", type=int, default=1024)
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    parser.add_argument("--svg", type=Path)
    args = parser.parse_args()
    shards, per_shard = args.shards, args.samples_per_shard
    epochs = {
        "plan, window 8": plan(shards, per_shard, 8),
        "plan, window 64": plan(shards, per_shard, 64),
        "webdataset shuffle(1000)": webdataset_shuffle(shards, per_shard, 1000),
        "full permutation": np.random.default_rng(0).permutation(shards * per_shard),
    }
    sizes = f"shards in {MICRO_BATCH} | shards in {GLOBAL_BATCH}"
    print(f"| order | {sizes} | spread | order left in a shard | in the epoch |")
    print("|---|---|---|---|---|---|")
    for name, epoch in epochs.items():
        assert np.array_equal(np.sort(epoch), np.arange(len(epoch))), f"{name}: not every sample once"
        few, many = distinct(epoch, per_shard, MICRO_BATCH), distinct(epoch, per_shard, GLOBAL_BATCH)
        apart, packed = spread(epoch, per_shard), neighbours(epoch, per_shard)
        print(f"| {name} | {few:.2f} | {many:.1f} | {apart:.3f} | {packed:+.3f} | {whole(epoch):+.3f} |")
    if args.svg:
        args.svg.write_text(picture(epochs, per_shard), encoding="utf-8")


if __name__ == "__main__":
    main()
