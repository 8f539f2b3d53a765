"""Names and boxes that stand beside a text, as ms-swift has it, -> their places in the text.

    {"messages": [{"role": "user", "content": "<image>Find the <ref-object>."},
                  {"role": "assistant", "content": "<ref-object><bbox><bbox>"}], "images": ["a.jpg"],
     "objects": {"ref": ["dog", "dog"], "bbox": [[10, 20, 110, 80], [150, 40, 200.5, 90]], "bbox_type": "real"}}

The n-th <ref-object> of all turns is the n-th of `ref`, the n-th <bbox> that of `bbox`; one has nothing to do with the
other. A box is [x1, y1, x2, y2], a point [x, y]; pixels of the upright picture (`real`, without a `bbox_type` too), or
shares of its sides (`norm1`). `image_id` says for each box in which picture it lies, from 0; without it, in the first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qwenvl_dist.data.boxes import BOX_END, BOX_START, GRID, MARKS, clean_name, is_number, on_grid, write_name
from qwenvl_dist.data.formats.headers import Header
from qwenvl_dist.data.formats.sample import short
from qwenvl_dist.data.formats.turns import FormatError, check_text

REF, BBOX = "<ref-object>", "<bbox>"
PLACEHOLDER = re.compile(f"{REF}|{BBOX}")
MEMBERS = ("ref", "bbox", "bbox_type", "image_id")
TYPES = ("real", "norm1")
MOST_SHARE = 2.0  # what is further outside is no share of a side
EXAMPLE = '{"ref": ["dog"], "bbox": [[x1, y1, x2, y2]]}'
DROP = "mend the record, or drop it"


@dataclass(frozen=True)
class Objects:
    """What the placeholders of one record stand for; `image_ids` has one for each of `boxes`."""

    names: list[str]
    boxes: list[list[float]]  # two numbers or four
    image_ids: list[int]
    are_shares: bool

    @property
    def measured(self) -> list[int]:
        """The pictures whose headers `fill` needs, by number."""
        return [] if self.are_shares else sorted(set(self.image_ids))

    def fill(
        self, messages: list[dict[str, Any]], pictures: Sequence[object], headers: Sequence[Header | None]
    ) -> list[dict[str, Any]]:
        """Return the messages with names and boxes in their places. Raises FormatError.

        `pictures` are what errors call the record's, `headers` those of `measured`.
        """
        header_of: dict[int, Header] = {}
        for number, header in zip(self.measured, headers, strict=True):
            if header is None:
                raise FormatError(
                    f"has boxes in {pictures[number]}, whose size cannot be read: replace the picture, or drop the "
                    "record"
                )
            header_of[number] = header
        written = {REF: map(write_name, self.names), BBOX: self._written(pictures, header_of)}
        return [
            {**message, "content": [_filled(part, written) for part in message["content"]]}
            for message in messages
        ]

    def _written(self, pictures: Sequence[object], header_of: dict[int, Header]) -> Iterator[str]:
        for number, (box, image_id) in enumerate(zip(self.boxes, self.image_ids, strict=True)):
            where = f"has in objects.bbox[{number}] {short(box)}"
            picture, size = str(pictures[image_id]), (1, 1)
            if not self.are_shares:
                size = header_of[image_id].upright
                picture += f", upright {size[0]}x{size[1]} pixels"
                if _look_like_shares(box) and min(size) > 1:
                    raise FormatError(
                        f'{where}, all within a pixel: write "bbox_type": "norm1" for shares of the sides, else {DROP}'
                    )
                if header_of[image_id].is_quarter_turned and _fits_turned_alone(box, size):
                    raise FormatError(
                        f"{where}, which reaches out of {picture}, and would fit before EXIF turns it: boxes are those "
                        "of the upright picture; turn them, or drop the record"
                    )
            text = _point(box, size) if len(box) == 2 else _box(box, size)
            if text is None:
                what = "which is not" if len(box) == 2 else "of which nothing lies"
                raise FormatError(f"{where}, {what} in {picture}: {DROP}")
            yield f"{BOX_START}{text}{BOX_END}"


def _filled(part: dict[str, Any], written: dict[str, Iterator[str]]) -> dict[str, Any]:
    if part["type"] != "text":
        return part
    return {**part, "text": PLACEHOLDER.sub(lambda found: next(written[found[0]]), part["text"])}


def _box(box: list[float], size: tuple[int, int]) -> str | None:
    found = on_grid(box[0], box[1], box[2], box[3], *size)
    return None if found is None else str(found)


def _point(point: list[float], size: tuple[int, int]) -> str | None:
    shares = [at / side for at, side in zip(point, size, strict=True)]
    if not all(0 <= share <= 1 for share in shares):
        return None
    x, y = (min(GRID - 1, round(share * GRID)) for share in shares)
    return f"({x},{y})"


def _look_like_shares(box: list[float]) -> bool:
    """Tell whether numbers are shares of sides rather than pixels: a point may be the first pixel's corner."""
    return max(map(abs, box)) <= 1 and (len(box) == 4 or any(at % 1 for at in box))


def _fits_turned_alone(box: list[float], size: tuple[int, int]) -> bool:
    """Tell whether a box is, by more than rounding, too large for a picture, but not for it turned by a quarter."""
    (x, y), (width, height) = box[-2:], size
    return (x > width + 1 or y > height + 1) and x <= height and y <= width


def objects_of(given: Any, texts: Iterable[str], num_pictures: int) -> Objects | None:
    """Return what a record's `objects` puts into its texts, None when nothing is to be put there.

    Raises FormatError for what cannot be: among it placeholders without objects, and objects without placeholders. Only
    another program's `objects`, which no placeholder asks for, are passed over.
    """
    marks = [mark for text in texts if "<" in text for mark in PLACEHOLDER.findall(text)]
    if isinstance(given, str):  # as some tables keep it
        given = _parsed(given)
    if given in (None, {}, []):
        if not marks:
            return None
        raise FormatError(
            f"has {marks[0]} in a text and no 'objects' to fill it from, like {EXAMPLE}: add them, or take it out"
        )
    if not marks and not (isinstance(given, dict) and {*given} <= {*MEMBERS}):
        return None
    if not isinstance(given, dict):
        raise FormatError(f"has 'objects' {short(given)}: it must be an object like {EXAMPLE}")
    names, boxes = (_listed(given, member) for member in ("ref", "bbox"))
    for mark, member, values in ((REF, "ref", names), (BBOX, "bbox", boxes)):
        count = marks.count(mark)
        if count != len(values):
            raise FormatError(
                f"has {count} {mark} in its texts and {len(values)} in objects.{member}: there must be as many; {DROP}"
            )
    kind = given.get("bbox_type") or "real"
    if kind not in TYPES:
        raise FormatError(
            f"has in objects.bbox_type {short(kind)}: it must be 'real' (pixels) or 'norm1' (shares of the sides)"
        )
    if boxes and not num_pictures:
        raise FormatError(f"has boxes in 'objects' and no picture that they lie in: name it, or {DROP}")
    return Objects(
        [_name(name, number) for number, name in enumerate(names)],
        [_numbers(box, number, kind) for number, box in enumerate(boxes)],
        _image_ids(given, len(boxes), num_pictures),
        kind == "norm1",
    )


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _listed(given: dict[str, Any], member: str) -> list[Any]:
    values = given.get(member)
    if values is None:
        return []
    if not isinstance(values, list):
        raise FormatError(f"has in objects.{member} {short(values)}: it must be a list, as in {EXAMPLE}")
    return values


def _name(name: Any, number: int) -> str:
    found = clean_name(name) if isinstance(name, str) else ""
    if not found or any(mark in found for mark in (*MARKS, REF, BBOX)):
        raise FormatError(
            f"has in objects.ref[{number}] {short(name)}: it must be a name, without a mark of boxes in it; {DROP}"
        )
    check_text(found)
    return found


def _numbers(box: Any, number: int, kind: str) -> list[float]:
    where = f"has in objects.bbox[{number}] {short(box)}"
    if not isinstance(box, list) or len(box) not in (2, 4) or not all(map(is_number, box)):
        raise FormatError(f"{where}: it must be [x1, y1, x2, y2], or a point [x, y]; {DROP}")
    if len(box) == 4 and (box[0] > box[2] or box[1] > box[3]):
        raise FormatError(f"{where}: the upper left corner comes first, then the lower right; {DROP}")
    if kind == "norm1" and max(map(abs, box)) > MOST_SHARE:
        raise FormatError(
            f"{where} of bbox_type 'norm1', which are shares of the sides: write 'real' for pixels, else {DROP}"
        )
    return box


def _image_ids(given: dict[str, Any], num_boxes: int, num_pictures: int) -> list[int]:
    image_ids = _listed(given, "image_id") or [0] * num_boxes
    if len(image_ids) != num_boxes:
        raise FormatError(
            f"has {len(image_ids)} in objects.image_id and {num_boxes} boxes: there must be as many, or none; {DROP}"
        )
    for number, image_id in enumerate(image_ids):
        if type(image_id) is not int or not 0 <= image_id < num_pictures:
            raise FormatError(
                f"has in objects.image_id[{number}] {short(image_id)}: pictures of the record are 0 to "
                f"{num_pictures - 1}; {DROP}"
            )
    return image_ids
