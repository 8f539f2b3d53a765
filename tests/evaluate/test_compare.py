import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from qwenvl_dist.data.pictures import THUMBNAIL_SIDE, picture_uri
from qwenvl_dist.evaluate.compare import (
    Comparison,
    comparison_page,
    comparison_table,
    exact_match,
)


def printed(rows: list[Comparison], title: str = "") -> str:
    buffer = io.StringIO()
    Console(file=buffer, width=120).print(comparison_table(rows, title))
    return buffer.getvalue()


def test_exact_match_is_the_share_of_equal_captions_white_space_aside() -> None:
    assert exact_match(["a cat", "a  dog\n", "A cat"], ["a cat", "a dog", "a cat"]) == pytest.approx(2 / 3)
    assert exact_match([], []) == 0
    with pytest.raises(ValueError, match="shorter"):
        exact_match(["a cat"], [])


def test_table_has_a_column_for_each_thing_that_is_known() -> None:
    full = printed([Comparison("1.jpg", "a cat", "a dog", "a cat")], "title")
    assert all(
        word in full for word in ("title", "picture", "reference", "before", "after", "1.jpg", "a dog")
    )
    alone = printed([Comparison("1.jpg", "a cat")])
    assert "caption" in alone and not any(word in alone for word in ("reference", "before", "after"))


def test_table_shows_captions_as_they_are_and_hides_control_characters() -> None:
    text = printed([Comparison("1.jpg", "[red]a [/] cat\x1b[2J\x07")], "[bold]title")
    assert "[red]a [/] cat\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}" in text
    assert "[bold]title" in text and "\x1b" not in text


def test_page_holds_pictures_and_captions_and_needs_nothing_else(pictures: list[Path]) -> None:
    rows = [
        Comparison("one", "a cat", "R Images(25,13)", "a  cat"),
        Comparison("two", "<script>alert(1)</script>", None, None),
    ]
    data = [path.read_bytes() for path in pictures[:2]]
    page = comparison_page(rows, data, "Before & after", [("loss", "3.1 → 0.2")])
    assert page.count('src="data:image/jpeg;base64,') == 2
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    assert "Before &amp; after" in page and "3.1 → 0.2" in page and "&lt;script&gt;" in page
    assert page.count("✓") == 1 and "R Images(25,13)" in page


def test_page_shrinks_pictures_but_keeps_their_shape() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (2000, 1000), "red").save(buffer, "JPEG")
    encoded = picture_uri(buffer.getvalue()).partition(",")[2]
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        assert image.size == (THUMBNAIL_SIDE, THUMBNAIL_SIDE // 2)
