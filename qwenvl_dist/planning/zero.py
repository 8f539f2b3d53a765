"""What a rank holds under ZeRO: weights, gradients and optimizer, byte by byte as DeepSpeed 0.19 lays them out.

Stages 1 and 2 (runtime/zero/stage_1_and_2.py) flatten the trained parameters of each optimizer group, padded to a
multiple of 2 x ranks; a rank has masters and moments of its slice and, once they are reduced, the gradients of the
parameters that touch it. Stage 3 (runtime/zero/stage3.py) gives each rank ceil(n / ranks) elements of every parameter,
frozen ones too; parameters below a threshold stay whole besides, others are gathered while they are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from qwenvl_dist.config import OptimConfig
    from qwenvl_dist.planning.shapes import Parameter

MASTER_BYTES = 4  # float32, as is each of Adam's two moments
OPTIMIZER_BYTES = 3 * MASTER_BYTES
SWAP_LEAST_BYTES = 1 << 20  # a sub-group below it stays in memory
SWAP_BUFFERS = 4  # DeepSpeed's offload_optimizer.buffer_count

Place = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True)
class ZeroSettings:
    """What a DeepSpeed file says of memory; sizes in elements."""

    stage: int
    optimizer_on: Place = "none"
    weights_on_host: bool = False
    reduce_bucket: int = 500_000_000
    contiguous_gradients: bool = True
    overlap: bool = False
    persistence: int = 100_000
    model_persistence: int = 1 << 62
    prefetch: int = 50_000_000
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000
    sub_group: int = 1_000_000_000

    @classmethod
    def of(cls, zero: dict[str, Any], hidden: int) -> ZeroSettings:
        """Read a file's `zero_optimization`; `auto` gets what accelerate puts there for a model of this width."""
        stage = int(zero["stage"])

        def number(key: str, default: int, automatic: float = 0) -> int:
            value = zero.get(key, default)
            return int(automatic if value == "auto" else value)

        optimizer, weights = zero.get("offload_optimizer") or {}, zero.get("offload_param") or {}
        return cls(
            stage,
            optimizer.get("device", "none"),
            stage == 3 and weights.get("device", "none") != "none",
            number("reduce_bucket_size", cls.reduce_bucket, hidden**2),
            bool(zero.get("contiguous_gradients", True)),
            bool(zero.get("overlap_comm", stage == 3)),
            number("stage3_param_persistence_threshold", cls.persistence, 10 * hidden),
            number("stage3_model_persistence_threshold", cls.model_persistence),
            number("stage3_prefetch_bucket_size", cls.prefetch, 0.9 * hidden**2),
            number("stage3_max_live_parameters", cls.max_live),
            number("stage3_max_reuse_distance", cls.max_reuse),
            number("sub_group_size", cls.sub_group),
        )


@dataclass(frozen=True)
class States:
    """Bytes that one rank holds beside activations, on its GPU but for the last two.

    `gathered` and `buffers` are there in forward and backward passes, `update` in the optimizer's step alone.
    """

    weights: int  # of the base, frozen and trained
    adapter: int
    gradients: int  # of what trains, when the optimizer's step begins
    optimizer: int  # masters and moments
    gathered: int  # ZeRO-3: whole weights in use at a time
    buffers: int  # of reductions
    update: int  # float32 gradients of one group
    host: int
    nvme: int

    @property
    def kept(self) -> int:
        """Return what is there all the time."""
        return self.weights + self.adapter + self.optimizer


def optimizer_groups(parameters: Iterable[Parameter], optim: OptimConfig) -> list[list[Parameter]]:
    """Return what trains in the groups of `training/optim.py`: by learning rate and weight decay."""
    groups: dict[tuple[float, float], list[Parameter]] = {}
    rates: dict[str, float] = {**optim.learning_rates}
    for parameter in parameters:
        if not parameter.trains:
            continue
        rate = rates.get(parameter.recipe_part, optim.learning_rate)
        if optim.lora_plus_ratio is not None and ".lora_B." in parameter.name:
            rate *= optim.lora_plus_ratio
        decay = optim.weight_decay if len(parameter.shape) > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return list(groups.values())


def rank_states(
    parameters: Sequence[Parameter],
    optim: OptimConfig,
    zero: ZeroSettings,
    world_size: int,
    rank: int,
    number_bytes: int,
    accumulates: bool = False,
) -> States:
    """Return what a rank holds.

    Args:
        parameters: of the whole model.
        optim: tells the optimizer's groups.
        zero: the DeepSpeed settings.
        world_size: ranks.
        rank: which of them; rank 0 has the most.
        number_bytes: of an element of model.dtype.
        accumulates: whether an optimizer step has several micro-batches.
    """
    groups = optimizer_groups(parameters, optim)
    if zero.stage == 3:
        return _stage_3(parameters, groups, zero, world_size, number_bytes)
    return _stage_1_or_2(parameters, groups, zero, world_size, rank, number_bytes, accumulates)


def fullest_rank(
    parameters: Sequence[Parameter],
    optim: OptimConfig,
    zero: ZeroSettings,
    world_size: int,
    number_bytes: int,
    accumulates: bool = False,
) -> States:
    """Return what the rank that needs most of its GPU holds."""
    ranks = range(1 if zero.stage == 3 else world_size)  # all alike under stage 3
    each = (
        rank_states(parameters, optim, zero, world_size, rank, number_bytes, accumulates) for rank in ranks
    )
    return max(each, key=lambda states: states.kept + states.gradients)


def _stage_1_or_2(
    parameters: Sequence[Parameter],
    groups: list[list[Parameter]],
    zero: ZeroSettings,
    world_size: int,
    rank: int,
    number_bytes: int,
    accumulates: bool,
) -> States:
    padding = slices = held = whole = largest = 0
    for group in groups:
        count = sum(parameter.numel for parameter in group)
        flat = -(-count // (2 * world_size)) * 2 * world_size
        own = flat // world_size
        padding += flat - count
        slices += own
        whole += count
        largest = max(largest, own)
        held += _touching(group, own, rank)
    adapter = sum(parameter.numel for parameter in parameters if parameter.part == "adapter")
    weights = sum(parameter.numel for parameter in parameters) - adapter
    offloaded = zero.optimizer_on != "none"
    optimizer = OPTIMIZER_BYTES * slices
    gradients = number_bytes * held
    buffers = number_bytes * zero.reduce_bucket * (1 + zero.overlap) if zero.contiguous_gradients else 0
    if zero.stage == 1:  # until all are reduced
        buffers += number_bytes * (whole - held)
    elif accumulates and not offloaded:  # new ones beside the sum of the earlier micro-batches'
        buffers += gradients
    host = 0
    if offloaded:  # masters, moments and their gradients; a copy to send back; what accumulates
        host = (OPTIMIZER_BYTES + MASTER_BYTES + number_bytes) * slices + accumulates * gradients
    return States(
        weights=number_bytes * (weights + (0 if adapter else padding)),
        adapter=number_bytes * (adapter + (padding if adapter else 0)),
        gradients=0 if offloaded else gradients,
        optimizer=0 if offloaded else optimizer,
        gathered=0,
        buffers=buffers,
        update=0 if offloaded else (MASTER_BYTES + number_bytes) * largest,
        host=host,
        nvme=0,
    )


def _touching(group: Sequence[Parameter], own: int, rank: int) -> int:
    """Return the elements of the parameters that begin in a rank's slice or reach into it."""
    start, end, position, held = own * rank, own * (rank + 1), 0, 0
    for parameter in group:
        if start <= position < end or position < start < position + parameter.numel:
            held += parameter.numel
        position += parameter.numel
    return held


def _stage_3(
    parameters: Sequence[Parameter],
    groups: list[list[Parameter]],
    zero: ZeroSettings,
    world_size: int,
    number_bytes: int,
) -> States:
    def slice_of(parameter: Parameter) -> int:
        return -(-parameter.numel // world_size)

    persistent = _persistent(parameters, zero)
    held = {"adapter": 0, "base": 0}
    whole = 0
    for parameter in parameters:
        part = "adapter" if parameter.part == "adapter" else "base"
        held[part] += 0 if zero.weights_on_host else slice_of(parameter)
        # In a world of one the slice is the weight itself.
        if parameter.name in persistent and (world_size > 1 or zero.weights_on_host):
            held[part] += parameter.numel
        elif parameter.name not in persistent:
            whole += parameter.numel
    sliced = [sum(slice_of(parameter) for parameter in group) for group in groups]
    slices = sum(sliced)
    largest = max((min(count, zero.sub_group) for count in sliced), default=0)
    gathered = 0
    if world_size > 1 or zero.weights_on_host:
        largest_weight = max((p.numel for p in parameters if p.name not in persistent), default=0)
        gathered = min(whole, max(largest_weight, zero.max_live) + zero.prefetch)
    host = nvme = 0
    if zero.optimizer_on == "cpu":
        host += (OPTIMIZER_BYTES + MASTER_BYTES + number_bytes) * slices
    elif zero.optimizer_on == "nvme":
        swapped = sum(count for count in sliced if MASTER_BYTES * count >= SWAP_LEAST_BYTES)
        nvme = (OPTIMIZER_BYTES + MASTER_BYTES) * swapped
        host += (OPTIMIZER_BYTES + MASTER_BYTES) * (slices - swapped) + number_bytes * slices
        host += SWAP_BUFFERS * (OPTIMIZER_BYTES + MASTER_BYTES) // 4 * largest if swapped else 0
    if zero.weights_on_host:
        host += number_bytes * sum(slice_of(parameter) for parameter in parameters)
    on_gpu = zero.optimizer_on == "none"
    return States(
        weights=number_bytes * held["base"],
        adapter=number_bytes * held["adapter"],
        gradients=number_bytes * slices if on_gpu else 0,
        optimizer=OPTIMIZER_BYTES * slices if on_gpu else 0,
        gathered=number_bytes * gathered,
        buffers=number_bytes * zero.reduce_bucket if zero.contiguous_gradients else 0,
        update=MASTER_BYTES * largest if on_gpu else 0,
        host=host,
        nvme=nvme,
    )


def _persistent(parameters: Sequence[Parameter], zero: ZeroSettings) -> set[str]:
    names, total = set(), 0
    for parameter in parameters:
        if parameter.numel <= zero.persistence and total + parameter.numel <= zero.model_persistence:
            names.add(parameter.name)
            total += parameter.numel
    return names


def gathered_bytes(
    parameters: Sequence[Parameter], zero: ZeroSettings, world_size: int, number_bytes: int
) -> int:
    """Return the bytes of whole weights that a rank gathers for one micro-batch under ZeRO-3.

    Every weight once for the forward pass and those of the decoder and head, through which gradients go, once more for
    the backward pass; a trained tower too.
    """
    if zero.stage != 3 or (world_size == 1 and not zero.weights_on_host):
        return 0
    persistent = _persistent(parameters, zero)
    differentiated = {"decoder", "head", "adapter"}
    differentiated |= {parameter.part for parameter in parameters if parameter.trains}
    tied = not any(parameter.part == "head" for parameter in parameters)
    total = 0
    for parameter in parameters:
        if parameter.name in persistent:
            continue
        twice = parameter.part in differentiated or (tied and parameter.part == "embeddings")
        total += (1 + twice) * parameter.numel
    return number_bytes * total
