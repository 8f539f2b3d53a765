"""The clock of a launch: it starts with the process, and every second goes to one part."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwenvl_dist import startup
from qwenvl_dist.startup import StartUp


def test_the_clock_starts_with_the_process_not_with_the_import() -> None:
    code = "import time; time.sleep(0.3); from qwenvl_dist.startup import process_seconds; print(process_seconds())"
    launched = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert 0.28 < float(done.stdout) < time.perf_counter() - launched + 0.02  # the kernel counts in 10 ms


def test_without_proc_it_starts_with_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    before = time.perf_counter() - startup._IMPORTED
    assert before <= startup.process_seconds() <= time.perf_counter() - startup._IMPORTED


def test_every_second_goes_to_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(startup, "process_seconds", lambda: 2.0)
    clock = StartUp()
    for part, seconds in (("imports", 1), ("join", 2), ("imports", 3), (None, 50), ("model", 4)):
        now[0] += seconds
        clock.mark(part) if part else clock.leave_out()
    now[0] += 5
    clock.finish()
    now[0] += 6
    clock.mark("first_batch")
    clock.finish()
    assert clock.seconds == {"imports": 6, "join": 2, "model": 4, "first_step": 5}
