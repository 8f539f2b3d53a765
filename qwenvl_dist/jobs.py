"""The starts of one training job under a scheduler: what came of each, and whether there is another.

`RUN/logs/JOB.json` tells of each start, `RUN/logs/JOB.RESTART.NODE.log` is what a node printed, and each rank that ends
by itself leaves `RUN/logs/JOB.RESTART.outcomes/rank-00003.json`. Imports no torch: slurm/train.sbatch asks before and
after the ranks.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from qwenvl_dist.errors import UserError
from qwenvl_dist.files import write_atomic

Result = Literal["finished", "preempted", "failed", "usage"]

GO_ON_LATER = 75  # the exit code for a job that stopped with everything saved; EX_TEMPFAIL of <sysexits.h>
EXIT_CODES: dict[Result, int] = {"finished": 0, "failed": 1, "usage": 2, "preempted": GO_ON_LATER}

# What a rank says that lost the others: not where the fault is.
_LOST_OTHERS = re.compile(
    r"clos(ed|ing)|reset by peer|broken pipe|timed? ?out|gloo|nccl|DistNetworkError|DistBackendError|DistStoreError"
    r"|launcher|SIGTERM",
    re.IGNORECASE,
)
# What a rank says that knows which other one it was: qwenvl_dist/heartbeat.py.
_NAMES_ANOTHER = re.compile(r"rank (\d+)\b.* on \S+ (failed|did not)\b")
# torchrun's summary of how a rank of its node ended.
_TORCHRUN_EXIT = re.compile(r"rank\s*: (\d+) \(local_rank: \d+\)\s*\n\s*exitcode\s*: (-?\d+)")
_SIGNAL_NAMES = {-9: "SIGKILL, as out of memory does it", -11: "SIGSEGV", -7: "SIGBUS", -6: "SIGABRT"}
_LOG_TAIL_BYTES = 1 << 18


@dataclass(frozen=True)
class Job:
    """What the scheduler says of this start."""

    id: str
    restart: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Job:
        """Read what Slurm sets. Raises UserError outside a job."""
        if "SLURM_JOB_ID" not in environment:
            raise UserError("SLURM_JOB_ID is not set: this is for scripts inside a Slurm job")
        return cls(environment["SLURM_JOB_ID"], int(environment.get("SLURM_RESTART_COUNT") or 0))


@dataclass(frozen=True)
class Limits:
    """How often a job may go on by itself."""

    restarts: int = 100
    crashes: int = 3

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Limits:
        """Read QWENVL_MAX_RESTARTS and QWENVL_MAX_CRASHES. Raises UserError."""
        values = {}
        for name in ("restarts", "crashes"):
            key = f"QWENVL_MAX_{name.upper()}"
            text = environment.get(key) or str(getattr(cls, name))
            if not text.isdecimal():
                raise UserError(f"{key} = {text}: must be a whole number, 0 or more")
            values[name] = int(text)
        return cls(**values)


@dataclass
class Start:
    """One start of a job. `result` stays None when the job's script was killed with its ranks."""

    restart: int
    nodes: list[str]
    processes_per_node: int
    began: float  # seconds since the epoch
    checkpoints: dict[str, int]  # those that were there: name -> time of the manifest, ns
    result: Result | None = None
    reason: str = ""

    @property
    def world_size(self) -> int:
        """Return the number of ranks."""
        return len(self.nodes) * self.processes_per_node

    def node_of(self, rank: int) -> str:
        """Return where a rank was."""
        return self.nodes[rank // self.processes_per_node]


@dataclass(frozen=True)
class Outcome:
    """What one rank said of its end."""

    rank: int
    outcome: Literal["finished", "stopped", "failed", "usage"]
    step: int | None
    reason: str
    at: float  # seconds since the epoch


@dataclass(frozen=True)
class Verdict:
    """What becomes of the job after a start."""

    result: Result
    again: bool
    lines: list[str]  # for the job's log; the last one names the log of the rank that failed

    @property
    def code(self) -> int:
        """Return the exit code of the job if it is not started again."""
        return EXIT_CODES[self.result]


@dataclass
class JobHistory:
    """The starts of one job, in the run folder."""

    run: Path
    job: Job
    starts: list[Start] = field(default_factory=list)

    @classmethod
    def load(cls, run: Path, job: Job) -> JobHistory:
        """Read what earlier starts left; empty before the first."""
        history = cls(run, job)
        if history.path.is_file():
            history.starts = [Start(**each) for each in json.loads(history.path.read_bytes())["starts"]]
        return history

    @property
    def path(self) -> Path:
        """Return the file."""
        return self.run / "logs" / f"{self.job.id}.json"

    @property
    def logs(self) -> Path:
        """Return what the names of this start's logs begin with."""
        return self.run / "logs" / f"{self.job.id}.{self.job.restart}"

    @property
    def outcomes(self) -> Path:
        """Return the folder in which ranks leave how they ended."""
        return self.logs.with_name(f"{self.logs.name}.outcomes")

    def log_of(self, node: str) -> Path:
        """Return what a node printed in this start."""
        return self.logs.with_name(f"{self.logs.name}.{node}.log")

    def begin(self, nodes: Sequence[str], processes_per_node: int) -> list[str]:
        """Note a start, and return what its recipe must say beyond the user's own overrides.

        A job that has written checkpoints goes on from them, whatever `train.resume` said of its first start.
        """
        if self.job.restart == 0:
            self.starts = []  # of a job that had this number before
        goes_on = bool(self.starts) and bool(new_checkpoints(self.run, self.starts[0].checkpoints))
        present = checkpoints(self.run)
        self.starts.append(Start(self.job.restart, list(nodes), processes_per_node, time.time(), present))
        self.outcomes.mkdir(parents=True, exist_ok=True)
        for leftover in self.outcomes.iterdir():
            leftover.unlink()
        self._write()
        return ["train.resume=auto"] if goes_on else []

    def end(self, code: int, warned: bool, limits: Limits) -> Verdict:
        """Note how this start ended, and decide whether there is another.

        Args:
            code: the exit code of srun.
            warned: whether the scheduler's early warning, or SIGTERM, had come.
            limits: how often a job may go on.
        """
        start = self.starts[-1]
        outcomes = read_outcomes(self.outcomes)
        rank, reason = None, ""
        if len(outcomes) == start.world_size and all(o.outcome == "finished" for o in outcomes):
            result: Result = "finished"
        elif (wrong := [o for o in outcomes if o.outcome == "usage"]) != []:
            result, rank, reason = "usage", wrong[0].rank, wrong[0].reason
        elif (stopped := [o for o in outcomes if o.outcome == "stopped"]) != []:
            result, reason = "preempted", stopped[0].reason
        elif warned and not any(o.outcome == "failed" for o in outcomes):
            result, reason = "preempted", "ended before all ranks could answer the warning"
        else:
            result = "failed"
            rank, reason = find_culprit(start, outcomes, self._killed(start), code)
        start.result, start.reason = result, reason
        self._write()
        again, why = self._again(start, limits)
        step = max((o.step for o in outcomes if o.step is not None), default=None)
        lines = [
            f"job {self.job.id}, start {len(self.starts)} on {', '.join(start.nodes)}: {result}{_after(step)}"
        ]
        if reason:
            lines.append(reason)
        if why:
            lines.append(why)
        if result in ("failed", "usage"):
            log = self.log_of(start.node_of(rank or 0))
            lines.append(
                f"see the log of {'the failing rank' if rank is not None else 'the first node'}: {log}"
            )
        return Verdict(result, again, lines)

    def _again(self, start: Start, limits: Limits) -> tuple[bool, str]:
        """Whether the job starts again, and why or why not."""
        if start.result in ("finished", "usage"):
            return False, ""
        restarts = len(self.starts) - 1
        if restarts >= limits.restarts:
            return False, (
                f"not started again: {restarts} restarts are as many as QWENVL_MAX_RESTARTS allows; "
                "submit the same job again to go on"
            )
        if start.result == "preempted":
            return True, f"starts again, restart {restarts + 1} of {limits.restarts} at most"
        crashes = sum(each.result == "failed" for each in self.starts)
        if crashes > limits.crashes:
            return False, (
                f"not started again: {crashes} crashes, QWENVL_MAX_CRASHES allows {limits.crashes} to be retried"
            )
        if not new_checkpoints(self.run, start.checkpoints):
            return False, (
                "not started again: this start crashed before it wrote a checkpoint, and so would the next one"
            )
        return (
            True,
            f"starts again, retry {crashes} of {limits.crashes} at most, since this start wrote a checkpoint",
        )

    def _killed(self, start: Start) -> dict[int, int]:
        """Return the exit codes below zero of ranks that ended by a signal, as the launchers on the nodes tell it."""
        found = {}
        for node in start.nodes:
            text = _tail(self.log_of(node))
            found |= {int(rank): int(code) for rank, code in _TORCHRUN_EXIT.findall(text)}
        return {rank: code for rank, code in found.items() if code < 0 and code != -15}

    def _write(self) -> None:
        content = json.dumps({"starts": [asdict(start) for start in self.starts]}, indent=1)
        write_atomic(self.path, content.encode())


def find_culprit(
    start: Start, outcomes: Sequence[Outcome], killed: Mapping[int, int], code: int
) -> tuple[int | None, str]:
    """Return the rank with which a failure began, and what it was; None where nothing tells.

    A rank that failed by itself comes before one that others name, this before one that was killed, that before one
    that left no word, and last come those that only lost the others.
    """
    failed = sorted((o for o in outcomes if o.outcome == "failed"), key=lambda o: o.at)
    named = [(int(match[1]), o.reason) for o in failed if (match := _NAMES_ANOTHER.match(o.reason))]
    own = [o for o in failed if not _LOST_OTHERS.search(o.reason) and not _NAMES_ANOTHER.match(o.reason)]
    silent = sorted(set(range(start.world_size)) - {o.rank for o in outcomes})
    if own:
        return own[0].rank, _name(start, own[0].rank, own[0].reason)
    if named and named[0][0] not in killed:
        return named[0]
    if killed:
        rank = named[0][0] if named else min(killed)
        signal_name = _SIGNAL_NAMES.get(killed[rank], f"signal {-killed[rank]}")
        return rank, _name(start, rank, f"ended by {signal_name}")
    if silent and failed:
        return silent[0], _name(start, silent[0], "ended without a word, the others lost it")
    if failed:
        return failed[0].rank, _name(start, failed[0].rank, failed[0].reason)
    return None, f"{len(silent)} of {start.world_size} ranks ended without a word (srun: exit code {code})"


def checkpoints(run: Path) -> dict[str, int]:
    """Return the checkpoints of a run: name -> when its manifest was written, ns."""
    found = {}
    for manifest in (run / "checkpoints").glob("step-*/MANIFEST.json"):
        found[manifest.parent.name] = manifest.stat().st_mtime_ns
    return found


def new_checkpoints(run: Path, before: Mapping[str, int]) -> list[str]:
    """Return the checkpoints that were not there before, oldest step first."""
    return sorted(name for name, written in checkpoints(run).items() if before.get(name) != written)


def read_outcomes(folder: Path) -> list[Outcome]:
    """Return how ranks ended, in rank order; those that were killed left nothing."""
    found = []
    for path in sorted(folder.glob("rank-*.json")):
        said = json.loads(path.read_bytes())
        found.append(
            Outcome(
                said["rank"],
                said["outcome"],
                said.get("step"),
                said.get("reason") or "",
                path.stat().st_mtime,
            )
        )
    return found


def status(run: Path, start: Start, number: int) -> str:
    """Return for `squeue` how far a run is, from the last line of its metrics."""
    text = f"start {number}, {len(start.nodes)} nodes"
    path = run / "metrics.jsonl"
    if not path.is_file() or path.stat().st_mtime < start.began:
        return f"starting: {text}"
    lines: list[dict[str, Any]] = []
    for line in _tail(path).splitlines()[-8:]:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:  # cut at the front, or being written
            continue
    trained = [line for line in lines if "loss" in line]
    if not trained:
        return f"starting: {text}"
    last = trained[-1]
    return (
        f"step {last['step']}, epoch {last['epoch']:.2f}, loss {last['loss']:.3f}, "
        f"{last['samples_per_second']:.1f} samples/s, {text}"
    )


def _name(start: Start, rank: int, reason: str) -> str:
    return f"rank {rank} on {start.node_of(rank)}: {reason}"


def _after(step: int | None) -> str:
    return "" if step is None else f" after step {step}"


def _tail(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
        return file.read().decode(errors="replace")
