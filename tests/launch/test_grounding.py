"""A toy base learns boxes, and learns to read pages, through the commands as a user would type them."""

import json
from pathlib import Path

import pytest
import yaml

from tests.ranks import ROOT, command
from tests.training.runs import read_lines

pytestmark = pytest.mark.dist
BASE = ROOT / "launch" / "demo_base"


def learn(shards: Path, out: Path, side: int, batch: int, steps: int, **evaluation: object) -> Path:
    """Train the base in full on `batch` samples, `steps` times on all of them; return the merged model."""
    recipe = out.with_suffix(".yaml")
    content = {
        "model": {"base": str(BASE), "dtype": "float32", "train": ["vision", "merger", "language"]},
        "lora": None,
        "data": {"train": str(shards), "image_size": side, "micro_batch_size": batch, "workers": 0},
        "optim": {"learning_rate": 3e-3, "warmup_ratio": 0.1, "schedule": "cosine"},
        "train": {"epochs": steps, "grad_accum_steps": 1, "log_every_steps": 10, "output_dir": str(out)},
        "tracking": {"mode": "disabled"},
    }
    if evaluation:
        content["data"]["validation"] = str(shards)
        content["eval"] = evaluation
    recipe.write_text(yaml.safe_dump(content))
    command("train", recipe)
    command("merge", out, "--base", BASE, "--out", out.parent / "merged")
    return out.parent / "merged"


def test_boxes_of_real_photos_train_and_are_evaluated(
    shared_data: Path, tiny_base: Path, tmp_path: Path
) -> None:
    coco = shared_data / "coco"
    command(
        "shards", "pack", "--source", "grounding", "--instances", coco / "instances.json", "--images",
        coco / "images", "--out", tmp_path / "shards",
    )  # fmt: skip
    report = json.loads(command("shards", "verify", tmp_path / "shards", "--json").stdout.splitlines()[-1])
    assert (report["samples"], report["bad"]) == (921, [])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{base: {tiny_base}, dtype: float32}}\ndata: {{train: {tmp_path / 'shards'}}}\n"
    )
    command(
        "train", recipe, "train.max_steps=2", "train.grad_accum_steps=1", "train.log_every_steps=1", "data.workers=0",
        "data.micro_batch_size=4", f"train.output_dir={tmp_path / 'run'}", "tracking.mode=disabled",
    )  # fmt: skip
    lines = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert [line["bad_samples"] for line in lines] == [0, 0] and all(
        line["target_tokens"] > 40 for line in lines
    )
    said = command(
        "evaluate", tiny_base, "--task", "grounding", "--shards", tmp_path / "shards", "--limit", "4",
        "--image-size", "280", "--max-new-tokens", "4", "--out", tmp_path / "evaluation", "--json",
    )  # fmt: skip
    numbers = json.loads(said.stdout.splitlines()[-1])
    assert numbers["n"] == 4 and numbers["boxes"] >= 4 and numbers["recall"] == 0


@pytest.mark.slow
def test_recall_of_boxes_rises(tmp_path: Path) -> None:
    command("synthetic", "scenes", "--out", tmp_path / "scenes", "--count", "10", "--size", "112")
    train = tmp_path / "scenes" / "train"
    command(
        "shards", "pack", "--source", "grounding", "--instances", train / "instances.json", "--images",
        train / "images", "--task", "name_to_boxes", "--out", tmp_path / "shards",
    )  # fmt: skip
    run = tmp_path / "run"
    merged = learn(
        tmp_path / "shards", run, side=112, batch=20, steps=140, every_steps=140, max_new_tokens=40, images=20,
        scores=[],
    )  # fmt: skip
    said = command(
        "evaluate", BASE, "--merged", merged, "--task", "grounding", "--shards", tmp_path / "shards",
        "--max-new-tokens", "40", "--out", tmp_path / "evaluation", "--json",
    )  # fmt: skip
    numbers = json.loads(said.stdout.splitlines()[-1])
    assert numbers["boxes"] == 20
    assert numbers["recall_before"] < 0.1 and numbers["recall"] > 0.6
    assert numbers["mean_iou"] > 0.8

    # the same during training, and in the run's report
    scored = [line for line in read_lines(run / "metrics.jsonl") if "box_recall" in line]
    assert [line["step"] for line in scored] == [0, 140]
    assert scored[0]["box_recall"] < 0.1 and scored[1]["box_recall"] == pytest.approx(
        numbers["recall"], abs=0.1
    )
    command("report", run)
    page = (run / "report.html").read_text()
    assert "Boxes of validation photos at IoU 0.5" in page and page.count('<img src="data:image') == 20


@pytest.mark.slow
def test_pages_are_read_to_the_last_word(tmp_path: Path) -> None:
    command(
        "synthetic", "pages", "--out", tmp_path / "pages", "--count", "6", "--words", "20", "--width", "140",
        "--height", "140",
    )  # fmt: skip
    train = tmp_path / "pages" / "train"
    command(
        "shards", "pack", "--source", "coco", "--captions", train / "captions.json", "--images", train / "images",
        "--prompt", "Read the page.", "--out", tmp_path / "shards",
    )  # fmt: skip
    merged = learn(tmp_path / "shards", tmp_path / "run", side=140, batch=6, steps=150)
    said = command(
        "evaluate", merged, "--shards", tmp_path / "shards", "--max-new-tokens", "250", "--scores", "none",
        "--scored", "whole", "--out", tmp_path / "evaluation", "--json",
    )  # fmt: skip
    assert json.loads(said.stdout.splitlines()[-1])["exact_match"] >= 5 / 6
