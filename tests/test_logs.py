import io
import re

import pytest
from rich.console import Console

from qwenvl_dist import logs
from qwenvl_dist.logs import get_logger, progress


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (None, "hello\nwarning: careful\n"),
        ("0", "hello\nwarning: careful\n"),
        ("3", "[rank 3 on node7] warning: careful\n"),
    ],
)
def test_infos_come_from_rank_0_and_warnings_name_the_others(monkeypatch, capsys, rank, expected):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(logs.socket, "gethostname", lambda: "node7")
    log = get_logger("qwenvl_dist.somewhere")
    log.info("hello")
    log.warning("careful")
    assert capsys.readouterr() == ("", expected)


def test_progress_prints_plain_lines_when_stderr_is_no_terminal(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    with progress(total=30, description="pack") as bar:
        for _ in range(30):
            now[0] += 0.5
            bar.advance()
    assert (
        capsys.readouterr().err
        == "pack: 20/30 in 10.0 s, 2.0/s, left 0:00:05\npack: 30/30 in 15.0 s, 2.0/s\n"
    )


def test_progress_loops_over_an_iterable(capsys):
    assert list(progress([1, 2, 3], description="read")) == [1, 2, 3]
    assert capsys.readouterr().err.startswith("read: 3/3 in ")


def test_only_rank_0_shows_progress(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    list(progress([1], description="read"))
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_with_rate_and_time_left(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        logs, "console", lambda: Console(file=screen, force_terminal=True, width=100, color_system=None)
    )
    monkeypatch.setattr(logs.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("RANK", raising=False)
    now = [0.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    with progress(total=30, description="pack") as bar:
        for _ in range(20):
            now[0] += 0.5
            bar.advance()
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).splitlines()[-1]
    assert re.fullmatch(r"pack [━╸╺ ]+ 20/30 2.0/s 0:00:\d\d left 0:00:\d\d", last.strip())
