from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_dist.data.plan import (
    PLAN_VERSION,
    EpochOrder,
    Place,
    RunPlan,
    StepLayout,
    deal_by_budget,
    deal_by_length,
    hash_key,
    permute,
    positions_digest,
)

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
KEYS = st.integers(0, MASK)
SHARD_SIZES = st.lists(st.one_of(st.just(0), st.integers(0, 9)), max_size=12)


def permutation(size: int, key: int) -> list[int]:
    return permute(np.arange(size), np.full(size, size), np.full(size, key, np.uint64)).tolist()


def order(sizes: list[int], **options: int) -> list[tuple[int, int, int]]:
    plan = RunPlan(sizes, **options)
    places = plan.locate(0, plan.total_samples)
    return [
        (position // plan.samples_per_epoch, place.shard, place.sample)
        for position, place in enumerate(places)
        if place is not None
    ]


# --- the arithmetic, written a second time with Python's own integers ---


def mix(value: int) -> int:
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def permute_one(offset: int, size: int, key: int) -> int:
    if size <= 1:
        return offset
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = offset >> half, offset & low
        for number in range(6):
            left, right = right, left ^ mix(right + key + number * GOLDEN & MASK) & low
        offset = left << half | right
        if offset < size:
            return offset


# --- golden values: an order, once trained on, never changes under the same PLAN_VERSION ---


def test_version_belongs_to_these_golden_values() -> None:
    assert PLAN_VERSION == 1


def test_hash_is_pinned() -> None:
    # The first is SplitMix64's first output from seed 0.
    assert hash_key(0) == 0xE220A8397B1DCDAF
    assert hash_key(1) == 0x6E789E6AA1B965F4
    assert hash_key(0, 0, 1) == 0xF89A2566B5822C54
    assert hash_key(7, 3, 2) == 0x318D90E11817E54D


def test_permutation_is_pinned() -> None:
    assert permutation(2, 0) == [0, 1]
    assert permutation(3, 1) == [1, 2, 0]
    assert permutation(7, 2) == [2, 1, 4, 6, 0, 5, 3]
    assert permutation(10, 3) == [5, 6, 9, 1, 2, 7, 8, 0, 3, 4]
    assert permutation(17, MASK) == [8, 9, 7, 5, 2, 0, 15, 10, 1, 3, 12, 4, 14, 13, 11, 6, 16]
    big = 2**40 + 7
    images = permute(np.array([0, 1, 2, big - 1]), np.full(4, big), np.full(4, 5, np.uint64))
    assert images.tolist() == [354754915381, 655886435646, 447770606564, 635865031228]


def test_order_of_an_epoch_is_pinned() -> None:
    assert [pair[1:] for pair in order([7, 1, 13, 0, 5], seed=0, window=2)] == [
        (1, 0), (0, 3), (0, 2), (0, 1), (4, 2), (4, 3), (4, 0), (0, 6), (0, 4), (4, 4), (0, 0), (4, 1), (0, 5),
        (2, 6), (2, 9), (2, 4), (2, 1), (2, 3), (2, 10), (2, 0), (2, 7), (2, 11), (2, 8), (2, 12), (2, 5), (2, 2),
    ]  # fmt: skip
    assert order([3, 2, 4], seed=5, window=64, epochs=2) == [
        (0, 2, 3), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 2), (0, 2, 1), (0, 0, 1), (0, 0, 0), (0, 0, 2),
        (1, 0, 0), (1, 1, 1), (1, 1, 0), (1, 2, 2), (1, 2, 3), (1, 0, 2), (1, 0, 1), (1, 2, 0), (1, 2, 1),
    ]  # fmt: skip


# --- the permutation ---


@given(size=st.integers(0, 2000), key=KEYS)
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permutation(size, key)) == list(range(size))


@given(size=st.integers(1, 2**62), key=KEYS, data=st.data())
def test_permutation_of_a_huge_range_stays_inside_and_never_meets_itself(
    size: int, key: int, data: st.DataObject
) -> None:
    offsets = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=50, unique=True))
    count = len(offsets)
    images = permute(np.array(offsets), np.full(count, size), np.full(count, key, np.uint64)).tolist()
    assert all(0 <= image < size for image in images) and len(set(images)) == count
    assert images == [permute_one(offset, size, key) for offset in offsets]


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 16, 17, 64, 65, 4096, 4097])
def test_permutation_around_powers_of_two_is_a_bijection(size: int) -> None:
    for key in (0, 1, MASK):
        assert sorted(permutation(size, key)) == list(range(size))


def test_offsets_of_different_sizes_are_permuted_side_by_side() -> None:
    sizes = np.array([1, 5, 5, 1000, 2**50, 2])
    offsets = np.array([0, 3, 4, 999, 12345678901, 1])
    keys = np.array([9, 8, 8, 7, 6, 5], np.uint64)
    expected = [
        permute_one(*triple) for triple in zip(offsets.tolist(), sizes.tolist(), keys.tolist(), strict=True)
    ]
    assert permute(offsets, sizes, keys).tolist() == expected


@pytest.mark.parametrize(("size", "orders"), [(2, 2), (3, 6), (4, 24)])
def test_keys_reach_every_order_about_equally_often(size: int, orders: int) -> None:
    tries = 300 * orders
    keys = np.array([hash_key(9, number) for number in range(tries)], np.uint64)
    images = permute(np.tile(np.arange(size), tries), np.full(size * tries, size), np.repeat(keys, size))
    _, counts = np.unique(images.reshape(tries, size), axis=0, return_counts=True)
    assert len(counts) == orders and counts.min() > 200 and counts.max() < 400


# --- epochs ---


@given(sizes=SHARD_SIZES, seed=st.integers(0, 2**63 - 1), window=st.integers(1, 15), shuffle=st.booleans())
def test_every_epoch_visits_every_sample_exactly_once(
    sizes: list[int], seed: int, window: int, shuffle: bool
) -> None:
    epochs = 3
    visited = order(sizes, seed=seed, window=window, epochs=epochs, shuffle=shuffle)
    samples = [(shard, number) for shard, size in enumerate(sizes) for number in range(size)]
    for epoch in range(epochs):
        here = visited[epoch * len(samples) : (epoch + 1) * len(samples)]
        assert {place[0] for place in here} <= {epoch}
        assert sorted(place[1:] for place in here) == samples


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    sizes = [20, 20, 20, 20]
    first, second = (order(sizes, seed=0, window=2, epochs=2)[half * 80 : half * 80 + 80] for half in (0, 1))
    other = order(sizes, seed=1, window=2)
    bare = [[place[1:] for place in places] for places in (first, second, other)]
    assert bare[0] != bare[1] and bare[0] != bare[2] and bare[1] != bare[2]
    shard_orders = {
        tuple(dict.fromkeys(place[1] for place in order(sizes, seed=seed, window=1))) for seed in range(50)
    }
    assert len(shard_orders) > 15  # of 24


def test_without_shuffle_samples_come_as_they_lie() -> None:
    places = order([2, 0, 3], seed=7, window=1, epochs=2, shuffle=False)
    assert places == [(e, s, i) for e in (0, 1) for s, i in ((0, 0), (0, 1), (2, 0), (2, 1), (2, 2))]


@given(sizes=SHARD_SIZES, seed=st.integers(0, 1000), window=st.integers(1, 15))
def test_samples_stay_inside_their_window_of_shards(sizes: list[int], seed: int, window: int) -> None:
    visited = order(sizes, seed=seed, window=window)
    windows: list[set[int]] = []
    start = 0
    # A window's samples lie side by side, from at most `window` shards that no other window has.
    while start < len(visited):
        shards, end = {visited[start][1]}, start + 1
        while end < len(visited) and end - start < sum(sizes[shard] for shard in shards):
            shards.add(visited[end][1])
            end += 1
        assert end - start == sum(sizes[shard] for shard in shards)
        windows.append(shards)
        start = end
    assert all(len(shards) <= window for shards in windows)
    assert len(set().union(*windows)) == sum(map(len, windows))


def test_samples_of_a_window_are_mixed_across_its_shards() -> None:
    shards = [place[1] for place in order([50, 50, 50, 50], seed=3, window=4)]
    first_half = np.bincount(shards[:100], minlength=4)
    assert first_half.min() > 12 and first_half.max() < 38


def test_a_far_position_is_found_without_walking_there() -> None:
    sizes = np.full(20_000, 1000)
    plan = RunPlan(sizes, seed=0, window=64, epochs=1000)
    [place] = plan.locate(plan.total_samples - 1, 1)
    shards, samples = EpochOrder(sizes, 0, 999, 64).locate(np.array([sizes.sum() - 1]))
    assert place == Place(shards[0], samples[0])


@given(sizes=SHARD_SIZES, positions=st.lists(st.integers(0, 90), max_size=40), seed=st.integers(0, 5))
def test_positions_are_found_in_any_order_and_number(
    sizes: list[int], positions: list[int], seed: int
) -> None:
    plan = RunPlan(sizes, seed=seed, window=3, epochs=3)
    line = [(p.shard, p.sample) if p else (-1, -1) for p in plan.locate(0, 91)]
    shards, samples = plan.find(np.array(positions, np.int64))
    assert list(zip(shards.tolist(), samples.tolist(), strict=True)) == [line[p] for p in positions]


def test_dealing_by_length_is_a_permutation_of_each_step_and_keeps_ties_in_order() -> None:
    lengths = np.array([[3, 1, 2, 1], [0, 0, 0, 0], [1, 2, 3, 4]])
    assert deal_by_length(lengths).tolist() == [[1, 3, 2, 0], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_an_empty_data_set_has_no_places() -> None:
    for sizes in ([], [0, 0]):
        plan = RunPlan(sizes, seed=0, window=4, epochs=3)
        assert plan.total_samples == 0 and plan.locate(0, 2) == [None, None]


@given(sizes=SHARD_SIZES, start=st.integers(0, 60), count=st.integers(0, 60))
def test_a_stretch_is_a_slice_of_the_whole_line_and_none_after_its_end(
    sizes: list[int], start: int, count: int
) -> None:
    plan = RunPlan(sizes, seed=4, window=3, epochs=2)
    line = plan.locate(0, plan.total_samples)
    assert None not in line
    assert plan.locate(start, count) == (line + [None] * 200)[start : start + count]


def test_an_epoch_order_may_be_asked_out_of_turn() -> None:
    offsets = np.arange(26)
    one = EpochOrder([7, 1, 13, 0, 5], 3, 1, 2)
    shards, samples = one.locate(offsets)
    backwards = [one.locate(offsets[i : i + 1]) for i in reversed(range(26))]
    assert [(int(s[0]), int(i[0])) for s, i in reversed(backwards)] == list(zip(shards, samples, strict=True))


# --- ranks, micro-batches, accumulation ---


@given(
    samples=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 80)), min_size=1, max_size=60),
    micro_batches=st.integers(1, 12),
    share=st.integers(1, 400),
)
@settings(max_examples=300, deadline=None)
def test_no_micro_batch_is_above_its_budget(
    samples: list[tuple[int, int]], micro_batches: int, share: int
) -> None:
    samples = samples * micro_batches  # equal counts are possible
    visual, text = np.array(samples).T
    budget = share * len(samples) // micro_batches
    deal = deal_by_budget(visual, text, micro_batches, budget)
    assert sorted(np.concatenate(deal.micro_batches).tolist()) == list(range(len(samples)))
    assert len(deal.micro_batches) == micro_batches and all(len(dealt) for dealt in deal.micro_batches)
    shrunk = visual if deal.limit is None else np.minimum(visual, deal.limit)
    assert max(shrunk[dealt].sum() for dealt in deal.micro_batches) <= budget
    assert deal.limit is None or deal.limit >= share, "an equal share each always fits"


def test_many_small_samples_or_few_large_ones_go_together() -> None:
    visual, text = np.array([1280] * 4 + [64] * 28), np.full(32, 20)
    deal = deal_by_budget(visual, text, 8, 2560)
    assert deal.limit is None
    large = [dealt for dealt in deal.micro_batches if visual[dealt].max() == 1280]
    assert sorted(map(len, large)) == [1, 1, 1, 1], (
        "one each: padding included, no deal has a smaller largest one"
    )
    areas = [len(dealt) * (visual + text)[dealt].max() for dealt in deal.micro_batches]
    assert max(areas) == 1300
    by_length = deal_by_length((visual + text)[None])[0].reshape(8, 4)
    assert max(4 * (visual + text)[dealt].max() for dealt in by_length) == 5200


def test_pictures_shrink_as_little_as_the_budget_demands() -> None:
    visual, text = np.array([900, 900, 900, 900, 100, 100]), np.zeros(6, np.int64)
    assert deal_by_budget(visual, text, 3, 1800).limit is None
    deal = deal_by_budget(visual, text, 3, 1100)
    assert deal.limit == 550, "two large ones in one of three"
    assert [visual[dealt].clip(max=550).sum() <= 1100 for dealt in deal.micro_batches] == [True] * 3


LAYOUTS = [StepLayout(*numbers) for numbers in product(range(1, 6), range(1, 5), range(1, 5))]


def positions(layout: StepLayout, step_start: int, rank: int, accumulation: int) -> list[int]:
    """What PlannedSource reads for one micro-batch."""
    first = step_start + layout.micro_batch(rank, accumulation) * layout.micro_batch_size
    return list(range(first, first + layout.micro_batch_size))


def micro_batches(layout: StepLayout, step_start: int) -> list[list[int]]:
    """The micro-batches of a step, in the order of accumulation, then rank."""
    return [
        positions(layout, step_start, rank, accumulation)
        for accumulation in range(layout.grad_accum_steps)
        for rank in range(layout.world_size)
    ]


@pytest.mark.parametrize(
    "layout", LAYOUTS, ids=lambda v: f"{v.world_size}x{v.micro_batch_size}x{v.grad_accum_steps}"
)
def test_ranks_share_the_positions_of_a_step_once_each(layout: StepLayout) -> None:
    size = layout.world_size * layout.micro_batch_size * layout.grad_accum_steps
    assert layout.global_batch_size == size
    together = [position for batch in micro_batches(layout, 120) for position in batch]
    assert sorted(together) == list(range(120, 120 + size))


def test_the_same_global_batch_split_differently_has_the_same_micro_batches() -> None:  # guarantee B
    for one, other in product(LAYOUTS, LAYOUTS):
        if (
            one.micro_batch_size == other.micro_batch_size
            and one.global_batch_size == other.global_batch_size
        ):
            assert micro_batches(one, 30) == micro_batches(other, 30)


def consumed_by(layout: StepLayout, plan: RunPlan, start: int, steps: int) -> list[Place | None]:
    """What all ranks together read in some steps."""
    read: list[Place | None] = []
    for step in range(steps):
        for batch in sorted(micro_batches(layout, start + step * layout.global_batch_size)):
            read += plan.locate(batch[0], len(batch))
    return read


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any),
    first=st.sampled_from(LAYOUTS),
    second=st.sampled_from(LAYOUTS),
    steps=st.integers(0, 5),
)
@settings(max_examples=60)
def test_a_run_resumed_in_another_world_visits_every_sample_once_an_epoch(  # guarantee A
    sizes: list[int], first: StepLayout, second: StepLayout, steps: int
) -> None:
    plan = RunPlan(sizes, seed=11, window=2, epochs=3)
    stop = min(steps, first.steps(plan.total_samples)) * first.global_batch_size
    resumed = RunPlan(sizes, seed=11, window=2, epochs=3)  # nothing is left in memory
    read = consumed_by(first, plan, 0, stop // first.global_batch_size)
    read += consumed_by(second, resumed, stop, second.steps(plan.total_samples - stop))
    line = plan.locate(0, plan.total_samples)
    assert read[: len(line)] == line and not any(read[len(line) :])


@pytest.mark.parametrize("layout", LAYOUTS[::7])
def test_dummies_come_in_the_last_step_alone(layout: StepLayout) -> None:
    plan = RunPlan([7, 1, 13, 0, 5], seed=0, window=2, epochs=2)
    steps = layout.steps(plan.total_samples)
    read = consumed_by(layout, plan, 0, steps)
    assert len(read) == steps * layout.global_batch_size
    assert None not in read[: plan.total_samples] and not any(read[plan.total_samples :])
    assert len(read) - plan.total_samples < layout.global_batch_size
    assert layout.steps(0) == layout.steps(-5) == 0


def test_a_digest_of_positions_adds_up_over_ranks_and_tells_other_sets_apart() -> None:
    whole = positions_digest(range(100, 164))
    assert whole == positions_digest(range(100, 130)) + positions_digest([*range(163, 129, -1)])
    assert positions_digest([]) == 0
    for other in (range(99, 163), [*range(100, 163), 162], [*range(100, 163), 164], range(100, 163)):
        assert positions_digest(other) != whole
    assert 4096 * 2**32 < 2**63  # a sum over any global batch fits the exchange between ranks
