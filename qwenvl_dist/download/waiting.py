"""Waiting for an SDK so that Ctrl-C is heard."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

Result = TypeVar("Result")


def heard(action: Callable[[], Result]) -> Result:
    """Run an action in a thread of its own, and return or raise what it does.

    The SDKs wait for their threads when they are interrupted, until each has its whole file. Here KeyboardInterrupt is
    raised at once, and whoever ends the program must not wait for the thread either.
    """
    done: dict[str, Any] = {}

    def run() -> None:
        try:
            done["result"] = action()
        except BaseException as error:  # raised by the thread that waits
            done["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if "error" in done:
        raise done["error"]
    return done["result"]
