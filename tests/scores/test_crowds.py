"""Crowds are ignore regions: by hand, and as pycocotools counts them."""

import contextlib
import io
import random
from collections import defaultdict

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from qwenvl_dist.data.boxes import Box, NamedBox, write_objects
from qwenvl_dist.scores.boxes import BoxAnswer, BoxCounts, judge, match

NAMES = ("cat", "dog")


def box(x1: int, y1: int, x2: int, y2: int, name: str = "dog") -> NamedBox:
    return NamedBox(name, Box(x1, y1, x2, y2))


def test_by_hand() -> None:
    """One dog on the left, a crowd of dogs on the right half."""
    true, crowd = [box(0, 0, 100, 100)], [box(500, 0, 999, 999)]
    predicted = [
        box(0, 0, 100, 90),  # meets the dog at 0.9
        box(0, 0, 100, 80),  # would meet it at 0.8, but it is taken: wrong
        box(600, 0, 700, 100),  # wholly in the crowd: ignored
        box(600, 0, 700, 101),  # and another
        box(450, 0, 550, 100),  # half of it in the crowd: ignored
        box(449, 0, 549, 100),  # 49 %: wrong
        box(600, 0, 700, 100, "cat"),  # no crowd of cats: wrong
    ]
    answer = judge("", write_objects(true), write_objects(predicted), crowd)
    assert answer is not None
    assert answer.ignored == {2, 3, 4} and answer.is_right == [True] + [False] * 6
    assert answer.counts.numbers() == pytest.approx(
        {"precision": 1 / 4, "recall": 1, "f1": 2 / 5, "mean_iou": 0.9, "boxes": 1, "predicted": 4, "matched": 1,
         "malformed": 0, "ignored": 3}
    )  # fmt: skip
    by_name = answer.counts_by_name
    assert (by_name["dog"].predicted, by_name["dog"].ignored) == (3, 3)
    assert (by_name["cat"].predicted, by_name["cat"].ignored) == (1, 0)


def test_a_true_box_in_a_crowd_is_met_all_the_same() -> None:
    true, crowd = [box(600, 0, 700, 100)], [box(500, 0, 999, 999, "DOG")]
    predicted = [box(600, 0, 700, 99), box(600, 0, 700, 98)]
    found = BoxAnswer(true, predicted, 0, match(predicted, true), crowd)
    assert found.is_right == [True, False] and found.ignored == {1}
    assert found.counts.precision == found.counts.recall == 1


def test_a_malformed_box_is_wrong_whatever_is_in_the_crowd() -> None:
    whole = [box(0, 0, 999, 999)]
    answer = judge("", write_objects(whole), "<|box_start|>(1,2),(3,4)<|box_end|>", whole)
    assert answer is not None and (answer.counts.predicted, answer.counts.ignored) == (1, 0)


def made_up(draw: random.Random) -> tuple[list[NamedBox], list[NamedBox], list[NamedBox]]:
    """True boxes that do not touch, crowds anywhere, predictions near both.

    A prediction then meets one true box at most, so that the order in which pairs are made, by IoU here and by
    confidence there, does not matter where confidence is IoU.
    """

    def random_box(name: str) -> NamedBox:
        x, y = draw.randrange(0, 800), draw.randrange(0, 800)
        return box(x, y, x + draw.randrange(20, 199), y + draw.randrange(20, 199), name)

    def moved(each: NamedBox) -> NamedBox:
        x1, y1, x2, y2 = (
            min(999, max(0, c + draw.randint(-40, 40)))
            for c in (each.box.x1, each.box.y1, each.box.x2, each.box.y2)
        )
        return box(x1, y1, max(x1 + 1, x2), max(y1 + 1, y2), each.name)

    true: list[NamedBox] = []
    for name in NAMES * draw.randrange(1, 6):
        each = random_box(name)
        if all(each.box.intersection(other.box) == 0 for other in true):
            true.append(each)
    crowds = [random_box(name) for name in NAMES for _ in range(draw.randrange(3))]
    near = [moved(draw.choice([*true, *crowds])) for _ in range(draw.randrange(15))]
    return true, crowds, [*near, *(random_box(draw.choice(NAMES)) for _ in range(4))]


def entry(image_id: int, each: NamedBox) -> dict[str, object]:
    b = each.box
    bbox = [b.x1, b.y1, b.x2 - b.x1, b.y2 - b.y1]
    return {"image_id": image_id, "category_id": 1 + NAMES.index(each.name), "bbox": bbox}


def coco_counts(scenes: list[tuple[list[NamedBox], list[NamedBox], list[NamedBox]]]) -> dict[str, BoxCounts]:
    """Return what COCOeval counts at an IoU of 0.5, by name; checks its recall on the way."""
    annotations, results = [], []
    for image_id, (true, crowds, predicted) in enumerate(scenes, 1):
        for each, is_crowd in (*((t, 0) for t in true), *((c, 1) for c in crowds)):
            annotations.append(
                {
                    **entry(image_id, each),
                    "id": len(annotations) + 1,
                    "area": each.box.area,
                    "iscrowd": is_crowd,
                }
            )
        for each in predicted:
            of_name = [other.box for other in true if other.name == each.name]
            score = max(map(each.box.iou, of_name), default=0.0)
            results.append({**entry(image_id, each), "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "info": {},
            "images": [{"id": n} for n in range(1, len(scenes) + 1)],
            "categories": [{"id": 1 + n, "name": name} for n, name in enumerate(NAMES)],
            "annotations": annotations,
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [1000]
        evaluation.evaluate()
        evaluation.accumulate()
    counts: dict[str, BoxCounts] = defaultdict(BoxCounts)
    for image in filter(None, evaluation.evalImgs):
        ignored, met = image["dtIgnore"][0].astype(bool), image["dtMatches"][0] > 0
        counts[NAMES[image["category_id"] - 1]] += BoxCounts(
            true=int((~image["gtIgnore"].astype(bool)).sum()),
            predicted=int((~ignored).sum()),
            matched=int((met & ~ignored).sum()),
            ignored=int(ignored.sum()),
        )
    for number, name in enumerate(NAMES):
        assert evaluation.eval["recall"][0, number, 0, 0] == pytest.approx(counts[name].recall)
    return counts


def test_as_pycocotools_counts() -> None:
    draw = random.Random(0)
    scenes = [made_up(draw) for _ in range(300)]
    expected = coco_counts(scenes)
    found: dict[str, BoxCounts] = defaultdict(BoxCounts)
    for true, crowds, predicted in scenes:
        for name, counts in BoxAnswer(
            true, predicted, 0, match(predicted, true), crowds
        ).counts_by_name.items():
            found[name] += counts
    for name in NAMES:
        ours, theirs = found[name].numbers(), expected[name].numbers()
        del ours["mean_iou"], theirs["mean_iou"]  # COCOeval sums no IoUs
        assert ours == pytest.approx(theirs)
        assert min(theirs["ignored"], theirs["matched"], theirs["predicted"] - theirs["matched"]) > 100
