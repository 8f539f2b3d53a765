"""How well predicted boxes meet the true ones: precision and recall at an IoU.

Crowd regions, in which nobody counted the objects, are what they are in COCO's evaluation (pycocotools, `iscrowd`): a
prediction there that meets no true box is ignored, however many there are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

from qwenvl_dist.data.boxes import NamedBox, asked_name, parse_objects

THRESHOLD = 0.5  # intersection over union; in a crowd, over the prediction's own area


@dataclass(frozen=True)
class Match:
    """A prediction and the truth that it meets, by number."""

    predicted: int
    true: int
    iou: float


@dataclass(frozen=True)
class BoxCounts:
    """Counts that add up over answers. A malformed box is a prediction that meets nothing."""

    true: int = 0
    predicted: int = 0  # malformed ones included, ignored ones not
    matched: int = 0
    malformed: int = 0
    ignored: int = 0  # predictions in a crowd
    iou: float = 0.0  # summed over what matched

    def __add__(self, other: BoxCounts) -> BoxCounts:
        return BoxCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def precision(self) -> float:
        """The share of predictions that meet a true box; 0 when there is none."""
        return self.matched / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        """The share of true boxes that a prediction meets; 0 when there is none."""
        return self.matched / self.true if self.true else 0.0

    @property
    def f1(self) -> float:
        """The harmonic mean of both."""
        return 2 * self.matched / (self.true + self.predicted) if self.true + self.predicted else 0.0

    def numbers(self) -> dict[str, float]:
        """Return counts and shares by name."""
        return {
            "precision": self.precision,
            "recall": self.recall,
            "f1": self.f1,
            "mean_iou": self.iou / self.matched if self.matched else 0.0,  # of what matched
            "boxes": self.true,
            "predicted": self.predicted,
            "matched": self.matched,
            "malformed": self.malformed,
            "ignored": self.ignored,
        }


def match(
    predicted: Sequence[NamedBox], true: Sequence[NamedBox], threshold: float = THRESHOLD
) -> list[Match]:
    """Pair predictions with true boxes of the same name, one to one, wherever their IoU is at least `threshold`.

    Greedy: the pair of the highest IoU first, among equal ones the earlier prediction. Names are compared without
    regard to case.
    """
    pairs = [
        Match(p, t, iou)
        for p, one in enumerate(predicted)
        for t, other in enumerate(true)
        if _same_name(one, other) and (iou := one.box.iou(other.box)) >= threshold
    ]
    found: list[Match] = []
    taken: tuple[set[int], set[int]] = set(), set()
    for pair in sorted(pairs, key=lambda pair: (-pair.iou, pair.predicted, pair.true)):
        if pair.predicted not in taken[0] and pair.true not in taken[1]:
            taken[0].add(pair.predicted)
            taken[1].add(pair.true)
            found.append(pair)
    return found


def _same_name(one: NamedBox, other: NamedBox) -> bool:
    return one.name.casefold() == other.name.casefold()


@dataclass(frozen=True)
class BoxAnswer:
    """One answer about boxes against its reference."""

    true: list[NamedBox]
    predicted: list[NamedBox]
    malformed: int
    matches: list[Match]
    crowds: Sequence[NamedBox] = ()

    @cached_property
    def ignored(self) -> frozenset[int]:
        """The predictions, by number, that meet no true box and lie in a crowd of their name."""
        right = self.is_right
        return frozenset(
            number
            for number, each in enumerate(self.predicted)
            if not right[number]
            and any(
                _same_name(each, crowd) and each.box.share_in(crowd.box) >= THRESHOLD for crowd in self.crowds
            )
        )

    @property
    def is_right(self) -> list[bool]:
        """For each prediction, whether it meets a true box."""
        met = {pair.predicted for pair in self.matches}
        return [number in met for number in range(len(self.predicted))]

    @property
    def counts(self) -> BoxCounts:
        """Everything in it."""
        return BoxCounts(
            true=len(self.true),
            predicted=len(self.predicted) - len(self.ignored) + self.malformed,
            matched=len(self.matches),
            malformed=self.malformed,
            ignored=len(self.ignored),
            iou=sum(pair.iou for pair in self.matches),
        )

    @property
    def counts_by_name(self) -> dict[str, BoxCounts]:
        """The counts for each name in it, in lower case; malformed boxes have none."""
        counts: dict[str, BoxCounts] = defaultdict(BoxCounts)
        for each in self.true:
            counts[each.name.casefold()] += BoxCounts(true=1)
        for number, each in enumerate(self.predicted):
            is_ignored = number in self.ignored
            counts[each.name.casefold()] += BoxCounts(predicted=not is_ignored, ignored=is_ignored)
        for pair in self.matches:
            counts[self.true[pair.true].name.casefold()] += BoxCounts(matched=1, iou=pair.iou)
        return dict(counts)


def judge(prompt: str, reference: str, answer: str, crowds: Sequence[NamedBox] = ()) -> BoxAnswer | None:
    """Return an answer's boxes beside the reference's and its crowds; None when the reference has no box."""
    asked = asked_name(prompt)
    true = parse_objects(reference, asked).objects
    if not true:
        return None
    said = parse_objects(answer, asked)
    return BoxAnswer(true, said.objects, said.malformed, match(said.objects, true), crowds)
