"""A rank that is killed, stopped, asleep or orphaned: who ends, how soon, and what is said about it."""

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenvl_dist.heartbeat import collective_seconds
from tests.training import forked
from tests.training.forked import ForkedRanks
from tests.training.runs import read_lines, write_recipe

pytestmark = [pytest.mark.dist, pytest.mark.timeout(200)]

TIMEOUT_SECONDS = 10  # the least that a recipe takes
START_SECONDS = 90  # of patience
HOST = socket.gethostname()


def train(recipe: str, trouble: str) -> None:
    """One rank: train into the trouble that rank 1 has in step 3."""
    if trouble and os.environ["RANK"] == "1":
        from qwenvl_dist.training import loop

        step = loop.train_step

        def troubled(state: Any, *arguments: Any) -> Any:
            if state.progress.step == 2:
                print("time-outs of groups:", sorted(time_outs()), flush=True)
                if trouble == "sleep":
                    time.sleep(1000)
                raise MemoryError("no room for 3 GiB")
            return step(state, *arguments)

        loop.train_step = troubled
    forked.train(recipe)


def time_outs() -> list[float]:
    """Seconds of every process group that there is."""
    import torch
    from torch.distributed.distributed_c10d import _world

    backends = [group._get_backend(torch.device("cpu")) for group in _world.pg_map]
    return [backend.options._timeout.total_seconds() for backend in backends]


def launch(recipe: str, children: str) -> None:
    """A launcher of one rank: it writes the rank's process id and waits."""
    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    child = os.fork()
    if child == 0:
        try:
            forked.train(recipe)
        finally:
            os._exit(9)
    Path(children).write_text(str(child))
    os.waitpid(child, 0)


@pytest.fixture
def start(tmp_path: Path, scenes_base: Path, scene_shards: Path) -> Any:
    """Start a long run on so many ranks; all are killed at the end."""
    recipe = write_recipe(
        tmp_path / "r.yaml", scenes_base, scene_shards, tmp_path / "run",
        data={"micro_batch_size": 1},
        train={"max_steps": 100_000, "epochs": 100_000, "grad_accum_steps": 1, "timeout_seconds": TIMEOUT_SECONDS,
               "checkpoint_every_steps": 1_000_000},
    )  # fmt: skip
    started: list[ForkedRanks] = []

    def start(target: Callable[..., None], world: int, *arguments: str) -> ForkedRanks:
        variables = {"QWENVL_OUTCOME_DIR": str(tmp_path / "outcomes")}
        ranks = ForkedRanks(target, (str(recipe), *arguments), world, tmp_path / "log", variables)
        started.append(ranks)
        return ranks

    yield start
    for ranks in started:
        for process in ranks.ranks:
            process.kill()  # one that is stopped too
            process.wait()


def wait_for_step(run: Path, step: int, ranks: ForkedRanks) -> None:
    deadline = time.monotonic() + START_SECONDS
    while max((line["step"] for line in read_lines(run / "metrics.jsonl")), default=0) < step:
        assert time.monotonic() < deadline and not any(ranks.codes), ranks.said()[-4000:]
        time.sleep(0.02)


def seconds_until(happened: Callable[[], bool], limit: float) -> float:
    began = time.monotonic()
    while not happened():
        assert time.monotonic() - began < limit, f"not within {limit} s"
        time.sleep(0.02)
    return time.monotonic() - began


def outcomes(tmp_path: Path) -> dict[int, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted((tmp_path / "outcomes").glob("rank-*.json"))]
    return {record["rank"]: record for record in found}


@pytest.mark.parametrize(
    ("number", "limit", "said"),
    [
        (signal.SIGSTOP, TIMEOUT_SECONDS + 1, "rank 1 on {host} did not answer"),
        (signal.SIGKILL, 6, "rank 1 on {host} did not answer any more"),
    ],
)
def test_a_rank_that_is_gone_ends_the_others_with_its_name(
    tmp_path: Path, start: Any, number: signal.Signals, limit: float, said: str
) -> None:
    ranks = start(train, 3, "")
    wait_for_step(tmp_path / "run", 2, ranks)
    os.kill(ranks.ranks[1].pid, number)
    seconds = seconds_until(lambda: None not in (ranks.codes[0], ranks.codes[2]), limit)
    print(f"{number.name}: the others were gone after {seconds:.1f} s")
    assert (ranks.codes[0], ranks.codes[2]) == (1, 1)
    ends = outcomes(tmp_path)
    assert set(ends) == {0, 2}
    for end in ends.values():
        assert end["outcome"] == "failed" and said.format(host=HOST) in end["reason"]
        assert end["step"] >= 2 and end["host"] == HOST
    errors = re.findall(r"error: (.*)", ranks.said())
    assert errors and all(said.format(host=HOST) in error for error in errors), ranks.said()[-4000:]
    assert "Traceback" not in ranks.said()


@pytest.mark.parametrize(
    ("trouble", "limit", "said"),
    [
        (
            "sleep",
            TIMEOUT_SECONDS + 1,
            "rank 1 on {host} did not come to an exchange that other ranks waited for",
        ),
        ("memory", 6, "rank 1 on {host} failed: MemoryError: no room for 3 GiB"),
    ],
)
def test_a_rank_that_does_not_come_is_named_by_the_others(
    tmp_path: Path, start: Any, trouble: str, limit: float, said: str
) -> None:
    ranks = start(train, 3, trouble)
    wait_for_step(tmp_path / "run", 2, ranks)
    seconds = seconds_until(lambda: None not in ranks.codes, limit)  # the one that sleeps too
    print(f"{trouble}: all were gone after {seconds:.1f} s")
    ends = outcomes(tmp_path)
    assert said.format(host=HOST) in ends[0]["reason"] and said.format(host=HOST) in ends[2]["reason"]
    assert ends[1]["outcome"] == "failed"
    # The world, DeepSpeed's clone of it, and the host's own group.
    assert f"time-outs of groups: {[collective_seconds(TIMEOUT_SECONDS)] * 3}" in ranks.said()


def test_a_rank_whose_launcher_is_killed_ends_with_its_loader_workers(tmp_path: Path, start: Any) -> None:
    child = tmp_path / "child"
    launcher = start(launch, 1, str(child))
    wait_for_step(tmp_path / "run", 2, launcher)
    rank = int(child.read_text())
    workers = [int(pid) for pid in Path(f"/proc/{rank}/task/{rank}/children").read_text().split()]
    assert workers
    os.kill(launcher.ranks[0].pid, signal.SIGKILL)
    seconds = seconds_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in (rank, *workers)), 5)
    print(f"orphaned: gone after {seconds:.1f} s")
    assert re.search(
        r"process \d+ \(.+\), which had started this rank, is gone", outcomes(tmp_path)[0]["reason"]
    )
