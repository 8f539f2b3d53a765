import json

import pytest

from qwenvl_dist.data.formats import (
    Sample,
    caption_messages,
    normalise_caption,
    parse_sample_json,
    read_coco_captions,
)
from qwenvl_dist.errors import UserError


def read(coco, **options) -> list[Sample]:
    return list(read_coco_captions(coco.captions, coco.images, **options))


def test_coco_sample_has_the_contracts_form(coco):
    coco.content["annotations"] = [
        {"image_id": 1, "caption": "  A bus.\n"},
        *coco.content["annotations"][2:],
        {"image_id": 1, "caption": "A \t white\n bus."},
    ]
    sample = read(coco.write())[0]
    assert json.loads(sample.to_json()) == {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "COCO Yes:"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A bus.&&A white bus."}]},
        ],
        "image_id": 1,
        "source": "coco",
    }
    assert sample.key == "000000000001"
    assert [image.path for image in sample.images] == [coco.images / "000000000001.jpg"]


def test_prompt_and_join_are_the_callers(coco):
    sample = read(coco, prompt="Describe:", join=" | ")[2]
    assert sample.messages == caption_messages("Describe:", "Picture 3, told 0. | Picture 3, told 1.")


@pytest.mark.parametrize(
    ("text", "join", "expected"),
    [
        ("  a\n b ", "&&", "a b"),
        ("a && b&&\tc", "&&", "a&&b&&c"),  # already joined: each piece on its own
        ("a \u00a0 b", "&&", "a b"),
        ("Ends with the mark.", ".", "Ends with the mark."),
        ("two\nlines", "\n", "two lines"),
    ],
)
def test_normalise_caption(text, join, expected):
    assert normalise_caption(text, join) == expected
    assert normalise_caption(expected, join) == expected


def test_samples_come_by_image_id_whatever_the_files_order(coco):
    keys = [sample.key for sample in read(coco)]
    coco.content["images"].reverse()
    assert [sample.key for sample in read(coco.write())] == keys == sorted(keys)


def test_unsafe_or_repeated_stems_give_keys_from_ids(coco):
    for folder, image in zip("ab", coco.content["images"], strict=False):
        (coco.images / folder).mkdir()
        (coco.images / image["file_name"]).rename(coco.images / folder / "x.v2.jpg")
        image["file_name"] = f"{folder}/x.v2.jpg"
    samples = read(coco.write())
    assert [sample.key for sample in samples] == [f"{i:012d}" for i in range(1, 11)]
    assert samples[1].images[0].path == coco.images / "b" / "x.v2.jpg"


def broken(change):
    def apply(coco):
        change(coco.content)
        coco.write()

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda coco: coco.captions.write_text("{"), ["not JSON", "--captions"]),
        (lambda coco: coco.captions.write_text("[]"), ["'images' is not a list"]),
        (lambda coco: coco.captions.unlink(), ["no such file"]),
        (broken(lambda c: c.update(annotations={"1": "x"})), ["'annotations' is not a list"]),
        (broken(lambda c: c.update(images=[])), ["'images' is empty"]),
        (broken(lambda c: c["images"].append(dict(c["images"][0]))), ["images[10]", "id 1", "second time"]),
        (broken(lambda c: c["images"][3].pop("file_name")), ["images[3]", "file_name"]),
        (
            broken(lambda c: c["images"][3].update(file_name="../x.jpg")),
            ["images[3]", "../x.jpg", "below --images"],
        ),
        (
            broken(lambda c: c["images"][3].update(file_name="/x.jpg")),
            ["images[3]", "/x.jpg", "below --images"],
        ),
        (broken(lambda c: c["images"][3].update(file_name="gone.jpg")), ["image 4", "gone.jpg", "--images"]),
        (broken(lambda c: c["annotations"].pop(0) and c["annotations"].pop(0)), ["image 1 ", "no caption"]),
        (broken(lambda c: c["annotations"][5].pop("caption")), ["annotations[5]", "'caption'"]),
        (broken(lambda c: c["annotations"][5].update(caption=" \n")), ["annotations[5]", "empty caption"]),
        (
            broken(lambda c: c["annotations"][5].update(image_id=77)),
            ["annotations[5]", "77", "does not list"],
        ),
        (broken(lambda c: c["annotations"][5].update(caption="\ud800")), ["annotations[5]", "surrogate"]),
    ],
)
def test_a_faulty_captions_file_is_one_line_with_place_and_rule(coco, damage, words):
    damage(coco)
    with pytest.raises(UserError) as error:
        read(coco)
    message = str(error.value)
    assert "\n" not in message
    assert str(coco.captions) in message
    assert all(word in message for word in words), message


def test_a_missing_image_folder_is_named(coco):
    with pytest.raises(UserError, match="nowhere"):
        list(read_coco_captions(coco.captions, coco.images / "nowhere"))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "messages"),
        (b'{"messages": []}', "messages"),
        (b'{"messages": [{"role": "robot", "content": []}]}', "role"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "content"),
        (b'{"messages": [{"role": "assistant", "content": [{"type": "text"}]}]}', "neither"),
        (b'{"messages": [{"role": "user", "content": []}]}', "nothing to learn"),
        (json.dumps({"messages": caption_messages("p", "a", num_images=2)}).encode(), "name 2 images, 1"),
    ],
)
def test_parse_sample_json_says_what_is_wrong(record, reason):
    with pytest.raises(ValueError, match=reason):
        parse_sample_json(record, num_images=1)


def test_every_real_caption_is_there_once(real_coco):
    samples = list(read_coco_captions(real_coco / "captions.json", real_coco / "images"))
    content = json.loads((real_coco / "captions.json").read_text())
    captions = [
        caption for sample in samples for caption in sample.messages[1]["content"][0]["text"].split("&&")
    ]
    assert len(samples) == 290
    assert len(captions) == 1451
    assert sorted(captions) == sorted(" ".join(a["caption"].split()) for a in content["annotations"])
