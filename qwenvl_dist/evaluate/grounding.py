"""`evaluate --task grounding`: are the boxes that a model names where the reference has them?

One prediction meets one true box of the same name, at an IoU of 0.5 or more; one that meets none and lies in a crowd is
ignored (`scores/boxes.py`).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qwenvl_dist.data.boxes import holds_boxes
from qwenvl_dist.data.drawing import LEGEND, draw_objects
from qwenvl_dist.data.sizes import UnreadableImage
from qwenvl_dist.errors import CheckFailed, UserError
from qwenvl_dist.evaluate.captioner import Captioner
from qwenvl_dist.evaluate.compare import Comparison, comparison_page
from qwenvl_dist.evaluate.results import (
    ADAPTER,
    BASE,
    MERGED,
    NUMBERS,
    PAGE,
    PAGE_PICTURES,
    compared,
    indented_json,
    samples_fact,
    write_predictions,
)
from qwenvl_dist.evaluate.run import ShardEvaluation, require_some
from qwenvl_dist.files import write_atomic
from qwenvl_dist.logs import get_logger
from qwenvl_dist.model.generate import Answers
from qwenvl_dist.scores.boxes import THRESHOLD, BoxAnswer, BoxCounts, judge

log = get_logger(__name__)
DRAWN = "drawn"  # in the facts of the page
SHOWN_SCORES = ("precision", "recall", "f1", "mean_iou")


@dataclass(frozen=True)
class Judged:
    """One answer against its reference."""

    key: str
    image_id: int | str
    prompt: str
    reference: str
    answer: str
    boxes: BoxAnswer

    def to_json(self) -> dict[str, Any]:
        """Return the entry in predictions.json; boxes are [x1, y1, x2, y2] in thousandths of the picture's sides."""
        boxes = self.boxes
        iou = {pair.predicted: round(pair.iou, 4) for pair in boxes.matches}
        found = {pair.true for pair in boxes.matches}
        predicted = [
            {**each.to_json(), "iou": iou.get(number), "ignored": number in boxes.ignored}
            for number, each in enumerate(boxes.predicted)
        ]
        true = [{**each.to_json(), "found": number in found} for number, each in enumerate(boxes.true)]
        return {
            "key": self.key,
            "image_id": self.image_id,
            "prompt": self.prompt,
            "answer": self.answer,
            "predicted": predicted,
            "true": true,
            "crowds": [crowd.to_json() for crowd in boxes.crowds],
            "malformed": boxes.malformed,
        }


@dataclass(frozen=True)
class _Measured:
    """What one model gave."""

    loss: float
    answers: Answers

    @cached_property
    def judged(self) -> list[Judged]:
        """The answers to samples whose reference has boxes."""
        judged = []
        for asked, answer in self.answers.said:
            boxes = judge(asked.prompt, asked.reference, answer, asked.crowds)
            if boxes is not None:
                judged.append(Judged(asked.key, asked.image_id, asked.prompt, asked.reference, answer, boxes))
        return judged

    @property
    def counts(self) -> BoxCounts:
        """The counts of all answers together."""
        return sum((one.boxes.counts for one in self.judged), BoxCounts())

    def by_name(self) -> dict[str, dict[str, float]]:
        """Return the numbers for each name, the most frequent first."""
        totals: dict[str, BoxCounts] = defaultdict(BoxCounts)
        for one in self.judged:
            for name, counts in one.boxes.counts_by_name.items():
                totals[name] += counts
        ordered = sorted(totals, key=lambda name: (-totals[name].true, name))
        return {name: totals[name].numbers() for name in ordered}

    def numbers(self) -> dict[str, float]:
        """Return the numbers of all answers together."""
        spoiled = sum(one.boxes.malformed > 0 for one in self.judged)
        return {
            **self.counts.numbers(),
            "malformed_answers": spoiled,
            "loss": self.loss,
            "answers_per_second": self.answers.per_second,
        }


def evaluate_grounding(
    work: ShardEvaluation,
    models: Iterable[tuple[str, Captioner]],
    out: Path,
    *,
    title: str,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Measure models on shards of boxes; rank 0 writes predictions, numbers and a page into `out`. Collective.

    Returns the numbers of the model that counts (with adapter, else merged, else alone), empty on other ranks. Those
    of the bare model beside it end in `_before`, those of a merged one in `_merged`. Samples whose reference has no box
    are left out and counted. Raises CheckFailed when no sample could be read, UserError when none has a box.
    """
    began = time.monotonic()
    measured: dict[str, _Measured] = {}
    for name, captioner in models:
        loss = work.loss(captioner, f"loss of {name}")
        answers = work.answers(captioner, max_new_tokens, f"boxes of {name}")
        log.info("%s: %d answers, %.2f a second", name, len(answers.said), answers.per_second)
        require_some(answers, work)
        measured[name] = _Measured(loss, answers)
        del captioner  # before the next one is loaded
        if not any(holds_boxes(asked.reference) for asked, _ in answers.said):
            raise UserError(
                f"--shards {work.shards.storage.location}: no reference has a box; pack some with "
                "`qwenvl-dist shards pack --source grounding`, or leave --task grounding out"
            )
    if work.host.rank != 0:
        return {}
    counted = next(name for name in (ADAPTER, MERGED, BASE) if name in measured)
    after = measured[counted]
    others = {
        suffix: measured[name]
        for name, suffix in ((BASE, "before"), (MERGED, "merged"))
        if name in measured and name != counted
    }
    numbers: dict[str, Any] = {"n": len(after.judged), "iou_threshold": THRESHOLD, **after.numbers()}
    for suffix, other in others.items():
        numbers.update({f"{name}_{suffix}": value for name, value in other.numbers().items()})
    numbers["samples_without_boxes"] = len(after.answers.said) - len(after.judged)
    numbers["bad_samples"] = len(after.answers.bad)
    numbers["seconds"] = round(time.monotonic() - began, 3)
    for record in after.answers.bad:
        log.warning("left out %s: %s: %s", record.shard, record.key, record.reason)
    try:
        _write(out, after, others, numbers, title, work)
    except OSError as error:
        raise CheckFailed(
            f"{out}: cannot be written ({error.strerror}); free some room and evaluate again"
        ) from error
    return numbers


def _write(
    out: Path,
    after: _Measured,
    others: dict[str, _Measured],
    numbers: dict[str, Any],
    title: str,
    work: ShardEvaluation,
) -> None:
    said = {name: [one.to_json() for one in each.judged] for name, each in others.items()}
    write_predictions(out, [one.to_json() for one in after.judged], said.get("before"), said.get("merged"))
    write_atomic(out / NUMBERS, indented_json({**numbers, "by_name": after.by_name()}))
    rows, drawn = [], []
    shown = after.judged[:PAGE_PICTURES]
    pictures = work.pictures([one.key for one in shown])
    before, merged = (
        {one.key: one.answer for one in others[suffix].judged} if suffix in others else {}
        for suffix in ("before", "merged")
    )
    for one in shown:
        try:
            picture = draw_objects(pictures[one.key], one.boxes)
        except (KeyError, UnreadableImage):
            continue
        drawn.append(picture)
        rows.append(Comparison(one.key, one.answer, before.get(one.key), one.reference, merged.get(one.key)))
    write_atomic(out / PAGE, comparison_page(rows, drawn, title, _facts(numbers, len(rows))).encode())


def _facts(numbers: dict[str, Any], num_shown: int) -> list[tuple[str, str]]:
    forms = {**dict.fromkeys(SHOWN_SCORES, ".3f"), "malformed": "d", "ignored": "d", "loss": ".4f"}
    facts = [(key.replace("_", " "), compared(numbers, key, form)) for key, form in forms.items()]
    return [samples_fact(numbers, num_shown), (DRAWN, LEGEND), *facts]
