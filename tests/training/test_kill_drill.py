"""A run that is killed again and again ends as the unbroken one; `--kills` says how often."""

import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenvl_dist.checkpoints import manifest as manifests
from tests.training import forked
from tests.training.forked import ForkedRanks
from tests.training.runs import ledger, losses, read_lines, train, write_recipe

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(3600)]

PATIENCE = 120  # seconds from a start to its first step


def start(recipe: Path, world: int, log: Path, override: str) -> ForkedRanks:
    return ForkedRanks(forked.train, (str(recipe), override), world, log)


def last_step(run: Path) -> int:
    return max((line["step"] for line in read_lines(run / "metrics.jsonl")), default=0)


def wait_until(happened: Callable[[], Any], run: ForkedRanks) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert not any(run.codes) and time.monotonic() < deadline, (run.codes, run.said()[-4000:])
        time.sleep(0.001)


class Watch:
    """What must hold for a run folder after every kill."""

    def __init__(self, folder: Path) -> None:
        self.checkpoints = folder / "checkpoints"
        self.newest = 0  # the step of the newest checkpoint

    def check(self, run: ForkedRanks) -> bool:
        """Check what a killed start has left, and where it had gone on from; tell whether it was killed in a save."""
        said = run.said()
        resumed = re.search(r"resumed from \S+/step-(\d+):", said)
        if resumed:
            assert int(resumed[1]) == self.newest
        elif re.search(r"^ready after", said, re.MULTILINE):
            assert self.newest == 0
        written = [int(step) for step in re.findall(r"step (\d+): checkpoint written", said)]
        found = manifests.step_folders(self.checkpoints)
        for folder in found:
            manifests.verify_step(folder)
        newest = int(found[0].name.removeprefix("step-")) if found else 0
        assert newest >= max([self.newest, *written]), "a completed checkpoint was lost"
        self.newest = newest
        return any(self.checkpoints.glob(".step-*"))


@pytest.mark.parametrize("stage", [2, 3])
def test_no_kill_costs_more_than_the_steps_since_the_last_checkpoint(
    stage: int, scene_shards: Path, scenes_base: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kills = request.config.getoption("--kills") // 2  # under each stage
    sections: dict[str, Any] = {
        "data": {"workers": 1, "micro_batch_size": 1},
        "optim": {"schedule": "constant", "warmup_ratio": 0.0, "learning_rate": 1e-3},
        "train": {
            "max_steps": None, "epochs": 1000, "grad_accum_steps": 1, "checkpoint_every_steps": 2,
            "keep_checkpoints": 2,
        },
    }  # fmt: skip
    broken, straight, log = tmp_path / "broken", tmp_path / "straight", tmp_path / "log"
    recipe = write_recipe(tmp_path / "broken.yaml", scenes_base, scene_shards, broken, stage, **sections)
    watch, chance = Watch(broken), random.Random(stage)
    aims = ["save", "step", "save-in-background", "step", "start", "save"]
    figures, began, start_seconds = Counter(kills=kills), time.monotonic(), 5.0
    for number in range(kills):
        aim = aims[number % len(aims)]
        in_background = aim == "save-in-background" or chance.random() < 0.5
        before, started = last_step(broken), time.monotonic()
        run = start(recipe, 2, log, f"train.checkpoint_async={str(in_background).lower()}")
        if aim == "start":
            time.sleep(chance.uniform(0, start_seconds))
        else:
            wait_until(lambda: "ready after" in run.said(), run)  # noqa: B023
            if aim == "step":
                start_seconds = time.monotonic() - started
                wait_until(lambda: last_step(broken) > before, run)  # noqa: B023
                time.sleep(chance.uniform(0, 1))
            else:
                for _ in range(chance.randint(1, 3)):
                    wait_until(lambda: not any(watch.checkpoints.glob(".step-*.partial")), run)
                    wait_until(lambda: any(watch.checkpoints.glob(".step-*.partial")), run)
                time.sleep(chance.uniform(0, 0.05))
        run.kill(chance)
        figures[f"aimed at {aim}"] += 1
        figures["in a save"] += watch.check(run)
    end = last_step(broken) + 4
    run = start(recipe, 2, log, f"train.max_steps={end}")
    assert run.wait(PATIENCE) == [0, 0], run.said()[-4000:]
    watch.check(run)
    figures["steps"], figures["seconds"] = end, round(time.monotonic() - began)
    print(f"ZeRO-{stage}: {json.dumps(figures)}")

    sections["train"] |= {"max_steps": end, "checkpoint_every_steps": 10_000}
    train(write_recipe(tmp_path / "straight.yaml", scenes_base, scene_shards, straight, stage, **sections), 2)
    assert ledger(broken) == ledger(straight)
    assert losses(broken) == pytest.approx(losses(straight), rel=1e-5)


GLOBAL_BATCH = 12  # the same in every world, so that the steps must be the same too
EPOCHS = 5


def test_kills_in_changing_worlds_leave_the_ledger_of_the_unbroken_run(
    photo_shards: Path, scenes_base: Path, tmp_path: Path
) -> None:
    # Each worker prefetches 2 x accumulation micro-batches.
    sections: dict[str, Any] = {
        "data": {"workers": 2, "micro_batch_size": 2},
        "lora": {"dropout": 0.1},
        "train": {"max_steps": None, "epochs": EPOCHS, "checkpoint_every_steps": 2, "log_every_steps": 1},
    }
    straight, broken, log = tmp_path / "straight", tmp_path / "broken", tmp_path / "log"
    sections["train"]["grad_accum_steps"] = GLOBAL_BATCH // 2
    train(write_recipe(tmp_path / "straight.yaml", scenes_base, photo_shards, straight, **sections), 1)
    expected = ledger(straight)
    assert sum(map(len, expected.values())) == EPOCHS * 290

    recipe = write_recipe(tmp_path / "broken.yaml", scenes_base, photo_shards, broken, **sections)
    chance = random.Random(0)

    def start_in(world: int) -> ForkedRanks:
        return start(recipe, world, log, f"train.grad_accum_steps={GLOBAL_BATCH // 2 // world}")

    end, kills = len(expected), 0
    # The faster the machine, the sooner the run is over: the last kill leaves it some steps.
    while kills < 20 and (before := last_step(broken)) < end - 20:
        run = start_in(chance.choice([1, 2, 3]))
        if kills % 6 == 5:  # while it still starts
            time.sleep(chance.uniform(0, 3))
        else:
            wait_until(lambda: last_step(broken) > before, run)
            time.sleep(chance.uniform(0, 0.6))
        assert any(code is None for code in run.codes), f"over after {kills} kills: {run.said()[-2000:]}"
        run.kill(chance)
        kills += 1
    assert kills >= 10
    assert start_in(2).wait(600) == [0, 0], log.read_text()[-4000:]
    assert ledger(broken) == expected
    assert losses(broken) == pytest.approx(losses(straight), rel=1e-4)
