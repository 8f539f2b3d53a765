"""Runs that a test looks at, warns or kills while they go on."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import TimeoutExpired

from tests import warm
from tests.ranks import free_port, rank_variables


def train(recipe: str, *overrides: str) -> None:
    """One rank: what `qwenvl-dist train` does."""
    from qwenvl_dist.__main__ import main

    main(["train", recipe, *overrides])


class ForkedRanks:
    """One start of a function of a module on so many ranks; what they print is added to a log.

    Its arguments must fit in JSON.
    """

    def __init__(
        self,
        target: Callable[..., None],
        arguments: tuple,
        world: int,
        log: Path,
        env: dict[str, str] | None = None,
    ) -> None:
        port = free_port()
        self.log = log
        self.ranks = []
        with log.open("a") as file:
            self._from = log.stat().st_size
            for rank in range(world):
                variables = rank_variables(rank, world, port, env or {})
                name = f"{target.__module__}:{target.__name__}"
                self.ranks.append(warm.start(name, list(arguments), variables, file, file))

    @property
    def codes(self) -> list[int | None]:
        """Of each rank; None while it runs."""
        return [process.poll() for process in self.ranks]

    def said(self) -> str:
        """What the ranks have written to the log since they were started."""
        with self.log.open(errors="replace") as file:
            file.seek(self._from)
            return file.read()

    def wait(self, timeout: float) -> list[int | None]:
        """Return the exit codes; those that do not end in time are killed."""
        deadline = time.monotonic() + timeout
        for process in self.ranks:
            with contextlib.suppress(TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        codes = self.codes
        self.kill(random.Random(0))
        return codes

    def kill(self, chance: random.Random) -> None:
        """Send SIGKILL to all ranks and their loader workers, one rank after another."""
        for process in chance.sample(self.ranks, len(self.ranks)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.ranks:
            process.wait()
