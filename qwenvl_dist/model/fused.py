"""Frozen layers with an adapter, differentiated by hand.

Autograd keeps every intermediate of peft's modules and walks through each of their casts, masks and sums. With the base
weight frozen little of it is needed: for `y = x W' + s (keep * x) A' B'` (`'` transposes, `keep` is dropout's mask of
zeros and ones, s the scaling over the share kept)

    grad_x = grad_y W + keep * ((s grad_y B) A)    grad_A = (s grad_y B)' (keep * x)    grad_B = s grad_y' (keep * x A')

so x, the mask and the rank-wide `keep * x A'` are kept and nothing else. Equal to peft's modules and autograd in exact
arithmetic; one dropout mask is drawn per input rather than per module, so q, k and v (and gate and up) share theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, silu

_MASK_LEVELS = 2**16


@dataclass(frozen=True)
class Projection:
    """A frozen linear layer and its adapter, which may be missing."""

    weight: Tensor  # (out, in)
    bias: Tensor | None  # (out,)
    lora_A: Tensor | None  # (rank, in)  # noqa: N815 (peft's names)
    lora_B: Tensor | None  # (out, rank)  # noqa: N815
    scaling: float

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The four tensors, in the order that the functions below take them."""
        return self.weight, self.bias, self.lora_A, self.lora_B


def keep_mask(shape: tuple[int, ...], rate: float, device: torch.device) -> Tensor | None:
    """Return which elements of an input dropout keeps, bool; None without dropout.

    torch's Bernoulli generator on CPUs is serial and takes as long as the matrix product that follows; 16 random bits
    an element cost a seventh of it and give the rate to 1e-5.
    """
    if not rate:
        return None
    if device.type != "cpu":
        return torch.rand(shape, device=device) >= rate
    count = math.prod(shape)
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    threshold = round(rate * _MASK_LEVELS) - _MASK_LEVELS // 2
    return (words.view(torch.int16)[:count] >= threshold).view(shape)


def _masked(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return `keep * x` and `keep` as numbers."""
    if mask is None:
        return x, None
    keep = mask.to(x.dtype)  # once: a product with a bool tensor is several times slower
    return x * keep, keep


def _project(x: Tensor, kept: Tensor, projections: Sequence[Projection]) -> tuple[list[Tensor], list[Any]]:
    """Return each projection of x (rows, in), and the adapter's inner (rows, rank) of each."""
    outputs, inner = [], []
    for each in projections:
        y = linear(x, each.weight, each.bias)
        z = None
        if each.lora_A is not None and each.lora_B is not None:
            z = linear(kept, each.lora_A)
            y.addmm_(z, each.lora_B.t(), alpha=each.scaling)
        outputs.append(y)
        inner.append(z)
    return outputs, inner


def _project_backward(
    kept: Tensor,
    keep: Tensor | None,
    projections: Sequence[Projection],
    inner: Sequence[Tensor | None],
    grads: Sequence[Tensor],
    needs_input: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradient of x, and those of (weight, bias, lora_A, lora_B) of each projection in one list."""
    grad_x, low_rank, rows_a, of_parameters = None, [], [], []
    for each, z, grad in zip(projections, inner, grads, strict=True):
        grad_a = grad_b = None
        if z is not None and each.lora_A is not None and each.lora_B is not None:
            grad_z = (grad @ each.lora_B).mul_(each.scaling)
            grad_a = grad_z.t() @ kept
            grad_b = (z.t() @ grad).t().mul(each.scaling)
            low_rank.append(grad_z)
            rows_a.append(each.lora_A)
        of_parameters += [None, None, grad_a, grad_b]
        if needs_input:
            grad_x = grad @ each.weight if grad_x is None else grad_x.addmm_(grad, each.weight)
    if grad_x is not None and low_rank:
        through_adapters = torch.cat(low_rank, 1) @ torch.cat(rows_a)
        grad_x.add_(through_adapters if keep is None else through_adapters.mul_(keep))
    return grad_x, of_parameters


def _unflatten(tensors: Sequence[Any], scalings: Sequence[float]) -> list[Projection]:
    return [Projection(*tensors[4 * i : 4 * i + 4], scaling) for i, scaling in enumerate(scalings)]


class _LoraLinear(Function):
    """Projections of one input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, scalings: tuple[float, ...], *tensors: Any) -> Any:
        kept, _ = _masked(x, mask)
        outputs, inner = _project(x, kept, _unflatten(tensors, scalings))
        ctx.save_for_backward(x, mask, *tensors, *inner)
        ctx.scalings = scalings
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, mask, *rest = ctx.saved_tensors
        projections, inner = _unflatten(rest, ctx.scalings), rest[4 * len(ctx.scalings) :]
        kept, keep = _masked(x, mask)
        grad_x, of_parameters = _project_backward(
            kept, keep, projections, inner, grads, ctx.needs_input_grad[0]
        )
        return grad_x, None, None, *of_parameters


class _LoraSwiglu(Function):
    """`down(silu(gate(x)) * up(x))`; keeps gate(x) and up(x) and makes their product again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor | None, inner_mask: Tensor | None, scalings: Any, *tensors: Any
    ) -> Tensor:
        gate, up, down = _unflatten(tensors, scalings)
        kept, _ = _masked(x, mask)
        (g, u), inner = _project(x, kept, (gate, up))
        h = silu(g).mul_(u)
        kept, _ = _masked(h, inner_mask)
        (y,), inner_h = _project(h, kept, (down,))
        ctx.save_for_backward(x, mask, g, u, inner_mask, *tensors, *inner, *inner_h)
        ctx.scalings = scalings
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, mask, g, u, inner_mask, *rest = ctx.saved_tensors
        gate, up, down = _unflatten(rest, ctx.scalings)
        z_gate, z_up, z_down = rest[12:]
        activated = silu(g)
        kept, keep = _masked(activated * u, inner_mask)
        grad_h, of_down = _project_backward(kept, keep, (down,), (z_down,), grads, True)
        assert grad_h is not None
        grad_u = activated.mul_(grad_h)
        grad_g = torch.ops.aten.silu_backward(grad_h.mul_(u), g)
        kept, keep = _masked(x, mask)
        grad_x, of_x = _project_backward(
            kept, keep, (gate, up), (z_gate, z_up), (grad_g, grad_u), ctx.needs_input_grad[0]
        )
        return grad_x, None, None, None, *of_x, *of_down


def _mask_and_scalings(
    flat: Tensor, width: int, projections: Sequence[Projection], dropout: float
) -> tuple[Tensor | None, tuple[float, ...]]:
    """Draw one mask for projections of a (rows, width) input; fold 1 / (1 - dropout) into their scalings."""
    adapted = any(each.lora_A is not None for each in projections)
    mask = keep_mask((len(flat), width), dropout, flat.device) if adapted else None
    share = 1.0 if mask is None else 1 - dropout
    return mask, tuple(each.scaling / share for each in projections)


def lora_linear(x: Tensor, projections: Sequence[Projection], dropout: float) -> tuple[Tensor, ...]:
    """Return each projection of x (..., in) as (..., out); `dropout` acts on what the adapters see."""
    flat = x.reshape(-1, x.shape[-1])
    mask, scalings = _mask_and_scalings(flat, flat.shape[1], projections, dropout)
    outputs: Any = _LoraLinear.apply(flat, mask, scalings, *(t for each in projections for t in each.tensors))
    return tuple(output.view(*x.shape[:-1], output.shape[-1]) for output in outputs)


def lora_swiglu(
    x: Tensor, gate: Projection, up: Projection, down: Projection, dropouts: tuple[float, float]
) -> Tensor:
    """Return `down(silu(gate(x)) * up(x))` of x (..., in); the two rates are for gate and up, and for down."""
    flat = x.reshape(-1, x.shape[-1])
    mask, outer = _mask_and_scalings(flat, flat.shape[1], (gate, up), dropouts[0])
    inner_mask, inner = _mask_and_scalings(flat, down.weight.shape[1], (down,), dropouts[1])
    tensors = [tensor for each in (gate, up, down) for tensor in each.tensors]
    output: Any = _LoraSwiglu.apply(flat, mask, inner_mask, (*outer, *inner), *tensors)
    return output.view(*x.shape[:-1], output.shape[-1])


class _RmsNorm(Function):
    """RMS norm with a frozen weight, in float32 inside; keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(epsilon))
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        normal = x * inverse  # float32
        grad = (grads[0] * weight).float()
        along = (grad * normal).mean(-1, keepdim=True)
        return grad.addcmul_(normal, along, value=-1).mul_(inverse).to(x.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return x / rms(x) * weight over the last dimension; `weight` gets no gradient."""
    output: Any = _RmsNorm.apply(x, weight, epsilon)
    return output


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Return attention (batch, heads, seq, width) by two batched products, with fewer heads in k and v allowed.

    For short sequences on CPUs, where torch's blockwise kernel reaches half of this rate in bf16; it keeps
    (batch, heads, seq, seq). `bias` (batch or 1, seq, seq), -inf where nobody looks, has q's type.
    """
    batch, heads, length, width = q.shape
    groups = heads // k.shape[1]
    queries = q.reshape(batch * k.shape[1], groups * length, width)
    bias = bias[:, None, None].expand(batch, k.shape[1], groups, length, length)
    scores = torch.baddbmm(
        bias.reshape(len(queries), groups * length, length),
        queries,
        k.reshape(len(queries), length, width).transpose(1, 2),
        alpha=scaling,
    )
    mixed = torch.bmm(torch.softmax(scores, -1), v.reshape(len(queries), length, width))
    return mixed.view(batch, heads, length, width)
