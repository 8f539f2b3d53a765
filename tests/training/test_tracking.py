"""What SwanLab, TensorBoard and W&B hold after a run that was killed and resumed: one run each, told once."""

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from qwenvl_dist.data.index import Manifest, index_path, load_shard_index
from tests.training.forked import ForkedRanks
from tests.training.forked import train as train_rank
from tests.training.runs import read_lines, write_recipe

pytestmark = pytest.mark.dist

LOGGED = {"loss", "learning_rate", "grad_norm", "samples_per_second", "data_wait_fraction", "peak_memory_gib"}
CONFIG = {
    "lora_rank": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "train_data_number": 40,
    "prompt": "COCO Yes:",
}
TRACKERS = "tracking.trackers=[swanlab, tensorboard, wandb]"


def start(recipe: Path, world: int, *overrides: str) -> str:
    ranks = ForkedRanks(train_rank, (str(recipe), *overrides), world, recipe.with_suffix(".log"))
    assert ranks.wait(200) == [0] * world, ranks.said()
    return ranks.said()


def write_generations(run: Path, shards: Path) -> list[str]:
    """Write what a run with generation leaves: the base's captions, and those of step 3."""
    entry = Manifest.load(shards).shards[0]
    keys = load_shard_index(index_path(shards / entry.name)).keys[:2]
    folder = run / "generations"
    folder.mkdir()
    for name, said in (("base", "gibberish"), ("step-00000003", "a | red square")):
        rows = [
            {"key": key, "image_id": number, "prompt": "COCO Yes:", "references": ["a red square", "a square"],
             "caption": said, "scores": {"CIDEr": 1.25}}
            for number, key in enumerate(keys)
        ]  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return keys


def killed_after_step_4_and_resumed(
    tmp: Path, base: Path, shards: Path, validation: Path, world: int, *overrides: str
) -> tuple[Path, list[str]]:
    """Train to step 4, lose its checkpoint, write generations of step 3, go on to step 6; return run and keys."""
    run = tmp / "run"
    recipe = write_recipe(
        tmp / "r.yaml", base, shards, run,
        data={"validation": str(validation), "ledger": False},
        train={"grad_accum_steps": 2, "eval_every_steps": 2},
        tracking={"mode": "offline", "project": "captions"},
    )  # fmt: skip
    start(recipe, world, "train.max_steps=4", *overrides)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    keys = write_generations(run, validation)
    start(recipe, world, *overrides)
    return run, keys


@pytest.fixture(scope="module")
def resumed(
    tmp_path_factory: pytest.TempPathFactory,
    scenes_base: Path,
    scene_shards: Path,
    scene_validation_shards: Path,
) -> tuple[Path, list[str]]:
    tmp = tmp_path_factory.mktemp("tracking")
    return killed_after_step_4_and_resumed(
        tmp, scenes_base, scene_shards, scene_validation_shards, 2, TRACKERS
    )


def swanlab_records(folder: Path) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, Any]], list[Any]]:
    """Return scalars and media by key and step, and the start records."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    scalars: dict[str, dict[int, float]] = defaultdict(dict)
    media: dict[str, dict[int, Any]] = defaultdict(dict)
    starts = []
    reader = DataStoreReader()
    (file,) = folder.glob("*.swanlab")
    reader.open(file)
    for data in reader:
        record = Record()
        record.ParseFromString(data)
        print(record.WhichOneof("record_type"))
    reader.close()
    return scalars, media, starts


def test_x(resumed):
    run, keys = resumed
    import subprocess

    print(subprocess.run(["find", str(run)], capture_output=True, text=True).stdout)
    for f in run.glob("swanlab/*"):
        if f.is_dir():
            swanlab_records(f)
    print(read_lines(run / "launches.jsonl"))
    shutil.copytree(run, "/tmp/rep/tracked", dirs_exist_ok=True, symlinks=True)
    assert 0
