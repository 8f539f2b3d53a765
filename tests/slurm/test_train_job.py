"""slurm/train.sbatch on two hosts: preempted, crashed, wrong, cancelled."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.lab import Lab, wait_for
from tests.slurm.runs import CPU, TWO_NODES, write_lab_recipe
from tests.training.forked import ForkedRanks, train
from tests.training.runs import ledger, losses, read_lines

pytestmark = [pytest.mark.slurm, pytest.mark.dist]

PATIENCE = 150  # seconds for a start, on a busy machine


@pytest.fixture(scope="module")
def straight(scenes_base: Path, scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing breaks, on one rank."""
    folder = tmp_path_factory.mktemp("straight")
    recipe = write_lab_recipe(folder / "run.yaml", scenes_base, scene_shards, 1)
    run = ForkedRanks(train, (str(recipe),), 1, folder / "log")
    assert run.wait(PATIENCE) == [0], run.said()[-4000:]
    return folder / "run"


def last_step(run: Path) -> int:
    return max((line["step"] for line in read_lines(run / "metrics.jsonl")), default=0)


def starts(run: Path, job: str) -> list[dict[str, Any]]:
    path = run / "logs" / f"{job}.json"
    return json.loads(path.read_text())["starts"] if path.exists() else []


def submit(lab: Lab, recipe: Path, *overrides: str, log: Path, env: dict[str, str] | None = None) -> str:
    options = [*TWO_NODES, f"--output={log}"]
    return lab.submit("slurm/train.sbatch", recipe, *overrides, options=options, env={**CPU, **(env or {})})


def test_a_job_that_is_preempted_three_times_ends_as_the_unbroken_run(
    lab: Lab, scenes_base: Path, scene_shards: Path, straight: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "job.log"
    recipe = write_lab_recipe(tmp_path / "run.yaml", scenes_base, scene_shards, 2)
    job = submit(lab, recipe, log=log, env={"QWENVL_SCRATCH": str(lab.nodes["node1"].scratch)})

    def trains_in(start: int, steps: int = 2) -> int:
        box: list[int] = []

        def reached() -> bool:
            if len(starts(run, job)) == start + 1:
                box.append(last_step(run))
            return (
                bool(box) and box[-1] >= box[0] + steps and bool(lab.nodes["node2"].pids("qwenvl_dist train"))
            )

        wait_for(reached, PATIENCE, lambda: f"start {start}: {log.read_text()}", 0.1)
        return box[-1]

    # A job of a partition that comes first wants the nodes.
    trains_in(0)
    comment = re.compile(r"step \d+, epoch \d\.\d\d, loss \d\.\d+, [\d.]+ samples/s, start 1, 2 nodes")
    wait_for(lambda: comment.match(lab.run("squeue", "-h", "-j", job, "-o", "%k")), 20, log.read_text)
    urgent = lab.run(
        "sbatch", "--parsable", "-p", "urgent", "--nodes=3", "--exclusive", "--wrap=true"
    ).strip()
    lab.wait(urgent, PATIENCE)
    # The warning of a time limit.
    trains_in(1)
    lab.run("scancel", "--batch", "--signal=USR1", job)
    # Requeued from outside without a warning, as Slurm itself does it when a node dies.
    trains_in(2)
    lab.run("scontrol", "requeue", job)
    ended = lab.wait(job, PATIENCE)

    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "3"), (
        log.read_text()
    )
    assert [start["result"] for start in starts(run, job)] == ["preempted", "preempted", None, "finished"]
    assert ledger(run) == ledger(straight)
    assert losses(run) == pytest.approx(losses(straight), rel=1e-4)
    for node in ("node1", "node2"):
        assert [(run / "logs" / f"{job}.{restart}.{node}.log").is_file() for restart in range(4)] == [
            True
        ] * 4
    assert not list(lab.folder.glob("scratch/*")), "the nodes' scratch is their own"
