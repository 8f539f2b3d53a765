"""Log lines and progress bars that know their rank. Everything goes to stderr; stdout belongs to results."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

PLAIN_LINE_EVERY_SECONDS = 10.0
ROOT = "qwenvl_dist"


def rank() -> int:
    """Return this process's rank as the launcher set it, 0 without a launcher."""
    try:
        return int(os.environ.get("RANK", "0"))
    except ValueError:
        return 0


def place() -> str:
    """Return how this rank is called among several, such as `rank 3 on node2`."""
    return f"rank {rank()} on {socket.gethostname()}"


def get_logger(name: str) -> logging.Logger:
    """Return a logger whose infos only rank 0 prints and whose warnings name the rank that is not 0, and its host."""
    root = logging.getLogger(ROOT)
    if not any(isinstance(handler, _RankHandler) for handler in root.handlers):
        root.addHandler(_RankHandler())
        root.setLevel(logging.INFO)
        root.propagate = False
    return logging.getLogger(name if name.split(".")[0] == ROOT else f"{ROOT}.{name}")


def describe_seconds(seconds: float) -> str:
    """Return h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class progress:  # noqa: N801
    """Show how far a piece of work is, how fast it goes and how long it will take.

    A bar on a terminal, else a plain line every 10 s and one at the end.

    Used as a context manager with `advance(n)`; given an iterable it can be looped over instead, one
    step an item. Only rank 0 prints. `total` may be None when it is not known.
    """

    def __init__(
        self, iterable: Iterable | None = None, total: int | None = None, description: str = ""
    ) -> None:
        if total is None and iterable is not None and hasattr(iterable, "__len__"):
            total = len(iterable)  # type: ignore[arg-type]
        self.iterable, self.total, self.description = iterable, total, description
        self.done = 0
        self._bar: Progress | None = None
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        """Start the clock, and the bar when stderr is a terminal."""
        self._started = self._last_line = time.monotonic()
        if rank() == 0 and sys.stderr.isatty():
            from rich import progress as rich_progress

            bar = rich_progress.Progress(
                rich_progress.TextColumn("{task.description}"),
                rich_progress.BarColumn(),
                rich_progress.MofNCompleteColumn(),
                rich_progress.TextColumn("{task.fields[rate]}"),
                rich_progress.TimeElapsedColumn(),
                rich_progress.TextColumn("left"),
                rich_progress.TimeRemainingColumn(),
                console=console(),
                auto_refresh=False,  # no thread beside us: the work may fork
            )
            bar.add_task(self.description, total=self.total, rate="")
            bar.start()
            self._bar = bar
        return self

    def advance(self, n: int = 1) -> None:
        """Count `n` more items as done."""
        self.done += n
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=n)
            if now - self._last_line > 0.1:
                self._bar.update(self._bar.task_ids[0], rate=f"{self._rate(now):.1f}/s", refresh=True)
                self._last_line = now
        elif now - self._last_line >= PLAIN_LINE_EVERY_SECONDS:
            self._last_line = now
            self._print_line(now)

    def __exit__(self, *exc_info: object) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            rate = self._rate(time.monotonic())
            self._bar.update(self._bar.task_ids[0], rate=f"{rate:.1f}/s", refresh=True)
            self._bar.stop()
        else:
            self._print_line(time.monotonic())

    def __iter__(self) -> Iterator:
        """Yield the iterable's items, each counted when the next one is asked for."""
        assert self.iterable is not None, "progress() was given no iterable to loop over"
        with self:
            for item in self.iterable:
                yield item
                self.advance()

    def _rate(self, now: float) -> float:
        """Return the items done per second so far."""
        return self.done / max(now - self._started, 1e-9)

    def _print_line(self, now: float) -> None:
        if rank() != 0:
            return
        rate = self._rate(now)
        of = "" if self.total is None else f"/{self.total}"
        left = ""
        if self.total is not None and 0 < self.done < self.total:
            left = f", left {describe_seconds((self.total - self.done) / rate)}"
        seconds = now - self._started
        line = f"{self.description}: {self.done}{of} in {seconds:.1f} s, {rate:.1f}/s{left}"
        print(line, file=sys.stderr, flush=True)


class _RankHandler(logging.Handler):
    """Print a record to stderr, above a progress bar if one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        this_rank = rank()
        if this_rank != 0 and record.levelno < logging.WARNING:
            return
        try:
            line = record.getMessage()
            if record.levelno >= logging.WARNING:
                line = f"{record.levelname.lower()}: {line}"
            if this_rank != 0:
                line = f"[{place()}] {line}"
            if record.exc_info:
                line += "\n" + (self.formatter or logging.Formatter()).formatException(record.exc_info)
            if sys.stderr.isatty():
                console().print(line, markup=False, highlight=False, soft_wrap=True)
            else:
                print(line, file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


@cache
def console() -> Console:
    """Return the terminal on stderr; what is printed through it stands above a bar or table that is shown."""
    from rich.console import Console

    return Console(stderr=True)
