"""Parameter groups and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from qwenvl_dist.errors import UserError
from qwenvl_dist.model.lora import part_of, trainable_parameters

if TYPE_CHECKING:
    from qwenvl_dist.config import OptimConfig


def make_optimizer(
    model: torch.nn.Module, config: OptimConfig, deepspeed: dict[str, Any]
) -> torch.optim.Optimizer:
    """Return fused AdamW over what trains; weight decay skips vectors (biases, norms, DoRA's magnitudes).

    A group's `rate_factor` is its share of the learning rate that the schedule gives. With the optimizer offloaded to
    the host, DeepSpeed's vectorised CPU Adam takes its place.

    Raises:
        UserError: a learning rate for a part of which nothing trains.
    """
    parameters = trainable_parameters(model)
    for part in config.learning_rates:
        if not any(part_of(name) == part for name in parameters):
            raise UserError(
                f"optim.learning_rates names {part!r}, of which nothing trains; name it in model.train or take it out"
            )
    rates: dict[str, float] = {**config.learning_rates}
    grouped: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        # Under ZeRO-3 a parameter's own shape is empty while it is partitioned; ds_shape keeps the real one.
        is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
        rate = rates.get(part_of(name), config.learning_rate)
        if config.lora_plus_ratio is not None and ".lora_B." in name:
            rate *= config.lora_plus_ratio  # LoRA+, arXiv:2402.12354
        grouped.setdefault((rate, config.weight_decay if is_matrix else 0.0), []).append(parameter)
    groups = [
        {"params": group, "lr": rate, "rate_factor": rate / config.learning_rate, "weight_decay": decay}
        for (rate, decay), group in grouped.items()
    ]
    offload = deepspeed["zero_optimization"].get("offload_optimizer") or {}
    if offload.get("device", "none") != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=config.learning_rate, betas=config.betas, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def learning_rate(config: OptimConfig, consumed: int, per_step: int, total: int) -> float:
    """Return the rate of the step that starts after `consumed` of `total` samples and takes `per_step`.

    Counted in samples, so that a run that goes on with another global batch keeps its schedule. Warm-up is linear and
    its first step already moves; cosine is half a period down to zero (arXiv:1608.03983, equation 5, one cycle).
    """
    warmup = config.warmup_ratio * total
    if consumed < warmup:
        return config.learning_rate * min(1.0, (consumed + per_step) / warmup)
    progress = min(1.0, (consumed - warmup) / max(1.0, total - warmup))
    if config.schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    if config.schedule == "linear":
        return config.learning_rate * (1 - progress)
    return config.learning_rate
