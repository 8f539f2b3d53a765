"""A small packed data set for the tests of remote places, and what a pass over it gives."""

from pathlib import Path

from made_coco import make_coco

from qwenvl_dist.data.cache import ShardCache
from qwenvl_dist.data.formats import read_coco_captions
from qwenvl_dist.data.pack import pack
from qwenvl_dist.data.plan import RunPlan, StepLayout
from qwenvl_dist.data.source import PlannedSample, PlannedSource, ShardSet
from qwenvl_dist.data.storage import ReadPolicy, open_storage

SHARDS = ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar", "shard-000003.tar"]
KEYS = [f"{i:012d}" for i in range(1, 12)]
HIT = SHARDS[1]  # of KEYS[3:6]
HURRIED = ReadPolicy(timeout_seconds=0.4, retries=2)


def pack_small(folder: Path) -> Path:
    """Pack eleven pictures into shards of 3, 3, 3 and 2."""
    coco = make_coco(folder / "coco", 11)
    pack(read_coco_captions(coco.captions, coco.images), folder / "shards", samples_per_shard=3)
    return folder / "shards"


def open_cache(folder: Path, max_bytes: int = 1 << 30) -> ShardCache:
    """Return a cache of so many bytes below a folder."""
    cache = ShardCache(folder / "cache", max_bytes)
    cache.prepare()
    return cache


def open_set(place: str | Path, cache: ShardCache | None = None) -> ShardSet:
    """Open a data set that is read without much patience."""
    return ShardSet(open_storage(place, HURRIED), cache)


def read_through(shards: ShardSet, *, window: int = 2, epochs: int = 1) -> list[PlannedSample]:
    """Read all samples in the order of a plan."""
    plan = RunPlan(shards.manifest.shard_sizes, seed=3, window=window, epochs=epochs)
    layout = StepLayout(1, 2, 1)
    steps = layout.steps(plan.total_samples)
    return [s for s in PlannedSource(shards, plan, layout, rank=0, start=0, steps=steps) if s.raw or s.bad]


def keys(samples: list[PlannedSample]) -> list[str]:
    """Return the key in each slot, read or not."""
    return [sample.raw.key if sample.raw else sample.bad.key if sample.bad else "" for sample in samples]


def reasons(samples: list[PlannedSample]) -> dict[str, str]:
    """Return why samples are bad, by key."""
    return {sample.bad.key: sample.bad.reason for sample in samples if sample.bad}
