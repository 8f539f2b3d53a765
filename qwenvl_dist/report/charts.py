"""Curves as SVG that stands in the page: drawn by matplotlib, coloured by the page's style sheet."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

WIDTH, HEIGHT = 4.4, 2.7  # inches at 72 an inch: 317 x 194 CSS pixels, what a phone has for it
LOGARITHMIC_FROM = 30.0  # times the smallest value
MOST_POINTS = 600  # a curve; of more the means of neighbours are drawn

# Stand-ins for what the page's style sheet decides, for light and for dark.
_INK, _GRID = "#010101", "#020202"
_SERIES = ("#030303", "#040404", "#050505", "#060606")
_STYLED = {_INK: "currentColor", _GRID: "var(--grid)"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES, 1)
}
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.5, 1.5)))  # also told apart without colour

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: selectable, in the page's own font
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.formatter.useoffset": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.color": _GRID,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "path.simplify_threshold": 0.3,
}


@dataclass(frozen=True)
class Curve:
    """Values over steps; None where a line had no number."""

    label: str
    steps: Sequence[int]
    values: Sequence[float | None]

    def thinned(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (points,) steps and values, at most `MOST_POINTS` of them, each the mean of its neighbours."""
        steps = np.array(self.steps, dtype=np.float64)
        values = np.array([np.nan if value is None else value for value in self.values], dtype=np.float64)
        known = np.isfinite(values)
        steps, values = steps[known], values[known]
        each = -(-len(steps) // MOST_POINTS)
        if each > 1:
            starts = np.arange(0, len(steps), each)
            counts = np.diff(np.append(starts, len(steps)))
            steps, values = (np.add.reduceat(column, starts) / counts for column in (steps, values))
        return steps, values


def draw(
    name: str, curves: Sequence[Curve], alt: str, resumed_at: Sequence[int] = (), *, from_zero: bool
) -> str:
    """Return an SVG element of curves over the step, a dotted line at each resume; `alt` tells what they show.

    The axis begins at zero, or else is logarithmic where the values span decades.

    `name` keeps its ids apart from those of other charts on the page.
    """
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        for curve, colour, dashes in zip(curves, _SERIES, _DASHES, strict=False):
            steps, values = curve.thinned()
            marker = "o" if len(steps) <= 40 else ""
            axes.plot(
                steps, values, color=colour, linestyle=dashes, marker=marker, markersize=3, label=curve.label
            )
        for step in resumed_at:
            axes.axvline(step, color=_INK, linestyle=":", linewidth=1, alpha=0.7)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        values = [value for curve in curves for value in curve.values if value is not None]
        if not from_zero and min(values) > 0 and max(values) > LOGARITHMIC_FROM * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
            axes.ticklabel_format(axis="y", scilimits=(-3, 5))
        if from_zero:
            axes.set_ylim(0, 1.08 * max(values) or 1)
        if len(curves) > 1:
            axes.legend(loc="best")
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _embedded(text.getvalue(), name, alt)


def _embedded(svg: str, name: str, alt: str) -> str:
    """Make a drawn file a part of a page: no prologue, ids of its own, colours from the style sheet."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL
    )  # would hold for the whole page
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub("|".join(_STYLED), lambda found: _STYLED[found[0]], svg)
    opening = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'viewBox="0 0 {WIDTH * 72:g} {HEIGHT * 72:g}" aria-label="{html.escape(alt)}">'
    )
    return re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)
