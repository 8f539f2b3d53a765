"""Samples -> tar shards that webdataset reads, their indexes, a manifest.

Each shard is one piece of work whose bytes depend on its samples alone, so that neither the number of workers
nor a kill in between changes the result. A shard is written under a temporary name, made durable, indexed,
renamed; the manifest comes last. What a shard was made from is not noted anywhere: its index already says
keys, sizes and checksums, and a rerun compares those with the input.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qwenvl_dist.data.captions import PackedCaptions
from qwenvl_dist.data.formats import SAFE_KEY, Sample, SampleReader
from qwenvl_dist.data.index import (
    MANIFEST_NAME,
    Manifest,
    ShardEntry,
    ShardIndex,
    build_shard_index,
    image_members,
    index_path,
    load_shard_index,
    probe_image,
)
from qwenvl_dist.data.parallel import map_in_order
from qwenvl_dist.data.storage import FsspecStorage, StorageError, is_remote, open_storage
from qwenvl_dist.errors import CheckFailed, UserError
from qwenvl_dist.files import fsync, sha256_of, write_atomic

# Marks a folder whose packing has begun and not ended; locked while a packer is at work.
UNFINISHED_NAME = "packing.lock"
PART_LOCK = "packing.{}-of-{}.lock"
LOCK_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True)
class Skipped:
    """A sample left out because of its picture, or a record of the input because of what it says."""

    key: str  # of the sample, or where the record stands
    reason: str


@dataclass(frozen=True)
class PackReport:
    """What `pack` did."""

    manifest: Manifest
    shards_written: int
    shards_kept: int  # finished by an earlier run
    skipped: list[Skipped] = field(default_factory=list)


def pack(
    samples: Sequence[Sample] | SampleReader,
    out: str | Path,
    *,
    samples_per_shard: int = 1000,
    workers: int = 1,
    skip_bad: bool = False,
    packing: dict[str, Any] | None = None,
    captions: PackedCaptions | None = None,
    part: tuple[int, int] | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> PackReport:
    """Write `samples` as shards into `out`, a folder or URL; over a finished output do nothing.

    A `SampleReader` looks at its whole input before anything is written, and then never holds more than a few shards'
    samples in memory.

    With `part` (i, n) only the shards i, i + n, ... are written, and no manifest: n such calls, on any machines and at
    the same time, leave everything but the manifest, which a call without `part` then adds. It proves each shard.

    A picture that cannot be read is a `UserError`; with `skip_bad` its sample is left out, and named in the
    manifest, as are records that the reader found unusable. `packing` and `captions` are noted there too, `captions`
    anew where all else is there already. `advance` hears how many samples are done. Nothing that lies in `out` is
    overwritten unless it was made from these samples. Shards for a URL are first written to the folder for temporary
    files, all of them. A disk that is full or cannot be written to is a `CheckFailed`.
    """
    captions = captions or PackedCaptions()
    with _full_disk_told(out):
        if is_remote(out):
            if part is not None:
                raise UserError(
                    f"--out {out}: a part is packed into a folder that all parts share, not to a URL"
                )
            with TemporaryDirectory(prefix="qwenvl-dist-") as folder:
                target = _open_target(str(out))
                local = Path(folder, "shards")
                report = pack(
                    samples, local, samples_per_shard=samples_per_shard, workers=workers, skip_bad=skip_bad,
                    packing=packing, captions=captions, advance=advance,
                )  # fmt: skip
                return _publish(report, local, target)
        if samples_per_shard < 1:
            raise UserError(f"--samples-per-shard {samples_per_shard}: must be at least 1")
        if workers < 1:
            raise UserError(f"--workers {workers}: must be at least 1")
        out = Path(out)
        if out.exists() and not out.is_dir():
            raise UserError(
                f"{out}: is a file; --out must be a new folder or one that was packed from this input"
            )
        finished = Manifest.load(out) if (out / MANIFEST_NAME).exists() else None
        if not len(samples):  # faults of the input come up here, before a folder is made
            raise UserError(f"{out}: nothing to pack, the input holds no sample")
        unusable: list[Skipped] = []
        if isinstance(samples, SampleReader):
            unusable = [Skipped(*found) for found in samples.unusable]
        else:
            _check_keys(samples)
        if finished is not None:
            num_shards = -(-len(samples) // samples_per_shard)
            skipped = _unchanged(finished, num_shards, out, _tasks(samples, out, samples_per_shard, skip_bad))
            if skipped is not None:
                advance(len(samples))
                if finished.captions != captions:
                    finished = replace(finished, captions=captions)
                    finished.write(out)
                return PackReport(finished, 0, len(finished.shards), unusable + skipped)
        elif out.is_dir() and not (out / UNFINISHED_NAME).exists():
            others = sorted(path.name for path in out.iterdir())
            if others:
                raise UserError(
                    f"{out}: holds other data ({', '.join(others[:3])}); --out must be a new or empty folder"
                )

        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{out}: cannot be written ({error.strerror or error}); choose another --out"
            ) from None
        _import_tar_writer()  # once, before the workers fork
        tasks = _tasks(samples, out, samples_per_shard, skip_bad)
        if part is not None:
            return _pack_part(itertools.islice(tasks, part[0], None, part[1]), out, part, workers, advance)
        with locked(out / UNFINISHED_NAME):
            results = _pack_shards(tasks, workers, advance)
            skipped = [*unusable, *(bad for result in results for bad in result.skipped)]
            notes = {**(packing or {}), "samples_per_shard": samples_per_shard}
            manifest = Manifest(
                [result.entry for result in results],
                {**notes, "skipped": [vars(bad) for bad in skipped]},
                captions=captions,
            )
            if finished is not None and finished.fingerprint != manifest.fingerprint:
                raise UserError(
                    f"{out}: holds damaged shards: verify it, remove those it names, and pack again"
                )
            ours = {shard.name for shard in manifest.shards}
            for tar in sorted(out.glob("*.tar")):
                if tar.name not in ours:
                    raise _other_input(out, f"{tar.name} is there, the input ends before it")
            for leftover in (*out.glob("shard-*.tmp"), *out.glob(PART_LOCK.format("*", "*"))):
                leftover.unlink()
            manifest.write(out)
            (out / UNFINISHED_NAME).unlink()
        kept = sum(result.kept for result in results)
        return PackReport(manifest, len(results) - kept, kept, skipped)


@contextmanager
def _full_disk_told(out: str | Path) -> Iterator[None]:
    """Let a disk that is full or cannot be written to be a `CheckFailed`."""
    try:
        yield
    except OSError as error:
        raise CheckFailed(
            f"{error.filename or out}: {error.strerror or error}: once that is mended, the same command goes on "
            "where it stopped"
        ) from None


def _pack_part(
    tasks: Iterable[_Task], out: Path, part: tuple[int, int], workers: int, advance: Callable[[int], None]
) -> PackReport:
    """Write the shards of one part. The manifest of the report names these alone, and is not written."""
    own = out / PART_LOCK.format(*part)
    with locked(out / UNFINISHED_NAME, shared=True), locked(own):
        results = _pack_shards(tasks, workers, advance)
        own.unlink()
    kept = sum(result.kept for result in results)
    skipped = [bad for result in results for bad in result.skipped]
    return PackReport(Manifest([result.entry for result in results]), len(results) - kept, kept, skipped)


def _pack_shards(tasks: Iterable[_Task], workers: int, advance: Callable[[int], None]) -> list[_Result]:
    results = []
    for result in map_in_order(_pack_shard, tasks, workers):
        results.append(result)
        advance(result.num_input_samples)
    return results


def _open_target(out: str) -> FsspecStorage:
    target = open_storage(out)
    if not isinstance(target, FsspecStorage):
        raise UserError(
            f"--out {out}: cannot be written to; name a folder, or a URL such as s3://bucket/folder"
        )
    return target


def _publish(report: PackReport, folder: Path, target: FsspecStorage) -> PackReport:
    """Upload a packed folder, its manifest last, unless it is there already."""
    shards = report.manifest.shards
    ours = [name for shard in shards for name in (shard.name, f"{shard.name}.idx")]
    try:
        there = target.names()
        if MANIFEST_NAME in there:
            finished = Manifest.load(target)
            if finished.fingerprint != report.manifest.fingerprint:
                raise UserError(
                    f"{target.location}: was packed from another input ({finished.samples} samples in "
                    f"{len(finished.shards)} shards): choose another --out, or remove what is there"
                )
            if finished.captions != report.manifest.captions:
                target.upload(folder / MANIFEST_NAME, MANIFEST_NAME)
            return PackReport(report.manifest, 0, len(shards), report.skipped)
        others = sorted(set(there) - set(ours))
        if others:
            raise UserError(
                f"{target.location}: holds other data ({', '.join(others[:3])}); --out must be new or empty"
            )
        for name in [*ours, MANIFEST_NAME]:
            target.upload(folder / name, name)
    except StorageError as error:
        raise UserError(f"{target.location}: cannot be written to ({error})") from None
    return report


@dataclass(frozen=True)
class _Task:
    tar: Path
    samples: list[Sample]
    skip_bad: bool


@dataclass(frozen=True)
class _Result:
    entry: ShardEntry
    num_input_samples: int
    kept: bool
    skipped: list[Skipped]


class _BadPictureError(Exception):
    """A picture that cannot be packed; the text names it."""


def _tasks(samples: Iterable[Sample], out: Path, samples_per_shard: int, skip_bad: bool) -> Iterator[_Task]:
    samples = iter(samples)
    for number in itertools.count():
        chunk = list(itertools.islice(samples, samples_per_shard))
        if not chunk:
            return
        yield _Task(out / shard_name(number), chunk, skip_bad)


def shard_name(number: int) -> str:
    """Return the file name of the `number`-th shard."""
    return f"shard-{number:06d}.tar"


def _check_keys(samples: Sequence[Sample]) -> None:
    """Raise UserError unless all keys are safe and differ, as those of readers are."""
    seen: set[str] = set()
    for sample in samples:
        if not SAFE_KEY.fullmatch(sample.key):
            raise UserError(
                f"the key {sample.key!r} is unsafe in a shard: letters, digits, '_' and '-' only, "
                "at most 80; rename it"
            )
        if sample.key in seen:
            raise UserError(f"two samples have the key {sample.key!r}: keys must differ; drop or rename one")
        seen.add(sample.key)


def _unchanged(
    manifest: Manifest, num_shards: int, out: Path, tasks: Iterable[_Task]
) -> list[Skipped] | None:
    """Return what was skipped when a finished output is all there and made from this input.

    None when a part of it is missing, which can be packed again. `UserError` when it has another input.
    """
    if [shard.name for shard in manifest.shards] != [shard_name(number) for number in range(num_shards)]:
        raise _other_input(out, f"{manifest.samples} samples in {len(manifest.shards)} shards")
    skipped = []
    for task in tasks:
        if not task.tar.exists() or not index_path(task.tar).exists():
            return None
        kept = _kept(task)
        if kept is None:
            return None
        skipped += kept[1]
    return skipped


def _pack_shard(task: _Task) -> _Result:
    """Write one shard with its index, or keep the one that is there."""
    kept = _kept(task)
    if kept is not None:
        index, skipped = kept
    else:
        skipped: list[Skipped] = []
        index = write_shard(task.tar, _readable(task, skipped))
    entry = ShardEntry(
        name=task.tar.name,
        num_bytes=index.num_bytes,
        sha256=sha256_of(task.tar),
        index_sha256=hashlib.sha256(index.to_bytes()).hexdigest(),
        samples=len(index),
    )
    return _Result(entry, len(task.samples), kept is not None, skipped)


def _kept(task: _Task) -> tuple[ShardIndex, list[Skipped]] | None:
    """Return the index of the shard that is there already and what was left out; None to write it.

    `UserError` when it was made from other samples. Reads no pictures but those that changed after the shard
    was written.
    """
    tar, idx = task.tar, index_path(task.tar)
    index = None
    if idx.exists():
        try:
            index = load_shard_index(idx)
        except UserError:
            index = None  # damaged: the tar says the same
    restore = index is None and tar.exists()
    if restore:
        try:
            index = build_shard_index(tar)
        except UserError as error:
            raise UserError(f"{error}, after you removed that file") from None
    if index is None:
        return None
    skipped = _compare(task, index, (tar if restore else idx).stat().st_mtime_ns)
    if not tar.exists() or tar.stat().st_size != index.num_bytes:
        return None
    if restore:
        write_atomic(idx, index.to_bytes())
    return index, skipped


def _compare(task: _Task, index: ShardIndex, written_ns: int) -> list[Skipped]:
    """Return what a shard rightly lacks; `UserError` when it holds anything but the task's samples."""
    out, skipped, position = task.tar.parent, [], 0
    for sample in task.samples:
        if position < len(index) and index.keys[position] == sample.key:
            if not _is_same(sample, index, position, written_ns):
                raise _other_input(out, f"{sample.key} in {task.tar.name} differs")
            position += 1
            continue
        try:
            _read_sample(sample)
        except _BadPictureError as error:
            if not task.skip_bad:
                raise _bad_picture(sample, error) from None
            skipped.append(Skipped(sample.key, str(error)))
        else:
            raise _other_input(out, f"{task.tar.name} lacks {sample.key}")
    if position < len(index):
        raise _other_input(out, f"{task.tar.name} also holds {index.keys[position]}")
    return skipped


def _is_same(sample: Sample, index: ShardIndex, i: int, written_ns: int) -> bool:
    """Tell whether sample `i` of a shard was made from `sample`."""
    members = index.members(i)
    text = sample.to_json()
    extensions = image_members(members)
    if (
        "json" not in members
        or members["json"].crc32 != zlib.crc32(text)
        or len(extensions) != len(sample.images)
    ):
        return False
    for extension, image in zip(extensions, sample.images, strict=True):
        try:
            if image.num_bytes() != members[extension].size:
                return False
            if image.modified_ns() > written_ns and zlib.crc32(image.read()) != members[extension].crc32:
                return False
        except OSError:
            return False
    return True


def _readable(task: _Task, skipped: list[Skipped]) -> Iterator[dict[str, Any]]:
    """Yield the samples for webdataset, read one at a time; `skipped` fills with what is left out."""
    for sample in task.samples:
        try:
            members = _read_sample(sample)
        except _BadPictureError as error:
            if not task.skip_bad:
                raise _bad_picture(sample, error) from None
            skipped.append(Skipped(sample.key, str(error)))
        else:
            yield {"__key__": sample.key, **members}


def _read_sample(sample: Sample) -> dict[str, bytes]:
    """Return the members of a sample: the pictures' bytes as they are, and the JSON."""
    members = {}
    for number, image in enumerate(sample.images):
        try:
            data = image.read()
            extension, _, _ = probe_image(data)
        except OSError as error:
            raise _BadPictureError(f"{image}: cannot be read ({error.strerror or error})") from None
        except ValueError as error:
            raise _BadPictureError(f"{image}: {error}") from None
        members[extension if len(sample.images) == 1 else f"{number}.{extension}"] = data
    return {**members, "json": sample.to_json()}


def write_shard(tar: Path, samples: Iterable[dict[str, Any]]) -> ShardIndex:
    """Write a shard and its index so that a tar under its final name is whole and indexed."""
    temporary = tar.with_name(tar.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            with _import_tar_writer()(file, user="", group="", mode=0o444, mtime=0, encoder=False) as writer:
                for sample in samples:
                    writer.write(sample)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    index = build_shard_index(temporary, tar.name)
    write_atomic(index_path(tar), index.to_bytes())
    temporary.replace(tar)
    fsync(tar.parent)
    return index


def _import_tar_writer() -> Any:
    from webdataset.writer import TarWriter  # imports torch: only when something is written

    return TarWriter


@contextmanager
def locked(path: Path, shared: bool = False) -> Iterator[None]:
    """Hold the lock of an output folder; workers inherit it, so it ends when the last of them is gone.

    Any number of holders may share it, none beside one that does not.
    """
    deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        with path.open("a+b") as file:  # over NFS a shared lock wants a file that can be read
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{path.parent}: another process is packing into it; wait, or choose another --out"
                    ) from None
                time.sleep(0.05)
                continue
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield
                return  # else the packer before us finished and removed it: make our own


def _bad_picture(sample: Sample, error: Exception) -> UserError:
    return UserError(f"{error} (sample {sample.key}): replace it, or leave such samples out with --skip-bad")


def _other_input(out: Path, detail: str) -> UserError:
    return UserError(
        f"{out}: was packed from another input ({detail}): choose another --out, or remove that folder"
    )
