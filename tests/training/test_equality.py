"""Ranks, accumulation and ZeRO stage do not change what is learned; neither do a kill and a resume."""

from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import (
    adapter,
    assert_same_adapter,
    ledger,
    losses,
    read_lines,
    train,
    write_recipe,
)

pytestmark = pytest.mark.dist
TOLERANCE = 2e-5  # float32 sums in another order, after six steps of Adam
SPLITS = {  # world size x accumulation is always four micro-batches of two samples
    "one-rank-zero2": (1, 4, 2),
    "two-ranks-zero2": (2, 2, 2),
    "two-ranks-zero3": (2, 2, 3),
    "four-ranks-zero3": (4, 1, 3),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, scenes_base: Path, scene_shards: Path):
    """Start each split once, on demand, and keep its run folder."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str) -> Path:
        out = folder / name
        if not out.exists():
            world, accumulation, stage = SPLITS[name]
            recipe = write_recipe(
                folder / f"{name}.yaml",
                scenes_base,
                scene_shards,
                out,
                stage,
                train={"grad_accum_steps": accumulation},
            )
            # What all others are compared with is started as a launcher does, and no fork.
            train(recipe, world, fresh=name == "one-rank-zero2")
        return out

    return run


@pytest.mark.parametrize("name", [name for name in SPLITS if name != "one-rank-zero2"])
def test_any_split_of_a_global_batch_learns_the_same(runs, name: str) -> None:
    straight, other = runs("one-rank-zero2"), runs(name)
    assert ledger(other) == ledger(straight)
    assert losses(other) == pytest.approx(losses(straight), rel=TOLERANCE)
    assert_same_adapter(adapter(straight, 6), adapter(other, 6), 5e-5)


def test_full_fine_tuning_of_named_parts_resumes_and_splits_alike(
    tmp_path: Path, scenes_base: Path, scene_shards: Path
) -> None:
    full = {
        "lora": None,
        "model": {"train": ["vision", "merger", "language"]},
        "optim": {"weight_decay": 0.1},
    }
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(write_recipe(tmp_path / "a.yaml", scenes_base, scene_shards, straight, 2, **full), 1)
    halves: dict[str, Any] = {"train": {"grad_accum_steps": 2}}
    recipe = write_recipe(tmp_path / "b.yaml", scenes_base, scene_shards, stopped, 3, **full, **halves)
    with pytest.raises(AssertionError, match="-9"):
        train(recipe, 2, kill_at_step=4, kill_rank=1)
    train(write_recipe(tmp_path / "c.yaml", scenes_base, scene_shards, stopped, 2, **full, **halves), 2)
    assert losses(stopped) == pytest.approx(losses(straight), rel=TOLERANCE)
    left, right = adapter(straight, 6), adapter(stopped, 6)
    assert any(".visual." in name for name in left) and any("embed_tokens" in name for name in left)
    # Adam divides by the root of tiny second moments: rounding shows where gradients are next to nothing.
    for name, tensor in left.items():
        difference = (right[name] - tensor).norm() / tensor.norm().clamp_min(1e-3)
        assert difference < 5e-3, f"{name}: {difference}"


def test_losses_fall(runs) -> None:
    values = losses(runs("one-rank-zero2"))
    assert len(values) == 6
    assert values[-1] < values[0]


def test_the_first_line_of_a_run_says_what_its_start_took(runs) -> None:
    first, *others = read_lines(runs("one-rank-zero2") / "metrics.jsonl")
    seconds = first["startup_seconds"]
    parts = {"imports", "join", "preflight", "data", "model", "zero", "resume", "first_batch", "first_step"}
    assert set(seconds) == parts | {"total"}
    assert all(seconds[part] > 0 for part in parts)
    assert seconds["total"] == pytest.approx(sum(seconds[part] for part in parts))
    assert not any("startup_seconds" in line for line in others)


@pytest.mark.parametrize(
    ("killed", "world", "accumulation", "stage"),
    [
        pytest.param("two-ranks-zero2", 2, 2, 3, id="zero3-instead-of-zero2"),
        pytest.param("two-ranks-zero3", 1, 4, 2, id="one-rank-zero2-instead-of-two-zero3"),
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    runs,
    tmp_path: Path,
    scenes_base: Path,
    scene_shards: Path,
    killed: str,
    world: int,
    accumulation: int,
    stage: int,
) -> None:
    straight = runs("one-rank-zero2")
    old_world, old_accumulation, old_stage = SPLITS[killed]
    out = tmp_path / "run"
    first = write_recipe(
        tmp_path / "first.yaml",
        scenes_base,
        scene_shards,
        out,
        old_stage,
        train={"grad_accum_steps": old_accumulation},
    )
    with pytest.raises(AssertionError, match="-9"):
        train(first, old_world, kill_at_step=4, kill_rank=0)
    assert not (out / "checkpoints" / "step-00000006").exists()
    second = write_recipe(
        tmp_path / "second.yaml",
        scenes_base,
        scene_shards,
        out,
        stage,
        train={"grad_accum_steps": accumulation},
    )
    train(second, world)
    assert ledger(out) == ledger(straight)
    assert losses(out) == pytest.approx(losses(straight), rel=TOLERANCE)
    assert_same_adapter(adapter(straight, 6), adapter(out, 6), 5e-5)
    metrics = read_lines(out / "metrics.jsonl")
    assert [line["step"] for line in metrics if "startup_seconds" in line] == [1, 4]  # one a launch
    discarded = read_lines(out / "discarded" / "metrics.jsonl")
    assert discarded and all(line["step"] > 3 for line in discarded)
