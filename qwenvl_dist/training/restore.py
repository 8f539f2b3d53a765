"""Bring a checkpoint's tensors back into a DeepSpeed engine, by name: any number of ranks, any ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qwenvl_dist.checkpoints.zero import ZeroCheckpoint
from qwenvl_dist.errors import UserError
from qwenvl_dist.model.lora import trainable_parameters
from qwenvl_dist.training.swapped import MASTER, MOMENTS, in_memory

if TYPE_CHECKING:
    from qwenvl_dist.config import LoraConfig
    from qwenvl_dist.distributed import HostGroup


class RelayedCheckpoint:
    """A checkpoint on rank 0's own disk, read there for all ranks, tensor by tensor. All methods are collective."""

    def __init__(self, folder: Path, host: HostGroup) -> None:
        self.folder, self._host = folder, host
        self._local = ZeroCheckpoint(folder) if host.rank == 0 else None
        self.shapes: dict[str, torch.Size] = host.from_main(self._local and self._local.shapes)

    def fp32(self, name: str) -> torch.Tensor:
        """Return the float32 master weights of a parameter."""
        return self._host.from_main(self._local and self._local.fp32(name))

    def optimizer_state(self, name: str, key: str) -> torch.Tensor:
        """Return a moment of Adam, whole."""
        return self._host.from_main(self._local and self._local.optimizer_state(name, key))

    def optimizer_step(self, name: str) -> int:
        """Return how many steps Adam has made on a parameter."""
        return self._host.from_main(self._local and self._local.optimizer_step(name))


def require_same_adapter(written: dict[str, Any] | None, lora: LoraConfig | None, folder: str) -> None:
    """Raise UserError when the adapter has another shape or scaling than the checkpoint's."""
    if written is None or lora is None:
        return  # the names of the trained tensors tell
    before = type(lora).model_validate(written)  # an older checkpoint leaves out what was not there yet
    for key in type(lora).model_fields:
        if key in ("dropout", "target_modules"):
            continue  # free to change; told by the names of the trained tensors
        if getattr(before, key) != getattr(lora, key):
            raise UserError(
                f"lora.{key} = {getattr(lora, key)}: the checkpoint {folder} was trained with "
                f"{getattr(before, key)}; "
                "set it back, or start another run in another train.output_dir"
            )


def load_trained_state(engine: Any, checkpoint: ZeroCheckpoint | RelayedCheckpoint) -> None:
    """Set masters, weights and Adam's moments from a checkpoint of any world size and ZeRO stage. Collective.

    Each rank reads the slices it needs and keeps its own partition. DeepSpeed's own loading wants the same world size.
    """
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    parameters = trainable_parameters(engine.module)
    missing = sorted(set(parameters) - set(checkpoint.shapes))
    extra = sorted(set(checkpoint.shapes) - set(parameters))
    if missing or extra:
        name = (missing or extra)[0]
        raise UserError(
            f"resume from {checkpoint.folder}: {len(missing)} trained tensors are missing there and {len(extra)} are "
            f"not trained now (first: {name}); use the lora and model.train sections of that run"
        )
    zero = engine.optimizer
    steps = {checkpoint.optimizer_step(name) for name in parameters}
    assert len(steps) == 1, f"parameters disagree about Adam's step: {steps}"
    step = steps.pop()

    if engine.zero_optimization_stage() == 3:
        names = {id(parameter): name for name, parameter in parameters.items()}
        for group, members in enumerate(zero.fp16_groups):
            with in_memory(zero, group) as partition:
                state = _prepare_adam_state(zero.optimizer, partition, step)
                targets = {MASTER: partition.data, **{key: state[key] for key in MOMENTS}}
                offset = 0
                for parameter in members:
                    size = parameter.ds_tensor.numel()
                    _set_own_slices(checkpoint, names[id(parameter)], targets, offset, size)
                    offset += size
        for name, parameter in parameters.items():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if torch.distributed.get_rank() == 0 or isinstance(checkpoint, RelayedCheckpoint):
                    master = checkpoint.fp32(name)
                    parameter.data.copy_(master)
        return

    for partition in zero.single_partition_of_fp32_groups:
        _prepare_adam_state(zero.optimizer, partition, step)
    zero._hp_optimizer_states_linked = (
        False  # an engine that has made steps is linked to the moments of before
    )
    zero._lazy_init_hp_params_optimizer_state()  # links each parameter to its slice of the moments just made
    for name, parameter in parameters.items():
        master = checkpoint.fp32(name)
        safe_set_full_fp32_param(parameter, master.to(parameter.device))
        parameter.data.copy_(master)
        for key in MOMENTS:
            safe_set_full_optimizer_state(parameter, checkpoint.optimizer_state(name, key), key)


def _set_own_slices(
    checkpoint: ZeroCheckpoint | RelayedCheckpoint,
    name: str,
    targets: dict[str, torch.Tensor],
    offset: int,
    size: int,
) -> None:
    """Set this rank's piece of a parameter, `size` elements from `offset` on, in its flat masters and moments."""
    start = torch.distributed.get_rank() * size
    for key, target in targets.items():
        whole = checkpoint.fp32(name) if key == MASTER else checkpoint.optimizer_state(name, key)
        piece = whole.flatten()[start : start + size]
        target[offset : offset + size].zero_()[: piece.numel()].copy_(piece)  # the last rank's may be padded


def _prepare_adam_state(
    adam: torch.optim.Optimizer, partition: torch.Tensor, step: int
) -> dict[str, torch.Tensor]:
    """Create Adam's state of a flat partition as its first step would, with zero moments, and return it."""
    on_device = any(group.get("fused") or group.get("capturable") for group in adam.param_groups)
    count = torch.tensor(float(step), device=partition.device if on_device else "cpu")
    adam.state[partition] = {
        "step": count if isinstance(adam, torch.optim.AdamW) else step,
        **{key: torch.zeros_like(partition.data) for key in MOMENTS},
    }
    return adam.state[partition]
