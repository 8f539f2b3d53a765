"""A rank that is forked from a process that has imported everything is what a new interpreter would be."""

import atexit
import importlib
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from tests.ranks import free_port, rank_variables, run_ranks

pytestmark = pytest.mark.dist


def tell(out: str, end: str = "") -> None:
    """One rank: write down what this process is, and end in some way."""
    import numpy as np
    import torch

    folder, rank, warmed = Path(out), os.environ["RANK"], "deepspeed" in sys.modules
    for name in warm._PRELOADED if end == "" else ():  # some set variables
        importlib.import_module(name)
    atexit.register(print, "and its end", flush=True)
    inherited = {
        "arguments": sys.argv[1:],
        "environment": dict(os.environ),
        "folder": str(Path.cwd()),
        "temporary": tempfile.gettempdir(),
        "path": sys.path,
        "descriptors": sorted(int(path.name) for path in Path("/proc/self/fd").iterdir() if path.exists()),
        "leads": [os.getsid(0) == os.getpid(), os.getpgrp() == os.getpid()],
        "handlers": {int(number): repr(signal.getsignal(number)) for number in signal.valid_signals()},
        "masks": re.findall(r"Sig(?:Blk|Ign|Cgt):.*", Path("/proc/self/status").read_text()),
        "limits": [resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT")],
        "buffered": [sys.stdout.line_buffering, sys.stderr.line_buffering, sys.stdout.encoding],
        "multiprocessing": [repr(multiprocessing.current_process()), multiprocessing.get_start_method(allow_none=True)],
        "threads": [len([*Path("/proc/self/task").iterdir()]), torch.get_num_threads()],
    }  # fmt: skip
    own = [random.random(), np.random.rand(), torch.rand(()).item(), list({f"set {n}" for n in range(20)})]
    told = {"inherited": inherited, "own": own, "warmed": warmed}
    (folder / f"{rank}.json").write_text(json.dumps(told))
    print("what is in the buffer", end=" ")
    match end:
        case "raise":
            raise ValueError("of no use")
        case "leave":
            raise SystemExit(3)
        case "word":
            raise SystemExit("in one line")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            child = subprocess.Popen(["sleep", "1000"])
            (folder / f"child-{rank}").write_text(str(child.pid))
            child.wait()


def told(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"{rank}.json").read_text())


def test_a_fork_is_what_a_new_interpreter_is(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWENVL_GONE", "in the server when it is started, and not in the rank")
        run_ranks(f"{__name__}:tell", 2, timeout=60, out=str(tmp_path))
    found = []
    for fresh in (False, True):
        folder = tmp_path / str(fresh)
        folder.mkdir()
        variables = rank_variables(1, 2, 1234, {"QWENVL_OF_RANK": "{rank}"})
        with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
            arguments = {"out": str(folder)}
            process = warm.start(f"{__name__}:tell", arguments, variables, out, err, fresh)
        assert isinstance(process, subprocess.Popen if fresh else warm.Forked)
        assert process.wait(60) == 0, (folder / "err").read_text()
        assert (folder / "out").read_text() == "what is in the buffer and its end\n"
        found.append(json.dumps(told(folder, 1)["inherited"]).replace(str(folder), "FOLDER"))
        assert told(folder, 1)["warmed"] is not fresh
        environment = told(folder, 1)["inherited"]["environment"]
        assert environment["QWENVL_OF_RANK"] == "1" and "QWENVL_GONE" not in environment
    assert json.loads(found[0]) == json.loads(found[1])


def test_ranks_differ_in_what_is_left_to_chance(tmp_path: Path) -> None:
    run_ranks(f"{__name__}:tell", 3, timeout=60, out=str(tmp_path))
    owns = [told(tmp_path, rank)["own"] for rank in range(3)]
    for numbers in list(zip(*owns, strict=True))[:3]:
        assert len(set(numbers)) == 3
    assert owns[0][3] != owns[1][3]  # the order of a set of strings


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("raise", 1, "ValueError: of no use"),
        ("leave", 3, ""),
        ("word", 1, "in one line"),
        ("kill", -9, ""),
    ],
)
def test_the_end_of_a_rank_is_told(tmp_path: Path, end: str, code: int, said: str) -> None:
    with pytest.raises(AssertionError) as failure:
        run_ranks(f"{__name__}:tell", 1, timeout=60, out=str(tmp_path), end=end)
    lines = str(failure.value).splitlines()
    assert lines[0] == f"{__name__}:tell on 1 ranks: rank 0 ended with {code}"
    assert lines[1] == "--- rank 0, stderr:" and lines[-1].endswith(said)


def test_a_hang_is_named_and_killed_with_its_children(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] still ran after 5 s"):
        run_ranks(f"{__name__}:tell", 2, timeout=5, out=str(tmp_path), end="hang")
    for rank in (0, 1):
        child = Path("/proc", (tmp_path / f"child-{rank}").read_text())
        deadline = time.monotonic() + 5
        while child.exists() and "\nState:\tZ" not in (child / "status").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_variable_that_is_read_at_import_takes_a_new_interpreter(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="starts afresh, .*: OMP_NUM_THREADS differ"):
        run_ranks(f"{__name__}:tell", 1, timeout=60, out=str(tmp_path), env={"OMP_NUM_THREADS": "2"})
    assert told(tmp_path, 0)["inherited"]["threads"][1] == 2 and not told(tmp_path, 0)["warmed"]


def test_a_server_that_is_gone_takes_its_ranks_along_and_has_a_successor(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        arguments = {"out": str(tmp_path), "end": "hang"}
        variables = rank_variables(0, 1, free_port(), {})
        rank = warm.start(f"{__name__}:tell", arguments, variables, log, log)
    deadline = time.monotonic() + 30
    while not (tmp_path / "child-0").exists():
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.05)
    before = warm._servers[0].process
    before.kill()
    before.wait()  # its descriptors are closed a moment before it is gone
    assert rank.wait(10) == 255
    child = Path("/proc", (tmp_path / "child-0").read_text())
    while child.exists() and "\nState:\tZ" not in (child / "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (tmp_path / "0.json").unlink()
    run_ranks(f"{__name__}:tell", 1, timeout=60, out=str(tmp_path))
    assert told(tmp_path, 0)["warmed"] and warm._servers[0].process is not before
