"""The head and its loss together, a few targets at a time: no tensor of targets x vocabulary exists."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

CHUNK_TARGETS = 256  # rows of one product: enough for the matrix unit; 78 MB of bf16 logits with 152k words
_CPU_BLOCK = 16  # rows whose float32 copy stays in a CPU's cache


def _softmax_minus_target_(logits: Tensor, targets: Tensor) -> Tensor:
    """Turn logits (n, vocabulary) into the gradient of their summed loss, in place; return that loss, float32."""
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    block = _CPU_BLOCK if logits.device.type == "cpu" else len(logits)
    for part, ids in zip(logits.split(block), targets.split(block), strict=True):
        wide = part.float() if part.dtype != torch.float32 else part
        top = wide.amax(-1, keepdim=True)
        column = ids[:, None]
        wanted = wide.gather(1, column) - top
        sums = wide.sub_(top).exp_().sum(-1, keepdim=True)
        total += (sums.log() - wanted).sum()
        wide.mul_(sums.reciprocal_())
        wide.scatter_add_(1, column, torch.full_like(wanted, -1))
        if wide is not part:
            part.copy_(wide)
    return total


class _TargetLoss(Function):
    """The gradients are made in the forward pass, while a chunk's logits are there: nothing is computed twice."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, differentiate: bool) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for_hidden = torch.empty_like(hidden) if differentiate and ctx.needs_input_grad[0] else None
        for_weight = torch.zeros_like(weight) if differentiate and ctx.needs_input_grad[1] else None
        # Of one size: a last chunk of a few rows would read the weight twice for nearly nothing.
        count = max(1, -(-len(targets) // CHUNK_TARGETS))
        size = max(1, -(-len(targets) // count))
        for start in range(0, len(targets), size):
            rows = slice(start, start + size)
            logits = linear(hidden[rows], weight)
            total += _softmax_minus_target_(logits, targets[rows])
            if for_hidden is not None:
                torch.mm(logits, weight, out=for_hidden[rows])
            if for_weight is not None:
                for_weight.addmm_(logits.t(), hidden[rows])
        ctx.save_for_backward(for_hidden, for_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, /, *grads: Tensor) -> Any:  # type: ignore[override]
        (grad,) = grads
        return *(None if made is None else made * grad for made in ctx.saved_tensors), None, None


class TargetLossHead(nn.Linear):
    """`lm_head`, which given targets returns their summed loss instead of logits.

    A module rather than a function, since ZeRO-3 gathers a weight when its module is called.
    """

    def forward(self, input: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits of `input`, or with targets (n,) the summed loss, float32, of hidden states (n, hidden)."""
        if targets is None:
            return super().forward(input)
        loss: Any = _TargetLoss.apply(input, self.weight, targets, torch.is_grad_enabled())
        return loss
