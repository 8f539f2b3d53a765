"""How a process ends in which torch has run. Imports nothing heavy."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

_UNSAID = 120  # what the interpreter ends with when it cannot write what is left in stdout


def run_and_leave(work: Callable[[], int | None]) -> NoReturn:
    """Do the work and end the process with the exit code that it returns, or that a SystemExit carries.

    Once torch is loaded, everything that is to happen at exit happens, but the interpreter does not take itself apart:
    a thread of gloo's that still lets go of a tensor, or one that is inside torch, would then abort a process that has
    done its work (https://github.com/pytorch/pytorch/issues/190489, .../38228), and a launcher would call it failed.
    """
    try:
        code = work()
    except SystemExit as left:
        if not isinstance(left.code, int | None):
            raise
        code = left.code
    if "torch" not in sys.modules:
        sys.exit(code)
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]  (as multiprocessing ends its processes)
    atexit._run_exitfuncs()
    code = code or 0
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = _UNSAID
    os._exit(code)
