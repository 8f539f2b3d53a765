"""Sixteen real photos learned by heart, until the captions generated during training are the references."""

import json
import shutil
from pathlib import Path

import pytest

from qwenvl_dist.synthetic.base import write_random_base
from tests.launch.test_launch import launch
from tests.ranks import command
from tests.training.runs import read_lines

pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.timeout(1000),  # fifty steps with a vocabulary of 152k on two cores
    pytest.mark.skipif(shutil.which("java") is None, reason="no Java here"),
]
PHOTOS = 16


@pytest.fixture(scope="module")
def small_base(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = shared_data / "qwen2vl" / "Qwen2-VL-7B-Instruct"
    return write_random_base(tmp_path_factory.mktemp("overfit") / "base", "small", text)


@pytest.fixture(scope="module")
def sixteen(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first photos with one caption each, packed."""
    folder = tmp_path_factory.mktemp("sixteen")
    known = json.loads((shared_data / "coco" / "captions.json").read_text())
    images = known["images"][:PHOTOS]
    first: dict[int, dict] = {}
    for annotation in known["annotations"]:
        first.setdefault(annotation["image_id"], annotation)
    captions = {"images": images, "annotations": [first[image["id"]] for image in images]}
    (folder / "captions.json").write_text(json.dumps(captions))
    command(
        "shards", "pack", "--source", "coco", "--captions", folder / "captions.json",
        "--images", shared_data / "coco" / "images", "--out", folder / "shards",
    )  # fmt: skip
    return folder / "shards"


@pytest.mark.parametrize("stage", [2, 3])
def test_sixteen_photos_are_learned_until_the_captions_are_the_references(
    small_base: Path, sixteen: Path, tmp_path: Path, stage: int
) -> None:
    run = tmp_path / "run"
    done = launch(
        f"cpu_zero{stage}.yaml", "train", "launch/recipes/overfit_photos.yaml", f"model.base={small_base}",
        f"data.train={sixteen}", f"data.validation={sixteen}", f"train.output_dir={run}", timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    scores = [line["CIDEr"] for line in read_lines(run / "metrics.jsonl") if "CIDEr" in line]
    assert scores[0] < 0.5 and scores[-1] > 5
    last = json.loads(sorted((run / "generations").glob("step-*.json"))[-1].read_text())
    assert len(last) == PHOTOS
    assert sum(entry["caption"] == entry["references"][0] for entry in last) >= PHOTOS // 2
