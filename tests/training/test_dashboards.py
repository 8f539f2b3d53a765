"""The dashboards of SwanLab and TensorBoard on what a run has written, in a real browser."""

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium.webdriver.support.ui import WebDriverWait

from tests.browser import open_browser, require_browser, show
from tests.ranks import free_port
from tests.training.test_tracking import killed_after_step_4_and_resumed

pytestmark = [pytest.mark.dist, pytest.mark.slow]

PATIENCE = 60  # seconds


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    scenes_base: Path,
    scene_shards: Path,
    scene_validation_shards: Path,
) -> Path:
    pytest.importorskip("swanboard", reason="pip install 'swanlab[dashboard]'")
    require_browser()
    overrides = ("tracking.mode=local", "tracking.trackers=[swanlab, tensorboard]")
    tmp = tmp_path_factory.mktemp("dashboards")
    return killed_after_step_4_and_resumed(
        tmp, scenes_base, scene_shards, scene_validation_shards, 1, *overrides
    )


@contextmanager
def served(*command: str, port: int, log: Path) -> Iterator[str]:
    """Start a server, wait until it answers, and end it."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        with open_browser() as driver:
            address = f"http://127.0.0.1:{port}"
            WebDriverWait(driver, PATIENCE, ignored_exceptions=[OSError]).until(
                lambda _: urllib.request.urlopen(address, timeout=5).status == 200, log.read_text()
            )
            show(driver, address, 1440)
            yield driver
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


def appears(driver, *words: str) -> None:
    """Wait until the page shows all of these words."""
    text = "return document.body.innerText"
    WebDriverWait(driver, PATIENCE).until(
        lambda _: all(word in driver.execute_script(text) for word in words), f"not on the page: {words}"
    )


def test_swanlabs_dashboard_shows_the_run(run: Path, tmp_path: Path) -> None:
    port = free_port()
    command = (sys.executable, "-m", "swanlab", "watch", str(run / "swanlab"), "--port", str(port))
    with served(*command, port=port, log=tmp_path / "swanboard.log") as driver:
        appears(driver, "captions", "resumed")
        driver.save_screenshot("/tmp/rep/swanboard.png")


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
        appears(driver, "captions", "loss", "samples_per_second")
        driver.save_screenshot("/tmp/rep/tb.png")
