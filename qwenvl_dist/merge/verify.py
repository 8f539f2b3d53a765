"""Read a merged folder again and prove it against the base and the checkpoint."""

import contextlib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from qwenvl_dist.errors import CheckFailed
from qwenvl_dist.merge.apply_lora import (
    TORCH_DTYPES,
    TensorPlan,
    dora_factor,
    merged_rows,
    read_rows,
    row_blocks,
)
from qwenvl_dist.merge.parallel import for_each
from qwenvl_dist.merge.safetensors_writer import COPY_BYTES, open_for_reading
from qwenvl_dist.model.base_folder import BaseFolder


@dataclass(frozen=True)
class Verified:
    """How many tensors were found right."""

    byte_equal: int = 0
    recomputed: int = 0
    converted: int = 0


def verify_output(
    base: BaseFolder, plans: dict[str, TensorPlan], out: Path, advance: Callable[[int], None]
) -> Verified:
    """Compare every tensor of `out`, read back through its own headers, with what it must be.

    An untouched tensor has the base's bytes. A merged one equals a second computation bit for
    bit; its first block also agrees with float64 arithmetic to the rounding of the output's type and the
    error bound of a float32 product (Higham, Accuracy and Stability of Numerical Algorithms, section 3.5).

    Raises:
        CheckFailed: names the first tensor that differs.
    """
    written = BaseFolder(out)
    if list(written.tensors) != list(plans) or written.files.keys() != base.files.keys():
        raise CheckFailed(f"{out}: its tensor names or files are not those of {base.path}")
    counts: Counter[str] = Counter()

    def done(name: str, how: str) -> None:
        counts[how] += 1
        advance(written.tensors[name].nbytes)

    with contextlib.ExitStack() as stack:
        sources = {file: stack.enter_context(open_for_reading(base.path / file)) for file in base.files}
        targets = {file: stack.enter_context(open_for_reading(out / file)) for file in base.files}

        def verify(name: str) -> str:
            file = plans[name].entry.file
            return _verify_tensor(plans[name], sources[file], targets[file], written)

        for_each(plans, verify, done)
    return Verified(**counts)


def _verify_tensor(plan: TensorPlan, source: int, target: int, written: BaseFolder) -> str:
    """Compare one tensor; return in which way it was right."""
    entry = written.tensors[plan.name]
    if (entry.dtype, entry.shape) != (plan.dtype, plan.entry.shape):
        raise CheckFailed(f"{written.path}: {plan.name} is {entry.dtype} {list(entry.shape)}")
    if plan.copied:
        _compare_bytes(source, plan.entry.begin, target, entry.begin, entry.nbytes, plan.name)
        return "byte_equal"
    _compare_values(plan, source, target, written)
    return "recomputed" if plan.merged else "converted"


def _compare_bytes(source: int, begin: int, target: int, offset: int, count: int, name: str) -> None:
    while count:
        size = min(count, COPY_BYTES)
        data = os.pread(source, size, begin)
        if not data or data != os.pread(target, len(data), offset):
            raise CheckFailed(f"{name} is untouched by training but differs from the base")
        begin, offset, count = begin + len(data), offset + len(data), count - len(data)


def _compare_values(plan: TensorPlan, source: int, target: int, written: BaseFolder) -> None:
    for begin, end in row_blocks(plan):
        rows = read_rows(source, plan.entry, plan.columns, begin, end)
        found = read_rows(target, written.tensors[plan.name], plan.columns, begin, end)
        weight = merged_rows(plan, rows.to(torch.float32, copy=True), begin, end)
        again = weight.to(TORCH_DTYPES[plan.dtype])
        if not torch.equal(found.view(torch.uint8), again.view(torch.uint8)):
            raise CheckFailed(f"{plan.name}: rows {begin} to {end} differ from a second computation")
        if begin == 0 and plan.delta is not None:
            _compare_float64(plan, rows, found, end)


def _compare_float64(plan: TensorPlan, base_rows: torch.Tensor, found: torch.Tensor, end: int) -> None:
    assert plan.delta is not None
    if plan.trained is not None:
        base_rows = plan.trained.elements(0, end * plan.columns).reshape(end, plan.columns)
    weight = base_rows.double()
    a, b = plan.delta.lora_a.double(), plan.delta.lora_b[:end].double()
    scaling = plan.delta.scaling
    exact = weight + scaling * (b @ a)
    terms = weight.abs() + abs(scaling) * (b.abs() @ a.abs())
    finfo, eps = torch.finfo(TORCH_DTYPES[plan.dtype]), torch.finfo(torch.float32).eps
    bound = (a.shape[0] + 3) * eps * terms
    if plan.delta.magnitude is not None:  # an error of the sum also changes its row's norm
        factor = dora_factor(exact, plan.delta.magnitude[:end])
        norms = exact.norm(dim=1, keepdim=True)
        bound = factor.abs() * (bound + exact.abs() * (bound.norm(dim=1, keepdim=True) / norms + 2 * eps))
        exact = exact * factor
    bound += (finfo.eps / 2 * exact.abs() + finfo.smallest_normal * finfo.eps) * 1.01
    worst = ((found.double() - exact).abs() - bound).max().item()
    if not worst <= 0:
        raise CheckFailed(
            f"{plan.name} differs from float64 arithmetic by more than rounding ({worst:.3g} above)"
        )
