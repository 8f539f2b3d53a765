"""Files of a repository, as they were at one commit, in a folder: fetched, checked, and written down."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qwenvl_dist.data.storage import ReadPolicy, StorageError
from qwenvl_dist.download.hub import HubRepository
from qwenvl_dist.download.modelscope import ModelScopeRepository
from qwenvl_dist.download.repository import HubFile, Repository
from qwenvl_dist.download.waiting import heard
from qwenvl_dist.errors import CheckFailed, UserError
from qwenvl_dist.files import write_atomic

Result = TypeVar("Result")

RECORD_NAME = "download.json"
PATIENCE = ReadPolicy()
CHECKS_AT_A_TIME = 4
DAMAGED_TRIES = 2


@dataclass(frozen=True)
class SnapshotReport:
    """What is in the folder now."""

    commit: str | None
    files: int
    fetched: int  # of these, in this run
    bytes: int
    seconds: float


def snapshot(
    repository: Repository,
    files: Sequence[HubFile],
    out: Path,
    *,
    revision: str | None = None,
    connections: int = 8,
    policy: ReadPolicy = PATIENCE,
) -> SnapshotReport:
    """Bring files of a repository into a folder and check each against what the hub says of it.

    `download.json` in the folder says what it holds: source, repository, revision, commit, and each file's size and
    hash; `complete` is false until all were checked. A folder that holds another commit, or other content, is refused.
    A file that is there and good is not fetched again; one that is damaged is.
    """
    started = time.monotonic()
    record = {
        "source": repository.source,
        "repository": repository.name,
        "revision": revision,
        "commit": repository.commit,
        "complete": False,
        "files": [vars(file) for file in files],
    }
    _open_folder(out, repository, files)
    missing = _faulty(files, out)
    _check_room(out, missing)
    _write_record(out, record)
    fetched = len(missing)
    for attempt in range(DAMAGED_TRIES):
        if not missing:
            break
        names = [file.name for file, _ in missing]
        for name in names:
            (out / name).unlink(missing_ok=True)
        patiently(repository.name, lambda names=names: repository.fetch(names, out, connections), policy)
        missing = _faulty([file for file, _ in missing], out)
        if missing and attempt == DAMAGED_TRIES - 1:
            file, fault = missing[0]
            more = f", and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise CheckFailed(
                f"{out / file.name} {fault}{more}, fetched {DAMAGED_TRIES} times; try again later"
            )
    _write_record(out, {**record, "complete": True})
    total = sum(file.size for file in files)
    return SnapshotReport(repository.commit, len(files), fetched, total, time.monotonic() - started)


def open_repository(
    source: str, name: str, kind: str, revision: str | None, policy: ReadPolicy = PATIENCE
) -> tuple[Repository, list[HubFile]]:
    """Return a repository, `kind` model or dataset, pinned to what `revision` means now, and its files."""

    def ask() -> tuple[Repository, list[HubFile]]:
        repository = (
            HubRepository(name, kind, revision)
            if source == "hf"
            else ModelScopeRepository(name, kind, revision)
        )
        return repository, repository.files()

    return patiently(name, ask, policy)


def patiently(name: str, action: Callable[[], Result], policy: ReadPolicy) -> Result:
    """Run an action under a policy; what fails in the end is a `CheckFailed`."""
    try:
        return policy.run(lambda: heard(action))
    except StorageError as error:
        raise CheckFailed(f"{name}: {error}; the same command goes on where it stopped") from None


def _open_folder(out: Path, repository: Repository, files: Sequence[HubFile]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        others = sorted(path.name for path in out.iterdir())
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from None
    if not others:
        return
    if RECORD_NAME not in others:
        raise UserError(
            f"{out}: holds other data ({', '.join(others[:3])}); --out must be a new or empty folder"
        )
    try:
        there: dict[str, Any] = json.loads((out / RECORD_NAME).read_bytes())
        same = (there["source"], there["repository"]) == (repository.source, repository.name)
        commit, content = (
            there["commit"],
            {(entry["name"], entry["size"], entry["sha256"]) for entry in there["files"]},
        )
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{out / RECORD_NAME}: is no record of a download; remove it, or choose another --out"
        ) from None
    if not same:
        raise UserError(f"{out}: holds {there['repository']} of {there['source']}; choose another --out")
    if commit != repository.commit:
        raise UserError(
            f"{out}: holds commit {commit}, asked for is {repository.commit}: pass --revision {commit}, or choose "
            "another --out"
        )
    if content != {(file.name, file.size, file.sha256) for file in files}:
        raise UserError(f"{out}: holds other files of {repository.name} than asked for; choose another --out")


def _faulty(files: Sequence[HubFile], out: Path) -> list[tuple[HubFile, str]]:
    with ThreadPoolExecutor(CHECKS_AT_A_TIME) as pool:
        faults = pool.map(lambda file: file.fault(out / file.name), files)
        return [(file, fault) for file, fault in zip(files, faults, strict=True) if fault is not None]


def _check_room(out: Path, missing: Sequence[tuple[HubFile, str]]) -> None:
    need, free = sum(file.size for file, _ in missing), shutil.disk_usage(out).free
    if need > free:
        raise UserError(
            f"{out}: {need / 2**30:.1f} GiB are to be fetched, {free / 2**30:.1f} GiB are free; choose another --out"
        )


def _write_record(out: Path, record: dict[str, Any]) -> None:
    write_atomic(out / RECORD_NAME, (json.dumps(record, indent=1) + "\n").encode())
