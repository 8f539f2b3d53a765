"""Frozen layers with an adapter, differentiated by hand.

Autograd keeps every intermediate of peft's modules and walks through each of their casts, masks and sums. With the base
weight frozen little of it is needed: for `y = x W' + s (keep * x) A' B'` (`'` transposes, `keep` is dropout's mask of
zeros and ones, s the scaling over the share kept)

    grad_x = grad_y W + keep * ((s grad_y B) A)    grad_A = (s grad_y B)' (keep * x)    grad_B = s grad_y' (keep * x A')

so x, the mask and the rank-wide `keep * x A'` are kept and nothing else. Equal to peft's modules and autograd in exact
arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, silu

_MASK_LEVELS = 2**15
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_TENSORS = 5  # of a projection


@dataclass(frozen=True)
class Projection:
    """A frozen linear layer and its adapter, which may be missing."""

    weight: Tensor  # (out, in)
    bias: Tensor | None = None  # (out,)
    lora_A: Tensor | None = None  # (rank, in)  # noqa: N815 (peft's names)
    lora_B: Tensor | None = None  # (out, rank)  # noqa: N815
    mask: Tensor | None = None  # (rows, in), see keep_mask: what dropout keeps of the adapter's input
    scaling: float = 1.0  # with a mask over the share that it keeps

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What autograd must know of."""
        return self.weight, self.bias, self.lora_A, self.lora_B, self.mask

    def with_dropout(self, rows: int, rate: float) -> Projection:
        """Draw the mask for an input of (rows, in)."""
        if not rate or self.lora_A is None:
            return self
        mask = keep_mask((rows, self.weight.shape[1]), rate, self.weight.device)
        return replace(self, mask=mask, scaling=self.scaling / (1 - rate))


def keep_mask(shape: tuple[int, ...], rate: float, device: torch.device) -> Tensor:
    """Return which elements of an input dropout keeps: integers, all bits set where it does and none elsewhere.

    torch's Bernoulli generator on CPUs is serial and takes as long as the matrix product that follows; 15 random bits
    an element cost a seventh of it and give the rate to 3e-5. A mask of bits, since `&` runs at the speed of memory
    where a product with a bool tensor takes tens of times as long on a CPU; int16, the width of bfloat16, or on a GPU,
    where widening costs nothing to speak of and memory is dear, int8.
    """
    count = math.prod(shape)
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device).random_(-(2**63), None)
    numbers = words.view(torch.int16)[:count].bitwise_and_(_MASK_LEVELS - 1)
    below = numbers.sub_(round((1 - rate) * _MASK_LEVELS))
    mask = below.bitwise_right_shift_(15).view(shape)  # the sign, in all bits
    return mask if device.type == "cpu" else mask.to(torch.int8)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return x, zero where the mask is."""
    if mask is None:
        return x
    bits = x.view(_BITS[x.element_size()])
    return (bits & mask.to(bits.dtype)).view(x.dtype)  # in a wider type all bits stay set: -1 remains -1


class _Dropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scaling = scaling
        return _masked(x, mask).mul_(scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, /, *grads: Tensor) -> Any:  # type: ignore[override]
        (mask,) = ctx.saved_tensors
        return _masked(grads[0], mask).mul_(ctx.scaling), None, None


class MaskDropout(nn.Module):
    """Dropout that draws the same masks as the fused layers, for layers that stay modules."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.p = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return x with some elements zero and the others larger; x itself outside training."""
        if not self.training:
            return x
        output: Any = _Dropout.apply(x, keep_mask(x.shape, self.p, x.device), 1 / (1 - self.p))
        return output


def _project(x: Tensor, each: Projection) -> tuple[Tensor, Tensor | None]:
    """Return the projection of x (rows, in), and the adapter's inner (rows, rank)."""
    y = linear(x, each.weight, each.bias)
    if each.lora_A is None or each.lora_B is None:
        return y, None
    z = linear(_masked(x, each.mask), each.lora_A)
    return y.addmm_(z, each.lora_B.t(), alpha=each.scaling), z


def _project_backward(
    x: Tensor, each: Projection, z: Tensor | None, grad: Tensor, grad_x: Tensor | None, needs_input: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradient of x, added to `grad_x`, and those of the projection's tensors."""
    if needs_input:
        grad_x = grad @ each.weight if grad_x is None else grad_x.addmm_(grad, each.weight)
    if z is None or each.lora_A is None or each.lora_B is None:
        return grad_x, [None] * _TENSORS
    grad_z = (grad @ each.lora_B).mul_(each.scaling)
    grad_b = (z.t() @ grad).t().mul(each.scaling)
    if grad_x is not None:
        if each.mask is None:
            grad_x.addmm_(grad_z, each.lora_A)
        else:
            grad_x.add_(_masked(grad_z @ each.lora_A, each.mask))
    return grad_x, [None, None, grad_z.t() @ _masked(x, each.mask), grad_b, None]


def _unflatten(tensors: Sequence[Any], scalings: Sequence[float]) -> list[Projection]:
    starts = range(0, _TENSORS * len(scalings), _TENSORS)
    return [
        Projection(*tensors[start : start + _TENSORS], scaling=scaling)  # type: ignore[arg-type]
        for start, scaling in zip(starts, scalings, strict=True)
    ]


class _LoraLinear(Function):
    """Projections of one input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scalings: tuple[float, ...], *tensors: Any) -> Any:
        outputs, inner = zip(*(_project(x, each) for each in _unflatten(tensors, scalings)), strict=True)
        ctx.save_for_backward(x, *tensors, *inner)
        ctx.scalings = scalings
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, /, *grads: Tensor) -> Any:  # type: ignore[override]
        x, *rest = ctx.saved_tensors
        inner = rest[_TENSORS * len(ctx.scalings) :]
        grad_x, of_tensors = None, []
        for each, z, grad in zip(_unflatten(rest, ctx.scalings), inner, grads, strict=True):
            grad_x, found = _project_backward(x, each, z, grad, grad_x, ctx.needs_input_grad[0])
            of_tensors += found
        return grad_x, None, *of_tensors


class _LoraSwiglu(Function):
    """`down(silu(gate(x)) * up(x))`; keeps gate(x) and up(x) and makes their product again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scalings: tuple[float, ...], *tensors: Any) -> Tensor:
        gate, up, down = _unflatten(tensors, scalings)
        (g, z_gate), (u, z_up) = _project(x, gate), _project(x, up)
        y, z_down = _project(silu(g).mul_(u), down)
        ctx.save_for_backward(x, g, u, z_gate, z_up, z_down, *tensors)
        ctx.scalings = scalings
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, /, *grads: Tensor) -> Any:  # type: ignore[override]
        x, g, u, z_gate, z_up, z_down, *tensors = ctx.saved_tensors
        gate, up, down = _unflatten(tensors, ctx.scalings)
        activated = silu(g)
        grad_h, of_down = _project_backward(activated * u, down, z_down, grads[0], None, True)
        assert grad_h is not None
        grad_u = activated.mul_(grad_h)
        grad_g = torch.ops.aten.silu_backward(grad_h.mul_(u), g)
        needs_input = ctx.needs_input_grad[0]
        grad_x, of_gate = _project_backward(x, gate, z_gate, grad_g, None, needs_input)
        grad_x, of_up = _project_backward(x, up, z_up, grad_u, grad_x, needs_input)
        return grad_x, None, *of_gate, *of_up, *of_down


def _apply(
    function: type[Function], x: Tensor, projections: Sequence[Projection], rates: Sequence[float]
) -> Any:
    drawn = [each.with_dropout(len(x), rate) for each, rate in zip(projections, rates, strict=True)]
    return function.apply(
        x, tuple(each.scaling for each in drawn), *(t for each in drawn for t in each.tensors)
    )


def lora_linear(x: Tensor, projections: Sequence[Projection], rates: Sequence[float]) -> tuple[Tensor, ...]:
    """Return each projection of x (..., in) as (..., out); the dropout `rates` act on what the adapters see."""
    outputs = _apply(_LoraLinear, x.reshape(-1, x.shape[-1]), projections, rates)
    return tuple(output.view(*x.shape[:-1], output.shape[-1]) for output in outputs)


def lora_swiglu(x: Tensor, projections: Sequence[Projection], rates: Sequence[float]) -> Tensor:
    """Return `down(silu(gate(x)) * up(x))` of x (..., in), with the projections gate, up and down."""
    output = _apply(_LoraSwiglu, x.reshape(-1, x.shape[-1]), projections, rates)
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
    def backward(ctx: Any, /, *grads: Tensor) -> Any:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        normal = x * inverse  # float32
        grad = (grads[0] * weight).float()
        along = (grad * normal).mean(-1, keepdim=True)
        return grad.addcmul_(normal, along, value=-1).mul_(inverse).to(x.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return x / rms(x) * weight over the last dimension; `weight` gets no gradient."""
    output: Any = _RmsNorm.apply(x, weight, epsilon)
    return output


class _Rotate(Function):
    """Rotary positions: halves turned by an angle, whose gradient is turned back by it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1, x.new_empty(x.shape))  # heads in one piece each, as products want them

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, /, *grads: Tensor) -> Any:  # type: ignore[override]
        grad, (cos, sin) = grads[0], ctx.saved_tensors
        batch, heads, length, width = grad.shape
        rows = grad.new_empty(batch, length, heads, width).transpose(1, 2)  # as the projection made them
        return _turn(grad, cos, sin, -1, rows), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int, into: Tensor) -> Tensor:
    (a, b), (into_a, into_b) = x.chunk(2, -1), into.chunk(2, -1)
    torch.mul(a, cos, out=into_a).addcmul_(b, sin, value=-direction)
    torch.mul(b, cos, out=into_b).addcmul_(a, sin, value=direction)
    return into


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x (batch, heads, seq, width) at its rotary positions; cos and sin are (batch, 1, seq, width / 2)."""
    output: Any = _Rotate.apply(x, cos, sin)
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
