"""What a run shows on a terminal, and what it does not show elsewhere."""

import io
import re

import pytest
from rich.console import Console

from qwenvl_dist.training import display
from qwenvl_dist.training.display import TrainDisplay, number_cells

LINE = {
    "epoch": 1.5, "loss": 0.5, "learning_rate": 1e-4, "grad_norm": 0.25, "samples_per_second": 12.0,
    "data_wait_fraction": 0.04, "peak_memory_gib": 3.0,
}  # fmt: skip


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal of 80 columns in place of stderr."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(display, "console", lambda: console)
    monkeypatch.setattr(display.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("RANK", raising=False)
    return screen


def shown(screen: io.StringIO) -> list[str]:
    """Return the lines of the last drawing."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def test_it_shows_where_the_run_is_and_its_numbers(terminal: io.StringIO) -> None:
    with TrainDisplay(step=3, total=10) as table:
        assert table.is_shown
        for _ in range(4):
            table.advance()
        table.show(number_cells(LINE), seconds_left=75.4)
    bar, headings, numbers = shown(terminal)[-3:]
    assert re.fullmatch(r"train ━+╸? +step 7/10 +0:00:0\d +left 0:01:15", bar)
    assert headings.split() == ["epoch", "loss", "lr", "grad", "samples/s", "wait", "memory"]
    assert numbers.split() == ["1.50", "0.5000", "1.00e-04", "0.250", "12.00", "4%", "3.0", "GiB"]
    assert max(map(len, (bar, headings, numbers))) <= 80


def test_it_is_drawn_a_few_times_a_second_however_fast_the_steps(terminal: io.StringIO) -> None:
    with TrainDisplay(step=0, total=10_000) as table:
        for _ in range(10_000):
            table.advance()
    assert len(re.findall("step ", terminal.getvalue())) < 100
    assert "step 10000/10000" in shown(terminal)[-1]


def test_other_ranks_and_pipes_show_nothing(terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with TrainDisplay(0, 1) as table:
        table.advance()
        assert not table.is_shown
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(display.sys.stderr, "isatty", lambda: False, raising=False)
    with TrainDisplay(0, 1) as table:
        table.show(number_cells(LINE), 0.0)
        assert not table.is_shown
    assert terminal.getvalue() == ""
