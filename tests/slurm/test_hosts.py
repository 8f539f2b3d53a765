"""Several hosts without Slurm: launch/multi_node.sh by hand and by ssh, and worlds that change."""

import os
import signal
from pathlib import Path

import pytest

from tests.slurm.lab import Lab, train_on_nodes, wait_for
from tests.slurm.runs import CPU, PATIENCE, last_step, write_lab_recipe
from tests.training.forked import ForkedRanks
from tests.training.runs import ledger, losses

pytestmark = [pytest.mark.slurm, pytest.mark.dist]


def test_multi_node_by_ssh_and_by_hand(
    lab: Lab, scenes_base: Path, scene_shards: Path, straight: Path, tmp_path: Path
) -> None:
    run, nodes = tmp_path / "run", [lab.nodes["node1"], lab.nodes["node2"]]
    recipe = write_lab_recipe(tmp_path / "run.yaml", scenes_base, scene_shards)
    # What a login gives is another environment: the site file names this one.
    site = tmp_path / "site.env"
    names = (
        "PATH",
        "PYTHONPATH",
        "TORCH_EXTENSIONS_DIR",
        "HF_HUB_OFFLINE",
        "OMP_NUM_THREADS",
        "PYTHONFAULTHANDLER",
    )
    mine = lab.environment()
    exports = [f"export {name}={mine[name]!r}" for name in names if name in mine]
    site.write_text("\n".join([*exports, "source slurm/site.env", ""]))
    env = {**CPU, "QWENVL_SITE": str(site), **lab.start_ssh()}
    script = ["bash", "launch/multi_node.sh", "--hosts", "node1,node2"]

    # By ssh from a third host, ZeRO-2. The ranks end with the script, in a checkpoint.
    log = tmp_path / "ssh.log"
    process = lab.nodes["node3"].start(*script, "--ssh", "train", recipe, log=log, env=env)
    wait_for(lambda: last_step(run) >= 2 or process.poll() is not None, PATIENCE, log.read_text)
    assert process.poll() is None, log.read_text()
    (outer,) = [pid for pid in lab.nodes["node3"].pids("multi_node.sh") if _parent(pid) == process.pid]
    os.kill(outer, signal.SIGTERM)
    wait_for(lambda: not any(node.pids("qwenvl_dist") for node in nodes), 60, log.read_text)
    assert process.wait(10) != 0
    said = log.read_text()
    assert "node1: 2 ranks, ZeRO-2, global batch of 6 samples" in said
    stopped = last_step(run)
    assert (run / "checkpoints" / f"step-{stopped:08d}" / "MANIFEST.json").is_file(), said

    # By hand on each host, ZeRO-3, on from there.
    third = write_lab_recipe(tmp_path / "three.yaml", scenes_base, scene_shards, 3)
    overrides = [f"train.output_dir={run}", f"train.max_steps={stopped + 3}"]
    hands = [
        node.start(*script, "train", third, *overrides, log=tmp_path / f"{node.name}.log", env=env)
        for node in nodes
    ]
    said = tmp_path / "node1.log"
    assert [hand.wait(PATIENCE) for hand in hands] == [0, 0], said.read_text()
    assert f"resumed from {run}/checkpoints/step-{stopped:08d}" in said.read_text()
    expected = ledger(straight)
    assert ledger(run) == {step: expected[step] for step in range(1, stopped + 4)}
    assert losses(run)[:stopped] == pytest.approx(losses(straight)[:stopped], rel=1e-4)


def test_a_run_goes_on_with_fewer_and_with_more_hosts(
    lab: Lab, scenes_base: Path, scene_shards: Path, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    recipe = write_lab_recipe(tmp_path / "run.yaml", scenes_base, scene_shards)
    for world in (["node1", "node2"], ["node3"], ["node2", "node1", "node3"]):
        before = last_step(run)
        log = tmp_path / f"{len(world)}.log"
        ranks = ForkedRanks(train_on_nodes, (str(recipe), lab.places(*world)), len(world), log)
        try:
            if len(world) < 3:
                wait_for(lambda: last_step(run) >= before + 5 or any(ranks.codes), PATIENCE, ranks.said)  # noqa: B023
                assert ranks.ranks[-1].pid
                os.kill(ranks.ranks[-1].pid, signal.SIGUSR1)  # one rank is warned, all stop
            codes = ranks.wait(PATIENCE)
        finally:
            ranks.wait(0)
        assert codes == [1 if len(world) < 3 else 0] * len(world), ranks.said()[-4000:]
        said = ranks.said()
        assert f"{len(world)} ranks, ZeRO-2, global batch of 6 samples" in said
        assert before == 0 or f"step-{before:08d}" in said
    assert ledger(run) == ledger(straight)
    assert losses(run) == pytest.approx(losses(straight), rel=1e-4)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
