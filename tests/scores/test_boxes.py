"""Precision and recall of boxes, on cases that are counted by hand."""

import random

import pytest

from qwenvl_dist.data.boxes import Box, NamedBox, write_objects
from qwenvl_dist.scores.boxes import BoxAnswer, BoxCounts, judge, match


def at(x: int, name: str = "dog", width: int = 100) -> NamedBox:
    return NamedBox(name, Box(x, 0, x + width, 100))


def counts(predicted: list[NamedBox], true: list[NamedBox], malformed: int = 0) -> BoxCounts:
    return BoxAnswer(true, predicted, malformed, match(predicted, true)).counts


@pytest.mark.parametrize(
    ("predicted", "true", "matched"),
    [
        ([at(0)], [at(0)], 1),
        ([at(33)], [at(0)], 1),  # 67 / 133
        ([at(34)], [at(0)], 0),  # 66 / 134
        ([at(0), at(1), at(2)], [at(0)], 1),  # one true box is met once
        ([at(0)], [at(0), at(5)], 1),
        ([at(0, "cat")], [at(0)], 0),  # another name
        ([at(0, "DOG")], [at(0)], 1),
        ([at(0), at(500)], [at(510), at(10)], 2),
        ([], [at(0)], 0),
        ([at(0)], [], 0),
    ],
)
def test_one_prediction_meets_one_true_box(predicted: list, true: list, matched: int) -> None:
    found = counts(predicted, true)
    assert (found.matched, found.predicted, found.true) == (matched, len(predicted), len(true))


def test_the_pair_of_the_highest_iou_comes_first() -> None:
    pairs = match([at(20), at(2)], [at(0), at(30)])
    assert {(pair.predicted, pair.true) for pair in pairs} == {(1, 0), (0, 1)}
    pairs = match([at(20), at(2)], [at(0)])
    assert [(pair.predicted, pair.true) for pair in pairs] == [(1, 0)]
    assert pairs[0].iou == pytest.approx(98 / 102)


def test_a_malformed_box_is_a_prediction_that_meets_nothing() -> None:
    numbers = counts([at(0), at(500)], [at(0), at(100), at(200)], malformed=2).numbers()
    assert numbers == pytest.approx(
        {"precision": 1 / 4, "recall": 1 / 3, "f1": 2 / 7, "mean_iou": 1.0, "boxes": 3, "predicted": 4, "matched": 1,
         "malformed": 2, "ignored": 0}
    )  # fmt: skip
    assert BoxCounts().numbers()["precision"] == BoxCounts().numbers()["f1"] == 0


def test_greedy_loses_nothing_on_boxes_that_overlap_little() -> None:
    """Against the optimum, by trying all ways to pair up."""
    from itertools import permutations

    draw = random.Random(0)
    for _ in range(50):
        true = [at(200 * n) for n in range(4)]
        predicted = [at(200 * n + draw.randint(0, 80)) for n in range(4)]
        best = max(
            sum(predicted[p].box.iou(true[t].box) >= 0.5 for t, p in enumerate(order))
            for order in permutations(range(4))
        )
        assert len(match(predicted, true)) == best


def test_counts_add_up_over_names_and_answers() -> None:
    predicted, true = [at(0), at(0, "cat"), at(300, "cat")], [at(5), at(2, "Cat")]
    by_name = BoxAnswer(true, predicted, 0, match(predicted, true)).counts_by_name
    total = by_name["dog"] + by_name["cat"]
    assert set(by_name) == {"dog", "cat"} and total == counts(predicted, true)
    assert (by_name["cat"].precision, by_name["dog"].precision) == (0.5, 1)


def test_an_answer_is_judged_by_its_reference() -> None:
    judged = judge(
        "Find all objects.", write_objects([at(0), at(500, "cat")]), write_objects([at(3), at(0, "cat")])
    )
    assert judged is not None and judged.is_right == [True, False]
    bare = "<|box_start|>(0,0),(100,100)<|box_end|>"
    asked = judge("Find <|object_ref_start|>dog<|object_ref_end|>.", write_objects([at(0)]), bare)
    assert asked is not None and asked.is_right == [True]
    assert judge("COCO Yes:", "A dog.", bare) is None
