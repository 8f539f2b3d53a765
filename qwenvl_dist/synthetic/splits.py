"""Folders of generated material that appear whole or not at all, and their two splits."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from qwenvl_dist.errors import UserError

SPLITS = ("train", "validation")


def require_split(split: str) -> None:
    """Raise UserError unless it is the name of a split."""
    if split not in SPLITS:
        raise UserError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `out` when the block ends well; `UserError` unless `out` is new or empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; remove it or choose another --out")
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_splits(
    out: Path, count: int, validation_count: int | None, write_split: Callable[[Path, str, int, int], None]
) -> dict[str, Path]:
    """Write `count` training samples and some for validation, by default an eighth, into the folder `out`.

    `write_split(folder, split, number, first_id)` makes the folder of one split, with `captions.json` and pictures; ids
    go on from split to split. Returns the caption file of each.
    """
    if validation_count is None:
        validation_count = max(1, count // 8)
    if validation_count < 0:
        raise UserError(f"validation count is {validation_count}; it must be at least 0")
    with whole_folder(out) as folder:
        first_id = 1
        for split, number in zip(SPLITS, (count, validation_count), strict=True):
            write_split(folder / split, split, number, first_id)
            first_id += number
    return {split: out / split / "captions.json" for split in SPLITS}
