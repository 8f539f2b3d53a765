"""Find the masters and moments that DeepSpeed copied from NVMe into a checkpoint of its own.

As DeepSpeed 0.19 lays them out (runtime/engine.py, runtime/swap_tensor/optimizer_utils.py):
`offloaded_tensors/rankRR/FIRST_LAST.tensor.swp` holds a rank's masters of the sub-group whose parameters have the ids
FIRST to LAST, raw float32, `exp_avg-FIRST_LAST.tensor.swp` a moment. The rank's own file has empty tensors for them, or
with pipelined swapping what the buffers held. Nothing says which sub-groups were swapped, and which file is whose, but
that these are all above a size, and the order of the ids.
"""

import re
from pathlib import Path
from typing import Any

import torch

from qwenvl_dist.checkpoints.torch_file import StoredTensor, UnreadableCheckpoint

FOLDER = "offloaded_tensors"
_MASTERS = re.compile(r"(\d+)_(\d+)\.tensor\.swp")
_ALIGNMENT = 1 << 20  # bytes by which a file may be longer than its tensor: DeepSpeed writes whole blocks


def fill_in(
    folder: Path, rank: int, sizes: list[int], masters: list[StoredTensor], adam: list[dict[str, Any]]
) -> None:
    """Replace the masters and moments of a rank that were swapped, in place, by those in its swap files.

    Args:
        folder: of the partitions.
        rank: whose files.
        sizes: elements that each sub-group has on a rank.
        masters: by sub-group.
        adam: state of each sub-group.

    Raises:
        UnreadableCheckpoint: files missing or cut off, or not to be told apart.
    """
    place = folder / FOLDER / f"rank{rank:02d}"
    found = {path.name: _MASTERS.fullmatch(path.name) for path in place.iterdir()} if place.is_dir() else {}
    names = sorted((name for name, match in found.items() if match), key=lambda name: int(name.split("_")[0]))
    swapped = sorted(sorted(range(len(sizes)), key=lambda group: -sizes[group])[: len(names)])
    empty = [group for group, master in enumerate(masters) if master.numel == 0 and sizes[group]]
    if not names or not set(empty) <= set(swapped):
        raise UnreadableCheckpoint(
            f"{place} holds the masters of {len(names)} sub-groups, at least {len(empty)} of rank {rank} were on NVMe"
        )
    for group, name in zip(swapped, names, strict=True):
        masters[group] = _stored(place / name, sizes[group])
        for key in ("exp_avg", "exp_avg_sq"):
            if key in adam[group]:
                adam[group][key] = _stored(place / f"{key}-{name}", sizes[group])


def _stored(path: Path, count: int) -> StoredTensor:
    size = path.stat().st_size if path.is_file() else -1
    if not 4 * count <= size <= 4 * count + _ALIGNMENT:
        raise UnreadableCheckpoint(
            f"{path} has {size} bytes, {4 * count} are due: missing, cut off, or of another sub-group"
        )
    return StoredTensor(path, torch.float32, (count,), 0)
