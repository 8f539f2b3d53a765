"""Start ranks from a process that has imported everything: a second instead of ten."""

import multiprocessing
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.ranks import free_port

_PRELOADED = ["deepspeed", "accelerate", "peft", "transformers", "qwenvl_dist.training.run"]
_starter = multiprocessing.get_context("forkserver")


def train(recipe: str, *overrides: str) -> None:
    """One rank: what `qwenvl-dist train` does."""
    from qwenvl_dist.__main__ import main

    main(["train", recipe, *overrides])


def _rank(target: Callable[..., None], arguments: tuple, variables: dict[str, str], log: str) -> None:
    os.setsid()  # a rank's own children die with it
    multiprocessing.set_start_method("fork", force=True)  # as in a rank that a launcher starts
    stream = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.environ.update(variables)
    try:
        target(*arguments)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


class ForkedRanks:
    """One start of a function, a picklable one, on so many ranks; what they print is added to a log."""

    def __init__(
        self,
        target: Callable[..., None],
        arguments: tuple,
        world: int,
        log: Path,
        env: dict[str, str] | None = None,
    ) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _starter.set_forkserver_preload(_PRELOADED)
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1}
        log.touch()  # a rank opens it only after it was forked
        self.log, self._from = log, log.stat().st_size
        self.ranks: list[BaseProcess] = []
        for rank in range(world):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            variables = {name: str(value) for name, value in {**rendezvous, **place, **(env or {})}.items()}
            process = _starter.Process(target=_rank, args=(target, arguments, variables, str(log)))
            process.start()
            self.ranks.append(process)

    @property
    def codes(self) -> list[int | None]:
        """Of each rank; None while it runs."""
        return [process.exitcode for process in self.ranks]

    def said(self) -> str:
        """What the ranks have written to the log since they were started."""
        with self.log.open(errors="replace") as file:
            file.seek(self._from)
            return file.read()

    def wait(self, timeout: float) -> list[int | None]:
        """Return the exit codes; those that do not end in time are killed."""
        deadline = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = self.codes
        self.kill(random.Random(0))
        return codes

    def kill(self, chance: random.Random) -> None:
        """Send SIGKILL to all ranks and their loader workers, one rank after another."""
        for process in chance.sample(self.ranks, len(self.ranks)):
            assert process.pid
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                process.kill()  # it has no group of its own yet, or is gone
        for process in self.ranks:
            process.join()
