"""Run a function in real processes, one a rank, that talk over gloo: the ground of every distributed test."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run_ranks(
    target: str, world: int, *, timeout: float, env: dict[str, str] | None = None, **kwargs: Any
) -> list[str]:
    """Run `module:function(**kwargs)` on ranks 0..world-1 and return each rank's stdout.

    The function finds its place in RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT and sets up its
    own process group. When a rank fails or the time is out, all are killed and every rank's stderr is shown.

    Args:
        target: `tests.some_module:run_something`; `kwargs` must fit in JSON.
        world: number of ranks.
        timeout: seconds for all of them together.
        env: more environment variables; `{rank}` in a value becomes the rank.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(Path(folder, f"{rank}.out"), Path(folder, f"{rank}.err")) for rank in range(world)]
        processes = []
        for rank, (out, err) in enumerate(outputs):
            variables = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "DS_ACCELERATOR": "cpu",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
                **{name: value.replace("{rank}", str(rank)) for name, value in (env or {}).items()},
            }
            with out.open("w") as stdout, err.open("w") as stderr:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.ranks", target, json.dumps(kwargs)],
                        cwd=ROOT,
                        env=variables,
                        stdout=stdout,
                        stderr=stderr,
                        start_new_session=True,  # a rank's own children die with it
                    )
                )
        try:
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


def _wait(processes: list[subprocess.Popen], deadline: float, timeout: float) -> str | None:
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
    module, function = sys.argv[1].split(":")
    getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))
