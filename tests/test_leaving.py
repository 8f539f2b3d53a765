"""A process that has done its work ends with its exit code, whatever torch's threads still do."""

import subprocess
import sys

import pytest

from tests.ranks import ROOT

_BUSY = """
import atexit, sys, threading, torch
torch.set_num_threads(1)
numbers = torch.zeros(100)
def work():
    while True:
        numbers + numbers
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
atexit.register(print, "what is to happen at exit")
"""


def end_of(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_the_interpreters_own_end_would_abort() -> None:
    assert end_of(f"{_BUSY}\nsys.exit(0)").returncode < 0  # else there is no need for what is tested below


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--help"], 0, "usage: qwenvl-dist"),  # SystemExit(0)
        (["train", "none.yaml"], 2, ""),  # SystemExit(2)
        (["preflight", "launch/recipes/demo.yaml", "--list"], 0, "environment"),  # returned
    ],
)
def test_a_command_ends_beside_threads_that_are_inside_torch(words: list[str], code: int, said: str) -> None:
    done = end_of(f"{_BUSY}\nfrom qwenvl_dist.__main__ import run\nsys.argv[1:] = {words!r}\nrun()")
    assert done.returncode == code, done.stderr[-4000:]
    assert said in done.stdout and done.stdout.endswith("what is to happen at exit\n")


@pytest.mark.parametrize(
    ("work", "code"),
    [
        ("lambda: None", 0),
        ("lambda: 3", 3),
        ("lambda: sys.exit()", 0),
        ("lambda: sys.exit('in one line')", 1),
        ("lambda: 1 / 0", 1),
        ("lambda: print('left in the buffer') or sys.stdout.detach().close()", 120),
        ("lambda: print('left in the buffer') or sys.stdout.detach().close() or 3", 120),
    ],
)
@pytest.mark.parametrize("torch", ["", "import torch"])
def test_exit_codes_are_those_of_an_ordinary_end(torch: str, work: str, code: int) -> None:
    done = end_of(
        f"import sys\n{torch}\nfrom qwenvl_dist.leaving import run_and_leave\nrun_and_leave({work})"
    )
    assert done.returncode == code, done.stderr
