"""Is the world that this process was started into the one that was meant? By the environment; imports no torch."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping

from qwenvl_dist.errors import UserError
from qwenvl_dist.logs import get_logger

log = get_logger(__name__)

# Where other launchers say how many processes they started; without WORLD_SIZE each would train alone.
_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _count(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment.get(name, "1"))
    except ValueError:
        raise UserError(
            f"{name} = {environment[name]!r}: must be a whole number; correct or unset it"
        ) from None


def require_whole_world(environment: Mapping[str, str] = os.environ) -> None:
    """Make sure that several processes were not started as several runs, each of which would end well. UserError."""
    given = [name for name in _RANK_VARIABLES if name in environment]
    if "WORLD_SIZE" in environment:
        missing = [name for name in _RANK_VARIABLES if name not in environment]
        if missing:
            raise UserError(
                f"WORLD_SIZE = {environment['WORLD_SIZE']}, but {', '.join(missing)} not set: a rank needs all of "
                f"{', '.join(_RANK_VARIABLES)}; start with accelerate launch, or set none of them to train alone"
            )
        world = _count(environment, "WORLD_SIZE")
        wanted = _count(environment, "QWENVL_WORLD_SIZE") if "QWENVL_WORLD_SIZE" in environment else world
        if wanted != world:
            raise UserError(
                f"WORLD_SIZE = {world}, but launch/node.sh was to start QWENVL_WORLD_SIZE = {wanted} ranks: nodes "
                "would train alone, or ranks are missing; unset QWENVL_WORLD_SIZE to launch otherwise"
            )
        # `srun accelerate launch` without --num_machines: a world on each node.
        nodes = _count(environment, "SLURM_STEP_NUM_NODES")
        if nodes > 1 and world == _count(environment, "LOCAL_WORLD_SIZE"):
            raise UserError(
                f"SLURM_STEP_NUM_NODES = {nodes}, but all {world} ranks are on this node: each node would train alone; "
                "give accelerate launch --num_machines, --num_processes of all nodes, --machine_rank $SLURM_NODEID and "
                "--main_process_ip"
            )
        return
    for name in _COUNTS:
        if _count(environment, name) > 1:
            raise UserError(
                f"{name} = {environment[name]}, but WORLD_SIZE is not set: each of these processes would train alone; "
                "start one accelerate launch a node with a file of launch/accelerate/, or unset "
                f"{name} to train one process on purpose"
            )
    if given:  # also what `accelerate launch --cpu --num_machines 2` leaves
        raise UserError(
            f"{', '.join(given)} set, but WORLD_SIZE is not, as after accelerate launch --cpu with several machines: "
            "each machine would train alone; launch with a file of launch/accelerate/, or unset "
            f"{', '.join(given)} to train one process on purpose"
        )


def choose_interface(environment: MutableMapping[str, str] = os.environ) -> None:
    """Name the network interface that gloo is to use, where it would take the loopback and reach no other host.

    Gloo listens at the address of this host's name, which distributions like to map to 127.0.0.1 or 127.0.1.1 in
    /etc/hosts. The interface is the one whose address leads to MASTER_ADDR. GLOO_SOCKET_IFNAME stays as it is when set.
    Raises UserError when there is none to choose.
    """
    several_hosts = _count(environment, "WORLD_SIZE") > _count(environment, "LOCAL_WORLD_SIZE")
    master = environment.get("MASTER_ADDR", "localhost")
    if not several_hosts or master == "localhost" or _is_loopback(master):
        return
    name = socket.gethostname()
    own = _resolve(name)
    if environment.get("GLOO_SOCKET_IFNAME") or (own and not _is_loopback(own)):
        return
    interfaces = _interfaces()
    chosen = _route_to(master, interfaces)
    said = (
        f"this host's name, {name}, resolves to {own}"
        if own
        else f"this host's name, {name}, does not resolve"
    )
    if chosen is None:
        raise UserError(
            f"{said}, where no other host reaches it, and no single interface leads to MASTER_ADDR = {master}; "
            f"set GLOO_SOCKET_IFNAME to one of {', '.join(interfaces) or 'its network interfaces'}, or mend /etc/hosts"
        )
    environment["GLOO_SOCKET_IFNAME"] = chosen
    if environment.get("LOCAL_RANK") == "0":
        log.warning(
            "%s, where no other host reaches it: using GLOO_SOCKET_IFNAME=%s (%s), which leads to MASTER_ADDR=%s",
            said, chosen, interfaces[chosen], master,
        )  # fmt: skip


def _is_loopback(address: str) -> bool:
    return address.startswith("127.")


def _resolve(name: str) -> str | None:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


def _route_to(address: str, interfaces: Mapping[str, str]) -> str | None:
    """Return the interface whose address the kernel would send from, else the only one there is."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing
            source = probe.getsockname()[0]
    except OSError:
        source = ""
    found = [name for name, own in interfaces.items() if own == source]
    if found:
        return found[0]
    # MASTER_ADDR is this host's own name, on the loopback too.
    return next(iter(interfaces)) if len(interfaces) == 1 else None


def _interfaces() -> dict[str, str]:
    """Return the interfaces that have an IPv4 address which is no loopback, with it."""
    import psutil

    return {
        name: address.address
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET and not _is_loopback(address.address)
    }
