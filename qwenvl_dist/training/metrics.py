"""Timers, throughput and what is logged where."""

from __future__ import annotations

import contextlib
import resource
import socket
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch

from qwenvl_dist.logs import describe_seconds, get_logger
from qwenvl_dist.training.display import TrainDisplay, number_cells
from qwenvl_dist.training.mfu import usable_peak, work_of
from qwenvl_dist.training.pace import Laggard, laggard, spread
from qwenvl_dist.training.tracking import plain_metrics

if TYPE_CHECKING:
    from qwenvl_dist.data.batch import CaptionBatch
    from qwenvl_dist.training.history import RunHistory
    from qwenvl_dist.training.state import TrainState
    from qwenvl_dist.training.step import StepResult

log = get_logger(__name__)


def peak_memory_gib() -> float:
    """Return the largest memory this rank has held: of its GPU, or without one of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


class Metrics:
    """Collects over the steps between two log lines; nothing here waits for the device before a line is due."""

    def __init__(self, state: TrainState, history: RunHistory) -> None:
        self.state, self.history = state, history
        left = state.batches.layout.steps(state.total_samples - state.progress.consumed)
        self._display = TrainDisplay(state.progress.step, state.progress.step + left)
        self._startup: dict[str, float] | None = None  # until it is written
        self._host, self._laggard = socket.gethostname(), -1
        device = state.accelerator.device
        self._peak_flops, missing = usable_peak(state.recipe, device)
        if missing and device.type == "cuda":
            log.info("no MFU: %s", missing)
        self._reset()

    def __enter__(self) -> Self:
        """Show a table where rank 0 has a terminal; elsewhere the logged lines are enough."""
        self._display.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Leave its last state."""
        self._display.__exit__(*exc_info)

    def _reset(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._losses: list[torch.Tensor] = []
        self._target_tokens = self._samples = self._steps = self._flops = 0

    @contextlib.contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def add(self, result: StepResult, micro_batches: Sequence[CaptionBatch]) -> None:
        """Count one finished step; its micro-batches are still on the host."""
        self._losses.append(result.losses.sum())
        self._target_tokens += result.target_tokens
        self._samples += result.samples
        self._steps += 1
        if self._peak_flops:
            self._flops += sum(work_of(self.state, batch).flops for batch in micro_batches)
        self._display.advance()

    def end_startup(self, result: StepResult) -> None:
        """Say how long the launch took, of each part the slowest rank. Collective; waits for the device."""
        startup = self.state.startup
        result.losses.tolist()
        startup.finish()
        total = sum(startup.seconds.values())
        slowest = self.state.host.max(total, *startup.seconds.values())
        self._startup = dict(zip(("total", *startup.seconds), slowest, strict=True))
        parts = ", ".join(
            f"{part.replace('_', ' ')} {seconds:.1f}" for part, seconds in self._startup.items()
        )
        log.info("seconds from launch to the end of the first step: %s", parts)

    def log_step(self, rate: float) -> dict[str, Any]:
        """Write one line about the steps since the last one: means of loss and speed, maxima over ranks. Collective."""
        state, progress = self.state, self.state.progress
        loss = torch.stack(self._losses).double().sum().item()
        before_waiting = (self._seconds["data_seconds"] + state.pace.take()) / self._steps
        own = (loss, self._flops, self._peak_flops, before_waiting, self._host)
        losses, flops, peaks, paces, hosts = zip(*state.host.gather(own), strict=True)
        data, step, peak = state.host.max(
            self._seconds["data_seconds"], self._seconds["step_seconds"], peak_memory_gib()
        )
        norm = state.engine.get_global_grad_norm()
        wall = max(data + step, 1e-9)
        values: dict[str, Any] = {
            "step": progress.step,
            "epoch": round(progress.consumed / state.identity.samples_per_epoch, 6),
            "loss": sum(losses) / max(1, self._target_tokens),
            "learning_rate": rate,
            "grad_norm": float(norm) if norm is not None else None,
            "samples_per_second": self._samples / wall,
            "target_tokens_per_second": self._target_tokens / wall,
            "data_wait_fraction": data / wall,
            "step_seconds": step / self._steps,
            "peak_memory_gib": peak,
            "bad_samples": len(progress.bad_samples),
            "target_tokens": self._target_tokens,
        }
        values |= {f"{what}_samples": count for what, count in progress.adjusted.items() if count}
        sources = state.batches.plan.progress(progress.consumed)
        if sources:
            values["sources"] = {
                name: {"samples": source.samples, "epoch": round(source.passes, 6)}
                for name, source in sources.items()
            }
        if all(peaks):
            values["mfu"] = sum(flops) / wall / sum(peaks)
        if len(paces) > 1:
            values["own_seconds"] = spread(paces, hosts)
            self._name_laggard(values, laggard(paces, hosts, wall / self._steps))
        if self._startup:  # in the first line of a launch
            values["startup_seconds"], self._startup = self._startup, None
        self.history.metrics(values)
        state.accelerator.log(plain_metrics(values), step=progress.step)
        left = (state.total_samples - progress.consumed) / max(self._samples / wall, 1e-9)
        cells = number_cells(values)
        self._display.show(cells, left)
        if not self._display.is_shown:
            line = "  ".join(f"{heading} {cell}" for heading, cell in cells.items())
            log.info(
                "step %d/%d  %s  left %s", progress.step, self._display.total, line, describe_seconds(left)
            )
        self._reset()
        return values

    def _name_laggard(self, values: dict[str, Any], slow: Laggard | None) -> None:
        """Add the rank that the others wait for to a line; say so when it was another one before."""
        if slow is None:
            return
        values["slowest"] = {
            "rank": slow.rank,
            "host": slow.host,
            "seconds": slow.seconds,
            "over_median": slow.over_median,
        }
        if self.state.topology.is_main and self._laggard != slow.rank:
            log.warning(
                "step %d: the others wait for rank %d on %s: %.3f s a step for its data and forward pass, %.0f%% more "
                "than the median rank",
                values["step"], slow.rank, slow.host, slow.seconds, 100 * slow.over_median,
            )  # fmt: skip
        self._laggard = slow.rank

    def log_validation(self, val_loss: float, seconds: float) -> None:
        """Write one line about a validation pass."""
        step = self.state.progress.step
        self.history.metrics({"step": step, "val_loss": val_loss})
        self.state.accelerator.log({"val_loss": val_loss}, step=step)
        log.info("step %d: validation loss %.4f (%.1f s)", step, val_loss, seconds)

    def log_generations(self, values: dict[str, float], num_images: int) -> None:
        """Write one line about captions that were generated: their scores, and how fast they came."""
        step = self.state.progress.step
        self.history.metrics({"step": step, **values})
        self.state.accelerator.log(values, step=step)
        scores = "  ".join(f"{k} {v:.3f}" for k, v in values.items() if k != "generated_per_second")
        rate = values["generated_per_second"]
        log.info("step %d: %d captions, %.2f a second  %s", step, num_images, rate, scores)
