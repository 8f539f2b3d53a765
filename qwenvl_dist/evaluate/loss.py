"""The loss over packed shards: the same number as a validation pass in training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from qwenvl_dist.data.stream import CaptionStream
    from qwenvl_dist.distributed import HostGroup, OneRank
    from qwenvl_dist.model.forward import Qwen2VLForCaptionLoss


@torch.inference_mode()
def mean_token_loss(
    model: Qwen2VLForCaptionLoss,
    stream: CaptionStream,
    host: HostGroup | OneRank,
    advance: Callable[[int], None] = lambda n: None,
) -> float:
    """Return the mean loss over all target tokens of all ranks' streams; NaN when there is none. Collective."""
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0
    for step in stream.iterate():
        for batch in step:
            total += model(batch=batch.to(device))
            tokens += batch.target_tokens
            advance(len(batch.keys) + len(batch.bad))
    parts = host.gather((total.item(), tokens))
    count = sum(tokens for _, tokens in parts)
    return sum(total for total, _ in parts) / count if count else float("nan")
