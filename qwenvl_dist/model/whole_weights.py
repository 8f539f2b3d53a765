"""A model under ZeRO-3 with all its weights on every rank for a while, to generate from.

A step of generation makes one token a caption. With partitioned weights each such step would fetch the whole model from
the other ranks; gathered once, the same captions cost one fetch, and no rank waits for another's longer caption. Where
a rank has no room for that, nothing is gathered, and the ranks have to generate in step.
"""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import psutil
import torch

from qwenvl_dist.logs import get_logger

if TYPE_CHECKING:
    from qwenvl_dist.distributed import HostGroup

log = get_logger(__name__)
RESERVE_BYTES = 1 << 30  # left free for the cache and the activations of generation


@contextlib.contextmanager
def whole_weights(model: torch.nn.Module, host: HostGroup) -> Iterator[bool]:
    """Gather a model's partitioned weights, and let them go at the end; yield whether all are whole now. Collective.

    Some rank may not have the memory: then all yield False, and each forward pass inside is collective too.
    """
    partitioned: list[Any] = [p for p in model.parameters() if _is_partitioned(p)]
    if not partitioned:
        yield True
        return
    nbytes = sum(p.ds_numel * p.element_size() for p in partitioned)
    free = _free_bytes(partitioned[0].device)
    (short,) = host.max(float(nbytes + RESERVE_BYTES - free))
    if short > 0:
        log.info(
            "generating in step over the ranks: whole weights would take %.1f GiB of each, %.1f more than is free",
            nbytes / 2**30, short / 2**30,
        )  # fmt: skip
        yield False
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(partitioned), _hooks_set_aside(model):
        yield True


def _is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO-3 holds this rank's slice alone; parameters below its persistence threshold stay whole."""
    return hasattr(parameter, "ds_status") and parameter.ds_status.name == "NOT_AVAILABLE"


def _free_bytes(device: torch.device) -> int:
    """Return the memory that this rank may still take; of a host, its equal share."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextlib.contextmanager
def _hooks_set_aside(model: torch.nn.Module) -> Iterator[None]:
    """Take off the forward hooks, by which ZeRO-3 fetches a module's weights and drops them again."""
    kept = [(module, module._forward_hooks, module._forward_pre_hooks) for module in model.modules()]
    for module, _, _ in kept:
        module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, hooks, pre_hooks in kept:
            module._forward_hooks, module._forward_pre_hooks = hooks, pre_hooks
