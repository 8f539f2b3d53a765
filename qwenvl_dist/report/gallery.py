"""Validation photos with what was said about them: reference, before training, now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwenvl_dist.data.captions import DEFAULT_JOIN
from qwenvl_dist.errors import UserError
from qwenvl_dist.report.folder import Record, RunFolder

MOST_CHARACTERS = 400  # of a caption: an untrained model can go on for pages
RANKED_BY = "CIDEr"


@dataclass(frozen=True)
class Card:
    """One photo and its captions."""

    key: str
    picture: str | None  # a data URI
    prompt: str
    references: list[str]
    before: list[str] | None  # several where captions are joined; None: nobody asked the base
    now: list[str]
    score: float | None
    score_before: float | None
    matches: bool  # whether it says one of the references, or all of them


@dataclass(frozen=True)
class Gallery:
    """Cards of one evaluation; without scores none is worst or best, and all stand in `others`."""

    step: int
    num_captions: int
    prompt: str | None  # that all of them were asked with
    worst: list[Card]
    best: list[Card]
    others: list[Card]
    missing: str | None  # why there are no pictures


def make_gallery(run: RunFolder, most_photos: int) -> Gallery | None:
    """Return the newest generated captions with their photos; None when none were generated."""
    if not run.generations:
        return None
    step = max(run.generations)
    rows = run.generations[step]
    scored = [row for row in rows if _score(row) is not None]
    ranked = sorted(scored, key=lambda row: _score(row) or 0.0)
    half = min(most_photos, len(ranked)) // 2
    worst = ranked[:half]
    best = ranked[len(ranked) - (min(most_photos, len(ranked)) - half) :][::-1]
    others = [] if ranked else rows[:most_photos]
    pictures, missing = _pictures(run, [*worst, *best, *others])
    before = {str(row.get("key")): row for row in run.base_generations}
    mark = run.setting("data", "caption_mark") or DEFAULT_JOIN

    def cards(chosen: Sequence[Record]) -> list[Card]:
        return [_card(row, before.get(str(row.get("key"))), pictures, mark) for row in chosen]

    prompts = {str(row.get("prompt", "")) for row in rows}
    return Gallery(
        step,
        len(rows),
        prompts.pop() if len(prompts) == 1 else None,
        cards(worst),
        cards(best),
        cards(others),
        missing,
    )


def _score(row: Record | None) -> float | None:
    scores = (row or {}).get("scores")
    value = scores.get(RANKED_BY) if isinstance(scores, dict) else None
    return float(value) if isinstance(value, int | float) else None


def _card(row: Record, before: Record | None, pictures: dict[str, str], mark: str) -> Card:
    references = [part for text in row.get("references") or () for part in _parts(str(text), mark)]
    now = _parts(str(row.get("caption", "")), mark)
    said, wanted = ({" ".join(part.split()) for part in parts} for parts in (now, references))
    return Card(
        key=str(row.get("key")),
        picture=pictures.get(str(row.get("key"))),
        prompt=str(row.get("prompt", "")),
        references=references,
        before=_parts(str(before.get("caption", "")), mark) if before else None,
        now=now,
        score=_score(row),
        score_before=_score(before),
        matches=said <= wanted,
    )


def _parts(text: str, mark: str) -> list[str]:
    """Return the captions of a joined text, what the terminal or page would obey replaced."""
    if len(text) > MOST_CHARACTERS:
        text = f"{text[:MOST_CHARACTERS]}… ({len(text)} characters)"
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text.replace("\n", " "))
    return [part for part in (piece.strip() for piece in text.split(mark)) if part] or ["(nothing)"]


def _pictures(run: RunFolder, rows: Sequence[Record]) -> tuple[dict[str, str], str | None]:
    """Return pictures as data URIs by key, boxes drawn on them, and why there are none."""
    from qwenvl_dist.data.pictures import find_pictures, picture_uri
    from qwenvl_dist.data.sizes import UnreadableImage
    from qwenvl_dist.data.source import ShardSet

    place = run.setting("data", "validation") or run.setting("data", "train")
    if not place:
        return {}, "recipe.yaml names no validation shards"
    try:
        shards = ShardSet(_reachable(run, str(place)))
        shards.require_pictures()
        found = find_pictures(shards, [str(row.get("key")) for row in rows])
    except (UserError, OSError) as error:
        return {}, str(error)
    uris = {}
    by_key = {str(row.get("key")): row for row in rows}
    for key, data in found.items():
        try:
            uris[key] = picture_uri(_with_boxes(data, by_key[key]))
        except UnreadableImage:
            continue
    return uris, None if uris else f"{place} holds none of these samples"


def _with_boxes(data: bytes, row: Record) -> bytes:
    """Return a picture with the boxes of its answer and its reference, or as it is where nobody speaks of boxes."""
    from qwenvl_dist.data.drawing import draw_objects
    from qwenvl_dist.data.formats import crowds_of
    from qwenvl_dist.scores.boxes import judge

    references = "".join(map(str, row.get("references") or ()))
    try:
        crowds = crowds_of(row)
    except ValueError:  # a damaged file still has its photos
        crowds = ()
    boxes = judge(str(row.get("prompt", "")), references, str(row.get("answer", "")), crowds)
    return data if boxes is None else draw_objects(data, boxes)


def _reachable(run: RunFolder, place: str) -> str:
    """Return where the shards lie: a relative path was one from the folder where the run was started."""
    started_in = run.launches[-1].get("working_folder") if run.launches else None
    if "://" in place or Path(place).exists() or not started_in:
        return place
    return str(Path(started_in) / place)
