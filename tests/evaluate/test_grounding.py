"""`evaluate --task grounding`: answers that are made up, so that every number is known beforehand."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwenvl_dist.__main__ import main
from qwenvl_dist.data.boxes import Box, NamedBox, write_objects
from qwenvl_dist.data.drawing import IGNORED, LEGEND, RIGHT, WRONG, draw_objects
from qwenvl_dist.data.grounding import read_coco_instances
from qwenvl_dist.data.pack import pack
from qwenvl_dist.data.prompts import Asked, PromptBatch
from qwenvl_dist.evaluate.captioner import Captioner
from qwenvl_dist.model.generate import _text
from qwenvl_dist.scores.boxes import judge
from qwenvl_dist.scores.captions import by_image
from qwenvl_dist.synthetic.scenes import draw_scene, scene, write_scenes

FIND = "Find <|object_ref_start|>{}<|object_ref_end|>."


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scenes with their boxes."""
    return write_scenes(tmp_path_factory.mktemp("scenes") / "out", 3, seed=5, validation_count=0)[
        "train"
    ].parent


@pytest.fixture(scope="module")
def box_shards(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One question for all objects of each scene, and one for each of the two."""
    out = tmp_path_factory.mktemp("boxes") / "shards"
    pack(read_coco_instances(scenes / "instances.json", scenes / "images"), out, samples_per_shard=4)
    return out


def spoken(monkeypatch: pytest.MonkeyPatch, what: Any) -> list[Asked]:
    """Let every model say what `what` makes of a question; return the list of questions, filled as they come."""
    heard: list[Asked] = []

    def answer(self: Captioner, batch: PromptBatch, max_new_tokens: int) -> list[str]:
        known = [asked for asked in batch.asked if asked is not None]
        heard.extend(known)
        return [what(asked) for asked in known]

    monkeypatch.setattr(Captioner, "answer", answer)
    return heard


def evaluated(
    base: Path, shards: Path, out: Path, capsys: pytest.CaptureFixture[str], *more: str
) -> dict[str, Any]:
    words = [
        "evaluate",
        str(base),
        "--shards",
        str(shards),
        "--task",
        "grounding",
        "--out",
        str(out),
        "--json",
        *more,
    ]
    assert main(words) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_model_that_says_the_references_is_perfect(
    base: Path,
    box_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    heard = spoken(monkeypatch, lambda asked: asked.reference)
    numbers = evaluated(base, box_shards, tmp_path, capsys)
    assert len(heard) == numbers["n"] == 9
    assert {name: numbers[name] for name in ("precision", "recall", "f1", "mean_iou", "malformed")} == {
        "precision": 1, "recall": 1, "f1": 1, "mean_iou": 1, "malformed": 0,
    }  # fmt: skip
    assert (numbers["boxes"], numbers["iou_threshold"]) == (12, 0.5)
    assert numbers["loss"] > 1, "the loss is the model's own"


def test_every_kind_of_answer_is_counted(
    base: Path,
    box_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of the questions for all objects one is answered well, one is cut off and one gets words; names get nothing."""

    def answer(asked: Asked) -> str:
        if not asked.key.endswith("-all"):
            return ""
        if asked.image_id == 1:
            return asked.reference
        return asked.reference[: asked.reference.rindex("(")] if asked.image_id == 2 else "I see two shapes."

    spoken(monkeypatch, answer)
    numbers = evaluated(base, box_shards, tmp_path, capsys)
    assert (numbers["boxes"], numbers["predicted"], numbers["matched"]) == (12, 4, 3)
    assert (numbers["malformed"], numbers["malformed_answers"]) == (1, 1)
    assert (numbers["recall"], numbers["precision"]) == (3 / 12, 3 / 4)

    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert {key: written[key] for key in numbers} == numbers
    assert sum(each["boxes"] for each in written["by_name"].values()) == 12
    predictions = json.loads((tmp_path / "predictions.json").read_text())
    assert [entry["key"] for entry in predictions if entry["malformed"]] == ["000000000002-all"]
    first = predictions[0]
    assert [each["iou"] for each in first["predicted"]] == [1, 1] and all(
        each["found"] for each in first["true"]
    )
    assert not any(each["found"] for each in predictions[1]["true"])

    page = (tmp_path / "comparison.html").read_text()
    pictures = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    assert len(pictures) == 9 and "0.250" in page
    greens = [count_near(base64.b64decode(picture), RIGHT) for picture in pictures]
    assert greens[0] > 500 + greens[1], (
        "right boxes are drawn; the next two are the same picture, without answers"
    )
    assert abs(greens[1] - greens[2]) < 200


def test_boxes_in_a_crowd_are_ignored(
    base: Path,
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first scene has a crowd of cats on its right; every answer names two cats there and one on the left."""
    content = json.loads((scenes / "instances.json").read_text())
    content["categories"].append({"id": 99, "name": "cat"})
    content["annotations"].append({"image_id": 1, "category_id": 99, "bbox": [28, 0, 28, 56], "iscrowd": 1})
    (tmp_path / "instances.json").write_text(json.dumps(content))
    shards = tmp_path / "shards"
    pack(read_coco_instances(tmp_path / "instances.json", scenes / "images", "all_objects"), shards)
    right, left = NamedBox("cat", Box(600, 10, 900, 200)), NamedBox("cat", Box(100, 10, 400, 200))
    spoken(monkeypatch, lambda asked: asked.reference + write_objects([right, right, left]))
    out = tmp_path / "out"
    numbers = evaluated(base, shards, out, capsys)
    # two shapes and three cats an answer; two cats of one of the three answers do not count
    assert (numbers["boxes"], numbers["predicted"], numbers["matched"], numbers["ignored"]) == (6, 13, 6, 2)
    assert (numbers["recall"], numbers["precision"]) == (1, 6 / 13)
    by_name = json.loads((out / "evaluation.json").read_text())["by_name"]
    assert (by_name["cat"]["predicted"], by_name["cat"]["ignored"]) == (7, 2)
    first, second, _ = json.loads((out / "predictions.json").read_text())
    assert first["crowds"] == [{"name": "cat", "box": [500, 0, 999, 999]}] and second["crowds"] == []
    assert [each["ignored"] for each in first["predicted"]] == [False, False, True, True, False]
    assert not any(each["ignored"] for each in second["predicted"])
    assert LEGEND in (out / "comparison.html").read_text()


def count_near(data: bytes, colour: tuple[int, int, int]) -> int:
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    return int((np.abs(pixels - colour).max(-1) < 40).sum())


def test_before_and_after_stand_side_by_side(
    base: Path,
    adapter: Path,
    box_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said: list[str] = []

    def answer(asked: Asked) -> str:
        said.append(asked.key)
        return "" if len(said) <= 9 else asked.reference  # the bare model comes first

    spoken(monkeypatch, answer)
    numbers = evaluated(base, box_shards, tmp_path, capsys, "--adapter", str(adapter))
    assert (numbers["recall_before"], numbers["recall"]) == (0, 1)
    assert numbers["loss_before"] != numbers["loss"]
    assert all(
        not entry["predicted"] for entry in json.loads((tmp_path / "predictions_base.json").read_text())
    )
    assert "0.000 → 1.000" in (tmp_path / "comparison.html").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task", "grounding"], "no reference has a box"),
        (["--task", "grounding", "--scores", "none"], "do not go with --task grounding"),
        (["--task", "boxes"], "invalid choice: 'boxes'"),
    ],
)
def test_what_does_not_fit_is_refused(
    base: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    spoken(monkeypatch, lambda asked: "")
    with pytest.raises(SystemExit) as left:
        main(["evaluate", str(base), "--shards", str(shards), "--out", str(tmp_path), *more])
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_marks_of_boxes_are_kept_where_boxes_are_asked_for(scenes_processor: Any) -> None:
    """transformers' own decoding drops them: they are special tokens."""
    tokenizer = scenes_processor.tokenizer
    said = write_objects(
        [NamedBox("red circle", Box(1, 20, 300, 999)), NamedBox("red circle", Box(5, 6, 7, 8))]
    )
    ids = tokenizer(f"{said}<|im_end|><|vision_pad|>")["input_ids"]
    assert _text(tokenizer, ids, Asked("a", 1, said, "Find all objects.")) == said
    assert _text(tokenizer, ids, Asked("a", 1, "", FIND.format("red circle"))) == said
    plain = _text(tokenizer, ids, Asked("a", 1, "a red circle", "COCO Yes:"))
    assert plain == _text(tokenizer, ids, None) == "red circle(1,20),(300,999)(5,6),(7,8)"


def test_questions_about_one_picture_stay_apart() -> None:
    box = write_objects([NamedBox("dog", Box(1, 2, 3, 4))])
    other = write_objects([NamedBox("cat", Box(5, 6, 7, 8))])
    asked = [
        Asked("1-c1", 1, box),
        Asked("1-c2", 1, other),
        Asked("1", 1, "A dog."),
        Asked("1b", 1, "A cat."),
    ]
    images = by_image([(each, each.reference) for each in asked], "&&", "first")
    assert [image.references for image in images] == [(box,), (other,), ("A dog.", "A cat.")]


def test_an_answer_keeps_the_crowds_of_its_question() -> None:
    crowd = NamedBox("dog", Box(1, 2, 3, 4))
    text = write_objects([crowd])
    asked = [Asked("1-all", 1, text, "", (crowd,)), Asked("2-all", 2, text)]
    first, second = (image.to_json() for image in by_image([(each, text) for each in asked], "&&", "first"))
    assert first["crowds"] == [{"name": "dog", "box": [1, 2, 3, 4]}]
    assert "crowds" not in second


def test_boxes_are_drawn_where_they_are(scenes: Path) -> None:
    drawn = scene(0, 5, size=56)
    assert draw_scene(drawn).size == (56, 56)
    (sample,) = [
        s
        for s in read_coco_instances(scenes / "instances.json", scenes / "images")
        if s.key.endswith("1-all")
    ]
    reference = sample.messages[1]["content"][0]["text"]
    (upper, lower) = judge("", reference, reference).true  # type: ignore[union-attr]
    wrong = NamedBox(upper.name, Box(lower.box.x1, 0, 999, 999))
    boxes = judge("", reference, write_objects([upper, wrong]))
    assert boxes is not None and boxes.is_right == [True, False]
    picture = draw_objects(sample.images[0].read(), boxes)
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    assert image.size == (280, 280), "a small picture is enlarged"
    middle = (upper.box.y1 + upper.box.y2) * 280 // 2000
    assert image.getpixel((upper.box.x1 * 280 // 1000 + 1, middle)) == RIGHT
    assert image.getpixel((278, 140)) == WRONG
    assert count_near(picture, (255, 255, 255)) > 50, "the reference is dashed"
    crowded = judge("", reference, write_objects([upper, wrong]), [wrong])
    assert crowded is not None
    image = Image.open(io.BytesIO(draw_objects(sample.images[0].read(), crowded)))
    assert (image.getpixel((upper.box.x1 * 280 // 1000 + 1, middle)), image.getpixel((278, 140))) == (
        RIGHT,
        IGNORED,
    )
