"""What befalls real hosts: all processes end in bounded time, the log of the failing rank is named, a resume works.

The times that are printed are those of the table in docs/cluster.md.
"""

import ctypes
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenvl_dist.checkpoints import manifest as manifests
from qwenvl_dist.data.index import Manifest, index_path, load_shard_index
from qwenvl_dist.data.plan import RunPlan
from tests.slurm.lab import Lab, Node, enter, wait_for
from tests.slurm.runs import CPU, PATIENCE, RANK, TWO_NODES, last_step, starts, write_lab_recipe
from tests.training import forked
from tests.training.forked import ForkedRanks
from tests.training.runs import ledger

pytestmark = [pytest.mark.slurm, pytest.mark.dist]

GLOBAL_BATCH = 6  # of the lab's recipe
LIMIT = 10  # train.timeout_seconds of ranks that start together
JOB_LIMIT = 20  # of a job's, whose nodes may start some seconds apart
LEAVE = 5  # QWENVL_LEAVE_SECONDS
KILL_WAIT = 5  # of the lab's Slurm, between SIGTERM and SIGKILL
SLACK = 5  # a launcher looks after its ranks now and then, and this machine is busy


def planned(shards: Path, steps: int) -> dict[int, list[str]]:
    """What the ledger of an unbroken run says."""
    entries = Manifest.load(shards).shards
    keys = [load_shard_index(index_path(shards / entry.name)).keys for entry in entries]
    plan = RunPlan([len(part) for part in keys], seed=0, window=64, epochs=1_000_000)
    places = [place for place in plan.locate(0, steps * GLOBAL_BATCH) if place]
    order = [keys[place.shard][place.sample] for place in places]
    return {step + 1: sorted(order[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]) for step in range(steps)}


def assert_goes_on_exactly(recipe: Path, shards: Path, log: Path) -> None:
    """Finish the run on one rank of this machine: its checkpoints are whole, and its ledger is the unbroken run's."""
    run = recipe.with_suffix("")
    for folder in manifests.step_folders(run / "checkpoints"):
        manifests.verify_step(folder)
    end = last_step(run) + 4
    ranks = ForkedRanks(forked.train, (str(recipe), f"train.max_steps={end}"), 1, log)
    assert ranks.wait(PATIENCE) == [0], ranks.said()[-4000:]
    assert "resumed from" in ranks.said()
    assert ledger(run) == planned(shards, end)


def ranks_on(node: Node) -> list[int]:
    """The ranks and their loader workers, oldest first."""
    return node.pids(RANK)


def launchers_on(node: Node) -> list[int]:
    return node.pids("accelerate launch")


def kill(
    find: Callable[[Node], list[int]], number: signal.Signals = signal.SIGKILL
) -> Callable[[Node, str], None]:
    def act(node: Node, _job: str) -> None:
        os.kill(find(node)[0], number)

    return act


def kill_step(node: Node, job: str) -> None:
    os.kill(node.pids(f"slurmstepd: [{job}.0]")[0], signal.SIGKILL)


PARENT_GONE = r"rank 1 on node2: process \d+ \({}\), which had started this rank, is gone"
SILENT = r"rank 1 on node2 did not answer {}, last seen after step \d+ in \w+ \(qwenvl_dist/"
# What happens on node2, in how many seconds all is over, and what is said about it.
BEFALLS: dict[str, tuple[Callable[[Node, str], None], float, str]] = {
    "SIGKILL of a worker": (kill(ranks_on), LIMIT, "rank 1 on node2: ended by SIGKILL"),
    "SIGKILL of a launcher": (kill(launchers_on), LIMIT, PARENT_GONE.format(r"\S+")),
    "SIGKILL of slurmstepd": (kill_step, LIMIT, PARENT_GONE.format("slurmstepd")),
    "SIGSTOP of a rank": (
        kill(ranks_on, signal.SIGSTOP),
        JOB_LIMIT + LEAVE + KILL_WAIT,
        SILENT.format("for 14 s"),
    ),
}


def befall(
    lab: Lab,
    job: str,
    run: Path,
    log: Path,
    start: int,
    name: str,
    act: Callable[[Node, str], None],
    limit: float,
    said: str,
) -> str:
    """Let `act` befall node2 once this start of the job trains; return the line that names a log."""
    nodes = [lab.nodes["node1"], lab.nodes["node2"]]

    def tell() -> str:
        return f"{name}: {log.read_text()[-6000:]}"

    wait_for(lambda: len(starts(run, job)) == start + 1, PATIENCE, tell)
    before = last_step(run)
    wait_for(lambda: last_step(run) >= before + 10, PATIENCE, tell)
    began, seen = time.monotonic(), len(log.read_text())
    act(nodes[1], job)
    wait_for(lambda: not any(ranks_on(node) + launchers_on(node) for node in nodes), limit + SLACK, tell, 0.1)
    print(f"{name}: all processes were gone after {time.monotonic() - began:.1f} s")
    wait_for(lambda: "see the log of" in log.read_text()[seen:], 90, tell, 0.2)
    print(f"{name}: the job was judged after {time.monotonic() - began:.1f} s")
    text = log.read_text()[seen:]
    assert re.search(said, text), f"{name}: {text}"
    line = re.findall(r"^see the log of .*$", text, re.MULTILINE)[-1]
    assert line == f"see the log of the failing rank: {run}/logs/{job}.{start}.node2.log"
    return line


@pytest.mark.timeout(900)
def test_a_job_goes_on_after_whatever_befalls_one_of_its_nodes(
    lab: Lab, scenes_base: Path, scene_shards: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "job.log"
    recipe = write_lab_recipe(
        tmp_path / "run.yaml", scenes_base, scene_shards, epochs=100_000, timeout_seconds=JOB_LIMIT
    )
    env = {**CPU, "QWENVL_LEAVE_SECONDS": str(LEAVE), "QWENVL_MAX_CRASHES": str(len(BEFALLS) - 1)}
    options = [*TWO_NODES, f"--output={log}"]
    job = lab.submit("slurm/train.sbatch", recipe, "data.workers=1", options=options, env=env)
    for start, (name, (act, limit, said)) in enumerate(BEFALLS.items()):
        last_line = befall(lab, job, run, log, start, name, act, limit, said)
    ended = lab.wait(job, 60)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "1:0")
    assert log.read_text().splitlines()[-1] == last_line
    assert_goes_on_exactly(recipe, scene_shards, tmp_path / "log")


# --- without Slurm: ranks on the hosts, each of them a fork of a process that has imported everything -----------------


def train_on_a_node(recipe: str, places: list[tuple[int, str]], overrides: list[str]) -> None:
    """One forked rank: go to its node, whose disks and /etc/hosts it gets too, and train."""
    pid, main_address = places[int(os.environ["RANK"])]
    libc, here = ctypes.CDLL(None, use_errno=True), Path.cwd()
    descriptor = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
    new_mounts = (
        0x20000  # CLONE_NEWNS: /proc must be that of this process, which stays among those of the machine
    )
    if (
        libc.setns(descriptor, 0)
        or libc.unshare(new_mounts)
        or libc.mount(b"proc", b"/proc", b"proc", 0, None)
    ):
        raise OSError(ctypes.get_errno(), "no mounts of the node")
    os.chdir(here)
    enter(pid)
    os.environ.update(MASTER_ADDR=main_address, LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    forked.train(recipe, *overrides)


def out_of_memory(recipe: str, places: list[tuple[int, str]], overrides: list[str]) -> None:
    """One forked rank on its node; rank 1 asks for more memory than there is in step 7."""
    import torch

    from qwenvl_dist.training import loop

    step = loop.train_step

    def hungry(state: Any, *arguments: Any) -> Any:
        if state.progress.step == 6 and os.environ["RANK"] == "1":
            torch.empty(1 << 45)
        return step(state, *arguments)

    loop.train_step = hungry
    train_on_a_node(recipe, places, overrides)


class OnNodes:
    """A run of two ranks, on node1 and node2."""

    def __init__(self, lab: Lab, base: Path, shards: Path, folder: Path, limit: int = LIMIT) -> None:
        self.lab, self.folder, self.shards = lab, folder, shards
        self.recipe = write_lab_recipe(
            folder / "run.yaml", base, shards, epochs=100_000, timeout_seconds=limit
        )
        self.run = folder / "run"
        self.outcomes: dict[int, dict[str, Any]] = {}
        self.ranks: ForkedRanks | None = None

    def start(self, *overrides: str, target: Callable[..., None] = train_on_a_node) -> ForkedRanks:
        places = self.lab.places("node1", "node2")
        variables = {"QWENVL_OUTCOME_DIR": str(self.folder / "outcomes")}
        self.ranks = ForkedRanks(
            target, (str(self.recipe), places, list(overrides)), 2, self.folder / "log", variables
        )
        return self.ranks

    def wait_for_step(self, step: int) -> None:
        assert self.ranks
        wait_for(
            lambda: last_step(self.run) >= step or any(self.ranks.codes), PATIENCE, self.ranks.said, 0.02
        )
        assert not any(self.ranks.codes), self.ranks.said()[-6000:]

    def end(self, name: str, limit: float) -> dict[int, str]:
        """Return the reasons that ranks leave, all of which must have ended by themselves within `limit` seconds."""
        assert self.ranks
        began = time.monotonic()
        wait_for(lambda: None not in self.ranks.codes, limit + SLACK, self.ranks.said)
        print(f"{name}: all processes were gone after {time.monotonic() - began:.1f} s")
        found = [json.loads(path.read_text()) for path in (self.folder / "outcomes").glob("rank-*.json")]
        self.outcomes = {record["rank"]: record for record in found}
        return {record["rank"]: record["reason"] for record in found}


@pytest.fixture
def on_nodes(lab: Lab, scenes_base: Path, scene_shards: Path, tmp_path: Path) -> Any:
    """Make runs on nodes; what still runs at the end is killed."""
    made: list[OnNodes] = []

    def make(limit: int = LIMIT) -> OnNodes:
        made.append(OnNodes(lab, scenes_base, scene_shards, tmp_path, limit))
        return made[-1]

    yield make
    for run in made:
        for process in run.ranks.ranks if run.ranks else ():
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("seconds", "limit"), [(6, 20), pytest.param(20, 60, marks=pytest.mark.slow)], ids=["6 s", "20 s"]
)
def test_a_link_that_comes_back_costs_nothing_and_one_that_does_not_ends_all_ranks(
    lab: Lab, scene_shards: Path, on_nodes: Any, seconds: int, limit: int
) -> None:
    run = on_nodes(limit)
    run.start()
    # TCP asks again after twice the time that it has waited: within twice the cut, which the limit has to exceed.
    run.wait_for_step(60)
    lab.nodes["node2"].cut()
    time.sleep(seconds)
    stood = last_step(run.run)
    lab.nodes["node2"].mend()
    began = time.monotonic()
    run.wait_for_step(stood + 5)
    print(f"link cut for {seconds} s: the run went on {time.monotonic() - began:.1f} s after it was mended")
    lab.nodes["node2"].cut()
    reasons = run.end("link cut for ever", limit)
    assert run.ranks.codes == [1, 1]
    assert reasons[0].startswith("rank 1 on node2 did not answer")
    assert reasons[1].startswith(("rank 0 on node1 did not answer", "the store of rank 0 at 10.77.0.1:"))
    lab.nodes["node2"].mend()
    assert_goes_on_exactly(run.recipe, scene_shards, run.folder / "log")


def test_a_node_that_does_not_answer_at_the_start_is_waited_for_so_long(lab: Lab, on_nodes: Any) -> None:
    run = on_nodes()
    lab.nodes["node2"].cut()
    run.start()
    reasons = run.end("a node that does not answer at the start", LIMIT + 3)  # from when they are started
    for rank, host in enumerate(("node1", "node2")):
        assert re.match(
            rf"rank {rank} on {host} of 2 did not meet the other ranks at 10.77.0.1:\d+ within 6 s",
            reasons[rank],
        ), reasons
    assert "Traceback" not in run.ranks.said()


def test_a_launcher_waits_no_longer_for_a_node_that_was_not_started(lab: Lab, on_nodes: Any) -> None:
    run, node, log = on_nodes(), lab.nodes["node1"], lab.folder / "node1.log"
    began = time.monotonic()
    words = ["bash", "launch/node.sh", "0", "2", "node1", "29500", "train", run.recipe]
    process = node.start(*words, log=log, env={**CPU, "QWENVL_PROCESSES_PER_NODE": "1"})
    wait_for(lambda: process.poll() is not None, 4 * LIMIT, log.read_text)  # it loads torch first
    print(f"a node that was not started: its launcher was gone after {time.monotonic() - began:.1f} s")
    assert process.poll() == 1 and "1/2 clients joined" in log.read_text(), log.read_text()


def test_a_host_whose_name_is_the_loopbacks_is_reached_all_the_same(lab: Lab, on_nodes: Any) -> None:
    for name in ("node1", "node2"):
        hosts = lab.nodes[name].hosts
        lines = [line for line in hosts.read_text().splitlines() if not line.endswith(f" {name}")]
        hosts.write_text("\n".join([*lines, f"127.0.1.1 {name}"]) + "\n")
    run = on_nodes()
    run.start("train.max_steps=2")
    assert run.end("host names of the loopback", PATIENCE) == {0: "", 1: ""}, run.ranks.said()[-4000:]
    assert (
        run.ranks.said().count("resolves to 127.0.1.1, where no other host reaches it: using GLOO_SOCKET")
        == 2
    )
    assert last_step(run.run) == 2


def test_a_rank_out_of_memory_ends_all_with_its_reason(scene_shards: Path, on_nodes: Any) -> None:
    run = on_nodes()
    run.start(target=out_of_memory)
    run.wait_for_step(6)
    reasons = run.end("out of memory on one rank", LIMIT)
    assert "can't allocate memory" in reasons[1]
    assert reasons[0].startswith("rank 1 on node2 failed: RuntimeError: ") and "can't allocate" in reasons[0]
    assert run.outcomes[1]["step"] == 6
    assert_goes_on_exactly(run.recipe, scene_shards, run.folder / "log")


def test_an_output_folder_that_is_not_shared_is_told_before_a_model_is_loaded(
    lab: Lab, on_nodes: Any
) -> None:
    run = on_nodes()
    run.start(f"train.output_dir={lab.nodes['node1'].scratch}/run")
    reasons = run.end("an output folder that is not shared", PATIENCE)
    for reason in reasons.values():
        assert "ranks [1] do not see what rank 0 writes there; use a folder on storage" in reason
    assert {record["outcome"] for record in run.outcomes.values()} == {"usage"}


def test_a_scratch_disk_that_is_full_costs_speed_and_no_sample(
    lab: Lab, scene_shards: Path, on_nodes: Any
) -> None:
    node = lab.nodes["node2"]
    node.run("bash", "-c", f"cat /dev/zero > {node.scratch}/fill 2>/dev/null || true")
    try:
        run = on_nodes()
        run.start(f"data.cache_dir={node.scratch}/shards", "train.max_steps=4")
        assert run.end("scratch full while staging", PATIENCE) == {0: "", 1: ""}, run.ranks.said()[-4000:]
    finally:
        for host in lab.nodes.values():
            host.run("bash", "-c", f"rm -rf {host.scratch}/*")
    assert (
        "data.cache_dir = " in run.ranks.said()
        and "reading shards in parts where they lie" in run.ranks.said()
    )
    assert ledger(run.run) == planned(scene_shards, 4)
