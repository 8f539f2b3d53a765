"""Start ranks from a process that has imported everything: a moment instead of six seconds of a core each.

`start` gives a process with what subprocess.Popen would have given it: its own session, environment, standard streams,
arguments, random numbers and signal handlers, and the end of a command. What the libraries look at once,
when they are imported, is that of the server: where a rank is to see something else there, it starts afresh.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn, TextIO

from qwenvl_dist.leaving import run_and_leave

ROOT = Path(__file__).parents[1]
# Not peft: with it torch allocates its first tensor, and what THP_MEM_ALLOC_ENABLE is then holds for ever.
_PRELOADED = (
    "torch",
    "deepspeed",
    "deepspeed.runtime.zero.muon.original_muon",  # every engine imports it, and torch's compiler with it
    "accelerate",
    "transformers.modeling_utils",
    "transformers.models.qwen2_vl.modeling_qwen2_vl",
    "transformers.models.qwen2_vl.processing_qwen2_vl",
    "pytest",
    "qwenvl_dist.preflight.joined",
    "qwenvl_dist.training.run",
)
# Variables that the interpreter, an allocator or a library looks at when it is loaded begin so.
_READ_AT_IMPORT = (
    "ACCELERATE_LOG_LEVEL", "ACCELERATE_USE_MEGATRON_LM", "DEEPSPEED_", "DS_", "GLIBC_", "GOMP_", "HF_", "HOME",
    "HUGGINGFACE_", "KMP_", "LD_", "MALLOC_", "MKL", "NPY_", "NUMPY_", "OMP_", "ONEDNN_", "OPENBLAS_", "PILLOW_",
    "PYTHON", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TEMP", "THP_", "TMP", "TORCH_", "TRANSFORMERS_", "XDG_",
)  # fmt: skip
_NUMBER = struct.Struct("q")
_LOST = 255  # the exit code of a process whose server is gone


class Forked:
    """A process that the server started: what of subprocess.Popen the tests need."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status = status  # where the server writes the exit code

    def poll(self) -> int | None:
        """Return the exit code as Popen has it, None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code; subprocess.TimeoutExpired after `timeout` seconds."""
        if self.returncode is None:
            told = select.poll()
            told.register(self._status, select.POLLIN)
            if not told.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode = self._read()
        return self.returncode

    def kill(self) -> None:
        """Send SIGKILL to the process alone."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def _read(self) -> int:
        said = os.read(self._status, _NUMBER.size)
        os.close(self._status)
        if said:
            return _NUMBER.unpack(said)[0]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        return _LOST


class _Server:
    """A process that has imported everything and forks when it is asked to; it ends with this one."""

    def __init__(self) -> None:
        self.environment = interpreter_variables(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._control, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.warm", str(theirs.fileno())],
                cwd=ROOT, env=self.environment, pass_fds=[theirs.fileno()], start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=self._said, stderr=self._said,
            )  # fmt: skip

    def fork(self, request: dict[str, Any], stdout: TextIO, stderr: TextIO) -> Forked:
        content = json.dumps(request).encode()
        status, theirs = os.pipe()
        try:
            with os.fdopen(theirs, "wb"):
                descriptors = [stdout.fileno(), stderr.fileno(), theirs]
                socket.send_fds(self._control, [_NUMBER.pack(len(content))], descriptors)
                self._control.sendall(content)
            return Forked(_NUMBER.unpack(os.read(status, _NUMBER.size))[0], status)
        except BaseException as error:
            os.close(status)
            self.process.kill()  # so that it forks nobody whom nobody knows
            self.process.wait()
            if isinstance(error, (OSError, struct.error)):
                self._said.seek(0)
                raise RuntimeError(f"no server of ranks any more: {self._said.read()[-4000:]!r}") from error
            raise

    def end(self) -> None:
        self._control.shutdown(socket.SHUT_RDWR)  # for forks of this process that hold it too
        self.process.wait()


# One for the even ranks and one for the odd: forks of one process have the same order of sets of strings, in which two
# ranks that a launcher starts differ.
_servers: dict[int, _Server] = {}


def start(
    target: str,
    arguments: dict[str, Any] | list[Any],
    environment: dict[str, str],
    stdout: TextIO,
    stderr: TextIO,
    fresh: bool = False,
) -> Forked | subprocess.Popen:
    """Call `module:function` in a process of its own session, with ROOT as its folder.

    Args:
        target: what to call.
        arguments: by name or in order; they must fit in JSON.
        environment: all of the process's variables, RANK and WORLD_SIZE among them.
        stdout: an open file; the process writes on where it is.
        stderr: the same.
        fresh: start a new interpreter. Also done, with a warning, where a variable that is read at import differs.
    """
    words = [target, json.dumps(arguments)]
    if not fresh:
        for number in range(
            min(2, int(environment["WORLD_SIZE"]))
        ):  # at once, so that both import at the same time
            if number not in _servers or _servers[number].process.poll() is not None:
                _servers[number] = _Server()
        server = _servers[int(environment["RANK"]) % 2]
        others = _differ(environment, server.environment)
        if not others:
            return server.fork({"words": words, "environment": environment}, stdout, stderr)
        warnings.warn(
            f"{target} starts afresh, which takes seconds: {', '.join(others)} differ", stacklevel=2
        )
    return subprocess.Popen(
        [sys.executable, "-m", "tests.ranks", *words], cwd=ROOT, env=environment, stdout=stdout, stderr=stderr,
        start_new_session=True,
    )  # fmt: skip


def interpreter_variables(**more: str) -> dict[str, str]:
    """Return this process's variables for a new interpreter that finds the tests and the package of this checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **more}


def call(target: str, arguments: str) -> NoReturn:
    """Call `module:function` with arguments in JSON, and end this process as a command ends."""
    module, name = target.split(":")
    given = json.loads(arguments)

    def work() -> None:
        function = getattr(importlib.import_module(module), name)
        function(**given) if isinstance(given, dict) else function(*given)

    run_and_leave(work)


def _differ(left: dict[str, str], right: dict[str, str]) -> list[str]:
    names = sorted(name for name in {*left, *right} if name.startswith(_READ_AT_IMPORT))
    return [name for name in names if left.get(name) != right.get(name)]


@atexit.register
def _end_servers() -> None:
    for server in _servers.values():
        server.end()


def _serve(control: socket.socket, imported: dict[str, str]) -> list[str]:
    """Fork for every request; return its words in the fork only. `imported` are variables that imports have set."""
    running: dict[int, tuple[int, int]] = {}  # pidfd -> process, where its exit code is due
    while True:
        ready = select.select([control, *running], [], [])[0]
        for descriptor in [number for number in running if number in ready]:
            pid, status = running.pop(descriptor)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with contextlib.suppress(BrokenPipeError):
                os.write(status, _NUMBER.pack(code))
            os.close(status)
            os.close(descriptor)
        if control not in ready:
            continue
        header, handed_over, *_ = socket.recv_fds(control, _NUMBER.size, 3)
        if not header:  # who asked is gone
            for pid, _ in running.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            raise SystemExit
        with control.makefile("rb") as file:
            content = file.read(_NUMBER.unpack(header)[0])
        # A thread would be missing in the fork, with the locks that it holds.
        assert len([*Path("/proc/self/task").iterdir()]) == threading.active_count() == 1
        stdout, stderr, status = handed_over
        pid = os.fork()
        if pid == 0:
            control.close()
            for descriptor, (_, other) in running.items():
                os.close(descriptor)
                os.close(other)
            os.setsid()  # a rank's own children die with it
            os.write(status, _NUMBER.pack(os.getpid()))  # not before: who knows the number may kill the group
            for number, descriptor in ((1, stdout), (2, stderr)):
                os.dup2(descriptor, number)
            for descriptor in handed_over:
                os.close(descriptor)
            request = json.loads(content)
            _take_over(imported | request["environment"], request["words"])
            return request["words"]
        running[os.pidfd_open(pid)] = pid, status
        os.close(stdout)
        os.close(stderr)


def _take_over(environment: dict[str, str], words: list[str]) -> None:
    """Let this fork be what a new process would be."""
    import numpy as np
    import torch

    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    np.random.seed()
    torch.default_generator.seed()
    sys.argv[:] = [str(ROOT / "tests" / "ranks.py"), *words]


if __name__ == "__main__":
    channel, before = socket.socket(fileno=int(sys.argv[1])), {*os.environ}
    for name in _PRELOADED:
        importlib.import_module(name)
    sys.stdout.flush()
    sys.stderr.flush()
    gc.collect()
    gc.freeze()  # or each fork would go through all of it, and copy it, when it ends
    call(*_serve(channel, {name: value for name, value in os.environ.items() if name not in before}))
