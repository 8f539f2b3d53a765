"""Uneven data, bad samples, signals and broken losses: every rank goes on, or stops with one message."""

import json
import os
import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenvl_dist.data.formats import read_coco_captions
from qwenvl_dist.data.index import Manifest, index_path, load_shard_index
from qwenvl_dist.data.pack import pack
from qwenvl_dist.files import sha256_of
from qwenvl_dist.synthetic.scenes import write_scenes
from tests.ranks import run_ranks
from tests.training.runs import TIMEOUT, ledger, losses, read_lines, run_train, train, write_recipe

pytestmark = pytest.mark.dist


def pack_uneven(folder: Path, sizes: list[int]) -> Path:
    """Pack scenes into shards of exactly these sizes, an empty one included."""
    import hashlib
    import tarfile

    from qwenvl_dist.data.index import ShardEntry, build_shard_index

    captions = write_scenes(folder / "scenes", sum(sizes), seed=3)["train"]
    single = folder / "single"
    pack(read_coco_captions(captions, captions.parent / "images"), single, samples_per_shard=1)
    out, entries = folder / "uneven", []
    out.mkdir()
    tars = iter(sorted(single.glob("*.tar")))
    for number, size in enumerate(sizes):
        path = out / f"shard-{number:06d}.tar"
        with tarfile.open(path, "w") as joined:
            for source in (next(tars) for _ in range(size)):
                with tarfile.open(source) as one:
                    for member in one:
                        joined.addfile(member, one.extractfile(member))
        index = build_shard_index(path)
        index_path(path).write_bytes(index.to_bytes())
        sha256 = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in (path, index_path(path))}
        entries.append(
            ShardEntry(path.name, path.stat().st_size, sha256[path], sha256[index_path(path)], samples=size)
        )
    Manifest(entries).write(out)
    return out


def all_keys(shards: Path) -> list[str]:
    return [
        key
        for entry in Manifest.load(shards).shards
        for key in load_shard_index(index_path(shards / entry.name)).keys
    ]


@pytest.mark.parametrize("stage", [2, 3])
def test_two_epochs_over_uneven_shards_see_every_sample_twice(
    tmp_path: Path, scenes_base: Path, stage: int
) -> None:
    shards = pack_uneven(tmp_path, [7, 1, 13, 0, 5])
    out = tmp_path / "run"
    recipe = write_recipe(
        tmp_path / "r.yaml", scenes_base, shards, out, stage,
        data={"workers": 2, "micro_batch_size": 3},
        train={"max_steps": None, "epochs": 2, "grad_accum_steps": 2, "checkpoint_every_steps": 100},
    )  # fmt: skip
    train(recipe, 2)
    seen = [key for keys in ledger(out).values() for key in keys]
    assert sorted(seen) == sorted(all_keys(shards) * 2)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000005"]  # ceil(52 / 12)


@pytest.fixture
def damaged(tmp_path: Path, scene_shards: Path) -> tuple[Path, set[str]]:
    """A copy of the shards with a cut JPEG (packed so) and a flipped byte; and the keys of the two."""
    shards = tmp_path / "damaged"
    shutil.copytree(scene_shards, shards)
    manifest = Manifest.load(shards)
    flipped = shards / manifest.shards[1].name
    index = load_shard_index(index_path(flipped))
    place = index.members(2)["jpg"].offset + 100
    data = bytearray(flipped.read_bytes())
    data[place] ^= 0x40
    flipped.write_bytes(data)

    cut = shards / manifest.shards[2].name
    other = load_shard_index(index_path(cut))
    member = other.members(4)["jpg"]
    data = bytearray(cut.read_bytes())
    middle = member.offset + member.size // 2
    data[middle : member.offset + member.size] = bytes(member.offset + member.size - middle)
    cut.write_bytes(data)
    crcs = other.crcs.copy()  # as if it had been packed cut: its checksum fits
    crcs[other.offsets == member.offset] = zlib.crc32(data[member.offset : member.offset + member.size])
    index_path(cut).write_bytes(replace(other, crcs=crcs).to_bytes())
    entries = [
        replace(entry, index_sha256=sha256_of(index_path(cut))) if entry.name == cut.name else entry
        for entry in manifest.shards
    ]
    Manifest(entries).write(shards)
    return shards, {index.keys[2], other.keys[4]}


def test_bad_samples_are_named_and_counted_and_the_run_goes_on(
    tmp_path: Path, scenes_base: Path, damaged: tuple[Path, set[str]]
) -> None:
    shards, bad = damaged
    out = tmp_path / "run"
    recipe = write_recipe(
        tmp_path / "r.yaml", scenes_base, shards, out,
        data={"bad_sample_budget": 0.05},
        train={"max_steps": None, "epochs": 1, "grad_accum_steps": 2},
    )  # fmt: skip
    train(recipe, 2)
    records = read_lines(out / "bad_samples.jsonl")
    assert {record["key"] for record in records} == bad
    assert len(records) == 2
    assert all(record["reason"] and record["shard"] and record["step"] >= 1 for record in records)
    seen = [key for keys in ledger(out).values() for key in keys]
    assert sorted(seen) == sorted(set(all_keys(shards)) - bad)
    assert read_lines(out / "metrics.jsonl")[-1]["bad_samples"] == 2


def test_past_the_budget_every_rank_stops_with_the_same_message(
    tmp_path: Path, scenes_base: Path, damaged: tuple[Path, set[str]]
) -> None:
    shards, _ = damaged
    out = tmp_path / "run"
    recipe = write_recipe(
        tmp_path / "r.yaml",
        scenes_base,
        shards,
        out,
        data={"bad_sample_budget": 0.0},
        train={"max_steps": None},
    )
    with pytest.raises(AssertionError) as failure:
        train(recipe, 2)
    lines = [line for line in str(failure.value).splitlines() if "error: step" in line]
    messages = {line.split("error: ")[1] for line in lines}
    assert len(lines) == 2 and len(messages) == 1
    assert "bad_sample_budget" in messages.pop()


def run_half_blind(recipe: str) -> None:
    """One rank: train; rank 1 alone cannot read the index of one shard."""
    from qwenvl_dist.data.source import ShardSet

    readable = ShardSet.index

    def index(self: ShardSet, shard: int) -> Any:
        if os.environ["RANK"] == "1" and shard == 1:
            raise OSError("stale file handle")
        return readable(self, shard)

    ShardSet.index = index  # type: ignore[method-assign]
    run_train(recipe)


def test_ranks_that_would_deal_a_step_differently_stop_before_it(tmp_path: Path, scenes_base: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", 40)  # captions of several lengths
    coco, out = scenes["train"], tmp_path / "run"
    pack(read_coco_captions(coco, coco.parent / "images"), tmp_path / "shards", samples_per_shard=13)
    recipe = write_recipe(tmp_path / "r.yaml", scenes_base, tmp_path / "shards", out)
    with pytest.raises(AssertionError, match="hold the samples that the plan gives it"):
        run_ranks("tests.training.test_faults:run_half_blind", 2, timeout=TIMEOUT, recipe=str(recipe))
    assert not read_lines(out / "bad_samples.jsonl")


def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_the_samples(
    tmp_path: Path, scenes_base: Path, scene_shards: Path
) -> None:
    base = tmp_path / "broken"
    shutil.copytree(scenes_base, base)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    recipe = write_recipe(tmp_path / "r.yaml", base, scene_shards, tmp_path / "run")
    with pytest.raises(AssertionError) as failure:
        train(recipe, 2)
    lines = [line for line in str(failure.value).splitlines() if "not finite" in line]
    assert len(lines) == 2
    assert all(any(key in line for key in all_keys(scene_shards)) for line in lines)
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_sigterm_writes_a_checkpoint_and_the_next_start_goes_on(
    tmp_path: Path, scenes_base: Path, scene_shards: Path
) -> None:
    out = tmp_path / "run"
    recipe = write_recipe(
        tmp_path / "r.yaml", scenes_base, scene_shards, out,
        train={"max_steps": None, "epochs": 3, "grad_accum_steps": 1, "checkpoint_every_steps": 1000},
    )  # fmt: skip
    with pytest.raises(AssertionError, match="stopped by SIGTERM after step"):
        train(recipe, 2, kill_at_step=2, kill_rank=1, with_signal="SIGTERM")
    (stopped,) = (out / "checkpoints").glob("step-*")
    assert 2 <= int(stopped.name.removeprefix("step-")) < 30
    train(recipe, 2)
    seen = [key for keys in ledger(out).values() for key in keys]
    assert sorted(seen) == sorted(all_keys(scene_shards) * 3)
    assert len(losses(out)) == 30


def test_best_and_newest_survive_rotation(
    tmp_path: Path, scenes_base: Path, scene_shards: Path, scene_validation_shards: Path
) -> None:
    out = tmp_path / "run"
    recipe = write_recipe(
        tmp_path / "r.yaml", scenes_base, scene_shards, out,
        data={"validation": str(scene_validation_shards)},
        train={"grad_accum_steps": 1, "eval_every_steps": 2, "checkpoint_every_steps": 1, "keep_checkpoints": 1},
    )  # fmt: skip
    train(recipe, 2)
    values = {
        line["step"]: line["val_loss"] for line in read_lines(out / "metrics.jsonl") if "val_loss" in line
    }
    assert set(values) == {2, 4, 6}
    best = min(values, key=lambda step: values[step])
    assert (out / "checkpoints" / "best").resolve().name == f"step-{best:08d}"
    kept = {path.name for path in (out / "checkpoints").glob("step-*")}
    assert kept == {f"step-{best:08d}", "step-00000006"}
    manifest = json.loads((out / "checkpoints" / "best" / "MANIFEST.json").read_text())
    assert manifest["val_loss"] == pytest.approx(values[best])
