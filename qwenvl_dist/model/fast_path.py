"""transformers' and peft's modules with their forward exchanged for a faster one of the same values.

Only the class of a module changes: its parameters, their names, hooks and checkpoints stay. Each part is exchanged
where what it takes for granted holds: the tower when it is frozen, the decoder when its base weights are. ZeRO-3
gathers weights where a module is called: the tower and the projections then stay modules, and what is left is the
chunked loss, the last layer's spared rows and the cheaper dropout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2MLP,
    Qwen2VisionTransformerPretrainedModel,
    Qwen2VLAttention,
    Qwen2VLDecoderLayer,
)

from qwenvl_dist.model.fused import (
    MaskDropout,
    Projection,
    attend_by_products,
    lora_linear,
    lora_swiglu,
    rms_norm,
    rotate,
)
from qwenvl_dist.model.head import TargetLossHead

Grid = tuple[int, int, int]
SHORT_SEQUENCE = 1024


def install(model: Any, partitioned: bool) -> None:
    """Exchange what can be exchanged in a model ready to train; `partitioned` says that ZeRO-3 holds its weights."""
    if type(model.lm_head) is nn.Linear:  # else an adapter or a trained copy is around it
        model.lm_head.__class__ = TargetLossHead
    visual, language = model.model.visual, model.model.language_model
    frozen = not any(parameter.requires_grad for parameter in visual.parameters())
    adapted = any("lora_" in name for name, _ in visual.named_parameters())
    if frozen and not adapted and not partitioned:
        visual.__class__ = FrozenTower
    if all(_is_fusable(layer) for layer in language.layers):
        _set_classes(language, FusedDecoderLayer, FusedAttention, FusedMlp)
        for layer in language.layers:
            for module in (layer, layer.self_attn, layer.mlp):
                module.calls_modules = partitioned
            for projection in _projections(layer):
                if not isinstance(projection, nn.Linear):
                    _exchange_dropout(projection)


def _exchange_dropout(projection: Any) -> None:
    for name, dropout in projection.lora_dropout.items():
        if isinstance(dropout, nn.Dropout):
            projection.lora_dropout[name] = MaskDropout(dropout.p)


def is_fused(language: Any) -> bool:
    """Whether the decoder's layers were exchanged."""
    return isinstance(language.layers[0], FusedDecoderLayer)


@contextlib.contextmanager
def generating(model: Any) -> Iterator[None]:
    """Let a model in training generate: layers that take a cache and a mask, and no dropout. It trains on afterwards.

    The exchanged layers of the decoder know neither; tower and head call transformers' forward where they are used
    without a CaptionBatch. FlexAttention would compile a kernel for each length.
    """
    language = model.model.language_model
    fused = is_fused(language)
    attention, training = language.config._attn_implementation, model.training
    model.eval()
    if attention == "flex_attention":
        language.config._attn_implementation = "sdpa"
    if fused:
        _set_classes(language, Qwen2VLDecoderLayer, Qwen2VLAttention, Qwen2MLP)
    try:
        yield
    finally:
        if fused:
            _set_classes(language, FusedDecoderLayer, FusedAttention, FusedMlp)
        language.config._attn_implementation = attention
        model.train(training)
        model.model.rope_deltas = None  # of the last batch


def _set_classes(language: Any, layer_class: type, attention_class: type, mlp_class: type) -> None:
    for layer in language.layers:
        layer.__class__, layer.self_attn.__class__, layer.mlp.__class__ = (
            layer_class,
            attention_class,
            mlp_class,
        )


# --- the decoder ---


def _projections(layer: Any) -> tuple[nn.Module, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    return (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            mlp.gate_proj, mlp.up_proj, mlp.down_proj)  # fmt: skip


def _is_fusable(layer: Any) -> bool:
    base_frozen = not any(p.requires_grad for name, p in layer.named_parameters() if "lora_" not in name)
    silu = layer.mlp.config.hidden_act == "silu"
    return base_frozen and silu and all(_is_plain_lora(each) for each in _projections(layer))


def _is_plain_lora(module: nn.Module) -> bool:
    """Whether it is a linear layer, or one with a single adapter that is not a variant such as DoRA."""
    if type(module) is nn.Linear:
        return True
    from peft.tuners.lora import Linear

    if type(module) is not Linear or type(module.base_layer) is not nn.Linear:
        return False
    adapters = list(module.lora_A)
    return (
        len(adapters) == 1
        and not module.lora_variant
        and not module.fan_in_fan_out
        and not module.lora_bias[adapters[0]]
    )


def _projection(module: Any) -> Projection:
    if isinstance(module, nn.Linear):
        return Projection(module.weight, module.bias)
    base = module.base_layer
    if module.disable_adapters or module.merged or not module.active_adapters:
        return Projection(base.weight, base.bias)
    (name,) = module.active_adapters
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    return Projection(base.weight, base.bias, a, b, scaling=module.scaling[name])


def _dropout(module: Any) -> float:
    """Return the rate of the dropout before a module's adapter, 0 when it is off."""
    if isinstance(module, nn.Linear) or not module.training or not module.active_adapters:
        return 0.0
    return float(getattr(module.lora_dropout[module.active_adapters[0]], "p", 0.0))


def _project(x: Tensor, modules: Sequence[nn.Module], calls_modules: bool) -> tuple[Tensor, ...]:
    if calls_modules:
        return tuple(module(x) for module in modules)
    return lora_linear(x, [_projection(m) for m in modules], [_dropout(m) for m in modules])


class FusedMlp(Qwen2MLP):
    """SwiGLU with adapters."""

    calls_modules: bool

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., hidden) to (..., hidden)."""
        if self.calls_modules:
            return super().forward(x)
        modules = (self.gate_proj, self.up_proj, self.down_proj)
        return lora_swiglu(x, [_projection(m) for m in modules], [_dropout(m) for m in modules])


class FusedAttention(Qwen2VLAttention):
    """Attention with adapters; needs no cache."""

    calls_modules: bool

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Map (batch, seq, hidden) to the same, or with `rows`, into (batch * seq), to (rows, hidden)."""
        batch, length, width = hidden.shape
        projections = _project(hidden, (self.q_proj, self.k_proj, self.v_proj), self.calls_modules)
        q, k, v = (each.view(batch, length, -1, self.head_dim).transpose(1, 2) for each in projections)
        q, k = rotate(q, *position_embeddings), rotate(k, *position_embeddings)
        if by_products(hidden):
            bias = causal_bias(length, q.dtype) if attention_mask is None else attention_mask[:, 0]
            mixed = attend_by_products(q, k, v, bias, self.scaling).transpose(1, 2)
        else:
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
            mixed, _ = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling)
        mixed = mixed.reshape(batch, length, width)
        if rows is not None:
            mixed = mixed.view(-1, width)[rows]
        return _project(mixed, (self.o_proj,), self.calls_modules)[0]


class FusedDecoderLayer(Qwen2VLDecoderLayer):
    """A decoder layer, which can stop at the rows that somebody looks at."""

    calls_modules: bool

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Map (batch, seq, hidden) to the same, or with `rows`, into (batch * seq), to (rows, hidden)."""
        norm: Any = _call if self.calls_modules else _norm
        normal = norm(self.input_layernorm, hidden)
        mixed = self.self_attn(normal, position_embeddings, attention_mask, rows)
        hidden = mixed + (hidden if rows is None else hidden.reshape(-1, hidden.shape[-1])[rows])
        return hidden + self.mlp(norm(self.post_attention_layernorm, hidden))


def _norm(module: Any, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, module.variance_epsilon)


def _call(module: Any, x: Tensor) -> Tensor:
    return module(x)


def decode_rows(
    language: Any, embeds: Tensor, position_ids: Tensor, rows: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Return the last hidden states (rows, hidden) at `rows`, into (batch * seq), of a fused decoder.

    Nobody looks at the last layer's other rows: beyond its keys and values they are left out.
    """
    # Both halves of the width hold the same angles.
    rotary = tuple(each.chunk(2, -1)[0][:, None] for each in language.rotary_emb(embeds, position_ids))
    hidden = embeds
    for layer in language.layers[:-1]:
        hidden = layer(hidden, rotary, attention_mask)
    hidden = language.layers[-1](hidden, rotary, attention_mask, rows)
    return language.norm(hidden)


def by_products(x: Tensor) -> bool:
    """Whether attention over x (batch, seq, width) is two plain products: short bf16 sequences on a CPU."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.shape[1] <= SHORT_SEQUENCE


@lru_cache(maxsize=64)
def causal_bias(length: int, dtype: torch.dtype) -> Tensor:
    """Return (1, seq, seq) on the CPU: -inf above the diagonal."""
    return torch.full((1, length, length), -torch.inf, dtype=dtype).triu_(1)


# --- the tower ---


class FrozenTower(Qwen2VisionTransformerPretrainedModel):
    """The tower, run without gradient: pictures of one shape attend together, and activations are written over."""

    def forward(
        self, hidden_states: Tensor, grid_thw: Tensor, grids: tuple[Grid, ...] = (), **kwargs: Any
    ) -> Any:
        """Return transformers' output; `grids` is `grid_thw` on the host, without which its own forward runs."""
        attention = self.config._attn_implementation
        if torch.is_grad_enabled() or not grids or kwargs or attention != "sdpa":
            return super().forward(hidden_states, grid_thw, **kwargs)
        embedding = self.patch_embed.proj.weight
        hidden = linear(hidden_states.to(embedding.dtype), embedding.flatten(1))
        rotary = self._rotary(grids, hidden.device)
        runs = _equal_runs(grids)
        blocks: Any = self.blocks
        for block in blocks:
            hidden.add_(_tower_attention(block.attn, block.norm1(hidden), rotary, runs))
            inner = block.mlp.fc1(block.norm2(hidden))
            hidden.add_(block.mlp.fc2(block.mlp.act(inner)))
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=self.merger(hidden))

    def _rotary(self, grids: tuple[Grid, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, (patches, 1, head width) float32."""
        positions = torch.cat([_patch_positions(grid, self.spatial_merge_size) for grid in grids])
        cos, sin = self.rotary_pos_emb(positions, positions.to(device, non_blocking=True))
        return cos[:, None], sin[:, None]


@lru_cache(maxsize=256)
def _patch_positions(grid: Grid, merge: int) -> Tensor:
    """Return (patches, 2): row and column of each patch, in the tower's order (merge blocks one after another)."""
    frames, height, width = grid
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    both = torch.stack((rows, columns)).view(2, height // merge, merge, width // merge, merge)
    return both.transpose(2, 3).reshape(2, -1).t().repeat(frames, 1)


def _equal_runs(grids: tuple[Grid, ...]) -> list[tuple[int, int]]:
    """Return (pictures, patches of each) for runs of pictures with as many patches; frames attend one by one."""
    runs: list[tuple[int, int]] = []
    for frames, height, width in grids:
        patches = height * width
        if runs and runs[-1][1] == patches:
            runs[-1] = (runs[-1][0] + frames, patches)
        else:
            runs.append((frames, patches))
    return runs


def _rotate_(x: Tensor, rotary: tuple[Tensor, Tensor]) -> None:
    """Turn x (patches, heads, width) in place, in float32 inside."""
    cos, sin = rotary
    half = x.shape[-1] // 2
    wide = x.float()
    turned = wide * cos
    turned[..., :half].addcmul_(wide[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(wide[..., :half], sin[..., half:])
    x.copy_(turned)


def _tower_attention(
    attention: Any, x: Tensor, rotary: tuple[Tensor, Tensor], runs: list[tuple[int, int]]
) -> Tensor:
    patches, heads, width = len(x), attention.num_heads, attention.head_dim
    qkv = attention.qkv(x).view(patches, 3 * heads, width)
    _rotate_(qkv[:, : 2 * heads], rotary)
    parts, start = [], 0
    for count, each in runs:
        part = qkv[start : start + count * each].view(count, each, 3, heads, width).permute(2, 0, 3, 1, 4)
        q, k, v = part.unbind(0)
        parts.append(_attend(q, k, v, attention.scaling).transpose(1, 2).reshape(count * each, -1))
        start += count * each
    return attention.proj(parts[0] if len(parts) == 1 else torch.cat(parts))


def _attend(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Attend among all, (batch, heads, patches, width)."""
    if by_products(q[:, 0]):
        return attend_by_products(q, k, v, q.new_zeros(1, q.shape[2], q.shape[2]), scaling)
    return scaled_dot_product_attention(q, k, v, scale=scaling)
