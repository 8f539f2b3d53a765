"""A real Slurm with several hosts on one machine, for tests that carry the mark `slurm`.

Each host is a set of namespaces (pid, net, uts, mount, ipc) held by one process: its own name, address, processes,
/dev/shm and scratch disk, and a cable to a switch in the controller's namespace. Nothing leads outside. Files are those
of the machine, so every host sees one and the same "shared storage". When a host's first process dies the kernel ends
all others and takes network and mounts along; nothing needs to be cleaned up, even after a kill of the tests.

    def test_something(lab: Lab, tmp_path: Path) -> None:       # the fixture `lab`, once a session: node1, node2, node3
        lab.run("sinfo")                                        # on the controller, which is the login node too
        job = lab.submit("slurm/train.sbatch", recipe, options=["--nodes=2"], env={...})
        lab.wait(job, timeout=120)                              # its fields, such as ["JobState"]

        node = lab.nodes["node2"]
        node.run("hostname")                                    # to its end; raises when the exit code is not 0
        process = node.start("sleep", "60", log=tmp_path / "log")
        node.pids("sleep 60")                                   # on this machine: os.kill(pid, signal.SIGSTOP) and such
        node.cut(); node.mend()                                 # the cable: packets vanish, nobody is told
        node.hosts.write_text("127.0.0.1 node2\\n")             # its /etc/hosts; the fixture puts it back
        node.scratch                                            # a folder of 64 MiB that is another one on each node
        lab.launch(recipe, ["node1", "node2"], log=tmp_path)    # `accelerate launch` on each, without Slurm
        lab.quiet()                                             # at the end: no job, no cut cable, no process left

`ForkedRanks(train_on_nodes, (recipe, lab.places("node1", "node2"), overrides), 2, log)` of tests/training/forked.py
starts ranks on the nodes from a process that has imported everything: a second instead of ten, but no launcher above,
and their disks and processes are those of the machine.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.ranks import ROOT

COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "sshd", "ssh", "nsenter", "setpriv", "unshare")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2", "openssh-server", "openssh-client")
NETWORK = "10.77.0"  # of each lab's own: two labs never meet
SCRATCH_MIB = 64
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")

SLURM_CONF = """\
ClusterName=lab
SlurmctldHost=ctl({network}.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=20
KillWait=5
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=node[1-{nodes}] CPUs=8 SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=8000 Gres=gpu:{gpus}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=120
PartitionName=cpu Nodes=ALL MaxTime=INFINITE PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10
"""


class LabUnavailableError(Exception):
    """Why there can be no lab on this machine."""


def install() -> None:
    """Make sure that Slurm and what it needs are installed. Raises LabUnavailableError."""
    if os.geteuid() != 0:
        raise LabUnavailableError("hosts made of namespaces need root")
    missing = [name for name in COMMANDS if not shutil.which(name)]
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise LabUnavailableError(f"{', '.join(missing)}: not installed, and there is no apt-get")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    wait = ["-qq", "-o", "DPkg::Lock::Timeout=300"]
    for words in (["update", *wait], ["install", "-y", "--no-install-recommends", *wait, *PACKAGES]):
        done = subprocess.run(["apt-get", *words], env=quiet, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise LabUnavailableError(f"apt-get {words[0]} failed: {done.stderr.strip()[-400:]}")


@dataclass
class Node:
    """One host."""

    name: str
    address: str
    pid: int  # of its first process, on this machine
    lab: Lab

    @property
    def hosts(self) -> Path:
        """Its /etc/hosts, as this machine sees the file."""
        return self.lab.folder / "etc" / f"hosts.{self.name}"

    @property
    def scratch(self) -> Path:
        """A small disk; the same path on each node, with other content. From outside it is an empty folder."""
        return self.lab.folder / "scratch"

    def command(self, *words: str | Path) -> list[str]:
        """Return what starts `words` on this host."""
        inside = ["--pid", "--net", "--uts", "--mount", "--ipc"]
        return ["nsenter", "-t", str(self.pid), *inside, f"--wd={ROOT}", "--", *map(str, words)]

    def run(
        self, *words: str | Path, env: dict[str, str] | None = None, timeout: float = 60, check: bool = True
    ) -> str:
        """Run a command to its end and return its stdout; AssertionError when it fails and `check` is on."""
        done = subprocess.run(
            self.command(*words),
            env=self.lab.environment(env),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, (
            f"{self.name}: {words}: {done.returncode}: {done.stderr[-4000:]}"
        )
        return done.stdout

    def start(
        self, *words: str | Path, log: Path, env: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command; what it prints is added to `log`. `poll` and `wait` work, `pids` finds what to kill."""
        with log.open("ab") as file:
            return subprocess.Popen(
                self.command(*words), env=self.lab.environment(env), stdout=file, stderr=file,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def pids(self, part: str = "") -> list[int]:
        """Return the processes on this host, the first one aside, whose command line holds `part`. Oldest first."""
        own = Path(f"/proc/{self.pid}/ns/pid").readlink()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self.pid:
                try:
                    if (entry / "ns" / "pid").readlink() != own or " Z " in (entry / "stat").read_text():
                        continue
                    words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                except OSError:
                    continue  # it has ended
                if part in words and words not in ("", "sleep infinity "):
                    found.append(int(entry.name))
        return sorted(found)

    def cut(self) -> None:
        """Let every packet from and to this host vanish."""
        self.lab.ip("link", "set", self._port, "nomaster")

    def mend(self) -> None:
        """Undo `cut`."""
        self.lab.ip("link", "set", self._port, "master", "br0")

    @property
    def _port(self) -> str:
        return f"port-{self.name}"


class Lab:
    """The hosts and their Slurm. A context manager: on leaving, all of it is gone."""

    def __init__(self, nodes: int = 3, gpus: int = 8) -> None:
        self.folder = Path(
            tempfile.mkdtemp(prefix="slurm-lab-", dir="/tmp")
        )  # sockets: 107 characters at most
        self.nodes: dict[str, Node] = {}
        self._holders: list[subprocess.Popen[bytes]] = []
        self._gpus = gpus
        self._names = [f"node{number}" for number in range(1, nodes + 1)]

    def __enter__(self) -> Lab:
        try:
            for name in ("etc", "ctld", "log", "run", "munge", "dev", "scratch", "spool", "ssh"):
                (self.folder / name).mkdir(mode=0o755)
            self.folder.chmod(0o755)
            addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(self._names, 1)}
            self.controller = self._host("ctl", f"{NETWORK}.254", addresses)
            self.ip("link", "add", "br0", "type", "bridge")
            self.ip("addr", "add", f"{self.controller.address}/24", "dev", "br0")
            self.ip("link", "set", "br0", "up")
            for name, address in addresses.items():
                self.nodes[name] = self._connect(self._host(name, address, addresses))
            self._start_slurm()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exc_info: object) -> None:
        for holder in self._holders:
            holder.kill()  # the first process goes with it, and with that all others
        for holder in self._holders:
            holder.wait()
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{node.pid}").exists() for node in self.nodes.values()):
            assert time.monotonic() < deadline, "a host of the lab does not end"
            time.sleep(0.02)
        shutil.rmtree(self.folder, ignore_errors=True)

    def environment(self, more: dict[str, str] | None = None) -> dict[str, str]:
        """Return the variables of commands on hosts: this interpreter and checkout first, and where Slurm is."""
        own = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))
        }
        path = os.pathsep.join([str(Path(sys.executable).parent), own.get("PATH", ""), "/usr/sbin", "/sbin"])
        python_path = os.pathsep.join(filter(None, [str(ROOT), own.get("PYTHONPATH")]))
        fixed = {
            "PATH": path,
            "PYTHONPATH": python_path,
            "SLURM_CONF": str(self.folder / "etc" / "slurm.conf"),
        }
        always = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONFAULTHANDLER": "1"}
        return {**own, **always, **fixed, **(more or {})}

    def run(self, *words: str | Path, **options: object) -> str:
        """Run a command on the controller; see `Node.run`."""
        return self.controller.run(*words, **options)  # type: ignore[arg-type]

    def submit(
        self,
        script: str | Path,
        *arguments: str | Path,
        options: Sequence[str] = (),
        env: dict[str, str] | None = None,
    ) -> str:
        """Return the id of a submitted job."""
        return self.run("sbatch", "--parsable", *options, script, *arguments, env=env).strip()

    def job(self, job: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`."""
        words = self.run("scontrol", "-o", "show", "job", job).split(" ")
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, timeout: float, states: Sequence[str] = ENDED) -> dict[str, str]:
        """Return the fields of a job once it is in one of `states`; AssertionError with its log when that lasts."""
        box: dict[str, str] = {}

        def reached() -> bool:
            box.clear()
            box.update(self.job(job))
            return box["JobState"] in states

        wait_for(
            reached, timeout, lambda: f"job {job} is {box.get('JobState')}\n{_tail(Path(box['StdOut']))}", 0.2
        )
        return box

    def launch(
        self,
        recipe: Path,
        nodes: Sequence[str],
        *overrides: str,
        log: Path,
        config: str = "cpu_zero2_multinode.yaml",
        port: int = 29500,
        env: dict[str, str] | None = None,
    ) -> list[subprocess.Popen[bytes]]:
        """Start one rank a node with `accelerate launch`; what node2 prints is added to `log / "node2.log"`."""
        return [
            self.nodes[name].start(
                "accelerate", "launch", "--config_file", f"launch/accelerate/{config}",
                "--num_machines", str(len(nodes)), "--num_processes", str(len(nodes)), "--machine_rank", str(rank),
                "--main_process_ip", nodes[0], "--main_process_port", str(port),
                "-m", "qwenvl_dist", "train", recipe, *overrides, log=log / f"{name}.log", env=env,
            )
            for rank, name in enumerate(nodes)
        ]  # fmt: skip

    def places(self, *names: str) -> list[tuple[int, str]]:
        """Return for `train_on_nodes` where each rank goes."""
        return [(self.nodes[name].pid, self.nodes[names[0]].address) for name in names]

    def quiet(self) -> None:
        """End what a test has left behind: jobs, processes, cut cables, changed host names."""
        self.run("scancel", "--full", "--signal=KILL", "--user=root", check=False)
        self.run("scancel", "--user=root", check=False)
        for node in self.nodes.values():
            node.mend()
            node.hosts.write_text(self.controller.hosts.read_text())
            for pid in self._strangers(node):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not self.run("squeue", "-h").strip(), 30, lambda: self.run("squeue"))
        # A node that was cut off for long is asked again only every minute or so.
        for name in self.nodes:
            self.run("scontrol", "update", f"nodename={name}", "state=resume", check=False)
        wait_for(self._idle, 180, lambda: self.run("sinfo", "-N", "-l"))

    def ip(self, *words: str) -> None:
        """Run `ip` where the switch is, with the processes of this machine in sight."""
        subprocess.run(
            ["nsenter", "-t", str(self.controller.pid), "--net", "ip", *words], check=True, timeout=10
        )

    def start_ssh(self) -> dict[str, str]:
        """Let root log in from node to node without a word; return the variables that make `ssh` use it."""
        ssh = self.folder / "ssh"
        for name in ("host", "user"):
            if not (ssh / name).exists():
                subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", ssh / name], check=True)
        (ssh / "sshd_config").write_text(
            f"HostKey {ssh}/host\nAuthorizedKeysFile {ssh}/user.pub\nStrictModes no\nUsePAM no\nPidFile none\n"
        )
        (ssh / "config").write_text(
            f"IdentityFile {ssh}/user\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
        )
        for node in self.nodes.values():
            if not node.pids("sshd"):
                node.run("bash", "-c", f"mkdir -p /run/sshd && exec $(command -v sshd) -f {ssh}/sshd_config")
        return {"QWENVL_SSH": f"ssh -F {ssh}/config"}

    def _host(self, name: str, address: str, addresses: dict[str, str]) -> Node:
        lines = ["127.0.0.1 localhost", f"{NETWORK}.254 ctl", *(f"{a} {n}" for n, a in addresses.items())]
        hosts = self.folder / "etc" / f"hosts.{name}"
        hosts.write_text("\n".join(lines) + "\n")
        up = self.folder / "run" / f"{name}.up"
        script = f"""set -e
            hostname {name}
            mount --bind {hosts} /etc/hosts
            mount -t tmpfs tmpfs /dev/shm
            mount -t tmpfs -o size={SCRATCH_MIB}m tmpfs {self.folder}/scratch
            ip link set lo up
            touch {up}
            trap : TERM
            while :; do sleep infinity & wait; done"""  # as the first process bash reaps what is orphaned
        holder = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--net", "--uts", "--mount", "--ipc", "--fork",
             "--kill-child", "--mount-proc", "bash", "-c", script],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=(self.folder / "log" / name).open("wb"),
        )  # fmt: skip
        self._holders.append(holder)

        def is_up() -> bool:
            if holder.poll() is not None:
                raise LabUnavailableError(
                    f"no namespaces: {(self.folder / 'log' / name).read_text().strip()}"
                )
            return up.exists()

        wait_for(is_up, 10, lambda: f"host {name} does not start")
        first = int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()[0])
        return Node(name, address, first, self)

    def _connect(self, node: Node) -> Node:
        port = f"port-{node.name}"
        self.ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(node.pid))
        self.ip("link", "set", port, "master", "br0", "up")
        node.run("ip", "addr", "add", f"{node.address}/24", "dev", "eth0")
        node.run("ip", "link", "set", "eth0", "up")
        return node

    def _start_slurm(self) -> None:
        etc, munge = self.folder / "etc", self.folder / "munge"
        conf = SLURM_CONF.format(folder=self.folder, network=NETWORK, nodes=len(self._names), gpus=self._gpus)
        (etc / "slurm.conf").write_text(conf)
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (etc / "gres.conf").write_text(f"Name=gpu File={self.folder}/dev/nvidia[0-{self._gpus - 1}]\n")
        for number in range(self._gpus):  # null devices: they count as GPUs, nothing else
            os.mknod(self.folder / "dev" / f"nvidia{number}", 0o20666, os.makedev(1, 3))
        key = munge / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        (self.folder / "munge" / "log").touch()
        self.run(
            "munged", "--force", f"--key-file={key}", f"--socket={munge}/sock", f"--log-file={munge}/log",
            f"--pid-file={munge}/pid", f"--seed-file={munge}/seed",
        )  # fmt: skip
        self.run("slurmctld")
        for name, node in self.nodes.items():
            (self.folder / "spool" / name).mkdir()
            node.run("slurmd", "-N", name)
        wait_for(self._idle, 30, lambda: self.run("sinfo", "-N", "-l", check=False))

    def _idle(self) -> bool:
        states = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).split()
        return len(states) == len(self.nodes) and set(states) == {"idle"}

    def _strangers(self, node: Node) -> list[int]:
        """Return the processes of a node that are not the lab's own."""
        return sorted(set(node.pids()) - set(node.pids("slurmd -N")) - set(node.pids("sshd_config")))


def wait_for(
    happened: Callable[[], object], timeout: float, say: Callable[[], str], every: float = 0.05
) -> None:
    """Wait until `happened()`; AssertionError with `say()` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {say()}"
        time.sleep(every)


def enter(pid: int) -> None:
    """Give this process the network and the name of the host whose first process this is."""
    libc = ctypes.CDLL(None, use_errno=True)
    for name in ("net", "uts"):
        descriptor = os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY)
        if libc.setns(descriptor, 0):
            raise OSError(ctypes.get_errno(), f"setns {name}")
        os.close(descriptor)


def train_on_nodes(recipe: str, places: Sequence[tuple[int, str]], overrides: Sequence[str] = ()) -> None:
    """One forked rank: go to its node (`Lab.places`), then do what `qwenvl-dist train` does."""
    from tests.training.forked import train

    rank = int(os.environ["RANK"])
    pid, main_address = places[rank]
    enter(pid)
    os.environ.update(GLOO_SOCKET_IFNAME="eth0")  # the machine's /etc/hosts does not know the host
    os.environ.update(MASTER_ADDR=main_address, LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", GROUP_RANK=str(rank))
    train(recipe, *overrides)


def _tail(path: Path, characters: int = 6000) -> str:
    return path.read_text(errors="replace")[-characters:] if path.is_file() else f"{path}: not there"
