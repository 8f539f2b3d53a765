"""The main job on the real photos, through the commands, as a user would type them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwenvl_dist.checkpoints import manifest as manifests
from tests.launch.test_launch import launch
from tests.ranks import ROOT, command
from tests.training.runs import ledger, losses, read_lines

pytestmark = pytest.mark.dist


def test_the_photos_verify(photo_shards: Path) -> None:
    report = json.loads(command("shards", "verify", photo_shards, "--json").stdout.splitlines()[-1])
    assert report == {"shards": 5, "samples": 290, "bad": []}
    assert len(command("shards", "show", photo_shards, "--limit", "3").stdout.splitlines()) == 3


@pytest.mark.parametrize("stage", [2, 3])
def test_twenty_steps_merge_and_predict(
    photo_shards: Path, tiny_base: Path, shared_data: Path, tmp_path: Path, stage: int
) -> None:
    run = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{base: {tiny_base}, dtype: float32}}\ndata: {{train: {photo_shards}, ledger: true}}\n"
    )
    done = launch(
        f"cpu_zero{stage}.yaml", "train", str(recipe), "train.max_steps=20", "train.grad_accum_steps=1",
        "optim.learning_rate=2e-3", "train.log_every_steps=1", f"train.output_dir={run}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    values = losses(run)
    assert len(values) == 20
    assert sum(values[-3:]) < sum(values[:3]) - 0.05 * 3
    keys = [key for step in ledger(run).values() for key in step]
    assert len(keys) == len(set(keys)) == 160
    step = run / "checkpoints" / "step-00000020"
    # No frozen tensor: 39,424 adapter parameters, master and two moments, not the 19 million of the tied head.
    assert sum(path.stat().st_size for path in (step / "zero").iterdir()) < 3e6
    manifests.verify(step)

    merged, adapter = tmp_path / "merged", tmp_path / "adapter"
    output = command(
        "merge", run, "--base", tiny_base, "--out", merged, "--adapter-out", adapter, "--verify", "--json"
    )
    report = json.loads(output.stdout.splitlines()[-1])
    assert report["merged"] == 14
    assert {"tensors", "bytes", "seconds", "peak_rss_gib"} <= set(report)

    photos = sorted((shared_data / "coco" / "images").iterdir())[:3]
    said = command("predict", tiny_base, *photos, "--adapter", adapter, "--max-new-tokens", "4", "--json")
    predictions = json.loads(said.stdout.splitlines()[-1])["predictions"]
    assert len(predictions) == 3
    assert all(isinstance(p["caption"], str) and isinstance(p["before"], str) for p in predictions)
    merged_said = command("predict", merged, *photos, "--max-new-tokens", "4", "--json")
    assert len(json.loads(merged_said.stdout.splitlines()[-1])["predictions"]) == 3


def test_bf16_training_and_merge(photo_shards: Path, tiny_base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{base: {tiny_base}, checkpointing: all}}\ndata: {{train: {photo_shards}, workers: 0}}\n"
    )
    done = command(
        "train", recipe, "train.max_steps=3", "train.grad_accum_steps=1", "train.log_every_steps=1",
        f"train.output_dir={run}", "tracking.mode=disabled", "data.image_size={min_pixels: 3136, max_pixels: 50176}",
    )  # fmt: skip
    assert "finished: step 3" in done.stderr
    assert all(line["loss"] < 20 for line in read_lines(run / "metrics.jsonl"))
    command("merge", run, "--base", tiny_base, "--out", tmp_path / "merged", "--verify")


@pytest.mark.slow
def test_the_demo_learns() -> None:
    """`bash launch/demo.sh` in the environment that the tests run in."""
    environment = Path(sys.executable).parent.parent
    stamp = environment / ".installed"
    if not stamp.is_file():
        pytest.skip(f"{environment} was not made by launch/setup.sh; the demo would install into it")
    shutil.rmtree(ROOT / "build" / "demo", ignore_errors=True)
    done = subprocess.run(
        ["bash", "launch/demo.sh"], cwd=ROOT, capture_output=True, text=True, timeout=900,
        env={**os.environ, "QWENVL_VENV": str(environment)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = re.search(r"reference: (\d+)% before, (\d+)% after", done.stdout)
    assert found and int(found[2]) >= int(found[1]) + 50
    assert "set-up: installing" not in done.stderr
