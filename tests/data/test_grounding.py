"""COCO instances as conversations about boxes, generated ones and those of real photos."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from qwenvl_dist.__main__ import main
from qwenvl_dist.data.boxes import GRID, parse_objects
from qwenvl_dist.data.formats import Sample, parse_sample_json
from qwenvl_dist.data.grounding import GroundingReader, read_coco_instances
from qwenvl_dist.data.images import decode
from qwenvl_dist.data.index import Manifest
from qwenvl_dist.errors import UserError

Content = dict[str, list[dict[str, Any]]]


@pytest.fixture
def content(tmp_path: Path) -> Content:
    """Two pictures of 200x100, boxes of two names."""
    (tmp_path / "images").mkdir()
    for number in (1, 2):
        Image.new("RGB", (200, 100), (number * 50, 90, 90)).save(tmp_path / "images" / f"{number}.jpg")
    return {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 200, "height": 100} for n in (2, 1)],
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "red  car"}],
        "annotations": [
            {"image_id": 1, "category_id": 18, "bbox": [100, 50, 50, 20], "iscrowd": 0},
            {"image_id": 1, "category_id": 3, "bbox": [0, 0, 20, 10], "iscrowd": 0},
            {"image_id": 1, "category_id": 18, "bbox": [10, 10, 50, 20], "iscrowd": 0},
            {"image_id": 2, "category_id": 3, "bbox": [0, 0, 200, 100], "iscrowd": 0},
        ],
    }


def read(folder: Path, content: Content, task: str = "both", **options: Any) -> GroundingReader:
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    reader = read_coco_instances(path, folder / "images", task, **options)
    assert len(reader) == len(list(reader)), "samples are counted before there is one"
    return reader


def texts(sample: Sample) -> tuple[str, str]:
    user, assistant = sample.messages
    assert user["content"][0] == {"type": "image"}
    return user["content"][1]["text"], assistant["content"][0]["text"]


def test_both_tasks(content: Content, tmp_path: Path) -> None:
    samples = list(read(tmp_path, content))
    dogs = (
        "<|object_ref_start|>dog<|object_ref_end|><|box_start|>(50,100),(300,300)<|box_end|>"
        "<|box_start|>(500,500),(750,700)<|box_end|>"
    )
    car = "<|object_ref_start|>red car<|object_ref_end|><|box_start|>(0,0),(100,100)<|box_end|>"
    whole = "<|object_ref_start|>red car<|object_ref_end|><|box_start|>(0,0),(999,999)<|box_end|>"
    find_car = "Find <|object_ref_start|>red car<|object_ref_end|>."
    assert {sample.key: texts(sample) for sample in samples} == {
        "1-all": ("Find all objects.", dogs + car),
        "1-c18": ("Find <|object_ref_start|>dog<|object_ref_end|>.", dogs),
        "1-c3": (find_car, car),
        "2-all": ("Find all objects.", whole),
        "2-c3": (find_car, whole),
    }
    assert {sample.image_id for sample in samples} == {1, 2}
    keys = [sample.key for sample in read(tmp_path, content, "name_to_boxes")]
    assert keys == ["1-c18", "1-c3", "2-c3"]
    assert [sample.key for sample in read(tmp_path, content, "all_objects")] == ["1-all", "2-all"]


def test_the_files_order_does_not_matter(content: Content, tmp_path: Path) -> None:
    expected = [(sample.key, texts(sample)) for sample in read(tmp_path, content)]
    for part in content.values():
        part.reverse()
    assert [(sample.key, texts(sample)) for sample in read(tmp_path, content)] == expected


def test_what_becomes_no_box_is_counted(content: Content, tmp_path: Path) -> None:
    content["images"].append({"id": 3, "file_name": "3.jpg", "width": 200, "height": 100})
    content["annotations"] += [
        {"image_id": 1, "category_id": 18, "bbox": [0, 0, 200, 100], "iscrowd": 1},
        {"image_id": 1, "category_id": 3, "bbox": [5, 5, 0, 5], "iscrowd": 0},
        {"image_id": 1, "category_id": 3, "bbox": [9, 9, -4, 5], "iscrowd": 0},
        {"image_id": 1, "category_id": 3, "bbox": [300, 5, 10, 5], "iscrowd": 0},
        {"image_id": 2, "category_id": 18, "bbox": [150, 50, 100, 100], "iscrowd": 0},
    ]
    found = read(tmp_path, content)
    assert found.left_out == {
        "crowd annotations": 1,
        "questions about crowds": 1,
        "boxes of no size or outside": 3,
        "pictures without annotations": 1,
    }
    by_key = {sample.key: texts(sample)[1] for sample in found}
    assert "1-c18" not in by_key, "the answer would lack the crowd's dogs"
    assert by_key["2-c18"].endswith("(750,500),(999,999)<|box_end|>"), "cut to the picture"
    assert [each.name for each in parse_objects(by_key["1-all"]).objects] == ["dog", "dog", "red car"]


def test_crowds_travel_with_the_question_about_all_objects(content: Content, tmp_path: Path) -> None:
    before = {sample.key: sample.to_json() for sample in read(tmp_path, content)}
    content["annotations"] += [
        {"image_id": 1, "category_id": 3, "bbox": [100, 50, 200, 20], "iscrowd": 1},
        {"image_id": 1, "category_id": 18, "bbox": [0, 0, 20, 100], "iscrowd": 1},
        {"image_id": 1, "category_id": 18, "bbox": [9, 9, 0, 5], "iscrowd": 1},
    ]
    found = {sample.key: sample.to_json() for sample in read(tmp_path, content)}
    record = json.loads(before["1-all"])
    record["crowds"] = [
        {"name": "dog", "box": [0, 0, 100, 999]},
        {"name": "red car", "box": [500, 500, 999, 700]},  # cut to the picture
    ]
    assert json.loads(found.pop("1-all")) == record
    assert found == {key: before[key] for key in ("2-all", "2-c3")}
    only = [each for each in content["annotations"] if each["image_id"] == 2 or each["iscrowd"]]
    nothing_else = read(tmp_path, {**content, "annotations": only})
    assert [sample.key for sample in nothing_else] == ["2-all", "2-c3"]
    assert nothing_else.left_out == {"crowd annotations": 3, "pictures without a box": 1}


@pytest.mark.parametrize(
    "crowds",
    [3, [3], [{"name": "dog"}], [{"name": "dog", "box": [1, 2, 3]}], [{"name": 7, "box": [1, 2, 3, 4]}],
     [{"name": "dog", "box": [5, 2, 3, 4]}], [{"name": "dog", "box": [1, 2, 3, 1000]}],
     [{"name": "dog", "box": [1, 2, 3, 4.0]}]],
)  # fmt: skip
def test_crowds_of_another_form_are_a_fault(content: Content, tmp_path: Path, crowds: Any) -> None:
    record = json.loads(next(iter(read(tmp_path, content))).to_json())
    parse_sample_json(json.dumps({**record, "crowds": [{"name": "dog", "box": [1, 2, 3, 4]}]}).encode(), 1)
    with pytest.raises(ValueError, match="crowds"):
        parse_sample_json(json.dumps({**record, "crowds": crowds}).encode(), 1)


@pytest.mark.parametrize(
    (
        "annotated",
        "orientation",
    ),  # what is not turned by a quarter has one size: its boxes are the upright picture's
    [*(("upright", n) for n in range(1, 9)), *(("stored", n) for n in range(5, 9))],
)
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_boxes_turn_as_the_picture_does(tmp_path: Path, orientation: int, annotated: str, kind: str) -> None:
    """A red block on white; the box must enclose it in what `decode` gives to the model."""
    stored = Image.new("RGB", (200, 100), "white")
    block = (20, 10, 68, 42)
    stored.paste((255, 0, 0), block)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / f"1.{kind}"
    stored.save(path, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        assert upright is not None
        red = np.argwhere((np.asarray(upright.convert("RGB"))[..., 1]) < 128)
    (top, left), (bottom, right) = red.min(0), red.max(0) + 1
    x1, y1, x2, y2 = block if annotated == "stored" else (left, top, right, bottom)
    width, height = stored.size if annotated == "stored" else upright.size
    content: Content = {
        "images": [{"id": 1, "file_name": path.name, "width": width, "height": height}],
        "categories": [{"id": 1, "name": "block"}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "bbox": [int(x1), int(y1), int(x2 - x1), int(y2 - y1)]}
        ],
    }
    (sample,) = read(tmp_path, content, "all_objects")
    (found,) = parse_objects(texts(sample)[1]).objects
    pixels = decode(path.read_bytes())
    height, width = pixels.shape[:2]
    x1, x2 = (round(x * width / GRID) for x in (found.box.x1, found.box.x2))
    y1, y2 = (round(y * height / GRID) for y in (found.box.y1, found.box.y2))
    reddish = pixels[..., 1] < 128
    assert reddish[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1].all()
    outside = reddish.copy()
    outside[max(0, y1 - 1) : y2 + 1, max(0, x1 - 1) : x2 + 1] = False
    assert not outside.any()


def test_a_smaller_copy_of_a_picture_keeps_its_boxes_and_another_shape_is_refused(
    content: Content, tmp_path: Path
) -> None:
    expected = [texts(sample) for sample in read(tmp_path, content)]
    Image.new("RGB", (100, 50)).save(tmp_path / "images" / "1.jpg")
    assert [texts(sample) for sample in read(tmp_path, content)] == expected
    for image in content["images"]:
        del image["width"]  # then the picture's own size counts
    content["annotations"] = content["annotations"][3:]
    assert texts(next(iter(read(tmp_path, content)))) == expected[3]
    content["images"][0].update(width=100, height=100)
    with pytest.raises(
        UserError, match=r"2\.jpg: is 200x100 pixels, .* says 100x100: boxes have no place in it"
    ):
        read(tmp_path, content)
    content["annotations"].append({"image_id": 1, "category_id": 3, "bbox": [0, 0, 20, 10]})
    assert read(tmp_path, content, allow_missing=True).left_out["pictures of another shape"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("categories"), "'categories' is not a list"),
        (
            lambda c: c["annotations"][0].update(category_id=7),
            "annotations[0] has category_id 7, which 'categories'",
        ),
        (lambda c: c["annotations"][1].update(image_id=9), "annotations[1] has image_id 9, which 'images'"),
        (
            lambda c: c["annotations"][2].update(bbox=[1, 2, 3]),
            "annotations[2] has bbox [1, 2, 3]: it must be [x, y,",
        ),
        (lambda c: c["annotations"][2].update(bbox=[1, 2, "3", 4]), "annotations[2] has bbox"),
        (
            lambda c: c["categories"][0].update(name="<|box_end|>"),
            "categories[0]: the name '<|box_end|>' is empty",
        ),
        (lambda c: c["images"][0].update(width=-1), "images[0] has a width or height of -1"),
        (lambda c: c["images"][0].update(file_name="../2.jpg"), "must lie below --images"),
        (lambda c: c["images"][0].update(file_name="3.jpg"), "is '3.jpg', which is not in"),
        (lambda c: c["images"][0].update(id=1), "images[1] has id 1 for the second time"),
        (lambda c: c["images"][0].update(id=10**30), "ids must fit into 64 bits; renumber"),
        (lambda c: c["images"][0].pop("id"), "images[0] is {"),
        (
            lambda c: c["categories"][0].update(id=10**18),
            "categories[0] has id 1000000000000000000: it becomes",
        ),
        (lambda c: c["categories"].append(3), "categories[2] is 3: it needs an integer 'id' and a 'name'"),
        (lambda c: c["categories"][0].update(name="\ud800"), "categories[0] holds half a character"),
        (lambda c: c["annotations"].insert(1, 7), "annotations[1] is 7: it must be an object"),
        (
            lambda c: c["annotations"][2].update(bbox=[1, 2, 3, 10**400]),
            "annotations[2] has bbox [1, 2, 3, 1000",
        ),
        (lambda c: c["annotations"][2].update(bbox=[1, 2, 3, float("nan")]), "line 1: not JSON"),
        (lambda c: c.update(images=[]), "'images' is empty"),
        (lambda c: c.update(annotations={"a": 1}), "'annotations' is not a list"),
        (lambda c: c.update(annotations=[]), "gives no sample"),
    ],
)
def test_a_fault_is_named_with_its_place(content: Content, tmp_path: Path, change: Any, message: str) -> None:
    change(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path, content)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def run_pack(folder: Path, *words: str) -> Path:
    out = folder / "shards"
    base = ["shards", "pack", "--source", "grounding", "--images", str(folder / "images"), "--out", str(out)]
    assert main([*base, *words]) == 0
    return out


def test_the_command_packs_and_says_what_was_left_out(content: Content, tmp_path: Path) -> None:
    content["annotations"][0]["iscrowd"] = 1
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    prompt = "Where is {name}?"
    out = run_pack(tmp_path, "--instances", str(path), "--task", "name_to_boxes", "--prompt", prompt)
    manifest = Manifest.load(out)
    assert manifest.samples == 2
    assert manifest.packing["left_out"] == {"crowd annotations": 1, "questions about crowds": 1}
    assert (manifest.packing["task"], manifest.packing["find_prompt"]) == ("name_to_boxes", prompt)
    assert main(["shards", "verify", str(out)]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source", "grounding"], "--instances is missing"),
        (["--source", "grounding", "--instances", "x", "--captions", "y"], "--captions does not go with"),
        (["--source", "grounding", "--instances", "x", "--join", "|"], "--join does not go with"),
        (
            ["--source", "grounding", "--instances", "x", "--keep-white-space"],
            "--keep-white-space does not go",
        ),
        (["--source", "grounding", "--instances", "x", "--split", "train"], "--split does not go with"),
        (["--source", "grounding", "--instances", "x", "--prompt", "Find"], "two tasks have two prompts"),
        (
            ["--source", "grounding", "--instances", "x", "--prompt", "Find", "--task", "name_to_boxes"],
            "lacks {name}",
        ),
        (["--source", "coco", "--captions", "x", "--task", "both"], "--task goes with --source grounding"),
        (["--source", "coco"], "--captions is missing"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(SystemExit) as left:
        main(["shards", "pack", *words, "--images", str(tmp_path / "images"), "--out", str(tmp_path / "out")])
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_a_picture_of_no_known_size_is_named_or_left_out(content: Content, tmp_path: Path) -> None:
    (tmp_path / "images" / "1.jpg").write_bytes(b"no picture")
    del content["images"][1]["width"]
    with pytest.raises(UserError, match=r"1\.jpg: its size cannot be read, and .* has no width and height"):
        read(tmp_path, content)
    found = read(tmp_path, content, allow_missing=True)
    assert [sample.key for sample in found] == ["2-all", "2-c3"]
    assert found.left_out == {"pictures of no known size": 1}


def test_keys_are_ids_where_file_names_cannot_be(content: Content, tmp_path: Path) -> None:
    for number, image in enumerate(content["images"]):
        long = f"{'x' * 60}{number}.jpg"
        (tmp_path / "images" / image["file_name"]).rename(tmp_path / "images" / long)
        image["file_name"] = long
    assert [sample.key for sample in read(tmp_path, content, "all_objects")] == [
        "000000000001-all",
        "000000000002-all",
    ]
    content["images"][0]["id"] = "a/b"
    content["annotations"][3]["image_id"] = "a/b"
    with pytest.raises(UserError, match=r"the image id 'a/b' cannot be a key: .* at most 60; rename it"):
        read(tmp_path, content)


def test_segmentations_change_nothing(content: Content, tmp_path: Path) -> None:
    expected = [sample.to_json() for sample in read(tmp_path, content)]
    outlines = [[[1, 2.5, 3]], {"counts": [3, 4], "size": [100, 200]}, "x\ud83d\ude00\ud800", 7]
    for annotation, outline in zip(content["annotations"], outlines, strict=True):
        annotation["segmentation"] = outline
    assert [sample.to_json() for sample in read(tmp_path, content)] == expected


def test_the_real_photos(real_coco: Path) -> None:
    """Every box of the annotations is there, within half a step of its place."""
    found = read_coco_instances(real_coco / "instances.json", real_coco / "images")
    content = json.loads((real_coco / "instances.json").read_text())
    assert found.left_out == {"crowd annotations": 9, "questions about crowds": 9}
    names = {category["id"]: category["name"] for category in content["categories"]}
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    annotated = [each for each in content["annotations"] if not each["iscrowd"]]
    wanted = Counter((each["image_id"], names[each["category_id"]]) for each in annotated)
    all_objects = [sample for sample in found if sample.key.endswith("-all")]
    parsed = {sample.image_id: parse_objects(texts(sample)[1]) for sample in all_objects}
    assert not any(each.malformed for each in parsed.values())
    assert Counter((i, each.name) for i, one in parsed.items() for each in one.objects) == wanted
    assert sum(wanted.values()) == 1700
    for each in annotated:
        width, height = sizes[each["image_id"]]
        x, y, w, h = each["bbox"]
        shares = [x / width, y / height, (x + w) / width, (y + h) / height]
        of_name = [o.box for o in parsed[each["image_id"]].objects if o.name == names[each["category_id"]]]
        distances = [
            max(abs(share * GRID - at) for share, at in zip(shares, (b.x1, b.y1, b.x2, b.y2), strict=True))
            for b in of_name
        ]
        assert min(distances) <= 1.01  # half a step, a whole one at the far edge
