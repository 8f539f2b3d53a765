"""Pages of text: what is drawn is what the caption says, and fits."""

import json
from pathlib import Path

import numpy as np
import pytest

from qwenvl_dist.__main__ import main
from qwenvl_dist.errors import UserError
from qwenvl_dist.synthetic.pages import PAPER, draw_page, page, write_pages


def test_all_words_stand_on_the_page_and_none_is_cut() -> None:
    for number in range(8):
        drawn = page(number, seed=1, words=5 + 12 * number, width=280, height=196)
        assert len(drawn.text.split()) == 5 + 12 * number
        ink = np.abs(np.asarray(draw_page(drawn)).astype(int) - PAPER).max(-1) > 40
        rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
        assert ink.shape == (196, 280)
        assert rows[0] > 5 and rows[-1] < 194 and columns[0] > 5 and columns[-1] < 275
        gaps = np.diff(rows) > 1
        assert int(gaps.sum()) >= len(drawn.lines) - 1, "lines do not touch"


def test_more_words_make_smaller_letters() -> None:
    letters = [page(0, seed=1, words=words).letter for words in (5, 20, 80)]
    assert letters == sorted(letters, reverse=True) and len(set(letters)) == 3
    with pytest.raises(UserError, match="2000 words do not fit on 280x280 pixels"):
        page(0, seed=1, words=2000)


def test_the_same_arguments_give_the_same_bytes_and_other_seeds_other_pages(tmp_path: Path) -> None:
    first, again, other = (write_pages(tmp_path / str(n), 3, seed) for n, seed in enumerate((7, 7, 8)))
    for split in ("train", "validation"):
        assert first[split].read_bytes() == again[split].read_bytes() != other[split].read_bytes()
        for path in (first[split].parent / "images").iterdir():
            assert path.read_bytes() == (again[split].parent / "images" / path.name).read_bytes()
    texts = [a["caption"] for split in first.values() for a in json.loads(split.read_text())["annotations"]]
    assert len(texts) == len(set(texts)) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "0"], "count is 0 and words 40"),
        (["--count", "1", "--width", "20"], "20x280 pixels cannot be read"),
        (["--count", "1", "--validation-count", "-1"], "validation count is -1"),
        (["--count", "1", "--words", "2000"], "2000 words do not fit"),  # while pages are written
    ],
)
def test_mistakes_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["synthetic", "pages", "--out", str(tmp_path / "pages"), *words])
    assert left.value.code == 2 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
