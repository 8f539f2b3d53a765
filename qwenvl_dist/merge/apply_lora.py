"""Decide what happens to every tensor of the base, and compute the merged ones row block by row block.

    merged = round(W + scaling * lora_B @ lora_A)

in float32 with one rounding to the output's type. W is the base's weight, or the one trained in its place. With DoRA
each row of the sum is scaled to its magnitude before the rounding.
"""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qwenvl_dist.errors import UserError
from qwenvl_dist.merge.adapter import LoraConfig, LoraDelta, TrainedParameter
from qwenvl_dist.merge.trained import Trained
from qwenvl_dist.model.base_folder import BaseFolder, TensorEntry
from qwenvl_dist.model.names import EMBEDDING, LM_HEAD, hub_name, runtime_name

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCK_ELEMENTS = 1 << 18  # 1 MiB in float32: few calls, and a block stays in the cache through them


@dataclass(frozen=True)
class TensorPlan:
    """What happens to one tensor of the base; without delta and trained it keeps its value."""

    name: str  # in the base's files
    entry: TensorEntry  # in the base
    dtype: str  # of the output, as safetensors writes it
    delta: LoraDelta | None = None
    trained: TrainedParameter | None = None

    @property
    def merged(self) -> bool:
        """Whether training changed the tensor."""
        return self.delta is not None or self.trained is not None

    @property
    def copied(self) -> bool:
        """Whether its bytes stay as they are."""
        return not self.merged and self.dtype == self.entry.dtype

    @property
    def rows(self) -> int:
        """Number of rows; a vector's elements are rows of one."""
        return self.entry.shape[0] if self.entry.shape else 1

    @property
    def columns(self) -> int:
        """Elements in a row."""
        return torch.Size(self.entry.shape[1:]).numel()


def make_plan(base: BaseFolder, trained: Trained, dtype: str | None) -> dict[str, TensorPlan]:
    """Return a plan for every tensor of the base, by the base's names, using everything that was trained.

    Args:
        base: whose names and shapes hold.
        trained: what to put in.
        dtype: of floating-point tensors in the output, None to keep each one's.

    Raises:
        UserError: something trained has no place in the base, or a place of another shape or type.
    """
    if base.config.get("quantization_config"):
        raise UserError(f"{base.path} is quantised; merge into the base that it was made from")
    by_tensor = {f"{module}.weight": delta for module, delta in trained.deltas.items()}
    for module, delta in trained.deltas.items():
        if delta.bias is not None:
            if f"{module}.bias" not in base.by_runtime_name:
                raise UserError(
                    f"{trained.source}: lora_bias trained a bias for {module}, which has none in {base.path}; "
                    "use the adapter as it is (--adapter-out)"
                )
            by_tensor[f"{module}.bias"] = delta.of_bias()
    parameters = dict(trained.parameters)
    if base.tied:
        _tie(base, by_tensor, parameters)
    unknown = sorted(name for name in {*by_tensor, *parameters} if name not in base.by_runtime_name)
    if unknown:
        raise UserError(
            f"{base.path} has no tensor for {len(unknown)} of {len(by_tensor) + len(parameters)} trained "
            f"ones, such as {unknown[0]}: the checkpoint belongs to another kind of base"
        )
    _check_complete(base, trained)

    plans = {}
    for name, entry in base.tensors.items():
        delta = by_tensor.get(runtime_name(name))
        parameter = parameters.get(runtime_name(name))
        out = dtype if dtype and entry.dtype in TORCH_DTYPES else entry.dtype
        for what in (delta, parameter):
            if what is not None and tuple(what.shape) != entry.shape:
                raise UserError(
                    f"{name} has shape {list(entry.shape)} in {base.path} and {list(what.shape)} in "
                    f"{trained.source}: the checkpoint belongs to a base of another size"
                )
        plan = TensorPlan(name, entry, out, delta, parameter)
        if plan.merged and entry.dtype not in TORCH_DTYPES:
            raise UserError(
                f"{name} is {entry.dtype} in {base.path}; only F32, BF16 and F16 can be merged into"
            )
        plans[name] = plan
    if not any(plan.merged for plan in plans.values()):
        raise UserError(f"{trained.source} would change no tensor of {base.path}")
    return plans


def _tie(base: BaseFolder, by_tensor: dict[str, LoraDelta], parameters: dict[str, TrainedParameter]) -> None:
    """Let head and embedding of a tied base stay one, whichever name it was trained under."""
    for tied in (LM_HEAD, EMBEDDING):
        if tied in by_tensor or (tied in parameters and parameters[tied].in_adapter):
            raise UserError(
                f"the adapter trains {tied}, which {base.path} ties to the other end of the model: "
                "merging it would change both; untie the base first, or use the adapter as it is"
            )
    if LM_HEAD in parameters and EMBEDDING in parameters:
        raise UserError(f"{LM_HEAD} and {EMBEDDING} were trained apart, but {base.path} ties them")
    shared = parameters.get(LM_HEAD) or parameters.get(EMBEDDING)
    parameters.pop(LM_HEAD, None)
    if shared is not None:
        parameters[EMBEDDING] = shared
        if LM_HEAD in base.tensors:
            parameters[LM_HEAD] = shared


def _check_complete(base: BaseFolder, trained: Trained) -> None:
    """Refuse an adapter that lacks what its config names (peft's rule for targets: the name or its end)."""
    if trained.adapter_config is None:
        return
    config = LoraConfig(trained.adapter_config, trained.source)
    targets = config.raw.get("target_modules")
    weights = {name.removesuffix(".weight") for name in base.by_runtime_name if name.endswith(".weight")}
    modules = {module for module in weights if not config.excludes(module)}
    restricted = config.raw.get("layers_to_transform") is not None
    if isinstance(targets, str):
        due = {target: {m for m in modules if _fullmatch(targets, m)} for target in [targets]}
        due = {} if targets == "all-linear" else due
    else:
        due = {
            target: {m for m in modules if m == target or m.endswith(f".{target}")}
            for target in targets or []
        }
    for target, expected in due.items():
        missing = sorted(expected - trained.deltas.keys())
        if missing and not (restricted and len(missing) < len(expected)):
            raise UserError(
                f"{trained.source}: its config targets {target}, but {len(missing)} of {len(expected)} "
                f"modules, such as {missing[0]}, have no adapter tensors: the checkpoint is incomplete"
            )
    copies = {name for name, parameter in trained.parameters.items() if parameter.in_adapter}
    saved = {name for name in base.by_runtime_name if config.saves(name)}
    found = {end for name in copies for end in config.saves(name)}
    for name in sorted((saved - copies) or set(config.raw.get("modules_to_save") or ()) - found):
        raise UserError(
            f"{trained.source}: modules_to_save names {name}, of which it has no tensors: it is incomplete"
        )
    for name in sorted(copies - saved - {f"{module}.weight" for module in trained.deltas}):
        raise UserError(f"{trained.source}: {name} is a copy that modules_to_save does not name")


def _fullmatch(pattern: str, module: str) -> bool:
    """Match as peft does, whatever name the pattern was written for."""
    return any(re.fullmatch(pattern, name) for name in (module, hub_name(module)))


def row_blocks(plan: TensorPlan) -> Iterator[tuple[int, int]]:
    """Yield (first row, last row + 1) of blocks that fit in the memory bound."""
    step = _rows_in_block(plan)
    for begin in range(0, plan.rows, step):
        yield begin, min(begin + step, plan.rows)


def _rows_in_block(plan: TensorPlan) -> int:
    return min(max(1, plan.rows), max(1, BLOCK_ELEMENTS // max(1, plan.columns)))


class BlockBuffers:
    """Memory for one block of a tensor on its way, used again for each: fresh memory costs more than the arithmetic."""

    def __init__(self, plan: TensorPlan) -> None:
        shape = (_rows_in_block(plan), plan.columns)
        self.base = torch.empty(shape, dtype=TORCH_DTYPES[plan.entry.dtype])
        self.exact = torch.empty(shape)
        self.spare = torch.empty(shape)
        self.differs = np.empty(shape, dtype=bool)


def read_rows(
    descriptor: int,
    entry: TensorEntry,
    columns: int,
    begin: int,
    end: int,
    buffer: torch.Tensor | None = None,
) -> torch.Tensor:
    """Read rows of a tensor from a safetensors file as they are, into the first rows of `buffer` if there is one."""
    dtype = TORCH_DTYPES[entry.dtype]
    rows = torch.empty((end - begin, columns), dtype=dtype) if buffer is None else buffer[: end - begin]
    memory = rows.view(torch.uint8).reshape(-1).numpy().data
    read_into(descriptor, memory, entry.begin + begin * columns * dtype.itemsize, entry.file)
    return rows


def read_into(descriptor: int, memory: memoryview, offset: int, name: str) -> None:
    """Fill memory from a place in a file; `name` is for the error when it ends before that."""
    while memory:
        count = os.preadv(descriptor, [memory], offset)
        if not count:
            raise OSError(f"{name} ended early")
        memory, offset = memory[count:], offset + count


def merged_rows(plan: TensorPlan, weight: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """Return rows of the merged tensor in float32, (rows, columns).

    Args:
        plan: of the tensor.
        weight: the base's rows in float32, which are overwritten.
        begin: first row.
        end: last row + 1.
    """
    if plan.trained is not None:
        count = (end - begin) * plan.columns
        weight = plan.trained.elements(begin * plan.columns, count).reshape(end - begin, plan.columns)
    if plan.delta is None:
        return weight
    weight.addmm_(plan.delta.lora_b[begin:end], plan.delta.lora_a, alpha=plan.delta.scaling)
    if plan.delta.magnitude is not None:
        weight.mul_(dora_factor(weight, plan.delta.magnitude[begin:end]).to(torch.float32))
    return weight


def dora_factor(rows: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Return (rows, 1) float64: what gives each row the length in `magnitude`, as peft's DoraLinearVariant merges."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
    return magnitude.double()[:, None] / norms


class Change:
    """What a merge did to one tensor, summed up block by block."""

    def __init__(self, plan: TensorPlan) -> None:
        self._plan = plan
        self._changed, self._base, self._moved, self._rounding = 0, 0.0, 0.0, 0.0
        # LoRA's own change needs no pass over the weight
        self._low_rank = plan.delta is not None and plan.delta.magnitude is None and plan.trained is None

    def add_base(self, weight: torch.Tensor) -> None:
        """Count the base's rows in float32."""
        self._base += sum_of_squares(weight)

    def add(
        self, buffers: BlockBuffers, base: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor
    ) -> None:
        """Count rows: the base's, the merged ones in float32, and as they are written.

        Raises:
            UserError: a value that is written is not finite.
        """
        spare, differs = buffers.spare[: len(base)], buffers.differs[: len(base)]
        if base.dtype == rounded.dtype:  # bits: numpy compares integers ten times faster
            bits = {2: torch.int16, 4: torch.int32}[base.dtype.itemsize]
            np.not_equal(base.view(bits).numpy(), rounded.view(bits).numpy(), out=differs)
            self._changed += int(np.count_nonzero(differs))
        else:
            self._changed += int((base.to(rounded.dtype) != rounded).count_nonzero())
        if not self._low_rank:
            self._moved += sum_of_squares(torch.sub(exact, base, out=spare))
        rounding = sum_of_squares(spare.copy_(rounded).sub_(exact))  # not finite where one of them is not
        if not math.isfinite(rounding):
            _raise_if_not_finite(self._plan, rounded)
        self._rounding += rounding

    def line(self) -> dict[str, Any]:
        """Return the report's line.

        `relative_delta` is the change's Frobenius norm over the base's, `rounding_error` that of what rounding to the
        output's type took away over the change's, `changed` the share of values that are others than the base's.
        """
        line: dict[str, Any] = {"name": self._plan.name, "shape": list(self._plan.entry.shape)}
        delta = self._plan.delta
        if delta is not None and not delta.vector:
            line |= {"rank": delta.lora_a.shape[0], "scaling": delta.scaling}
        norm = delta.norm() if delta is not None and self._low_rank else math.sqrt(self._moved)
        line["relative_delta"] = norm / math.sqrt(self._base) if self._base else None
        line["rounding_error"] = math.sqrt(self._rounding) / norm if norm else None
        line["changed"] = self._changed / max(1, self._plan.rows * self._plan.columns)
        return line


def sum_of_squares(rows: torch.Tensor) -> float:
    """Return the squared Frobenius norm of a float32 block."""
    return float(torch.dot(rows.view(-1), rows.view(-1)))


def _raise_if_not_finite(plan: TensorPlan, rounded: torch.Tensor) -> Any:
    bad = int((~torch.isfinite(rounded)).sum())
    if bad:
        raise UserError(
            f"{plan.name} would hold {bad} values that are not finite as {plan.dtype}: the trained values "
            "are NaN, or too large for the type; use an older checkpoint, or --dtype bfloat16 or float32"
        )
