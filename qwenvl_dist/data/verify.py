"""Find every fault of a packed dataset and name the samples that it hits. Bad data never raises here."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from qwenvl_dist.data.features import read_features
from qwenvl_dist.data.foreign import texts_of_shard
from qwenvl_dist.data.formats import parse_sample_json
from qwenvl_dist.data.index import (
    FEATURES,
    FEATURES_RECORD,
    MANIFEST_NAME,
    TAR_BLOCK,
    BadSample,
    Manifest,
    Member,
    RawSample,
    ShardEntry,
    ShardIndex,
    ShardReader,
    build_shard_index,
    image_members,
    index_path,
    parse_shard_index,
    probe_image,
    split_member_name,
)
from qwenvl_dist.data.parallel import map_in_order
from qwenvl_dist.data.sizes import UnreadableImage
from qwenvl_dist.data.storage import LocalFile, LocalStorage, Storage, open_storage
from qwenvl_dist.errors import UserError
from qwenvl_dist.files import sha256_of


@dataclass(frozen=True)
class Fault:
    """One bad sample, or with key None something wrong with the shard that hits no single sample."""

    shard: str
    key: str | None
    reason: str


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found; `shards` and `samples` count what the dataset should hold."""

    shards: int
    samples: int
    bad: list[Fault]

    def to_json(self) -> dict[str, Any]:
        """Return the report as `shards verify --json` prints it."""
        return {"shards": self.shards, "samples": self.samples, "bad": [vars(fault) for fault in self.bad]}


def verify(
    place: str | Path, workers: int = 1, advance: Callable[[int], None] = lambda n: None
) -> VerifyReport:
    """Check every byte of a dataset folder: hashes, indexes, each sample's checksum, form and pictures.

    `advance` hears how many samples are done. `UserError` only when `place`, a folder or URL, is none that could hold
    shards. Remote shards are fetched to the folder for temporary files, one at a time a worker.
    """
    storage = open_storage(place)
    if isinstance(storage, LocalStorage) and not storage.folder.is_dir():
        raise UserError(f"{place}: no such folder; it must be one that `shards pack` wrote")
    names = storage.names()  # a web server has no listing
    tars = [name for name in names or () if name.endswith(".tar")]
    faults: list[Fault] = []
    try:
        manifest = Manifest.load(storage)
    except UserError as error:
        if names is None:
            raise
        if not tars and MANIFEST_NAME not in names:
            raise UserError(
                f"{place}: holds no shards; it must be a folder that `shards pack` wrote"
            ) from None
        manifest = None
        faults.append(Fault(MANIFEST_NAME, None, str(error)))
        tasks: list[tuple[str, ShardEntry | None]] = [(name, None) for name in tars]
    else:
        tasks = [(entry.name, entry) for entry in manifest.shards]
        named = {entry.name for entry in manifest.shards}
        faults += [Fault(name, None, "not in the manifest") for name in tars if name not in named]

    texts = None if manifest is None else manifest.texts
    findings: list[_Findings] = []
    for finding in map_in_order(
        partial(_verify_shard, storage, texts), tasks, min(workers, max(1, len(tasks)))
    ):
        findings.append(finding)
        advance(finding.samples)
    faults += [fault for finding in findings for fault in finding.faults]
    faults += _duplicate_keys(storage, findings)
    samples = sum(finding.samples for finding in findings) if manifest is None else manifest.samples
    return VerifyReport(len(tasks), samples, faults)


@dataclass(frozen=True)
class _Findings:
    """What one shard gave."""

    shard: str
    samples: int
    key_hashes: np.ndarray  # (samples,) uint64
    faults: list[Fault]


@contextmanager
def _on_disk(storage: Storage, name: str) -> Iterator[Path]:
    """Yield a path at which a shard and its index lie, as far as they are there at all."""
    if isinstance(storage, LocalStorage):
        yield storage.folder / name
        return
    with TemporaryDirectory(prefix="qwenvl-dist-") as folder:
        tar = Path(folder, name)
        for path in (tar, index_path(tar)):
            try:
                with path.open("wb") as target:
                    storage.download(path.name, target)
            except FileNotFoundError:
                path.unlink()
        yield tar


def verify_shard(storage: Storage, entry: ShardEntry, texts: dict[str, Any] | None = None) -> list[Fault]:
    """Return the faults of one shard of a manifest, whose `texts` these are.

    A remote one is fetched to the folder for temporary files.
    """
    return _verify_shard(storage, texts, (entry.name, entry)).faults


def _verify_shard(
    storage: Storage, texts: dict[str, Any] | None, task: tuple[str, ShardEntry | None]
) -> _Findings:
    name, entry = task
    try:
        with _on_disk(storage, name) as tar:
            index, faults = _check_shard(tar, entry, texts)
    except OSError as error:
        index, faults = None, [Fault(name, None, f"cannot be read ({error.strerror or error})")]
    keys = index.keys if index is not None else []
    samples = len(keys) if index is not None or entry is None else entry.samples
    return _Findings(name, samples, _hashes(keys), faults)


def _check_shard(
    tar: Path, entry: ShardEntry | None, texts: dict[str, Any] | None
) -> tuple[ShardIndex | None, list[Fault]]:
    """Return the best index to be had, and the faults. `entry` and `texts` are the manifest's, if there is one."""
    name = tar.name
    stored, index_fault = _stored_index(tar, entry)
    if not tar.exists():
        faults = [Fault(name, None, index_fault)] if index_fault else []
        keys = (stored.keys if stored is not None else []) or [None]
        return stored, faults + [Fault(name, key, "missing shard file") for key in keys]
    try:
        form = stored.texts if stored is not None else texts_of_shard(texts, name)
        rebuilt, tar_fault = build_shard_index(tar, texts=form), None
    except UserError as error:
        rebuilt, tar_fault = None, str(error).replace(str(tar), name)

    faults = []
    index = stored
    if index_fault is not None:
        index = rebuilt or stored
        if rebuilt is not None and stored is not None and len(stored) == len(rebuilt):
            differing = [i for i in range(len(stored)) if stored.sample(i) != rebuilt.sample(i)]
            faults = [Fault(name, rebuilt.keys[i], "its entry in the index is damaged") for i in differing]
        faults = faults or [Fault(name, None, index_fault)]
    if index is None:
        return None, [*faults, Fault(name, None, tar_fault or "cannot be read")]

    content_fault = _content_fault(tar, entry)
    fits = rebuilt is not None and rebuilt.to_bytes() == index.to_bytes()
    thorough = content_fault is not None or not fits
    by_sample = list(_check_samples(tar, index, thorough))
    faults += by_sample
    if not by_sample:
        if content_fault is not None:
            faults.append(Fault(name, None, f"{content_fault}; no sample is hit"))
        elif tar_fault is not None:
            faults.append(Fault(name, None, tar_fault))
        elif not fits:
            faults.append(Fault(name, None, "the index does not describe this tar: it was replaced, or grew"))
    if entry is not None and entry.samples != len(index):
        faults.append(Fault(name, None, f"holds {len(index)} samples, the manifest says {entry.samples}"))
    return index, faults


def _stored_index(tar: Path, entry: ShardEntry | None) -> tuple[ShardIndex | None, str | None]:
    """Return (index, fault) of the index file as far as it can be read."""
    path = index_path(tar)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None, f"missing index file {path.name}"
    except OSError as error:
        return None, f"the index cannot be read ({error.strerror})"
    try:
        index = parse_shard_index(data, path.name)
    except UserError as error:
        return None, str(error)
    if entry is not None and hashlib.sha256(data).hexdigest() != entry.index_sha256:
        return index, f"{path.name} is not the index that the manifest names (sha256 differs)"
    return index, None


def _content_fault(tar: Path, entry: ShardEntry | None) -> str | None:
    if entry is None:
        return None
    num_bytes = tar.stat().st_size
    if num_bytes != entry.num_bytes:
        return f"has {num_bytes} bytes, the manifest says {entry.num_bytes}"
    if sha256_of(tar) != entry.sha256:
        return "the content differs from the manifest (sha256)"
    return None


def _check_samples(tar: Path, index: ShardIndex, thorough: bool) -> Iterator[Fault]:
    """Yield the faults of samples; `thorough` also looks at the tar's headers and paddings."""
    reader = ShardReader(LocalFile(tar), index)
    with tar.open("rb") as file:
        for i, key in enumerate(index.keys):
            try:
                reasons = list(_check_content(reader.read(i), index.images(i)))
            except BadSample as error:
                reasons = [error.reason]
            if thorough:
                for extension, member in index.members(i).items():
                    if not any(reason.startswith(f"{extension}:") for reason in reasons):
                        stored_key = key if index.texts is None else key.removeprefix(index.texts.key_prefix)
                        reasons += _check_frame(file.fileno(), stored_key, extension, member)
            if reasons:
                yield Fault(tar.name, key, "; ".join(reasons))
    reader.close()


def _check_content(sample: RawSample, image_sizes: np.ndarray) -> Iterator[str]:
    """Yield what is wrong with the form of a sample whose bytes are as packed."""
    if FEATURES_RECORD in sample.members or FEATURES in sample.members:
        yield from _check_features(sample, image_sizes)
        return
    extensions = image_members(sample.members)
    if "json" not in sample.members:
        yield "json: missing member"
    else:
        try:
            parse_sample_json(sample.json, len(extensions))
        except ValueError as error:
            yield f"json: {error}"
    if len(extensions) != len(image_sizes):
        yield f"the index names {len(image_sizes)} images, {len(extensions)} are there"
        return
    for extension, indexed in zip(extensions, image_sizes.tolist(), strict=True):
        data = sample.members[extension]
        try:
            _, *size = probe_image(data)
            with Image.open(BytesIO(data)) as image:
                image.load()
        except ValueError as error:
            yield f"{extension}: {error}"
        except Exception as error:  # Pillow's decoders raise whatever damaged data leads them to
            yield f"{extension}: cannot be decoded ({error})"
        else:
            if size != indexed:
                yield f"{extension}: is {size[0]}x{size[1]}, the index says {indexed[0]}x{indexed[1]}"


def _check_features(sample: RawSample, image_sizes: np.ndarray) -> Iterator[str]:
    """Yield what is wrong with a sample that holds features."""
    try:
        made = read_features(sample.members)
    except (UnreadableImage, ValueError) as error:
        yield str(error)
        return
    if not made.values.isfinite().all():
        yield f"{FEATURES}: holds values that are not finite"
    if made.sizes != image_sizes.tolist():
        yield f"{FEATURES_RECORD}: sizes {made.sizes}, the index says {image_sizes.tolist()}"
    try:
        parse_sample_json(sample.json, len(made.grids))
    except ValueError as error:
        yield f"json: {error}"


def _check_frame(descriptor: int, key: str, extension: str, member: Member) -> Iterator[str]:
    """Yield what is wrong with the tar's header before a member and the padding behind it."""
    header = os.pread(descriptor, TAR_BLOCK, member.offset - TAR_BLOCK)
    if len(header) < TAR_BLOCK:
        yield f"{extension}: truncated, the file ends before it"
        return
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        is_ours = info.mtime == 0 and info.mode == 0o444 and header[257:265] == b"ustar\x0000"
        is_damaged = is_ours and info.tobuf(tarfile.USTAR_FORMAT) != header
    except (tarfile.HeaderError, ValueError):
        yield f"{extension}: damaged tar header"
    else:
        if info.size != member.size or split_member_name(info.name) != (key, extension):
            yield f"{extension}: the tar header is of another member ({info.name!r})"
        elif is_damaged:
            yield f"{extension}: damaged tar header"
    padding = os.pread(descriptor, -member.size % TAR_BLOCK, member.offset + member.size)
    if padding.strip(b"\0"):
        yield f"{extension}: damaged padding behind it"


def _hashes(keys: list[str]) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, dtype=np.uint64)


def _duplicate_keys(storage: Storage, findings: list[_Findings]) -> list[Fault]:
    """Return a fault for each repeated key. Compares hashes: a big dataset's keys fill the memory."""
    if not findings:
        return []
    values, counts = np.unique(
        np.concatenate([finding.key_hashes for finding in findings]), return_counts=True
    )
    repeated = values[counts > 1]
    faults = []
    first: dict[str, str] = {}
    for finding in findings:
        if not np.isin(finding.key_hashes, repeated).any():
            continue
        index = _any_index(storage, finding.shard)
        for key in index.keys if index is not None else []:
            if key in first:
                faults.append(Fault(finding.shard, key, f"duplicate key, first in {first[key]}"))
            else:
                first[key] = finding.shard
    return faults


def _any_index(storage: Storage, shard: str) -> ShardIndex | None:
    try:
        with _on_disk(storage, shard) as tar:
            index, _ = _stored_index(tar, None)
            return index if index is not None else build_shard_index(tar)
    except (UserError, OSError):
        return None
