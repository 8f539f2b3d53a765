"""The lab is what the other tests take it for."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.slurm.lab import Lab, wait_for

pytestmark = pytest.mark.slurm


def test_hosts_have_names_cables_disks_and_processes_of_their_own(lab: Lab, tmp_path: Path) -> None:
    one, two = lab.nodes["node1"], lab.nodes["node2"]
    assert (one.run("hostname"), two.run("hostname")) == ("node1\n", "node2\n")
    one.run("touch", one.scratch / "here")
    assert "here\n" not in two.run("ls", two.scratch)
    one.run("rm", one.scratch / "here")
    assert one.run("ip", "route") == "10.77.0.0/24 dev eth0 proto kernel scope link src 10.77.0.1 \n"

    def answers() -> bool:
        probe = "import socket; socket.create_connection(('node2', 6818), timeout=1)"  # slurmd
        return subprocess.run(one.command("python3", "-c", probe), capture_output=True).returncode == 0

    assert answers()
    two.cut()
    assert not answers()
    two.mend()
    assert answers()

    process = two.start("sleep", "1234", log=tmp_path / "log")
    wait_for(lambda: two.pids("sleep 1234"), 5, lambda: "no process")
    assert not one.pids("sleep 1234")
    os.kill(two.pids("sleep 1234")[-1], signal.SIGKILL)
    assert process.wait(5) != 0
    assert not two.pids("sleep 1234")


def test_slurm_runs_a_job_on_two_hosts_with_gpus(lab: Lab, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/bin/bash\nsrun bash -c 'echo \"$SLURM_NODEID $(hostname) $CUDA_VISIBLE_DEVICES\"'\n"
    )
    options = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", f"--output={tmp_path}/out"]
    lab.wait(lab.submit(script, options=options), timeout=30)
    assert sorted((tmp_path / "out").read_text().splitlines()) == ["0 node1 0,1", "1 node2 0,1"]
