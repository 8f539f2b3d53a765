"""What a reader needs to know about shards without opening them: a shard's index, a dataset's manifest.

`<shard>.tar.idx` is a safetensors file of columns (little-endian, so that opening 10,000 samples takes a millisecond):

    keys             (bytes,) uint8: the samples' keys in the order of the tar, UTF-8, NUL between them
    member_starts    (samples + 1,) int64: sample i has the members member_starts[i] to member_starts[i + 1]
    extension_ids    (members,) int32 into the metadata's `extensions`
    offsets, sizes   (members,) int64: the first byte in the tar, the number of bytes
    crcs             (members,) uint32: crc32 of a member's bytes
    image_starts     (samples + 1,) int64: the same for pictures
    image_sizes      (images, 2) int32: width and height as stored, before EXIF turns it; 0, 0 where unreadable
    caption_lengths  (samples,) int32: characters of the assistant's text
    unlearned_lengths  (samples,) int32: how many of them are not learned; no column where all are

Its metadata has one entry, `qwenvl-dist-index`: JSON with version, shard, bytes of the tar, samples, extensions; for a
shard of another program also `texts`, which says how its own members become messages (data/foreign.py).
`manifest.json` names every shard with size, sha256 and count, and carries a fingerprint of them all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load as load_columns
from safetensors.numpy import save as save_columns

from qwenvl_dist.data.captions import PackedCaptions
from qwenvl_dist.data.foreign import TextForm
from qwenvl_dist.data.formats.sample import is_learned
from qwenvl_dist.data.storage import ByteSource, LocalStorage, Storage, StorageError, open_storage
from qwenvl_dist.errors import UserError
from qwenvl_dist.files import write_atomic

INDEX_FORMAT = "qwenvl-dist-index"
MANIFEST_FORMAT = "qwenvl-dist-shards"
MANIFEST_NAME = "manifest.json"
INDEX_VERSION = 2
MANIFEST_VERSION = 1
TAR_BLOCK = 512
MAX_HEADER_BYTES = 1 << 20  # of a long name or of extended attributes in a foreign tar

# The picture formats that a shard holds, by Pillow's name. MPO is a JPEG with more pictures behind the first.
IMAGE_EXTENSIONS = {
    "JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif",
}  # fmt: skip
# What a sample holds instead of its pictures after `shards encode`; data/features.py says more.
FEATURES, FEATURES_RECORD = "features", "features.json"
_IMAGE_MEMBER = re.compile(r"(?:(\d+)\.)?(?:jpg|jpeg|png|webp|gif|bmp|tif|tiff)")

# webdataset's rule: the key is all up to the first dot of the file name, the extension is the rest.
_KEY_AND_EXTENSION = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")


class BadSample(Exception):  # noqa: N818
    """A sample that cannot be read, or not as it was packed."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(shard, key, reason)
        self.shard, self.key, self.reason = shard, key, reason

    def __str__(self) -> str:
        return f"{self.shard}: {self.key}: {self.reason}"


@dataclass(frozen=True)
class RawSample:
    """A sample's bytes as they lie in the shard."""

    key: str
    members: dict[str, bytes]  # by extension: "jpg", "json", "0.jpg"

    @property
    def json(self) -> bytes:
        """Return the bytes of `KEY.json`, empty when the shard holds none."""
        return self.members.get("json", b"")

    @property
    def images(self) -> list[bytes]:
        """Return the pictures in the order of the messages."""
        return [self.members[extension] for extension in image_members(self.members)]


@dataclass(frozen=True)
class Member:
    """Where a sample's member lies in its tar."""

    offset: int  # of the first byte of data
    size: int
    crc32: int


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """One shard's samples, in tar order, column by column; the module's text gives shapes and units."""

    shard: str
    num_bytes: int  # of the tar
    keys: list[str]
    extensions: list[str]  # the distinct ones
    member_starts: np.ndarray
    extension_ids: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    crcs: np.ndarray
    image_starts: np.ndarray
    image_sizes: np.ndarray
    caption_lengths: np.ndarray
    unlearned_lengths: np.ndarray | None = None
    texts: TextForm | None = None  # of a shard that another program wrote; None: `KEY.json` in our own form

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def learned_lengths(self) -> np.ndarray:
        """Characters of the assistant's text that is learned, (samples,) int32."""
        unlearned = self.unlearned_lengths
        return self.caption_lengths if unlearned is None else self.caption_lengths - unlearned

    def members(self, i: int) -> dict[str, Member]:
        """Return sample `i`'s members by extension, in tar order."""
        return {
            self.extensions[self.extension_ids[m]]: Member(
                int(self.offsets[m]), int(self.sizes[m]), int(self.crcs[m])
            )
            for m in range(self.member_starts[i], self.member_starts[i + 1])
        }

    def images(self, i: int) -> np.ndarray:
        """Return the (images, 2) widths and heights of sample `i`."""
        return self.image_sizes[self.image_starts[i] : self.image_starts[i + 1]]

    def sample(self, i: int) -> tuple:
        """Return all that the index says of sample `i`, to be compared."""
        lengths = int(self.caption_lengths[i]), int(self.learned_lengths[i])
        return self.keys[i], self.members(i), self.images(i).tolist(), *lengths

    def to_bytes(self) -> bytes:
        """Return the content of the index file; the same shard always gives the same bytes."""
        header = {"version": INDEX_VERSION, "shard": self.shard, "bytes": self.num_bytes}
        header |= {"samples": len(self), "extensions": self.extensions}
        if self.texts is not None:
            header["texts"] = self.texts.to_json()
        given = {name: getattr(self, name) for name in _COLUMNS}
        columns = {
            name: column.astype(_COLUMNS[name][0]) for name, column in given.items() if column is not None
        }
        columns["keys"] = np.frombuffer("\0".join(self.keys).encode(), np.uint8)
        # One entry only: safetensors writes the metadata in no fixed order.
        return save_columns(columns, metadata={INDEX_FORMAT: _compact(header)})


# Kind and number of dimensions of the numeric columns.
_COLUMNS = {
    "member_starts": ("<i8", 1),
    "extension_ids": ("<i4", 1),
    "offsets": ("<i8", 1),
    "sizes": ("<i8", 1),
    "crcs": ("<u4", 1),
    "image_starts": ("<i8", 1),
    "image_sizes": ("<i4", 2),
    "caption_lengths": ("<i4", 1),
    "unlearned_lengths": ("<i4", 1),
}


def index_path(tar: Path) -> Path:
    """Return where the index of `tar` lies."""
    return tar.with_name(tar.name + ".idx")


def load_shard_index(path: Path, expected_sha256: str | None = None) -> ShardIndex:
    """Read an index file. `UserError` when it is missing, damaged, or not the one with `expected_sha256`."""
    path = Path(path)
    return read_shard_index(LocalStorage(path.parent), path.name.removesuffix(".idx"), expected_sha256)


def read_shard_index(storage: Storage, shard: str, expected_sha256: str | None = None) -> ShardIndex:
    """Read the index of a shard from where it lies. `UserError` as `load_shard_index`, and OSError."""
    name = f"{storage.location}/{shard}.idx"
    try:
        data = storage.read_bytes(f"{shard}.idx")
    except FileNotFoundError:
        raise UserError(f"{name}: the shard's index is missing: pack again, or restore it") from None
    return check_shard_index(data, name, expected_sha256)


def check_shard_index(data: bytes, name: str, expected_sha256: str | None) -> ShardIndex:
    """Read the content of an index file; `name` is what an error calls it. `UserError` as `load_shard_index`."""
    if expected_sha256 is not None and hashlib.sha256(data).hexdigest() != expected_sha256:
        raise UserError(
            f"{name}: is not the index that the manifest names (sha256 differs): restore it, or pack again"
        )
    return parse_shard_index(data, name)


def parse_shard_index(data: bytes, name: str) -> ShardIndex:
    """Read the content of an index file; `name` is what an error calls it."""
    remedy = "restore it, or pack again"
    try:
        header_end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(json.loads(data[8:header_end])["__metadata__"][INDEX_FORMAT])
        version = header["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{name}: is not a shard index (damaged, or another file): {remedy}") from None
    if version != INDEX_VERSION:
        raise UserError(f"{name}: has version {version}, this program reads {INDEX_VERSION}: pack again")
    try:
        columns = load_columns(data)
        text = columns.pop("keys").tobytes().decode()
        index = ShardIndex(
            shard=str(header["shard"]),
            num_bytes=int(header["bytes"]),
            keys=text.split("\0") if header["samples"] else [],
            extensions=[str(extension) for extension in header["extensions"]],
            texts=TextForm.from_json(header["texts"]) if "texts" in header else None,
            **columns,
        )
        _check_columns(index, int(header["samples"]))
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{name}: damaged ({type(error).__name__}: {error}): {remedy}") from None
    return index


def _check_columns(index: ShardIndex, samples: int) -> None:
    """Raise ValueError unless every number of the index points to where there can be something."""
    for name, (kind, dimensions) in _COLUMNS.items():
        column = getattr(index, name)
        if column is None:
            continue
        if column.dtype != np.dtype(kind) or column.ndim != dimensions:
            raise ValueError(f"{name} is {column.dtype} with {column.ndim} dimensions")
    if not len(index.keys) == len(index.caption_lengths) == samples:
        raise ValueError(f"{len(index.keys)} keys of {samples} samples")
    unlearned = index.unlearned_lengths
    if unlearned is not None and (
        len(unlearned) != samples or ((unlearned < 0) | (unlearned > index.caption_lengths)).any()
    ):
        raise ValueError("unlearned_lengths beyond caption_lengths")
    for starts, pointed in ((index.member_starts, index.offsets), (index.image_starts, index.image_sizes)):
        if len(starts) != samples + 1 or starts[0] or starts[-1] != len(pointed) or (starts < 0).any():
            raise ValueError("starts that do not go from the first to the end")
        if (np.diff(starts) < 0).any():
            raise ValueError("starts that do not count up to the end")
    if not len(index.extension_ids) == len(index.offsets) == len(index.sizes) == len(index.crcs):
        raise ValueError("columns of different lengths")
    ids = index.extension_ids
    if ((ids < 0) | (ids >= len(index.extensions))).any():
        raise ValueError("an extension that is not named")
    ends = index.offsets + index.sizes
    if ((index.offsets < TAR_BLOCK) | (index.sizes < 0) | (ends > index.num_bytes) | (ends < 0)).any():
        raise ValueError("a member outside the shard")
    if index.image_sizes.shape[1] != 2:
        raise ValueError("picture sizes that are no pairs")
    unsafe = [key for key in index.keys if "/" in key and not _is_safe(key)]
    if unsafe:
        raise ValueError(f"the unsafe key {unsafe[0]!r}")


def build_shard_index(tar: Path, name: str | None = None, texts: TextForm | None = None) -> ShardIndex:
    """Index a plain tar by reading it once. `UserError` when it is damaged or holds an unsafe name.

    Samples are grouped as webdataset does it: neighbours with one key. `name` is the shard's name when the
    file still has another one. With `texts` only pictures and the members that it reads are indexed, and what it leaves
    out is not.
    """
    tar = Path(tar)
    records: list[dict[str, Any]] = []
    left_out = set() if texts is None else set(texts.left_out)
    with tar.open("rb") as file:
        for key, extension, offset, size in _walk(file, tar):
            if texts is not None:
                if key in left_out or not (extension == texts.member or _IMAGE_MEMBER.fullmatch(extension)):
                    continue
                key = texts.key_prefix + key
            file.seek(offset)
            data = file.read(size)
            if not records or records[-1]["key"] != key:
                records.append({"key": key, "members": {}, "contents": {}})
            record = records[-1]
            if extension in record["members"]:
                raise UserError(
                    f"{tar}: holds {key}.{extension} twice: a sample's members must differ; pack it again"
                )
            record["members"][extension] = [offset, size, zlib.crc32(data)]
            kept = ("json", FEATURES_RECORD) if texts is None else (texts.member,)
            if extension in kept or _IMAGE_MEMBER.fullmatch(extension):
                record["contents"][extension] = data
            if len(records) > 1 and "contents" in records[-2]:
                _describe(records[-2], texts)
        if records:
            _describe(records[-1], texts)
        num_bytes = os.fstat(file.fileno()).st_size
    return _index_from_records(name or tar.name, num_bytes, records, texts)


def image_members(extensions: Iterable[str]) -> list[str]:
    """Return the extensions that are pictures, in the messages' order: jpg, or 0.jpg, 1.jpg ... 10.jpg."""
    matches = (_IMAGE_MEMBER.fullmatch(extension) for extension in extensions)
    pictures = [(int(match.group(1) or 0), match.group(0)) for match in matches if match]
    return [extension for _, extension in sorted(pictures)]


def probe_image(data: bytes) -> tuple[str, int, int]:
    """Return (extension, width, height) from a picture's header; ValueError says why it is none we take."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(BytesIO(data)) as image:
                extension = IMAGE_EXTENSIONS.get(image.format or "")
                kind = image.format
                width, height = image.size
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise ValueError(f"has more than {Image.MAX_IMAGE_PIXELS} pixels") from None
        except Exception:  # Pillow's parsers raise whatever a damaged header leads them to
            raise ValueError("not a readable picture" if data else "an empty file") from None
    if extension is None:
        raise ValueError(f"a {kind} picture, only JPEG, PNG, WebP, GIF, BMP and TIFF are taken")
    return extension, width, height


class ShardReader:
    """Read samples of one shard by number, each member's size and crc32 checked.

    Safe in threads, after a fork and after pickling, as its source is.
    """

    def __init__(self, source: ByteSource, index: ShardIndex) -> None:
        self.source = source
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def read(self, i: int) -> RawSample:
        """Return sample `i`, its text as `json` in our own form; raise `BadSample` when a byte is missing or wrong."""
        members = self._read(i, self.index.members(i))
        texts = self.index.texts
        if texts is not None:
            text = members.pop(texts.member, None)
            members["json"] = self._convert(i, text, texts)
        return RawSample(self.index.keys[i], members)

    def read_member(self, i: int, extension: str) -> bytes:
        """Return one member of sample `i`, as `read` does; raise `BadSample` when a byte of it is missing or wrong."""
        texts = self.index.texts if extension == "json" else None
        stored = extension if texts is None else texts.member
        member = self.index.members(i).get(stored)
        if member is None:
            raise BadSample(self.index.shard, self.index.keys[i], f"{stored}: missing member")
        data = self._read(i, {stored: member})[stored]
        return data if texts is None else self._convert(i, data, texts)

    def _convert(self, i: int, text: bytes | None, texts: TextForm) -> bytes:
        key = self.index.keys[i]
        if text is None:
            raise BadSample(self.index.shard, key, f"{texts.member}: missing member")
        try:
            return texts.to_sample_json(text, key, len(image_members(self.index.members(i))))
        except ValueError as error:
            raise BadSample(self.index.shard, key, f"{texts.member}: {error}") from None

    def _read(self, i: int, members: dict[str, Member]) -> dict[str, bytes]:
        found, fault = self._read_once(i, members)
        if fault is not None and self.source.reread():
            found, fault = self._read_once(i, members)
        if fault is not None:
            raise BadSample(self.index.shard, self.index.keys[i], fault)
        return found

    def _read_once(self, i: int, members: dict[str, Member]) -> tuple[dict[str, bytes], str | None]:
        """Return the members and the first fault in them."""
        try:
            data = self.source.read_ranges([(member.offset, member.size) for member in members.values()])
        except FileNotFoundError:
            raise BadSample(self.index.shard, self.index.keys[i], "missing shard file") from None
        except OSError as error:
            reason = f"shard cannot be read ({error.strerror or error})"
            raise BadSample(self.index.shard, self.index.keys[i], reason) from None
        found = dict(zip(members, data, strict=True))
        faults = (_fault(extension, found[extension], member) for extension, member in members.items())
        return found, next((fault for fault in faults if fault is not None), None)

    def close(self) -> None:
        """Close the source; a later read opens it again."""
        self.source.close()


def _fault(extension: str, data: bytes, member: Member) -> str | None:
    if len(data) < member.size:
        return f"{extension}: truncated, {len(data)} of {member.size} bytes"
    crc32 = zlib.crc32(data)
    if crc32 != member.crc32:
        return f"{extension}: checksum differs (crc32 {crc32:08x}, packed as {member.crc32:08x})"
    return None


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard in the manifest."""

    name: str
    num_bytes: int
    sha256: str
    index_sha256: str
    samples: int

    def to_json(self) -> dict[str, Any]:
        """Return the shard's entry in `manifest.json`."""
        fields = {"name": self.name, "bytes": self.num_bytes, "sha256": self.sha256}
        return {**fields, "index_sha256": self.index_sha256, "samples": self.samples}


@dataclass(frozen=True)
class Manifest:
    """All shards of a dataset folder."""

    shards: list[ShardEntry]
    packing: dict[str, Any] = field(default_factory=dict)  # how it was packed: for people
    # Of which tower and image settings the shards hold features instead of pictures; None: they hold pictures.
    features: dict[str, Any] | None = None
    # How the text members of another program's shards become messages, as the command said it; None: they are ours.
    texts: dict[str, Any] | None = None
    # Not a part of the fingerprint: neither bytes nor samples depend on it.
    captions: PackedCaptions = field(default_factory=PackedCaptions)

    @property
    def samples(self) -> int:
        """Return the number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def shard_sizes(self) -> np.ndarray:
        """Return the (shards,) int64 sample counts."""
        return np.array([shard.samples for shard in self.shards], dtype=np.int64)

    @property
    def fingerprint(self) -> str:
        """Return the sha256 over each shard's name, count and content, what features are bound to, how texts read."""
        content: list[Any] = [[shard.name, shard.samples, shard.sha256] for shard in self.shards]
        if self.features is not None:
            content.append(self.features)
        if self.texts is not None:
            content.append(self.texts)
        return hashlib.sha256(_compact(content).encode()).hexdigest()

    @classmethod
    def load(cls, place: str | Path | Storage) -> Manifest:
        """Read the `manifest.json` of a folder or URL. `UserError` when it is missing, damaged or another program's."""
        storage = open_storage(place) if isinstance(place, (str, Path)) else place
        folder = storage.location
        path = f"{folder}/{MANIFEST_NAME}"
        try:
            content = json.loads(storage.read_bytes(MANIFEST_NAME))
        except FileNotFoundError:
            if isinstance(storage, LocalStorage) and not storage.folder.is_dir():
                raise UserError(
                    f"{folder}: no such folder; it must be one that `shards pack` wrote"
                ) from None
            raise UserError(
                f"{folder}: holds no {MANIFEST_NAME}; it must be a folder that `shards pack` finished"
            ) from None
        except NotADirectoryError:
            raise UserError(f"{folder}: is a file; it must be a folder that `shards pack` wrote") from None
        except StorageError as error:
            raise UserError(
                f"{path}: cannot be read ({error}); check the URL and that its server is up"
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON ({error}): restore it, or pack again") from None
        return cls._from_json(content, path)

    @classmethod
    def _from_json(cls, content: Any, path: str) -> Manifest:
        remedy = "restore it, or pack again"
        kind = content.get("format") if isinstance(content, dict) else None
        if kind != MANIFEST_FORMAT:
            raise UserError(
                f"{path}: has format {kind!r}, a dataset's manifest has {MANIFEST_FORMAT!r}; "
                "name another folder"
            )
        if content.get("version") != MANIFEST_VERSION:
            raise UserError(
                f"{path}: has version {content.get('version')!r}, this program reads {MANIFEST_VERSION}; pack again"
            )
        try:
            shards = [
                ShardEntry(
                    name=str(shard["name"]),
                    num_bytes=int(shard["bytes"]),
                    sha256=str(shard["sha256"]),
                    index_sha256=str(shard["index_sha256"]),
                    samples=int(shard["samples"]),
                )
                for shard in content["shards"]
            ]
            features, texts = content.get("features"), content.get("texts")
            manifest = cls(
                shards,
                dict(content.get("packing") or {}),
                None if features is None else dict(features),
                None if texts is None else dict(texts),
                PackedCaptions.from_json(content.get("captions")),
            )
            stored = (content["samples"], content["fingerprint"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged ({type(error).__name__}: {error}): {remedy}") from None
        for shard in shards:
            if (
                shard.name != PurePosixPath(shard.name).name
                or shard.name in ("", ".", "..")
                or "\\" in shard.name
            ):
                raise UserError(
                    f"{path}: names the shard {shard.name!r}: must be a plain file name; {remedy}"
                )
        if stored != (manifest.samples, manifest.fingerprint):
            raise UserError(
                f"{path}: count or fingerprint do not fit its shards (edited or damaged): {remedy}"
            )
        return manifest

    def write(self, folder: Path) -> None:
        """Write `folder/manifest.json` at once: a reader sees the old one or all of the new one."""
        write_atomic(Path(folder) / MANIFEST_NAME, (json.dumps(self.to_json(), indent=1) + "\n").encode())

    def to_json(self) -> dict[str, Any]:
        """Return the content of `manifest.json`."""
        bound = {
            "features": self.features,
            "texts": self.texts,
            "captions": self.captions.to_json() or None,
        }
        return {
            "format": MANIFEST_FORMAT,
            "version": MANIFEST_VERSION,
            "samples": self.samples,
            "fingerprint": self.fingerprint,
            **{name: value for name, value in bound.items() if value is not None},
            "packing": self.packing,
            "shards": [shard.to_json() for shard in self.shards],
        }


def split_member_name(name: str) -> tuple[str, str] | None:
    """Return (key, extension) as webdataset splits a member's name, None for a member that it passes over."""
    if re.match(r"__[^/]*__($|/)", name):
        return None
    match = _KEY_AND_EXTENSION.fullmatch(name)
    return (match.group(1), match.group(2).lower()) if match else None


def _walk(file: Any, tar: Path) -> Iterator[tuple[str, str, int, int]]:
    """Yield (key, extension, offset, size) of each member; nothing is extracted."""
    num_bytes = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=_HeaderReads(file), mode="r:") as archive:  # type: ignore[arg-type]
            while (member := archive.next()) is not None:
                name = member.name
                if not _is_safe(name):
                    raise UserError(
                        f"{tar}: holds the unsafe name {name!r}: names must be relative, without '..'"
                    )
                if member.size < 0:  # tarfile would walk backwards, and round and round
                    raise UserError(f"{tar}: {name!r} has {member.size} bytes: restore it, or pack again")
                if member.isdir():
                    continue
                if not _is_unicode(name):
                    raise UserError(f"{tar}: holds the name {name!r}: names must be UTF-8; pack it again")
                if not member.isreg() or member.issparse():
                    raise UserError(
                        f"{tar}: {name!r} is a link or a device: only plain files may be in a shard"
                    )
                if member.offset_data + member.size > num_bytes:
                    raise UserError(f"{tar}: truncated in {name!r}: restore it, or pack again")
                split = split_member_name(name)
                if split is not None:
                    yield *split, member.offset_data, member.size
                vars(archive)["members"] = []  # else tarfile keeps them all
            end = archive.offset
    except UserError:
        raise
    except Exception as error:  # tarfile raises whatever a damaged header leads it to
        reason = str(error) or type(error).__name__
        raise UserError(f"{tar}: not a readable tar ({reason}): restore it, or pack again") from None
    # tarfile takes a damaged header for the end of the archive: only zeros may follow the last member
    if num_bytes - end < TAR_BLOCK or not _only_zeros(file, end):
        what = "a damaged header" if num_bytes > end else "no end mark (truncated)"
        raise UserError(f"{tar}: {what} at byte {end}: restore it, or pack again")


class _HeaderReads:
    """What tarfile may read of a shard: headers. An absurd size in one must not become an allocation."""

    def __init__(self, file: Any) -> None:
        self.tell, self.seek, self._read = file.tell, file.seek, file.read

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise ValueError(f"a header of {size} bytes")
        return self._read(size)


def _is_safe(name: str) -> bool:
    return not (name.startswith("/") or "\0" in name or ".." in PurePosixPath(name).parts)


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # tarfile gives bytes that are not UTF-8 as lone surrogates
        return False
    return True


def _only_zeros(file: Any, start: int) -> bool:
    file.seek(start)
    while chunk := file.read(1 << 20):
        if chunk.count(0) != len(chunk):
            return False
    return True


def _describe(record: dict[str, Any], texts: TextForm | None) -> None:
    """Replace a record's contents by what batching needs to know of them."""
    contents = record.pop("contents")
    if texts is not None:
        text, num_images = contents.pop(texts.member, b""), len(image_members(contents))
        with suppress(ValueError):
            contents["json"] = texts.to_sample_json(text, record["key"], num_images)
    record["images"] = [list(_size_or_zero(contents[extension])) for extension in image_members(contents)]
    if FEATURES_RECORD in contents:
        record["images"] = _noted_sizes(contents[FEATURES_RECORD])
    record["caption_length"], record["unlearned_length"] = _caption_lengths(contents.get("json", b""))


def _size_or_zero(data: bytes) -> tuple[int, int]:
    try:
        _, width, height = probe_image(data)
    except ValueError:
        return 0, 0
    return width, height


def _noted_sizes(data: bytes) -> list[list[int]]:
    """Return width and height of the pictures that features were made from, none when the record is damaged."""
    try:
        sizes = [[int(width), int(height)] for width, height in json.loads(data)["sizes"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    return sizes if all(0 <= side < 2**31 for size in sizes for side in size) else []


def _caption_lengths(data: bytes) -> tuple[int, int]:
    """Return the characters of the assistant's text and those not learned, 0 when the JSON is not in our form."""
    try:
        answers = [message for message in json.loads(data)["messages"] if message["role"] == "assistant"]
        lengths = [sum(len(part["text"]) for part in m["content"] if "text" in part) for m in answers]
        unlearned = [length for m, length in zip(answers, lengths, strict=True) if not is_learned(m)]
        return sum(lengths), sum(unlearned)
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0, 0


def _index_from_records(
    shard: str, num_bytes: int, records: list[dict[str, Any]], texts: TextForm | None
) -> ShardIndex:
    extension_ids: dict[str, int] = {}
    members = [member for record in records for member in record["members"].items()]
    ids = [extension_ids.setdefault(extension, len(extension_ids)) for extension, _ in members]
    images = [size for record in records for size in record["images"]]
    unlearned = np.array([record["unlearned_length"] for record in records], dtype=np.int32)
    return ShardIndex(
        shard=shard,
        num_bytes=num_bytes,
        keys=[record["key"] for record in records],
        extensions=list(extension_ids),
        member_starts=_starts(len(record["members"]) for record in records),
        extension_ids=np.array(ids, dtype=np.int32),
        offsets=np.array([member[0] for _, member in members], dtype=np.int64),
        sizes=np.array([member[1] for _, member in members], dtype=np.int64),
        crcs=np.array([member[2] for _, member in members], dtype=np.uint32),
        image_starts=_starts(len(record["images"]) for record in records),
        image_sizes=np.array(images, dtype=np.int32).reshape(-1, 2),
        caption_lengths=np.array([record["caption_length"] for record in records], dtype=np.int32),
        unlearned_lengths=unlearned if unlearned.any() else None,
        texts=texts,
    )


def _starts(counts: Iterable[int]) -> np.ndarray:
    return np.cumsum([0, *counts], dtype=np.int64)


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
