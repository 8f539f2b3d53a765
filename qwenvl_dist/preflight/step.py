"""Checks of the training step: the model loads, the worst batch fits, gradients arrive, the loss falls."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwenvl_dist.errors import CheckFailed, UserError
from qwenvl_dist.preflight.checks import Context, Found, Status, Verdict, fail, ok, warn
from qwenvl_dist.preflight.data import worst_samples

if TYPE_CHECKING:
    from qwenvl_dist.data.batch import CaptionBatch, Example
    from qwenvl_dist.training.state import TrainState

ADAPTER_RATE = (
    1e-3  # of the two steps after which the loss must have fallen: large enough to show in bfloat16
)
LOADER_SECONDS = 3.0


def model_loads(context: Context) -> Verdict:
    """Base, adapter, data stream and DeepSpeed come together as in a run."""
    from qwenvl_dist.distributed import HostGroup
    from qwenvl_dist.model.lora import trainable_parameters
    from qwenvl_dist.training.run import assemble

    assert context.accelerator is not None and isinstance(context.host, HostGroup)
    began = time.perf_counter()
    state = assemble(context.recipe, context.accelerator, context.topology, context.host, context.base.path)
    context.state = state
    state.engine.train()
    trained = trainable_parameters(state.engine.module)
    count = sum(getattr(p, "ds_numel", p.numel()) for p in trained.values())
    return ok(
        f"{count / 1e6:,.3f} M parameters train, ZeRO-{state.engine.zero_optimization_stage()}, "
        f"{time.perf_counter() - began:.1f} s"
    )


def worst_batch(context: Context) -> Verdict:
    """The largest micro-batches that can come up go forward and backward on all ranks at once, with an update."""
    import torch

    from qwenvl_dist.training.metrics import peak_memory_gib

    state = _state(context)
    data = context.recipe.data
    count, budget = data.micro_batch_size, data.micro_batch_visual_tokens
    batch = context.of_own(lambda: _encode(context, worst_samples(context, count, budget)))
    began = time.perf_counter()
    try:
        _step(context, [batch] * state.batches.layout.grad_accum_steps, context.recipe.optim.learning_rate)
    except torch.OutOfMemoryError as error:
        raise CheckFailed(
            f"{' '.join(str(error).split())[:200]} (micro-batch of {_shape(batch)}); lower data.micro_batch_size, set "
            "model.checkpointing=all, or ask qwenvl-dist plan what fits"
        ) from error
    if state.accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    context.worst_seconds = max(context.host.gather(time.perf_counter() - began))
    peaks = context.host.gather(peak_memory_gib())
    fullest = max(range(len(peaks)), key=peaks.__getitem__)
    return ok(
        f"micro-batch of {_shape(batch)}: at most {peaks[fullest]:.2f} GiB ({context.named([fullest])}), "
        f"{context.worst_seconds:.2f} s a step"
    )


def rank_without_picture(context: Context) -> Verdict:
    """A step ends when the last rank has no picture and the others have some."""
    state = _state(context)
    last = context.host.rank == context.host.world_size - 1
    batch = context.of_own(lambda: _text_batch(state) if last else _first_batches(context)[0])
    began = time.perf_counter()
    _step(context, [batch] * state.batches.layout.grad_accum_steps, context.recipe.optim.learning_rate)
    return ok(f"rank {context.host.world_size - 1} without a picture, {time.perf_counter() - began:.2f} s")


def adapter_gradients(context: Context) -> Verdict:
    """Every tensor of the adapter gets a finite gradient that is not zero, within two steps on one batch."""
    from qwenvl_dist.training.step import GradientCensus

    state = _state(context)
    batches = context.of_own(lambda: _first_batches(context))
    rate = context.recipe.optim.learning_rate
    if context.recipe.lora is not None:
        rate = max(rate, ADAPTER_RATE)
    context.losses = None
    before = _loss(context, batches)
    census = GradientCensus(state.engine.module)
    starved: dict[str, None] = {}
    try:
        for step in (1, 2):
            _step(context, batches, rate)
            starved |= dict.fromkeys(census.starved(state, step))
    finally:
        census.close()
    context.losses = (before, _loss(context, batches))
    if context.recipe.lora is None:
        return ok("no adapter")
    count = sum("lora_" in name for name, _ in state.engine.module.named_parameters())
    if starved:
        return fail(
            f"{len(starved)} of {count} tensors get none, such as {next(iter(starved))}",
            "the adapter would not train: is activation checkpointing reentrant, or its layer left out of the passes?",
        )
    return ok(f"all {count} tensors")


def loss_falls(context: Context) -> Verdict:
    """Those two steps have lowered the loss of their batch."""
    if context.losses is None:
        raise Found(Verdict(Status.SKIPPED, "needs adapter_gradients, which was left out"))
    before, after = context.losses
    shown = f"{before:.4f} -> {after:.4f} a token"
    remedy = "look at the base, at model.dtype and at optim: a run would not learn"
    if not abs(after) < float("inf"):
        return fail(f"{shown}: not finite", remedy)
    if after >= before:
        return fail(shown, remedy)
    return ok(shown)


def loader_rate(context: Context) -> Verdict:
    """Loader workers of each node bring samples faster than its steps take them."""
    state = _state(context)
    steps = state.batches.iterate()
    next(steps, None)  # workers start
    began, samples = time.perf_counter(), 0
    for micro_batches in steps:
        samples += sum(len(batch.positions) for batch in micro_batches)
        if time.perf_counter() - began > LOADER_SECONDS:
            break
    seconds = time.perf_counter() - began
    del steps
    own = samples / seconds if samples else None
    rates = context.host.gather(own)
    if any(rate is None for rate in rates):
        return ok("the data set is too small to tell")
    layout = state.batches.layout
    per_step = layout.micro_batch_size * layout.grad_accum_steps  # of a rank
    by_node = [sum(rates[rank] for rank in ranks) for ranks in context.nodes]
    needs = [len(ranks) * per_step / context.worst_seconds for ranks in context.nodes]
    slowest = min(range(len(by_node)), key=lambda node: by_node[node] / needs[node])
    node = context.hosts[context.nodes[slowest][0]]
    shown = f"{by_node[slowest]:.1f} samples/s on {node}, steps take {needs[slowest]:.1f}"
    if by_node[slowest] < needs[slowest]:
        return warn(
            shown,
            "raise data.workers up to the cores of a rank, set data.cache_dir to a local disk, or shards encode first",
        )
    return ok(shown)


def _state(context: Context) -> TrainState:
    if context.state is None:
        raise Found(Verdict(Status.SKIPPED, "needs model_loads, which was left out"))
    return context.state


def _shape(batch: CaptionBatch) -> str:
    rows, length = batch.input_ids.shape
    return f"{rows} samples x {length} tokens, {len(batch.image_positions)} visual, {batch.target_tokens} learned"


def _collate(context: Context, examples: Sequence[Example]) -> CaptionBatch:
    from qwenvl_dist.data.batch import collate

    encoder = _state(context).batches.encoder
    return collate(examples, encoder.dummy, encoder.chat.pad_token, encoder.chat.image_token)


def _encode(context: Context, places: Sequence[tuple[int, int]]) -> CaptionBatch:
    """Return a micro-batch of the samples at (shard, number)."""
    from qwenvl_dist.data.plan import Place
    from qwenvl_dist.data.source import PlannedSample, Slot

    stream = _state(context).batches
    limit = context.recipe.data.micro_batch_visual_tokens
    samples = []
    for number, (shard, sample) in enumerate(places):
        place = Place(shard, sample)
        name = stream.shards.manifest.shards[shard].name
        slot = Slot(0, number, place, limit)
        samples.append(PlannedSample(slot, name, stream.shards.read(place), None))
    return _collate(context, stream.encoder(samples))


def _text_batch(state: TrainState) -> CaptionBatch:
    """Return a micro-batch of one sample without a picture."""
    import numpy as np

    from qwenvl_dist.data.batch import Example, collate

    encoder = state.batches.encoder
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Say something."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Something without a picture."}]},
    ]
    example = Example(
        "text-only",
        encoder.chat.encode(messages, ()),
        (),
        np.zeros(0, np.uint8),
        features=encoder.dummy.features,
    )
    return collate([example], encoder.dummy, encoder.chat.pad_token, encoder.chat.image_token)


def _first_batches(context: Context) -> list[CaptionBatch]:
    """Return this rank's micro-batches of the first optimizer step, read without workers."""
    stream: Any = _state(context).batches
    workers, stream.workers = stream.workers, 0
    try:
        return next(iter(stream.iterate()))
    finally:
        stream.workers = workers


def _step(context: Context, batches: Sequence[CaptionBatch], rate: float) -> None:
    """Make one optimizer step. Raises CheckFailed when its loss is not finite."""
    from qwenvl_dist.training.step import train_step

    state, host = _state(context), context.host
    tokens, samples = host.sum(sum(b.target_tokens for b in batches), sum(len(b.keys) for b in batches))
    if not tokens:
        raise UserError(
            "no sample of the batch has a token to learn; raise data.max_length or look at the data with shards show"
        )
    result = train_step(state, batches, rate, tokens, samples)
    (broken,) = host.sum(int(not result.is_finite))
    state.progress.step += 1  # other dropout
    if broken:
        raise UserError(
            f"the loss of {broken} of {host.world_size} ranks is not finite; look at the base and at model.dtype"
        )


def _loss(context: Context, batches: Sequence[CaptionBatch]) -> float:
    """Return the mean loss of a token over all ranks, without dropout."""
    import torch

    state = _state(context)
    state.engine.eval()
    with torch.no_grad():
        total = sum(state.engine(batch=batch.to(state.accelerator.device)).item() for batch in batches)
    state.engine.train()
    parts = context.host.gather((total, sum(batch.target_tokens for batch in batches)))
    return sum(part for part, _ in parts) / max(1, sum(tokens for _, tokens in parts))
