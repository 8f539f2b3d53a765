"""Checks of the links between ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from statistics import median
from typing import Any

from qwenvl_dist.preflight.checks import Context, Verdict, ok, warn

KIB, MIB = 1 << 10, 1 << 20
MAX_ROUNDS = 15  # in each every node talks to one other
TRIES = 5
PROBE_BYTES = 256 * KIB
MAX_BYTES = 32 * MIB
SECONDS = 0.2  # that a measurement should take
SLOW_SHARE = 0.5  # of the median link
GIGABIT = 100e6  # bytes a second that Gigabit Ethernet gives


@dataclass(frozen=True)
class Link:
    """What two ranks measured between them, the worse of both views."""

    ranks: tuple[int, int]
    latency: float  # seconds of an all-reduce of 8 bytes
    all_reduce: float  # bytes a second, of a large one
    all_gather: float

    @property
    def rate(self) -> float:
        """Return the slower of both, bytes a second."""
        return min(self.all_reduce, self.all_gather)


def links(context: Context) -> Verdict:
    """All-reduce and all-gather go at about the same rate between all pairs of nodes, or of ranks on one node."""
    if context.host.world_size == 1:
        return ok("one rank, no links")
    several = len(context.nodes) > 1
    ends = [ranks[0] for ranks in context.nodes] if several else list(range(context.host.world_size))
    rounds = pairings(ends)[:MAX_ROUNDS]
    mine = []
    for pairs in rounds:
        for pair in pairs:
            if context.host.rank in pair:
                mine.append(_measure(pair, context))
    views: dict[tuple[int, int], list[Link]] = {}
    for link in (link for part in context.host.gather(mine) for link in part):
        views.setdefault(link.ranks, []).append(link)
    found = [
        Link(
            ranks,
            max(link.latency for link in both),
            min(link.all_reduce for link in both),
            min(link.all_gather for link in both),
        )
        for ranks, both in views.items()
    ]
    return _judge(context, found, "nodes" if several else "ranks")


def _judge(context: Context, links: Sequence[Link], ends: str) -> Verdict:
    rates = [link.rate for link in links]
    slowest = min(links, key=lambda link: link.rate)
    latency = max(link.latency for link in links)
    typical = median(rates)
    shown = (
        f"{len(links)} links between {ends}: median {typical / 1e6:.0f} MB/s, all-reduce of 8 bytes at most "
        f"{latency * 1e3:.2f} ms"
    )
    gathered = context.plan.recipes.gathered_bytes
    if gathered:
        seconds = gathered / slowest.rate
        shown += (
            f"; ZeRO-3 gathers {gathered / (1 << 30):.2f} GiB a micro-batch, {seconds:.1f} s over the slowest"
        )
    if slowest.rate < SLOW_SHARE * typical or (ends == "nodes" and slowest.rate < GIGABIT):
        first, second = slowest.ranks
        return warn(
            f"the link between {context.named([first])} and {context.named([second])} is slow: all-reduce "
            f"{slowest.all_reduce / 1e6:.1f}, all-gather {slowest.all_gather / 1e6:.1f} MB/s; {shown}",
            "look at its cable, switch or route; name the fast network in QWENVL_INTERFACE (NCCL_SOCKET_IFNAME), and "
            "read NCCL_DEBUG=INFO for the transport in use",
        )
    return ok(shown)


def pairings(ends: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Return rounds of disjoint pairs in which each meets each other once: a round-robin tournament."""
    seats: list[int | None] = [*ends, *([None] if len(ends) % 2 else [])]
    rounds = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def _measure(pair: tuple[int, int], context: Context) -> Link:
    import torch
    import torch.distributed as dist

    assert context.accelerator is not None, "collectives need the ranks joined"
    device = context.accelerator.device
    timeout = timedelta(seconds=context.recipe.train.timeout_seconds)
    group: Any = dist.new_group(list(pair), timeout=timeout, use_local_synchronization=True)

    def seconds(work: Callable[[], object]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    small = torch.zeros(1, dtype=torch.float64, device=device)
    seconds(lambda: dist.all_reduce(small, group=group))  # connects
    latency = median(seconds(lambda: dist.all_reduce(small, group=group)) for _ in range(TRIES))

    def rate(make: Callable[[int], Callable[[], object]]) -> float:
        first = make(PROBE_BYTES)
        probe = torch.tensor(seconds(first), dtype=torch.float64, device=device)
        dist.all_reduce(probe, dist.ReduceOp.MAX, group=group)  # both must choose one size
        size = int(min(MAX_BYTES, max(PROBE_BYTES, PROBE_BYTES * SECONDS / probe.item())))
        work = make(size)
        work()
        return size / min(seconds(work) for _ in range(2))

    def reduce_of(size: int) -> Callable[[], object]:
        tensor = torch.zeros(size // 4, device=device)
        return lambda: dist.all_reduce(tensor, group=group)

    def gather_of(size: int) -> Callable[[], object]:
        own = torch.zeros(size // 4, device=device)
        both = [torch.empty_like(own) for _ in pair]
        return lambda: dist.all_gather(both, own, group=group)

    link = Link(pair, latency, rate(reduce_of), rate(gather_of))
    dist.destroy_process_group(group)
    return link
