"""The files of a run folder that tell what happened: metrics, ledger, bad samples.

They hold the surviving history. When a run resumes at step S, lines of later steps move to `discarded/`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from qwenvl_dist.data.batch import BadSampleRecord
from qwenvl_dist.errors import CheckFailed


class JsonLines:
    """An append-only file of JSON objects, one a line; each line reaches the kernel before `append` returns.

    Raises CheckFailed when the disk does not take it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file: TextIO = path.open("a", encoding="utf-8")

    def append(self, record: dict[str, Any]) -> None:
        """Write one line; a number that is not finite becomes null, since JSON has no NaN."""
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        with self._told():
            self._file.write(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Force what was written to the disk."""
        with self._told():
            os.fsync(self._file.fileno())

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckFailed(
                f"{self.path} cannot be written: {error.strerror}; mend the storage and start again to resume"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class RunHistory:
    """The history files as one rank writes them."""

    def __init__(self, run: Path, rank: int, ledger: bool) -> None:
        self._metrics = JsonLines(run / "metrics.jsonl") if rank == 0 else None
        self._bad = JsonLines(run / "bad_samples.jsonl") if rank == 0 else None
        self._ledger = JsonLines(run / "ledger" / f"rank-{rank:05d}.jsonl") if ledger else None

    def metrics(self, values: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl. Rank 0 writes, others do nothing."""
        if self._metrics:
            self._metrics.append(values)

    def bad_samples(self, records: list[BadSampleRecord], step: int) -> None:
        """Add a line for each bad sample met in `step`. Rank 0 writes, others do nothing."""
        for record in records if self._bad else ():
            assert self._bad
            self._bad.append(
                {"shard": record.shard, "key": record.key, "reason": record.reason, "step": step}
            )

    def consumed(self, step: int, keys: list[str]) -> None:
        """Add what this rank consumed in `step` to the ledger, if there is one."""
        if self._ledger:
            self._ledger.append({"step": step, "keys": keys})

    def sync(self) -> None:
        """Force everything to the disk; called before a checkpoint claims these steps as done."""
        for file in (self._metrics, self._bad, self._ledger):
            if file:
                file.sync()


def rewind(run: Path, step: int) -> int:
    """Move lines and generations of steps after `step` to `discarded/`; return how many lines.

    Rank 0 only, before files are opened. A torn last line (the writer was killed) is dropped.
    """
    moved = 0
    for path in sorted((run / "generations").glob("step-*.json")):
        if int(path.stem.removeprefix("step-")) > step:
            target = run / "discarded" / path.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    files = [run / "metrics.jsonl", run / "bad_samples.jsonl", *sorted((run / "ledger").glob("rank-*.jsonl"))]
    for path in files:
        if not path.is_file():
            continue
        kept, late, torn = [], [], 0
        text = path.read_text(encoding="utf-8")
        for line in text.removesuffix("\n").split("\n") if text else ():  # splitlines() also splits at U+2028
            try:
                (kept if json.loads(line)["step"] <= step else late).append(line)
            except (json.JSONDecodeError, KeyError, TypeError):
                torn += 1
        if not late and not torn and (not text or text.endswith("\n")):
            continue
        moved += len(late)
        if late:
            target = run / "discarded" / path.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("a", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in late)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        temporary.replace(path)
    return moved
