"""The stream on packed scenes: order, exactness, bad samples, and what a batch claims."""

import gc
import io
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from qwenvl_dist.data.batch import CaptionBatch
from qwenvl_dist.data.chat import IGNORE
from qwenvl_dist.data.images import decode, resize
from qwenvl_dist.data.index import Manifest, build_shard_index
from qwenvl_dist.data.plan import RunPlan, StepLayout
from qwenvl_dist.data.sizes import ImageSizeRule
from qwenvl_dist.data.source import PlannedSource, ShardSet
from qwenvl_dist.data.stream import CaptionStream, SampleEncoder
from tests.made_shards import (
    SIDE,
    Members,
    jpeg,
    key_of,
    keys_of,
    record,
    scene_members,
    stream,
    write_shards,
)

UNEVEN = (7, 1, 13, 0, 5)


def write_uneven(folder: Path, cut: int | None = None) -> Path:
    """Pack 26 scenes in shards of 7, 1, 13, 0 and 5; the picture numbered `cut` is packed without its end."""
    samples = [scene_members(number) for number in range(sum(UNEVEN))]
    if cut is not None:
        samples[cut]["jpg"] = samples[cut]["jpg"][:-100]
    waiting = iter(samples)
    return write_shards(folder, [[next(waiting) for _ in range(size)] for size in UNEVEN])


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_uneven(tmp_path_factory.mktemp("uneven") / "shards")


@pytest.fixture(scope="module")
def encoder(scenes_processor: Any) -> SampleEncoder:
    return SampleEncoder(scenes_processor, ImageSizeRule(side=SIDE), 256)


def assert_same(one: CaptionBatch, other: CaptionBatch) -> None:
    for name, value in vars(one).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(other, name)), name
        else:
            assert value == getattr(other, name), name


def all_keys(sizes: Sequence[int] = UNEVEN) -> list[str]:
    return [key_of(shard, place) for shard, size in enumerate(sizes) for place in range(size)]


# --- order ---


def test_number_of_workers_changes_nothing(uneven: Path, encoder: SampleEncoder) -> None:
    expected = list(stream(uneven, encoder, epochs=2).iterate())
    assert len(expected) == 9 and all(len(step) == 2 for step in expected)
    for workers in (1, 2, 3):
        arrived = list(stream(uneven, encoder, epochs=2, workers=workers).iterate())
        assert len(arrived) == len(expected)
        for ours, theirs in zip(arrived, expected, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert_same(one, other)


@pytest.mark.parametrize(("world", "micro", "accumulation"), [(3, 2, 1), (3, 1, 2), (2, 4, 3), (3, 30, 1)])
def test_ranks_together_see_each_sample_once_an_epoch(
    uneven: Path, encoder: SampleEncoder, world: int, micro: int, accumulation: int
) -> None:
    layout = StepLayout(world, micro, accumulation)
    ranks = [
        list(stream(uneven, encoder, layout=layout, rank=rank, epochs=2).iterate()) for rank in range(world)
    ]
    # No rank waits for another: all run the same steps with the same number of micro-batches.
    assert {len(steps) for steps in ranks} == {-(-2 * 26 // layout.global_batch_size)}
    assert {len(step) for steps in ranks for step in steps} == {accumulation}
    seen = Counter(key for steps in ranks for key in keys_of(iter(steps)))
    assert seen == dict.fromkeys(all_keys(), 2)
    # Only the end of the run is filled with dummies, and all are silent.
    dummies = [sum(micro - len(b.keys) for b in step) for steps in ranks for step in steps[:-1]]
    assert not any(dummies)
    last = [batch for steps in ranks for batch in steps[-1]]
    assert (
        sum(len(batch.keys) for batch in last)
        == 52 - 52 // layout.global_batch_size * layout.global_batch_size
    )
    for batch in last:
        assert len(batch.input_ids) == micro and not batch.bad
        assert (batch.labels[len(batch.keys) :] == IGNORE).all()
        assert batch.image_grid_thw.shape == (micro, 3)


def test_accumulation_and_ranks_are_the_same_split(uneven: Path, encoder: SampleEncoder) -> None:
    alone = list(stream(uneven, encoder, layout=StepLayout(1, 2, 4)).iterate())
    for world, accumulation in ((2, 2), (4, 1)):
        layout = StepLayout(world, 2, accumulation)
        ranks = [stream(uneven, encoder, layout=layout, rank=rank).iterate() for rank in range(world)]
        for step in alone:
            parts = [next(steps) for steps in ranks]
            together = [parts[rank][j] for j, rank in product(range(accumulation), range(world))]
            for one, other in zip(step, together, strict=True):
                assert_same(one, other)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_at_any_step_and_in_any_split(
    uneven: Path, encoder: SampleEncoder, workers: int
) -> None:
    line = keys_of(stream(uneven, encoder, epochs=3).iterate())
    for steps_done in (0, 1, 4, 12):
        consumed = steps_done * 6
        again = stream(uneven, encoder, epochs=3, workers=workers)
        assert keys_of(again.iterate(consumed)) == line[consumed:]
        assert again.steps_from(consumed) == 13 - steps_done
    other = stream(uneven, encoder, epochs=3, layout=StepLayout(1, 5, 1), workers=workers)
    assert keys_of(other.iterate(24)) == line[24:]
    assert list(other.iterate(78)) == [] and list(other.iterate(1000)) == []


def test_a_micro_batch_of_dummies_alone_comes_out_of_a_worker(uneven: Path, encoder: SampleEncoder) -> None:
    layout = StepLayout(3, 5, 3)  # 26 samples fill five micro-batches and a sixth by one; nine there must be
    for rank in range(3):
        [alone] = stream(uneven, encoder, layout=layout, rank=rank).iterate()
        [arrived] = stream(uneven, encoder, layout=layout, rank=rank, workers=2).iterate()
        assert not alone[2].keys and alone[2].target_tokens == 0
        for one, other in zip(alone, arrived, strict=True):
            assert_same(one, other)


def test_unshuffled_stream_is_what_plain_webdataset_reads(scene_shards: Path) -> None:
    shards = ShardSet(scene_shards)
    sizes = shards.manifest.shard_sizes
    plan = RunPlan(sizes, seed=0, window=1, shuffle=False)
    layout = StepLayout(1, 40, 1)
    ours = [sample.raw for sample in PlannedSource(shards, plan, layout, rank=0, start=0, steps=1)]
    tars = [str(scene_shards / entry.name) for entry in shards.manifest.shards]
    theirs = list(webdataset.WebDataset(tars, shardshuffle=False, nodesplitter=None, workersplitter=None))
    assert len(ours) == len(theirs) == 40
    for one, other in zip(ours, theirs, strict=True):
        assert one is not None and one.key == other["__key__"]
        assert one.members == {name: value for name, value in other.items() if not name.startswith("__")}
    # Shuffled, it is the same set in the order of the plan.
    shuffled = RunPlan(sizes, seed=1, window=2)
    planned = [sample.raw for sample in PlannedSource(shards, shuffled, layout, rank=0, start=0, steps=1)]
    starts = np.cumsum([0, *sizes])
    for raw, place in zip(planned, shuffled.locate(0, 40), strict=True):
        assert raw is not None and place is not None
        assert raw.key == theirs[starts[place.shard] + place.sample]["__key__"]


# --- memory ---


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_and_open_files_stay_the_same_over_an_epoch(tmp_path: Path, encoder: SampleEncoder) -> None:
    """3,000 samples in 150 shards: 7 MB of bytes, 35 MB of batches, if anything kept them."""
    num_shards, window = 150, 4
    folder = write_shards(tmp_path / "shards", [[scene_members(number) for number in range(20)]])
    [entry] = Manifest.load(folder).shards
    entries = [replace(entry, name=f"shard-{number:06d}.tar") for number in range(num_shards)]
    for copy in entries[1:]:
        for suffix in ("", ".idx"):
            (folder / (copy.name + suffix)).hardlink_to(folder / (entry.name + suffix))
    Manifest(entries).write(folder)
    shards = ShardSet(folder, keep_open=2 * window)
    plan = RunPlan(shards.manifest.shard_sizes, seed=1, window=window)
    batches = CaptionStream(shards, plan, StepLayout(1, 10, 1), encoder, rank=0, workers=0)
    resident, files, seen = [], [], 0
    for step, [batch] in enumerate(batches.iterate()):
        seen += len(batch.keys)
        if step % 50 == 49:
            gc.collect()
            resident.append(resident_bytes())
            files.append(sum(1 for _ in Path("/proc/self/fd").iterdir()))
    assert seen == 3000 and len(resident) == 6
    assert max(resident[1:]) - resident[1] < 2 << 20, resident  # the first may yet shrink
    assert max(files) - min(files) <= 2 * window, files


# --- bad samples ---


def spoil(folder: Path, shard: int, sample: int, change) -> None:
    """Change a picture's bytes inside a tar, in place; its index and manifest stay as they were."""
    tar = folder / f"shard-{shard:06d}.tar"
    index = build_shard_index(tar)
    member = index.members(sample)["jpg"]
    data = bytearray(tar.read_bytes())
    data[member.offset : member.offset + member.size] = change(
        bytes(data[member.offset : member.offset + member.size])
    )
    tar.write_bytes(data)


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_becomes_a_dummy_in_its_slot_and_its_neighbours_stay(
    uneven: Path, encoder: SampleEncoder, tmp_path: Path, workers: int
) -> None:
    damaged = write_uneven(tmp_path / "damaged", cut=7)  # as packed: the checksum holds, the picture does not
    spoil(damaged, 0, 3, flipped)  # a byte rotted
    (damaged / "shard-000004.tar").unlink()  # a whole shard is gone

    whole = list(stream(uneven, encoder, epochs=2).iterate())
    torn = list(stream(damaged, encoder, epochs=2, workers=workers).iterate())
    line = keys_of(iter(whole))
    lost = {"s00-03", "s01-00", *(f"s04-{place:02d}" for place in range(5))}
    bad = [record for step in torn for batch in step for record in batch.bad]
    assert len(bad) == 2 * len(lost)
    reasons = {(record.shard, record.key): record.reason for record in bad}
    assert "checksum differs" in reasons["shard-000000.tar", "s00-03"]
    assert "truncated" in reasons["shard-000001.tar", "s01-00"]
    assert {reason for (shard, _), reason in reasons.items() if shard == "shard-000004.tar"} == {
        "missing shard file"
    }
    assert keys_of(iter(torn)) == [key for key in line if key not in lost]

    for before, after in zip(whole, torn, strict=True):
        for one, other in zip(before, after, strict=True):
            assert len(one.input_ids) == len(other.input_ids)
            slots = [key if key in other.keys else None for key in one.keys]
            assert len(other.bad) == slots.count(None)
            for row, key in enumerate(slots):
                if key is None:
                    assert (other.labels[row] == IGNORE).all()
                else:
                    length = min(one.labels.shape[1], other.labels.shape[1])
                    assert torch.equal(one.labels[row, :length], other.labels[row, :length])
                    assert torch.equal(one.input_ids[row, :length], other.input_ids[row, :length])


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"jpg": b"not a picture at all", "json": record("x", "y")}, "cannot be decoded: not a picture"),
        ({"jpg": jpeg(0)}, "json: missing member"),
        ({"jpg": jpeg(0), "json": b"{}"}, "no list of 'messages'"),
        ({"jpg": jpeg(0), "json": record("x", "y", images=2)}, "name 2 images, 1 lie beside them"),
        ({"json": record("x", "y")}, "name 1 images, 0 lie beside them"),
        ({"jpg": jpeg(0), "json": record("x", "a\ud800b")}, "lone surrogate"),
        ({"jpg": jpeg(0), "json": record("word " * 400, "y")}, "no cut of the caption brings it under max_length"),
        ({"jpg": jpeg(0), "json": record("x", "<|im_end|>")}, "would begin or end a turn"),
        ({"jpg": jpeg(0), "json": b"[" * 100_000}, "not JSON"),
    ],
    ids=["picture", "no json", "form", "too few", "none", "surrogate", "too long", "turn", "deep"],
)  # fmt: skip
def test_an_unusable_sample_is_named_with_its_reason(
    tmp_path: Path, encoder: SampleEncoder, members: Members, reason: str
) -> None:
    folder = write_shards(tmp_path / "shards", [[scene_members(0), members, scene_members(1)]])
    [[batch]] = stream(folder, encoder, layout=StepLayout(1, 3, 1), shuffle=False).iterate()
    assert batch.keys == ("s00-00", "s00-02")
    [bad] = batch.bad
    assert (bad.shard, bad.key) == ("shard-000000.tar", "s00-01") and reason in bad.reason
    assert (batch.labels[1] == IGNORE).all() and batch.image_grid_thw.tolist()[1] == [1, 2, 2]


# --- what a batch claims ---


def check_claims(batch: CaptionBatch, encoder: SampleEncoder) -> None:
    flat = batch.input_ids.reshape(-1)
    assert torch.equal(batch.image_positions, torch.nonzero(flat == encoder.chat.image_token)[:, 0])
    assert batch.image_grid_thw.tolist() == [list(grid) for grid in batch.grids]
    merged = encoder.chat.merge_size**2
    assert len(batch.image_positions) == int(batch.image_grid_thw.prod(1).sum()) // merged
    assert batch.pixels.dtype == torch.uint8
    assert len(batch.pixels) == sum(3 * rows * columns * 14 * 14 for _, rows, columns in batch.grids)
    # A target position holds the token before the one that is learned.
    labels = batch.labels.reshape(-1)
    assert torch.equal(labels[batch.target_positions + 1], batch.target_ids)
    assert batch.target_tokens == len(batch.target_ids) == int((batch.labels != IGNORE).sum())
    width = batch.input_ids.shape[1]
    assert ((batch.target_positions + 1) % width != 0).all()
    learned = batch.labels != IGNORE
    assert torch.equal(batch.labels[learned], batch.input_ids[learned])
    assert batch.position_ids.shape == (3, *batch.input_ids.shape)


def model_positions(batch: CaptionBatch, encoder: SampleEncoder, base: Path) -> torch.Tensor:
    """The positions that transformers computes for the batch."""
    from transformers import AutoConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    with torch.device("meta"):
        model = Qwen2VLModel(AutoConfig.from_pretrained(base))
    ids = batch.input_ids
    is_image = (ids == encoder.chat.image_token).int()
    mask = torch.ones_like(ids)
    for row in range(len(ids)):
        used = torch.nonzero(ids[row] != encoder.chat.pad_token)[-1, 0] + 1
        mask[row, used:] = 0
    positions, _ = model.get_rope_index(ids, is_image, batch.image_grid_thw, attention_mask=mask)
    return positions * mask


def test_fields_of_a_batch_are_what_they_claim(
    tmp_path: Path, encoder: SampleEncoder, scenes_base: Path
) -> None:
    several = {
        "0.jpg": jpeg(1), "1.jpg": jpeg(2, side=90), "10.jpg": jpeg(4), "2.jpg": jpeg(3),
        "json": record("which?", "a red circle above a blue square", images=4),
    }  # fmt: skip
    text_only = {"json": record("Hello", "a blue square above a red circle", images=0)}
    folder = write_shards(tmp_path / "shards", [[scene_members(0), several, text_only, scene_members(5)]])
    [[batch]] = stream(folder, encoder, layout=StepLayout(1, 4, 1), shuffle=False).iterate()
    check_claims(batch, encoder)
    assert batch.keys == ("s00-00", "s00-01", "s00-02", "s00-03") and not batch.bad
    assert len(batch.input_ids) == 4 and batch.grids == ((1, 4, 4),) * 6
    # Pictures come in the order of the messages: 0, 1, 2, 10.
    expected = [
        resize(decode(data), SIDE, SIDE).reshape(-1)
        for data in (jpeg(0), jpeg(1), jpeg(2, side=90), jpeg(3), jpeg(4), jpeg(5))
    ]
    assert torch.equal(batch.pixels, torch.cat(expected))
    assert torch.equal(batch.position_ids, model_positions(batch, encoder, scenes_base))
    # Padding is on the right.
    lengths = [int((row != IGNORE).nonzero()[-1]) + 2 for row in batch.labels]
    for row, length in zip(batch.input_ids, lengths, strict=True):
        assert (row[length:] == encoder.chat.pad_token).all() and row[length - 1] != encoder.chat.pad_token


def test_a_batch_without_any_picture_gets_one_dummy_row(tmp_path: Path, encoder: SampleEncoder) -> None:
    samples = [
        {"json": record("Hello", f"a {colour} circle", images=0)} for colour in ("red", "blue", "green")
    ]
    folder = write_shards(tmp_path / "shards", [samples])
    [[first], [second]] = stream(folder, encoder, layout=StepLayout(1, 2, 1), shuffle=False).iterate()
    check_claims(first, encoder)
    assert first.keys == ("s00-00", "s00-01") and len(first.input_ids) == 3
    assert first.grids == ((1, 2, 2),) and (first.labels[2] == IGNORE).all() and not first.bad
    # The tail's own dummy has a picture already.
    assert second.keys == ("s00-02",) and len(second.input_ids) == 2 and second.grids == ((1, 2, 2),)


def test_pictures_keep_their_shape_in_a_pixel_range(tmp_path: Path, scenes_processor: Any) -> None:
    wide = io.BytesIO()
    Image.fromarray(np.zeros((60, 200, 3), np.uint8)).save(wide, "PNG")
    samples = [{"png": wide.getvalue(), "json": record("x", "a red circle")}, scene_members(0)]
    folder = write_shards(tmp_path / "shards", [samples])
    ranged = SampleEncoder(scenes_processor, ImageSizeRule(None, 3136, 50176), 256)
    [[batch]] = stream(folder, ranged, layout=StepLayout(1, 2, 1), shuffle=False).iterate()
    check_claims(batch, ranged)
    assert batch.grids == ((1, 4, 14), (1, 4, 4))


def test_a_dummy_is_a_picture_without_a_label(encoder: SampleEncoder) -> None:
    dummy = encoder.dummy
    assert dummy.key is None and dummy.bad is None and dummy.grids == ((1, 2, 2),)
    assert (dummy.chat.labels == IGNORE).all()
    assert (dummy.chat.input_ids == encoder.chat.image_token).sum() == 1
