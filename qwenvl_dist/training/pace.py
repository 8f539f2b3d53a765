"""How evenly the ranks work, and which one keeps the others waiting.

Ranks run in lockstep: whatever one of them loses shows in the step time of all. What differs is the time before an
exchange, in which no other rank can hold it up: waiting for its own data, and under ZeRO-2, whose forward pass
exchanges nothing, that pass. Under ZeRO-3 every layer of it gathers weights, so that only the data counts there.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median_low
from typing import Any

import torch

LAG = 0.2  # over the median rank, from which on a rank is named
WORTH = 0.05  # of the step, which the lag must cost for that


class Pace:
    """The time of this rank's forward passes. Nothing here waits for the device before `take`."""

    def __init__(self, device: torch.device | None = None, exchanges_nothing: bool = True) -> None:
        self._on_gpu, self._counts = device is not None and device.type == "cuda", exchanges_nothing
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Count the block, on a GPU from its first kernel to its last."""
        if not self._counts:
            yield
        elif self._on_gpu:
            events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
        else:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start

    def take(self) -> float:
        """Return the seconds since the last call. Waits for the device."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds


@dataclass(frozen=True)
class Laggard:
    """The rank that the others wait for."""

    rank: int
    host: str
    seconds: float  # a step, before it waits for others
    median: float  # of all ranks

    @property
    def over_median(self) -> float:
        """The share by which it is slower."""
        return self.seconds / self.median - 1


def spread(seconds: Sequence[float], hosts: Sequence[str]) -> dict[str, float]:
    """Return the fastest, the median and the slowest node, each by its slowest rank."""
    nodes: dict[str, float] = defaultdict(float)
    for own, host in zip(seconds, hosts, strict=True):
        nodes[host] = max(nodes[host], own)
    values = list(nodes.values())
    return {"fastest": min(values), "median": median_low(values), "slowest": max(values)}


def laggard(seconds: Sequence[float], hosts: Sequence[str], step_seconds: float) -> Laggard | None:
    """Return the slowest rank if it lags far enough behind the median one, by seconds of each rank in one step."""
    rank = max(range(len(seconds)), key=lambda rank: seconds[rank])
    typical = median_low(seconds)
    lag = seconds[rank] - typical
    if not typical or lag < LAG * typical or lag < WORTH * step_seconds:
        return None
    return Laggard(rank, hosts[rank], seconds[rank], typical)
