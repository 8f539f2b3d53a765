"""What one micro-batch holds beside the model: kept for the backward pass, and made and dropped on the way.

Counted from what the passes of `model/fused.py`, `model/fast_path.py`, `model/head.py` and `model/pixels.py` save and
allocate, and peft's and transformers' modules where these are left out; the tests set the sums beside the tensors of
real steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwenvl_dist.config import PROJECTIONS

if TYPE_CHECKING:
    from qwenvl_dist.synthetic.base import BaseShape

CHUNK_TARGETS = 256  # of model/head.py, which imports torch; a test holds them together
SHORT_SEQUENCE = 1024  # of model/fast_path.py
CPU_BLOCK = 16  # of model/head.py
PATCH_VALUES = 3 * 2 * 14 * 14  # numbers of one patch: channels x frames x pixels
PATCHES_PER_TOKEN = 4
WIDE = 4  # bytes of a float32


@dataclass(frozen=True)
class MicroBatch:
    """The padded size of one micro-batch."""

    samples: int
    length: int  # tokens of the longest, to which all are padded
    targets: int  # tokens with loss, over all samples
    visual_tokens: int  # over all samples; 0 where features take the tower's place
    largest_picture: int = 0  # visual tokens of the largest
    segmented: bool = False  # answers share a prefix, which takes a mask

    @property
    def tokens(self) -> int:
        """Return the tokens computed, padding included."""
        return self.samples * self.length


@dataclass(frozen=True)
class Kernels:
    """What depends on the device and on how layers run."""

    number_bytes: int = 2  # of model.dtype
    on_cpu: bool = False
    fast: bool = True  # model.fast_path, where the base's decoder is frozen
    fused: bool = True  # and projections in one function with their adapters: not under ZeRO-3
    dropout: bool = True
    decoder_trains: bool = False
    tower_trains: bool = False

    @property
    def mask_bytes(self) -> int:
        """Return the bytes of dropout's mask, an element."""
        if self.fast:
            return 2 if self.on_cpu else 1
        return 1


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank."""

    kept: int  # for the backward pass, when the forward pass ends
    logits: int  # of one chunk of targets, beside `kept`
    working: int  # the most that the backward pass has beyond `kept`, a recomputed layer included
    tower: int  # while the vision tower runs, when nothing else is kept yet

    @property
    def decoder(self) -> int:
        """Return the most while the decoder runs, logits left out."""
        return self.kept + self.working

    @property
    def peak(self) -> int:
        """Return the most at a time."""
        return max(self.decoder, self.kept + self.logits, self.tower)


@dataclass(frozen=True)
class _Layer:
    """Bytes of a decoder layer in one micro-batch."""

    attention: int  # kept by it, with the norm before it
    mlp: int  # the same
    in_attention: int  # made and dropped in its backward pass
    in_mlp: int

    @property
    def kept(self) -> int:
        return self.attention + self.mlp


def activations(
    shape: BaseShape,
    batch: MicroBatch,
    kernels: Kernels,
    rank: int,
    targets: tuple[str, ...],
    checkpoint_every: int,
) -> Activations:
    """Return what a micro-batch takes.

    Args:
        shape: of the base.
        batch: its padded size.
        kernels: how it is computed.
        rank: of the adapters, 0 without.
        targets: names of the projections that have one.
        checkpoint_every: recompute each n-th layer in the backward pass; 0 none.
    """
    number = kernels.number_bytes
    last_rows = batch.targets if kernels.fast else batch.tokens
    hidden = number * batch.tokens * shape.hidden
    layers, kept = [], []
    for number_of_layer in range(shape.layers):
        rows = last_rows if number_of_layer == shape.layers - 1 else batch.tokens
        layers.append(_layer(shape, batch, kernels, rank, targets, rows, number_of_layer == 0))
        recomputed = checkpoint_every and number_of_layer % checkpoint_every == 0
        kept.append(hidden if recomputed else layers[-1].kept)
    around = 2 * number * batch.tokens * (shape.hidden // shape.heads)  # cosines and sines
    if _attends_by_products(batch, kernels):
        around += number * batch.length**2  # causal_bias
    if batch.segmented:
        around += number * batch.samples * batch.length**2
    if kernels.tower_trains:
        around += _tower_kept(shape, batch, kernels)
    behind = max(number, WIDE) * last_rows * shape.hidden  # the last norm's input, in float32
    if kernels.fast:
        behind += number * batch.targets * shape.hidden  # the head's gradient for its input
    if kernels.decoder_trains:
        behind += number * last_rows * shape.hidden
    total = around + sum(kept) + behind
    alive, most = total - behind, total
    for layer, held in zip(reversed(layers), reversed(kept), strict=True):
        if held != layer.kept:  # what it recomputes lies beside its input, which fused norms keep themselves
            alive += layer.kept - (hidden if kernels.fused and kernels.fast else 0)
        most = max(most, alive + layer.in_mlp, alive - layer.mlp + layer.in_attention)
        alive -= layer.kept
        if held != layer.kept:
            alive -= held - (hidden if kernels.fused and kernels.fast else 0)
    tower = _tower(shape, batch, kernels)
    if kernels.tower_trains:
        tower += _tower_kept(shape, batch, kernels)
    return Activations(total, _logits(shape, batch, kernels), most - total, tower)


def _layer(
    shape: BaseShape,
    batch: MicroBatch,
    kernels: Kernels,
    rank: int,
    targets: tuple[str, ...],
    rows: int,
    is_first: bool,
) -> _Layer:
    """Return what a layer takes, of which only `rows` are needed behind its keys and values."""
    tokens, number = batch.tokens, kernels.number_bytes
    hidden, inner = shape.hidden, shape.intermediate
    key = hidden // shape.heads * shape.kv_heads
    # Norms of transformers keep their input as float32.
    norm_input = hidden * (number if kernels.fast and kernels.fused else max(number, WIDE))
    # Nothing is differentiated below the first adapter: its norm and, in modules, its dropout keep nothing.
    lowest = is_first and not (kernels.decoder_trains or kernels.tower_trains)
    attention = mlp = 0
    if not lowest:
        attention += tokens * norm_input
    if not lowest or kernels.fused:
        attention += number * tokens * hidden  # what the norm gives
    attention += number * tokens * (hidden + 2 * key)  # queries, keys, values
    attention += number * rows * hidden  # mixed values
    scores = number * batch.samples * shape.heads * batch.length**2
    if _attends_by_products(batch, kernels):
        attention += scores
    else:
        attention += WIDE * tokens * shape.heads  # the logarithms of the sums of each row of scores
        if kernels.on_cpu or rows != tokens:  # else the mixed values are the kernel's own output
            attention += number * tokens * hidden
    mlp += rows * (norm_input + number * hidden)
    mlp += number * rows * 2 * inner  # gate and up
    if not kernels.fused:
        mlp += number * rows * 2 * inner  # silu's result, and its product with up
    if kernels.decoder_trains:  # what the weights of norms multiply
        attention += number * hidden * tokens
        mlp += number * hidden * rows
    for name in targets:
        if not rank or name not in PROJECTIONS:
            continue
        below = name in ("q_proj", "k_proj", "v_proj")
        seen, width = tokens if below else rows, inner if name == "down_proj" else hidden
        adapter = number * seen * rank
        if kernels.dropout:
            if kernels.fused or not (below and lowest):
                adapter += kernels.mask_bytes * seen * width
            if not kernels.fused:
                adapter += number * seen * width  # what dropout leaves, which lora_A keeps
        if below or name == "o_proj":
            attention += adapter
        else:
            mlp += adapter
    # A fused function has its own intermediates beside all that it kept; modules let go of it one by one.
    masked = kernels.dropout and "down_proj" in targets  # which takes two more as wide as the inner layer
    in_mlp = number * rows * ((3 + 2 * masked if kernels.fused else 2) * inner + 3 * hidden)
    in_attention = number * tokens * 5 * hidden
    if _attends_by_products(batch, kernels):
        in_attention += 2 * scores
    return _Layer(attention, mlp, in_attention, in_mlp)


def _attends_by_products(batch: MicroBatch, kernels: Kernels) -> bool:
    """Whether attention is two plain products with all scores between: short bf16 sequences on a CPU."""
    return kernels.on_cpu and kernels.fast and kernels.number_bytes == 2 and batch.length <= SHORT_SEQUENCE


def _logits(shape: BaseShape, batch: MicroBatch, kernels: Kernels) -> int:
    number = kernels.number_bytes
    if not kernels.fast:  # all at once: logits, their float32 and its logarithms
        return batch.targets * shape.vocab * (number + 2 * WIDE)
    chunks = max(1, -(-batch.targets // CHUNK_TARGETS))
    rows = -(-batch.targets // chunks)
    chunk = number * rows * shape.vocab
    # One of float32 blocks and one of chunks is still there when the next is made.
    blocks = min(2, -(-rows // CPU_BLOCK)) * min(CPU_BLOCK, rows) if kernels.on_cpu else rows
    wide = 0 if number == WIDE else WIDE * blocks * shape.vocab
    gradient = number * shape.vocab * shape.hidden if kernels.decoder_trains else 0
    return chunk + max(wide, chunk if chunks > 1 else 0) + gradient


def _tower(shape: BaseShape, batch: MicroBatch, kernels: Kernels) -> int:
    """Return the most while pictures become patches and go through the tower."""
    number, width = kernels.number_bytes, shape.vision_width
    patches = batch.visual_tokens * PATCHES_PER_TOKEN
    pixels = patches * PATCH_VALUES * WIDE * 3 // 2  # float32 pictures and the patches made of them
    inside = patches * (PATCH_VALUES * number + 14 * width * number)
    if _attends_by_products(batch, kernels) and kernels.fused:
        largest = PATCHES_PER_TOKEN * (batch.largest_picture or batch.visual_tokens)
        attention = 3 * number * shape.vision_heads * patches * largest
        inside = max(inside, patches * number * (PATCH_VALUES + 9 * width // 2) + attention)
    return max(pixels, inside)


def _tower_kept(shape: BaseShape, batch: MicroBatch, kernels: Kernels) -> int:
    number, width = kernels.number_bytes, shape.vision_width
    patches = batch.visual_tokens * PATCHES_PER_TOKEN
    return shape.vision_depth * patches * number * 34 * width + patches * PATCH_VALUES * number
