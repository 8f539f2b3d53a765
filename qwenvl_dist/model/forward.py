"""The loss: a frozen tower without gradient, logits only where there is a target."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen2VLForConditionalGeneration
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from qwenvl_dist.model.fast_path import FrozenTower, decode_rows, is_fused
from qwenvl_dist.model.head import TargetLossHead
from qwenvl_dist.model.pixels import PixelSettings, pixel_values

if TYPE_CHECKING:
    from qwenvl_dist.data.batch import CaptionBatch


class Qwen2VLForCaptionLoss(Qwen2VLForConditionalGeneration):
    """Qwen2-VL whose `forward` also takes a whole CaptionBatch and returns its summed token loss.

    A subclass rather than a wrapper: parameter names stay those that peft and the hub know.
    """

    pixel_settings: PixelSettings | None = None  # set once after loading

    @functools.wraps(Qwen2VLForConditionalGeneration.forward)  # `generate` reads the signature
    def forward(self, *args: Any, batch: CaptionBatch | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Return the summed loss of `batch` (a float32 scalar), or without a batch what transformers returns."""
        if batch is None:
            return super().forward(*args, **kwargs)
        return self.caption_loss(batch)

    def vision_features(self, batch: CaptionBatch) -> Tensor:
        """Return (visual tokens, hidden) of all pictures of the batch, in order; the tower rests where it has them."""
        if batch.features is not None:
            return batch.features
        assert self.pixel_settings is not None, "set pixel_settings after loading"
        visual = self.model.visual
        # A frozen tower is run, never differentiated: no graph, no kept activations.
        trains = any(parameter.requires_grad for parameter in visual.parameters())
        with contextlib.nullcontext() if trains else torch.no_grad():
            pixels = pixel_values(batch.pixels, batch.grids, self.pixel_settings).to(visual.dtype)
            on_host = {"grids": batch.grids} if isinstance(visual, FrozenTower) else {}
            return visual(pixels, grid_thw=batch.image_grid_thw, **on_host).pooler_output

    def input_embeddings(self, batch: CaptionBatch) -> Tensor:
        """Return (batch, seq, hidden): words, and the features of pictures in their places."""
        features = self.vision_features(batch)
        embeds = self.model.get_input_embeddings()(batch.input_ids)
        flat = embeds.reshape(-1, embeds.shape[-1])
        return flat.index_copy(0, batch.image_positions, features.to(flat.dtype)).view_as(embeds)

    def target_states(self, batch: CaptionBatch) -> Tensor:
        """Return the language model's last hidden states where there is a target, (targets, hidden)."""
        embeds = self.input_embeddings(batch)
        language = self.model.language_model
        # Without segments no mask: sequences are padded on the right, attention is causal, no target sits on padding.
        mask: Any = None
        if language.config._attn_implementation == "flex_attention":  # attends to all without a mask
            segments = torch.zeros_like(batch.input_ids) if batch.segments is None else batch.segments
            mask = segment_blocks(segments)
        elif batch.segments is not None:
            mask = segment_mask(batch.segments, embeds.dtype)
        if is_fused(language):
            return decode_rows(language, embeds, batch.position_ids, batch.target_positions, mask)
        hidden = language(
            inputs_embeds=embeds, position_ids=batch.position_ids, attention_mask=mask, use_cache=False
        ).last_hidden_state
        # Two-dimensional before the head: a sliced three-dimensional input becomes a batched product over an expanded
        # weight, several times slower with a vocabulary of 152k.
        return hidden.reshape(-1, hidden.shape[-1])[batch.target_positions]

    def caption_loss(self, batch: CaptionBatch) -> Tensor:
        """Return the sum of the token losses, a float32 scalar with a graph even when the batch has no target."""
        at_targets = self.target_states(batch)
        if isinstance(self.lm_head, TargetLossHead):
            return self.lm_head(at_targets, batch.target_ids)
        return cross_entropy(self.lm_head(at_targets).float(), batch.target_ids, reduction="sum")


def segment_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (batch, 1, seq, seq), 0 where a token may look and -inf elsewhere: back, at segment 0 or its own."""
    queries, keys = segments[:, :, None], segments[:, None, :]
    allowed = ((keys == 0) | (keys == queries)).tril()
    mask = torch.zeros(allowed.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill_(~allowed, -torch.inf)[:, None]


def segment_blocks(segments: Tensor) -> Any:
    """Return `segment_mask` for FlexAttention, which leaves out blocks of 128 by 128 that nobody looks at."""
    from torch.nn.attention.flex_attention import create_block_mask

    def allowed(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (segments[row, key] == 0) | (segments[row, key] == segments[row, query])
        return own & (query >= key)

    rows, length = segments.shape
    return create_block_mask(allowed, rows, None, length, length, device=segments.device)


# transformers looks up by class name how hub names become run-time names; a subclass unknown there would keep its
# random weights and only warn.
register_checkpoint_conversion_mapping(
    Qwen2VLForCaptionLoss.__name__,
    get_checkpoint_conversion_mapping(Qwen2VLForConditionalGeneration.__name__) or [],
    overwrite=True,
)
