"""Several packed data sets, read as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qwenvl_dist.data.index import BadSample, Manifest, RawSample, ShardEntry, ShardIndex
from qwenvl_dist.data.plan import Place, Plan
from qwenvl_dist.data.source import Shards, ShardSet
from qwenvl_dist.data.storage import Storage
from qwenvl_dist.errors import UserError

if TYPE_CHECKING:
    from qwenvl_dist.config import DataConfig


class JoinedShards:
    """The shards of several data sets, numbered through as `MixturePlan` does it.

    Names of shards and keys of samples begin with the name of their data set, `captions/00000.tar`, so that what two
    data sets both hold can be told apart. Each set has its own storage, and its own windows in the cache.
    """

    def __init__(self, sets: Mapping[str, ShardSet]) -> None:
        self.names, self.parts = list(sets), list(sets.values())
        self.manifest = join_manifests({name: part.manifest for name, part in sets.items()})
        self.is_remote = any(part.is_remote for part in self.parts)
        self.keep_open = sum(part.keep_open for part in self.parts)
        self._owners = [
            (part, number)
            for part in range(len(self.parts))
            for number in range(len(self.parts[part].manifest.shards))
        ]

    def stored(self, shard: int) -> tuple[Storage, ShardEntry, dict[str, Any] | None]:
        """Return where a shard lies, what its own manifest says of it, and how its texts are read."""
        part, number = self._owners[shard]
        return self.parts[part].stored(number)

    def expect(self, plan: Plan, position: int, share: int) -> None:
        """Hear where the plan is: each data set hears where its own is."""
        if position < plan.total_samples and any(part.cache is not None for part in self.parts):
            for part, (own_plan, own_position) in zip(self.parts, plan.parts_at(position), strict=True):
                part.expect(own_plan, own_position, share)

    def release(self) -> None:
        """Hear that the plan is done with."""
        for part in self.parts:
            part.release()

    def read(self, place: Place) -> RawSample:
        """Return the verified bytes of one sample. Raises BadSample."""
        part, number = self._owners[place.shard]
        name = self.names[part]
        try:
            raw = self.parts[part].read(Place(number, place.sample))
        except BadSample as error:
            raise BadSample(f"{name}/{error.shard}", f"{name}/{error.key}", error.reason) from error
        return replace(raw, key=f"{name}/{raw.key}")

    def index(self, shard: int) -> ShardIndex:
        """Return a shard's index. Raises UserError or OSError when it cannot be read."""
        part, number = self._owners[shard]
        return self.parts[part].index(number)


def join_manifests(manifests: Mapping[str, Manifest]) -> Manifest:
    """Return what all of them hold. Raises UserError where some hold pictures and some vision features."""
    encoded = [name for name, manifest in manifests.items() if manifest.features is not None]
    if encoded and len(encoded) < len(manifests):
        plain = next(name for name in manifests if name not in encoded)
        raise UserError(
            f"data.mixture: {encoded[0]} holds vision features and {plain} pictures, which one run cannot mix; name "
            f"the shards that {encoded[0]} was encoded from, or encode {plain} too"
        )
    entries = [
        replace(entry, name=f"{name}/{entry.name}")
        for name, manifest in manifests.items()
        for entry in manifest.shards
    ]
    return Manifest(entries, features=next(iter(manifests.values())).features)


def open_training_sets(data: DataConfig, open_one: Callable[[str], ShardSet]) -> Shards:
    """Return the shards that the recipe trains on; `open_one` opens a folder or URL. Raises UserError."""

    def opened(key: str, place: str) -> ShardSet:
        try:
            return open_one(place)
        except UserError as error:
            raise UserError(f"{key}: {error}") from error

    if not data.mixture:
        return opened("data.train", data.train)
    return JoinedShards({each.name: opened(each.key, each.place) for each in data.training_sets})
