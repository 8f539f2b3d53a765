"""Validation photos with their captions, as each experiment tracker shows such a thing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwenvl_dist.data.pictures import thumbnail
from qwenvl_dist.data.sizes import UnreadableImage

if TYPE_CHECKING:
    from PIL import Image

Tracker = Any  # one of accelerate's trackers; what their base class lacks, all three have: name, tracker, log
PHOTOS_KEY, CAPTIONS_KEY = "validation/photos", "validation/captions"
COLUMNS = ("photo", "prompt", "reference", "before training", "now", "CIDEr")


def log_generations(
    trackers: Sequence[Tracker],
    step: int,
    rows: Sequence[Mapping[str, Any]],
    before: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, bytes],
) -> None:
    """Show each tracker validation photos with their captions: a table, with the photos in it or beside it.

    Args:
        trackers: started ones, on rank 0.
        step: at which `rows` were generated.
        rows: {"key", "prompt", "references", "caption", "scores": {"CIDEr": ...}} each.
        before: the same of the base, in any order; may lack some.
        pictures: original bytes by key; may lack some.
    """
    base = {row["key"]: row["caption"] for row in before}
    table = [
        [
            str(row["key"]),
            row.get("prompt", ""),
            " / ".join(row.get("references") or ()),
            base.get(row["key"], ""),
            row["caption"],
            (row.get("scores") or {}).get("CIDEr"),
        ]
        for row in rows
    ]
    photos: dict[str, Image.Image] = {}
    for key, data in pictures.items():
        try:
            photos[key] = thumbnail(data)
        except UnreadableImage:
            continue
    for tracker in trackers:
        _SHOW[tracker.name](tracker, step, table, photos)


def _in_words(row: Sequence[Any]) -> str:
    """Return what stands below a photo."""
    pairs = zip(COLUMNS[2:], row[2:], strict=True)
    return "\n".join(f"{name}: {value}" for name, value in pairs if value not in ("", None))


def _show_in_swanlab(
    tracker: Tracker, step: int, table: Sequence[list], photos: Mapping[str, Image.Image]
) -> None:
    import swanlab

    shown = [
        swanlab.Image(photos[row[0]], caption=_in_words(row), file_type="jpg")
        for row in table
        if row[0] in photos
    ]
    values: dict[str, Any] = {PHOTOS_KEY: shown} if shown else {}
    if tracker.init_kwargs["mode"] == "local":  # whose dashboard knows no tables
        values[CAPTIONS_KEY] = [swanlab.Text(_in_words(row), caption=row[0]) for row in table]
    else:
        values[CAPTIONS_KEY] = swanlab.ECharts(swanlab.echarts.Table().add(list(COLUMNS), list(table)))
    tracker.log(values, step=step)


def _show_in_wandb(
    tracker: Tracker, step: int, table: Sequence[list], photos: Mapping[str, Image.Image]
) -> None:
    import wandb

    # Pictures inside of a table would be staged in the home folder until the run is synchronised.
    shown = [
        wandb.Image(photos[row[0]], caption=_in_words(row), file_type="jpg")
        for row in table
        if row[0] in photos
    ]
    values: dict[str, Any] = {PHOTOS_KEY: shown} if shown else {}
    rows: list[Any] = [list(row) for row in table]
    tracker.log({**values, CAPTIONS_KEY: wandb.Table(columns=list(COLUMNS), data=rows)}, step=step)


def _show_in_tensorboard(
    tracker: Tracker, step: int, table: Sequence[list], photos: Mapping[str, Image.Image]
) -> None:
    import numpy as np

    writer = tracker.tracker
    for row in table:
        if row[0] in photos:
            writer.add_image(f"validation/{row[0]}", np.asarray(photos[row[0]]), step, dataformats="HWC")
    lines = [
        "| " + " | ".join(map(markdown_cell, row)) + " |" for row in (COLUMNS, ["---"] * len(COLUMNS), *table)
    ]
    writer.add_text(CAPTIONS_KEY, "\n".join(lines), global_step=step)
    writer.flush()


def markdown_cell(value: Any) -> str:
    """Return what may stand in a cell of a Markdown table."""
    text = f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


_SHOW = {"swanlab": _show_in_swanlab, "wandb": _show_in_wandb, "tensorboard": _show_in_tensorboard}
