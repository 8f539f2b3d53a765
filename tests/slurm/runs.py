"""Recipes of the lab's training jobs, and the unbroken run that the broken ones must equal."""

from pathlib import Path
from typing import Any

from tests.training.runs import write_recipe

GLOBAL_BATCH = 6  # for one, two or three ranks
CPU = {"QWENVL_DEVICE": "cpu", "QWENVL_STATUS_SECONDS": "2", "QWENVL_LEAVE_SECONDS": "20"}
TWO_NODES = ["--nodes=2", "--gpus-per-node=1"]


def write_lab_recipe(
    path: Path, base: Path, shards: Path, world: int, stage: int = 2, epochs: int = 12, **train: Any
) -> Path:
    """Write a recipe of 80 steps of six samples each, output in a folder of its own name."""
    sections = {
        "data": {"micro_batch_size": 1, "workers": 0},
        "train": {
            "max_steps": None, "epochs": epochs, "grad_accum_steps": GLOBAL_BATCH // world,
            "checkpoint_every_steps": 4, "timeout_seconds": 30, **train,
        },
    }  # fmt: skip
    return write_recipe(path, base, shards, path.with_suffix(""), stage, **sections)
