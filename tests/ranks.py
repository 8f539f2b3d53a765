"""Run a function in real processes, one a rank, that talk over gloo: the ground of every distributed test."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests import warm
from tests.warm import ROOT


def run_ranks(
    target: str,
    world: int,
    *,
    timeout: float,
    env: dict[str, str] | None = None,
    fresh: bool = False,
    **kwargs: Any,
) -> list[str]:
    """Run `module:function(**kwargs)` on ranks 0..world-1 and return each rank's stdout.

    The function finds its place in RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT and sets up its
    own process group. When a rank fails or the time is out, all are killed and every rank's stderr is shown.

    Args:
        target: `tests.some_module:run_something`; `kwargs` must fit in JSON.
        world: number of ranks.
        timeout: seconds for all of them together.
        env: more environment variables; `{rank}` in a value becomes the rank.
        fresh: give each rank an interpreter of its own, which imports everything itself.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(Path(folder, f"{rank}.out"), Path(folder, f"{rank}.err")) for rank in range(world)]
        processes = []
        try:
            for rank, (out, err) in enumerate(outputs):
                variables = rank_variables(rank, world, port, env or {})
                with out.open("w") as stdout, err.open("w") as stderr:
                    processes.append(warm.start(target, kwargs, variables, stdout, stderr, fresh))
            failure = _wait(processes, time.monotonic() + timeout, timeout)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if failure:
            shown = "\n".join(
                f"--- rank {rank}, stderr:\n{_tail(err)}" for rank, (_, err) in enumerate(outputs)
            )
            raise AssertionError(f"{target} on {world} ranks: {failure}\n{shown}")
        return [out.read_text() for out, _ in outputs]


def rank_variables(rank: int, world: int, port: int, more: dict[str, str]) -> dict[str, str]:
    """Return the environment of a rank that a launcher starts on this host; `{rank}` in a value becomes the rank."""
    place = warm.interpreter_variables(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
    )
    return place | {name: value.replace("{rank}", str(rank)) for name, value in more.items()}


def command(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `qwenvl-dist ...` and insist on its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "qwenvl_dist", *map(str, arguments)],
        capture_output=True, text=True, timeout=240, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-4000:]
    return done


def free_port() -> int:
    """Return a TCP port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait(processes: list[Any], deadline: float, timeout: float) -> str | None:
    """Wait for all ranks; return what went wrong first, or None."""
    while True:
        codes = [process.poll() for process in processes]
        failed = [f"rank {rank} ended with {code}" for rank, code in enumerate(codes) if code]
        if failed:
            time.sleep(0.5)  # let the others say what they saw
            return ", ".join(failed)
        running = [rank for rank, code in enumerate(codes) if code is None]
        if not running:
            return None
        if time.monotonic() > deadline:
            return f"ranks {running} still ran after {timeout:g} s"
        time.sleep(0.05)


def _tail(path: Path, characters: int = 6000) -> str:
    return path.read_text(errors="replace")[-characters:]


if __name__ == "__main__":
    warm.call(*sys.argv[1:])
