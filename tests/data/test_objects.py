"""Boxes and names beside a text, as ms-swift has them, come into it as COCO's do, or are refused in one line."""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_coco import jpeg, make_coco
from PIL import Image

from qwenvl_dist.__main__ import main
from qwenvl_dist.data.boxes import Box, asked_name, on_grid, parse_objects, write_name
from qwenvl_dist.data.drawing import draw_objects
from qwenvl_dist.data.formats import READERS, PackInput, Sample, SampleReader, parse_sample_json
from qwenvl_dist.data.grounding import read_coco_instances
from qwenvl_dist.data.images import decode
from qwenvl_dist.data.index import Manifest
from qwenvl_dist.data.plan import Place
from qwenvl_dist.data.source import ShardSet
from qwenvl_dist.errors import UserError
from qwenvl_dist.scores.boxes import judge
from tests.http_server import FileServer

Record = dict[str, Any]
WIDTH, HEIGHT = 200, 100
NAMES = re.compile(r"<\|object_ref_start\|>(.*?)<\|object_ref_end\|>")
BOXES = re.compile(r"<\|box_start\|>.*?<\|box_end\|>")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures a.jpg, of 200x100 pixels, and b.jpg, of 50x400."""
    for name, size in {"a": (WIDTH, HEIGHT), "b": (50, 400)}.items():
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(1, *size))
    return tmp_path


def write(folder: Path, *records: Any) -> Path:
    path = folder / "in.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def reader(path: Path | str, source: str = "messages", **options: Any) -> SampleReader:
    return READERS[source](PackInput(path, **options))


def texts(sample: Sample) -> list[str]:
    return [part["text"] for m in sample.messages for part in m["content"] if part["type"] == "text"]


def box(*corners: int) -> str:
    x1, y1, x2, y2 = corners
    return f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"


def asking(*boxes: Any, answer: str = "", images: Any = ("a.jpg",), **more: Any) -> Record:
    """A record that asks for the dog in its first picture."""
    answer = answer or "<bbox>" * len(boxes)
    record: Record = {"query": "Find the <ref-object>.", "response": answer, "images": list(images)}
    return {**record, "objects": {"ref": ["dog"], "bbox": [*boxes], **more}}


DOG, IN_A = [20, 10, 120, 30.04], box(100, 100, 600, 300)
NAMED = f"Find the {write_name('dog')}."


def swift_records(instances: Path, images: Path, bbox_type: str) -> tuple[list[Record], list[Sample]]:
    """Return what ms-swift would have in place of the samples of a COCO instances file, and these."""
    content = json.loads(instances.read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    corners: dict[tuple[int, str, Box], list[float]] = {}
    for each in content["annotations"]:
        x, y, w, h = each["bbox"]
        width, height = sizes[each["image_id"]]
        found = on_grid(x, y, x + w, y + h, width, height)
        assert found is not None
        given = [x, y, x + w, y + h]
        if bbox_type == "norm1":
            given = [x / width, y / height, (x + w) / width, (y + h) / height]
        corners[each["image_id"], names[each["category_id"]], found] = given
    records, samples = [], list(read_coco_instances(instances, images))
    for sample in samples:
        asked, answered = texts(sample)
        marked = [BOXES.sub("<bbox>", NAMES.sub("<ref-object>", text)) for text in (asked, answered)]
        assert isinstance(sample.image_id, int)
        boxes = [corners[sample.image_id, o.name, o.box] for o in parse_objects(answered).objects]
        refs = NAMES.findall(asked + answered)
        said = [{"role": "user", "content": marked[0]}, {"role": "assistant", "content": marked[1]}]
        given = {"ref": refs, "bbox": boxes, **({"bbox_type": "norm1"} if bbox_type == "norm1" else {})}
        name = Path(str(sample.images[0])).name
        records.append({"id": sample.key, "messages": said, "images": [name], "objects": given})
    return records, samples


@pytest.mark.parametrize("bbox_type", ["real", "norm1"])
def test_the_real_photos_give_the_messages_that_coco_gives(
    real_coco: Path, tmp_path: Path, bbox_type: str
) -> None:
    images = real_coco / "images"
    records, samples = swift_records(real_coco / "instances.json", images, bbox_type)
    found = list(reader(write(tmp_path, *records), images=images))
    assert len(found) == len(samples) == 921
    for mine, theirs in zip(found, samples, strict=True):
        assert (mine.key, mine.messages, mine.images) == (theirs.key, theirs.messages, theirs.images)


def test_names_and_boxes_come_in_their_order_in_every_form_of_records(folder: Path) -> None:
    objects = {
        "ref": ["dog", "red  car", "dog"],
        "bbox": [[0, 0, 100, 50], [10, 10, 40, 390], DOG, [0, 0, 1000, 1000]],
        "image_id": [0, 1, 0, 1],
    }
    first, second = (
        "<image><image>Here: <ref-object><bbox>, <ref-object> <bbox>. Where",
        "is the <ref-object>?",
    )
    expected = [
        f"Here: {write_name('dog')}{box(0, 0, 500, 500)}, {write_name('red car')} {box(200, 25, 800, 975)}. Where",
        "In both?",
        f"is the {write_name('dog')}?",
        f"{IN_A} and {box(0, 0, 999, 999)}",
    ]
    said = [first, "In both?", second, "<bbox>  and <bbox>"]
    roles = ["user", "assistant"] * 2
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    parts = [{"type": "text", "text": second}]
    turns = [
        {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in messages
    ]
    marked = [dict(turn) for turn in turns]
    for name in ("a.jpg", "b.jpg"):
        mark = f"<|vision_start|>{name}<|vision_end|>"
        marked[0]["value"] = marked[0]["value"].replace("<image>", mark, 1)
    more: Record = {"images": ["a.jpg", "b.jpg"], "objects": objects}
    pairs = [{"human": said[n], "assistant": said[n + 1]} for n in (0, 2)]
    for source, record in (
        ("messages", {"messages": messages, **more}),
        ("messages", {"messages": [*messages[:2], {"role": "user", "content": parts}, messages[3]], **more}),
        ("messages", {"query": second, "response": said[3], "history": [said[:2]], **more}),
        ("messages", {"conversation": pairs, **more}),
        ("messages", {"conversations": turns, **more}),
        ("messages", {"messages": messages, **more, "objects": json.dumps(objects)}),
        ("llava", {"conversations": turns, **more}),
        ("conversations", {"conversations": marked, "objects": objects}),
    ):
        (sample,) = reader(write(folder, record), source)
        assert texts(sample) == expected, record
    system = {"system": "The <ref-object> is red.", "query": "Where?", "response": "<bbox>"}
    (sample,) = reader(write(folder, {**asking(DOG), **system}))
    assert texts(sample) == [f"The {write_name('dog')} is red.", "Where?", IN_A]


@pytest.mark.parametrize("form", ["struct", "text"])
def test_rows_of_a_table_are_filled_in(folder: Path, form: str) -> None:
    empty = {"ref": None, "bbox": None, "bbox_type": None, "image_id": None}
    given = [
        {**empty, "ref": ["dog"], "bbox": [DOG]},
        empty,
        {**empty, "ref": ["cat"], "bbox": [[0.1, 0.5, 0.2, 0.75]], "bbox_type": "norm1", "image_id": [0]},
    ]
    said = [("<ref-object>", "<bbox>"), ("Hello.", "Yes."), ("<ref-object>?", "<bbox>")]
    inside = {"bytes": (folder / "a.jpg").read_bytes(), "path": "a.jpg"}
    rows = [
        {
            "image": inside,
            "messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}],
            "query": user,
            "response": assistant,
            "objects": json.dumps(objects) if form == "text" else objects,
        }
        for (user, assistant), objects in zip(said, given, strict=True)
    ]
    expected = [
        [write_name("dog"), IN_A],
        ["Hello.", "Yes."],
        [f"{write_name('cat')}?", box(100, 500, 200, 750)],
    ]
    for columns in (("messages",), ("query", "response")):
        kept = [{name: row[name] for name in ("image", "objects", *columns)} for row in rows]
        path = folder / "t.parquet"
        pq.write_table(pa.Table.from_pylist(kept), path, row_group_size=2)
        assert [texts(sample) for sample in reader(path, "huggingface")] == expected
    rows[2]["objects"] = rows[1]["objects"]
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(UserError, match=r"row 2 has <ref-object> .*no 'objects'|row 2 has 1 <ref-object>"):
        list(reader(path, "huggingface"))


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_those_of_the_upright_picture(tmp_path: Path, orientation: int, kind: str) -> None:
    """A red block on white, annotated where `decode` shows it."""
    stored = Image.new("RGB", (WIDTH, HEIGHT), "white")
    stored.paste((255, 0, 0), (20, 10, 68, 42))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"1.{kind}"
    stored.save(path, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    pixels = decode(path.read_bytes())
    height, width = pixels.shape[:2]
    assert (width > height) == (orientation < 5)
    red = np.argwhere(pixels[..., 1] < 128)
    (top, left), (bottom, right) = red.min(0).tolist(), (red.max(0) + 1).tolist()
    expected = str(on_grid(left, top, right, bottom, width, height))
    shares = [left / width, top / height, right / width, bottom / height]
    for record in (
        asking([left, top, right, bottom], images=[path.name]),
        asking(shares, images=[path.name], bbox_type="norm1"),
    ):
        (sample,) = reader(write(tmp_path, record))
        assert texts(sample)[1] == f"<|box_start|>{expected}<|box_end|>"


def test_boxes_of_the_picture_before_exif_turns_it_are_refused_where_they_show(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "turned.jpg", exif=exif)
    (sample,) = reader(write(folder, asking([20, 10, 101, 170], images=["turned.jpg"])))
    assert texts(sample)[1] == box(200, 50, 999, 850), "a pixel too far is rounding"
    for given in ([20, 10, 160, 90], [101.5, 20]):
        path = write(folder, asking([1, 2, 3, 4], given, images=["turned.jpg"]))
        with pytest.raises(UserError) as error:
            list(reader(path))
        where = f"{path}: line 1 has in objects.bbox[1] {json.dumps(given)}, which reaches out of {folder}/turned.jpg"
        assert str(error.value).startswith(f"{where}, upright 100x200 pixels, and would fit before EXIF")
    (sample,) = reader(write(folder, asking([20, 10, 900, 900], images=["turned.jpg"])))
    assert texts(sample)[1] == box(200, 50, 999, 999), "it fits neither way"


def test_boxes_are_cut_to_the_picture_and_thin_ones_widened(folder: Path) -> None:
    given = [[-9, 10, 100, 5000], [199.999, 0, 200, 100], [0, 99.95, 200, 100]]
    expected = box(0, 100, 500, 999) + box(998, 0, 999, 999) + box(0, 998, 999, 999)
    (sample,) = reader(write(folder, asking(*given)))
    shares = [[x / WIDTH, y / HEIGHT, v / WIDTH, min(1.5, w / HEIGHT)] for x, y, v, w in given]
    (shared,) = reader(write(folder, asking(*shares, bbox_type="norm1")))
    assert texts(sample) == texts(shared) == [NAMED, expected]


def test_points_are_written_as_ms_swift_writes_them(folder: Path) -> None:
    points = [[20, 10], [0, 0], [200, 100], [0, 1]]
    expected = ["(100,100)", "(0,0)", "(999,999)", "(0,10)"]
    answer = "Action: click(start_box='<bbox>')"
    for point, text in zip(points, expected, strict=True):
        shares = [point[0] / WIDTH, point[1] / HEIGHT]
        for record in (
            asking(point, answer=answer),
            asking(shares, answer=answer, bbox_type="norm1"),
        ):
            (sample,) = reader(write(folder, record))
            assert texts(sample)[1] == answer.replace("<bbox>", f"<|box_start|>{text}<|box_end|>")


def test_what_another_program_keeps_in_objects_is_passed_over(folder: Path) -> None:
    for objects in ({"bbox": [[1, 2, 3, 4]], "category": [7]}, [{"label": "dog"}], "a dog", {}, None, []):
        record = {"query": "What?", "response": "A dog.", "images": ["a.jpg"], "objects": objects}
        (sample,) = reader(write(folder, record))
        assert texts(sample) == ["What?", "A dog."]
    caption = {"image": "a.jpg", "caption": "<ref-object> <bbox>", "objects": {"ref": ["dog"], "bbox": [DOG]}}
    (sample,) = reader(write(folder, caption))
    assert texts(sample)[1] == f"{write_name('dog')} {IN_A}"


BAD: list[tuple[Record, list[str]]] = [
    ({**asking(DOG), "objects": None}, ["<ref-object> in a text and no 'objects'", '{"ref": ["dog"]', "take it out"]),
    ({**asking(DOG), "objects": [{"bbox": DOG}]}, ["'objects' [{", "an object like"]),
    ({**asking(DOG), "objects": "{"}, ["'objects' \"{\"", "an object like"]),
    (asking(DOG, DOG, answer="<bbox>"), ["1 <bbox> in its texts and 2 in objects.bbox", "as many"]),
    (asking(DOG, answer="<bbox><bbox>"), ["2 <bbox> in its texts and 1 in objects.bbox", "as many"]),
    (asking(DOG, answer="Here."), ["0 <bbox> in its texts and 1 in objects.bbox"]),
    ({**asking(DOG), "query": "Where?"}, ["0 <ref-object> in its texts and 1 in objects.ref"]),
    ({**asking(DOG), "query": "?", "response": "x"}, ["0 <ref-object> in its texts and 1 in objects.ref"]),
    (asking(DOG, ref=["dog", "cat"]), ["1 <ref-object> in its texts and 2 in objects.ref", "as many"]),
    (asking(DOG, ref="dog"), ['objects.ref "dog"', "a list"]),
    (asking(DOG, ref=[7]), ["objects.ref[0] 7", "a name"]),
    (asking(DOG, ref=[" "]), ["objects.ref[0]", "a name"]),
    (asking(DOG, ref=["a<|box_start|>"]), ["objects.ref[0]", "without a mark"]),
    (asking(DOG, ref=["a <bbox>"]), ["objects.ref[0]", "without a mark"]),
    (asking(DOG, ref=["<|im_end|>"]), ["'<|im_end|>' inside a text", "take it out"]),
    (asking(DOG, ref=["\ud800"]), ["surrogate", "UTF-8"]),
    (asking([1, 2, 3]), ["objects.bbox[0] [1, 2, 3]", "[x1, y1, x2, y2]", "[x, y]"]),
    (asking([1, 2, 3, 4, 5, 6]), ["objects.bbox[0]", "[x1, y1, x2, y2]"]),
    (asking(DOG, 7), ["objects.bbox[1] 7", "[x1, y1, x2, y2]"]),
    (asking([[1, 2], [3, 4]]), ["objects.bbox[0] [[1, 2], [3, 4]]", "[x1, y1, x2, y2]"]),
    (asking([1, 2, "3", 4]), ["objects.bbox[0]", "[x1, y1, x2, y2]"]),
    (asking([1, 2, True, 4]), ["objects.bbox[0]", "[x1, y1, x2, y2]"]),
    (asking([1, 2, None, 4]), ["objects.bbox[0]", "[x1, y1, x2, y2]"]),
    (asking([1, 2, 10**400, 4]), ["objects.bbox[0]", "[x1, y1, x2, y2]"]),
    (asking(DOG, [60, 10, 20, 30]), ["objects.bbox[1] [60, 10, 20, 30]", "upper left corner comes first"]),
    (asking([20, 30, 60, 10]), ["objects.bbox[0]", "upper left corner comes first"]),
    (asking([20, 10, 20, 30]), ["objects.bbox[0]", "nothing lies in", "a.jpg, upright 200x100 pixels"]),
    (asking([210, 10, 220, 30]), ["[210, 10, 220, 30]", "nothing lies in", "upright 200x100 pixels"]),
    (asking([-20, 10, -5, 30]), ["objects.bbox[0]", "nothing lies in"]),
    (asking([20, 101]), ["objects.bbox[0] [20, 101]", "which is not in", "upright 200x100 pixels"]),
    (asking([0.1, 0.2, 0.5, 0.6]), ["within a pixel", '"bbox_type": "norm1"']),
    (asking([0.1, 0.2]), ["within a pixel", '"bbox_type": "norm1"']),
    (asking([20, 10, 60, 30], bbox_type="norm1"), ["objects.bbox[0]", "write 'real' for pixels"]),
    (asking([1.1, 0.2, 1.3, 0.4], bbox_type="norm1"), ["objects.bbox[0]", "nothing lies in"]),
    (asking(DOG, bbox_type="norm1000"), ['objects.bbox_type "norm1000"', "'real' (pixels) or 'norm1'"]),
    (asking(DOG, bbox_type=["real"]), ["objects.bbox_type", "'real' (pixels) or 'norm1'"]),
    (asking(DOG, image_id=[1]), ["objects.image_id[0] 1", "0 to 0"]),
    (asking(DOG, image_id=[-1]), ["objects.image_id[0] -1", "0 to 0"]),
    (asking(DOG, image_id=["0"]), ["objects.image_id[0]", "0 to 0"]),
    (asking(DOG, DOG, image_id=[0]), ["1 in objects.image_id and 2 boxes", "as many, or none"]),
    (asking(DOG, images=[]), ["no picture that they lie in"]),
    (asking([0, 0, 1, 1], images=[], bbox_type="norm1"), ["no picture that they lie in"]),
    (asking(DOG, images=["broken.jpg"]), ["broken.jpg, whose size cannot be read", "replace the picture"]),
]  # fmt: skip


@pytest.mark.parametrize(("record", "words"), BAD)
def test_what_cannot_be_filled_in_is_one_line(folder: Path, record: Record, words: list[str]) -> None:
    (folder / "broken.jpg").write_bytes(b"no picture")
    path = write(folder, asking(DOG), record)
    with pytest.raises(UserError) as error:
        list(reader(path))
    message = str(error.value)
    assert message.startswith(f"{path}: line 2 ") and "\n" not in message
    assert all(word in message for word in words), message
    lenient = reader(path, allow_missing=True)
    for _ in range(2):  # headers are recalled the second time
        assert [texts(sample) for sample in lenient] == [[NAMED, IN_A]]
        ((where, reason),) = lenient.unusable
        assert f"{where} {reason}" == message


def test_placeholders_that_nothing_fills_are_refused_in_captions(folder: Path) -> None:
    (folder / "in.csv").write_text("image_path,caption\na.jpg,A <bbox>.\n")
    with pytest.raises(UserError, match=r"line 2 has <bbox> in a text and no 'objects'"):
        list(reader(folder / "in.csv", "csv"))
    coco = make_coco(folder / "coco", 2)
    coco.captions.write_text(coco.captions.read_text().replace('"caption": "', '"caption": "<ref-object> '))
    with pytest.raises(UserError, match=r"has <ref-object> in a text and no 'objects'"):
        list(reader(coco.captions, "coco", images=coco.images))


def test_the_command_refuses_a_late_box_and_leaves_it_out_when_asked_to(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outside = asking([300, 10, 320, 30])
    path = write(folder, *[asking(DOG)] * 200, outside, asking(DOG))
    words = ["shards", "pack", "--source", "messages", "--input", str(path), "--out", str(folder / "out")]
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2 and not (folder / "out").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}: line 201 has in objects.bbox[0] [300, 10, 320, 30], of which nothing lies in" in line
    for _ in range(2):  # the second time there is nothing to do
        assert main([*words, "--skip-bad", "--workers", "2", "--samples-per-shard", "50"]) == 0
        manifest = Manifest.load(folder / "out")
        assert manifest.samples == 201
        (skipped,) = manifest.packing["skipped"]
        assert skipped["key"] == f"{path}: line 201" and "nothing lies in" in skipped["reason"]


def test_what_is_packed_is_understood_by_evaluation_and_drawn(folder: Path) -> None:
    records = [asking(DOG, [100, 50, 150, 70]), asking([1, 2, 40, 300], images=["b.jpg"])]
    out = folder / "out"
    words = ["--source", "messages", "--input", str(write(folder, *records)), "--out", str(out)]
    assert main(["shards", "pack", *words]) == 0
    raw = ShardSet(out).read(Place(0, 0))
    user, assistant = parse_sample_json(raw.json, 1)["messages"]
    prompt, reference = user["content"][1]["text"], assistant["content"][0]["text"]
    assert asked_name(prompt) == "dog"
    judged = judge(prompt, reference, reference)
    assert judged is not None and not judged.malformed
    assert [(each.name, each.box) for each in judged.true] == [
        ("dog", Box(100, 100, 600, 300)),
        ("dog", Box(500, 500, 750, 700)),
    ]
    assert judged.is_right == [True, True]
    assert draw_objects(raw.images[0], judged).startswith(b"\x89PNG")


def test_heads_are_read_once_and_not_whole_pictures(folder: Path) -> None:
    noise = jpeg(3, 400, 400)
    (folder / "c.jpg").write_bytes(noise + bytes(1 << 20))
    records = [asking(DOG, images=[f"{name}.jpg"]) for name in "acac"]
    with FileServer(folder) as server:
        found = reader(write(folder, *records), images=server.url)
        first, second = ([texts(sample) for sample in found] for _ in range(2))
        assert first == second and first[0] == [NAMED, IN_A] and first[1] != first[0]
        sent: dict[str, list[int]] = defaultdict(list)
        for request in server.requests:
            sent[request.name].append(request.sent)
    assert len(sent["a.jpg"]) == len(sent["c.jpg"]) == 2
    assert max(sent["c.jpg"]) < len(noise) + (1 << 18)
