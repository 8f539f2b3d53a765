"""The arithmetic that a micro-batch needs: frozen vision forward, language forward and input gradients, adapters, head.

Counted from the model's config and the batch's real tokens (padding left out). What a step may spare is not counted
either: weight gradients of frozen weights, gradients below the first adapter, recomputation, logits without a target,
and the last layer's rows that no target looks at. Imports torch only to time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from qwenvl_dist.data.batch import CaptionBatch


@dataclass(frozen=True)
class Product:
    """A matrix product with a weight: (rows, inner) by (inner, columns)."""

    rows: int
    inner: int
    columns: int
    backward: bool = False  # of the weight as it lies, rather than of its transpose

    @property
    def flops(self) -> int:
        """Two for each multiply and add."""
        return 2 * self.rows * self.inner * self.columns


@dataclass(frozen=True)
class StepWork:
    """What a micro-batch takes."""

    products: Counter[Product]
    other_flops: int  # attention and adapters

    @property
    def product_flops(self) -> int:
        """Of the products with weights."""
        return sum(product.flops * count for product, count in self.products.items())

    @property
    def flops(self) -> int:
        """All of it."""
        return self.product_flops + self.other_flops

    def seconds_of_products(self, dtype: torch.dtype, device: torch.device) -> float:
        """Time every product once, with operands made for it; return what all of them take in a step."""
        import torch

        total = 0.0
        for product, count in self.products.items():
            x = torch.full((product.rows, product.inner), 0.5, dtype=dtype, device=device)
            shape = (product.inner, product.columns) if product.backward else (product.columns, product.inner)
            weight = torch.full(shape, 0.02, dtype=dtype, device=device)
            total += count * _timed(x, weight, product.backward)
        return total


def _timed(x: torch.Tensor, weight: torch.Tensor, backward: bool) -> float:
    import torch
    from torch.nn.functional import linear

    on_gpu = x.device.type == "cuda"
    if on_gpu:
        x @ weight if backward else linear(x, weight)  # chooses its kernel
        torch.cuda.synchronize()
    started = time.perf_counter()
    x @ weight if backward else linear(x, weight)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def step_work(config: Any, batch: CaptionBatch, rank: int, target_modules: Iterable[str]) -> StepWork:
    """Return what `batch` takes with a frozen base and tower and an adapter of `rank` on `target_modules`."""
    grids = batch.grids if batch.features is None else ()
    return count_work(config, grids, _lengths(batch), batch.target_tokens, rank, target_modules)


def count_work(
    config: Any,
    grids: Iterable[tuple[int, int, int]],
    lengths: Sequence[int],
    targets: int,
    rank: int,
    target_modules: Iterable[str],
) -> StepWork:
    """Return what samples take with a frozen base and tower and an adapter.

    Args:
        config: with the `vision_config` and `text_config` of transformers.
        grids: (time, height, width) in patches of the pictures that the tower sees; none where features lie ready.
        lengths: tokens of each sample up to its last target.
        targets: tokens with loss, over all samples.
        rank: of the adapter.
        target_modules: projections that have one.
    """
    vision, text = config.vision_config, config.text_config
    target_modules, grids = tuple(target_modules), tuple(grids)
    products: Counter[Product] = Counter()
    other = 0
    # The tower, forward alone.
    patches = sum(t * h * w for t, h, w in grids)
    width, merged = vision.embed_dim, vision.spatial_merge_size**2
    patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    ratio = int(vision.mlp_ratio)
    products[Product(patches, patch, width)] += 1
    for inner, columns in (
        (width, 3 * width),
        (width, width),
        (width, ratio * width),
        (ratio * width, width),
    ):
        products[Product(patches, inner, columns)] += vision.depth
    products[Product(patches // merged, merged * width, merged * width)] += 1
    products[Product(patches // merged, merged * width, vision.hidden_size)] += 1
    other += vision.depth * sum(t * 4 * (h * w) ** 2 * width for t, h, w in grids)
    # The decoder: forward, and gradients of inputs. The first layer's q, k and v need none, the last layer's rows
    # beyond keys and values are those of targets.
    hidden, inner_width, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    head_width = hidden // text.num_attention_heads
    key_width = text.num_key_value_heads * head_width
    tokens = sum(lengths)
    shapes = {
        "q_proj": (hidden, hidden), "k_proj": (hidden, key_width), "v_proj": (hidden, key_width),
        "o_proj": (hidden, hidden), "gate_proj": (hidden, inner_width), "up_proj": (hidden, inner_width),
        "down_proj": (inner_width, hidden),
    }  # fmt: skip
    for layer in range(layers):
        for name, (inner, columns) in shapes.items():
            rows = targets if layer == layers - 1 and name not in ("k_proj", "v_proj") else tokens
            products[Product(rows, inner, columns)] += 1
            if layer or name not in ("q_proj", "k_proj", "v_proj"):
                products[Product(rows, columns, inner, backward=True)] += 1
            if name in target_modules:  # forward; then gradients of A, of B and of the input
                other += 3 * 2 * rows * rank * (inner + columns)
    # Scores and mixing, half of the square; the backward pass takes twice as much.
    other += layers * sum(3 * 4 * length**2 * hidden // 2 for length in lengths)
    products[Product(targets, hidden, text.vocab_size)] += 1
    products[Product(targets, text.vocab_size, hidden, backward=True)] += 1
    return StepWork(products, other)


def _lengths(batch: CaptionBatch) -> list[int]:
    """Tokens of each row up to its last target."""
    learned = batch.labels != -100
    return [int(row.nonzero()[-1]) + 1 if row.any() else 0 for row in learned]
