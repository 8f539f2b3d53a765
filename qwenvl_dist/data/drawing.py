"""Boxes drawn on a picture: the reference dashed, predictions solid, right ones green and wrong ones red.

Crowds are dashed in grey, and predictions that they ignore grey.
"""

from __future__ import annotations

import io

from PIL import Image, ImageDraw, ImageFont

from qwenvl_dist.data.boxes import GRID, Box
from qwenvl_dist.data.pictures import thumbnail
from qwenvl_dist.scores.boxes import BoxAnswer

LEGEND = "reference dashed, predictions green where right, red where wrong, grey where ignored in a crowd (dashed too)"
REFERENCE, RIGHT, WRONG, IGNORED = (255, 255, 255), (40, 190, 90), (230, 50, 40), (150, 150, 150)
DARK = (0, 0, 0)
LINE_PIXELS = 3
LEAST_SIDE = 320  # pixels that the longer side of a small picture is enlarged to, or less
DASH_PIXELS = 6
TEXT_PIXELS = 14
MOST_NAME_CHARACTERS = 24


def draw_objects(data: bytes, boxes: BoxAnswer) -> bytes:
    """Return a small PNG of a picture with what was said about it and the reference. Raises UnreadableImage."""
    image = thumbnail(data)
    larger = LEAST_SIDE // max(image.size)
    if larger > 1:  # or a name would hide the picture
        image = image.resize((image.width * larger, image.height * larger), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    for each in boxes.crowds:
        _dashed(pen, _pixels(each.box, image.size), IGNORED)
    for each in boxes.true:
        _dashed(pen, _pixels(each.box, image.size), REFERENCE)
    predicted = [
        (each, _pixels(each.box, image.size), RIGHT if right else IGNORED if n in boxes.ignored else WRONG)
        for n, (each, right) in enumerate(zip(boxes.predicted, boxes.is_right, strict=True))
    ]
    for _, corners, colour in predicted:
        pen.rectangle(corners, outline=colour, width=LINE_PIXELS)
    for each, corners, colour in predicted:  # above all boxes
        _label(pen, each.name, corners, colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _pixels(box: Box, size: tuple[int, int]) -> tuple[float, float, float, float]:
    width, height = size
    x1, y1, x2, y2 = box.x1 * width, box.y1 * height, box.x2 * width, box.y2 * height
    return x1 / GRID, y1 / GRID, x2 / GRID, y2 / GRID


def _dashed(
    pen: ImageDraw.ImageDraw, corners: tuple[float, float, float, float], colour: tuple[int, int, int]
) -> None:
    """Draw a light rectangle with dark gaps, which shows on any ground."""
    pen.rectangle(corners, outline=DARK, width=LINE_PIXELS - 1)
    x1, y1, x2, y2 = corners
    x = x1
    while x < x2:
        for y in (y1, y2):
            pen.line((x, y, min(x + DASH_PIXELS, x2), y), fill=colour, width=LINE_PIXELS - 1)
        x += 2 * DASH_PIXELS
    y = y1
    while y < y2:
        for x in (x1, x2):
            pen.line((x, y, x, min(y + DASH_PIXELS, y2)), fill=colour, width=LINE_PIXELS - 1)
        y += 2 * DASH_PIXELS


def _label(
    pen: ImageDraw.ImageDraw,
    name: str,
    corners: tuple[float, float, float, float],
    colour: tuple[int, int, int],
) -> None:
    font = ImageFont.load_default(TEXT_PIXELS)
    text = "".join(c if c.isprintable() else "?" for c in name[:MOST_NAME_CHARACTERS])
    left, top = (
        corners[0],
        corners[1] - TEXT_PIXELS - LINE_PIXELS,
    )  # above the box, or inside where there is no room
    top = top if top >= 0 else corners[1] + LINE_PIXELS
    pen.rectangle(pen.textbbox((left, top), text, font=font), fill=DARK)
    pen.text((left, top), text, font=font, fill=colour)
