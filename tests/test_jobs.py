"""What becomes of a job after a start: again or not, with which words."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from qwenvl_dist.errors import UserError
from qwenvl_dist.jobs import Job, JobHistory, Limits, Verdict, read_outcomes, status

TORCHRUN = """
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:00
  host      : node2
  rank      : 2 (local_rank: 0)
  exitcode  : -9 (pid: 42)
  error_file: <N/A>
"""


def begin(run: Path, restart: int = 0) -> JobHistory:
    history = JobHistory.load(run, Job("7", restart))
    history.more = history.begin(["node1", "node2"], 2)  # type: ignore[attr-defined]
    return history


def leave(history: JobHistory, rank: int, outcome: str, reason: str = "", step: int = 4) -> None:
    said = {"rank": rank, "host": "?", "outcome": outcome, "step": step, "reason": reason}
    (history.outcomes / f"rank-{rank:05d}.json").write_text(json.dumps(said))
    time.sleep(0.002)  # later than the one before, for the clock of the files


def save(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "MANIFEST.json").write_text("{}")


def end(history: JobHistory, *, code: int = 1, warned: bool = False, **limits: int) -> Verdict:
    return history.end(code, warned, Limits(**limits))


def test_a_job_is_finished_when_every_rank_says_so(tmp_path: Path) -> None:
    history = begin(tmp_path)
    for rank in range(4):
        leave(history, rank, "finished")
    verdict = end(history, code=0)
    assert (verdict.result, verdict.again, verdict.code) == ("finished", False, 0)
    assert verdict.lines == ["job 7, start 1 on node1, node2: finished after step 4"]

    history = begin(tmp_path)
    assert not read_outcomes(history.outcomes), "words of an earlier job with this number"
    leave(history, 0, "finished")
    verdict = end(history, code=0)  # a launcher that says 0 while ranks have left no word
    assert (verdict.result, verdict.code) == ("failed", 1)


def test_a_preempted_job_starts_again_as_often_as_it_may(tmp_path: Path) -> None:
    for restart in range(3):
        history = begin(tmp_path, restart)
        leave(history, 0, "stopped", "stopped by SIGUSR1 after step 4")
        verdict = end(history, warned=True, restarts=2)
        assert (verdict.result, verdict.again, verdict.code) == ("preempted", restart < 2, 75)
    assert "QWENVL_MAX_RESTARTS" in verdict.lines[-1]
    history = begin(tmp_path, 3)  # killed before they could listen
    assert (end(history, warned=True).result, end(history, warned=False).result) == ("preempted", "failed")


def test_a_crash_is_retried_only_after_progress_and_a_set_number_of_times(tmp_path: Path) -> None:
    history = begin(tmp_path)
    leave(history, 1, "failed", "RuntimeError: a fault", step=2)
    verdict = end(history)
    assert (verdict.again, verdict.code) == (False, 1)
    assert "before it wrote a checkpoint" in verdict.lines[-2]

    answers = []
    for restart in range(3):
        history = begin(tmp_path, restart)
        save(tmp_path, restart + 1)
        leave(history, 1, "failed", "RuntimeError: a fault")
        answers.append(end(history, crashes=2))
    assert [verdict.again for verdict in answers] == [True, True, False]
    assert "3 crashes, QWENVL_MAX_CRASHES allows 2" in answers[-1].lines[-2]

    history = begin(tmp_path, 3)
    leave(history, 0, "usage", "lora.rank = 0: must be at least 1")
    verdict = end(history, crashes=9)
    assert (verdict.again, verdict.code) == (False, 2)


def test_a_job_goes_on_from_its_own_checkpoints_only(tmp_path: Path) -> None:
    save(tmp_path, 900)  # of an earlier job, which train.resume=never sets aside
    assert begin(tmp_path).more == []  # type: ignore[attr-defined]
    assert begin(tmp_path, 1).more == []  # type: ignore[attr-defined]
    save(tmp_path, 3)
    assert begin(tmp_path, 2).more == ["train.resume=auto"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("said", "log", "culprit"),
    [
        ({0: "Gloo: Connection closed by peer", 3: "OutOfMemoryError: CUDA out of memory"}, "", (3, "out of memory")),
        ({0: "rank 3 on node2 did not answer for 25 s, last seen", 1: "Timed out"}, "", (3, "did not ans")),
        ({0: "rank 2 on node2 did not answer any more, last seen"}, TORCHRUN, (2, "SIGKILL")),
        ({0: "RuntimeError: Connection reset by peer"}, TORCHRUN, (2, "SIGKILL")),
        ({0: "Connection closed", 1: "Connection closed", 2: "Connection closed"}, "", (3, "without a word")),
        ({0: "Timed out", 1: "Timed out", 2: "Timed out", 3: "Timed out"}, "", (0, "Timed out")),
    ],
)  # fmt: skip
def test_the_last_line_names_the_log_of_the_rank_with_which_it_began(
    tmp_path: Path, said: dict[int, str], log: str, culprit: tuple[int, str]
) -> None:
    history = begin(tmp_path)
    history.log_of("node2").write_text(log)
    for rank, reason in said.items():
        leave(history, rank, "failed", reason)
    verdict = end(history)
    rank, words = culprit
    node = "node1" if rank < 2 else "node2"
    assert verdict.lines[1].startswith(f"rank {rank} on {node}") and words in verdict.lines[1], verdict.lines
    assert verdict.lines[-1] == f"see the log of the failing rank: {tmp_path}/logs/7.0.{node}.log"


def test_the_status_is_that_of_this_start(tmp_path: Path) -> None:
    line: dict[str, Any] = {"step": 3, "epoch": 0.25, "loss": 2.5, "samples_per_second": 8.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    history = begin(tmp_path)
    history.starts[-1].began += 1
    assert status(tmp_path, history.starts[-1], 1) == "starting: start 1, 2 nodes"
    history.starts[-1].began -= 10
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "val_loss": 2.0}\n{"step": 4, "lo')
    expected = "step 3, epoch 0.25, loss 2.500, 8.0 samples/s, start 2, 2 nodes"
    assert status(tmp_path, history.starts[-1], 2) == expected


def test_what_surrounds_a_job_is_checked() -> None:
    with pytest.raises(UserError, match="SLURM_JOB_ID is not set"):
        Job.from_environment({})
    assert Job.from_environment({"SLURM_JOB_ID": "9", "SLURM_RESTART_COUNT": "2"}) == Job("9", 2)
    assert Limits.from_environment({"QWENVL_MAX_CRASHES": "0"}) == Limits(100, 0)
    with pytest.raises(UserError, match="QWENVL_MAX_RESTARTS = many: must be a whole number"):
        Limits.from_environment({"QWENVL_MAX_RESTARTS": "many"})
