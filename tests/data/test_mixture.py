"""Several data sets in one line of positions."""

import hashlib
import pickle
import time
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_dist.config import DataConfig, SourceConfig
from qwenvl_dist.data.cache import ShardCache
from qwenvl_dist.data.joined import JoinedShards
from qwenvl_dist.data.mixture import Interleave, MixturePlan, Source, make_plan, samples_per_epoch
from qwenvl_dist.data.plan import Place, RunPlan, StepLayout
from qwenvl_dist.data.source import PlannedSource, SampleLengths, Shards, ShardSet
from qwenvl_dist.errors import UserError
from tests.http_server import FileServer

COUNTS = st.lists(st.one_of(st.integers(1, 60), st.sampled_from([6, 12, 60])), min_size=1, max_size=6)


def whole_order(counts: list[int]) -> list[tuple[int, int]]:
    """The definition, spelled out: all samples by their time, the earlier source first."""
    line = [(Fraction(2 * k + 1, 2 * c), source, k) for source, c in enumerate(counts) for k in range(c)]
    return [(source, k) for _, source, k in sorted(line)]


@settings(deadline=None)
@given(COUNTS)
def test_each_place_has_the_sample_whose_time_it_is(counts: list[int]) -> None:
    interleave = Interleave(counts)
    found = interleave.locate(np.arange(sum(counts)))
    assert list(zip(*(column.tolist() for column in found), strict=True)) == whole_order(counts)
    before = interleave.before(np.arange(sum(counts) + 1))
    assert before[:, -1].tolist() == counts and (np.diff(before, axis=1) >= 0).all()


@settings(deadline=None)
@given(COUNTS)
def test_any_prefix_of_an_epoch_holds_its_share_of_each_source(counts: list[int]) -> None:
    total = sum(counts)
    offsets = np.arange(total + 1)
    off = np.abs(Interleave(counts).before(offsets) - np.outer(counts, offsets) / total).max(axis=1)
    share = np.array(counts) / total
    assert (off <= 0.5 + np.maximum(share * (len(counts) - 2) / 2, 0) + 1e-9).all()
    if len(counts) < 4:
        assert (off < 1).all()


def test_a_source_that_is_nearly_all_of_an_epoch_leaves_the_others_their_places() -> None:
    sources, _ = Interleave([9_999, 3]).locate(np.arange(10_002))
    assert np.flatnonzero(sources == 1).tolist() == [1667, 5001, 8335]


def mixture_of(sizes: dict[str, list[int]], counts: list[int], epochs: int = 1, seed: int = 7) -> MixturePlan:
    sources = [Source(name, np.array(s), c) for (name, s), c in zip(sizes.items(), counts, strict=True)]
    return MixturePlan(sources, seed=seed, window=2, epochs=epochs)


SIZES = {"boxes": [5, 0, 9, 3], "captions": [13, 4], "pages": [2]}


def places(plan: MixturePlan, positions: np.ndarray) -> list[tuple[int, int]]:
    shards, samples = plan.find(positions)
    return list(zip(shards.tolist(), samples.tolist(), strict=True))


@pytest.mark.parametrize("counts", [[17, 17, 2], [34, 8, 5], [5, 40, 1]])
def test_every_pass_over_a_source_names_each_sample_once(counts: list[int]) -> None:
    epochs = 5
    plan = mixture_of(SIZES, counts, epochs)
    line = places(plan, np.arange(plan.total_samples + 3))
    assert line[plan.total_samples :] == [(-1, -1)] * 3
    first = 0
    for (_, sizes), count in zip(SIZES.items(), counts, strict=True):
        own = [place for place in line if first <= place[0] < first + len(sizes)]
        first += len(sizes)
        size = sum(sizes)
        assert len(own) == count * epochs
        for start in range(0, len(own), size):
            one_pass = own[start : start + size]
            assert len(set(one_pass)) == len(one_pass)
        assert max(Counter(own).values()) == -(-len(own) // size)
    for epoch in range(epochs):  # each epoch of the run takes the same number of each
        stretch = line[epoch * sum(counts) : (epoch + 1) * sum(counts)]
        assert sum(shard == 6 for shard, _ in stretch) == counts[2]


def test_any_position_can_be_the_first() -> None:
    plan = mixture_of(SIZES, [17, 30, 3], epochs=4)
    line = places(plan, np.arange(plan.total_samples))
    for start in (0, 1, 49, 50, 51, 123, 199):
        fresh = mixture_of(SIZES, [17, 30, 3], epochs=4)
        assert places(fresh, np.arange(start, plan.total_samples)) == line[start:]
        done = Counter(int(np.searchsorted([4, 6], shard, side="right")) for shard, _ in line[:start])
        assert fresh.own_positions(start) == [done[0], done[1], done[2]]
    backwards = np.arange(plan.total_samples)[::-1]
    assert places(plan, backwards) == line[::-1]


def test_progress_counts_each_sources_own_passes() -> None:
    plan = mixture_of(SIZES, [17, 34, 1], epochs=2)
    end = {name: (p.samples, p.passes) for name, p in plan.progress(plan.total_samples).items()}
    assert end == {"boxes": (34, 2.0), "captions": (68, 4.0), "pages": (2, 1.0)}


def test_a_sources_order_does_not_depend_on_the_others_and_the_seed_changes_it() -> None:
    def own(plan: MixturePlan, first: int, count: int) -> list[tuple[int, int]]:
        line = places(plan, np.arange(plan.total_samples))
        return [(shard - first, sample) for shard, sample in line if first <= shard < first + count]

    alone = own(mixture_of({"captions": [13, 4]}, [17], epochs=2), 0, 2)
    assert own(mixture_of(SIZES, [17, 17, 2], epochs=2), 4, 2) == alone
    assert own(mixture_of({"other": [13, 4]}, [17], epochs=2), 0, 2) != alone
    assert own(mixture_of({"captions": [13, 4]}, [17], epochs=2, seed=8), 0, 2) != alone


def test_the_order_of_a_mixture_is_pinned() -> None:
    """Another order would make the positions of existing checkpoints mean other samples: raise PLAN_VERSION then."""
    plan = mixture_of(SIZES, [17, 30, 3], epochs=2)
    assert places(plan, np.arange(8)) == [(4, 2), (2, 6), (4, 4), (4, 6), (2, 8), (4, 3), (2, 4), (4, 7)]
    assert places(plan, np.arange(50, 54)) == [(4, 9), (2, 4), (5, 1), (4, 3)]


def test_a_billion_samples_are_found_as_fast_as_a_hundred() -> None:
    sizes = np.full(10_000, 10_000)
    counts = [1 << 30, (1 << 30) - 1, 12_345_679, 3]
    sources = [Source(f"s{i}", sizes, count) for i, count in enumerate(counts)]
    plan = MixturePlan(sources, seed=0, window=64, epochs=3)
    for start in (0, 1, 1 << 30, plan.samples_per_epoch - 500, plan.total_samples - 1024):
        before = np.array(plan.own_positions(start))
        began = time.perf_counter()
        shards, _ = plan.find(np.arange(start, start + 1024))
        assert time.perf_counter() - began < 1  # 0.04 s where it was written
        taken = np.bincount(shards // 10_000, minlength=4)
        assert (before + taken).tolist() == plan.own_positions(start + 1024)


def data_of(**entries: dict) -> DataConfig:
    return DataConfig(mixture=tuple(SourceConfig(name=n, train=n, **says) for n, says in entries.items()))


def test_epochs_count_passes_and_weights_share_out_what_all_sets_hold() -> None:
    by_passes = data_of(b={"epochs": 0.5}, a={"epochs": 2})
    assert samples_per_epoch(by_passes, [40, 25]) == [80, 13]  # a, then b: by name
    by_weight = data_of(a={"weight": 3}, b={"weight": 1.0})
    assert samples_per_epoch(by_weight, [40, 20]) == [45, 15]


@pytest.mark.parametrize(
    ("says", "samples", "message"),
    [
        (
            {"epochs": 0.01},
            40,
            "data.mixture a: epochs = 0.01 of 40 samples is less than one sample in an epoch; raise",
        ),
        ({"epochs": 100.0}, 1 << 30, "more than 1,073,741,824 samples in an epoch; lower it"),
        ({"epochs": 1}, 0, "data.mixture a = a: holds no samples; pack some first"),
    ],
)
def test_a_part_that_cannot_be_is_one_line(says: dict, samples: int, message: str) -> None:
    with pytest.raises(UserError) as error:
        samples_per_epoch(data_of(a=says), [samples])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_set_that_stands_alone_keeps_its_order() -> None:
    data = DataConfig(train="shards", seed=5, shuffle_window=2)
    sizes = np.array([5, 9, 3])
    made, plain = make_plan(data, [sizes], [17], epochs=2), RunPlan(sizes, seed=5, window=2, epochs=2)
    for found, wanted in zip(made.find(np.arange(40)), plain.find(np.arange(40)), strict=True):
        assert found.tolist() == wanted.tolist()


def read_all(shards: Shards, plan: MixturePlan, grouped: bool) -> list[str]:
    layout = StepLayout(2, 3, 1)
    lengths = SampleLengths(shards, lambda width, height: width * height // 784) if grouped else None
    keys = []
    for rank in range(2):
        source = PlannedSource(shards, plan, layout, rank, 0, layout.steps(plan.total_samples), lengths)
        keys += [sample.raw.key for sample in source if sample.raw is not None]
    return sorted(keys)


@pytest.mark.parametrize("grouped", [False, True])
def test_joined_shards_are_read_through_the_cache_as_without_it(
    scene_shards: Path, scene_validation_shards: Path, tmp_path: Path, grouped: bool
) -> None:
    def joined(cache: ShardCache | None) -> JoinedShards:
        places = {"held-out": scene_validation_shards, "scenes": scene_shards}
        return JoinedShards({name: ShardSet(place, cache) for name, place in places.items()})

    cache = ShardCache(tmp_path / "cache", 1 << 30)
    cache.prepare()
    plain, cached = joined(None), joined(cache)
    sources = [
        Source(name, part.manifest.shard_sizes, count)
        for name, part, count in zip(plain.names, plain.parts, (30, 40), strict=True)
    ]
    plan = MixturePlan(sources, seed=0, window=1, epochs=2)
    keys = read_all(plain, plan, grouped)
    assert read_all(pickle.loads(pickle.dumps(cached)), plan, grouped) == keys
    copied = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "cache").glob("*.shard")}
    assert copied == {sha256 for e in plain.manifest.shards for sha256 in (e.sha256, e.index_sha256)}
    counts = Counter(keys)
    assert len(counts) == 52 and sum(counts.values()) == 140
    assert {counts[key] for key in counts if key.startswith("scenes/")} == {2}
    assert {counts[key] for key in counts if key.startswith("held-out/")} == {5}


def test_each_set_keeps_its_own_two_windows_in_the_cache(
    scene_shards: Path, scene_validation_shards: Path, tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path / "cache", 1 << 30)
    cache.prepare()
    with FileServer(scene_shards) as server:
        sets = {"far": ShardSet(server.url, cache), "near": ShardSet(scene_validation_shards, cache)}
        joined = JoinedShards(sets)
        sources = [
            Source(name, part.manifest.shard_sizes, count)
            for (name, part), count in zip(sets.items(), (40, 30), strict=True)
        ]
        plan = MixturePlan(sources, seed=1, window=1, epochs=2)
        seen: dict[str, set[frozenset[int]]] = {name: set() for name in sets}
        for position in range(0, plan.total_samples, 5):
            joined.expect(plan, position, share=0)
            parts = zip(sets.items(), plan.parts_at(position), strict=True)
            for (name, part), (own, place) in parts:
                now, then = own.shards_ahead(*own.window(place))
                wanted = {*now, *then}
                wait_until(lambda part=part, wanted=wanted: pinned(part) == wanted)
                seen[name].add(frozenset(wanted))
        assert len(seen["far"]) > 2 and set().union(*seen["far"]) == {0, 1, 2, 3}
        assert set().union(*seen["near"]) == {0, 1}
        assert all(count == 1 for name, count in server.counts().items() if name != "manifest.json")
        joined.release()
        assert pinned(sets["far"]) == pinned(sets["near"]) == set()


def pinned(shards: ShardSet) -> set[int]:
    return {shard for shard, file in shards._cached.items() if file._pinned is not None}


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_which_caption_a_pass_draws_does_not_depend_on_the_other_sets() -> None:
    def drawn(plan: MixturePlan, first: int) -> dict[tuple[int, int], list[int]]:
        turns: dict[tuple[int, int], list[int]] = {}
        for position, (shard, sample) in enumerate(places(plan, np.arange(plan.total_samples))):
            if first <= shard < first + 2:
                turn = plan.draw(position, Place(shard, sample), 5)
                turns.setdefault((shard - first, sample), []).append(turn)
        return turns

    alone = drawn(mixture_of({"captions": [13, 4]}, [17], epochs=6), 0)
    assert {len(turns) for turns in alone.values()} == {6}
    assert drawn(mixture_of(SIZES, [17, 51, 3], epochs=2), 4) == alone
    assert drawn(mixture_of(SIZES, [40, 17, 1], epochs=6), 4) == alone


def test_each_sample_takes_each_of_its_captions_once_before_any_again() -> None:
    plan = mixture_of({"a": [5], "b": [4, 0, 3]}, [10, 7], epochs=9)
    drawn: dict[Place, list[int]] = {}
    for position, (shard, sample) in enumerate(zip(*plan.find(np.arange(plan.total_samples)), strict=True)):
        place = Place(int(shard), int(sample))
        drawn.setdefault(place, []).append(plan.draw(position, place, 3))
    assert {place.shard: len(turns) for place, turns in drawn.items()} == {0: 18, 1: 9, 3: 9}
    for turns in drawn.values():
        assert all(sorted(turns[i : i + 3]) == [0, 1, 2] for i in range(0, len(turns), 3))
    assert len({tuple(turns[:9]) for turns in drawn.values()}) > 6  # in an order of its own
