"""Conversations with answers that are not to be learned, from their file to a run's first steps."""

import json
from pathlib import Path

import pytest

from qwenvl_dist.__main__ import main
from qwenvl_dist.data.index import Manifest
from tests.made_shards import jpeg
from tests.ranks import run_ranks
from tests.training.runs import TIMEOUT, losses, read_lines, write_recipe

pytestmark = pytest.mark.dist

FIRST, LAST = "a blue square above a green circle", "a red circle"


def test_two_steps_learn_the_other_answers_alone(tmp_path: Path, scenes_base: Path, scenes_processor) -> None:
    recipes = []
    for name, loss in (("masked", False), ("all", None)):
        (tmp_path / "a.jpg").write_bytes(jpeg(1))
        record = {
            "messages": [
                {"role": "user", "content": "<image>COCO Yes:"},
                {"role": "assistant", "content": FIRST, "loss": loss},
                {"role": "user", "content": "a circle"},
                {"role": "assistant", "content": LAST},
            ],
            "images": ["a.jpg"],
        }
        path, shards = tmp_path / f"{name}.jsonl", tmp_path / f"{name}-shards"
        path.write_text(f"{json.dumps(record)}\n" * 4)
        assert (
            main(["shards", "pack", "--source", "messages", "--input", str(path), "--out", str(shards)]) == 0
        )
        recipes.append(
            write_recipe(
                tmp_path / f"{name}.yaml", scenes_base, shards, tmp_path / name,
                data={"workers": 0}, lora={"dropout": 0.0},
                train={"max_steps": 2, "epochs": 1, "grad_accum_steps": 1, "checkpoint_every_steps": 2},
            )
        )  # fmt: skip
    masked, plain = (Manifest.load(tmp_path / f"{name}-shards") for name in ("masked", "all"))
    assert masked.fingerprint != plain.fingerprint  # a resume on the other one is refused
    run_ranks("tests.training.runs:run_several", 1, timeout=TIMEOUT, recipes=[str(path) for path in recipes])

    def tokens(*answers: str) -> int:
        return sum(len(scenes_processor.tokenizer(f"{each}<|im_end|>")["input_ids"]) for each in answers)

    for name, answers in (("masked", (LAST,)), ("all", (FIRST, LAST))):
        lines = [line for line in read_lines(tmp_path / name / "metrics.jsonl") if "loss" in line]
        assert [line["target_tokens"] for line in lines] == [2 * tokens(*answers)] * 2, name  # of two samples
        assert read_lines(tmp_path / name / "bad_samples.jsonl") == []
    first, other = losses(tmp_path / "masked"), losses(tmp_path / "all")
    assert len(first) == 2 and first[1] < first[0] and first[0] != other[0]
