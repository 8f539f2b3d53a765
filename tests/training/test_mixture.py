"""Two data sets in one run: each has its own passes, through a resume on other ranks, and all of it is told."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qwenvl_dist.config import load_recipe
from qwenvl_dist.data.index import Manifest, index_path, load_shard_index
from qwenvl_dist.data.plan import SourceProgress
from qwenvl_dist.errors import UserError
from qwenvl_dist.report.folder import RunFolder
from qwenvl_dist.report.page import sources
from qwenvl_dist.training.run import check_recipe_paths
from qwenvl_dist.training.state import DataIdentity, Progress, SourceIdentity, data_state, restore_progress
from tests.ranks import ROOT, run_ranks
from tests.report.made_run import keys_of
from tests.training.runs import TIMEOUT, ledger, losses, read_lines, train, write_recipe

STOP, STEPS = 5, 18  # of 8 samples: 2 epochs of 40 + 30


def damaged_copy(shards: Path, copy: Path) -> tuple[str, str]:
    """Copy shards and flip a byte of one picture; return (shard, key)."""
    shutil.copytree(shards, copy)
    entry = Manifest.load(copy).shards[1]
    index = load_shard_index(index_path(copy / entry.name))
    with (copy / entry.name).open("r+b") as file:
        file.seek(index.members(2)["jpg"].offset + 40)
        (old,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([old ^ 255]))
    return entry.name, index.keys[2]


@pytest.mark.dist
def test_each_source_makes_its_own_passes_through_a_resume_on_other_ranks(
    scenes_base: Path, scene_shards: Path, scene_validation_shards: Path, tmp_path: Path
) -> None:
    bad_shard, bad_key = damaged_copy(scene_validation_shards, tmp_path / "held-out")
    mixture = [
        {"name": "scenes", "train": str(scene_shards), "epochs": 1},
        {"train": str(tmp_path / "held-out"), "epochs": 2.5},
    ]

    def recipe(name: str, out: Path, max_steps: int | None, accumulation: int = 2) -> str:
        data = {"train": "", "mixture": mixture, "bad_sample_budget": 0.02, "shuffle_window": 2}
        run = {"max_steps": max_steps, "epochs": 2, "grad_accum_steps": accumulation}
        return str(
            write_recipe(
                tmp_path / f"{name}.yaml", scenes_base, scene_shards, out, data=data,
                optim={"schedule": "constant", "warmup_ratio": 0.0},  # else the rate depends on where a run ends
                train={**run, "checkpoint_every_steps": STOP, "keep_checkpoints": 9},
            )
        )  # fmt: skip

    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    two_ranks = [recipe("straight", straight, None), recipe("stopped", resumed, STOP)]
    run_ranks("tests.training.runs:run_several", 2, timeout=TIMEOUT, recipes=two_ranks)
    train(Path(recipe("resumed", resumed, None, accumulation=4)), 1)

    assert ledger(resumed) == ledger(straight) and list(ledger(straight)) == list(range(1, STEPS + 1))
    assert losses(resumed) == pytest.approx(losses(straight), rel=2e-5)
    counts = Counter(key for keys in ledger(straight).values() for key in keys)
    wanted = {f"scenes/{key}": 2 for key in keys_of(scene_shards)}
    wanted |= {f"held-out/{key}": 5 for key in keys_of(scene_validation_shards) if key != bad_key}
    assert counts == wanted
    for step, keys in list(ledger(straight).items())[:-1]:  # 8 samples: 4.57 and 3.43 of them
        held_out = sum(key.startswith("held-out/") for key in keys)
        assert held_out in (2, 3, 4), (step, keys)  # the bad one is not in the ledger

    for run in (straight, resumed):
        (bad,) = read_lines(run / "bad_samples.jsonl")
        assert (bad["shard"], bad["key"]) == (f"held-out/{bad_shard}", f"held-out/{bad_key}")
        last = [line for line in read_lines(run / "metrics.jsonl") if "loss" in line][-1]
        assert last["sources"] == {
            "held-out": {"samples": 60, "epoch": 5.0},
            "scenes": {"samples": 80, "epoch": 2.0},
        }
        at_stop = json.loads((run / "checkpoints" / f"step-{STOP:08d}" / "MANIFEST.json").read_text())["data"]
        consumed = {name: source["consumed_in_run"] for name, source in at_stop["sources"].items()}
        assert consumed == {"held-out": 17, "scenes": 23} and at_stop["consumed_in_run"] == 40
        assert at_stop["sources"]["scenes"]["fingerprint"] == Manifest.load(scene_shards).fingerprint
        told = [(row.name, row.samples, row.epoch) for row in sources(RunFolder.read(run))]
        assert told == [("held-out", 60, 5.0), ("scenes", 80, 2.0)]


IDENTITY: dict[str, Any] = {"fingerprint": "all", "seed": 0, "shuffle_window": 64, "samples_per_epoch": 100}
BOXES, CAPTIONS = SourceIdentity("1a", 20, 20), SourceIdentity("2b", 40, 80)


@pytest.mark.parametrize(
    ("now", "change"),
    [
        ({"boxes": BOXES}, "the mixture had boxes, captions and now has boxes"),
        ({}, "the mixture had boxes, captions and now has no sources"),
        (
            {"boxes": BOXES, "captions": SourceIdentity("3c", 40, 80)},
            "fingerprint of captions was 2b and is now 3c",
        ),
        (
            {"boxes": SourceIdentity("1a", 20, 40), "captions": CAPTIONS},
            "samples per epoch of boxes was 20 and is now 40",
        ),
    ],
)
def test_a_resume_with_another_mixture_is_refused_in_one_line(
    now: dict[str, SourceIdentity], change: str
) -> None:
    before = DataIdentity(**IDENTITY, sources={"boxes": BOXES, "captions": CAPTIONS})
    reached = {"boxes": SourceProgress(5, 0.25), "captions": SourceProgress(20, 0.5)}
    data = json.loads(json.dumps(data_state(Progress(3, 25), before, reached)))
    manifest = {"step": 3, "data": data, "progress": {"best_val_loss": None}}
    assert restore_progress(manifest, before, "step-3").consumed == 25
    with pytest.raises(UserError) as error:
        restore_progress(manifest, DataIdentity(**IDENTITY, sources=now), "step-3")
    assert str(error.value).startswith(f"resume from step-3: {change}, so positions name others; restore")
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_before_there_were_mixtures_is_resumed() -> None:
    alone = DataIdentity(**IDENTITY)
    data = data_state(Progress(3, 25), alone)
    del data["sources"]
    assert (
        restore_progress({"step": 3, "data": data, "progress": {"best_val_loss": 1.0}}, alone, "step-3").step
        == 3
    )


def test_features_and_pictures_are_not_mixed(scenes_base: Path, scene_shards: Path, tmp_path: Path) -> None:
    encoded = tmp_path / "encoded"
    shutil.copytree(scene_shards, encoded)
    manifest = Manifest.load(encoded)
    Manifest(manifest.shards, features={"vision": "x"}).write(encoded)
    mixture = [
        {"train": str(encoded), "epochs": 1},
        {"name": "plain", "train": str(scene_shards), "epochs": 1},
    ]
    data = {"train": "", "mixture": mixture}
    path = write_recipe(tmp_path / "r.yaml", scenes_base, scene_shards, tmp_path / "run", data=data)
    with pytest.raises(
        UserError, match="encoded holds vision features and plain pictures, which one run cannot mix"
    ):
        check_recipe_paths(load_recipe(path))


def test_a_missing_source_is_named(scenes_base: Path, scene_shards: Path, tmp_path: Path) -> None:
    mixture = [{"name": "a", "train": str(tmp_path / "nowhere"), "epochs": 1}]
    data = {"train": "", "mixture": mixture}
    path = write_recipe(tmp_path / "r.yaml", scenes_base, scene_shards, tmp_path / "run", data=data)
    with pytest.raises(UserError, match=r"data\.mixture a: .*nowhere: no such folder"):
        check_recipe_paths(load_recipe(path))


def test_submit_packs_and_encodes_no_mixture(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("data: {mixture: [{train: shards/a, epochs: 1}]}\n")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "slurm/submit.sh", "--captions", "c.json", "--images", "photos", str(recipe)],
        cwd=ROOT, env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and "the recipe has data.mixture; pack or encode its sets" in done.stderr
