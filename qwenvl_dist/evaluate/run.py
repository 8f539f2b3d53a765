"""What `predict` and `evaluate` do: captions of single pictures; captions and loss of packed shards."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl_dist.data.batch import BadSampleRecord
from qwenvl_dist.data.formats import caption_messages
from qwenvl_dist.data.images import UnreadableImage, decode
from qwenvl_dist.data.index import BadSample
from qwenvl_dist.data.plan import RunPlan, StepLayout
from qwenvl_dist.data.prompts import Asked, PromptBatch, PromptStream
from qwenvl_dist.data.source import ShardSet
from qwenvl_dist.data.stream import CaptionStream
from qwenvl_dist.errors import CheckFailed, UserError
from qwenvl_dist.evaluate.compare import Comparison, comparison_page, exact_match
from qwenvl_dist.evaluate.generate import Captioner
from qwenvl_dist.evaluate.loss import mean_token_loss
from qwenvl_dist.files import write_atomic
from qwenvl_dist.logs import get_logger, progress

log = get_logger(__name__)
PICTURE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
PAGE_PICTURES = 60  # the page carries its pictures inside, so it shows the first ones only
BAD_SAMPLES_SHOWN = 5
PREDICTIONS, PREDICTIONS_BASE = "predictions.json", "predictions_base.json"
PAGE, NUMBERS = "comparison.html", "evaluation.json"


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """Return the files, folders replaced by the pictures in them. Raises UserError for a fault in one.

    All are looked at before a model is loaded: a fault should not come up after minutes.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file())
            if not inside:
                raise UserError(
                    f"{path}: holds no picture ({', '.join(PICTURE_SUFFIXES)}); name another folder or files"
                )
            found += inside
        else:
            found.append(path)
    for path in found:
        try:
            decode(path.read_bytes())
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}); name a picture or a folder of them"
            ) from error
        except UnreadableImage as error:
            raise UserError(f"{path}: {error}; name a whole JPEG, PNG or WebP picture") from error
    return found


def predict(
    captioner: Captioner, pictures: Sequence[Path], prompt: str, *, max_new_tokens: int, batch_size: int
) -> list[Comparison]:
    """Return a caption for each picture; with an adapter also what the base says."""
    encoder = captioner.prompt_encoder()
    messages = caption_messages(prompt, "")[:1]
    rows: list[Comparison] = []
    with progress(total=len(pictures), description="predict") as bar:
        for start in range(0, len(pictures), batch_size):
            prompts = []
            for path in pictures[start : start + batch_size]:
                try:
                    prompts.append(
                        encoder.prompt(messages, [path.read_bytes()], Asked(str(path), str(path), ""))
                    )
                except (UnreadableImage, ValueError) as error:
                    raise UserError(f"{path}: {error}") from error
            batch = encoder.collate(prompts)
            after = captioner.answer(batch, max_new_tokens)
            before = _answer_before(captioner, batch, max_new_tokens)
            for asked, caption, earlier in zip(batch.asked, after, before, strict=True):
                assert asked is not None, "every prompt here has a picture"
                rows.append(Comparison(asked.key, caption, earlier))
            bar.advance(len(prompts))
    return rows


def _answer_before(captioner: Captioner, batch: PromptBatch, max_new_tokens: int) -> Sequence[str | None]:
    if captioner.adapter is None:
        return [None] * len(batch.asked)
    with captioner.without_adapter():
        return captioner.answer(batch, max_new_tokens)


@dataclass(frozen=True)
class Answered:
    """One sample with its captions; `before` is None without an adapter."""

    asked: Asked
    after: str
    before: str | None


class ShardEvaluation:
    """The first `limit` samples of packed shards (all when None), in their order, each once."""

    def __init__(
        self,
        captioner: Captioner,
        shards: str | Path,
        *,
        limit: int | None,
        batch_size: int,
        workers: int = 0,
    ) -> None:
        self.captioner = captioner
        self.shards = ShardSet(shards)
        self.shards.require_pictures()
        sizes = self.shards.manifest.shard_sizes
        if limit is not None:
            sizes = np.clip(limit - (np.cumsum(sizes) - sizes), 0, sizes)
        self.plan = RunPlan(sizes, seed=0, window=1, shuffle=False)
        if not self.plan.total_samples:
            raise UserError(f"--shards {shards}: holds no samples; pack some first")
        self.layout = StepLayout(1, batch_size, 1)
        self.workers = workers
        self.bad: list[BadSampleRecord] = []

    def loss(self, description: str) -> float:
        """Return the mean token loss of the model as it stands now."""
        stream = CaptionStream(
            self.shards, self.plan, self.layout, self.captioner.encoder, rank=0, workers=self.workers
        )
        with progress(total=self.plan.total_samples, description=description) as bar:
            return mean_token_loss(self.captioner.model, stream, bar.advance)

    def answers(self, max_new_tokens: int) -> list[Answered]:
        """Return the captions of all readable samples; the others are named in `bad`."""
        stream = PromptStream(
            self.shards, self.plan, self.layout, self.captioner.prompt_encoder(), rank=0, workers=self.workers
        )
        answered: list[Answered] = []
        self.bad = []
        with progress(total=self.plan.total_samples, description="captions") as bar:
            for batch in stream.iterate():
                self.bad += batch.bad
                after = before = [""] * len(batch.asked)
                if any(batch.asked):
                    after = self.captioner.answer(batch, max_new_tokens)
                    before = _answer_before(self.captioner, batch, max_new_tokens)
                rows = zip(batch.asked, after, before, strict=True)
                new = [
                    Answered(asked, caption, earlier) for asked, caption, earlier in rows if asked is not None
                ]
                answered += new
                bar.advance(len(new) + len(batch.bad))
        return answered

    def pictures(self, keys: Sequence[str]) -> dict[str, bytes]:
        """Return the first picture of each of these samples that has one."""
        wanted, found = set(keys), {}
        for position in range(self.plan.total_samples):
            if not wanted:
                break
            (place,) = self.plan.locate(position, 1)
            assert place is not None, "the position lies inside the plan"
            try:
                raw = self.shards.read(place)
            except BadSample:
                continue
            if raw.key in wanted and raw.images:
                found[raw.key] = raw.images[0]
            wanted.discard(raw.key)
        return found


def evaluate(
    captioner: Captioner,
    shards: str | Path,
    out: Path,
    *,
    title: str,
    limit: int | None,
    batch_size: int,
    max_new_tokens: int,
    workers: int = 0,
) -> tuple[dict[str, Any], list[Comparison]]:
    """Measure the model on shards and write predictions, numbers and a comparison page into `out`.

    Returns the numbers, and the rows of the page. Raises CheckFailed when no sample could be read.
    """
    began = time.monotonic()
    work = ShardEvaluation(captioner, shards, limit=limit, batch_size=batch_size, workers=workers)
    numbers: dict[str, Any] = {"n": 0, "loss": work.loss("loss")}
    if captioner.adapter is not None:
        with captioner.without_adapter():
            numbers["loss_before"] = work.loss("loss of the base")
    answered = work.answers(max_new_tokens)
    for record in work.bad[:BAD_SAMPLES_SHOWN]:
        log.warning("left out %s: %s: %s", record.shard, record.key, record.reason)
    if len(work.bad) > BAD_SAMPLES_SHOWN:
        log.warning("left out %d samples in all", len(work.bad))
    if not answered:
        first = work.bad[0]
        raise CheckFailed(
            f"--shards {shards}: none of {len(work.bad)} samples could be read, "
            f"first {first.key}: {first.reason}; look with `qwenvl-dist shards verify`"
        )
    references = [answer.asked.reference for answer in answered]
    numbers["n"] = len(answered)
    numbers["exact_match"] = exact_match([answer.after for answer in answered], references)
    if captioner.adapter is not None:
        numbers["exact_match_before"] = exact_match([answer.before or "" for answer in answered], references)
    numbers["bad_samples"] = len(work.bad)
    numbers["seconds"] = round(time.monotonic() - began, 3)

    write_atomic(out / PREDICTIONS, _coco_results(answered, before=False))
    if captioner.adapter is not None:
        write_atomic(out / PREDICTIONS_BASE, _coco_results(answered, before=True))
    else:
        (out / PREDICTIONS_BASE).unlink(missing_ok=True)  # of an earlier evaluation, beside other numbers
    rows = _write_page(work, answered, numbers, title, out / PAGE)
    write_atomic(out / NUMBERS, (json.dumps(numbers, indent=2) + "\n").encode())
    return numbers, rows


def _coco_results(answered: Sequence[Answered], before: bool) -> bytes:
    """Return predictions in COCO's results format: one caption an image id, the first of several."""
    captions: dict[int | str, str] = {}
    for answer in answered:
        captions.setdefault(answer.asked.image_id, (answer.before or "") if before else answer.after)
    results = [{"image_id": image_id, "caption": caption} for image_id, caption in captions.items()]
    return (json.dumps(results, ensure_ascii=False, indent=1) + "\n").encode()


def _write_page(
    work: ShardEvaluation, answered: Sequence[Answered], numbers: dict[str, Any], title: str, path: Path
) -> list[Comparison]:
    shown = answered[:PAGE_PICTURES]
    pictures = work.pictures([answer.asked.key for answer in shown])
    rows = [
        Comparison(answer.asked.key, answer.after, answer.before, answer.asked.reference)
        for answer in shown
        if answer.asked.key in pictures
    ]
    html = comparison_page(rows, [pictures[row.name] for row in rows], title, _facts(numbers, len(rows)))
    write_atomic(path, html.encode())
    return rows


def _facts(numbers: dict[str, Any], num_shown: int) -> list[tuple[str, str]]:
    facts = [
        (
            "samples",
            f"{numbers['n']}" + (f", the first {num_shown} below" if num_shown < numbers["n"] else ""),
        )
    ]
    for key, name, form in (("loss", "loss", ".4f"), ("exact_match", "exact match", ".1%")):
        value = format(numbers[key], form)
        if f"{key}_before" in numbers:
            value = f"{format(numbers[f'{key}_before'], form)} → {value}"
        facts.append((name, value))
    if numbers["bad_samples"]:
        facts.append(("unreadable samples", str(numbers["bad_samples"])))
    return facts
