"""What the data plan costs at the largest scale: a billion samples, 1,024 ranks of 8 workers.

    python benchmarks/plan_scale.py [--shards 100000] [--samples 1000000000]

One process does what one loader worker does: build an epoch, resume at 99 % of it, walk on. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable

import numpy as np

from qwenvl_dist.data.plan import EpochOrder, RunPlan, StepLayout
from qwenvl_dist.data.source import PlannedSource


def seconds(function: Callable[[], object], repeats: int = 7) -> float:
    """Return the median time of a call."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def peak_mib() -> float:
    """Return the most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=1_000_000_000)
    args = parser.parse_args()
    sizes = np.full(args.shards, args.samples // args.shards, np.int64)
    layout = StepLayout(world_size=1024, micro_batch_size=4, grad_accum_steps=1)
    start = args.samples * 99 // 100 // layout.global_batch_size * layout.global_batch_size
    before = peak_mib()

    def resume(window: int = 64) -> None:
        RunPlan(sizes, seed=0, window=window, epochs=10).find(np.array([start]))

    plan = RunPlan(sizes, seed=0, window=64, epochs=10)
    steps = 8192 // 4 * 8  # of one worker in eight: 8,192 of its own positions

    def own_positions() -> None:
        source = PlannedSource(None, plan, layout, rank=1000, start=start, steps=steps)  # type: ignore[arg-type]
        plan.find(source._positions(np.arange(3, steps, 8)).reshape(-1))

    plan.find(np.array([start]))
    # One million positions in blocks, so that the memory told is that of a worker and not of this measurement.
    blocks = [np.arange(at, at + 10_000) for at in range(start, start + 1_000_000, 10_000)]
    result = {
        "epoch_build_ms": 1e3 * seconds(lambda: EpochOrder(sizes, 0, 1, 64)),
        "resume_at_99_percent_ms": 1e3 * seconds(resume),
        "bulk_us_per_position": 1e6 * seconds(lambda: [plan.find(block) for block in blocks], 3) / 1e6,
        "worker_us_per_position": 1e6 * seconds(own_positions) / 8192,
        "memory_mib_above_imports": peak_mib() - before,
        "memory_mib_of_imports": before,
    }
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


if __name__ == "__main__":
    main()
