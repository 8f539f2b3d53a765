"""The wish to stop early. Imports nothing heavy: it is listened for before anything else is done."""

from __future__ import annotations

import signal
from typing import Any


class StopSignal:
    """Remembers that SIGUSR1 or SIGTERM came, until the ranks next agree on where to stop.

    SIGUSR1, a scheduler's early warning, counts from the start. SIGTERM does from `joined` on: a rank that still waits
    for others has nothing to save, and goes at once.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        signal.signal(signal.SIGUSR1, self._receive)

    def joined(self) -> None:
        """All ranks are there to agree."""
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, _frame: Any) -> None:
        self.received = signal.Signals(number).name
