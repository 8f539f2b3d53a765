"""Uneven data, bad samples, signals and broken losses: every rank goes on, or stops with one message."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwenvl_dist.data.index import Manifest, index_path, load_shard_index
from qwenvl_dist.data.plan import RunPlan
from tests.made_shards import key_of, scene_members, write_shards
from tests.ranks import run_ranks
from tests.training.runs import TIMEOUT, ledger, losses, read_lines, run_train, train, write_recipe

pytestmark = pytest.mark.dist


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
    shards = write_shards(
        tmp_path / "shards", [[scene_members(number) for number in range(size)] for size in (7, 1, 13, 0, 5)]
    )
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


SIZES = (13, 13, 13, 1)
REASONS = {  # of the samples that `damaged` spoils
    "s00-03": "jpg: checksum differs",
    "s01-04": "cannot be decoded: image file is truncated",
    "s01-07": "json: missing member",
    "s02-12": "json: checksum differs",
    "s03-00": "missing shard file",
}


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Shards whose samples `REASONS` are bad: rotted, packed from bad files, or gone with their shard."""
    numbers = iter(range(sum(SIZES)))
    samples = [[scene_members(next(numbers)) for _ in range(size)] for size in SIZES]
    samples[1][4]["jpg"] = samples[1][4]["jpg"][:-100]
    del samples[1][7]["json"]
    folder = write_shards(tmp_path / "damaged", samples)
    for shard, sample, extension in ((0, 3, "jpg"), (2, 12, "json")):
        tar = folder / f"shard-{shard:06d}.tar"
        place = load_shard_index(index_path(tar)).members(sample)[extension].offset + 20
        content = bytearray(tar.read_bytes())
        content[place] ^= 0x40
        tar.write_bytes(content)
    (folder / "shard-000003.tar").unlink()
    return folder


def steps_of(keys: Iterable[str], global_batch_size: int) -> dict[str, int]:
    """In which step the plan first takes each of these samples."""
    order = [
        key_of(place.shard, place.sample)
        for place in RunPlan(SIZES, seed=0, window=64).locate(0, 40)
        if place
    ]
    return {key: order.index(key) // global_batch_size + 1 for key in keys}


def test_bad_samples_are_named_and_counted_and_the_run_goes_on(
    tmp_path: Path, scenes_base: Path, damaged: Path
) -> None:
    out = tmp_path / "run"
    recipe = write_recipe(
        tmp_path / "r.yaml", scenes_base, damaged, out,
        data={"bad_sample_budget": 5 / 40},
        train={"max_steps": None, "epochs": 2, "grad_accum_steps": 2},
    )  # fmt: skip
    train(recipe, 2)
    steps = steps_of(REASONS, 8)
    assert len(set(steps.values())) > 2
    records = read_lines(out / "bad_samples.jsonl")
    for record in records:
        assert REASONS[record["key"]] in record.pop("reason")
    # Once each, although both epochs meet them.
    assert sorted(records, key=lambda record: record["key"]) == [
        {"shard": f"shard-0000{key[1:3]}.tar", "key": key, "step": steps[key]} for key in REASONS
    ]
    assert [record["step"] for record in records] == sorted(steps.values())
    good = {key_of(shard, sample) for shard, size in enumerate(SIZES) for sample in range(size)} - {*REASONS}
    assert Counter(key for keys in ledger(out).values() for key in keys) == dict.fromkeys(good, 2)
    assert read_lines(out / "metrics.jsonl")[-1]["bad_samples"] == len(REASONS)
    manifest = json.loads((out / "checkpoints" / "step-00000010" / "MANIFEST.json").read_text())
    assert {key for _, key, _ in manifest["data"]["bad_samples"]} == set(REASONS)


def test_past_the_budget_every_rank_stops_at_the_same_step_with_the_same_message(
    tmp_path: Path, scenes_base: Path, damaged: Path
) -> None:
    out = tmp_path / "run"
    recipe = write_recipe(
        tmp_path / "r.yaml", scenes_base, damaged, out,
        data={"bad_sample_budget": 2 / 40},
        train={"max_steps": None, "epochs": 2, "grad_accum_steps": 2},
    )  # fmt: skip
    with pytest.raises(AssertionError) as failure:
        train(recipe, 2)
    met = sorted(steps_of(REASONS, 8).values())
    step = met[2]  # the third bad sample is one too many
    bad = sum(other <= step for other in met)
    lines = [line for line in str(failure.value).splitlines() if "error: step" in line]
    messages = {line.split("error: ")[1] for line in lines}
    assert len(messages) == 1 and "[rank 0 on " in lines[0]
    assert messages.pop().startswith(
        f"step {step}: {bad} bad samples, 2 allowed (data.bad_sample_budget = 0.05 of 40); the last is s0"
    )
    assert len(read_lines(out / "bad_samples.jsonl")) == bad
    assert list(ledger(out)) == list(range(1, step))
    assert "Traceback" not in str(failure.value)


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


def test_ranks_that_would_deal_a_step_differently_stop_before_it(
    tmp_path: Path, scenes_base: Path, scene_shards: Path
) -> None:
    out = tmp_path / "run"
    recipe = write_recipe(tmp_path / "r.yaml", scenes_base, scene_shards, out)
    with pytest.raises(AssertionError, match="hold the samples that the plan gives it"):
        run_ranks("tests.training.test_faults:run_half_blind", 2, timeout=TIMEOUT, recipe=str(recipe))
    assert not read_lines(out / "bad_samples.jsonl")


def test_an_index_of_another_shard_costs_the_samples_of_its_own(
    tmp_path: Path, scenes_base: Path, scene_shards: Path
) -> None:
    shards = shutil.copytree(scene_shards, tmp_path / "shards")
    shutil.copy(shards / "shard-000000.tar.idx", shards / "shard-000001.tar.idx")
    out = tmp_path / "run"
    recipe = write_recipe(
        tmp_path / "r.yaml", scenes_base, shards, out,
        data={"bad_sample_budget": 0.5},
        train={"max_steps": None, "epochs": 1, "grad_accum_steps": 2},
    )  # fmt: skip
    train(recipe, 2)
    named = Counter((record["shard"], record["key"]) for record in read_lines(out / "bad_samples.jsonl"))
    assert named == {("shard-000001.tar", f"#{sample}"): 1 for sample in range(13)}
    keys = all_keys(scene_shards)
    assert sorted(key for step in ledger(out).values() for key in step) == sorted(keys[:13] + keys[26:])


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
    assert lines and "[rank 0 on " in lines[0]
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
