"""Boxes as Qwen2-VL writes them in text, there and back.

    <|object_ref_start|>name<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|><|box_start|>...<|box_end|>

Corners are upper left and lower right, integers in [0, 1000), in thousandths of the upright picture's width and height
(Qwen2-VL, arXiv:2409.12191, section 2.2.1). Several boxes of a name follow it one after another. The four marks are
special tokens of the tokenizer, the rest is plain text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

REF_START, REF_END = "<|object_ref_start|>", "<|object_ref_end|>"
BOX_START, BOX_END = "<|box_start|>", "<|box_end|>"
MARKS = (REF_START, REF_END, BOX_START, BOX_END)
GRID = 1000  # steps a side

_SPLIT = re.compile("(" + "|".join(map(re.escape, MARKS)) + ")")
_POINTS = re.compile(r"\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)\s*,?\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)\s*")


@dataclass(frozen=True)
class Box:
    """A box on the grid; x1 < x2 and y1 < y2."""

    x1: int
    y1: int
    x2: int
    y2: int

    def __str__(self) -> str:
        return f"({self.x1},{self.y1}),({self.x2},{self.y2})"

    def iou(self, other: Box) -> float:
        """Return intersection over union, in [0, 1]. It is that of the pixels: scales cancel out."""
        both = self.intersection(other)
        return both / (self.area + other.area - both)

    def share_in(self, other: Box) -> float:
        """Return which share of this box lies in another one, in [0, 1]."""
        return self.intersection(other) / self.area

    def intersection(self, other: Box) -> int:
        """Return the area that both cover, in squares of the grid."""
        width = min(self.x2, other.x2) - max(self.x1, other.x1)
        height = min(self.y2, other.y2) - max(self.y1, other.y1)
        return max(0, width) * max(0, height)

    @property
    def area(self) -> int:
        """The area in squares of the grid."""
        return (self.x2 - self.x1) * (self.y2 - self.y1)


@dataclass(frozen=True)
class NamedBox:
    """An object: what it is and where."""

    name: str
    box: Box

    def to_json(self) -> dict[str, Any]:
        """Return what JSON files hold of it; the box is [x1, y1, x2, y2] in thousandths of the picture's sides."""
        return {"name": self.name, "box": [self.box.x1, self.box.y1, self.box.x2, self.box.y2]}

    @classmethod
    def from_json(cls, content: Any) -> NamedBox:
        """Read what `to_json` returned. Raises ValueError for something else."""
        name, corners = (
            (content.get("name"), content.get("box")) if isinstance(content, dict) else (None, None)
        )
        if isinstance(name, str) and isinstance(corners, list) and [type(c) for c in corners] == [int] * 4:
            x1, y1, x2, y2 = corners
            if 0 <= x1 < x2 < GRID and 0 <= y1 < y2 < GRID:
                return cls(name, Box(x1, y1, x2, y2))
        raise ValueError(f"{content!r:.80} is no name with a box [x1, y1, x2, y2] in thousandths")


@dataclass(frozen=True)
class Parsed:
    """What an answer says. `malformed` counts names and boxes begun that give no box."""

    objects: list[NamedBox]
    malformed: int


def on_grid(x1: float, y1: float, x2: float, y2: float, width: float, height: float) -> Box | None:
    """Return a box of a picture of `width` x `height` (any unit), cut to the picture; None when nothing is left.

    Coordinates go to the nearest step, the far edge to 999. A box thinner than a step is widened to one.
    """
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        return None
    x1, x2 = max(0.0, x1), min(float(width), x2)
    y1, y2 = max(0.0, y1), min(float(height), y2)
    if x1 >= x2 or y1 >= y2:
        return None
    left, right = _steps(x1 / width, x2 / width)
    top, bottom = _steps(y1 / height, y2 / height)
    return Box(left, top, right, bottom)


def _steps(low: float, high: float) -> tuple[int, int]:
    first, last = (min(GRID - 1, round(share * GRID)) for share in (low, high))
    if first == last:
        first, last = (first, last + 1) if last < GRID - 1 else (first - 1, last)
    return first, last


def is_number(value: object) -> bool:
    """Tell whether a value out of JSON is a finite number that fits into a float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def write_objects(objects: Sequence[NamedBox]) -> str:
    """Return the text of objects in their order; a name that follows itself is written once."""
    text = ""
    for name, group in groupby(objects, key=lambda each: each.name):
        text += f"{write_name(name)}" + "".join(f"{BOX_START}{each.box}{BOX_END}" for each in group)
    return text


def write_name(name: str) -> str:
    """Return a name between its marks."""
    return f"{REF_START}{name}{REF_END}"


def asked_name(prompt: str) -> str | None:
    """Return the name that a prompt asks for, None when it names none or several."""
    names = re.findall(f"{re.escape(REF_START)}(.*?){re.escape(REF_END)}", prompt, flags=re.DOTALL)
    return clean_name(names[0]) if len(names) == 1 else None


def holds_boxes(text: str) -> bool:
    """Tell whether a text has to do with boxes at all."""
    return BOX_START in text


def parse_objects(text: str, asked: str | None = None) -> Parsed:
    """Return the objects of an answer, whatever it looks like; `asked` is the name of boxes that no name precedes.

    Tolerated: white space, text between objects, a missing comma between the corners, a missing end mark, 1000 for 999.
    Malformed: what is no pair of points, a coordinate above 1000, corners that enclose nothing, a box without a name, a
    name without a box or without an end.
    """
    objects: list[NamedBox] = []
    malformed = 0
    name, boxes_of_name = asked, 1  # of a name that the prompt gave nobody expects boxes
    pieces = _SPLIT.split(text)[1:]  # mark, text, mark, text ...
    for number in range(0, len(pieces), 2):
        mark, content = pieces[number], pieces[number + 1]
        if mark == REF_START:
            malformed += not boxes_of_name
            follows = pieces[number + 2] if number + 2 < len(pieces) else None
            name, boxes_of_name = clean_name(content) or None, 0
            if follows != REF_END or name is None:
                malformed += 1
                name, boxes_of_name = None, 1  # counted; its boxes have no name
        elif mark == BOX_START:
            boxes_of_name += 1
            box = _parse_box(content)
            if box is None or name is None:
                malformed += 1
            else:
                objects.append(NamedBox(name, box))
    return Parsed(objects, malformed + (not boxes_of_name))


def clean_name(name: str) -> str:
    """Return a name with single white space."""
    return " ".join(name.split())


def _parse_box(text: str) -> Box | None:
    match = _POINTS.match(text)
    if match is None or max(map(len, match.groups())) > 4:
        return None
    if text[match.end() :].startswith(("(", ",")):  # more points than two
        return None
    numbers = [int(digits) for digits in match.groups()]
    if max(numbers) > GRID:
        return None
    x1, y1, x2, y2 = (min(GRID - 1, number) for number in numbers)
    return Box(x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None
