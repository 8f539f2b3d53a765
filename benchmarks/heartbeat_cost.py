"""What the heartbeat and the guard cost a rank: the processor time of their two threads, over the time that goes by.

    python benchmarks/heartbeat_cost.py [--ranks 8 64 1024]

For rank 0, which looks at all others, and for the others, which look at rank 0. The store is a process of its own, as
with a launcher. Prints a JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from dataclasses import dataclass

from qwenvl_dist.guard import LOOK_EVERY_SECONDS, Guard, Launchers
from qwenvl_dist.heartbeat import BEAT_EVERY_SECONDS, Beat, Heartbeat

PORT = 29741
REPEATS = 40


@dataclass
class OneOf:
    """Stands for the group of so many ranks."""

    world_size: int
    rank: int

    def barrier(self) -> None:
        """Wait for nobody."""


def serve(port: int) -> None:
    """Be the store."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    time.sleep(3600)
    del store


def share(world_size: int, rank: int) -> dict[str, float]:
    """Return what one rank of so many spends."""
    from qwenvl_dist.heartbeat import _connect

    store = _connect(10)
    for other in range(world_size):
        store.set(
            str(other),
            Beat(1, f"node{other // 8}", 7, "", "", True, "train_step (training/step.py:61)", 0.1).write(),
        )
    store.set("verdict", "")
    guard = Guard()
    guard.watch(Launchers({"TORCHELASTIC_RUN_ID": "none"}).gone)
    heartbeat = Heartbeat(OneOf(world_size, rank), guard, 600)  # type: ignore[arg-type]
    heartbeat._store = store
    heartbeat._others = heartbeat._watched()
    beats, looks = [], []
    for _ in range(REPEATS):
        began = time.thread_time()
        heartbeat._exchange()
        beats.append(time.thread_time() - began)
        began = time.thread_time()
        guard.look()
        looks.append(time.thread_time() - began)
    beat, look = statistics.median(beats), statistics.median(looks)
    return {
        "ranks": world_size,
        "rank": rank,
        "beat_ms": round(beat * 1000, 3),
        "look_ms": round(look * 1000, 3),
        "percent_of_time": round(100 * (beat / BEAT_EVERY_SECONDS + look / LOOK_EVERY_SECONDS), 4),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 1024])
    args = parser.parse_args()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(PORT))
    server = multiprocessing.Process(target=serve, args=(PORT,), daemon=True)
    server.start()
    for world_size in args.ranks:
        for rank in (0, 1):
            print(json.dumps(share(world_size, rank)), flush=True)
    server.kill()


if __name__ == "__main__":
    main()
