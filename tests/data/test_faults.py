"""Each fault of a shard on disk: what training leaves out and says of it, and what `shards verify` finds.

Training reads members at the offsets of the index and checks size and crc32, so it feeds the bytes that were packed or
none: a damaged tar header or padding does not touch it, and a tar that was written anew with the same members in the
same places is as good as the old one. `shards verify` compares every byte and names these too.
"""

import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

from qwenvl_dist.__main__ import main
from qwenvl_dist.data.batch import BadSampleRecord, CaptionBatch
from qwenvl_dist.data.chat import IGNORE
from qwenvl_dist.data.index import (
    TAR_BLOCK,
    Manifest,
    ShardIndex,
    build_shard_index,
    index_path,
    load_shard_index,
)
from qwenvl_dist.data.plan import StepLayout
from qwenvl_dist.data.sizes import ImageSizeRule
from qwenvl_dist.data.stream import SampleEncoder
from qwenvl_dist.data.verify import Fault as VerifyFault
from qwenvl_dist.data.verify import verify
from qwenvl_dist.errors import UserError
from qwenvl_dist.files import sha256_of
from tests.made_shards import (
    SIDE,
    Members,
    jpeg,
    key_of,
    scene_members,
    seal,
    stream,
    write_shards,
    write_tar,
)

SIZES = (4, 3, 5)
HIT = 1  # the shard that is damaged
NAME = f"shard-{HIT:06d}.tar"
ALL = range(SIZES[HIT])


def samples_of(shard: int) -> list[Members]:
    first = sum(SIZES[:shard])
    return [scene_members(number) for number in range(first, first + SIZES[shard])]


@pytest.fixture(scope="module")
def encoder(scenes_processor: Any) -> SampleEncoder:
    return SampleEncoder(scenes_processor, ImageSizeRule(side=SIDE), 256)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intact") / "shards"
    return write_shards(folder, [samples_of(shard) for shard in range(len(SIZES))])


@pytest.fixture
def folder(tmp_path: Path, intact: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "shards"))


# --- what training sees ---


def bad_of(batches: Sequence[CaptionBatch]) -> list[BadSampleRecord]:
    return [record for batch in batches for record in batch.bad]


def micro_batches(
    folder: Path, encoder: SampleEncoder, layout: StepLayout, by_length: bool = False
) -> list[CaptionBatch]:
    """All micro-batches of two epochs, in the order of the plan, over all ranks."""
    options: Any = {"layout": layout, "epochs": 2, "length_grouping": by_length}
    ranks = [stream(folder, encoder, rank=rank, **options).iterate() for rank in range(layout.world_size)]
    steps = zip(*ranks, strict=True)  # every rank has the same number of steps
    return [
        step[rank][j] for step in steps for j in range(layout.grad_accum_steps) for rank in range(len(ranks))
    ]


def planned_keys(folder: Path, encoder: SampleEncoder, layout: StepLayout) -> list[tuple[str, ...]]:
    """The keys that the plan puts into each micro-batch."""
    plan, size = stream(folder, encoder, epochs=2).plan, layout.micro_batch_size
    slots = layout.steps(plan.total_samples) * layout.global_batch_size
    keys = [place and key_of(place.shard, place.sample) for place in plan.locate(0, slots)]
    return [tuple(filter(None, keys[start : start + size])) for start in range(0, slots, size)]


def slots_of(batch: CaptionBatch) -> list[str | None]:
    """The key in each row of an undamaged batch; None for a dummy."""
    keys = iter(batch.keys)
    return [next(keys) if (row != IGNORE).any() else None for row in batch.labels]


def assert_only_lost(
    whole: Sequence[CaptionBatch], torn: Sequence[CaptionBatch], lost: dict[str, str]
) -> None:
    """Every row of `torn` is that of `whole`, or a dummy with its record."""
    assert len(whole) == len(torn)
    for before, after in zip(whole, torn, strict=True):
        slots = slots_of(before)
        assert after.positions == before.positions
        assert after.keys == tuple(key for key in slots if key and key not in lost)
        assert [named(bad) for bad in after.bad] == [key for key in slots if key in lost]
        assert all(bad.shard == NAME and lost[named(bad)] in bad.reason for bad in after.bad), after.bad
        for row, key in enumerate(slots):
            if key in lost:
                assert (after.labels[row] == IGNORE).all()
                assert after.grids[row] == (1, 2, 2) and not pixels_of(after, row).any()
            else:
                assert after.grids[row] == before.grids[row]
                assert torch.equal(pixels_of(after, row), pixels_of(before, row))
                width = min(after.labels.shape[1], before.labels.shape[1])  # the rest is padding
                assert torch.equal(after.input_ids[row, :width], before.input_ids[row, :width])
                assert torch.equal(after.labels[row, :width], before.labels[row, :width])


def named(bad: BadSampleRecord) -> str:
    """The key of a bad sample; without an index it goes by its number in the shard."""
    return key_of(HIT, int(bad.key[1:])) if bad.key.startswith("#") else bad.key


def pixels_of(batch: CaptionBatch, row: int) -> torch.Tensor:
    """The picture of one row, in a batch with one a row."""
    ends = accumulate((3 * 14 * 14 * height * width for _, height, width in batch.grids), initial=0)
    start, end = list(pairwise(ends))[row]
    return batch.pixels[start:end]


@pytest.fixture(scope="module")
def whole(intact: Path, encoder: SampleEncoder) -> Callable[..., list[CaptionBatch]]:
    return cache(partial(micro_batches, intact, encoder))


LAYOUTS = (StepLayout(1, 3, 2), StepLayout(3, 2, 1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_damage_each_slot_holds_the_plans_sample(
    folder: Path, encoder: SampleEncoder, whole: Callable[..., list[CaptionBatch]], layout: StepLayout
) -> None:
    assert [batch.keys for batch in whole(layout)] == planned_keys(folder, encoder, layout)


# --- damage ---


def put(folder: Path, position: int, data: bytes) -> None:
    with (folder / NAME).open("r+b") as file:
        file.seek(position)
        file.write(data)


def flip(folder: Path, position: int, bit: int = 0) -> None:
    content = (folder / NAME).read_bytes()
    put(folder, position, bytes([content[position] ^ (1 << bit)]))


def place_of(folder: Path, sample: int, extension: str) -> tuple[int, int]:
    member = build_shard_index(folder / NAME).members(sample)[extension]
    return member.offset, member.size


def flip_payload(folder: Path, extension: str) -> None:
    offset, size = place_of(folder, 1, extension)
    flip(folder, offset + size // 2, bit=3)


def flip_header(folder: Path, extension: str, byte: int) -> None:
    flip(folder, place_of(folder, 1, extension)[0] - TAR_BLOCK + byte)


def flip_padding(folder: Path) -> None:
    offset, size = place_of(folder, 1, "jpg")
    assert size % TAR_BLOCK
    flip(folder, offset + size)


def zero_block(folder: Path, before_data: int) -> None:
    offset, size = place_of(folder, 1, "jpg")
    assert size >= 2 * TAR_BLOCK
    put(folder, offset - before_data, bytes(TAR_BLOCK))


def rewrite(folder: Path, samples: list[Members]) -> None:
    write_tar(folder / NAME, HIT, samples)


def without(extension: str) -> list[Members]:
    samples = samples_of(HIT)
    del samples[1][extension]
    return samples


def with_picture(data: bytes) -> list[Members]:
    samples = samples_of(HIT)
    samples[1]["jpg"] = data
    return samples


def with_larger_picture() -> list[Members]:
    return with_picture(jpeg(1, side=90))


def repack(folder: Path, samples: list[Members]) -> None:
    """Write the shard anew, with index and manifest: what a packer made from bad input gives."""
    rewrite(folder, samples)
    seal(folder)


def add_member(folder: Path, name: str, **fields: Any) -> None:
    """Add a small member behind the last."""
    info = tarfile.TarInfo(name)
    info.size = 0 if fields else 9
    for field, value in fields.items():
        setattr(info, field, value)
    with tarfile.open(folder / NAME, "a") as tar:
        tar.addfile(info, io.BytesIO(b"something"))


def put_page(folder: Path, size: int | None = None) -> None:
    """An error page of a proxy, stored under the shard's name; `size` as a download tool preallocates it."""
    page = b"<!DOCTYPE html><html><body>404 not found</body></html>\n"
    (folder / NAME).write_bytes(page if size is None else page.ljust(size, b" "))


def replace_with_other_folder_here(folder: Path) -> None:
    (folder / NAME).unlink()
    (folder / NAME).mkdir()


def touch_headers(folder: Path) -> None:
    """Write the same members at the same places, with another time and mode."""
    with tarfile.open(folder / NAME, "w") as tar:
        for sample, members in enumerate(samples_of(HIT)):
            for extension, data in sorted(members.items()):
                info = tarfile.TarInfo(f"{key_of(HIT, sample)}.{extension}")
                info.size, info.mtime = len(data), 1_700_000_000
                tar.addfile(info, io.BytesIO(data))


def put_older_index(folder: Path, samples: list[Members]) -> None:
    """The shard and the manifest are of now, the index is of a shard that held `samples`."""
    current = (folder / NAME).read_bytes()
    rewrite(folder, samples)
    older = build_shard_index(folder / NAME).to_bytes()
    (folder / NAME).write_bytes(current)
    index_path(folder / NAME).write_bytes(older)


def put_index(folder: Path, change: Callable[[ShardIndex], dict[str, Any]]) -> None:
    """Replace columns of the index; the manifest names the new one, so that only its content can tell."""
    path = index_path(folder / NAME)
    index = load_shard_index(path)
    path.write_bytes(replace(index, **change(index)).to_bytes())
    manifest = Manifest.load(folder)
    entries = [replace(e, index_sha256=sha256_of(path)) if e.name == NAME else e for e in manifest.shards]
    Manifest(entries).write(folder)


def with_value(column: np.ndarray, at: int, value: int) -> np.ndarray:
    changed = column.copy()
    changed[at] = value
    return changed


def put_value(folder: Path, column: str, at: int, value: int) -> None:
    put_index(folder, lambda index: {column: with_value(getattr(index, column), at, value)})


@dataclass(frozen=True)
class Fault:
    """Some damage, the samples of `NAME` that training loses with a word of the reason, and what verify names."""

    damage: Callable[[Path], object]
    lost: dict[int, str]
    found: set[int | None]  # None: the shard itself


def every(reason: str) -> dict[int, str]:
    return dict.fromkeys(ALL, reason)


FAULTS = {
    # bytes that rotted
    "bit in a picture": Fault(partial(flip_payload, extension="jpg"), {1: "jpg: checksum differs"}, {1}),
    "bit in a text": Fault(partial(flip_payload, extension="json"), {1: "json: checksum differs"}, {1}),
    "bit in a header's name": Fault(partial(flip_header, extension="jpg", byte=1), {}, {1}),
    "bit in a header's size": Fault(partial(flip_header, extension="json", byte=130), {}, {1}),
    "bit in a header's checksum": Fault(partial(flip_header, extension="jpg", byte=149), {}, {1}),
    "bit in the padding": Fault(flip_padding, {}, {1}),
    "bit behind the end": Fault(lambda f: flip(f, (f / NAME).stat().st_size - 1), {}, {None}),
    "zeroed block in a picture": Fault(partial(zero_block, before_data=-TAR_BLOCK), {1: "checksum differs"}, {1}),
    "zeroed header": Fault(partial(zero_block, before_data=TAR_BLOCK), {}, {1}),
    "zeroed header and picture": Fault(partial(zero_block, before_data=TAR_BLOCK // 2), {1: "checksum differs"}, {1}),
    # another tar than the one that was indexed
    "missing shard": Fault(lambda f: (f / NAME).unlink(), every("missing shard file"), {*ALL}),
    "folder for a shard": Fault(replace_with_other_folder_here, every("directory"), {None}),
    "empty file": Fault(lambda f: os.truncate(f / NAME, 0), every("truncated, 0 of"), {*ALL}),
    "page": Fault(put_page, every("truncated, 0 of"), {*ALL}),
    "page as long as the shard": Fault(
        lambda f: put_page(f, (f / NAME).stat().st_size), every("checksum differs"), {*ALL}
    ),
    "other samples in its place": Fault(lambda f: rewrite(f, samples_of(2)), every("jpg: "), {*ALL}),
    "one sample changed": Fault(
        lambda f: rewrite(f, with_larger_picture()), {1: "jpg: checksum differs", 2: "jpg: "}, {1, 2}
    ),
    "sample dropped": Fault(lambda f: rewrite(f, samples_of(HIT)[:2]), {2: "jpg: "}, {2}),
    "order changed": Fault(lambda f: rewrite(f, samples_of(HIT)[::-1]), {0: "jpg: ", 2: "jpg: "}, {0, 2}),
    "picture dropped": Fault(lambda f: rewrite(f, without("jpg")), {1: "jpg: ", 2: "jpg: "}, {1, 2}),
    "text dropped": Fault(lambda f: rewrite(f, without("json")), {1: "json: ", 2: "jpg: "}, {1, 2}),
    "same members, other headers": Fault(touch_headers, {}, {None}),
    "grown": Fault(lambda f: rewrite(f, [*samples_of(HIT), scene_members(40)]), {}, {None}),
    "member twice": Fault(lambda f: add_member(f, f"{key_of(HIT, 2)}.jpg"), {}, {None}),
    "absolute name": Fault(lambda f: add_member(f, "/tmp/x.jpg"), {}, {None}),
    "name that climbs": Fault(lambda f: add_member(f, "../x.jpg"), {}, {None}),
    "symbolic link": Fault(lambda f: add_member(f, "x.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"), {}, {None}),
    "hard link": Fault(lambda f: add_member(f, "x.jpg", type=tarfile.LNKTYPE, linkname="y"), {}, {None}),
    "device": Fault(lambda f: add_member(f, "x.jpg", type=tarfile.BLKTYPE), {}, {None}),
    "pipe": Fault(lambda f: add_member(f, "x.jpg", type=tarfile.FIFOTYPE), {}, {None}),
    # an index that is not the manifest's: none of its samples can be trusted
    "missing index": Fault(lambda f: index_path(f / NAME).unlink(), every("index is missing"), {None}),
    "empty index": Fault(lambda f: index_path(f / NAME).write_bytes(b""), every("sha256 differs"), {None}),
    "page for an index": Fault(
        lambda f: index_path(f / NAME).write_bytes(b"<html></html>"), every("sha256 differs"), {None}
    ),
    "index of another shard": Fault(
        lambda f: shutil.copy(index_path(f / "shard-000000.tar"), index_path(f / NAME)), every("sha256 differs"), {None}
    ),
    "index of fewer samples": Fault(
        lambda f: put_older_index(f, samples_of(HIT)[:2]), every("sha256 differs"), {None}
    ),
    "index of another sample": Fault(
        lambda f: put_older_index(f, with_larger_picture()), every("sha256 differs"), {1, 2}
    ),
    # an index that the manifest names, and that lies
    "member of 100 GB": Fault(
        partial(put_value, column="sizes", at=5, value=100 << 30), every("a member outside"), {None}
    ),
    "member and shard of 100 GB": Fault(
        lambda f: put_index(f, lambda i: {"sizes": with_value(i.sizes, 5, 100 << 30), "num_bytes": 200 << 30}),
        {2: "truncated"}, {2},
    ),
    "negative size": Fault(
        partial(put_value, column="sizes", at=0, value=-1), every("a member outside"), {None}
    ),
    "offset behind the end": Fault(
        partial(put_value, column="offsets", at=0, value=1 << 40), every("a member outside"), {None}
    ),
    "offset of another member": Fault(
        lambda f: put_index(f, lambda i: {"offsets": with_value(i.offsets, 2, int(i.offsets[0]))}), {1: "jpg: "}, {1}
    ),
    "unsafe key in the index": Fault(
        lambda f: put_index(f, lambda i: {"keys": ["../../x", *i.keys[1:]]}), every("unsafe key"), {None}
    ),
    # packed so: every checksum fits
    "packed without picture": Fault(
        lambda f: repack(f, without("jpg")), {1: "name 1 images, 0 lie beside them"}, {1}
    ),
    "packed without text": Fault(lambda f: repack(f, without("json")), {1: "json: missing member"}, {1}),
    "packed with a cut picture": Fault(
        lambda f: repack(f, with_picture(samples_of(HIT)[1]["jpg"][:-100])), {1: "truncated"}, {1}
    ),
    "packed with a page": Fault(
        lambda f: repack(f, with_picture(b"<html></html>")), {1: "not a picture"}, {1}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_training_loses_the_samples_hit_and_no_other(
    folder: Path, encoder: SampleEncoder, whole: Callable[..., list[CaptionBatch]], name: str
) -> None:
    fault = FAULTS[name]
    fault.damage(folder)
    lost = {key_of(HIT, sample): reason for sample, reason in fault.lost.items()}
    for layout in LAYOUTS:
        torn = micro_batches(folder, encoder, layout)
        assert_only_lost(whole(layout), torn, lost)
        assert len(bad_of(torn)) == 2 * len(lost)  # two epochs


def is_readable(folder: Path) -> bool:
    """Whether the index of the damaged shard still tells its samples' lengths."""
    try:
        load_shard_index(index_path(folder / NAME), Manifest.load(folder).shards[HIT].index_sha256)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("samples", [2, 4])
@pytest.mark.parametrize("by_length", [False, True])
def test_an_index_that_contradicts_the_manifests_count_is_not_used(
    folder: Path, encoder: SampleEncoder, samples: int, by_length: bool
) -> None:
    """More in the index would be passed over in silence; fewer, and the plan asks for what is not there."""
    entries = Manifest.load(folder).shards
    Manifest([replace(e, samples=samples) if e.name == NAME else e for e in entries]).write(folder)
    torn = micro_batches(folder, encoder, LAYOUTS[1], by_length)
    assert {bad.key for bad in bad_of(torn)} == {f"#{sample}" for sample in range(samples)}
    assert all(f"holds 3 samples, the manifest says {samples}" in bad.reason for bad in bad_of(torn))
    assert {(fault.shard, fault.key) for fault in verify(folder).bad} == {(NAME, None)}


@pytest.mark.parametrize("name", FAULTS)
def test_dealt_by_length_no_sample_leaves_its_step(
    folder: Path, encoder: SampleEncoder, whole: Callable[..., list[CaptionBatch]], name: str
) -> None:
    """Whatever the index says of lengths, or cannot say any more."""
    fault, layout = FAULTS[name], LAYOUTS[1]
    fault.damage(folder)
    lost = {key_of(HIT, sample) for sample in fault.lost}
    torn = micro_batches(folder, encoder, layout, by_length=True)
    of_a_step = layout.world_size * layout.grad_accum_steps
    for start in range(0, len(torn), of_a_step):
        before, after = (batches[start : start + of_a_step] for batches in (whole(layout, True), torn))
        planned = {key for batch in before for key in batch.keys}
        assert {key for batch in after for key in batch.keys} == planned - lost
        assert sorted(named(bad) for bad in bad_of(after)) == sorted(planned & lost)
    if not name.startswith("packed") and is_readable(folder):
        reasons = {key_of(HIT, sample): reason for sample, reason in fault.lost.items()}
        assert_only_lost(whole(layout, True), torn, reasons)  # each row where it was


@pytest.mark.parametrize("name", FAULTS)
def test_verify_names_the_shard_and_the_samples_hit(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    fault = FAULTS[name]
    fault.damage(folder)
    assert main(["shards", "verify", str(folder), "--json", "--workers", "1"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["shards"], report["samples"]) == (len(SIZES), Manifest.load(folder).samples)
    keys = {sample if sample is None else key_of(HIT, sample) for sample in fault.found}
    assert {(bad["shard"], bad["key"]) for bad in report["bad"]} == {(NAME, key) for key in keys}
    assert all(bad["reason"] for bad in report["bad"])


def test_several_faults_are_found_in_parallel_and_nothing_is_extracted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_payload(folder, "jpg")
    add_member(folder, "../escaped.jpg")
    (folder / "shard-000000.tar").unlink()
    index_path(folder / "shard-000002.tar").unlink()
    monkeypatch.chdir(folder)
    before = sorted(folder.parent.rglob("*"))
    alone, done = verify(folder, 1), []
    assert verify(folder, 2, done.append) == alone
    assert done == list(SIZES)
    assert [(fault.shard, fault.key) for fault in alone.bad] == [
        *(("shard-000000.tar", key_of(0, sample)) for sample in range(SIZES[0])),
        (NAME, key_of(HIT, 1)),
        ("shard-000002.tar", None),
    ]
    assert sorted(folder.parent.rglob("*")) == before


def test_truncation_at_any_block_loses_what_is_cut(
    folder: Path, encoder: SampleEncoder, whole: Callable[..., list[CaptionBatch]]
) -> None:
    index, content = load_shard_index(index_path(folder / NAME)), (folder / NAME).read_bytes()
    layout = StepLayout(2, 2, 1)
    counts = set()
    for size in range(0, len(content), TAR_BLOCK):
        (folder / NAME).write_bytes(content[:size])
        lost = {
            key: "truncated"
            for i, key in enumerate(index.keys)
            if any(member.offset + member.size > size for member in index.members(i).values())
        }
        assert_only_lost(whole(layout), micro_batches(folder, encoder, layout), lost)
        assert {fault.key for fault in verify(folder).bad} == (set(lost) or {None})
        counts.add(len(lost))
    assert counts == {0, 1, 2, 3}


def test_a_key_twice_is_two_samples_to_training_and_a_fault_to_verify(
    folder: Path, encoder: SampleEncoder
) -> None:
    """Training goes by places; who names samples by their keys needs them to differ."""
    with webdataset.TarWriter(str(folder / NAME), encoder=False) as writer:
        for key, members in zip(("a", "b", "a"), samples_of(HIT), strict=True):
            writer.write({"__key__": key, **members})
    seal(folder)
    batches = micro_batches(folder, encoder, StepLayout(1, 3, 2))
    keys = Counter(key for batch in batches for key in batch.keys)
    assert (keys["a"], keys["b"], keys.total()) == (4, 2, 2 * sum(SIZES)) and not bad_of(batches)
    assert verify(folder).bad == [VerifyFault(NAME, "a", f"duplicate key, first in {NAME}")]
