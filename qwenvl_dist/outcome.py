"""What became of each rank, in a file for whoever started them: a launcher swallows exit codes and reasons."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from qwenvl_dist.errors import CheckFailed, Stopped, UserError
from qwenvl_dist.files import write_atomic
from qwenvl_dist.logs import rank

FOLDER_VARIABLE = "QWENVL_OUTCOME_DIR"

Kind = Literal["finished", "stopped", "failed", "usage"]


def kind_of(error: BaseException) -> Kind:
    """Return what an end by this error is called: `usage` is exit code 2, `stopped` an agreed early exit."""
    if isinstance(error, Stopped):
        return "stopped"
    return "usage" if isinstance(error, UserError) else "failed"


def reason_of(error: BaseException) -> str:
    """Return the error in one line; one that is not ours with its type."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError | CheckFailed) else f"{type(error).__name__}: {text}"


class Outcome:
    """The end of this rank, written once to `rank-00003.json` below $QWENVL_OUTCOME_DIR, whole or not at all.

    The first of several ends counts: a thread that ends the process and the error that this brings about are one. A
    rank that is killed writes nothing. Without the variable nothing is written.
    """

    def __init__(self) -> None:
        folder = os.environ.get(FOLDER_VARIABLE)
        self._folder = Path(folder) if folder else None
        self._lock = threading.Lock()
        self.step: int | None = (
            None  # the last finished optimizer step; None before a resume has told where it is
        )

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Write how the block ended: by an error, which goes on, or finished."""
        try:
            yield
        except BaseException as error:
            self.write(kind_of(error), reason_of(error))
            raise
        self.write("finished")

    def write(self, outcome: Kind, reason: str = "") -> None:
        """Say how this rank ended: {"rank", "host", "outcome", "step", "reason"}."""
        with self._lock:
            folder, self._folder = self._folder, None
        if folder is None:
            return
        record = {
            "rank": rank(),
            "host": socket.gethostname(),
            "outcome": outcome,
            "step": self.step,
            "reason": reason,
        }
        path = folder / f"rank-{rank():05d}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(record, ensure_ascii=False).encode() + b"\n")
        except OSError as error:  # must not hide how the work itself ended
            print(f"warning: {path} cannot be written: {error.strerror}", file=sys.stderr, flush=True)
