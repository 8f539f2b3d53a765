"""Starts that would leave each process with a world of its own, and hosts whose name is the loopback's."""

import socket

import pytest

from qwenvl_dist import launched
from qwenvl_dist.errors import UserError
from qwenvl_dist.launched import choose_interface, require_whole_world

RANK = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_NTASKS": "1", "SLURM_NNODES": "1"},
        {
            **RANK,
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "1",
            "SLURM_NTASKS": "2",
            "SLURM_STEP_NUM_NODES": "2",
        },
        {**RANK, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "SLURM_STEP_NUM_NODES": "1"},
    ],
)
def test_one_process_alone_and_one_whole_world_are_let_through(environment: dict[str, str]) -> None:
    require_whole_world(environment)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"SLURM_NTASKS": "2"},
            "SLURM_NTASKS = 2, but WORLD_SIZE is not set: each of these processes would train al",
        ),
        (
            {**RANK, "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "QWENVL_WORLD_SIZE": "2"},
            "WORLD_SIZE = 1, but launch/node.sh was to start QWENVL_WORLD_SIZE = 2 ranks",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE = 4, but WORLD_SIZE is not set"),
        # accelerate launch --cpu --num_machines 2
        (
            {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"},
            "MASTER_ADDR, MASTER_PORT set, but WORLD_SIZE is not",
        ),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "but LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"),
        (
            {**RANK, "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "SLURM_STEP_NUM_NODES": "2"},
            "SLURM_STEP_NUM_NODES = 2, but all 8 ranks are on this node: each node would train alone",
        ),
        ({"SLURM_NTASKS": "two"}, "SLURM_NTASKS = 'two': must be a whole number"),
    ],
)
def test_several_processes_that_would_each_train_alone_are_refused(
    environment: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        require_whole_world(environment)
    assert message in str(caught.value) and "\n" not in str(caught.value)


SEVERAL = {**RANK, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A host whose name is in /etc/hosts as Debian writes it; the dictionary holds its interfaces."""
    interfaces = {"eth0": "10.77.0.1"}
    monkeypatch.setattr(socket, "gethostbyname", lambda _name: "127.0.1.1")
    monkeypatch.setattr(launched, "_interfaces", lambda: interfaces)
    return interfaces


def test_the_only_interface_is_taken_where_the_hosts_name_is_the_loopbacks(
    host: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {**SEVERAL, "MASTER_ADDR": "no.such.host.invalid"}
    choose_interface(environment)
    assert environment["GLOO_SOCKET_IFNAME"] == "eth0"
    assert "resolves to 127.0.1.1, where no other host reaches it: using GLOO_SOCKET_IFNAME=eth0" in (
        capsys.readouterr().err
    )


def test_without_a_route_the_interface_must_be_named(host: dict[str, str]) -> None:
    host["ib0"] = "10.78.0.1"
    environment = {**SEVERAL, "MASTER_ADDR": "no.such.host.invalid"}
    with pytest.raises(UserError, match="set GLOO_SOCKET_IFNAME to one of eth0, ib0"):
        choose_interface(environment)
    environment["GLOO_SOCKET_IFNAME"] = "ib0"
    choose_interface(environment)
    assert environment["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize("change", [{"LOCAL_WORLD_SIZE": "2"}, {"MASTER_ADDR": "127.0.0.1"}])
def test_on_one_host_the_loopback_is_right(host: dict[str, str], change: dict[str, str]) -> None:
    environment = {**SEVERAL, **change}
    choose_interface(environment)
    assert "GLOO_SOCKET_IFNAME" not in environment
