"""The two guarantees of the data plan, over any shards, ranks, workers, layouts and resumes.

A: every sample once an epoch, whatever the number of ranks and workers, across resumes at any step.
B: the same global batches whenever the global batch size is unchanged.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_dist.data import source as source_module
from qwenvl_dist.data.index import RawSample, index_path
from qwenvl_dist.data.plan import Place, RunPlan, StepLayout
from qwenvl_dist.data.source import PlannedSource, SampleLengths, ShardSet
from tests.made_shards import scene_members, write_shards

EPOCHS = 3
SIZES = st.lists(st.one_of(st.just(0), st.just(1), st.integers(0, 12)), min_size=1, max_size=10).filter(any)
LAYOUTS = st.builds(StepLayout, st.integers(1, 17), st.integers(1, 5), st.integers(1, 4))


class NamedShards:
    """Shards without bytes: a sample is its key."""

    keep_open = 4
    is_remote = False

    def expect(self, plan: RunPlan, position: int, share: int) -> None:
        pass

    def release(self) -> None:
        pass

    def __init__(self, sizes: list[int]) -> None:
        self.manifest = SimpleNamespace(shards=[SimpleNamespace(name=f"{i}") for i in range(len(sizes))])

    def read(self, place: Place) -> RawSample:
        return RawSample(f"{place.shard}/{place.sample}", {})


class AnyLengths(SampleLengths):
    """Lengths as if every index had said so."""

    def __init__(self, sizes: list[int], seed: int) -> None:
        super().__init__(NamedShards(sizes), lambda width, height: 1)  # type: ignore[arg-type]
        self.sizes, self.seed = sizes, seed

    def _measure(self, shard: int) -> Any:
        return np.random.default_rng([self.seed, shard]).integers(0, 25, (self.sizes[shard], 2))


@dataclass(frozen=True)
class Data:
    sizes: list[int]
    seed: int
    window: int
    grouped: bool
    budget: int | None = None  # visual tokens of a micro-batch, for which samples must be grouped

    @property
    def plan(self) -> RunPlan:
        return RunPlan(self.sizes, seed=self.seed, window=self.window, epochs=EPOCHS)

    def rank(self, layout: StepLayout, rank: int, workers: int, start: int) -> Iterator[list[str]]:
        """The keys of each micro-batch of a rank, as DataLoader takes them from its workers in turn."""
        plan = self.plan
        lengths = AnyLengths(self.sizes, self.seed) if self.grouped else None
        steps = layout.steps(plan.total_samples - start)
        shards: Any = NamedShards(self.sizes)
        streams = []
        for worker in range(max(1, workers)):
            one = PlannedSource(
                shards, plan, layout, rank, start=start, steps=steps, lengths=lengths, budget=self.budget
            )
            streams.append(groupby(_as_worker(one, worker, workers), lambda sample: sample.slot.micro_batch))
        for number in range(steps * layout.grad_accum_steps):
            found, group = next(streams[number % len(streams)])
            samples = list(group)
            assert found == number and (self.budget or len(samples) == layout.micro_batch_size)
            yield [sample.raw.key for sample in samples if sample.raw is not None]
        assert all(next(stream, None) is None for stream in streams)

    def steps(self, layout: StepLayout, workers: int, start: int) -> list[list[list[str]]]:
        """Micro-batches of each step over all ranks, in the order that decides their dropout."""
        ranks = [list(self.rank(layout, rank, workers, start)) for rank in range(layout.world_size)]
        counts = {len(batches) for batches in ranks}
        assert len(counts) == 1, "ranks run different numbers of micro-batches"
        in_order = [ranks[rank][number] for number in range(counts.pop()) for rank in range(len(ranks))]
        per_step = layout.world_size * layout.grad_accum_steps
        return [in_order[i : i + per_step] for i in range(0, len(in_order), per_step)]


def _as_worker(source: PlannedSource, worker: int, workers: int) -> Iterator[Any]:
    """Iterate as loader worker `worker` of `workers`; 0 is the training process itself."""
    info = SimpleNamespace(id=worker, num_workers=workers) if workers else None
    original = source_module.get_worker_info
    source_module.get_worker_info = lambda: info  # type: ignore[assignment]
    try:
        stream = iter(source)
        first = next(stream, None)  # the generator asks who it is at its first step
    finally:
        source_module.get_worker_info = original
    return iter([] if first is None else _chain(first, stream))


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def keys_of(step: list[list[str]]) -> list[str]:
    return sorted(key for batch in step for key in batch)


DATA = st.one_of(
    st.builds(Data, SIZES, st.integers(0, 2**63 - 1), st.integers(1, 12), st.booleans()),
    st.builds(Data, SIZES, st.integers(0, 2**63 - 1), st.integers(1, 12), st.just(True), st.integers(5, 200)),
)


@given(data=DATA, layout=LAYOUTS, workers=st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_every_step_takes_its_stretch_of_the_plan(data: Data, layout: StepLayout, workers: int) -> None:
    line = [
        f"{place.shard}/{place.sample}" for place in data.plan.locate(0, sum(data.sizes) * EPOCHS) if place
    ]
    size = layout.global_batch_size
    steps = data.steps(layout, workers, 0)
    assert len(steps) == -(-len(line) // size)
    for number, step in enumerate(steps):
        assert keys_of(step) == sorted(line[number * size : (number + 1) * size])


@given(data=DATA, chain=st.lists(st.tuples(LAYOUTS, st.integers(0, 5), st.integers(0, 6)), max_size=5))
@settings(max_examples=100, deadline=None)
def test_resumes_in_other_worlds_visit_every_sample_once_an_epoch(
    data: Data, chain: list[tuple[StepLayout, int, int]]
) -> None:
    total = sum(data.sizes) * EPOCHS
    seen: list[str] = []
    consumed = 0
    for layout, workers, wanted in [*chain, (StepLayout(1, 1, 1), 0, total)]:
        steps = data.steps(layout, workers, consumed)[:wanted]
        seen += [key for step in steps for key in keys_of(step)]
        consumed = min(total, consumed + len(steps) * layout.global_batch_size)
        assert len(seen) == consumed
    names = [f"{shard}/{i}" for shard, size in enumerate(data.sizes) for i in range(size)]
    assert sorted(seen) == sorted(names * EPOCHS)
    if not chain:
        return
    for epoch in range(
        EPOCHS
    ):  # the steps that cross an epoch's edge mix two epochs; inside it each comes once
        inner = seen[epoch * len(names) : (epoch + 1) * len(names)]
        slack = max(layout.global_batch_size for layout, _, _ in chain)
        assert len(inner) - len(set(inner)) <= slack


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("at", ["start", "last step", "epoch edge", "straight after a restore"])
def test_resumes_at_the_edges(at: str, grouped: bool) -> None:
    data = Data([7, 0, 1, 13, 3], 5, 2, grouped)  # 24 samples an epoch
    size = 12
    first = StepLayout(4, 3, 1)
    straight = data.steps(first, 2, 0)
    stops = {"start": [0], "last step": [60], "epoch edge": [24], "straight after a restore": [36, 36]}[at]
    seen = straight[: stops[0] // size]
    for world in (3, 6, 1):
        layout = StepLayout(world, 12 // world if world != 6 else 2, 1)
        assert layout.global_batch_size == size
        for stop in stops:
            rest = data.steps(layout, 1, stop)
            assert [keys_of(step) for step in rest] == [keys_of(step) for step in straight[stop // size :]]
    assert [keys_of(step) for step in seen + straight[stops[0] // size :]] == [keys_of(s) for s in straight]


@given(
    data=DATA,
    micro=st.integers(1, 4),
    splits=st.lists(
        st.sampled_from([(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)]), min_size=2, max_size=4
    ),
    stops=st.lists(st.integers(0, 4), min_size=4, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_the_same_global_batch_size_has_the_same_micro_batches_in_any_world(
    data: Data, micro: int, splits: list[tuple[int, int]], stops: list[int]
) -> None:
    straight = data.steps(StepLayout(12, micro, 1), 0, 0)
    run: list[list[list[str]]] = []
    for (world, accumulation), wanted in zip([*splits, (1, 12)], [*stops[: len(splits)], 10**6], strict=True):
        layout = StepLayout(world, micro, accumulation)
        run += data.steps(layout, world % 3, len(run) * layout.global_batch_size)[:wanted]
    assert run == straight


def test_chained_resumes_over_4_3_5_and_1_ranks() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        data = Data([int(size) for size in rng.integers(0, 9, 8)] + [1], int(rng.integers(1000)), 3, True)
        total, consumed = sum(data.sizes) * EPOCHS, 0
        seen: list[str] = []
        for world in (4, 3, 5, 1):
            steps = data.steps(StepLayout(world, 2, 2), world - 1, consumed)
            taken = steps if world == 1 else steps[: int(rng.integers(0, 5))]
            seen += [key for step in taken for key in keys_of(step)]
            consumed = min(total, consumed + len(taken) * 4 * world)
        line = [f"{p.shard}/{p.sample}" for p in data.plan.locate(0, total) if p]
        assert sorted(seen) == sorted(line)
        assert all(seen.count(key) == EPOCHS for key in line)


def test_every_slot_carries_its_position_and_steps_hold_what_the_plan_says() -> None:
    data = Data([7, 0, 1, 13, 3], 5, 2, True)
    layout = StepLayout(2, 3, 2)
    shards: Any = NamedShards(data.sizes)
    lengths = AnyLengths(data.sizes, 1)
    positions = [
        [
            s.slot.position
            for s in PlannedSource(shards, data.plan, layout, rank, 12, steps=6, lengths=lengths)
        ]
        for rank in range(2)
    ]
    for step in range(6):
        held = [p for rank in positions for p in rank[step * 6 : step * 6 + 6]]
        assert sorted(held) == list(range(12 + step * 12, 24 + step * 12))


def test_an_index_that_cannot_be_read_moves_nothing_out_of_its_step(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", [[scene_members(n)] * 4 for n in range(3)])
    index_path(folder / "shard-000001.tar").unlink()
    shards = ShardSet(folder)
    plan = RunPlan(shards.manifest.shard_sizes, seed=0, window=2)
    lengths = SampleLengths(shards, lambda width, height: width * height)
    samples = list(PlannedSource(shards, plan, StepLayout(1, 3, 2), 0, start=0, steps=2, lengths=lengths))
    assert sorted(sample.slot.position for sample in samples[:6]) == list(range(6))
    assert sum(sample.bad is not None for sample in samples) == 4
    assert all(sample.bad.shard == "shard-000001.tar" for sample in samples if sample.bad)


def test_grouping_by_length_puts_alike_samples_together() -> None:
    data = Data([40, 40, 40], 1, 2, True)
    lengths = AnyLengths(data.sizes, data.seed)
    spread = {}
    for grouped in (False, True):
        steps = Data(data.sizes, data.seed, data.window, grouped).steps(StepLayout(2, 4, 3), 2, 0)
        pairs = [[tuple(map(int, key.split("/"))) for key in batch] for step in steps for batch in step]
        values = [[int(lengths._measure(shard)[sample].sum()) for shard, sample in batch] for batch in pairs]
        spread[grouped] = np.mean([max(batch) - min(batch) for batch in values if batch])
    assert spread[True] < spread[False] / 2
