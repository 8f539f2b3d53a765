"""Seconds from the launch of this process to its first step, by what they went into."""

from __future__ import annotations

import os
import time
from pathlib import Path

_IMPORTED = time.perf_counter()


def process_seconds() -> float:
    """Return the seconds since this process was started; where there is no /proc, since this module was imported."""
    try:
        # Field 22 of proc_pid_stat(5), ticks since boot; the command's name before it can hold blanks and brackets.
        ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return time.perf_counter() - _IMPORTED


class StartUp:
    """A clock that runs since the launch: each mark gives the time since the last one to a part of the start-up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.finished = False
        self._last = time.perf_counter() - process_seconds()

    def mark(self, part: str) -> None:
        """Count the time since the last mark to `part`, which can have several stretches. Not after `finish`."""
        if not self.finished:
            now = time.perf_counter()
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
            self._last = now

    def leave_out(self) -> None:
        """Count the time since the last mark to nothing."""
        self._last = time.perf_counter()

    def finish(self) -> None:
        """Count the time since the last mark to the first step, and stop."""
        self.mark("first_step")
        self.finished = True
