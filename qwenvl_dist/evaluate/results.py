"""The numbers of an evaluation, and the files that hold them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qwenvl_dist.evaluate.compare import Comparison, comparison_page, exact_match, same_caption
from qwenvl_dist.files import write_atomic
from qwenvl_dist.logs import get_logger
from qwenvl_dist.model.generate import Answers
from qwenvl_dist.scores.captions import ImageCaption
from qwenvl_dist.scores.coco import Scores

log = get_logger(__name__)
BASE, ADAPTER, MERGED = "base", "adapter", "merged"
PAGE_PICTURES = 60  # the page carries its pictures inside, so it shows the first ones only
BAD_SAMPLES_SHOWN = 5
EXTREMES = 3  # how many of the best and of the worst captions are named
RANKED_BY = ("CIDEr", "METEOR", "ROUGE_L", "Bleu_4")  # the first that was computed
PREDICTIONS, NUMBERS, CAPTIONS, PAGE = (
    "predictions.json",
    "evaluation.json",
    "captions.json",
    "comparison.html",
)


@dataclass(frozen=True)
class Measured:
    """What one model gave."""

    loss: float
    answers: Answers
    images: list[ImageCaption]
    scores: Scores

    def numbers(self) -> dict[str, float]:
        """Return scores, loss, the share of answers that equal their reference, and speed."""
        said = self.answers.said
        return {
            **self.scores.overall,
            "loss": self.loss,
            "exact_match": exact_match([text for _, text in said], [asked.reference for asked, _ in said]),
            "captions_per_second": self.answers.per_second,
        }


class Results:
    """Of the models that were compared. The one that counts: base + adapter, else the merged one, else MODEL."""

    def __init__(self, measured: dict[str, Measured], seconds: float) -> None:
        self.measured, self.seconds = measured, seconds
        after = next(name for name in (ADAPTER, MERGED, BASE) if name in measured)
        self.after = measured[after]
        self.before = measured[BASE] if after != BASE else None
        self.merged = measured.get(MERGED) if after != MERGED else None

    @cached_property
    def numbers(self) -> dict[str, Any]:
        """The numbers of the model that counts; the base's end in `_before`, a merged one's beside it in `_merged`."""
        others = (("before", self.before), ("merged", self.merged))
        numbers: dict[str, Any] = {"n": len(self.after.answers.said), "images": len(self.after.images)}
        numbers.update(self.after.numbers())
        for suffix, other in others:
            if other is not None:
                numbers.update({f"{name}_{suffix}": value for name, value in other.numbers().items()})
        if self.merged is not None:
            pairs = zip(self.after.answers.said, self.merged.answers.said, strict=True)
            same = sum(same_caption(text, other) for (_, text), (_, other) in pairs)
            numbers["same_captions_merged"] = same / len(self.after.answers.said)
        numbers["bad_samples"] = len(self.after.answers.bad)
        numbers["seconds"] = self.seconds
        ranked = self._ranked()
        if ranked:
            numbers["best"], numbers["worst"] = ranked[::-1][:EXTREMES], ranked[:EXTREMES]
        return numbers

    def _ranked(self) -> list[dict[str, Any]]:
        """Return each picture with its caption and the score that it is ranked by, the worst first."""
        by = next((name for name in RANKED_BY if name in self.after.scores.overall), "")
        pairs = zip(self.after.images, self.after.scores.each, strict=True)
        rows = [
            {"image_id": image.image_id, "key": image.key, by: own[by], "caption": image.caption}
            for image, own in pairs
            if by in own
        ]
        return sorted(rows, key=lambda row: row[by])

    def write(
        self, out: Path, title: str, pictures: Callable[[Sequence[str]], dict[str, bytes]]
    ) -> list[Comparison]:
        """Write all files into `out` and name what was left out; return the rows of the page."""
        bad = self.after.answers.bad
        for record in bad[:BAD_SAMPLES_SHOWN]:
            log.warning("left out %s: %s: %s", record.shard, record.key, record.reason)
        if len(bad) > BAD_SAMPLES_SHOWN:
            log.warning("left out %d samples in all", len(bad))
        after, before, merged = (
            None if each is None else [{"image_id": i.image_id, "caption": i.caption} for i in each.images]
            for each in (self.after, self.before, self.merged)
        )
        write_predictions(out, after, before, merged)
        write_atomic(out / CAPTIONS, indented_json(self._captions()))
        rows = self._write_page(out / PAGE, title, pictures)
        write_atomic(out / NUMBERS, (json.dumps(self.numbers, indent=2) + "\n").encode())
        return rows

    def _captions(self) -> list[dict[str, Any]]:
        entries = []
        for number, image in enumerate(self.after.images):
            entry = {**image.to_json(), "scores": self.after.scores.each[number]}
            for name, other in (("before", self.before), ("merged", self.merged)):
                if other is not None:
                    said = other.images[number]
                    scores = other.scores.each[number]
                    entry[name] = {"caption": said.caption, "answer": said.answer, "scores": scores}
            entries.append(entry)
        return entries

    def _write_page(
        self, path: Path, title: str, pictures: Callable[[Sequence[str]], dict[str, bytes]]
    ) -> list[Comparison]:
        said = self.after.answers.said[:PAGE_PICTURES]
        found = pictures([asked.key for asked, _ in said])
        rows = []
        for number, (asked, text) in enumerate(said):
            if asked.key in found:
                before, merged = (
                    None if other is None else other.answers.said[number][1]
                    for other in (self.before, self.merged)
                )
                rows.append(Comparison(asked.key, text, before, asked.reference, merged))
        html = comparison_page(rows, [found[row.name] for row in rows], title, self._facts(len(rows)))
        write_atomic(path, html.encode())
        return rows

    def _facts(self, num_shown: int) -> list[tuple[str, str]]:
        numbers = self.numbers
        facts = [samples_fact(numbers, num_shown)]
        forms = {"loss": ("loss", ".4f"), "exact_match": ("exact match", ".1%")}
        forms |= {name: (name.replace("_", "-"), ".3f") for name in self.after.scores.overall}
        for key, (name, form) in forms.items():
            facts.append((name, compared(numbers, key, form)))
        if numbers["bad_samples"]:
            facts.append(("unreadable samples", str(numbers["bad_samples"])))
        return facts


def write_predictions(out: Path, after: object, before: object | None, merged: object | None) -> None:
    """Write what the model that counts said, and the base and a merged one beside it where they were asked."""
    for suffix, content in (("", after), ("_base", before), ("_merged", merged)):
        path = out / PREDICTIONS.replace(".", f"{suffix}.")
        if content is None:
            path.unlink(missing_ok=True)  # of an earlier evaluation, beside other numbers
        else:
            write_atomic(path, indented_json(content))


def samples_fact(numbers: dict[str, Any], num_shown: int) -> tuple[str, str]:
    """Return the first fact of a page: how many samples there are, and how many of them it shows."""
    shown = f", the first {num_shown} below" if num_shown < numbers["n"] else ""
    return "samples", f"{numbers['n']}{shown}"


def compared(numbers: dict[str, Any], key: str, form: str) -> str:
    """Return one number as a page shows it, beside those of the base and of a merged model where there are any."""
    value = format(numbers[key], form)
    if f"{key}_before" in numbers:
        value = f"{format(numbers[f'{key}_before'], form)} → {value}"
    if f"{key}_merged" in numbers:
        value = f"{value}, merged {format(numbers[f'{key}_merged'], form)}"
    return value


def indented_json(content: object) -> bytes:
    """Return the bytes of a JSON file for people too."""
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()
