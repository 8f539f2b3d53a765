"""A run that goes on in other worlds: train.global_batch_size keeps its steps."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.training import forked
from tests.training.forked import ForkedRanks
from tests.training.runs import ledger, losses, read_lines, write_recipe

pytestmark = pytest.mark.dist
PATIENCE = 120  # seconds
SLOW_RANK = 1


def train_slowly(recipe: str, *overrides: str) -> None:
    """One rank: train; rank 1 takes 0.5 s more for each forward pass."""
    from qwenvl_dist.model.forward import Qwen2VLForCaptionLoss

    if os.environ["RANK"] == str(SLOW_RANK):
        forward = Qwen2VLForCaptionLoss.forward

        def slow(*arguments: Any, **options: Any) -> Any:
            time.sleep(0.5)
            return forward(*arguments, **options)

        Qwen2VLForCaptionLoss.forward = slow
    forked.train(recipe, *overrides)


def test_two_then_one_then_three_ranks_take_the_steps_of_two(
    tmp_path: Path, scenes_base: Path, scene_shards: Path
) -> None:
    sections: dict[str, Any] = {
        "data": {"micro_batch_size": 2},
        "optim": {"schedule": "constant", "warmup_ratio": 0.0, "learning_rate": 5e-3},
        "train": {"grad_accum_steps": None, "global_batch_size": 12, "max_steps": 9},
    }
    straight, elastic = tmp_path / "straight", tmp_path / "elastic"
    recipes = {
        out: write_recipe(tmp_path / f"{out.name}.yaml", scenes_base, scene_shards, out, **sections)
        for out in (straight, elastic)
    }

    def run(out: Path, target: Callable[..., None], world: int, max_steps: int) -> str:
        ranks = ForkedRanks(
            target, (str(recipes[out]), f"train.max_steps={max_steps}"), world, tmp_path / "log"
        )
        assert ranks.wait(PATIENCE) == [0] * world, ranks.said()[-4000:]
        return ranks.said()

    run(straight, forked.train, 2, 9)
    run(elastic, forked.train, 2, 3)
    assert "global batch of 12 samples: 1 ranks x 2 samples x 6 accumulated" in run(
        elastic, forked.train, 1, 6
    )
    said = run(elastic, train_slowly, 3, 9)
    assert ledger(elastic) == ledger(straight) and len(ledger(straight)) == 9
    assert losses(elastic) == pytest.approx(losses(straight), rel=1e-4)
    kept = yaml.safe_load((elastic / "recipe.yaml").read_text())["train"]
    assert (kept["global_batch_size"], kept["grad_accum_steps"]) == (12, None)

    # In the third world one rank keeps the others waiting.
    lines = read_lines(elastic / "metrics.jsonl")
    assert ["own_seconds" in line for line in lines] == [True] * 3 + [False] * 3 + [True] * 3
    assert lines[8]["slowest"]["rank"] == SLOW_RANK
    assert lines[8]["slowest"]["over_median"] > 0.2 and lines[8]["slowest"]["host"] == socket.gethostname()
    assert said.count(f"the others wait for rank {SLOW_RANK} on") >= 1
