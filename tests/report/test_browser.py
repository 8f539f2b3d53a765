"""The report in a real browser: on a phone and a desk, in light and dark, by keyboard, on paper."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwenvl_dist.report.folder import RunFolder
from qwenvl_dist.report.page import report_page
from tests.browser import complaints, open_browser, show
from tests.report.made_run import write_bare_run, write_full_run

# WCAG 2.2, 1.4.3 and 1.4.11: contrast of text, and of the lines of a chart.
CONTRASTS = """
const channel = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const light = colour => {
  canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  const [r, g, b] = canvas.getImageData(0, 0, 1, 1).data;
  return .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
};
const behind = element => {
  for (; element; element = element.parentElement) {
    const colour = getComputedStyle(element).backgroundColor;
    if (!/, 0\\)$|transparent/.test(colour)) return colour;
  }
  return 'white';
};
const contrast = (colour, element) => {
  const [a, b] = [light(colour), light(behind(element))].sort((x, y) => y - x);
  return (a + .05) / (b + .05);
};
const found = [];
for (const e of document.querySelectorAll('h1, h2, p, a, dt, dd, th, td, figcaption, summary, pre, footer')) {
  const colour = getComputedStyle(e).color;
  if (e.checkVisibility()) found.push([e.tagName + ' ' + e.textContent.slice(0, 30), contrast(colour, e), 4.5]);
}
for (const e of document.querySelectorAll('figure svg text')) {
  found.push(['tick', contrast(getComputedStyle(e).fill, e), 4.5]);
}
for (const e of document.querySelectorAll('figure svg path[clip-path]')) {
  const style = getComputedStyle(e);
  if (parseFloat(style.strokeWidth) > 1.2) found.push(['curve', contrast(style.stroke, e), 3]);
}
return found;
"""


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with open_browser() as driver:
        yield driver


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, scene_validation_shards: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    runs = {
        "full": write_full_run(folder / "full", scene_validation_shards),
        "bare": write_bare_run(folder / "bare"),
    }
    for name, run in runs.items():
        (folder / f"{name}.html").write_text(report_page(RunFolder.read(run), 24))
    return {name: folder / f"{name}.html" for name in runs}


def overflow(driver: Any) -> int:
    """Return by how many pixels the page is wider than the window."""
    return driver.execute_script(
        "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("name", ["full", "bare"])
def test_it_fits_loads_and_does_not_complain(
    driver: Any, pages: dict[str, Path], name: str, width: int
) -> None:
    show(driver, pages[name], width)
    assert driver.execute_script("return window.innerWidth") == width
    assert overflow(driver) <= 0
    for details in driver.find_elements("css selector", "details"):
        details.find_element("css selector", "summary").click()
    assert overflow(driver) <= 0
    images = driver.execute_script(
        "return [...document.images].map(i => i.complete && i.naturalWidth > 0 && i.clientWidth > 0)"
    )
    assert images == [True] * (12 if name == "full" else 0)
    loaded = driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [address for address in loaded if not address.startswith("data:")] == []
    assert driver.title.endswith("training report")  # no caption has taken it
    assert complaints(driver) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_curves_stand_out_in_light_and_dark(
    driver: Any, pages: dict[str, Path], scheme: str
) -> None:
    show(driver, pages["full"], 1440, scheme=scheme)
    page = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert page == {"light": "rgb(251, 251, 252)", "dark": "rgb(20, 22, 26)"}[scheme]
    found = driver.execute_script(CONTRASTS)
    assert {name for name, *_ in found} >= {"tick", "curve"}
    assert [line for line in found if line[1] < line[2]] == []


def test_chart_text_is_large_enough_on_a_phone(driver: Any, pages: dict[str, Path]) -> None:
    show(driver, pages["full"], 390)
    script = (
        "return [...document.querySelectorAll('figure svg text')].map(t => t.getBoundingClientRect().height)"
    )
    assert min(driver.execute_script(script)) >= 10


def test_the_keyboard_reaches_everything_in_order(driver: Any, pages: dict[str, Path]) -> None:
    from selenium.webdriver import ActionChains, Keys

    show(driver, pages["full"], 1440)
    reached = []
    for _ in range(25):
        ActionChains(driver).send_keys(Keys.TAB).perform()
        active = driver.switch_to.active_element
        reached.append(active.get_attribute("aria-label") or active.text.strip())
        outline = driver.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
        if active.tag_name != "body":
            assert outline == "solid", reached[-1]
    assert reached[:3] == ["Skip to the content", "Curves", "Photos"]
    assert {"Checkpoints", "Caption scores", "Launches", "Recipe, every key as it was used"} <= set(reached)
    assert reached.index("Caption scores") < reached.index("Launches")


def test_a_print_is_light_and_shows_what_was_folded(driver: Any, pages: dict[str, Path]) -> None:
    show(driver, pages["full"], 794, scheme="dark", media="print")  # A4 at 96 pixels an inch
    assert driver.execute_script("return getComputedStyle(document.body).color") == "rgb(26, 29, 35)"
    assert overflow(driver) <= 0
    assert not driver.find_element("css selector", "nav").is_displayed()
    heights = driver.execute_script(
        "return [...document.querySelectorAll('details > :not(summary)')].map(e => e.getBoundingClientRect().height)"
    )
    assert len(heights) == 4 and min(heights) > 20
