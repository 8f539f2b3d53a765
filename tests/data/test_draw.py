"""One caption a photo and epoch: every caption once before any again, whatever the ranks, workers and resumes."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qwenvl_dist.data.batch import CaptionBatch
from qwenvl_dist.data.draw import CaptionDraw
from qwenvl_dist.data.index import RawSample
from qwenvl_dist.data.plan import Place, RunPlan, StepLayout
from qwenvl_dist.data.sizes import ImageSizeRule
from qwenvl_dist.data.source import PlannedSample, ShardSet, Slot
from qwenvl_dist.data.stream import CaptionStream, SampleEncoder
from qwenvl_dist.synthetic.scenes import captions, scene
from tests.made_shards import SIDE, jpeg, record, write_shards

SIZES = (5, 0, 3)
NUM_CAPTIONS, EPOCHS = 3, 6


def captions_of(number: int) -> list[str]:
    return [captions(scene(number + 10 * i, 0))[0] for i in range(NUM_CAPTIONS)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    numbers = iter(range(sum(SIZES)))
    samples = [
        [
            {"jpg": jpeg(n), "json": record("COCO Yes:", "&&".join(captions_of(n)))}
            for n in itertools.islice(numbers, size)
        ]
        for size in SIZES
    ]
    return write_shards(tmp_path_factory.mktemp("draw") / "shards", samples)


@pytest.fixture(scope="module")
def encoder(scenes_processor: Any) -> SampleEncoder:
    return SampleEncoder(scenes_processor, ImageSizeRule(side=SIDE), 256)


def told(
    folder: Path,
    encoder: SampleEncoder,
    world: int = 1,
    workers: int = 0,
    start: int = 0,
    mark: str | None = "&&",
) -> dict[int, str]:
    """Return the text that each position learns, over all ranks."""
    plan = RunPlan(ShardSet(folder).manifest.shard_sizes, seed=5, window=2, epochs=EPOCHS)
    found: dict[int, str] = {}
    for rank in range(world):
        stream = CaptionStream(
            ShardSet(folder), plan, StepLayout(world, 2, 4 // world), encoder,
            rank=rank, workers=workers, timeout_seconds=60, length_grouping=True, drawn_caption_mark=mark,
        )  # fmt: skip
        for batch in (batch for step in stream.iterate(start) for batch in step):
            found.update(texts(batch, encoder))
    return {position: text for position, text in sorted(found.items()) if position < plan.total_samples}


def texts(batch: CaptionBatch, encoder: SampleEncoder) -> dict[int, str]:
    rows = [labels[labels >= 0].tolist() for labels in batch.labels]
    decoded = [encoder.chat.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
    return dict(zip(batch.positions, decoded, strict=True))


def test_each_epoch_takes_one_caption_and_all_come_before_one_comes_again(shards: Path, encoder: Any) -> None:
    found = told(shards, encoder)
    assert list(found) == list(range(sum(SIZES) * EPOCHS))
    own = {text: n for n in range(sum(SIZES)) for text in captions_of(n)}
    by_sample: dict[int, list[str]] = {}
    for text in found.values():
        by_sample.setdefault(own[text], []).append(text)
    assert len(by_sample) == sum(SIZES)
    for number, drawn in by_sample.items():
        for cycle in (drawn[:NUM_CAPTIONS], drawn[NUM_CAPTIONS:]):
            assert sorted(cycle) == sorted(captions_of(number))
    orders = Counter(tuple(captions_of(n).index(text) for text in drawn) for n, drawn in by_sample.items())
    assert len(orders) > 4  # each in an order of its own


def test_ranks_workers_and_resumes_change_nothing(shards: Path, encoder: Any) -> None:
    found = told(shards, encoder)
    assert told(shards, encoder, world=2) == found
    assert told(shards, encoder, workers=2) == found
    later = told(shards, encoder, world=4, start=16)
    assert later == {position: text for position, text in found.items() if position >= 16}


def test_without_the_mode_all_are_told(shards: Path, encoder: Any) -> None:
    joined = {"&&".join(captions_of(n)) for n in range(sum(SIZES))}
    assert {text.replace(" ", "") for text in told(shards, encoder, mark=None).values()} == {
        text.replace(" ", "") for text in joined
    }


def test_what_is_drawn_is_pinned() -> None:
    """An order, once trained on, never changes under the same PLAN_VERSION."""
    plan = RunPlan([5, 3], seed=7, window=1, epochs=10)
    drawn = [plan.draw(8 * epoch, Place(1, 2), 5) for epoch in range(10)]
    assert drawn == [4, 3, 0, 2, 1, 4, 0, 3, 2, 1]


@pytest.mark.parametrize(
    "text",
    [
        record("?", "One caption."),
        b"damaged",
        json.dumps({
            "messages": [
                {"role": role, "content": [{"type": "text", "text": "a&&b"}]} for role in ("user", "assistant") * 2
            ]
        }).encode(),
    ],
)  # fmt: skip
def test_what_has_no_choice_passes_untouched(text: bytes) -> None:
    draw = CaptionDraw(RunPlan([1], seed=0, window=1), "&&")
    sample = PlannedSample(Slot(0, 0, Place(0, 0), None), "s", raw=RawSample("k", {"json": text}))
    assert draw([sample]) == [sample]
    empty = PlannedSample(Slot(0, 9, None, None))
    assert draw([empty]) == [empty]
