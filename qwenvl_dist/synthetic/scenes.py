"""Draw pictures of two coloured shapes with captions and boxes, as JPEG files and COCO JSON.

A scene is one shape above another. The order of the two and their colours can only be told by looking, so
captions that match are proof that a model sees. The same scenes can be captioned in several *styles*: one to
pre-train a small base in, another to fine-tune it to.

Everything is a pure function of (seed, split, number): no global random state, and only
`random.Random(str).random()`, whose stream Python promises to keep.
"""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from qwenvl_dist.errors import UserError
from qwenvl_dist.synthetic.splits import require_split, write_splits

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (235, 200, 30),
    "purple": (140, 50, 170),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle")
OBJECTS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)

# The captions that each picture gets in a style; {a} is the upper object, {b} the lower one.
STYLES: dict[str, tuple[str, ...]] = {
    "plain": ("a {a} above a {b}",),
    "plain5": (
        "a {a} above a {b}",
        "a {b} below a {a}",
        "a {a} on top and a {b} at the bottom",
        "the {a} is above the {b}",
        "the {b} is below the {a}",
    ),
}
# In these styles a picture gets one caption out of several wordings, in the order of objects and of words, so
# that a base cannot learn to answer from the place in the sentence alone.
MIXED_STYLES: dict[str, tuple[str, ...]] = {
    "inventory": (
        "above: a {a}. below: a {b}.",
        "above: a {a}. below: a {b}.",
        "below: a {b}. above: a {a}.",
        "a {a} above, a {b} below.",
    ),
}
JPEG_QUALITY = 92
SQUARE_HALF, TRIANGLE_REACH = 0.88, 1.25  # half a side, and centre to corner, in radii
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class PlacedShape:
    """One coloured shape on the picture; lengths in pixels, origin at the upper left corner."""

    colour: str
    shape: str
    centre: tuple[float, float]  # (x, y)
    radius: float

    @property
    def name(self) -> str:
        """What a caption calls it, such as `red circle`."""
        return f"{self.colour} {self.shape}"

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """What it covers: (x1, y1, x2, y2)."""
        (x, y), radius = self.centre, self.radius
        if self.shape == "circle":
            return x - radius, y - radius, x + radius, y + radius
        if self.shape == "square":
            half = SQUARE_HALF * radius
            return x - half, y - half, x + half, y + half
        reach = TRIANGLE_REACH * radius
        return x - reach * math.cos(math.pi / 6), y - reach, x + reach * math.cos(math.pi / 6), y + reach / 2


@dataclass(frozen=True)
class Scene:
    """What one picture shows."""

    size: int  # pixels, both sides
    background: tuple[int, int, int]
    upper: PlacedShape
    lower: PlacedShape
    chance: float  # in [0, 1): which wording a mixed style uses


def held_out(upper: int, lower: int) -> bool:
    """Tell whether a pair of object numbers belongs to the validation split.

    One pair in eight or so, the same for every seed: pictures of these pairs are never trained on, neither
    for the base nor for the adapter. Each single object still occurs in training in both places.
    """
    return (5 * upper + 3 * lower) % 8 == 0


def scene(number: int, seed: int, split: str = "train", size: int = 56) -> Scene:
    """Return scene `number` of a split, drawn at `size` x `size` pixels."""
    require_split(split)
    draw = random.Random(f"scene/{seed}/{split}/{number}")
    pairs = [
        (upper, lower)
        for upper in range(len(OBJECTS))
        for lower in range(len(OBJECTS))
        if held_out(upper, lower) == (split == "validation")
    ]
    upper, lower = pairs[int(draw.random() * len(pairs))]
    level = 170 + 75 * draw.random()
    red, green, blue = (round(level + 10 * draw.random()) for _ in range(3))

    def place(kind: int, middle: float) -> PlacedShape:
        colour, shape = OBJECTS[kind]
        radius = size * (0.15 + 0.04 * draw.random())
        x = size * (0.5 + 0.24 * (draw.random() - 0.5))
        y = size * (middle + 0.06 * (draw.random() - 0.5))
        return PlacedShape(colour, shape, (x, y), radius)

    return Scene(size, (red, green, blue), place(upper, 0.26), place(lower, 0.74), draw.random())


def draw_scene(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB picture with smooth edges."""
    big = scene.size * _SUPERSAMPLING
    image = Image.new("RGB", (big, big), scene.background)
    pen = ImageDraw.Draw(image)
    for item in (scene.upper, scene.lower):
        x, y, radius = (value * _SUPERSAMPLING for value in (*item.centre, item.radius))
        colour = COLOURS[item.colour]
        if item.shape == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        elif item.shape == "square":
            half = SQUARE_HALF * radius
            pen.rectangle((x - half, y - half, x + half, y + half), fill=colour)
        else:  # an upright triangle; its centre of mass is the centre of the shape
            reach = TRIANGLE_REACH * radius
            corners = [math.radians(degrees) for degrees in (-90, 30, 150)]
            pen.polygon([(x + reach * math.cos(a), y + reach * math.sin(a)) for a in corners], fill=colour)
    return image.resize((scene.size, scene.size), Image.Resampling.BOX)


def captions(scene: Scene, style: str = "plain") -> list[str]:
    """Return the captions of a scene, one or more, in the wording of a style."""
    if style in MIXED_STYLES:
        wordings = MIXED_STYLES[style]
        patterns = (wordings[int(scene.chance * len(wordings))],)
    elif style in STYLES:
        patterns = STYLES[style]
    else:
        raise UserError(f"style is {style!r}; it must be one of {', '.join([*STYLES, *MIXED_STYLES])}")
    return [text.format(a=scene.upper.name, b=scene.lower.name) for text in patterns]


def all_words() -> Sequence[str]:
    """Return every sentence pattern, colour and shape: the text that a scene tokenizer must know."""
    patterns = [text.format(a="", b="") for style in (STYLES | MIXED_STYLES).values() for text in style]
    return [*patterns, *COLOURS, *SHAPES]


def write_scenes(
    out: Path,
    count: int,
    seed: int = 0,
    size: int = 56,
    style: str = "plain",
    validation_count: int | None = None,
) -> dict[str, Path]:
    """Write `count` training scenes and some validation scenes; return the caption file of each split.

    The result is `out/{train,validation}/captions.json` (COCO caption format), `instances.json` beside it (the
    shapes' boxes, COCO instances format) and `out/.../images/*.jpg`; it appears at once or not at all. The two splits
    share no pair of objects and no image id. The same arguments give the same bytes (for one version of Pillow).

    Args:
        out: a folder that does not exist yet, or is empty.
        count: number of training pictures.
        seed: any integer; other seeds give other pictures.
        size: side of the square pictures in pixels, a multiple of 28 for Qwen2-VL to keep every pixel.
        style: a key of STYLES.
        validation_count: number of validation pictures, by default an eighth of `count`, at least one.
    """
    if count < 1:
        raise UserError(f"count is {count}; it must be at least 1")
    if size < 28:
        raise UserError(f"size is {size} pixels; it must be at least 28, so that shapes can be told apart")
    captions(scene(0, seed), style)  # a wrong style is told before anything is written

    def write_split(folder: Path, split: str, number: int, first_id: int) -> None:
        _write_split(folder, split, number, first_id, seed, size, style)

    return write_splits(out, count, validation_count, write_split)


def _write_split(
    folder: Path, split: str, count: int, first_id: int, seed: int, size: int, style: str
) -> None:
    (folder / "images").mkdir(parents=True)
    images, annotations, boxes = [], [], []
    for number in range(count):
        drawn = scene(number, seed, split, size)
        image_id = first_id + number
        name = f"{image_id:012d}.jpg"
        # Full colour resolution: at this size the usual halved chroma would smear the shapes.
        draw_scene(drawn).save(folder / "images" / name, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        images.append({"id": image_id, "file_name": name, "width": size, "height": size})
        for text in captions(drawn, style):
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "caption": text})
        for item in (drawn.upper, drawn.lower):
            x1, y1, x2, y2 = (round(value, 2) for value in item.bounds)
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": image_id,
                    "category_id": 1 + OBJECTS.index((item.colour, item.shape)),
                    "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                    "iscrowd": 0,
                }
            )
    content = {
        "info": {
            "description": "generated scenes of two shapes",
            "style": style,
            "seed": seed,
            "split": split,
        },
        "images": images,
        "annotations": annotations,
    }
    (folder / "captions.json").write_text(json.dumps(content) + "\n", encoding="utf-8")
    categories = [{"id": 1 + n, "name": f"{colour} {shape}"} for n, (colour, shape) in enumerate(OBJECTS)]
    instances = {**content, "annotations": boxes, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(instances) + "\n", encoding="utf-8")
