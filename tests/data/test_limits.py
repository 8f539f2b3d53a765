"""What becomes of samples that are larger than a recipe allows."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenvl_dist.data.batch import Adjustment, CaptionBatch
from qwenvl_dist.data.chat import IGNORE, image_tokens
from qwenvl_dist.data.plan import RunPlan, StepLayout
from qwenvl_dist.data.sizes import ImageSizeRule, UnreadableImage
from qwenvl_dist.data.source import ShardSet
from qwenvl_dist.data.stream import CaptionStream, SampleEncoder
from tests.made_shards import Members, jpeg, key_of, keys_of, record, scene_members, stream, write_shards

LOW, HIGH = 28 * 28, 16 * 28 * 28  # pixels: 1 to 16 visual tokens
RULE = ImageSizeRule(None, LOW, HIGH)
SIDES = st.integers(1, 3000)


def several(*sides: int, answer: str = "a red circle above a blue square") -> Members:
    pictures = {f"{i}.jpg": jpeg(i, side=side) for i, side in enumerate(sides)}
    return {**pictures, "json": record("which?", answer, images=len(sides))}


def visual(batch: CaptionBatch) -> int:
    return sum(image_tokens(grid, 2) for grid in batch.grids)


def only(folder: Path, encoder: SampleEncoder) -> CaptionBatch:
    [[batch]] = stream(folder, encoder, layout=StepLayout(1, 1, 1)).iterate()
    return batch


# --- sizes ---


@given(sizes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=6), limit=st.integers(1, 40))
def test_pictures_of_a_sample_shrink_to_its_limit(sizes: list[tuple[int, int]], limit: int) -> None:
    try:
        wanted, _ = RULE.targets(sizes)
    except UnreadableImage:
        return
    tokens = [h * w // 28**2 for h, w in wanted]
    if limit < len(sizes) and sum(tokens) > limit:
        with pytest.raises(UnreadableImage, match="cannot shrink"):
            RULE.targets(sizes, limit)
        return
    targets, shrunk = RULE.targets(sizes, limit)
    made = [h * w // 28**2 for h, w in targets]
    assert shrunk == (sum(tokens) > limit) and (shrunk or targets == wanted)
    assert all(h % 28 == w % 28 == 0 and h and w for h, w in targets)
    assert sum(made) <= limit or not shrunk
    assert all(after <= before for after, before in zip(made, tokens, strict=True))


def test_one_picture_shrinks_by_qwens_own_rule() -> None:
    for width, height in ((640, 480), (200, 900), (31, 33)):
        smaller = ImageSizeRule(None, LOW, 6 * 28 * 28).target(width, height)
        assert RULE.targets([(width, height)], 6)[0] == [smaller]


def test_pictures_of_a_fixed_size_cannot_shrink() -> None:
    fixed = ImageSizeRule(side=56)
    assert fixed.targets([(9, 9)], 4) == ([(56, 56)], False)
    with pytest.raises(UnreadableImage, match="56 pixels a side"):
        fixed.targets([(9, 9)], 3)


# --- samples ---


def test_a_limit_of_visual_tokens_holds_for_all_pictures_of_a_sample(
    tmp_path: Path, scenes_processor: Any
) -> None:
    folder = write_shards(tmp_path / "shards", [[several(112, 112, 56)]])
    whole = only(folder, SampleEncoder(scenes_processor, RULE, 256))
    assert (visual(whole), whole.adjusted) == (16 + 16 + 4, ())
    limited = only(folder, SampleEncoder(scenes_processor, ImageSizeRule(None, LOW, HIGH, 28, 18), 256))
    assert limited.adjusted == (Adjustment.SHRUNK,) and limited.keys == whole.keys
    assert limited.grids == ((1, 4, 4), (1, 4, 4), (1, 2, 2)), (
        "8, 8 and 2 tokens a picture, whole squares of it"
    )
    assert len(limited.image_positions) == visual(limited)
    learned = limited.labels[limited.labels != IGNORE]
    assert learned.tolist() == whole.labels[whole.labels != IGNORE].tolist()


@pytest.mark.parametrize(
    ("policy", "adjusted", "tokens"), [("cut", "cut", 32), ("shrink", "shrunk", 20), ("drop", "dropped", 0)]
)
def test_a_sample_above_max_length(
    tmp_path: Path, scenes_processor: Any, policy: Any, adjusted: str, tokens: int
) -> None:
    folder = write_shards(tmp_path / "shards", [[several(112, 112)]])
    whole = only(folder, SampleEncoder(scenes_processor, RULE, 256))
    length = whole.input_ids.shape[1]
    batch = only(folder, SampleEncoder(scenes_processor, RULE, length - 6, over_length=policy))
    assert batch.adjusted == (Adjustment(adjusted),) and not batch.bad
    assert batch.input_ids.shape[1] <= length - 6
    if policy == "drop":
        assert batch.keys == () and batch.target_tokens == 0
        return
    assert batch.keys == (key_of(0, 0),) and visual(batch) == len(batch.image_positions)
    lost = whole.target_tokens - batch.target_tokens
    assert (lost, visual(batch)) == ((6, 32) if policy == "cut" else (0, visual(batch)))
    assert policy == "cut" or 16 <= visual(batch) <= 26


@pytest.mark.parametrize("policy", ["cut", "shrink"])
def test_what_neither_cut_nor_smaller_pictures_make_fit_is_a_bad_sample(
    tmp_path: Path, scenes_processor: Any, policy: Any
) -> None:
    text = {"json": record("Hello " * 40, "a red circle", images=0)}
    folder = write_shards(tmp_path / "shards", [[text]])
    batch = only(folder, SampleEncoder(scenes_processor, RULE, 32, over_length=policy))
    assert batch.keys == () and not batch.adjusted
    assert [record.key for record in batch.bad] == [key_of(0, 0)] and "max_length 32" in batch.bad[0].reason


@pytest.mark.parametrize("policy", ["shrink", "drop"])
def test_answers_behind_one_prefix_follow_the_same_rule(
    tmp_path: Path, scenes_processor: Any, policy: Any
) -> None:
    folder = write_shards(tmp_path / "shards", [[several(112, answer="a red circle&&a blue square")]])

    def batch_of(max_length: int) -> CaptionBatch:
        return only(
            folder,
            SampleEncoder(scenes_processor, RULE, max_length, caption_mark="&&", over_length=policy),
        )

    whole = batch_of(256)
    assert whole.segments is not None and int(whole.segments.max()) == 2
    batch = batch_of(whole.input_ids.shape[1] - 3)
    assert batch.adjusted == ((Adjustment.SHRUNK,) if policy == "shrink" else (Adjustment.DROPPED,))
    assert batch.target_tokens == (whole.target_tokens if policy == "shrink" else 0)


# --- micro-batches ---


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pack 24 samples, every third with a picture of 16 tokens, the others of one."""
    samples = [several(112 if number % 3 == 0 else 28) for number in range(24)]
    samples[5] = scene_members(5)
    folder = tmp_path_factory.mktemp("sizes") / "shards"
    return write_shards(folder, [samples[:10], samples[10:]])


def budgeted(
    folder: Path, encoder: SampleEncoder, layout: StepLayout, rank: int, budget: int
) -> CaptionStream:
    shards = ShardSet(folder)
    plan = RunPlan(shards.manifest.shard_sizes, seed=5, window=2)
    return CaptionStream(
        shards, plan, layout, encoder, rank=rank, workers=0, length_grouping=True, visual_token_budget=budget
    )


@pytest.mark.parametrize("budget", [40, 13])
def test_micro_batches_keep_their_budget_on_any_number_of_ranks(
    sizes: Path, scenes_processor: Any, budget: int
) -> None:
    encoder = SampleEncoder(scenes_processor, RULE, 256)
    alone = [
        batch for step in budgeted(sizes, encoder, StepLayout(1, 3, 4), 0, budget).iterate() for batch in step
    ]
    assert Counter(key for batch in alone for key in batch.keys) == dict.fromkeys(
        [key_of(0, i) for i in range(10)] + [key_of(1, i) for i in range(14)], 1
    )
    assert max(map(visual, alone)) <= budget
    counts = {len(batch.keys) for batch in alone}
    assert len(counts) > 1, "some hold many small samples, others few large ones"
    shrunk = sum(what is Adjustment.SHRUNK for batch in alone for what in batch.adjusted)
    assert (shrunk > 0) == (budget < 16)
    ranks = [list(budgeted(sizes, encoder, StepLayout(4, 3, 1), rank, budget).iterate()) for rank in range(4)]
    apart = [ranks[rank][step][0] for step in range(2) for rank in range(4)]
    for one, other in zip(alone, apart, strict=True):
        assert one.keys == other.keys and one.grids == other.grids
        assert np.array_equal(one.input_ids, other.input_ids) and np.array_equal(one.pixels, other.pixels)


def test_a_budget_holds_what_the_plan_gives_each_step(sizes: Path, scenes_processor: Any) -> None:
    encoder = SampleEncoder(scenes_processor, RULE, 256)
    layout = StepLayout(2, 2, 2)
    plain = [list(stream(sizes, encoder, layout=layout, rank=rank).iterate()) for rank in range(2)]
    dealt = [list(budgeted(sizes, encoder, layout, rank, 20).iterate()) for rank in range(2)]
    for step in range(3):
        held = [sorted(keys_of(iter([ranks[0][step], ranks[1][step]]))) for ranks in (plain, dealt)]
        assert held[0] == held[1]


def test_empty_slots_of_the_last_step_count_in_the_budget(sizes: Path, scenes_processor: Any) -> None:
    encoder = SampleEncoder(scenes_processor, RULE, 256)
    (step,) = budgeted(sizes, encoder, StepLayout(1, 16, 8), 0, 40).iterate()  # 24 samples in 128 slots
    assert sum(len(batch.positions) - len(batch.keys) for batch in step) == 128 - 24
    assert max(map(visual, step)) <= 40
