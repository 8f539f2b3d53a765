"""Shards of pictures -> shards of vision features, on any number of ranks.

Shard i is the work of rank i mod world, and its bytes depend on its samples alone: neither the number of ranks nor a
kill in between changes the result. Output shards have the names, keys and order of the input, so that the plan of a run
visits the same samples at the same positions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from qwenvl_dist.data.chat import Grid, image_tokens
from qwenvl_dist.data.features import SampleFeatures, bad_members, read_features
from qwenvl_dist.data.index import (
    FEATURES,
    FEATURES_RECORD,
    MANIFEST_NAME,
    BadSample,
    Manifest,
    ShardEntry,
    ShardIndex,
    ShardReader,
    index_path,
    load_shard_index,
    read_shard_index,
)
from qwenvl_dist.data.pack import UNFINISHED_NAME, Skipped, locked, write_shard
from qwenvl_dist.data.sizes import ImageSizeRule, UnreadableImage
from qwenvl_dist.data.source import ShardSet
from qwenvl_dist.data.storage import LocalFile, Range, is_remote
from qwenvl_dist.data.stream import SampleEncoder
from qwenvl_dist.distributed import HostGroup, Topology
from qwenvl_dist.errors import UserError
from qwenvl_dist.files import sha256_of, write_atomic
from qwenvl_dist.logs import progress
from qwenvl_dist.model.load import load_processor, resolve_base
from qwenvl_dist.model.pixels import PixelSettings
from qwenvl_dist.model.tower import VisionTower
from qwenvl_dist.training.features import feature_binding

if TYPE_CHECKING:
    from qwenvl_dist.config import PixelRange
    from qwenvl_dist.data.storage import ByteSource

RECORD_NAME = "encoding.json"  # of an encoding that has begun and not ended: what it is made from


@dataclass(frozen=True)
class EncodeReport:
    """What `encode` did, over all ranks."""

    manifest: Manifest
    shards_written: int
    shards_kept: int  # finished by an earlier start
    bad: list[Skipped]  # samples carried without features


@dataclass(frozen=True)
class _Result:
    entry: ShardEntry
    kept: bool
    bad: list[Skipped]


@dataclass(frozen=True)
class _Seen:
    """A sample whose pictures were decoded, or why they were not."""

    key: str
    members: dict[str, bytes]  # those that stay
    sizes: list[list[int]]
    grids: tuple[Grid, ...] = ()
    pixels: Sequence[np.ndarray] = ()
    bad: str | None = None


def encode(
    shards: str,
    base_name: str,
    out: Path,
    host: HostGroup,
    *,
    image_size: int | PixelRange,
    resize: str,
    dtype: str,
    batch_size: int,
) -> EncodeReport:
    """Write into `out` the features of all pictures of `shards`, a folder or URL. Collective.

    Over a finished output of the same input and settings no shard is written. `batch_size` samples go through the tower
    at a time. A sample whose picture cannot be read stays, without features and with the reason: a bad sample, as it
    was one in the input.
    """
    if not (sys.stderr.isatty() and host.rank == 0):
        transformers.utils.logging.disable_progress_bar()
    source = ShardSet(shards)
    source.require_pictures()
    base = resolve_base(base_name)
    processor = load_processor(base)
    rule = ImageSizeRule.of(image_size, processor, "--image-size")
    binding = feature_binding(base, processor, image_size, resize)
    made_from = {"source": source.manifest.fingerprint, "dtype": dtype, "batch_size": batch_size}
    with contextlib.ExitStack() as stack:
        if host.rank == 0:
            open_output(out, {**binding, **made_from}, stack)
        host.barrier()
        if not (out / RECORD_NAME).exists():
            raise UserError(
                f"--out {out}: rank {host.rank} does not see what rank 0 writes; name a shared folder"
            )
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", Topology.from_environment().local_rank)
        encoder = SampleEncoder(processor, rule, 1 << 20, exact_resize=resize == "exact")
        tower = VisionTower(base, PixelSettings.of(processor), getattr(torch, dtype), device)
        own = range(host.rank, len(source.manifest.shards), host.world_size)
        results = {}
        with (
            progress(total=sum(source.manifest.shards[i].samples for i in own), description="encode") as bar,
            ThreadPool(max(1, torch.get_num_threads())) as pool,
        ):
            work = ShardEncoder(source, out, encoder, tower, batch_size, pool, bar.advance)
            for number in own:
                results[number] = work.encode(source.manifest.shards[number])
        every = [result for part in host.gather(results) for result in part.items()]
        ordered = [result for _, result in sorted(every, key=lambda item: item[0])]
        bad = [each for result in ordered for each in result.bad]
        notes = {**made_from, "bad": [vars(each) for each in bad]}
        manifest = Manifest(
            [result.entry for result in ordered], notes, binding, captions=source.manifest.captions
        )
        if host.rank == 0:
            _finish(out, manifest)
        host.barrier()
    kept = sum(result.kept for result in ordered)
    return EncodeReport(manifest, len(ordered) - kept, kept, bad)


def open_output(out: Path, record: dict[str, Any], stack: contextlib.ExitStack) -> None:
    """Lock `out` and note what is made there; UserError when it holds anything else."""
    if is_remote(str(out)) or (out.exists() and not out.is_dir()):
        raise UserError(
            f"--out {out}: must be a folder on disk, new or of an earlier start of the same command"
        )
    held: dict[str, Any] | None = None
    if (out / MANIFEST_NAME).exists():
        manifest = Manifest.load(out)
        held = {**(manifest.features or {}), **manifest.packing}
    elif (out / RECORD_NAME).exists():
        held = json.loads((out / RECORD_NAME).read_bytes())
    elif out.is_dir():
        # The lock alone is of a start that was stopped before anything else.
        others = sorted(path.name for path in out.iterdir() if path.name != UNFINISHED_NAME)
        if others:
            raise UserError(
                f"--out {out}: holds other data ({', '.join(others[:3])}); name a new or empty folder"
            )
    if held is not None:
        for key, value in record.items():
            if held.get(key) != value:
                raise UserError(
                    f"--out {out}: was encoded with {key} {held.get(key)}, now it is {value}; "
                    "name another folder, or remove that one"
                )
    out.mkdir(parents=True, exist_ok=True)
    stack.enter_context(locked(out / UNFINISHED_NAME))
    write_atomic(out / RECORD_NAME, json.dumps(record).encode())


def _finish(out: Path, manifest: Manifest) -> None:
    for leftover in out.glob("*.tar.tmp"):
        leftover.unlink()
    manifest.write(out)
    (out / RECORD_NAME).unlink()
    (out / UNFINISHED_NAME).unlink()


class _Unfailing:
    """A byte source whose faults of reading end the work: a lost connection is no bad picture."""

    def __init__(self, source: ByteSource, name: str) -> None:
        self.source, self.name = source, name
        self.close, self.reread = source.close, source.reread

    def read_ranges(self, ranges: Sequence[Range]) -> list[bytes]:
        try:
            return self.source.read_ranges(ranges)
        except OSError as error:
            raise UserError(
                f"{self.name}: cannot be read ({error.strerror or error}); once it can, start the same command again"
            ) from None


class ShardEncoder:
    """Encodes whole shards of one data set, a batch through the tower while the next one is decoded."""

    def __init__(
        self,
        source: ShardSet,
        out: Path,
        encoder: SampleEncoder,
        tower: VisionTower,
        batch_size: int,
        pool: ThreadPool,
        advance: Callable[[int], None],
    ) -> None:
        self.source, self.out, self.encoder, self.tower = source, out, encoder, tower
        self.batch_size, self.pool, self.advance = batch_size, pool, advance

    def encode(self, entry: ShardEntry) -> _Result:
        """Write one shard with its index, or keep the one that is there."""
        index = read_shard_index(self.source.storage, entry.name, entry.index_sha256)
        tar = self.out / entry.name
        made = _finished(tar, index)
        kept = made is not None
        if made is None:
            reader: Any = _Unfailing(
                self.source.storage.open(entry.name), f"{self.source.storage.location}/{entry.name}"
            )
            with contextlib.closing(ShardReader(reader, index)) as shard:
                made = write_shard(tar, self._samples(shard))
        else:
            self.advance(len(index))
        bad = _noted_bad(tar, made)
        digest = hashlib.sha256(made.to_bytes()).hexdigest()
        return _Result(ShardEntry(tar.name, made.num_bytes, sha256_of(tar), digest, len(made)), kept, bad)

    def _samples(self, shard: ShardReader) -> Iterator[dict[str, Any]]:
        batches = [
            range(i, min(i + self.batch_size, len(shard))) for i in range(0, len(shard), self.batch_size)
        ]
        ahead = None
        for number, _ in enumerate(batches):
            seen = (ahead or self._ask(shard, batches[number])).get()
            ahead = self._ask(shard, batches[number + 1]) if number + 1 < len(batches) else None
            yield from self._through_tower(seen)
            self.advance(len(seen))

    def _ask(self, shard: ShardReader, numbers: range) -> Any:
        return self.pool.map_async(lambda i: self._see(shard, i), numbers)

    def _see(self, shard: ShardReader, i: int) -> _Seen:
        key, sizes = shard.index.keys[i], shard.index.images(i).tolist()
        try:
            raw = shard.read(i)
        except BadSample as error:
            with contextlib.suppress(BadSample):
                return _Seen(key, {"json": shard.read_member(i, "json")}, sizes, bad=error.reason)
            return _Seen(key, {}, sizes, bad=error.reason)
        members = {"json": raw.json} if "json" in raw.members else {}
        try:
            pictures = [self.encoder.picture(data) for data in raw.images]
        except UnreadableImage as error:
            return _Seen(key, members, sizes, bad=str(error))
        return _Seen(
            key, members, sizes, tuple(grid for _, grid in pictures), [pixels for pixels, _ in pictures]
        )

    def _through_tower(self, samples: Sequence[_Seen]) -> Iterator[dict[str, Any]]:
        pixels = [picture for sample in samples for picture in sample.pixels]
        grids = tuple(grid for sample in samples for grid in sample.grids)
        values, start = None, 0
        if pixels:
            values = self.tower.encode(torch.from_numpy(np.concatenate(pixels)), grids)
        for sample in samples:
            members = sample.members
            if sample.bad is not None:
                members = {**members, **bad_members(sample.sizes, sample.bad)}
            elif sample.grids:
                assert values is not None, "grids without pictures"
                count = sum(image_tokens(grid, self.tower.settings.merge_size) for grid in sample.grids)
                made = SampleFeatures(values[start : start + count], sample.sizes, sample.grids)
                members = {**members, **made.to_members()}
                start += count
            yield {"__key__": sample.key, **members}


def _finished(tar: Path, source: ShardIndex) -> ShardIndex | None:
    """Return the index of an output shard that an earlier start finished, None to write it."""
    try:
        index = load_shard_index(index_path(tar))
    except UserError:
        return None
    whole = tar.exists() and tar.stat().st_size == index.num_bytes
    return index if whole and index.keys == source.keys else None


def _noted_bad(tar: Path, index: ShardIndex) -> list[Skipped]:
    """Return the samples of an output shard that carry no features, and why."""
    reader = ShardReader(LocalFile(tar), index)
    with contextlib.closing(reader):
        bad = []
        for i, key in enumerate(index.keys):
            extensions = index.members(i)
            if FEATURES_RECORD in extensions and FEATURES not in extensions:
                try:
                    read_features({FEATURES_RECORD: reader.read_member(i, FEATURES_RECORD)})
                except (UnreadableImage, BadSample, ValueError) as error:
                    bad.append(Skipped(key, str(error)))
        return bad
