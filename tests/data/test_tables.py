"""Data sets of Hugging Face's `datasets`, and parquet files of other programs."""

import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_coco import jpeg

from qwenvl_dist.data.formats import READERS, PackInput, Sample
from qwenvl_dist.data.pack import pack
from qwenvl_dist.data.verify import verify
from qwenvl_dist.errors import UserError


def read(path: Path, **options: Any) -> list[Sample]:
    return list(READERS["huggingface"](PackInput(path, **options)))


def inside(number: int) -> dict[str, Any]:
    return {"bytes": jpeg(number), "path": f"p{number}.jpg"}


def table(folder: Path, rows: list[dict[str, Any]], group: int = 2, name: str = "t.parquet") -> Path:
    path = folder / name
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
        return path
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, pa.Table.from_pylist(rows).schema) as writer,
    ):
        writer.write_table(pa.Table.from_pylist(rows), max_chunksize=group)
    return path


def bytes_of(samples: list[Sample]) -> list[list[bytes]]:
    return [[image.read() for image in sample.images] for sample in samples]


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
def test_pictures_inside_beside_and_both(tmp_path: Path, name: str) -> None:
    for number in range(6):
        (tmp_path / f"p{number}.jpg").write_bytes(jpeg(number))
    beside = {"bytes": None, "path": "p3.jpg"}
    for number, images in enumerate((
        [inside(n) for n in range(5)],
        [inside(0), inside(1), inside(2), beside, inside(4)],
        [f"p{n}.jpg" for n in range(5)],
        [jpeg(n) for n in range(5)],
    )):  # fmt: skip
        rows = [{"image": image, "text": f" Number  {n}. "} for n, image in enumerate(images)]
        samples = read(table(tmp_path, rows, name=f"{number}{name}"))
        assert bytes_of(samples) == [[jpeg(n)] for n in range(5)]
        assert [s.messages[1]["content"][0]["text"] for s in samples] == [f"Number {n}." for n in range(5)]
    assert [sample.key for sample in samples] == [f"{n:09d}" for n in range(5)]  # bytes alone have no name


def test_lists_of_pictures_and_conversations(tmp_path: Path) -> None:
    def messages(places: int) -> list[dict[str, Any]]:
        return [
            {"role": "user", "content": "<image>" * places + "How many?"},
            {"role": "assistant", "content": f"{places}"},
        ]

    rows = [
        {"id": f"r{n}", "images": [inside(i) for i in range(n)], "messages": messages(n)} for n in range(4)
    ]
    samples = read(table(tmp_path, rows))
    assert bytes_of(samples) == [[jpeg(i) for i in range(n)] for n in range(4)]
    assert [sample.key for sample in samples] == ["r0", "r1", "r2", "r3"]
    out = tmp_path / "out"
    assert pack(
        READERS["huggingface"](PackInput(tmp_path / "t.parquet")), out, workers=2, samples_per_shard=2
    )
    assert verify(out).bad == []
    again = pack(READERS["huggingface"](PackInput(tmp_path / "t.parquet")), out, samples_per_shard=2)
    assert again.shards_written == 0


def test_parts_of_a_content_as_trl_writes_them(tmp_path: Path) -> None:
    question = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    answer = [{"type": "text", "text": "A bus."}]
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    (sample,) = read(table(tmp_path, [{"messages": said, "images": [inside(1)]}]))
    assert [[part["type"] for part in m["content"]] for m in sample.messages] == [["image", "text"], ["text"]]


def test_turns_as_one_list_a_member(tmp_path: Path) -> None:
    said = {"from": ["human", "gpt"], "value": ["<image>What?", "A bus."]}
    (sample,) = read(table(tmp_path, [{"conversations": said, "image": inside(1)}]))
    assert [part["type"] for part in sample.messages[0]["content"]] == ["image", "text"]


def test_pairs_of_question_and_answer_as_the_cauldron_has_them(tmp_path: Path) -> None:
    texts = [{"user": "What?", "assistant": "A bus.", "source": "x"}, {"user": "And?", "assistant": "No."}]
    (sample,) = read(table(tmp_path, [{"images": [inside(1), inside(2)], "texts": texts}]))
    assert [m["role"] for m in sample.messages] == ["user", "assistant"] * 2
    assert [part["type"] for part in sample.messages[0]["content"]] == ["image", "image", "text"]


def test_questions_and_answers_in_columns_of_their_own(tmp_path: Path) -> None:
    rows = [{"image": inside(1), "question": "What?", "answer": "A bus.", "kind": "x"}]
    (sample,) = read(table(tmp_path, rows))
    assert [part["type"] for part in sample.messages[0]["content"]] == ["image", "text"]
    assert sample.messages[1]["content"][0]["text"] == "A bus."
    (sample,) = read(table(tmp_path, rows), text_column="answer")
    assert sample.messages[0]["content"][1]["text"] == "COCO Yes:"


def test_rows_that_cannot_be_used_are_left_out_when_asked_for(tmp_path: Path) -> None:
    rows = [
        {"image": image, "caption": text}
        for image, text in ((inside(0), "x"), (None, "y"), (inside(2), None))
    ]
    path = table(tmp_path, rows)
    with pytest.raises(UserError, match="row 1 has no picture"):
        read(path)
    assert bytes_of(read(path, allow_missing=True)) == [[jpeg(0)]]
    (tmp_path / "named").mkdir()
    rows = [{"image": name, "caption": "x"} for name in ("data:x", str(tmp_path / "p.jpg"))]
    (tmp_path / "p.jpg").write_bytes(jpeg(3))
    assert bytes_of(read(table(tmp_path / "named", rows), allow_missing=True)) == [[jpeg(3)]]


def test_splits_are_chosen_by_name(tmp_path: Path) -> None:
    import datasets

    def of(*numbers: int) -> datasets.Dataset:
        return datasets.Dataset.from_list([{"image": inside(n), "caption": f"{n}"} for n in numbers])

    datasets.DatasetDict({"train": of(0, 1), "test": of(2)}).save_to_disk(tmp_path / "both")
    assert bytes_of(read(tmp_path / "both", split="test")) == [[jpeg(2)]]
    with pytest.raises(UserError, match=r"splits train, test.*--split"):
        read(tmp_path / "both")
    hub = tmp_path / "hub"
    hub.mkdir()
    for name, part in (("train-0", of(0, 1)), ("test-0", of(2))):
        part.to_parquet(hub / f"{name}.parquet")
    assert [len(read(hub, split=split)) for split in ("train", "test")] == [2, 1]
    with pytest.raises(UserError, match=r"splits test, train: name one of them with --split"):
        read(hub)
    (hub / "test-0.parquet").rename(hub / "train-1.parquet")
    assert len(read(hub)) == 3
    of(0).save_to_disk(tmp_path / "one")
    with pytest.raises(UserError, match="drop --split"):
        read(tmp_path / "one", split="train")


@pytest.mark.parametrize("together", [False, True])
def test_conversations_that_are_stored_as_json(tmp_path: Path, together: bool) -> None:
    """As `datasets` stores turns whose contents differ in kind."""
    import datasets

    if not hasattr(datasets, "Json"):
        pytest.skip("this version of datasets has no JSON columns")
    parts = [{"type": "image"}, {"type": "text", "text": "Find the <ref-object>."}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "<bbox>"}]
    objects = {"ref": ["dog"], "bbox": [[0.1, 0.2, 0.5, 0.9]], "bbox_type": "norm1"}
    kinds = {
        "messages": datasets.Json() if together else datasets.List(datasets.Json()),
        "objects": datasets.Json(),
        "images": datasets.List({"bytes": datasets.Value("binary"), "path": datasets.Value("string")}),
    }
    rows = {"messages": [turns] * 2, "objects": [objects] * 2, "images": [[inside(0)], [inside(1)]]}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "t.parquet")
    for path in (tmp_path / "saved", tmp_path / "t.parquet"):
        samples = read(path)
        assert bytes_of(samples) == [[jpeg(0)], [jpeg(1)]]
        for sample in samples:
            user, assistant = sample.messages
            assert user["content"][0] == {"type": "image"}
            assert user["content"][1]["text"] == "Find the <|object_ref_start|>dog<|object_ref_end|>."
            assert assistant["content"][0]["text"] == "<|box_start|>(100,200),(500,900)<|box_end|>"


def test_a_cell_that_is_no_json_is_one_line(tmp_path: Path) -> None:
    cells = pa.array(['["x"]', '{"role"'], pa.json_())
    pq.write_table(pa.table({"text": cells}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"row 1 has .* in 'text', which is not JSON .*: mend it"):
        read(tmp_path / "t.parquet")


GOOD = {"image": inside(0), "caption": "x"}


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([{"a": 1}], {}, r"has the columns a, none of messages.*--text-column"),
        ([GOOD], {"text_column": "words"}, r"has the columns image, caption, 'words'.*--text-column"),
        ([GOOD], {"image_column": "photo"}, r"'photo'.*--image-column"),
        ([GOOD, {**GOOD, "caption": " "}], {}, r"row 1 has an empty caption"),
        ([GOOD, {**GOOD, "caption": None}], {}, r"row 1 has null in 'caption'"),
        ([GOOD, {**GOOD, "image": None}], {}, r"row 1 has no picture"),
        (
            [GOOD, GOOD, {**GOOD, "image": {"bytes": None, "path": "no.jpg"}}],
            {},
            r"row 2 names .*no\.jpg.*--images",
        ),
        ([{"image": 3, "caption": "x"}], {}, r"row 0 names the picture 3"),
        ([{"images": [], "caption": "x"}], {}, r"row 0 has no picture"),
    ],
)
def test_a_faulty_table_is_one_line(tmp_path: Path, rows: Any, options: dict[str, str], words: str) -> None:
    path = table(tmp_path, rows)
    with pytest.raises(UserError, match=words) as error:
        read(path, **options)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_what_is_no_table_is_one_line(tmp_path: Path) -> None:
    damaged = table(tmp_path, [GOOD])
    damaged.write_bytes(damaged.read_bytes()[:-9])
    (tmp_path / "empty").mkdir()
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{")
    (tmp_path / "a.arrow").write_bytes(b"nothing")
    for name, words in (
        ("t.parquet", "cannot be read"),
        ("a.arrow", "cannot be read"),
        ("gone.parquet", "no such file"),
        ("empty", "holds no .parquet"),
        ("saved", "cannot be opened by datasets"),
    ):
        with pytest.raises(UserError, match=words) as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="fetch it to a folder"):
        read("hf://datasets/x")  # type: ignore[arg-type]


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path, [GOOD])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'qwenvl-dist\[datasets\]'"):
        read(path)
