"""Shards that another program wrote -> indexes and a manifest beside them. The tars are read, never written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from qwenvl_dist.data.captions import CaptionsMode, PackedCaptions
from qwenvl_dist.data.foreign import TextForm, prefix_of
from qwenvl_dist.data.formats import TextRules, parse_sample_json
from qwenvl_dist.data.formats.messages import CAPTION_FIELDS
from qwenvl_dist.data.index import (
    FEATURES,
    FEATURES_RECORD,
    MANIFEST_NAME,
    BadSample,
    Manifest,
    ShardEntry,
    ShardIndex,
    ShardReader,
    build_shard_index,
    index_path,
    load_shard_index,
    parse_shard_index,
    probe_image,
    split_member_name,
)
from qwenvl_dist.data.keys import KeyLog
from qwenvl_dist.data.pack import UNFINISHED_NAME, Skipped, locked
from qwenvl_dist.data.parallel import map_in_order
from qwenvl_dist.data.storage import LocalFile, is_remote
from qwenvl_dist.errors import UserError
from qwenvl_dist.files import fsync, sha256_of

_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2?|txz)$")
PENDING = ".new"  # behind an index file's name until all shards are found good


@dataclass(frozen=True)
class ReindexReport:
    """What `reindex` did."""

    manifest: Manifest
    skipped: list[Skipped]
    is_new: bool  # False: the folder was indexed just so before


@dataclass(frozen=True)
class _Indexed:
    entry: ShardEntry
    skipped: list[Skipped]


def reindex(
    folder: str | Path,
    *,
    member: str | None = None,
    caption_field: str | None = None,
    rules: TextRules,
    mode: CaptionsMode | None = None,
    workers: int = 1,
    skip_bad: bool = False,
    advance: Callable[[int], None] = lambda n: None,
) -> ReindexReport:
    """Index the tars of a local folder in place; over a folder that is indexed just so do nothing.

    `member` and `caption_field` say where the texts are; without them the first sample is looked at. A sample that
    cannot be used is a `UserError`; with `skip_bad` it is left out of the index, and named in the manifest. Where
    shards use the same keys, each key gets its shard's name in front. `mode` is noted in the manifest.
    `advance` hears of samples.
    """
    if is_remote(folder):
        raise UserError(
            f"{folder}: is a URL; shards are indexed in a folder: index them where they lie, or fetch them to one"
        )
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"{folder}: is a file; name the folder that holds it")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the one that holds the .tar files")
    tars = sorted(folder.glob("*.tar"))
    packed = sorted(path.name for path in folder.iterdir() if _COMPRESSED.search(path.name))
    if packed:
        more = " and others" if len(packed) > 1 else ""
        raise UserError(
            f"{folder}: holds compressed shards, {packed[0]}{more}, in which no sample can be found without reading "
            "all before it: unpack them, or move them away"
        )
    if not tars:
        raise UserError(f"{folder}: holds no .tar file; name the folder they are in")
    finished = Manifest.load(folder) if (folder / MANIFEST_NAME).exists() else None
    _check_others(tars)
    if workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    form = _form_of_first(tars, member, caption_field, rules)
    try:
        with locked(folder / UNFINISHED_NAME), _pending(tars):
            captions = PackedCaptions(rules.join, mode)
            report = _index_all(folder, tars, form, captions, workers, skip_bad, finished, advance)
            (folder / UNFINISHED_NAME).unlink()
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}): the indexes lie beside the shards"
        ) from None
    return report


def _index_all(
    folder: Path,
    tars: list[Path],
    form: TextForm | None,
    captions: PackedCaptions,
    workers: int,
    skip_bad: bool,
    finished: Manifest | None,
    advance: Callable[[int], None],
) -> ReindexReport:
    made: list[_Indexed] = []
    with KeyLog() as keys:
        for one in map_in_order(partial(_index_shard, form, skip_bad), tars, min(workers, len(tars))):
            made.append(one)
            for key in _pending_index(folder / one.entry.name).keys:
                keys.add(key)
            advance(one.entry.samples)
        prefix_keys = not keys.all_differ()
    if prefix_keys:
        if form is None:
            raise UserError(
                f"{folder}: two samples have one key, and `KEY.json` of our own form: pack them again"
            )
        made = [replace(one, entry=_with_prefix(folder / one.entry.name, one.entry)) for one in made]
    skipped = [bad for one in made for bad in one.skipped]
    if not sum(one.entry.samples for one in made):
        raise UserError(f"{folder}: holds no sample that could be used")
    texts = None
    if form is not None:
        texts = {
            name: value for name, value in form.to_json().items() if name not in ("key_prefix", "left_out")
        }
        texts = {**texts, "prefix_keys": prefix_keys}
    notes = {"source": "webdataset", "skipped": [vars(bad) for bad in skipped]}
    manifest = Manifest([one.entry for one in made], notes, texts=texts, captions=captions)
    if finished is not None:
        if finished.fingerprint != manifest.fingerprint:
            raise UserError(
                f"{folder / MANIFEST_NAME}: is of other shards or other options: remove it to index them anew"
            )
        intact = all(
            index_path(tar).is_file() and sha256_of(index_path(tar)) == one.entry.index_sha256
            for tar, one in zip(tars, made, strict=True)
        )
        if intact:
            if finished.captions != captions:
                manifest.write(folder)
            return ReindexReport(manifest, skipped, is_new=False)
    for tar in tars:
        _pending_path(tar).replace(index_path(tar))
    fsync(folder)
    manifest.write(folder)
    return ReindexReport(manifest, skipped, is_new=True)


def _index_shard(form: TextForm | None, skip_bad: bool, tar: Path) -> _Indexed:
    """Index one shard under a pending name, every sample looked at."""
    index = build_shard_index(tar, texts=form)
    if len(set(index.keys)) < len(index):
        key = next(key for n, key in enumerate(index.keys) if key in index.keys[:n])
        raise UserError(
            f"{tar}: holds the key {key!r} twice: a sample's members must lie together; pack it again"
        )
    skipped = list(_faults(tar, index))
    if skipped and not skip_bad:
        raise UserError(
            f"{tar}: {skipped[0].key}: {skipped[0].reason}: mend it, or leave such samples out with --skip-bad"
        )
    if skipped:
        if form is None:
            raise UserError(f"{tar}: {skipped[0].key}: {skipped[0].reason}: pack it again")
        form = replace(form, left_out=tuple(bad.key for bad in skipped))
        index = build_shard_index(tar, texts=form)
    return _Indexed(_write_pending(tar, index, sha256_of(tar)), skipped)


def _faults(tar: Path, index: ShardIndex) -> Iterator[Skipped]:
    """Yield the samples whose text or pictures cannot be used."""
    with contextlib.closing(ShardReader(LocalFile(tar), index)) as reader:
        for i, key in enumerate(index.keys):
            try:
                raw = reader.read(i)
                parse_sample_json(raw.json, len(raw.images))
                for data in raw.images:
                    probe_image(data)
            except BadSample as error:
                yield Skipped(key, error.reason)
            except ValueError as error:
                yield Skipped(key, str(error))


def _write_pending(tar: Path, index: ShardIndex, sha256: str) -> ShardEntry:
    data = index.to_bytes()
    with _pending_path(tar).open("wb") as file:
        file.write(data)
    fsync(_pending_path(tar))
    return ShardEntry(tar.name, index.num_bytes, sha256, hashlib.sha256(data).hexdigest(), len(index))


def _with_prefix(tar: Path, entry: ShardEntry) -> ShardEntry:
    index = _pending_index(tar)
    assert index.texts is not None
    prefix = prefix_of(tar.name)
    keys = [prefix + key for key in index.keys]
    return _write_pending(
        tar, replace(index, keys=keys, texts=replace(index.texts, key_prefix=prefix)), entry.sha256
    )


def _pending_path(tar: Path) -> Path:
    return index_path(tar).with_name(index_path(tar).name + PENDING)


def _pending_index(tar: Path) -> ShardIndex:
    path = _pending_path(tar)
    return parse_shard_index(path.read_bytes(), str(path))


@contextlib.contextmanager
def _pending(tars: list[Path]) -> Iterator[None]:
    """Leave no pending index behind, and nothing at all when it fails."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            (tars[0].parent / UNFINISHED_NAME).unlink()
        raise
    finally:
        for tar in tars:
            _pending_path(tar).unlink(missing_ok=True)


def _check_others(tars: list[Path]) -> None:
    """Raise UserError where a file of another program has the name of an index."""
    for tar in tars:
        if index_path(tar).exists():
            try:
                load_shard_index(index_path(tar))
            except UserError as error:
                raise UserError(f"{error}: move it away, the shard's index takes its name") from None


def _form_of_first(
    tars: list[Path], member: str | None, caption_field: str | None, rules: TextRules
) -> TextForm | None:
    """Return how the texts read, by the first sample; None for our own form."""
    folder, members = tars[0].parent, _first_sample(tars)
    if FEATURES in members or FEATURES_RECORD in members:
        raise UserError(f"{folder}: holds vision features, whose manifest cannot be made again: encode anew")
    if not members:
        raise UserError(f"{folder}: holds no sample in its {len(tars)} tars; name the folder of filled ones")
    if member is None:
        member = "txt" if "txt" in members and caption_field is None else "json"
    if member not in members:
        raise UserError(
            f"{folder}: the first sample has the members {', '.join(members)}, no {member!r}: "
            "name the one that holds the text with --text-member"
        )
    if member != "json" and caption_field is not None:
        raise UserError(
            f"--caption-field {caption_field}: is for a text in json, not in {member}; drop one of the two"
        )
    if member == "json" and caption_field is None:
        with contextlib.suppress(ValueError):
            parse_sample_json(members["json"])
            return None
        caption_field = _caption_field(members["json"], f"{tars[0]}: the first sample's json")
    return TextForm(member, caption_field, rules.prompt, rules.join, rules.keep_white_space)


def _caption_field(data: bytes, where: str) -> str | None:
    """Return which member holds the caption, None for a conversation."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is not JSON ({error}): mend it, or name another with --text-member"
        ) from None
    names = list(record) if isinstance(record, dict) else []
    if "messages" in names or "conversations" in names:
        return None
    for name in CAPTION_FIELDS:
        if name in names:
            return name
    raise UserError(
        f"{where} has {', '.join(names)[:80] or 'no members'}, none of {', '.join(CAPTION_FIELDS)}, messages, "
        "conversations: name the caption's with --caption-field"
    )


def _first_sample(tars: list[Path]) -> dict[str, bytes]:
    """Return the members of the first sample, by extension."""
    for tar in tars:
        found: dict[str, bytes] = {}
        first = None
        try:
            with tarfile.open(tar, "r:") as archive:
                for info in archive:
                    split = split_member_name(info.name) if info.isreg() else None
                    if split is None:
                        continue
                    if first is not None and split[0] != first:
                        break
                    first = split[0]
                    file = archive.extractfile(info)
                    found[split[1]] = file.read() if file is not None else b""
        except tarfile.TarError as error:
            raise UserError(
                f"{tar}: not a readable tar ({error}): restore it; compressed ones are unpacked first"
            ) from None
        if found:
            return found
    return {}
