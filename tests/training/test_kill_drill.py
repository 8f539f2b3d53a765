"""A run on the real photos that is killed again and again, in worlds of other sizes, ends as the unbroken one."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ranks import ROOT, free_port
from tests.training.runs import ledger, losses, train, write_recipe

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(2400)]

KILLS = 20
GLOBAL_BATCH = 12  # the same in every world, so that the steps must be the same too
PATIENCE = 120  # seconds from a start to its first step


def start(recipe: Path, world: int, log: Path) -> list[subprocess.Popen]:
    """Start every rank as a process group of its own, loader workers included."""
    port = str(free_port())
    command = [sys.executable, "-m", "qwenvl_dist", "train", str(recipe)]
    command += [f"train.grad_accum_steps={GLOBAL_BATCH // 2 // world}"]
    ranks = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
        env = {**os.environ, **rendezvous, **{name: str(value) for name, value in place.items()}}
        with log.open("a") as stream:
            ranks.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=env, stdout=stream, stderr=stream, start_new_session=True
                )
            )
    return ranks


def kill(ranks: list[subprocess.Popen], order: list[int]) -> None:
    """Send SIGKILL to all ranks and their workers, one rank after another."""
    for number in order:
        if ranks[number].poll() is None:
            os.killpg(ranks[number].pid, signal.SIGKILL)
    for process in ranks:
        process.wait()


def test_twenty_kills_in_changing_worlds_leave_the_ledger_of_the_unbroken_run(
    photo_shards: Path, scenes_base: Path, tmp_path: Path
) -> None:
    sections: dict = {
        "data": {
            "workers": 2,
            "micro_batch_size": 2,
        },  # each worker prefetches 2 x accumulation micro-batches
        "lora": {"dropout": 0.1},
        "train": {"max_steps": None, "epochs": 3, "checkpoint_every_steps": 2, "log_every_steps": 1},
    }
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    sections["train"]["grad_accum_steps"] = GLOBAL_BATCH // 2
    train(write_recipe(tmp_path / "straight.yaml", scenes_base, photo_shards, straight, **sections), 1)
    expected = ledger(straight)
    assert sum(map(len, expected.values())) == 3 * 290

    recipe = write_recipe(tmp_path / "broken.yaml", scenes_base, photo_shards, broken, **sections)
    metrics, log = broken / "metrics.jsonl", tmp_path / "broken.log"
    chance = random.Random(0)
    kills, mid_run = 0, 0
    while kills < KILLS:
        world = chance.choice([1, 2, 3])
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        ranks = start(recipe, world, log)
        deadline = time.monotonic() + PATIENCE
        impatient = chance.random() < 0.15  # killed while it still starts
        while not impatient and (not metrics.exists() or metrics.stat().st_mtime_ns == before):
            codes = [rank.poll() for rank in ranks]
            assert not any(codes) and time.monotonic() < deadline, (codes, log.read_text()[-4000:])
            if all(code == 0 for code in codes):
                break
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 6 if impatient else 2.5))
        finished = all(rank.poll() == 0 for rank in ranks)
        kill(ranks, chance.sample(range(world), world))
        assert not finished, f"the run was over after {kills} kills: {log.read_text()[-2000:]}"
        kills += 1
        mid_run += not impatient
    assert mid_run >= KILLS // 2
    ranks = start(recipe, 2, log)
    assert [rank.wait(timeout=600) for rank in ranks] == [0, 0], log.read_text()[-4000:]
    assert ledger(broken) == expected
    assert losses(broken) == pytest.approx(losses(straight), rel=1e-4)
