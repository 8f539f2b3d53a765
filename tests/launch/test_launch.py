"""The launch files as users start them: accelerate configs, DeepSpeed files, recipes."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ranks import ROOT, free_port
from tests.training.runs import ledger, losses, read_lines

ACCELERATE = sorted((ROOT / "launch" / "accelerate").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "ds_configs").glob("*.json"))
TIMEOUT = 240


def launch(
    config: str, *arguments: str, env: dict[str, str] | None = None, timeout: float = TIMEOUT
) -> subprocess.CompletedProcess[str]:
    """Run `accelerate launch --config_file launch/accelerate/CONFIG -m qwenvl_dist ...`; a hang kills all of it."""
    command = [
        "accelerate", "launch", "--config_file", f"launch/accelerate/{config}",
        "--main_process_port", str(free_port()), "-m", "qwenvl_dist", *arguments,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"{config} did not end in {timeout} s\n{err[-6000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture
def recipe(tmp_path: Path, scenes_base: Path, scene_shards: Path, scene_validation_shards: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    content: dict[str, Any] = {
        "model": {"base": str(scenes_base), "dtype": "float32"},
        "data": {"train": str(scene_shards), "validation": str(scene_validation_shards), "image_size": 56},
        "train": {
            "max_steps": 3,
            "grad_accum_steps": 1,
            "log_every_steps": 1,
            "output_dir": str(tmp_path / "run"),
        },
        "tracking": {"trackers": ["swanlab"], "mode": "offline", "name": "test"},
    }
    content["data"].update(micro_batch_size=2, workers=1, ledger=True)
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.dist
@pytest.mark.parametrize("stage", [2, 3])
def test_accelerate_launch_trains_on_two_processes(recipe: Path, tmp_path: Path, stage: int) -> None:
    done = launch(f"cpu_zero{stage}.yaml", "train", str(recipe))
    assert done.returncode == 0, done.stderr[-6000:]
    run = tmp_path / "run"
    assert len(losses(run)) == 3
    manifest = json.loads((run / "checkpoints" / "best" / "MANIFEST.json").read_text())
    assert (manifest["zero_stage"], manifest["world_size"]) == (stage, 2)
    assert sum(map(len, ledger(run).values())) == 12
    assert "val_loss" in read_lines(run / "metrics.jsonl")[-1]
    assert list((run / "swanlab").iterdir()), "swanlab wrote nothing"
    assert yaml.safe_load((run / "recipe.yaml").read_text())["train"]["max_steps"] == 3


def test_a_deepspeed_file_that_contradicts_the_launcher_is_refused(recipe: Path) -> None:
    done = launch("cpu_zero2.yaml", "train", str(recipe), "deepspeed.config=ds_configs/zero3.json")
    assert done.returncode != 0
    assert "error: deepspeed.config = ds_configs/zero3.json: the launcher names another" in done.stderr


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda p: p.name)
def test_deepspeed_files_hold_zero_knobs_only(path: Path) -> None:
    from qwenvl_dist.distributed import RECIPE_OWNED_KEYS

    content = json.loads(path.read_text())
    assert set(content) == {"zero_optimization"}
    assert not set(content) & set(RECIPE_OWNED_KEYS)
    assert content["zero_optimization"]["stage"] == int(path.name.removeprefix("zero")[0])
    assert ("offload_optimizer" in content["zero_optimization"]) == ("offload" in path.name)


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda p: p.name)
def test_accelerate_files_name_a_deepspeed_file_that_exists(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    stage = 3 if "zero3" in path.name else 2
    assert content["distributed_type"] == "DEEPSPEED"
    assert content["deepspeed_config"]["deepspeed_config_file"] == f"ds_configs/zero{stage}.json"
    assert content["deepspeed_config"]["zero3_init_flag"] is (stage == 3)
    if "multinode" in path.name:
        assert content["deepspeed_config"]["deepspeed_multinode_launcher"] == "standard"
        assert content["num_machines"] == 2


def test_contract_names_of_launch_files() -> None:
    names = {path.stem for path in ACCELERATE}
    expected = {f"{device}_zero{stage}{suffix}" for device in ("cpu", "gpu") for stage in (2, 3)
                for suffix in ("", "_multinode")}  # fmt: skip
    assert names == expected
