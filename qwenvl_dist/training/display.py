"""What a training run shows where rank 0 has a terminal: a bar, and the newest numbers below it."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from qwenvl_dist.logs import console, describe_seconds, rank

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

REFRESH_EVERY_SECONDS = 0.2


def number_cells(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the numbers of a line of metrics.jsonl as people read them, by heading."""
    norm = values["grad_norm"]
    return {
        "epoch": f"{values['epoch']:.2f}",
        "loss": f"{values['loss']:.4f}",
        "lr": f"{values['learning_rate']:.2e}",
        "grad": "-" if norm is None else f"{norm:.3f}",
        "samples/s": f"{values['samples_per_second']:.2f}",
        "wait": f"{values['data_wait_fraction']:.0%}",
        "memory": f"{values['peak_memory_gib']:.1f} GiB",
    }


class TrainDisplay:
    """A table that stays at the bottom of the terminal while log lines scroll above it; nothing anywhere else.

    Args:
        step: optimizer steps done before this start.
        total: steps of the whole run.
    """

    def __init__(self, step: int, total: int) -> None:
        self.step, self.total = step, total
        self._began = time.monotonic()
        self._cells: dict[str, str] = {}
        self._left: float | None = None  # seconds, at the speed of the newest numbers
        self._live: Live | None = None
        self._drawn = 0.0

    @property
    def is_shown(self) -> bool:
        """Whether there is a terminal that shows it."""
        return self._live is not None

    def __enter__(self) -> Self:
        """Show it, if this is rank 0 and stderr is a terminal."""
        if rank() == 0 and sys.stderr.isatty():
            from rich.live import Live

            # No thread beside us: loader workers are forked.
            self._live = Live(self._render(), console=console(), auto_refresh=False, redirect_stdout=False,
                              redirect_stderr=False)  # fmt: skip
            self._live.start()
        self._began = time.monotonic()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Leave the last state on the screen."""
        if self._live:
            self._draw()
            self._live.stop()
            self._live = None

    def advance(self) -> None:
        """Count one finished step."""
        self.step += 1
        if self._live and time.monotonic() - self._drawn > REFRESH_EVERY_SECONDS:
            self._draw()

    def show(self, cells: Mapping[str, str], seconds_left: float) -> None:
        """Show new numbers, by heading."""
        self._cells, self._left = dict(cells), seconds_left
        if self._live:
            self._draw()

    def _draw(self) -> None:
        assert self._live
        self._drawn = time.monotonic()
        self._live.update(self._render(), refresh=True)

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column()
        bar.add_column(ratio=1)
        for _ in range(3):
            bar.add_column(justify="right", no_wrap=True)
        left = "" if self._left is None else f"left {describe_seconds(self._left)}"
        elapsed = describe_seconds(time.monotonic() - self._began)
        bar.add_row(
            "train", ProgressBar(total=self.total, completed=self.step), f"step {self.step}/{self.total}", elapsed, left
        )  # fmt: skip
        if not self._cells:
            return bar
        numbers = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for heading in self._cells:
            numbers.add_column(heading, justify="right", no_wrap=True)
        numbers.add_row(*self._cells.values())
        return Group(bar, numbers)
