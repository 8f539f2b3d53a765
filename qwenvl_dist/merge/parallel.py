"""Work on many tensors at once, in threads that each compute alone.

Torch's own threads meet at a barrier after every small operation: with anything else on the machine, an
operation of 0.2 ms takes 8 ms. One thread a tensor has no barriers; torch, reads and writes release the GIL.
"""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

MAX_WORKERS = 8  # each holds a few row blocks and 4 MiB on their way to the disk

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in the calling thread alone: many small tensors. Also a decorator."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def for_each(
    items: Iterable[Item], work: Callable[[Item], Result], done: Callable[[Item, Result], None]
) -> None:
    """Call `work(item)` for all items in parallel, and `done(item, result)` here, in order.

    The first exception cancels what has not begun and is raised.
    """
    # More than cores: a thread that waits for the disk, as most do, leaves its core to another.
    workers = min(MAX_WORKERS, 4 * len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = deque((item, pool.submit(work, item)) for item in items)
        try:
            while futures:
                item, future = futures.popleft()
                done(item, future.result())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
