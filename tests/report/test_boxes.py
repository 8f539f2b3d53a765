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
from qwenvl_dist.data.drawing import IGNORED, RIGHT, WRONG
from tests.report.made_run import keys_of, write_full_run, write_lines

TRUE, ELSEWHERE = NamedBox("dog", Box(100, 100, 500, 500)), NamedBox("dog", Box(520, 520, 990, 990))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, scene_validation_shards: Path) -> str:
    """Four photos: the box was found, another was named, nothing was said, and the other was named in a crowd."""
    run = write_full_run(tmp_path_factory.mktemp("boxes") / "run", scene_validation_shards)
    answers = [[TRUE], [ELSEWHERE], [], [ELSEWHERE]]
    rows = [
        {"key": key, "image_id": 1, "prompt": "Find all objects.", "references": [write_objects([TRUE])],
         "caption": write_objects(answer), "answer": write_objects(answer), "scores": {}}
        for key, answer in zip(keys_of(scene_validation_shards), answers, strict=False)
    ]  # fmt: skip
    rows[3]["crowds"] = [ELSEWHERE.to_json()]
    (run / "generations" / "step-00000060.json").write_text(json.dumps(rows))
    shares = [{"step": step, "box_recall": step / 100, "box_precision": 0.5} for step in (0, 25, 50)]
    write_lines(run / "metrics.jsonl", [*map(json.loads, (run / "metrics.jsonl").open()), *shares])
    assert main(["report", str(run)]) == 0
    return (run / "report.html").read_text()


def pictures(page: str) -> list[np.ndarray]:
    """Return the photos, (280, 280, 3) each."""
    uris = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    return [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))).convert("RGB")).astype(int) for uri in uris
    ]


def edge(picture: np.ndarray, box: Box) -> np.ndarray:
    """Return the colours along the left edge of a box, below its name."""
    height, width = picture.shape[:2]
    return picture[box.y1 * height // 1000 + 30 : box.y2 * height // 1000 - 5, box.x1 * width // 1000 + 1]


def share_of(colours: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((np.abs(colours - colour).max(-1) < 60).mean())


def test_answers_are_drawn_on_their_photos(page: str) -> None:
    found, elsewhere, silent, crowded = pictures(page)
    assert share_of(edge(found, TRUE.box), RIGHT) > 0.9
    assert share_of(edge(elsewhere, ELSEWHERE.box), WRONG) > 0.9
    for picture in (elsewhere, silent):
        dashes = edge(picture, TRUE.box)
        assert share_of(dashes, (255, 255, 255)) > 0.25 and share_of(dashes, (0, 0, 0)) > 0.25
    assert share_of(edge(silent, ELSEWHERE.box), WRONG) < 0.1
    assert share_of(edge(crowded, ELSEWHERE.box), IGNORED) > 0.9


def test_recall_and_precision_have_a_chart(page: str) -> None:
    assert "Boxes of validation photos at IoU 0.5" in page
    assert "recall: 0 at step 0, 0.5 at step 50" in page
