"""What the tests of jobs and of several hosts train, and how they look at it."""

import json
from pathlib import Path
from typing import Any

from tests.training.runs import read_lines, write_recipe

PATIENCE = 150  # seconds for a start, on a busy machine
RANK = "-u -m qwenvl_dist train"  # in the command line of a rank, not in its launcher's
CPU = {
    "QWENVL_DEVICE": "cpu", "QWENVL_STATUS_SECONDS": "2", "QWENVL_LEAVE_SECONDS": "20", "QWENVL_PREFLIGHT": "none",
}  # fmt: skip
TWO_NODES = ["--nodes=2", "--gpus-per-node=1"]


def write_lab_recipe(path: Path, base: Path, shards: Path, stage: int = 2, **train: Any) -> Path:
    """Write a recipe of 60 steps of six samples for one, two or three ranks; its output has its name."""
    sections = {
        "data": {"micro_batch_size": 1, "workers": 0},
        "train": {
            "max_steps": None, "epochs": 9, "grad_accum_steps": None, "global_batch_size": 6,
            "checkpoint_every_steps": 4, "timeout_seconds": 30, **train,
        },
    }  # fmt: skip
    return write_recipe(path, base, shards, path.with_suffix(""), stage, **sections)


def last_step(run: Path) -> int:
    """Return the newest step that was logged, 0 before the first."""
    return max((line["step"] for line in read_lines(run / "metrics.jsonl")), default=0)


def starts(run: Path, job: str) -> list[dict[str, Any]]:
    """Return what a run folder tells of the starts of a job."""
    path = run / "logs" / f"{job}.json"
    return json.loads(path.read_text())["starts"] if path.exists() else []
