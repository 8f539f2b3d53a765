"""What the formats can say beside a photo and its captions, and what is refused, with its place and the remedy."""

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import ijson
import pytest
from made_coco import Coco, jpeg

from qwenvl_dist.__main__ import main
from qwenvl_dist.data.formats import READERS, PackInput, Sample, TextRules, annotations
from qwenvl_dist.data.formats.annotations import AnnotationFile
from qwenvl_dist.data.index import Manifest
from qwenvl_dist.errors import UserError
from tests.http_server import FileServer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures a.jpg, b.jpg, c.jpg; annotations are written beside them."""
    for seed, name in enumerate("abc"):
        (tmp_path / f"{name}.jpg").write_bytes(jpeg(seed))
    return tmp_path


def write(folder: Path, *records: Any, lines: bool = False) -> Path:
    path = folder / "in.json"
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
    return path


def read(source: str, path: Path | str, rules: TextRules | None = None, **options: Any) -> list[Sample]:
    return list(READERS[source](PackInput(path, rules=rules or TextRules(), **options)))


def spoken(sample: Sample) -> list[tuple[str, list[str]]]:
    """Return roles and parts, a picture as its name."""
    names = iter(Path(str(image)).name for image in sample.images)
    return [
        (m["role"], [next(names) if p["type"] == "image" else p["text"] for p in m["content"]])
        for m in sample.messages
    ]


def chat(*values: str, **more: Any) -> dict[str, Any]:
    roles = ("human", "gpt") * len(values)
    return {"conversations": [{"from": r, "value": v} for r, v in zip(roles, values, strict=False)], **more}


def test_several_turns_pictures_and_a_system_prompt_in_every_form(folder: Path) -> None:
    expected = [
        ("system", ["Be brief."]),
        ("user", ["a.jpg", "Compare this with", "b.jpg", "in one word."]),
        ("assistant", ["Bigger."]),
        ("user", ["And?"]),
        ("assistant", ["No more."]),
    ]
    marked = ["<image> Compare this with <image>\nin one word.", "Bigger.", "And?", " No   more.\n"]
    images = ["a.jpg", "b.jpg"]
    by_path = marked[0]
    for image in images:
        by_path = by_path.replace("<image>", f"<|vision_start|>{image}<|vision_end|>", 1)
    system = {"from": "system", "value": "Be brief."}
    article = chat(by_path, *marked[1:])
    article["conversations"].insert(0, system)
    roles = ["user", "assistant", "user", "assistant"]
    said = [{"role": r, "content": c} for r, c in zip(roles, marked, strict=True)]
    parts = [
        {"type": "image_url", "image_url": {"url": "a.jpg"}},
        {"type": "text", "text": "Compare this with "},
        {"type": "image", "image": "b.jpg"},
        {"type": "text", "text": "in one word."},
    ]
    swift = {"messages": [{"role": "system", "content": "Be brief."}, *said], "images": images}
    openai = {"messages": [swift["messages"][0], {"role": "user", "content": parts}, *said[1:]]}
    for source, record in (
        ("conversations", article),
        ("llava", chat(*marked, image=images, system="Be brief.")),
        ("messages", chat(*marked, images=images, system="Be brief.")),
        ("messages", swift),
        ("messages", openai),
        ("messages", {**swift, "images": [{"path": "a.jpg"}, {"url": "b.jpg"}]}),
    ):
        assert spoken(read(source, write(folder, record))[0]) == expected, source
        assert spoken(read(source, write(folder, record, lines=True))[0]) == expected, source


def test_one_question_and_answer_in_the_forms_of_many_programs(folder: Path) -> None:
    expected = [
        ("system", ["Be brief."]),
        ("user", ["Hello."]),
        ("assistant", ["Yes?"]),
        ("user", ["a.jpg", "What?"]),
        ("assistant", ["A bus."]),
    ]
    more = {"system": "Be brief.", "images": ["a.jpg"]}
    history = {**more, "history": [["Hello.", "Yes?"]]}
    asked = [{"human": "Hello.", "assistant": "Yes?"}, {"human": "<image>What?", "assistant": "A bus."}]
    for record in (
        {"query": "<image>What?", "response": "A bus.", **history},
        {"query": "<img>a.jpg</img>What?", "response": "A bus.", **history, "images": []},
        {"instruction": "<image>What?", "input": "", "output": "A bus.", **history},
        {"instruction": "<image>", "input": "What?", "output": "A bus.", **history},
        {"conversation": asked, **more},
        {"question": "<image>What?", "answer": "A bus.", **history},
        {"prompt": "<image>What?", "completion": "A bus.", **history},
    ):
        assert spoken(read("messages", write(folder, record))[0]) == expected, record


def test_turns_by_either_pair_of_names(folder: Path) -> None:
    ours = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A bus."}]
    theirs = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A bus."}]
    for turns in (ours, theirs):
        for source, name in (
            ("messages", "messages"),
            ("messages", "conversations"),
            ("messages", "conversation"),
            ("llava", "conversations"),
        ):
            (sample,) = read(source, write(folder, {name: turns, "image": "a.jpg"}))
            assert spoken(sample) == [("user", ["a.jpg", "What?"]), ("assistant", ["A bus."])]


def test_pictures_that_the_text_does_not_place_come_before_the_first_words(folder: Path) -> None:
    listed = {"images": ["a.jpg", {"bytes": base64.b64encode(jpeg(1)).decode(), "path": None}]}
    said = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Which?"},
            {"role": "assistant", "content": "Both."},
        ]
    }
    for source, record in (
        ("messages", {**said, **listed}),
        ("llava", {**chat("Which?", "Both.", system="Be brief."), "image": listed["images"]}),
        ("llava", {**chat("Which?", "Both.", system="Be brief."), **listed}),
    ):
        (sample,) = read(source, write(folder, record))
        assert [image.read() for image in sample.images] == [jpeg(0), jpeg(1)]
        assert [p["type"] for p in sample.messages[1]["content"]] == ["image", "image", "text"]


def test_a_picture_and_captions_as_one_record(folder: Path) -> None:
    for record in (
        {"image": "a.jpg", "caption": ["A bus.", "Red."], "image_id": 7},
        {"file_name": "a.jpg", "text": "A bus.&&Red.", "image_id": 7},
        {"images": ["a.jpg"], "captions": ["A bus. ", " Red."], "image_id": 7},
    ):
        (sample,) = read("messages", write(folder, record, lines=True))
        assert spoken(sample) == [("user", ["a.jpg", "COCO Yes:"]), ("assistant", ["A bus.&&Red."])]
        assert (sample.key, sample.image_id) == ("a", 7)
    assert_refused("messages", write(folder, {"image": "a.jpg", "caption": 3}), "3 for 'caption'", "a list")


def test_text_alone_is_a_sample(folder: Path) -> None:
    expected = [("user", ["Two and two?"]), ("assistant", ["Four."])]
    said = ("Two and two?", "Four.")
    messages = [{"role": r, "content": c} for r, c in zip(("user", "assistant"), said, strict=True)]
    for source, record in (
        ("conversations", chat(*said)),
        ("llava", chat(*said)),
        ("messages", {"messages": messages}),
    ):
        (sample,) = read(source, write(folder, record))
        assert (spoken(sample), sample.images, sample.key) == (expected, [], "000000000")


def test_pictures_behind_the_words_come_first_and_a_turn_without_words_gets_the_prompt(folder: Path) -> None:
    behind = chat("What? <|vision_start|>a.jpg<|vision_end|>", "A.")
    silent = chat("<|vision_start|>a.jpg<|vision_end|>", "A.")
    first, second = read("conversations", write(folder, behind, silent), TextRules(prompt="Describe:"))
    assert spoken(first)[0] == ("user", ["a.jpg", "What?"])
    assert spoken(second)[0] == ("user", ["a.jpg", "Describe:"])


def test_white_space_of_answers_is_kept_when_asked_for(folder: Path) -> None:
    path = write(folder, chat("Read  it\nout.", "  One\n\n- two\n- three \n"))
    assert spoken(read("llava", path)[0])[1] == ("assistant", ["One - two - three"])
    kept = read("llava", path, TextRules(keep_white_space=True))[0]
    assert spoken(kept) == [("user", ["Read  it\nout."]), ("assistant", ["One\n\n- two\n- three"])]


def test_line_breaks_that_are_lost_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(folder, chat("List.", "- one\n- two"), chat("Say.", " one \n"))
    words = ["shards", "pack", "--source", "llava", "--input", str(path), "--out"]
    assert main([*words, str(folder / "one")]) == 0
    assert "1 answers have line breaks inside" in capsys.readouterr().err
    assert main([*words, str(folder / "two"), "--keep-white-space"]) == 0
    assert "line breaks" not in capsys.readouterr().err


def test_input_and_pictures_come_from_a_web_server(folder: Path) -> None:
    with FileServer(folder) as server:
        write(folder, chat("<image><image>?", "x", image=["a.jpg", f"{server.url}/b.jpg"]))
        for options in ({}, {"images": server.url}):
            (sample,) = read("llava", f"{server.url}/in.json", **options)
            assert [image.read() for image in sample.images] == [jpeg(0), jpeg(1)]
        assert sum(request.name == "in.json" for request in server.requests) == 2  # once for each reader
        with pytest.raises(UserError, match=r"gone\.json: no such file"):
            read("llava", f"{server.url}/gone.json")


def test_keys_are_ids_else_stems_else_numbers(folder: Path) -> None:
    def keys(*records: Any) -> list[str]:
        return [sample.key for sample in read("llava", write(folder, *records))]

    a, b = chat("<image>?", "x", image="a.jpg"), chat("<image>?", "x", image="b.jpg")
    assert keys({**a, "id": "one"}, {**b, "id": 7}) == ["one", "000000000007"]
    assert keys({**a, "id": "one"}, {**b, "id": "one"}) == ["a", "b"]
    assert keys({**a, "id": "o.ne"}, b) == ["a", "b"]
    assert keys(a, a, b) == ["000000000", "000000001", "000000002"]


def test_a_picture_is_found_by_path_name_url_or_data(folder: Path, tmp_path: Path) -> None:
    elsewhere = folder / "photos"
    elsewhere.mkdir()
    (folder / "c.jpg").rename(elsewhere / "c.jpg")

    def images(name: str, **options: Any) -> list[bytes]:
        record = {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": name}]},
                {"role": "assistant", "content": "x"},
            ]
        }
        (sample,) = read("messages", write(folder, record), **options)
        return [image.read() for image in sample.images]

    data = "data:image/jpeg;base64," + base64.b64encode(jpeg(0)).decode()
    for name in ("a.jpg", str(folder / "a.jpg"), f"file://{folder}/a.jpg", data):
        assert images(name) == [jpeg(0)]
    for name in ("c.jpg", "coco_2014_caption/c.jpg", "/gone/long/ago/c.jpg", r"D:\data\c.jpg"):
        assert images(name, images=elsewhere) == [jpeg(2)]
    (elsewhere / "train").mkdir()
    (elsewhere / "train" / "c.jpg").write_bytes(jpeg(3))
    assert images(r"train\c.jpg", images=elsewhere) == images(r"photos\train\c.jpg") == [jpeg(3)]
    plain = base64.b64encode(jpeg(0) + bytes(1000)).decode()
    assert images(plain) == [jpeg(0) + bytes(1000)]
    with pytest.raises(UserError) as error:
        images("x." * 3000)
    assert len(str(error.value)) < 1000


def test_csv_takes_quotes_columns_marks_and_line_ends(folder: Path) -> None:
    path = folder / "in.csv"
    text = '\ufeffn,caption,image_path\r\n1,"A ""red"" bus,\r\n parked. &&  Two",a.jpg\r\n2,B,b.jpg\r\n\r\n'
    path.write_bytes(text.encode())
    first, second = read("csv", path)
    assert spoken(first) == [("user", ["a.jpg", "COCO Yes:"]), ("assistant", ['A "red" bus, parked.&&Two'])]
    assert (first.key, first.image_id, second.key) == ("a", "a", "b")
    path.write_text("picture,words\na.jpg,x\n")
    (sample,) = read("csv", path, image_column="picture", text_column="words")
    assert spoken(sample)[1] == ("assistant", ["x"])


@pytest.mark.parametrize("mark", [",", ";", "\t", "|", ", "])
def test_csv_columns_are_parted_as_the_header_has_it(folder: Path, mark: str) -> None:
    path = folder / "in.csv"
    rows = (["n", "image_path", "caption "], ["1", "a.jpg", '"Red; blue, green|x"'], ["2", "b.jpg", "y"])
    path.write_text("".join(mark.join(row) + "\r\n" for row in rows))
    first, second = read("csv", path)
    assert spoken(first) == [("user", ["a.jpg", "COCO Yes:"]), ("assistant", ["Red; blue, green|x"])]
    assert spoken(second)[1] == ("assistant", ["y"])


def test_compressed_files_are_read_as_they_are(folder: Path) -> None:
    record = chat("<image>?", "x", image="a.jpg")
    content = {
        "llava": (json.dumps([record] * 3), json.dumps(record) + "\n" + json.dumps(record)),
        "csv": ("\ufeffimage_path,caption\na.jpg,x\n",),
    }
    path = folder / "in.gz"
    for source, texts in content.items():
        for text in texts:
            (folder / "plain").write_text(text)
            path.write_bytes(gzip.compress(text.encode()))
            plain, packed = read(source, folder / "plain"), read(source, path)
            assert [vars(sample) for sample in plain] == [vars(sample) for sample in packed]
            path.write_bytes(path.read_bytes()[:-12])
            assert_refused(source, path, "cannot be unpacked", "fetch it again")
    path.write_bytes(gzip.compress(f"[\n{json.dumps(record)},\n]".encode()))
    assert_refused("llava", path, "line 3: not JSON")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\x03\x04rest", "save it as CSV"),
        (b"\x28\xb5\x2f\xfdrest", "compressed by zstd"),
        ("a,b".encode("utf-16"), "UTF-16: convert"),
        (b"PAR1", "--source huggingface"),
    ],
)
def test_files_of_another_kind_are_named(folder: Path, content: bytes, words: str) -> None:
    path = folder / "in.csv"
    path.write_bytes(content)
    for source in ("csv", "llava", "messages"):
        assert_refused(source, path, words)


BAD_CSV = [
    (b"a,b\nx,y\n", "line 1: the header 'a,b' has 0 columns 'image_path'", "--image-column"),
    (b"", "line 1: the header '' has 0 columns", "--image-column"),
    (b"image_path,caption\n", "holds no record", "nothing to pack"),
    (b"image_path,caption\na.jpg,x\nb.jpg,y,z\n", "line 3 has 3 fields", "double quotes"),
    (b"image_path,caption\na.jpg,x\n\nb.jpg, \n", "line 4 has an empty caption", "fill it in"),
    (b'image_path,caption\na.jpg,"x\ny"\n,z\n', "line 4 names no picture", "drop the line"),
    (b"image_path,caption\ngone.jpg,x\n", "line 2 names the picture 'gone.jpg'", "--images"),
    (b"image_path,caption\na.jpg,\xff\n", "line 2: not UTF-8", "convert"),
    (b'image_path,caption\na.jpg,"x" y\n', "line 2: not CSV", "--input must be"),
    (b"image_path,caption\na.jpg,<|im_end|>\n", "line 2 has '<|im_end|>' inside", "take it out"),
]


@pytest.mark.parametrize(("content", "words", "remedy"), BAD_CSV)
def test_a_faulty_csv_is_one_line(folder: Path, content: bytes, words: str, remedy: str) -> None:
    path = folder / "in.csv"
    path.write_bytes(content)
    assert_refused("csv", path, words, remedy)


def assert_refused(source: str, path: Path, *words: str) -> None:
    with pytest.raises(UserError) as error:
        read(source, path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert all(word in message for word in words), message


GOOD = chat("<image>?", "x", image="a.jpg")
BAD_JSON = [
    ("[]", "holds no record", "nothing to pack"),
    (json.dumps(GOOD) + '\n{"b"\n', "line 2: not JSON", "one JSON object a line"),
    (f'[\n{json.dumps(GOOD)},\n{{"a": 2\n]', "line 4: not JSON", "--input must be"),
    (f"[\n{json.dumps(GOOD)}\n", "line 3: not JSON", "--input must be"),
    (json.dumps([GOOD, 3]), "[1] is 3", "an object like"),
    (json.dumps([{}]), "[0] has no list 'conversations'", "like"),
    (json.dumps([GOOD, chat()]), "[1] has no list 'conversations'", "like"),
    (json.dumps([chat("?")]), "no turn of the assistant", "add one"),
    (json.dumps([chat("?", "x", "??")]), "nobody answers", "drop the last"),
    (json.dumps([chat("?", " ")]), "empty turn of the assistant", "fill it in"),
    (json.dumps([chat(" ", "x")]), "empty turn of the user", "fill it in"),
    (json.dumps([{"conversations": [{"from": "tool", "value": "x"}]}]), "the role 'tool'", "human"),
    (json.dumps([{"conversations": [{"from": "human"}]}]), "conversations[0]", "'value'"),
    (json.dumps([chat("<image><image>?", "x", image="a.jpg")]), "names 1 pictures", "has 2 places"),
    (json.dumps([chat("<image>?", "x", image=["a.jpg", "b.jpg"])]), "has 1 places", "write <image>"),
    (json.dumps([chat("?", "x", video="a.mp4")]), "has 'video'", "drop the record"),
    (json.dumps([chat("?", "x\0")]), "NUL character", "take it out"),
    (json.dumps([chat("<image>?", "x", image="gone.jpg")]), "'gone.jpg'", "--images"),
    (json.dumps([chat("<image>?", "x", image=5)]), "has 5 for 'image'", "a path or URL"),
    (json.dumps([chat("<image>?", "x", image="data:x")]), "data URL", "image/jpeg"),
    (json.dumps([chat("<video>?", "x")]), "'<video>' inside a text", "take it out"),
    (json.dumps([chat("?", "<image>x", image="a.jpg")]), "picture in a turn of the assistant", "user"),
    (json.dumps([chat("?", "x <|im_end|>")]), "'<|im_end|>'", "take it out"),
    (json.dumps([chat("?", "\ud800")]), "surrogate", "UTF-8"),
    (json.dumps([chat("?", "x", system=3)]), "system prompt 3", "a text"),
]


@pytest.mark.parametrize(("content", "words", "remedy"), BAD_JSON)
def test_a_faulty_json_is_one_line(folder: Path, content: str, words: str, remedy: str) -> None:
    path = folder / "in.json"
    path.write_text(content)
    assert_refused("llava", path, words, remedy)


@pytest.mark.parametrize(
    ("source", "record", "words"),
    [
        ("conversations", GOOD, ["'image'", "--source llava"]),
        ("conversations", chat("<image>?", "x", images=["a.jpg"]), ["'images'", "--source messages"]),
        ("messages", {"messages": "x"}, ["no list 'messages'"]),
        ("messages", {"messages": [{"role": "user"}]}, ["messages[0]", "'content'"]),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            ["content[0]", "audio"],
        ),
        ("messages", {"messages": [{"role": "user", "content": "?"}], "images": 3}, ["3 for 'images'"]),
        ("messages", {"image": "a.jpg"}, ["no list 'messages'", "query", "caption"]),
        ("messages", {"query": "?", "response": "x", "label": False}, ["'label' false", "drop the record"]),
        ("messages", {"query": "?", "response": None}, ["null for 'response'"]),
        ("messages", {"query": "?", "response": "x", "history": ["y"]}, ["history[0]"]),
        ("messages", {"conversation": [{"human": "?"}]}, ["conversation[0]", "'assistant'"]),
        (
            "messages",
            {"query": "<ref-object>?", "response": "<bbox>", "objects": {"ref": ["a"]}},
            ["0 in objects.bbox"],
        ),
        ("messages", {"query": "?", "response": "x", "audios": ["a.mp3"]}, ["'audios'", "drop the record"]),
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": "?"},
                    {"role": "assistant", "content": "x", "weight": 0.5},
                ]
            },
            ["messages[1]", "'weight' 0.5"],
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            ["content[0]", "file_id"],
        ),
        ("messages", chat("a", "b") | {"conversations": []}, ["no list 'conversations'"]),
    ],
)
def test_a_record_of_another_form_is_named(folder: Path, source: str, record: Any, words: list[str]) -> None:
    good = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]}
    first = good if source == "messages" else chat("?", "x")
    assert_refused(source, write(folder, first, record, lines=True), "line 2 ", *words)


def refused(*words: str) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["shards", "pack", *words])
    assert exit.value.code == 2


def test_a_late_fault_leaves_nothing_behind(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [chat("<image>?", "x", image="a.jpg")] * 50 + [chat("<image>?", "x", image="gone.jpg")]
    path = write(folder, *records)
    words = [
        "--source",
        "llava",
        "--input",
        str(path),
        "--out",
        str(folder / "out"),
        "--samples-per-shard",
        "2",
    ]
    refused(*words)
    assert not (folder / "out").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}: [50] names the picture 'gone.jpg'" in line
    assert main(["shards", "pack", *words, "--skip-bad"]) == 0


def test_records_that_cannot_be_used_are_left_out_when_asked_for(folder: Path) -> None:
    good, silent = chat("<image>?", "x", image="a.jpg"), chat("<image>?", " ", image="b.jpg")
    out = folder / "out"
    cases = {
        "llava": (json.dumps([good, 3, silent]), ["[1]", "[2]"]),
        "csv": ("image_path,caption\na.jpg,x\nb.jpg\nb.jpg,\n", ["line 3", "line 4"]),
    }
    for source, (text, places) in cases.items():
        path = folder / f"{source}.in"
        path.write_text(text)
        words = ["--source", source, "--input", str(path), "--out", str(out / source)]
        refused(*words)
        for _ in range(2):  # the second time there is nothing to do
            assert main(["shards", "pack", *words, "--skip-bad"]) == 0
            manifest = Manifest.load(out / source)
            assert manifest.samples == 1
            skipped = manifest.packing["skipped"]
            assert [bad["key"] for bad in skipped] == [f"{path}: {place}" for place in places]
            assert all(bad["reason"] for bad in skipped)
    path = folder / "in.json"
    path.write_text(json.dumps([silent, 3]))
    with pytest.raises(UserError, match=r"\[0\] has an empty turn.*no other record can be used either"):
        read("llava", path, allow_missing=True)


def test_an_option_that_a_source_does_not_take_is_refused(coco: Coco, tmp_path: Path) -> None:
    words = ["--captions", str(coco.captions), "--out", str(tmp_path / "out")]
    refused("--source", "coco", *words)  # without --images
    refused("--source", "coco", *words, "--images", str(coco.images), "--text-column", "x")
    refused("--source", "csv", *words, "--join", "")
    assert not (tmp_path / "out").exists()


def test_what_the_fast_parser_cannot_read_is_read_by_the_other(folder: Path) -> None:
    path = folder / "in.json"
    filler = [chat("?", "x", id=n) for n in range(2000)]  # more than a chunk before it
    path.write_text(json.dumps([*filler, chat("?", "\U0001f600 \\ud800"), chat("?", "x", id=10**30)]))
    samples = read("llava", path)
    assert len(samples) == 2002
    assert spoken(samples[2000])[1] == ("assistant", ["\U0001f600 \\ud800"])
    assert spoken(samples[1999])[1] == ("assistant", ["x"])


def test_no_end_of_a_piece_parts_an_escape(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps([chat("?", "\U0001f600" * 20 + "\n\\" * 9)])
    (folder / "in.json").write_text(text)
    monkeypatch.setattr(AnnotationFile, "_not_json", None)
    monkeypatch.setattr(ijson, "get_backend", None)  # the fast parser alone must do
    for size in range(20, 60):
        monkeypatch.setattr(annotations, "CHUNK_BYTES", size)
        (sample,) = read("llava", folder / "in.json", TextRules(keep_white_space=True))
        assert spoken(sample)[1] == ("assistant", ["\U0001f600" * 20 + "\n\\" * 9])
