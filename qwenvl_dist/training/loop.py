"""When things happen."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from qwenvl_dist.data.batch import Adjustment
from qwenvl_dist.data.plan import positions_digest
from qwenvl_dist.errors import CheckFailed, Stopped
from qwenvl_dist.logs import get_logger
from qwenvl_dist.training.optim import learning_rate
from qwenvl_dist.training.step import GradientCensus, StepResult, train_step, validation_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qwenvl_dist.data.batch import CaptionBatch
    from qwenvl_dist.training.checkpoint import Checkpoints
    from qwenvl_dist.training.generations import Generations
    from qwenvl_dist.training.history import RunHistory
    from qwenvl_dist.training.metrics import Metrics
    from qwenvl_dist.training.state import TrainState
    from qwenvl_dist.training.stop import StopSignal

log = get_logger(__name__)
CENSUS_STEPS = 2


def train(
    state: TrainState,
    checkpoints: Checkpoints,
    metrics: Metrics,
    history: RunHistory,
    stop: StopSignal,
    generations: Generations | None = None,
) -> None:
    """Run optimizer steps until the plan ends. Collective: every rank makes the same calls in the same order.

    Raises Stopped after an agreed early exit, CheckFailed on bad samples beyond the budget, on a loss that is not
    finite, and on an adapter that no gradient reaches.
    """
    recipe, progress = state.recipe, state.progress
    census = GradientCensus(state.engine.module) if progress.step == 0 else None
    steps = state.batches.iterate(progress.consumed)
    result: StepResult | None = None
    state.engine.train()
    if generations:
        generations.write_base(metrics)
    while not state.finished:
        with metrics.timer("data_seconds"):
            micro_batches = next(steps)
        state.startup.mark("first_batch")
        target_tokens, samples = agree(state, micro_batches, result, checkpoints, history, stop)
        rate = current_learning_rate(state)
        with metrics.timer("step_seconds"):
            result = train_step(state, micro_batches, rate, target_tokens, samples)
        progress.advance(state.batches.layout.global_batch_size, state.total_samples)
        state.outcome.step = progress.step
        metrics.add(result, micro_batches)
        if not state.startup.finished:
            metrics.end_startup(result)
        history.consumed(progress.step, [key for batch in micro_batches for key in batch.keys])
        if census and progress.step <= CENSUS_STEPS:
            require_finite(state, result)
            check_census(state, census, target_tokens)
        if due(progress.step, recipe.train.log_every_steps) or state.finished:
            metrics.log_step(rate)
        val_loss, is_best = None, False
        if state.validation and (due(progress.step, recipe.train.eval_every_steps) or state.finished):
            require_finite(state, result)
            val_loss, is_best = validate(state, metrics)
        if due(progress.step, recipe.train.checkpoint_every_steps) or is_best or state.finished:
            require_finite(state, result)
            history.sync()
            checkpoints.save(val_loss)
        if generations and (due(progress.step, generations.every_steps) or state.finished):
            generations.write(metrics)
    checkpoints.wait()


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps happens after this one."""
    return step % every == 0


def current_learning_rate(state: TrainState) -> float:
    """Return the learning rate of the step about to run."""
    per_step = state.batches.layout.global_batch_size
    return learning_rate(state.recipe.optim, state.progress.consumed, per_step, state.total_samples)


def agree(
    state: TrainState,
    micro_batches: Sequence[CaptionBatch],
    previous: StepResult | None,
    checkpoints: Checkpoints,
    history: RunHistory,
    stop: StopSignal,
) -> tuple[int, int]:
    """Exchange what all ranks must know before a step; return its target tokens and real samples. Collective.

    One small sum on the host. The previous step's losses are looked at here, a step late, so that no GPU waits for it.
    """
    bad = [record for batch in micro_batches for record in batch.bad]
    adjusted = Counter(what for batch in micro_batches for what in batch.adjusted)
    tokens, samples, num_bad, digest, stopping, broken, unsaved, *adjustments = state.host.sum(
        sum(batch.target_tokens for batch in micro_batches),
        sum(len(batch.keys) for batch in micro_batches),
        len(bad),
        sum(positions_digest(batch.positions) for batch in micro_batches),
        int(stop.received is not None),
        int(previous is not None and not previous.is_finite),
        int(checkpoints.failed),
        *(adjusted[what] for what in Adjustment),
    )
    if broken:
        raise_not_finite(state, previous)
    start = state.progress.consumed
    if digest != positions_digest(range(start, start + state.batches.layout.global_batch_size)):
        raise CheckFailed(
            f"step {state.progress.step + 1}: the ranks together do not hold the samples that the plan gives it: "
            "some rank could not read a shard's index that others could; check the storage, then start again"
        )
    if unsaved:  # on this rank, or soon: all ranks get the same answer
        checkpoints.wait()
    if stopping:
        stop_early(state, checkpoints, history, stop)
    if num_bad:
        handle_bad_samples(state, bad, history)
    for what, count in zip(Adjustment, adjustments, strict=True):
        state.progress.adjusted[what] += count
    return tokens, samples


def stop_early(state: TrainState, checkpoints: Checkpoints, history: RunHistory, stop: StopSignal) -> None:
    """Write a checkpoint of the last finished step and leave. Collective."""
    received = next(name for name in state.host.gather(stop.received) if name)
    if state.progress.step and checkpoints.last_saved != state.progress.step:
        history.sync()
        checkpoints.save()
    checkpoints.wait()
    raise Stopped(
        f"stopped by {received} after step {state.progress.step}; start the same command again to go on"
    )


def handle_bad_samples(state: TrainState, bad: list[Any], history: RunHistory) -> None:
    """Count, name and budget bad samples, the same on all ranks. Collective; raises CheckFailed past the budget."""
    step = state.progress.step + 1
    fresh = state.progress.note_bad([record for part in state.host.gather(bad) for record in part])
    history.bad_samples(fresh, step)
    for record in fresh if state.topology.is_main else ():
        log.warning(
            "step %d: bad sample %s in %s left out: %s", step, record.key, record.shard, record.reason
        )
    budget = state.recipe.data.bad_sample_budget
    allowed = -int(-budget * state.identity.samples // 1)
    if len(state.progress.bad_samples) > allowed:
        (shard, key), reason = list(state.progress.bad_samples.items())[-1]
        raise CheckFailed(
            f"step {step}: {len(state.progress.bad_samples)} bad samples, {allowed} allowed (data.bad_sample_budget = "
            f"{budget} of {state.identity.samples}); the last is {key} in {shard}: {reason}; "
            f"repair the shards (qwenvl-dist shards verify names them all: {state.recipe.data.training_places}) "
            "or raise the budget"
        )


def require_finite(state: TrainState, result: StepResult) -> None:
    """Make sure that the last step's losses and gradient are numbers before they are made permanent. Collective."""
    norm = state.engine.get_global_grad_norm()
    bad_norm = norm is not None and not 0 <= float(norm) < float("inf")  # DeepSpeed says -1 for a NaN
    broken, bad_norms = state.host.sum(int(not result.is_finite), int(bad_norm))
    if broken:
        raise_not_finite(state, result)
    if bad_norms:
        keys = [key for part in state.host.gather(result.keys) for keys in part for key in keys]
        raise CheckFailed(
            f"step {state.progress.step}: the gradient is not finite; samples of the step: {', '.join(keys)}; "
            "the last checkpoint is intact, look at these samples or lower optim.learning_rate"
        )


def raise_not_finite(state: TrainState, result: StepResult | None) -> None:
    """Name the samples whose loss is NaN or infinite. Collective; raises CheckFailed on every rank."""
    keys = [key for part in state.host.gather(result.non_finite_keys() if result else []) for key in part]
    raise CheckFailed(
        f"step {state.progress.step}: the loss is not finite; samples of the micro-batches concerned: "
        f"{', '.join(keys)}; the last checkpoint is intact, look at these samples or lower optim.learning_rate"
    )


def check_census(state: TrainState, census: GradientCensus, target_tokens: int) -> None:
    """Stop when an adapter tensor got no gradient in the first steps. Collective; raises CheckFailed."""
    starved = census.starved(state, state.progress.step)
    if starved and target_tokens:
        raise CheckFailed(
            f"step {state.progress.step}: {len(starved)} adapter tensors got no finite, non-zero gradient and would "
            f"not train: {', '.join(starved[:5])}{' ...' if len(starved) > 5 else ''}; check lora.target_modules"
        )
    if state.progress.step == CENSUS_STEPS:
        census.close()


def validate(state: TrainState, metrics: Metrics) -> tuple[float, bool]:
    """Return the validation loss and whether it is the best so far. Collective."""
    start = time.perf_counter()
    val_loss = validation_loss(state)
    best = state.progress.best_val_loss
    is_best = best is None or val_loss < best
    if is_best:
        state.progress.best_val_loss = val_loss
    metrics.log_validation(val_loss, time.perf_counter() - start)
    return val_loss, is_best
