import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwenvl_dist.errors import UserError
from qwenvl_dist.synthetic.scenes import (
    COLOURS,
    MIXED_STYLES,
    OBJECTS,
    PlacedShape,
    captions,
    draw_scene,
    held_out,
    scene,
    write_scenes,
)


def nearest_colour(pixel: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: float(np.abs(pixel.astype(float) - COLOURS[name]).sum()))


def filled_share(image: np.ndarray, item: PlacedShape) -> float:
    """Share of a shape's bounding box that has its colour, which tells square, circle and triangle apart."""
    near = np.abs(image.astype(float) - COLOURS[item.colour]).sum(axis=-1) < 60
    y = int(item.centre[1])
    reach = int(1.25 * item.radius) + 1
    near[: max(0, y - reach)] = False
    near[y + reach + 1 :] = False
    rows, columns = np.nonzero(near)
    area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
    return float(near.sum()) / float(area)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_arguments_give_the_same_bytes_and_another_seed_other_pictures(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_scenes(tmp_path / name, 5, seed=seed)
    a, b, c = (files_of(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert all(a[name] != c[name] for name in a if name.endswith(".jpg"))


def test_more_pictures_begin_with_the_same_ones(tmp_path: Path) -> None:
    write_scenes(tmp_path / "few", 3)
    write_scenes(tmp_path / "many", 9)
    for number in (1, 2, 3):
        name = f"train/images/{number:012d}.jpg"
        assert (tmp_path / "few" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


@pytest.mark.parametrize("size", [56, 84])
def test_captions_describe_the_pixels(size: int) -> None:
    fillings: dict[str, list[float]] = {}
    for number in range(200):
        drawn = scene(number, seed=3, size=size)
        image = np.asarray(draw_scene(drawn))
        assert image.shape == (size, size, 3)
        for item in (drawn.upper, drawn.lower):
            x, y = (int(value) for value in item.centre)
            assert nearest_colour(image[y, x]) == item.colour
            if drawn.upper.colour != drawn.lower.colour:
                fillings.setdefault(item.shape, []).append(filled_share(image, item))
        assert drawn.upper.centre[1] < size / 2 < drawn.lower.centre[1]
        upper, lower = captions(drawn, "plain")[0].removeprefix("a ").split(" above a ")
        assert (upper, lower) == (drawn.upper.name, drawn.lower.name)
    mean = {shape: float(np.mean(values)) for shape, values in fillings.items()}
    assert mean["square"] > 0.9 > mean["circle"] > 0.68 > mean["triangle"]


def test_written_files_are_coco_captions_of_real_jpegs(tmp_path: Path) -> None:
    files = write_scenes(tmp_path / "out", 12, style="plain5", validation_count=4)
    ids: list[int] = []
    for split, count in (("train", 12), ("validation", 4)):
        content = json.loads(files[split].read_text())
        assert len(content["images"]) == count
        ids += [image["id"] for image in content["images"]]
        by_image: dict[int, list[str]] = {}
        for annotation in content["annotations"]:
            by_image.setdefault(annotation["image_id"], []).append(annotation["caption"])
        for number, image in enumerate(content["images"]):
            with Image.open(files[split].parent / "images" / image["file_name"]) as picture:
                assert picture.format == "JPEG"
                assert picture.size == (image["width"], image["height"]) == (56, 56)
            assert by_image[image["id"]] == captions(scene(number, 0, split), "plain5")
    assert len(set(ids)) == 16
    assert not list(tmp_path.glob("*.partial"))


def test_splits_share_no_pair_and_training_shows_every_object_in_both_places() -> None:
    pairs = {
        split: {(drawn.upper.name, drawn.lower.name) for drawn in (scene(n, 0, split) for n in range(3000))}
        for split in ("train", "validation")
    }
    assert not pairs["train"] & pairs["validation"]
    assert len(pairs["validation"]) == sum(
        held_out(a, b) for a in range(len(OBJECTS)) for b in range(len(OBJECTS))
    )
    names = {f"{colour} {shape}" for colour, shape in OBJECTS}
    assert {upper for upper, _ in pairs["train"]} == {lower for _, lower in pairs["train"]} == names


def test_base_style_never_says_a_caption_of_the_adapter_style() -> None:
    for number in range(50):
        drawn = scene(number, 0)
        assert set(captions(drawn, "plain5")).isdisjoint(captions(drawn, "inventory"))
        assert set(captions(drawn, "plain")) < set(captions(drawn, "plain5"))


def test_mixed_style_gives_one_caption_and_uses_every_wording() -> None:
    drawn = [scene(number, 0) for number in range(100)]
    given = [captions(one, "inventory") for one in drawn]
    assert all(len(texts) == 1 for texts in given)
    used = {
        texts[0].replace(one.upper.name, "{a}").replace(one.lower.name, "{b}")
        for one, texts in zip(drawn, given, strict=True)
        if one.upper.name != one.lower.name
    }
    assert used == set(MIXED_STYLES["inventory"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"count": 0}, "count is 0"),
        ({"count": 1, "size": 10}, "size is 10"),
        ({"count": 1, "style": "poem"}, "style is 'poem'"),
        ({"count": 1, "validation_count": -1}, "validation count is -1"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_written(
    tmp_path: Path, arguments: dict, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        write_scenes(tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_full_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        write_scenes(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
