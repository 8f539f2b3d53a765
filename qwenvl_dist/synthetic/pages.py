"""Draw pages of text, as PNG files and COCO caption JSON whose caption is the page's whole text: material for OCR.

The words are made of syllables and mean nothing, so that a model that tells them has read them. Everything is a pure
function of (seed, split, number), like `scenes.py`.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from qwenvl_dist.errors import UserError
from qwenvl_dist.synthetic.splits import require_split, write_splits

ONSETS = "bdfgklmnprstv"
VOWELS = "aeiou"
LEAST_SIDE = 56  # pixels
LINE_HEIGHT = 1.5  # in letters' heights
MARGIN = 0.06  # of the page's width
INK, PAPER = (20, 20, 20), (250, 250, 246)


@dataclass(frozen=True)
class Page:
    """What one page says, line by line, and how it is set; lengths in pixels."""

    width: int
    height: int
    letter: int  # size of the font
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        """All of it, in the order of reading."""
        return " ".join(self.lines)


def page(
    number: int, seed: int, split: str = "train", words: int = 40, width: int = 280, height: int = 280
) -> Page:
    """Return page `number` of a split, its letters as large as the words allow. `UserError` when none would do."""
    require_split(split)
    draw = random.Random(f"page/{seed}/{split}/{number}")
    text = [_word(draw) for _ in range(words)]
    for letter in range(max(8, height // 8), 7, -1):
        lines = _wrapped(text, letter, width)
        if lines is not None and len(lines) * letter * LINE_HEIGHT <= height * (1 - 2 * MARGIN):
            return Page(width, height, letter, lines)
    raise UserError(f"{words} words do not fit on {width}x{height} pixels; take fewer, or a larger page")


def draw_page(page: Page) -> Image.Image:
    """Draw a page as an RGB picture, black on white, flush left."""
    image = Image.new("RGB", (page.width, page.height), PAPER)
    pen, font = ImageDraw.Draw(image), _font(page.letter)
    left = page.width * MARGIN
    for number, line in enumerate(page.lines):
        pen.text((left, page.height * MARGIN + number * page.letter * LINE_HEIGHT), line, font=font, fill=INK)
    return image


def write_pages(
    out: Path,
    count: int,
    seed: int = 0,
    words: int = 40,
    width: int = 280,
    height: int = 280,
    validation_count: int | None = None,
) -> dict[str, Path]:
    """Write `count` training pages and some for validation; return the caption file of each split.

    The result is `out/{train,validation}/captions.json` (COCO caption format: one caption a page, its text) and
    `out/.../images/*.png`; it appears at once or not at all. The same arguments give the same bytes (for one version
    of Pillow).

    Args:
        out: a folder that does not exist yet, or is empty.
        count: number of training pages.
        seed: any integer; other seeds give other pages.
        words: on each page.
        width: of a page in pixels, a multiple of 28 for Qwen2-VL to keep every pixel.
        height: likewise.
        validation_count: number of validation pages, by default an eighth of `count`, at least one.
    """
    if count < 1 or words < 1:
        raise UserError(f"count is {count} and words {words}; both must be at least 1")
    if min(width, height) < LEAST_SIDE:
        raise UserError(
            f"a page of {width}x{height} pixels cannot be read; both must be at least {LEAST_SIDE}"
        )

    def write_split(folder: Path, split: str, number: int, first_id: int) -> None:
        _write_split(folder, [page(n, seed, split, words, width, height) for n in range(number)], first_id)

    return write_splits(out, count, validation_count, write_split)


def _write_split(folder: Path, pages: list[Page], first_id: int) -> None:
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for image_id, each in enumerate(pages, first_id):
        name = f"{image_id:012d}.png"
        draw_page(each).save(folder / "images" / name)
        images.append({"id": image_id, "file_name": name, "width": each.width, "height": each.height})
        annotations.append({"id": image_id, "image_id": image_id, "caption": each.text})
    content = {"info": {"description": "generated pages"}, "images": images, "annotations": annotations}
    (folder / "captions.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


@cache
def _font(letter: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(letter)


def _word(draw: random.Random) -> str:
    syllables = 1 + int(draw.random() * 3)
    return "".join(
        ONSETS[int(draw.random() * len(ONSETS))] + VOWELS[int(draw.random() * len(VOWELS))]
        for _ in range(syllables)
    )


def _wrapped(words: list[str], letter: int, width: int) -> tuple[str, ...] | None:
    """Break words into lines; None when one of them is wider than the page."""
    font, room = _font(letter), width * (1 - 2 * MARGIN)
    lines: list[str] = []
    for word in words:
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= room:
            lines[-1] = longer
        elif font.getlength(word) <= room:
            lines.append(word)
        else:
            return None
    return tuple(lines)
