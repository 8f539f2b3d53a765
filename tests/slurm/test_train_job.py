"""slurm/train.sbatch on two hosts: preempted, crashed, wrong, cancelled."""

import os
import re
import signal
from pathlib import Path

import pytest

from tests.slurm.lab import Lab, wait_for
from tests.slurm.runs import CPU, PATIENCE, RANK, TWO_NODES, last_step, starts, write_lab_recipe
from tests.training.runs import ledger, losses

pytestmark = [pytest.mark.slurm, pytest.mark.dist]


def submit(lab: Lab, recipe: Path, *overrides: str, log: Path, env: dict[str, str] | None = None) -> str:
    options = [*TWO_NODES, f"--output={log}"]
    return lab.submit("slurm/train.sbatch", recipe, *overrides, options=options, env={**CPU, **(env or {})})


def test_a_job_that_is_preempted_three_times_ends_as_the_unbroken_run(
    lab: Lab, scenes_base: Path, scene_shards: Path, straight: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "job.log"
    recipe = write_lab_recipe(tmp_path / "run.yaml", scenes_base, scene_shards)
    scratch = lab.nodes["node1"].scratch
    job = submit(lab, recipe, log=log, env={"QWENVL_SCRATCH": str(scratch)})

    def trains_in(start: int) -> None:
        seen: list[int] = []

        def reached() -> bool:
            if len(starts(run, job)) == start + 1:
                seen.append(last_step(run))
            return bool(seen) and seen[-1] >= seen[0] + 2

        wait_for(reached, PATIENCE, lambda: f"start {start}: {log.read_text()}", 0.05)

    # A job of a partition that comes first wants the nodes.
    trains_in(0)
    assert (
        len(lab.nodes["node2"].run("ls", scratch).split()) > 4
    )  # shards and indexes, on the node's own disk
    urgent = ["-p", "urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true"]
    lab.wait(lab.run("sbatch", "--parsable", *urgent).strip(), PATIENCE)
    # The warning of a time limit.
    trains_in(1)
    lab.run("scancel", "--batch", "--signal=USR1", job)
    # Requeued from outside without a warning, as Slurm itself does it when a node dies.
    trains_in(2)
    lab.run("scontrol", "requeue", job)
    comment = re.compile(r"step \d+, epoch \d+\.\d\d, loss \d\.\d+, [\d.]+ samples/s, start 4, 2 nodes")
    wait_for(lambda: comment.match(lab.run("squeue", "-h", "-j", job, "-o", "%k")), PATIENCE, log.read_text)
    ended = lab.wait(job, PATIENCE)

    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "3"), (
        log.read_text()
    )
    results = [start["result"] for start in starts(run, job)]
    # Requeued from outside, a start ends before it can say so, or just after its ranks have seen SIGTERM.
    assert [*results[:2], *results[3:]] == ["preempted", "preempted", "finished"]
    assert results[2] in (None, "preempted")
    assert ledger(run) == ledger(straight)
    assert losses(run) == pytest.approx(losses(straight), rel=1e-4)
    for node in ("node1", "node2"):
        assert all((run / "logs" / f"{job}.{restart}.{node}.log").is_file() for restart in range(4))


def test_a_crash_is_retried_after_progress_and_a_crash_loop_stops_with_the_reason(
    lab: Lab, scenes_base: Path, scene_shards: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "job.log"
    recipe = write_lab_recipe(tmp_path / "run.yaml", scenes_base, scene_shards)
    job = submit(lab, recipe, "train.resume=never", log=log)
    killed = lab.nodes["node2"]

    wait_for(lambda: any((run / "checkpoints").glob("step-*")), PATIENCE, log.read_text)
    (rank,) = killed.pids(RANK)
    os.kill(rank, signal.SIGKILL)
    wait_for(lambda: len(starts(run, job)) == 2, PATIENCE, log.read_text)
    lines = log.read_text().splitlines()
    assert f"see the log of the failing rank: {run}/logs/{job}.0.node2.log" in lines
    assert any(line.startswith("rank 1 on node2: ended by SIGKILL") for line in lines), lines

    # This time before it has done anything, on both nodes.
    nodes = [lab.nodes["node1"], killed]
    wait_for(lambda: all(node.pids(RANK) for node in nodes), PATIENCE, log.read_text)
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    for node in nodes:
        os.kill(node.pids(RANK)[0], signal.SIGKILL)
    ended = lab.wait(job, PATIENCE)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "1")
    *_, why, last = log.read_text().splitlines()
    assert (
        why == "not started again: this start crashed before it wrote a checkpoint, and so would the next one"
    )
    assert re.fullmatch(
        rf"see the log of the (failing rank|first node): {run}/logs/{job}\.1\.node\d\.log", last
    )
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before
    assert not (run / "discarded").exists(), (
        "the second start went on, whatever train.resume said of the first"
    )


def test_a_wrong_recipe_ends_at_once_and_a_cancelled_job_stays_so(
    lab: Lab, scenes_base: Path, scene_shards: Path, tmp_path: Path
) -> None:
    recipe = write_lab_recipe(tmp_path / "run.yaml", scenes_base, scene_shards)
    wrong = submit(lab, recipe, "train.global_batch_size=5", log=tmp_path / "wrong.log")
    ended = lab.wait(wrong, 30)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0")
    assert "error: train.global_batch_size = 5: must be a multiple" in (tmp_path / "wrong.log").read_text()

    job = submit(lab, recipe, log=tmp_path / "job.log")
    wait_for(lambda: lab.nodes["node2"].pids(RANK), PATIENCE, (tmp_path / "job.log").read_text)
    lab.run("scancel", job)
    wait_for(lambda: not lab.run("squeue", "-h").strip(), 30, lambda: lab.run("squeue"))
    ended = lab.job(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    assert not any(node.pids("qwenvl_dist") for node in lab.nodes.values())


def test_a_job_looks_before_it_trains_and_ends_when_something_is_wrong(
    lab: Lab, scenes_base: Path, scene_shards: Path, tmp_path: Path
) -> None:
    recipe = write_lab_recipe(tmp_path / "run.yaml", scenes_base, scene_shards)
    looks = {"QWENVL_PREFLIGHT": "all"}
    wrong = submit(lab, recipe, "lora.target_modules=[q_prj]", log=tmp_path / "wrong.log", env=looks)
    ended = lab.wait(wrong, PATIENCE)
    said = (tmp_path / "wrong.log").read_text()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "0"), said
    assert "preflight failed, nothing was trained" in said
    (log,) = (tmp_path / "run" / "logs").glob(f"*{wrong}*node1.log")
    assert (
        "fail    adapter_targets        lora.target_modules: 'q_prj' matches no linear layer"
        in log.read_text()
    )
    assert not (tmp_path / "run" / "checkpoints").exists()

    looks = {"QWENVL_PREFLIGHT": "storage links"}
    job = submit(lab, recipe, "train.max_steps=4", log=tmp_path / "job.log", env=looks)
    ended = lab.wait(job, PATIENCE)
    (log,) = (tmp_path / "run" / "logs").glob(f"*{job}*node1.log")
    assert ended["JobState"] == "COMPLETED", log.read_text()
    assert "1 links between nodes: median" in log.read_text()
    assert last_step(tmp_path / "run") == 4

    again = submit(lab, recipe, "train.max_steps=6", log=tmp_path / "again.log", env=looks)
    lab.wait(again, PATIENCE)
    (log,) = (tmp_path / "run" / "logs").glob(f"*{again}*node1.log")
    assert "links between nodes" not in log.read_text(), "a run with a checkpoint is not looked at again"
    assert last_step(tmp_path / "run") == 6
