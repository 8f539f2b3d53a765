"""A real browser without a screen, for what people look at: Debian's Chromium, driven by Selenium.

`python -m tests.browser runs/coco_2b/report.html docs/report.png` makes the picture of a page's beginning.
"""

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

_PROGRAMS = ("chromium", "chromedriver")
_PACKAGES = ("chromium", "chromium-driver", "fonts-dejavu-core")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

MOST_BYTES = 300 << 10  # of a picture in the repository


def require_browser() -> None:
    """Install the browser where that is possible, else skip the test and say so."""
    missing = [name for name in _PROGRAMS if not shutil.which(name)]
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install {' '.join(_PACKAGES)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "-y", "--no-install-recommends", *_PACKAGES]):
        done = subprocess.run(
            ["apt-get", "-q", *words], env=environment, capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            pytest.skip(f"apt-get {words[0]} failed: {done.stderr.strip()[-400:]}")


@contextmanager
def open_browser() -> Iterator[Any]:
    """Yield a driver whose console messages are kept."""
    require_browser()
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in _FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def show(driver: Any, page: Path | str, width: int, *, scheme: str = "light", media: str = "screen") -> None:
    """Open a file or address in a window of so many CSS pixels, in light or dark, on screen or as printed."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    driver.get_log("browser")  # forget what earlier pages said
    driver.get(page if isinstance(page, str) else page.resolve().as_uri())


def complaints(driver: Any) -> list[str]:
    """Return what the page wrote to the console as warning or error."""
    return [
        entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")
    ]


def picture(page: Path, out: Path, width: int = 1200, height: int = 2000) -> None:
    """Write a PNG of the beginning of a page, in few colours where it would be large: it goes into the repository."""
    with open_browser() as driver:
        show(driver, page, width)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.execute_script("document.documentElement.style.scrollbarWidth = 'none'")
        shot = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    shot.save(out, optimize=True)
    if out.stat().st_size > MOST_BYTES:
        shot.convert("P", palette=Image.Palette.ADAPTIVE).save(out, optimize=True)


if __name__ == "__main__":
    picture(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
