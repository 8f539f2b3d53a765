"""Step folders and their MANIFEST.json: what makes a checkpoint whole, and which one is the newest that is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwenvl_dist.checkpoints.torch_file import UnreadableCheckpoint
from qwenvl_dist.checkpoints.zero import ZeroCheckpoint
from qwenvl_dist.files import fsync, sha256_of

FORMAT = "qwenvl-dist-checkpoint"
VERSION = 1
MANIFEST = "MANIFEST.json"
PARTITIONS = "zero"  # DeepSpeed's tag inside a step folder
BEST = "best"
_STEP = re.compile(r"step-(\d{8,})")


class InvalidCheckpoint(Exception):  # noqa: N818 (a verdict that resume acts on)
    """This folder is not a whole checkpoint; the message says why."""


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of a step."""
    return checkpoints / f"step-{step:08d}"


def step_folders(checkpoints: Path) -> list[Path]:
    """Return all step folders, newest first. Unfinished ones carry other names and do not appear."""
    if not checkpoints.is_dir():
        return []
    found = [
        (int(m.group(1)), p) for p in checkpoints.iterdir() if (m := _STEP.fullmatch(p.name)) and p.is_dir()
    ]
    return [path for _, path in sorted(found, reverse=True)]


def describe_file(path: Path) -> dict[str, Any]:
    """Return {"size", "sha256"} of a file."""
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def files_below(folder: Path) -> Iterator[Path]:
    """Yield every file of a folder, in a fixed order, the manifest left out."""
    yield from (p for p in sorted(folder.rglob("*")) if p.is_file() and p != folder / MANIFEST)


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write MANIFEST.json and force it and the folder to the disk."""
    path = folder / MANIFEST
    text = json.dumps({"format": FORMAT, "version": VERSION, **content}, indent=1, sort_keys=False)
    path.write_text(text + "\n", encoding="utf-8")
    fsync(path)
    fsync(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a step folder. Raises InvalidCheckpoint."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidCheckpoint(f"{MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise InvalidCheckpoint(f"{MANIFEST} cannot be read: {error}") from error
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or manifest.get("version") != VERSION
    ):
        raise InvalidCheckpoint(f"{MANIFEST} is not of format {FORMAT} version {VERSION}")
    return manifest


def verify(folder: Path) -> dict[str, Any]:
    """Check every file of a step folder against its manifest and return the manifest. Raises InvalidCheckpoint."""
    manifest = read_manifest(folder)
    listed = manifest["files"]
    present = {str(path.relative_to(folder)) for path in files_below(folder)}
    for name, expected in listed.items():
        if name not in present:
            raise InvalidCheckpoint(f"{name} is missing")
        size = (folder / name).stat().st_size
        if size != expected["size"]:
            raise InvalidCheckpoint(f"{name} has {size} bytes instead of {expected['size']}")
        if describe_file(folder / name)["sha256"] != expected["sha256"]:
            raise InvalidCheckpoint(f"{name} has another checksum")
    extra = sorted(present - set(listed))
    if extra:
        raise InvalidCheckpoint(f"{extra[0]} does not belong to it")
    return manifest


def verify_step(folder: Path) -> dict[str, Any]:
    """Do what `verify` does, and make sure that all ranks' partitions are of one step; return the manifest."""
    manifest = verify(folder)
    try:
        checkpoint = ZeroCheckpoint(folder)
        steps = sorted({checkpoint.optimizer_step(name) for name in checkpoint.shapes})
    except UnreadableCheckpoint as error:
        raise InvalidCheckpoint(str(error)) from error
    if len(steps) != 1:
        raise InvalidCheckpoint(f"its partitions are of different steps: {steps}")
    if checkpoint.world_size != manifest["world_size"]:
        raise InvalidCheckpoint(
            f"holds partitions of {checkpoint.world_size} ranks instead of {manifest['world_size']}"
        )
    return manifest


def newest_valid(checkpoints: Path) -> tuple[Path | None, dict[str, Any], list[str]]:
    """Return the newest whole checkpoint, its manifest, and a line for each newer one that was skipped."""
    skipped = []
    for folder in step_folders(checkpoints):
        try:
            return folder, verify_step(folder), skipped
        except InvalidCheckpoint as error:
            skipped.append(f"{folder.name}: {error}")
    return None, {}, skipped
