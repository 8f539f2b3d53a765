"""COCO instances -> conversations about boxes: name to boxes, and picture to all objects."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenvl_dist.data.boxes import MARKS, NamedBox, clean_name, is_number, on_grid, write_name, write_objects
from qwenvl_dist.data.formats import ImageRef, PackInput, Sample, caption_messages
from qwenvl_dist.data.formats.coco import IS_ANNOTATED, CocoFileReader, Row
from qwenvl_dist.data.formats.headers import Header, read_headers
from qwenvl_dist.data.formats.sample import is_unicode, short
from qwenvl_dist.errors import UserError

TASKS = ("name_to_boxes", "all_objects", "both")
FIND_PROMPT = "Find {name}."
ALL_PROMPT = "Find all objects."
MAX_STEM_CHARACTERS, MAX_CATEGORY_CHARACTERS = 60, 18  # a key is STEM-cCATEGORY
ASPECT_TOLERANCE = 0.01


class GroundingReader(CocoFileReader):
    """The samples of a COCO instances file; `left_out` counts what of it became none.

    `name_to_boxes` gives one for each name in a picture, asked with `find_prompt` (its `{name}` becomes the name
    between its marks); `all_objects` one for each picture. Names stand in alphabetical order, boxes from left to right.

    Boxes are those of the upright picture, which is what the model sees. The annotated width and height tell: where
    they are those of the stored picture of one that EXIF turns by a quarter, the boxes are turned with it.

    Left out and counted: crowd annotations (a region, no object), and with them the question for that name in that
    picture, whose answer would be incomplete; boxes of no size, or wholly outside the picture; pictures without a box.
    Samples about all objects have the crowds' regions beside their messages. Boxes are cut to the picture. A picture
    whose shape contradicts the annotations is a `UserError`, or left out too where missing ones are allowed; a missing
    one is a `UserError`, or left to the packer.
    """

    source, option, kind = "grounding", "--instances", "a COCO instances JSON file"
    form = (
        "a COCO instances file is {'images': [...], 'annotations': [...], 'categories': [...]}, like "
        "instances_val2017.json"
    )
    image_columns = ("width", "height")
    annotation_columns = ("category", "is_crowd", "x", "y", "width", "height")
    without = "segmentation"
    max_key_characters = MAX_STEM_CHARACTERS

    def __init__(
        self,
        given: PackInput,
        task: str = "both",
        find_prompt: str = FIND_PROMPT,
        all_prompt: str = ALL_PROMPT,
    ) -> None:
        if task not in TASKS:
            raise UserError(f"--task {task}: must be one of {', '.join(TASKS)}")
        if "{name}" not in find_prompt:
            raise UserError(f"the prompt {find_prompt!r} lacks {{name}}, which becomes the object's name")
        super().__init__(given)
        self.task, self.find_prompt, self.all_prompt = task, find_prompt, all_prompt
        self._left_out: Counter[str] = Counter()

    @property
    def left_out(self) -> dict[str, int]:
        """What of the annotations became no sample, by kind. Looks at the whole input."""
        len(self)
        return {what: count for what, count in self._left_out.items() if count}

    def _examine(self) -> int:
        self.names = self._read_names()
        return super()._examine()

    def _read_names(self) -> dict[int, str]:
        """Return the names of the categories by id."""
        names = {}
        for record in self.file.items("categories.item"):
            where, category = record.where, record.value
            if (
                not isinstance(category, dict)
                or not _is_int(category.get("id"))
                or not isinstance(category.get("name"), str)
            ):
                raise UserError(
                    f"{where} is {short(category)}: it needs an integer 'id' and a 'name'; {self.form}"
                )
            if len(str(category["id"])) > MAX_CATEGORY_CHARACTERS:
                raise UserError(
                    f"{where} has id {category['id']}: it becomes part of keys and may have "
                    f"{MAX_CATEGORY_CHARACTERS} characters; renumber"
                )
            name = clean_name(category["name"])
            if not name or any(mark in name for mark in (*MARKS, "<|im_start|>", "<|im_end|>")):
                raise UserError(
                    f"{where}: the name {category['name']!r} is empty or holds a mark of the model's; rename it"
                )
            if not is_unicode(name):
                raise UserError(f"{where} holds half a character (a lone surrogate): write it as UTF-8")
            names[category["id"]] = name
        if not names:
            self._need_list("categories")
        return names

    def _image_values(self, image: dict[str, Any], where: str) -> Row:
        sides = [image[name] for name in ("width", "height") if image.get(name) is not None]
        for side in sides:
            if not (is_number(side) and side > 0):
                raise UserError(
                    f"{where} has a width or height of {short(side)}: it must be above 0; mend it or leave it out"
                )
        return tuple(map(float, sides)) if len(sides) == 2 else (None, None)

    def _annotation_values(self, annotation: dict[str, Any], where: str, image_id: int | str) -> Row:
        category, box = annotation.get("category_id"), annotation.get("bbox")
        if not _is_int(category) or category not in self.names:
            raise UserError(
                f"{where} has category_id {category!r}, which 'categories' does not list: add it there or drop it"
            )
        if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
            raise UserError(
                f"{where} has bbox {short(box)}: it must be [x, y, width, height] in pixels; mend or drop it"
            )
        return category, bool(annotation.get("iscrowd")), *map(float, box)

    def _finish(self) -> int:
        (num_silent,) = self._one(f"SELECT count(*) FROM images WHERE NOT {IS_ANNOTATED}")
        self._left_out = Counter({"pictures without annotations": num_silent})
        # Headers are read once: where boxes lie in a picture is noted for its samples.
        self.spill.execute("CREATE TABLE places (image_id NOT NULL PRIMARY KEY, width, height, turn)")
        count = 0
        for image_id, place in self._placements():
            if place is not None:
                row = image_id, place.width, place.height, place.turn
                self._insert("places", iter([row]), len(row))
                count += sum(1 for _ in self._conversations(image_id, place, self._left_out))
        if not count:
            raise UserError(f"{self.file}: gives no sample: no picture has a box; {self.form}")
        return count

    def _placements(self) -> Iterator[tuple[int | str, _Placement | None]]:
        """Yield how boxes lie in each annotated picture, None for one that is left out."""
        pictures = (
            ((image_id, ref, size), [ref])
            for image_id, name, *size in self._annotated("id, name, width, height")
            for ref in [self._picture(name)]
        )
        for (image_id, ref, size), (header,) in read_headers(pictures):
            place = _placement(size[0], size[1], header)
            if place is None:
                self._leave_out(ref, size, header)
            yield image_id, place

    def _leave_out(self, ref: ImageRef, size: list[Any], header: Header | None) -> None:
        """Count a picture in which boxes have no place; `UserError` unless it may be left out."""
        if header is None:  # and the annotations have no size
            if not self.given.allow_missing:
                raise UserError(
                    f"{ref}: its size cannot be read, and {self.file} has no width and height for it: replace it, or "
                    "leave such ones out with --skip-bad"
                )
            self._left_out["pictures of no known size"] += 1
            return
        if not self.given.allow_missing:
            raise UserError(
                f"{ref}: is {header.upright[0]}x{header.upright[1]} pixels, {self.file} says "
                f"{size[0]:g}x{size[1]:g}: boxes have no place in it; name the pictures that were annotated, or leave "
                "such ones out with --skip-bad"
            )
        self._left_out["pictures of another shape"] += 1

    def _samples(self) -> Iterator[Sample]:
        query = (
            f"SELECT id, name, {self.key}, places.width, places.height, turn FROM images JOIN places ON id = image_id "
            "ORDER BY id"
        )
        for image_id, name, key, *place in self.spill.execute(query):
            for suffix, messages, crowds in self._conversations(image_id, _Placement(*place), Counter()):
                image = self._picture(name)
                yield Sample(f"{key}-{suffix}", messages, [image], image_id, self.source, crowds)

    def _conversations(
        self, image_id: int | str, place: _Placement, left_out: Counter[str]
    ) -> Iterator[tuple[str, list[dict[str, Any]], tuple[NamedBox, ...]]]:
        """Yield the conversations about one picture, each with the end of its key and its crowds.

        What gives none is counted in `left_out`.
        """
        objects, crowded, crowds = _objects(self._annotations_of(image_id), self.names, place, left_out)
        if not objects:
            left_out["pictures without a box"] += 1
            return
        if self.task in ("all_objects", "both"):
            yield (
                "all",
                caption_messages(self.all_prompt, write_objects([each for _, each in objects])),
                crowds,
            )
        if self.task == "all_objects":
            return
        numbers: dict[str, int] = {}
        by_name: dict[str, list[NamedBox]] = defaultdict(list)
        for category, each in objects:
            numbers[each.name] = min(category, numbers.get(each.name, category))
            by_name[each.name].append(each)
        for name, boxes in by_name.items():
            if name in crowded:
                left_out["questions about crowds"] += 1
                continue
            prompt = self.find_prompt.replace("{name}", write_name(name))
            yield f"c{numbers[name]}", caption_messages(prompt, write_objects(boxes)), ()


def read_coco_instances(
    instances: str | Path,
    images: str | Path,
    task: str = "both",
    *,
    find_prompt: str = FIND_PROMPT,
    all_prompt: str = ALL_PROMPT,
    allow_missing: bool = False,
) -> GroundingReader:
    """Return the samples of a COCO instances file and its folder of pictures, either a path or a URL."""
    given = PackInput(instances, images, allow_missing=allow_missing)
    return GroundingReader(given, task, find_prompt, all_prompt)


@dataclass(frozen=True)
class _Placement:
    """From pixels of the annotations to the upright picture."""

    width: float  # of what was annotated
    height: float
    turn: int = 1  # EXIF orientation that is still to be applied: 1, or 5 to 8

    def corners(
        self, x1: float, y1: float, x2: float, y2: float
    ) -> tuple[float, float, float, float, float, float]:
        """Return the corners in the upright picture, and its size."""
        w, h = self.width, self.height
        if self.turn == 1:
            return x1, y1, x2, y2, w, h
        if self.turn == 5:  # mirrored at the main diagonal
            return y1, x1, y2, x2, h, w
        if self.turn == 6:  # a quarter clockwise
            return h - y2, x1, h - y1, x2, h, w
        if self.turn == 7:  # mirrored at the other diagonal
            return h - y2, w - x2, h - y1, w - x1, h, w
        return y1, w - x2, y2, w - x1, h, w  # 8: a quarter counter-clockwise


def _placement(width: float | None, height: float | None, header: Header | None) -> _Placement | None:
    """Return how boxes lie in the upright picture; None when picture and annotations have different shapes."""
    if width is None or height is None:
        return None if header is None else _Placement(*header.upright)
    if header is None or _same_shape((width, height), header.upright):  # a missing one is the packer's matter
        return _Placement(width, height)
    if header.is_quarter_turned and _same_shape((width, height), (header.width, header.height)):
        return _Placement(width, height, header.orientation)
    return None


def _same_shape(annotated: tuple[float, float], real: tuple[int, int]) -> bool:
    """Tell whether one is the other, maybe at another scale."""
    return math.isclose(annotated[0] * real[1], annotated[1] * real[0], rel_tol=ASPECT_TOLERANCE)


def _objects(
    annotations: Iterable[Row], names: dict[int, str], place: _Placement, left_out: Counter[str]
) -> tuple[list[tuple[int, NamedBox]], set[str], tuple[NamedBox, ...]]:
    """Return the objects of a picture with their categories, in order; the names of its crowds; and their regions."""
    objects: list[tuple[int, NamedBox]] = []
    crowded: set[str] = set()
    crowds: list[NamedBox] = []
    for category, is_crowd, x, y, width, height in annotations:
        name = names[category]
        box = on_grid(*place.corners(x, y, x + width, y + height)) if width > 0 and height > 0 else None
        if is_crowd:
            left_out["crowd annotations"] += 1
            crowded.add(name)
            crowds += [NamedBox(name, box)] if box else []
        elif box is None:
            left_out["boxes of no size or outside"] += 1
        else:
            objects.append((category, NamedBox(name, box)))
    objects.sort(key=lambda each: _order(each[1]))
    return objects, crowded, tuple(sorted(crowds, key=_order))


def _order(each: NamedBox) -> tuple[str, int, int, int, int]:
    return each.name, each.box.x1, each.box.y1, each.box.x2, each.box.y2


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
