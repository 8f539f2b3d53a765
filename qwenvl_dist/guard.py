"""A thread beside the work that ends this process when what it depends on has gone. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Self

from qwenvl_dist.logs import place
from qwenvl_dist.outcome import Outcome

LOOK_EVERY_SECONDS = 0.5
# Set in the environment of what they start by torchrun, which accelerate calls for several ranks, and by accelerate.
_LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")

Check = Callable[[], str | None]  # what has gone, or None


class RunningTime:
    """Counts the seconds in which this process ran: the time that it was stopped or suspended is left out."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last = time.monotonic()

    def tick(self) -> float:
        """Count the time since the last tick, of a long one no more than two looks; return all since `reset`."""
        now = time.monotonic()
        self.seconds += min(now - self._last, 2 * LOOK_EVERY_SECONDS)
        self._last = now
        return self.seconds

    def reset(self) -> None:
        """Start again from zero."""
        self.seconds, self._last = 0.0, time.monotonic()


class Guard:
    """Asks its checks twice a second, also while the main thread waits for other ranks or a device.

    A check that answers ends the process with exit code 1, its answer on stderr and in the rank's outcome.
    """

    def __init__(self, outcome: Outcome | None = None) -> None:
        self.outcome = outcome or Outcome()
        self.tell_others: Callable[[str], object] = lambda reason: (
            None
        )  # why this process ends; takes some seconds
        self._checks: list[Check] = []
        self._left = threading.Event()

    def watch(self, check: Check) -> None:
        """Ask this too from now on."""
        self._checks.append(check)

    def release(self, check: Check) -> None:
        """Ask this no more."""
        with contextlib.suppress(ValueError):
            self._checks.remove(check)

    def __enter__(self) -> Self:
        """Start to look."""
        self._thread = threading.Thread(target=self._watch_on, name="guard", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Look no more.

        A thread that goes on while the interpreter ends may be the one that the garbage collector runs in, and aborts
        the process inside torch's destructors.
        """
        self._left.set()
        self._thread.join(10 * LOOK_EVERY_SECONDS)

    def _watch_on(self) -> None:
        while not self._left.wait(LOOK_EVERY_SECONDS):
            answer = self.look()
            if answer and not self._left.is_set():
                self.outcome.write("failed", answer)
                self.tell_others(answer)
                self.end(answer)

    def look(self) -> str | None:
        """Return the first answer of a check."""
        return next((answer for check in list(self._checks) if (answer := check())), None)

    def end(self, reason: str) -> NoReturn:
        """Leave at once: other ranks, and a main thread that may wait for ever, must not hold this up."""
        self.outcome.write("failed", reason)
        with contextlib.suppress(OSError, ValueError):  # whoever read this may be gone too
            print(f"[{place()}] error: {reason}", file=sys.stderr, flush=True)
        os._exit(1)


@dataclass(frozen=True)
class _Link:
    """One process and the one that had started it."""

    pid: int
    parent: int
    parent_name: str


class Launchers:
    """The processes that started this one and must be there as long as it runs.

    Under Slurm all up to the step's manager, slurmstepd: a job that Slurm believes to be over must not go on. Else the
    launcher alone. A process without a launcher may outlive the shell that it came from.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        chain = _ancestry(os.getpid())
        managers = [number for number, link in enumerate(chain, 1) if link.parent_name == "slurmstepd"]
        launched = any(name in environment for name in _LAUNCHER_VARIABLES)
        self._links = chain[: max(managers, default=int(launched))]

    def gone(self) -> str | None:
        """Say which of them is there no more. A process whose parent ends gets another one."""
        for link in self._links:
            if _parent(link.pid)[0] != link.parent:
                return (
                    f"process {link.parent} ({link.parent_name}), which had started this rank, is gone; "
                    "this rank ends too, since nothing could stop it any more"
                )
        return None


def _parent(pid: int) -> tuple[int, str]:
    """Return the id of a process's parent and the name of the process itself, (0, "") where it cannot be seen."""
    try:
        name, rest = Path(f"/proc/{pid}/stat").read_text(errors="replace").rsplit(")", 1)
        return int(rest.split()[1]), name.partition("(")[2]
    except (OSError, ValueError, IndexError):
        return (os.getppid() if pid == os.getpid() else 0), ""


def _ancestry(pid: int) -> list[_Link]:
    links = []
    parent = _parent(pid)[0]
    while parent > 1:
        grandparent, name = _parent(parent)
        if not name:  # hidden from us
            break
        links.append(_Link(pid, parent, name))
        pid, parent = parent, grandparent
    return links
