"""The hidden folder in which an output grows: it appears whole by one rename, and a killed merge can go on.

    .NAME.partial/model/         what becomes NAME
    .NAME.partial/FILE.json      a weight file in it that is finished and on the disk: its size and its tensors' records

A record file also holds the key of the merge, a hash of the base, of what was trained and of the options. What carries
another key is thrown away: two merges never mix.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwenvl_dist.errors import CheckFailed, UserError
from qwenvl_dist.files import fsync, write_atomic


class PartialOutput:
    """What `partial_output` yields: a folder to fill, and the weight files that an earlier start left there."""

    def __init__(self, folder: Path, key: str) -> None:
        self.model = folder / "model"
        self._folder = folder
        self._key = key
        self.done: dict[str, list[dict[str, Any]]] = self._keep_finished()

    def mark_done(self, file: str, records: list[dict[str, Any]]) -> None:
        """Remember a weight file, which is on the disk, with the records of its tensors."""
        size = (self.model / file).stat().st_size
        mark = {"key": self._key, "size": size, "tensors": records}
        write_atomic(self._folder / f"{file}.json", json.dumps(mark).encode())
        self.done[file] = records

    def _keep_finished(self) -> dict[str, list[dict[str, Any]]]:
        """Delete all but the finished files of the same merge; return their records by file."""
        self.model.mkdir(exist_ok=True)
        done = {}
        for path in list(self._folder.iterdir()):
            if path == self.model:
                continue
            mark = _read(path)
            file = self.model / path.name.removesuffix(".json")
            if mark.get("key") == self._key and file.is_file() and file.stat().st_size == mark["size"]:
                done[file.name] = mark["tensors"]
            else:
                path.unlink()
        for path in self.model.iterdir():
            if path.name not in done:
                path.unlink()
        return done


@contextlib.contextmanager
def partial_output(out: Path, key: str) -> Iterator[PartialOutput]:
    """Yield the hidden folder beside `out`; its `model` becomes `out` when the block ends well.

    A merge that cannot succeed (UserError, CheckFailed) takes it away. Whatever else ends the block, a kill included,
    leaves the finished files for the next start.

    Raises:
        UserError: `out` is not empty, or another merge into it is running.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    _refuse_taken(out)
    folder = out.parent / f".{out.name}.partial"
    folder.mkdir(exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another merge into {out} is running; wait for it") from error
        _refuse_taken(out)  # by one that ended just now
        try:
            partial = PartialOutput(folder, key)
            yield partial
        except (UserError, CheckFailed):
            shutil.rmtree(folder, ignore_errors=True)
            raise
        for path in partial.model.iterdir():
            fsync(path)
        fsync(partial.model)
        partial.model.rename(out)
        fsync(out.parent)
        shutil.rmtree(folder)
    finally:
        os.close(lock)


def _refuse_taken(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; remove it or name another folder")


def _read(path: Path) -> dict[str, Any]:
    """Return a record file's content; nothing for one that a kill cut off or that is none."""
    try:
        mark = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return mark if isinstance(mark, dict) else {}
