"""A whole run: from a recipe to a trained adapter in the run folder."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_dist.data.cache import GIB, ShardCache
from qwenvl_dist.data.captions import as_packed
from qwenvl_dist.data.joined import open_training_sets
from qwenvl_dist.data.mixture import make_plan, samples_per_epoch
from qwenvl_dist.data.plan import RunPlan, StepLayout
from qwenvl_dist.data.sizes import ImageSizeRule
from qwenvl_dist.data.source import Shards, ShardSet
from qwenvl_dist.data.storage import ReadPolicy, open_storage
from qwenvl_dist.data.stream import CaptionStream, SampleEncoder
from qwenvl_dist.distributed import HostGroup, Topology, start
from qwenvl_dist.errors import CheckFailed, UserError
from qwenvl_dist.guard import Guard
from qwenvl_dist.heartbeat import Heartbeat, collective_seconds
from qwenvl_dist.logs import get_logger
from qwenvl_dist.model.fast_path import install as install_fast_path
from qwenvl_dist.model.load import load_model, load_processor, resolve_base
from qwenvl_dist.model.lora import make_trainable, set_activation_checkpointing, trainable_parameters
from qwenvl_dist.model.pixels import PixelSettings
from qwenvl_dist.scores.coco import missing_java
from qwenvl_dist.startup import StartUp
from qwenvl_dist.training.checkpoint import CheckpointError, Checkpoints
from qwenvl_dist.training.features import check_binding, check_frozen
from qwenvl_dist.training.generations import open_generations
from qwenvl_dist.training.history import RunHistory, rewind
from qwenvl_dist.training.launches import describe_launch, record_launch
from qwenvl_dist.training.loop import train
from qwenvl_dist.training.metrics import Metrics
from qwenvl_dist.training.optim import make_optimizer
from qwenvl_dist.training.output_folder import ranks_elsewhere, set_aside_earlier_run
from qwenvl_dist.training.pace import Pace
from qwenvl_dist.training.state import DataIdentity, SourceIdentity, TrainState
from qwenvl_dist.training.tracking import start_trackers

if TYPE_CHECKING:
    from collections.abc import Callable

    from accelerate import Accelerator
    from torch import nn

    from qwenvl_dist.config import DataConfig, Recipe
    from qwenvl_dist.training.stop import StopSignal

log = get_logger(__name__)


def build_model(recipe: Recipe, base: Path, processor: Any, zero_stage: int) -> nn.Module:
    """Return the model to train. Collective under ZeRO-3."""
    import torch
    import transformers

    if not (sys.stderr.isatty() and Topology.from_environment().is_main):
        transformers.utils.logging.disable_progress_bar()
    config = recipe.model
    if recipe.data.captions_mode == "each" and config.attention == "auto":
        config = config.model_copy(update={"attention": "sdpa"})  # FlashAttention 2 takes no mask
    model = load_model(base, config)
    # Under ZeRO-3 each weight must have been partitioned as it was read; a whole model would show as memory only.
    partitioned = all(hasattr(parameter, "ds_id") for parameter in model.parameters())
    assert partitioned == (zero_stage == 3), f"ZeRO-{zero_stage}, but partitioned is {partitioned}"
    model.pixel_settings = PixelSettings.of(processor)
    set_activation_checkpointing(model, recipe.model.checkpoint_every)
    torch.manual_seed(recipe.train.seed)  # the adapter starts the same on every rank, world size and stage
    trained = make_trainable(model, recipe.lora, recipe.model)
    if recipe.model.fast_path:
        install_fast_path(model, partitioned)
    return trained


def open_shards(data: DataConfig, place: str) -> ShardSet:
    """Return the shards at a folder or URL, read as patiently and through such a cache as the recipe says."""
    cache = ShardCache(Path(data.cache_dir), int(data.cache_gib * GIB)) if data.cache_dir else None
    policy = ReadPolicy(data.read_timeout_seconds, data.read_retries)
    return ShardSet(open_storage(place, policy), cache)


def open_data(recipe: Recipe) -> tuple[Recipe, Shards]:
    """Return the shards to train on, and the recipe with what it leaves to them filled in. Raises UserError."""
    shards = open_training_sets(recipe.data, partial(open_shards, recipe.data))
    return as_packed(recipe, [part.manifest for part in shards.parts]), shards


def open_streams(
    recipe: Recipe, shards: Shards, topology: Topology, processor: Any, base: Path
) -> tuple[CaptionStream, CaptionStream | None, DataIdentity]:
    """Return the training stream, the validation stream and what identifies the data: of what `open_data` gave."""
    data, train_config = recipe.data, recipe.train
    rule = ImageSizeRule.of(data.picture_size, processor, max_visual_tokens=data.max_visual_tokens)
    mark = data.caption_mark if data.captions_mode == "each" else None

    def encoder_of(shards: ShardSet, name: str) -> SampleEncoder:
        features = shards.manifest.features
        if features is not None:
            check_binding(shards.manifest, name, base, processor, data)
        width = None if features is None else int(features["hidden"])
        return SampleEncoder(
            processor, rule, data.max_length, data.resize == "exact", mark, width, data.over_length
        )

    manifests = [part.manifest for part in shards.parts]
    counts = samples_per_epoch(data, [manifest.samples for manifest in manifests])
    encoders = [
        encoder_of(part, str(each)) for part, each in zip(shards.parts, data.training_sets, strict=True)
    ]
    plan = make_plan(data, [manifest.shard_sizes for manifest in manifests], counts, train_config.epochs)
    accumulation = recipe.grad_accum_steps(topology.world_size)
    layout = StepLayout(topology.world_size, data.micro_batch_size, accumulation)
    options: Any = {
        "rank": topology.rank,
        "workers": data.workers,
        "timeout_seconds": train_config.timeout_seconds,
        "length_grouping": data.length_grouping,
        "visual_token_budget": data.micro_batch_visual_tokens,
        "drawn_caption_mark": data.caption_mark if data.captions_mode == "sample" else None,
    }
    batches = CaptionStream(shards, plan, layout, encoders[0], **options)
    sources = {
        each.name: SourceIdentity(manifest.fingerprint, manifest.samples, count)
        for each, manifest, count in zip(data.training_sets, manifests, counts, strict=True)
        if data.mixture
    }
    identity = DataIdentity(
        shards.manifest.fingerprint, data.seed, data.shuffle_window, plan.samples_per_epoch, sources,
        captions="join" if data.captions_mode == "join" else f"{data.captions_mode} of {data.caption_mark}",
    )  # fmt: skip
    validation = None
    if data.validation:
        held_out = open_shards(data, data.validation)
        once = RunPlan(held_out.manifest.shard_sizes, seed=0, window=1, shuffle=False)
        if not once.total_samples:
            raise UserError(
                f"data.validation = {data.validation}: holds no samples; pack some or drop the key"
            )
        one = StepLayout(topology.world_size, data.micro_batch_size, 1)
        encoder = encoder_of(held_out, f"data.validation = {data.validation}")
        validation = CaptionStream(held_out, once, one, encoder, **options)
    return batches, validation, identity


def assemble(
    recipe: Recipe,
    accelerator: Accelerator,
    topology: Topology,
    host: HostGroup,
    base: Path,
    startup: StartUp | None = None,
) -> TrainState:
    """Load, shard and connect everything a training step touches. Collective."""
    startup = startup or StartUp()
    processor = load_processor(base)
    recipe, shards = open_data(recipe)
    batches, validation, identity = open_streams(recipe, shards, topology, processor, base)
    startup.mark("data")
    plugin = accelerator.deepspeed_plugin
    assert plugin is not None
    model = build_model(recipe, base, processor, plugin.zero_stage)
    startup.mark("model")
    trained = trainable_parameters(model)
    if batches.shards.manifest.features is not None:
        check_frozen(recipe, trained)
    count = sum(getattr(p, "ds_numel", p.numel()) for p in trained.values())
    log.info("training %.3f M parameters in %d tensors", count / 1e6, len(trained))
    optimizer = make_optimizer(model, recipe.optim, plugin.deepspeed_config)
    engine, optimizer = accelerator.prepare(model, optimizer)
    startup.mark("zero")
    return TrainState(
        recipe=recipe,
        accelerator=accelerator,
        topology=topology,
        host=host,
        engine=engine,
        optimizer=optimizer,
        processor=processor,
        batches=batches,
        validation=validation,
        identity=identity,
        total_samples=batches.plan.total_samples,
        startup=startup,
        pace=Pace(accelerator.device, exchanges_nothing=plugin.zero_stage == 2),
    )


def apply_max_steps(state: TrainState) -> None:
    """Let the run end after `train.max_steps` optimizer steps, those before a resume counted as they were made."""
    if state.recipe.train.max_steps is not None:
        left = max(0, state.recipe.train.max_steps - state.progress.step)
        end = state.progress.consumed + left * state.batches.layout.global_batch_size
        state.total_samples = min(state.total_samples, end)


def check_recipe_paths(recipe: Recipe) -> None:
    """Tell what a look at disk and data tells, before ranks are joined and a model is loaded. Raises UserError."""
    recipe, shards = open_data(recipe)
    samples_per_epoch(recipe.data, [part.manifest.samples for part in shards.parts])
    if recipe.data.validation:
        try:
            open_shards(recipe.data, recipe.data.validation)
        except UserError as error:
            raise UserError(f"data.validation: {error}") from error
    if recipe.data.cache_dir:
        ShardCache(Path(recipe.data.cache_dir), 0).prepare()
    if recipe.eval.every_steps is not None:
        _check_generations(recipe)
    resume = recipe.train.resume
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        raise UserError(f"train.resume = {resume}: no such folder; name a step folder, or use auto or never")
    if recipe.tracking.mode == "disabled":
        return
    for tracker in recipe.tracking.trackers:  # accelerate drops one that is not installed without a word
        if importlib.util.find_spec(tracker) is None:
            raise UserError(
                f"tracking.trackers: {tracker} is not installed; pip install {tracker}, or leave it out"
            )
    # swanlab logs this error and goes on without writing anything
    local_swanlab = recipe.tracking.mode == "local" and "swanlab" in recipe.tracking.trackers
    if local_swanlab and importlib.util.find_spec("swanboard") is None:
        raise UserError("tracking.mode = local: needs swanlab[dashboard]; install it, or use mode offline")


def _check_generations(recipe: Recipe) -> None:
    assert recipe.data.validation, "the recipe demands it with eval.every_steps"
    try:
        open_shards(recipe.data, recipe.data.validation).require_pictures()
    except UserError as error:
        raise UserError(f"eval.every_steps: data.validation = {error}, or drop eval.every_steps") from None
    missing = missing_java() if recipe.eval.scores and Topology.from_environment().is_main else None
    if missing:  # rank 0 scores
        raise UserError(f"eval.scores: {missing}; or set eval.scores=[] for captions without scores")


def run_training(
    recipe: Recipe,
    stop: StopSignal,
    guard: Guard | None = None,
    joined: Callable[[Recipe, HostGroup], None] | None = None,
) -> None:
    """Train as the recipe says, resuming where an earlier start left off, until `stop`. Collective.

    `guard` ends the process when a rank does not answer within train.timeout_seconds. `joined` is called once the ranks
    can exchange something, and before anything is loaded or written; what it raises ends the run.
    """
    guard = guard or Guard()
    startup = StartUp()
    startup.mark("imports")
    check_recipe_paths(recipe)
    startup.mark("data")
    accelerator = start(recipe, startup)
    stop.joined()
    host = HostGroup(collective_seconds(recipe.train.timeout_seconds))
    with Heartbeat(host, guard, recipe.train.timeout_seconds):
        if joined is not None:
            joined(recipe, host)
            startup.mark("preflight")
        _run_joined(recipe, accelerator, host, stop, guard, startup)
    accelerator.end_training()


def _run_joined(
    recipe: Recipe,
    accelerator: Accelerator,
    host: HostGroup,
    stop: StopSignal,
    guard: Guard,
    startup: StartUp,
) -> None:
    topology = Topology.from_environment()
    run = Path(recipe.train.output_dir)
    elsewhere = ranks_elsewhere(run, host, recipe.train.output_shared)
    startup.mark("join")
    base = resolve_base(recipe.model.base)
    state = assemble(recipe, accelerator, topology, host, base, startup)
    state.outcome = guard.outcome
    if topology.is_main and recipe.train.resume == "never":
        set_aside_earlier_run(run)
    host.barrier()
    checkpoints = Checkpoints(state, base, elsewhere)
    checkpoints.resume()
    state.outcome.step = state.progress.step
    apply_max_steps(state)
    if topology.is_main or (topology.rank in elsewhere and topology.local_rank == 0):
        moved = rewind(run, state.progress.step)
        if moved:
            log.info("moved %d lines of steps after %d to discarded/", moved, state.progress.step)
        (run / "recipe.yaml").write_text(state.recipe.to_yaml(), encoding="utf-8")
    host.barrier()
    layout = state.batches.layout
    log.info(
        "%d ranks, ZeRO-%d, global batch of %d samples: %d ranks x %d samples x %d accumulated",
        topology.world_size, state.engine.zero_optimization_stage(), layout.global_batch_size,
        layout.world_size, layout.micro_batch_size, layout.grad_accum_steps,
    )  # fmt: skip
    generations = open_generations(state)
    history = RunHistory(run, topology.rank, recipe.data.ledger)
    metrics = Metrics(state, history)
    launch = describe_launch(state)
    if topology.is_main:
        record_launch(run, launch)
    start_trackers(state, launch)
    startup.mark("resume")
    log.info("ready after %.1f s", sum(startup.seconds.values()))
    try:
        if state.finished:
            limit = "train.epochs" if recipe.train.max_steps is None else "train.max_steps or train.epochs"
            log.info("nothing to do: step %d is the last; raise %s to go on", state.progress.step, limit)
        else:
            with metrics:
                train(state, checkpoints, metrics, history, stop, generations)
            log.info("finished: step %d, checkpoints in %s", state.progress.step, checkpoints.folder)
    except CheckFailed:
        with contextlib.suppress(CheckpointError):
            checkpoints.wait()  # what is being written becomes whole
        for tracker in accelerator.trackers:
            tracker.finish()
        raise
    finally:
        history.sync()
