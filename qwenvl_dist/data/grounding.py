"""COCO instances -> conversations about boxes: name to boxes, and picture to all objects."""

from __future__ import annotations

import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from qwenvl_dist.data.boxes import MARKS, NamedBox, clean_name, on_grid, write_name, write_objects
from qwenvl_dist.data.formats import SAFE_KEY, ImageRef, Sample, caption_messages
from qwenvl_dist.data.storage import LocalStorage, open_file, open_storage
from qwenvl_dist.errors import UserError

TASKS = ("name_to_boxes", "all_objects", "both")
FIND_PROMPT = "Find {name}."
ALL_PROMPT = "Find all objects."
HEADER_BYTES = 1 << 17  # of a JPEG: where its size and EXIF stand
READS_AT_A_TIME = 16
MAX_STEM_CHARACTERS = 60  # leaves room in a key for the task
EXIF_ORIENTATION = 0x0112
ASPECT_TOLERANCE = 0.01
FORM = (
    "a COCO instances file is {'images': [...], 'annotations': [...], 'categories': [...]}, like "
    "instances_val2017.json"
)


@dataclass
class GroundingSamples:
    """Samples, and what of the annotations became none."""

    samples: list[Sample] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Picture:
    image_id: int
    name: str
    width: float | None  # as the annotations say
    height: float | None


@dataclass(frozen=True)
class _Header:
    """A picture's size as it is stored, and its EXIF orientation."""

    width: int
    height: int
    orientation: int

    @property
    def is_quarter_turned(self) -> bool:
        return self.orientation in (5, 6, 7, 8)

    @property
    def upright(self) -> tuple[int, int]:
        return (self.height, self.width) if self.is_quarter_turned else (self.width, self.height)


def read_coco_instances(
    instances: str | Path,
    images: str | Path,
    task: str = "both",
    *,
    find_prompt: str = FIND_PROMPT,
    all_prompt: str = ALL_PROMPT,
    allow_missing: bool = False,
) -> GroundingSamples:
    """Return the samples of a COCO instances file, by image id.

    `name_to_boxes` gives one for each name in a picture, asked with `find_prompt` (its `{name}` becomes the name
    between its marks); `all_objects` one for each picture. Names stand in alphabetical order, boxes from left to right.

    Boxes are those of the upright picture, which is what the model sees. The annotated width and height tell: where
    they are those of the stored picture of one that EXIF turns by a quarter, the boxes are turned with it.

    Left out and counted: crowd annotations (a region, no object), and with them the question for that name in that
    picture, whose answer would be incomplete; boxes of no size, or wholly outside the picture; pictures without a box.
    Boxes are cut to the picture. A picture whose shape contradicts the annotations is a `UserError`, or left out too
    with `allow_missing`; a missing one is a `UserError`, or left to the packer.
    """
    if task not in TASKS:
        raise UserError(f"--task {task}: must be one of {', '.join(TASKS)}")
    if "{name}" not in find_prompt:
        raise UserError(f"the prompt {find_prompt!r} lacks {{name}}, which becomes the object's name")
    folder = open_storage(images)
    if isinstance(folder, LocalStorage) and not folder.folder.is_dir():
        raise UserError(f"{images}: --images must be the folder that holds the pictures")
    content = _load(instances)
    names = _names(instances, content)
    pictures = _pictures(instances, content)
    annotations = _annotations(instances, content, pictures, names)
    keys = _keys(instances, pictures)
    result = GroundingSamples()
    wanted = [picture for picture in pictures.values() if annotations[picture.image_id]]
    result.left_out["pictures without annotations"] = len(pictures) - len(wanted)
    wanted.sort(key=lambda picture: picture.image_id)
    refs = []
    for picture in wanted:
        local = isinstance(folder, LocalStorage)
        ref = ImageRef(folder.folder / picture.name) if local else ImageRef(Path(picture.name), folder)
        if local and not allow_missing and not ref.path.is_file():
            raise UserError(
                f"{instances}: image {picture.image_id} is {picture.name!r}, which is not in {images}: name the folder "
                "that holds it with --images, or pack without it (--skip-bad)"
            )
        refs.append(ref)
    with ThreadPoolExecutor(READS_AT_A_TIME) as pool:
        headers = pool.map(_read_header, refs)
        for picture, ref, header in zip(wanted, refs, headers, strict=True):
            place = _placement(picture, header)
            if place is None:
                if not allow_missing:
                    assert header is not None, "without it the annotations' size is used"
                    raise UserError(
                        f"{ref}: is {header.upright[0]}x{header.upright[1]} pixels, {instances} says "
                        f"{picture.width:g}x{picture.height:g}: boxes have no place in it; name the pictures that were "
                        "annotated, or leave such ones out with --skip-bad"
                    )
                result.left_out["pictures of another shape"] += 1
                continue
            objects, crowded = _objects(annotations[picture.image_id], names, place, result.left_out)
            if not objects:
                result.left_out["pictures without a box"] += 1
                continue
            conversations = _conversations(objects, crowded, task, find_prompt, all_prompt, result.left_out)
            for suffix, messages in conversations:
                key = f"{keys[picture.image_id]}-{suffix}"
                result.samples.append(Sample(key, messages, [ref], picture.image_id, "grounding"))
    if not result.samples:
        raise UserError(f"{instances}: gives no sample: no picture has a box; {FORM}")
    result.left_out = Counter({what: count for what, count in result.left_out.items() if count})
    return result


def _conversations(
    objects: list[tuple[int, NamedBox]],
    crowded: set[str],
    task: str,
    find_prompt: str,
    all_prompt: str,
    left_out: Counter[str],
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the conversations about one picture, each with the end of its key."""
    if task in ("all_objects", "both"):
        yield "all", caption_messages(all_prompt, write_objects([each for _, each in objects]))
    if task == "all_objects":
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
        prompt = find_prompt.replace("{name}", write_name(name))
        yield f"c{numbers[name]}", caption_messages(prompt, write_objects(boxes))


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


def _placement(picture: _Picture, header: _Header | None) -> _Placement | None:
    """Return how boxes lie in the upright picture; None when picture and annotations have different shapes."""
    if picture.width is None or picture.height is None:
        return None if header is None else _Placement(*header.upright)
    width, height = picture.width, picture.height
    if header is None or _same_shape((width, height), header.upright):  # a missing one is the packer's matter
        return _Placement(width, height)
    if header.is_quarter_turned and _same_shape((width, height), (header.width, header.height)):
        return _Placement(width, height, header.orientation)
    return None


def _same_shape(annotated: tuple[float, float], real: tuple[int, int]) -> bool:
    """Tell whether one is the other, maybe at another scale."""
    return math.isclose(annotated[0] * real[1], annotated[1] * real[0], rel_tol=ASPECT_TOLERANCE)


def _read_header(ref: ImageRef) -> _Header | None:
    """Return what a picture's header says; None when it cannot be read, which the packer will say."""
    try:
        if ref.storage is None:
            with ref.path.open("rb") as file:
                data = file.read(HEADER_BYTES)
        else:
            (data,) = ref.storage.open(str(ref.path)).read_ranges([(0, HEADER_BYTES)])
        header = _parse_header(data) if data.startswith(b"\xff\xd8") else None
        return header or _parse_header(ref.read())  # other formats may have EXIF at their end
    except OSError:
        return None


def _parse_header(data: bytes) -> _Header | None:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _Header(*image.size, orientation=image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # Pillow's parsers raise whatever a damaged header leads them to
        return None


def _objects(
    annotations: list[dict[str, Any]], names: dict[int, str], place: _Placement, left_out: Counter[str]
) -> tuple[list[tuple[int, NamedBox]], set[str]]:
    """Return the objects of a picture with their categories, in order, and the names of its crowds."""
    objects: list[tuple[int, NamedBox]] = []
    crowded: set[str] = set()
    for annotation in annotations:
        name = names[annotation["category_id"]]
        if annotation.get("iscrowd"):
            left_out["crowd annotations"] += 1
            crowded.add(name)
            continue
        x, y, width, height = map(float, annotation["bbox"])
        box = on_grid(*place.corners(x, y, x + width, y + height)) if width > 0 and height > 0 else None
        if box is None:
            left_out["boxes of no size or outside"] += 1
            continue
        objects.append((annotation["category_id"], NamedBox(name, box)))
    objects.sort(
        key=lambda each: (each[1].name, each[1].box.x1, each[1].box.y1, each[1].box.x2, each[1].box.y2)
    )
    return objects, crowded


def _load(instances: str | Path) -> dict[str, Any]:
    try:
        storage, name = open_file(instances)
        content = json.loads(storage.read_bytes(name))
    except FileNotFoundError:
        raise UserError(
            f"{instances}: no such file; --instances must name a COCO instances JSON file"
        ) from None
    except OSError as error:
        raise UserError(
            f"{instances}: cannot be read ({error.strerror or error}); --instances must name a file"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{instances}: not JSON ({error}); {FORM}") from None
    for part in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise UserError(f"{instances}: '{part}' is not a list; {FORM}")
    return content


def _names(instances: str | Path, content: dict[str, Any]) -> dict[int, str]:
    names = {}
    for number, category in enumerate(content["categories"]):
        where = f"{instances}: categories[{number}]"
        if (
            not isinstance(category, dict)
            or not _is_int(category.get("id"))
            or not isinstance(category.get("name"), str)
        ):
            raise UserError(f"{where}: needs an integer 'id' and a 'name'; {FORM}")
        name = clean_name(category["name"])
        if not name or any(mark in name for mark in (*MARKS, "<|im_start|>", "<|im_end|>")):
            raise UserError(
                f"{where}: the name {category['name']!r} is empty or holds a mark of the model's; rename it"
            )
        names[category["id"]] = name
    return names


def _pictures(instances: str | Path, content: dict[str, Any]) -> dict[int, _Picture]:
    pictures: dict[int, _Picture] = {}
    for number, image in enumerate(content["images"]):
        where = f"{instances}: images[{number}]"
        if (
            not isinstance(image, dict)
            or not _is_int(image.get("id"))
            or not isinstance(image.get("file_name"), str)
        ):
            raise UserError(f"{where}: needs an integer 'id' and a 'file_name'; {FORM}")
        path = PurePosixPath(image["file_name"])
        if not path.name or path.is_absolute() or ".." in path.parts:
            raise UserError(
                f"{where} has file_name {str(path)!r}: it must lie below --images; make it relative to it"
            )
        if image["id"] in pictures:
            raise UserError(
                f"{where} has id {image['id']} for the second time: ids must differ; drop one of the two"
            )
        size = image.get("width"), image.get("height")
        for value in size:
            if value is not None and not (_is_number(value) and value > 0):
                raise UserError(
                    f"{where} has a width or height of {value!r}: it must be above 0; mend it or leave it out"
                )
        pictures[image["id"]] = _Picture(
            image["id"], str(path), *(size if None not in size else (None, None))
        )
    return pictures


def _annotations(
    instances: str | Path, content: dict[str, Any], pictures: dict[int, _Picture], names: dict[int, str]
) -> dict[int, list[dict[str, Any]]]:
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for number, annotation in enumerate(content["annotations"]):
        where = f"{instances}: annotations[{number}]"
        if not isinstance(annotation, dict):
            raise UserError(f"{where}: is no object; {FORM}")
        for key, known, owner in (("image_id", pictures, "images"), ("category_id", names, "categories")):
            value = annotation.get(key)
            if not _is_int(value) or value not in known:
                raise UserError(
                    f"{where} has {key} {value!r}, which '{owner}' does not list: add it there or drop it"
                )
        box = annotation.get("bbox")
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
            raise UserError(
                f"{where} has bbox {box!r}: it must be [x, y, width, height] in pixels; mend or drop it"
            )
        by_image[annotation["image_id"]].append(annotation)
    return by_image


def _keys(instances: str | Path, pictures: dict[int, _Picture]) -> dict[int, str]:
    """Return a key for each picture: the stem of its name where all are safe and differ, else its id."""
    stems = {image_id: PurePosixPath(picture.name).stem for image_id, picture in pictures.items()}
    fit = all(SAFE_KEY.fullmatch(stem) and len(stem) <= MAX_STEM_CHARACTERS for stem in stems.values())
    if fit and len(set(stems.values())) == len(stems):
        return stems
    if any(image_id < 0 for image_id in pictures):
        raise UserError(f"{instances}: has an image id below 0, which cannot be a key; renumber the images")
    return {image_id: f"{image_id:012d}" for image_id in pictures}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
