"""The dashboards of SwanLab and TensorBoard on what a run has written, in a real browser."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import open_browser, show
from tests.ranks import free_port
from tests.training.test_tracking import LOGGED, killed_after_step_4_and_resumed

pytestmark = pytest.mark.dist

PATIENCE = 60.0  # seconds


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    scenes_base: Path,
    scene_shards: Path,
    scene_validation_shards: Path,
) -> Path:
    """A run told to SwanLab's own dashboard and to TensorBoard, killed and resumed."""
    pytest.importorskip("swanboard", reason="pip install 'swanlab[dashboard]'")
    overrides = ("tracking.mode=local", "tracking.trackers=[swanlab, tensorboard]")
    tmp = tmp_path_factory.mktemp("dashboards")
    return killed_after_step_4_and_resumed(
        tmp, scenes_base, scene_shards, scene_validation_shards, 1, *overrides
    )


@contextlib.contextmanager
def served(*command: str, port: int, log: Path) -> Iterator[Any]:
    """Start a server, show its page once it answers, and end it."""
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        with open_browser() as driver:
            assert within(PATIENCE, lambda: answers(address)), log.read_text()
            show(driver, address, 1440)
            yield driver
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


def answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except OSError:
        return False


def appears(driver: Any, *words: str) -> bool:
    """Wait until the page shows all of these words."""
    text = "return document.body.innerText"
    return within(PATIENCE, lambda: all(word in driver.execute_script(text) for word in words))


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def test_swanlabs_dashboard_knows_one_experiment(run: Path) -> None:
    with contextlib.closing(sqlite3.connect(run / "swanlab" / "runs.swanlab")) as database:
        experiments = database.execute("select name, run_id, status from experiment").fetchall()
        tags = {name for (name,) in database.execute("select name from tag")}
    assert [(name, status) for name, _, status in experiments] == [("resumed", 1)]
    assert tags >= LOGGED | {"val_loss", "validation/photos", "validation/captions"}
    assert (run / "swanlab" / experiments[0][1]).is_dir()


@pytest.mark.slow
def test_swanlabs_dashboard_shows_the_run(run: Path, tmp_path: Path) -> None:
    port = free_port()
    command = (sys.executable, "-m", "swanlab", "watch", str(run / "swanlab"), "--port", str(port))
    with served(*command, port=port, log=tmp_path / "swanboard.log") as driver:
        assert appears(driver, "captions", "resumed")


@pytest.mark.slow
def test_tensorboard_shows_the_run(run: Path, tmp_path: Path) -> None:
    port = free_port()
    command = (
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(run / "tensorboard"),
        "--port",
        str(port),
    )
    with served(*command, port=port, log=tmp_path / "tensorboard.log") as driver:
        assert appears(driver, "captions", "loss", "samples_per_second")
