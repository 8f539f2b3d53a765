"""Masters and moments that DeepSpeed keeps in swap files (ZeRO-3 with offload_optimizer.device nvme).

Between steps the tensors of a swapped sub-group are empty; each has a file of its own, raw float32, in the folder that
DeepSpeed made below `nvme_path`. Sub-groups of less than 1 MiB stay in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


def is_swapped(zero: Any, group: int) -> bool:
    """Whether the tensors of a sub-group of DeepSpeed's stage-3 optimizer are in swap files."""
    return bool(getattr(zero, "swap_optimizer", False)) and zero._swappable_optimizer_subgroup(group)


@contextlib.contextmanager
def in_memory(zero: Any, group: int) -> Iterator[torch.Tensor]:
    """Yield the flat masters of a sub-group; what the block changes, its state of Adam included, is written back."""
    swapped = is_swapped(zero, group)
    if swapped:
        zero._optimizer_states_and_gradient_swap_in(group)
    yield zero.fp32_partitioned_groups_flat[group]
    if swapped:
        zero._optimizer_states_and_gradient_swap_out(group)


def mapped(zero: Any, group: int) -> dict[str, torch.Tensor]:
    """Return masters and moments of a swapped sub-group as views of their files, valid until the next step."""
    count = int(zero.fp16_partitioned_groups_flat_numel[group])
    swap_info = zero.optimizer_swapper.swap_params_info[zero.fp32_partitioned_groups_flat[group].ds_id]
    names = {context.compute_tensor.ds_id: context.swap_path for context in swap_info.tensors}
    files = {
        MASTER if key == swap_info.param_id else key.removesuffix(f"-{swap_info.param_id}"): path
        for key, path in names.items()
    }
    return {name: torch.from_file(path, shared=False, size=count) for name, path in files.items()}


def fill_in(zero: Any, saved: dict[str, Any]) -> None:
    """Put what is in swap files where DeepSpeed's state of a stage-3 optimizer has empty tensors."""
    masters = saved["fp32_flat_groups"] = list(saved["fp32_flat_groups"])
    states = saved["optimizer_state_dict"]["state"]
    for group in range(len(masters)):
        if is_swapped(zero, group):
            tensors = mapped(zero, group)
            masters[group] = tensors.pop(MASTER)
            if group in states:
                states[group] = {**states[group], **tensors}
