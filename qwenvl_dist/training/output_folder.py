"""The run folder before the first step: do all ranks see one and the same, and what of earlier runs moves aside."""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from qwenvl_dist.checkpoints.publish import describe
from qwenvl_dist.errors import UserError
from qwenvl_dist.logs import get_logger

if TYPE_CHECKING:
    from qwenvl_dist.distributed import HostGroup

log = get_logger(__name__)
PATIENCE = 5.0  # seconds: a network file system may show a new file late


def ranks_elsewhere(run: Path, host: HostGroup, shared: bool) -> list[int]:
    """Return the ranks that do not see rank 0's output folder, having made sure that all can write theirs. Collective.

    Raises UserError on all ranks when one cannot write, or when there are such ranks and the folder should be shared.
    """
    probe = run / f".probe-{host.from_main(uuid.uuid4().hex)}"
    own = probe.with_name(f"{probe.name}-{host.rank}")
    failure = ""
    try:
        run.mkdir(parents=True, exist_ok=True)
        own.write_text("written by every rank at the start\n", encoding="utf-8")
        if host.rank == 0:
            probe.touch()
    except OSError as error:
        failure = f"rank {host.rank} cannot write there: {describe(error)}"
    failures = [text for text in host.gather(failure) if text]
    elsewhere: list[int] = []
    if not failures:
        elsewhere = [rank for rank, sees in enumerate(host.gather(_appears(probe))) if not sees]
    host.barrier()
    for path in (own, probe) if host.rank == 0 else (own,):
        with contextlib.suppress(OSError):  # where it could not be written, that is told below
            path.unlink()
    if failures:
        raise UserError(f"train.output_dir = {run}: {failures[0]}; choose another folder or mend this one")
    if elsewhere and shared:
        raise UserError(
            f"train.output_dir = {run}: ranks {elsewhere} do not see what rank 0 writes there; use a folder on storage "
            "that all nodes share, or set train.output_shared=false to gather checkpoints on the node of rank 0"
        )
    if elsewhere:
        log.info("ranks %s have output folders of their own; rank 0 writes their checkpoint files", elsewhere)
    return elsewhere


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def set_aside(run: Path, path: Path) -> Path:
    """Move a part of the run folder to the same place below `discarded/`, under a free name; return that."""
    target = free = run / "discarded" / path.relative_to(run)
    number = 0
    while free.exists():
        number += 1
        free = target.with_name(f"{target.name}-{number}")
    free.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(path, free)  # which may lie on another file system
    return free


# Beside the checkpoints: what belongs to the earlier run alone. The history files are rewound line by line.
_OF_ONE_RUN = ("generations", "launches.jsonl", "tracking.json", "swanlab", "wandb", "tensorboard")


def set_aside_earlier_run(run: Path) -> None:
    """Move an earlier run's files away, since the recipe says not to resume. Rank 0 only."""
    for name in _OF_ONE_RUN:
        if (run / name).exists():
            set_aside(run, run / name)
    if (run / "checkpoints").exists():
        target = set_aside(run, run / "checkpoints")
        log.warning("train.resume=never: moved earlier checkpoints to %s", target)
