"""Boxes in the report: drawn on the photos that were asked about, and charted."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwenvl_dist.__main__ import main
from qwenvl_dist.data.boxes import Box, NamedBox, write_objects
from qwenvl_dist.data.drawing import RIGHT, WRONG
from tests.report.made_run import keys_of, write_full_run, write_lines

TRUE = NamedBox("dog", Box(100, 100, 500, 500))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, scene_validation_shards: Path) -> str:
    """Three photos: the box was found, another was named, and nothing was said."""
    run = write_full_run(tmp_path_factory.mktemp("boxes") / "run", scene_validation_shards)
    answers = [[TRUE], [NamedBox("dog", Box(520, 520, 990, 990))], []]
    rows = [
        {"key": key, "image_id": 1, "prompt": "Find all objects.", "references": [write_objects([TRUE])],
         "caption": write_objects(answer), "answer": write_objects(answer), "scores": {}}
        for key, answer in zip(keys_of(scene_validation_shards), answers, strict=False)
    ]  # fmt: skip
    (run / "generations" / "step-00000060.json").write_text(json.dumps(rows))
    shares = [{"step": step, "box_recall": step / 100, "box_precision": 0.5} for step in (0, 25, 50)]
    write_lines(run / "metrics.jsonl", [*map(json.loads, (run / "metrics.jsonl").open()), *shares])
    assert main(["report", str(run)]) == 0
    return (run / "report.html").read_text()


def colour_counts(page: str, colour: tuple[int, int, int]) -> list[int]:
    """Return how many pixels of each picture are of a colour."""
    counts = []
    for uri in re.findall(r"data:image/jpeg;base64,([^\"]+)", page):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))).convert("RGB")).astype(int)
        counts.append(int((np.abs(pixels - colour).max(-1) < 25).sum()))
    return counts


def test_answers_are_drawn_on_their_photos(page: str) -> None:
    greens, reds = colour_counts(page, RIGHT), colour_counts(page, WRONG)
    assert len(greens) == 3
    assert greens[0] > 300 and greens[1] < 100 and greens[2] < 100
    assert reds[1] > 300 and reds[0] < 100 and reds[2] < 100
    whites = colour_counts(page, (255, 255, 255))
    assert min(whites) > 100, "the reference is dashed on all"


def test_recall_and_precision_have_a_chart(page: str) -> None:
    assert "Boxes of validation photos at IoU 0.5" in page
    assert "recall: 0 at step 0, 0.5 at step 50" in page
