"""Captions side by side (reference, before, after): in the terminal, and as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwenvl_dist.data.pictures import picture_uri

if TYPE_CHECKING:
    from rich.table import Table

TEMPLATE = Path(__file__).parent / "templates" / "comparison.html.j2"


@dataclass(frozen=True)
class Comparison:
    """What was said about one sample; None: there is no other model, or nobody knows the reference."""

    name: str  # the sample's key, or the picture's path
    after: str
    before: str | None = None
    reference: str | None = None
    merged: str | None = None  # what a model says that was merged beside

    @property
    def after_matches(self) -> bool:
        """Whether the caption is the reference, white space aside."""
        return self.reference is not None and same_caption(self.after, self.reference)

    @property
    def before_matches(self) -> bool:
        """Whether the base's caption is the reference, white space aside."""
        return None not in (self.before, self.reference) and same_caption(
            self.before or "", self.reference or ""
        )


def same_caption(one: str, other: str) -> bool:
    """Tell whether two captions are equal, white space aside."""
    return one.split() == other.split()


def exact_match(captions: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of captions that equal their reference, white space aside; 0 when there are none."""
    pairs = list(zip(captions, references, strict=True))
    return sum(same_caption(caption, reference) for caption, reference in pairs) / max(1, len(pairs))


def _printable(text: str) -> str:
    """Replace control characters: an untrained model says anything, the terminal must not obey it."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def comparison_table(rows: Sequence[Comparison], title: str = "") -> Table:
    """Return a table for the terminal, with a column for each thing that is known."""
    from rich.table import Table
    from rich.text import Text

    has_reference = any(row.reference is not None for row in rows)
    has_before = any(row.before is not None for row in rows)
    has_merged = any(row.merged is not None for row in rows)
    table = Table(title=Text(title) if title else None, show_lines=True)
    table.add_column("picture", overflow="fold")
    for heading, shown in (("reference", has_reference), ("before", has_before)):
        if shown:
            table.add_column(heading, overflow="fold")
    table.add_column("after" if has_before else "caption", overflow="fold")
    if has_merged:
        table.add_column("merged", overflow="fold")
    for row in rows:
        cells = [Text(_printable(row.name))]
        if has_reference:
            cells.append(Text(_printable(row.reference or "")))
        if has_before:
            cells.append(Text(_printable(row.before or ""), style="green" if row.before_matches else ""))
        cells.append(Text(_printable(row.after), style="green" if row.after_matches else ""))
        if has_merged:
            cells.append(Text(_printable(row.merged or "")))
        table.add_row(*cells)
    return table


def comparison_page(
    rows: Sequence[Comparison], pictures: Sequence[bytes], title: str, facts: Sequence[tuple[str, str]]
) -> str:
    """Return the HTML of rows and their pictures (original bytes), below a line of facts (name, value)."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    cards = [(row, picture_uri(data)) for row, data in zip(rows, pictures, strict=True)]
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, facts=facts, cards=cards)
