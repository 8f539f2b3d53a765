"""Samples per second of a training step, beside the machine's matrix rate and a transformers Trainer.

The real step of `train` under its real DeepSpeed engine, on batches of the real stream. All paths take turns in one run
and each step is set beside its own matrix products, timed before and after it: a machine that drifts does not matter.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwenvl_dist.bench.memory import TensorBytes, peak_gib, reset_peak
from qwenvl_dist.bench.trainer import TrainerProcess, trainer_inputs
from qwenvl_dist.config import Recipe
from qwenvl_dist.data.batch import CaptionBatch, Example, collate
from qwenvl_dist.data.chat import IGNORE, EncodedChat
from qwenvl_dist.data.formats import read_coco_captions
from qwenvl_dist.data.pack import pack
from qwenvl_dist.data.stream import CaptionStream
from qwenvl_dist.distributed import HostGroup, Topology, start
from qwenvl_dist.logs import get_logger
from qwenvl_dist.model.load import resolve_base
from qwenvl_dist.model.lora import set_activation_checkpointing
from qwenvl_dist.startup import StartUp
from qwenvl_dist.synthetic.scenes import write_scenes
from qwenvl_dist.training.mfu import base_model, usable_peak, work_of
from qwenvl_dist.training.run import assemble, open_data, open_streams
from qwenvl_dist.training.state import TrainState
from qwenvl_dist.training.step import train_step

log = get_logger(__name__)
BLOCK = 2  # steps of one path before the other has its turn
WARM_UP = 1


@dataclass
class Turns:
    """What the turns gave."""

    step_seconds: list[float] = field(default_factory=list)
    wait_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # mean token loss of each step
    shares: list[float] = field(default_factory=list)  # of the matrix rate, of each step
    rates: list[float] = field(default_factory=list)  # GFLOP/s of the products around each step
    trainer_seconds: list[float] = field(default_factory=list)
    trainer_losses: list[float] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    captions: list[int] = field(default_factory=list)
    separate_seconds: list[float] = field(default_factory=list)
    separate_losses: list[float] = field(default_factory=list)
    gflop: list[float] = field(default_factory=list)


def write_pictures(folder: Path, photos: int, side: int) -> Path:
    """Write shards of generated pictures with five captions each."""
    files = write_scenes(folder / "scenes", photos, size=side, style="plain5", validation_count=0)
    captions = files["train"]
    pack(read_coco_captions(captions, captions.parent / "images"), folder / "shards", samples_per_shard=256)
    return folder / "shards"


def measure(
    recipe: Recipe,
    steps: int,
    compare_trainer: bool,
    modes: list[str],
    startup: StartUp,
    pictures: Path | None = None,
) -> dict[str, Any]:
    """Return the report of `bench step`; `recipe` has shards, batch size and everything else.

    `pictures` are the shards of the Trainer where those of the recipe hold features.
    """
    accelerator = start(recipe, startup)
    host = HostGroup(1800)
    startup.mark("join")
    base = resolve_base(recipe.model.base)
    state = assemble(recipe, accelerator, Topology.from_environment(), host, base, startup)
    stream = endless(state.batches)
    turns = Turns()
    own_mode = recipe.model.checkpointing
    total = WARM_UP + steps
    with contextlib.ExitStack() as stack:
        trainer = None
        if compare_trainer:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            batches = state.batches
            if batches.shards.manifest.features is not None:
                data = recipe.data.model_copy(update={"train": str(pictures)})
                plain = recipe.model_copy(update={"data": data})
                batches, *_ = open_streams(*open_data(plain), state.topology, state.processor, base)
            write_trainer_inputs(state, batches, total, folder / "inputs.pt")
            process = TrainerProcess(base, recipe, folder / "inputs.pt", total + 1, torch.get_num_threads())
            trainer = stack.enter_context(process)
        startup.leave_out()  # what only the Trainer needs
        state.engine.train()
        batch = next(stream)
        startup.mark("first_batch")
        one_step(state, batch)
        startup.finish()
        if trainer:
            trainer.run(WARM_UP)
        for done in range(0, steps, BLOCK):
            take_turn(state, stream, min(BLOCK, steps - done), turns, trainer)
            log.info("%d of %d steps", min(done + BLOCK, steps), steps)
    # All of them give the same step: what differs is what is kept for the backward pass.
    memory = {mode: memory_of(state, batch, mode) for mode in dict.fromkeys([*modes, own_mode])}
    return report(state, turns, memory)


def endless(batches: CaptionStream) -> Iterator[CaptionBatch]:
    """Yield the micro-batches of the stream."""
    for micro_batches in batches.iterate():
        yield from micro_batches


def write_trainer_inputs(state: TrainState, stream: CaptionStream, count: int, path: Path) -> None:
    """Write what the Trainer gets: the samples of our first `count` steps."""
    batches = endless(stream)
    base = base_model(state)
    image_token = state.batches.encoder.chat.image_token
    settings = base.pixel_settings
    inputs = [trainer_inputs(next(batches), settings, image_token) for _ in range(count)]
    torch.save(inputs + inputs[:1], path)  # one more: it waits for its turn in a step that never comes


def one_step(state: TrainState, batch: CaptionBatch) -> float:
    """Make an optimizer step of one micro-batch; return its mean token loss. Waits for the device."""
    rate = state.recipe.optim.learning_rate
    result = train_step(state, [batch], rate, batch.target_tokens, len(batch.keys))
    state.progress.advance(len(batch.keys), state.total_samples)
    return float(result.losses.sum()) / max(1, batch.target_tokens)


def take_turn(
    state: TrainState,
    stream: Iterator[CaptionBatch],
    steps: int,
    turns: Turns,
    trainer: TrainerProcess | None,
) -> None:
    """Measure our steps, the products of each around it, and then the Trainer's steps on the same samples."""
    device, dtype = state.accelerator.device, base_model(state).dtype
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        batch = next(stream)
        turns.wait_seconds.append(time.perf_counter() - started)
        work = work_of(state, batch)
        before = work.seconds_of_products(dtype, device)
        started = time.perf_counter()
        turns.losses.append(one_step(state, batch))
        seconds.append(time.perf_counter() - started)
        in_products = (before + work.seconds_of_products(dtype, device)) / 2
        turns.rates.append(work.product_flops / in_products / 1e9)
        turns.shares.append(work.flops / 1e9 / turns.rates[-1] / seconds[-1])
        turns.samples.append(len(batch.keys))
        turns.gflop.append(work.flops / 1e9)
        if batch.segments is not None:
            chat = state.batches.encoder.chat
            alone = separate_captions(batch, chat.pad_token, chat.image_token)
            turns.captions.append(len(alone.input_ids))
            started = time.perf_counter()
            turns.separate_losses.append(one_step(state, alone))
            turns.separate_seconds.append(time.perf_counter() - started)
    turns.step_seconds += seconds
    if trainer:
        theirs, losses = trainer.run(steps)
        turns.trainer_seconds += theirs
        turns.trainer_losses += losses


def separate_captions(batch: CaptionBatch, pad_token: int, image_token: int) -> CaptionBatch:
    """Return the batch with each caption of a shared prefix as a row of its own; every row has one picture."""
    assert batch.segments is not None
    rows: list[Example] = []
    values = batch.pixels.numel() // sum(t * h * w for t, h, w in batch.grids)  # of a patch
    start = 0
    for number, (segments, grid) in enumerate(zip(batch.segments.numpy(), batch.grids, strict=True)):
        end = start + grid[0] * grid[1] * grid[2] * values
        pixels, start = batch.pixels[start:end].numpy(), end
        labels = batch.labels[number].numpy()
        used = np.flatnonzero(labels != IGNORE)[-1] + 1
        for segment in range(1, segments.max() + 1):
            mine = np.flatnonzero(np.isin(segments[:used], (0, segment)))
            chat = EncodedChat(
                batch.input_ids[number].numpy()[mine],
                labels[mine],
                batch.position_ids[:, number].numpy()[:, mine],
            )
            rows.append(Example(f"{number}-{segment}", chat, (grid,), pixels))
    return collate(rows, rows[0], pad_token, image_token)


@dataclass(frozen=True)
class StepMemory:
    """What a step takes, GiB; None where the GPU has less than that."""

    peak: float | None = None  # of the GPU or process, weights included
    kept: float | None = None  # made in the forward pass and held when it ends, for the backward pass


def memory_of(state: TrainState, batch: CaptionBatch, mode: str) -> StepMemory:
    """Return what a step takes under a checkpointing mode."""
    every = state.recipe.model.model_copy(update={"checkpointing": mode}).checkpoint_every
    set_activation_checkpointing(base_model(state), every)
    made, kept = TensorBytes(), []
    handle = state.engine.module.register_forward_hook(lambda *_: kept.append(made.now))
    reset_peak()
    try:
        with made:
            one_step(state, batch)
        return StepMemory(peak_gib(), kept[0] / 2**30)
    except torch.OutOfMemoryError:
        if state.topology.world_size > 1:  # the others wait in a collective
            raise
        log.warning("model.checkpointing = %s: out of memory", mode)
        return StepMemory()
    finally:
        handle.remove()
        set_activation_checkpointing(base_model(state), state.recipe.model.checkpoint_every)


def report(state: TrainState, turns: Turns, memory: dict[str, StepMemory]) -> dict[str, Any]:
    """Return the figures by name."""
    median = statistics.median
    step_seconds = median(turns.step_seconds)
    per_second = sum(turns.samples) / sum(turns.step_seconds)
    waited = sum(turns.wait_seconds)
    peak, missing = usable_peak(state.recipe, state.accelerator.device)
    if missing:
        log.info("no MFU: %s", missing)
    result: dict[str, Any] = {
        "samples_per_second": per_second,
        "step_seconds": step_seconds,
        "matrix_rate_share": median(turns.shares),
        "data_wait_fraction": waited / (waited + sum(turns.step_seconds)),
        "peak_memory_gib": memory[state.recipe.model.checkpointing].peak,
        "trainer_samples_per_second": None,
        "ratio": None,
        "matrix_gflop_per_second": median(turns.rates),
        "useful_gflop_per_sample": sum(turns.gflop) / max(1, sum(turns.samples)),
        "loss": statistics.fmean(turns.losses),
        "memory_gib_by_checkpointing": {mode: each.peak for mode, each in memory.items()},
        "kept_gib_by_checkpointing": {mode: each.kept for mode, each in memory.items()},
        "startup_seconds": state.startup.seconds,
        "mfu": None if peak is None else 1e9 * sum(turns.gflop) / sum(turns.step_seconds) / peak,
    }
    if turns.trainer_seconds:
        theirs = sum(turns.samples) / sum(turns.trainer_seconds)
        # Steps of the same samples, minutes apart on a machine that drifts: their ratio one by one, then the median.
        pairs = zip(turns.trainer_seconds, turns.step_seconds, strict=True)
        result.update(
            trainer_samples_per_second=theirs,
            ratio=median(trainer / ours for trainer, ours in pairs),
            trainer_step_seconds=median(turns.trainer_seconds),
            trainer_loss=statistics.fmean(turns.trainer_losses),
            losses=turns.losses,
            trainer_losses=turns.trainer_losses,
        )
    if turns.separate_seconds:
        shared = zip(turns.separate_seconds, turns.step_seconds, strict=True)
        result.update(
            captions_per_second=sum(turns.captions) / sum(turns.step_seconds),
            separate_captions_per_second=sum(turns.captions) / sum(turns.separate_seconds),
            ratio_to_separate=median(separate / ours for separate, ours in shared),
            separate_loss=statistics.fmean(turns.separate_losses),
        )
    return result
