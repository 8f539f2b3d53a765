"""Boxes in Qwen2-VL's words: written, read back, and read out of whatever a model says."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenvl_dist.data.boxes import (
    GRID,
    MARKS,
    Box,
    NamedBox,
    asked_name,
    on_grid,
    parse_objects,
    write_name,
    write_objects,
)

DOG = "<|object_ref_start|>dog<|object_ref_end|>"
ONE = "<|box_start|>(10,20),(30,40)<|box_end|>"


def test_the_form_is_that_of_the_model() -> None:
    """The paper's example, arXiv:2409.12191, with a second box and another object."""
    eyes = "the eyes on a giraffe"
    objects = [
        NamedBox(eyes, Box(176, 106, 232, 160)),
        NamedBox(eyes, Box(300, 106, 340, 150)),
        NamedBox("a tree", Box(0, 0, 999, 500)),
    ]
    assert write_objects(objects) == (
        "<|object_ref_start|>the eyes on a giraffe<|object_ref_end|><|box_start|>(176,106),(232,160)<|box_end|>"
        "<|box_start|>(300,106),(340,150)<|box_end|>"
        "<|object_ref_start|>a tree<|object_ref_end|><|box_start|>(0,0),(999,500)<|box_end|>"
    )


def test_the_marks_are_special_tokens_of_the_tokenizer(real_processor: Any) -> None:
    tokenizer = real_processor.tokenizer
    assert tokenizer.convert_tokens_to_ids(list(MARKS)) == [151646, 151647, 151648, 151649]
    assert set(MARKS) <= set(tokenizer.all_special_tokens)
    text = DOG + ONE
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert [ids.count(151646 + n) for n in range(4)] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("pixels", "size", "box"),
    [
        ((0, 0, 640, 480), (640, 480), (0, 0, 999, 999)),
        ((64, 48, 320, 240), (640, 480), (100, 100, 500, 500)),
        ((-10, 470, 20, 999), (640, 480), (0, 979, 31, 999)),  # cut to the picture
        ((100, 100, 100.1, 200), (640, 480), (156, 208, 157, 417)),  # thinner than a step
        ((639.9, 0, 640, 480), (640, 480), (998, 0, 999, 999)),  # thinner than a step, at the edge
        ((5, 5, 5, 9), (640, 480), None),
        ((9, 5, 5, 9), (640, 480), None),
        ((650, 5, 660, 9), (640, 480), None),
        ((float("nan"), 0, 5, 5), (640, 480), None),
    ],
)
def test_from_pixels_to_the_grid(pixels: tuple, size: tuple, box: tuple | None) -> None:
    assert on_grid(*pixels, *size) == (None if box is None else Box(*box))


coordinates = st.integers(0, GRID - 2)
boxes = st.builds(
    lambda x1, y1, w, h: Box(x1, y1, min(GRID - 1, x1 + w), min(GRID - 1, y1 + h)),
    coordinates,
    coordinates,
    st.integers(1, GRID),
    st.integers(1, GRID),
)
names = st.text(st.characters(exclude_categories=["Cs", "Z", "C"]), min_size=1).filter(
    lambda s: "<|" not in s
)


@given(st.lists(st.builds(NamedBox, names, boxes)))
def test_what_is_written_is_read_back(objects: list[NamedBox]) -> None:
    parsed = parse_objects(write_objects(objects))
    assert parsed.objects == objects and parsed.malformed == 0


@given(
    st.lists(st.sampled_from([*MARKS, "dog", "(1,2),(3,4)", "(1,2)", ",", " ", "(9,9),(3,4)"])).map("".join)
)
def test_no_answer_is_too_strange(text: str) -> None:
    parsed = parse_objects(text)
    assert len(parsed.objects) + parsed.malformed <= text.count("<|box_start|>") + text.count(
        "<|object_ref_start|>"
    )
    assert all(0 <= each.box.x1 < each.box.x2 < GRID and each.name for each in parsed.objects)


@pytest.mark.parametrize(
    ("text", "num_objects", "malformed"),
    [
        (DOG + ONE, 1, 0),
        (f"Here is a {DOG} : {ONE} .", 1, 0),
        (DOG + "<|box_start|> ( 10, 20 ) , (30 ,40) <|box_end|>", 1, 0),
        (DOG + "<|box_start|>(10,20)(30,40)<|box_end|>", 1, 0),
        (DOG + "<|box_start|>(10,20),(30,1000)<|box_end|>", 1, 0),
        (DOG + ONE + "<|box_start|>(10,20),(30,50)", 2, 0),  # the last mark was cut off
        (DOG + ONE + "<|box_start|>(10,20),(3", 1, 1),  # the second box was cut off
        (DOG + ONE + "<|object_ref_start|>ca", 1, 1),
        (DOG + ONE + "<|object_ref_start|>cat<|object_ref_end|>", 1, 1),  # a name without a box
        (ONE, 0, 1),  # a box without a name
        (DOG + "<|box_start|>(30,40),(10,20)<|box_end|>", 0, 1),
        (DOG + "<|box_start|>(10,20),(10,40)<|box_end|>", 0, 1),
        (DOG + "<|box_start|>(10,20),(1001,40)<|box_end|>", 0, 1),
        (DOG + "<|box_start|>(10,20),(30,40),(50,60)<|box_end|>", 0, 1),
        (DOG + "<|box_start|>(10.5,20),(30,40)<|box_end|>", 0, 1),
        (DOG + "<|box_start|>the left<|box_end|>", 0, 1),
        ("A dog at (10,20),(30,40).", 0, 0),
        ("", 0, 0),
    ],
)
def test_malformed_answers_are_read_as_far_as_they_go(text: str, num_objects: int, malformed: int) -> None:
    parsed = parse_objects(text)
    assert (len(parsed.objects), parsed.malformed) == (num_objects, malformed)


def test_a_box_without_a_name_has_the_one_that_was_asked_for() -> None:
    asked = asked_name(f"Find {write_name('red  car')}.")
    assert asked == "red car"
    assert parse_objects(ONE, asked).objects == [NamedBox("red car", Box(10, 20, 30, 40))]
    assert parse_objects("", asked).malformed == 0
    assert asked_name("Find all objects.") is None
    assert asked_name(write_name("a") + write_name("b")) is None


def test_iou() -> None:
    assert Box(0, 0, 10, 10).iou(Box(0, 0, 10, 10)) == 1
    assert Box(0, 0, 10, 10).iou(Box(5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert Box(0, 0, 10, 10).iou(Box(10, 0, 20, 10)) == 0
