"""Shards of other programs: indexed where they lie, read as our own, not a byte of them changed."""

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from made_coco import jpeg

from qwenvl_dist.__main__ import main
from qwenvl_dist.data.formats import TextRules, caption_messages, parse_sample_json
from qwenvl_dist.data.index import Manifest, ShardReader, load_shard_index
from qwenvl_dist.data.plan import Place
from qwenvl_dist.data.reindex import ReindexReport, reindex
from qwenvl_dist.data.source import ShardSet
from qwenvl_dist.data.verify import verify
from qwenvl_dist.errors import UserError

Members = dict[str, bytes]
RULES = TextRules()


def write_tar(path: Path, samples: dict[str, Members]) -> Path:
    """As `tar` does it: owners, times, GNU headers, blocks of 10 KiB."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for key, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size, info.mtime, info.uname, info.mode = len(data), 1_700_000_000, "ann", 0o640
                archive.addfile(info, io.BytesIO(data))
    return path


def jpg_txt(number: int, text: str = "") -> Members:
    text = text or f" Picture  {number},\n told 0. && Picture {number}, told 1.\n"
    return {"jpg": jpeg(number), "txt": text.encode()}


def index(folder: Path, **options: Any) -> ReindexReport:
    return reindex(folder, rules=options.pop("rules", RULES), **options)


def tars(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("*.tar")}


def messages(folder: Path) -> dict[str, Any]:
    """Return each sample's messages as training reads them."""
    shards, found = ShardSet(folder), {}
    for number, entry in enumerate(shards.manifest.shards):
        for sample in range(entry.samples):
            raw = shards.read(Place(number, sample))
            found[raw.key] = parse_sample_json(raw.json, len(raw.images))["messages"]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven samples of jpg + txt in three shards."""
    folder = tmp_path / "wds"
    folder.mkdir()
    for shard, numbers in enumerate([(1, 2, 3), (4, 5, 6), (7,)]):
        write_tar(folder / f"{shard:05d}.tar", {f"{n:09d}": jpg_txt(n) for n in numbers})
    return folder


def test_jpg_and_txt_read_as_packed_captions_and_the_tars_stay(folder: Path) -> None:
    before = tars(folder)
    report = index(folder, workers=2)
    assert (report.is_new, report.manifest.samples, report.skipped) == (True, 7, [])
    assert tars(folder) == before
    assert messages(folder) == {
        f"{n:09d}": caption_messages("COCO Yes:", f"Picture {n}, told 0.&&Picture {n}, told 1.")
        for n in range(1, 8)
    }
    raw = ShardSet(folder).read(Place(0, 0))
    assert json.loads(raw.json) | {"messages": 0} == {"messages": 0, "image_id": 1, "source": "webdataset"}
    assert raw.images == [jpeg(1)]
    assert verify(folder, workers=2).bad == []
    shard = load_shard_index(folder / "00000.tar.idx")
    assert shard.caption_lengths.tolist() == [len("Picture 1, told 0.&&Picture 1, told 1.")] * 3
    assert shard.images(0).tolist() == [[24, 16]]


def test_indexing_again_does_nothing_and_other_options_are_other_data(folder: Path) -> None:
    first = index(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert not index(folder).is_new
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    with pytest.raises(UserError, match=r"other options.*remove it"):
        index(folder, rules=TextRules(prompt="Describe:"))
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    (folder / "manifest.json").unlink()
    second = index(folder, rules=TextRules(prompt="Describe:"))
    assert second.manifest.fingerprint != first.manifest.fingerprint
    assert messages(folder)["000000001"][0]["content"][1]["text"] == "Describe:"
    (folder / "00001.tar.idx").unlink()
    assert [fault.reason for fault in verify(folder).bad] == ["missing index file 00001.tar.idx"]
    assert index(folder, rules=TextRules(prompt="Describe:")).is_new  # puts it back
    assert verify(folder).bad == []


def test_jpg_and_json_by_caption_field_or_conversation(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nCOCO Yes:"}, {"from": "gpt", "value": " A  bus."}]
    said = [{"role": "user", "content": "<image>COCO Yes:"}, {"role": "assistant", "content": "A bus."}]
    for number, (record, options) in enumerate([
        ({"caption": "A bus. "}, {}),
        ({"captions": ["A bus."], "url": "x"}, {}),
        ({"text": "A bus.", "alt": "no"}, {}),
        ({"alt": "A bus.", "caption": "no"}, {"caption_field": "alt"}),
        ({"conversations": turns, "image": "elsewhere.jpg"}, {}),
        ({"messages": said, "images": ["elsewhere.jpg"]}, {}),
        ({"messages": [{"role": "user", "content": "COCO Yes:"}, said[1]]}, {}),
        ({"messages": caption_messages("COCO Yes:", "A bus.")}, {}),
    ]):  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        members = {"jpg": jpeg(1), "json": json.dumps(record).encode(), "cls": b"3", "__url__": b""}
        write_tar(folder / "a.tar", {"one": members, "two": members})
        index(folder, **options)
        assert messages(folder) == dict.fromkeys(("one", "two"), caption_messages("COCO Yes:", "A bus.")), (
            record
        )
        assert verify(folder).bad == []


def test_shares_beside_a_conversation_are_filled_in_and_pixels_refused(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>Find the <ref-object>."}, {"from": "gpt", "value": "<bbox>"}]

    def write(objects: Any) -> Path:
        record = {"conversations": turns, "objects": {"ref": ["dog"], **objects}}
        return write_tar(tmp_path / "a.tar", {"one": {"jpg": jpeg(1), "json": json.dumps(record).encode()}})

    tar = write({"bbox": [[1, 2, 5, 9]]})
    with pytest.raises(UserError, match=r"one: json: has boxes in pixels in 'objects'.*shards pack"):
        index(tmp_path)
    assert list(tmp_path.iterdir()) == [tar]
    write({"bbox": [[0.1, 0.2, 0.5, 1]], "bbox_type": "norm1"})
    index(tmp_path)
    (found,) = messages(tmp_path).values()
    assert [part.get("text") for message in found for part in message["content"]] == [
        None,
        "Find the <|object_ref_start|>dog<|object_ref_end|>.",
        "<|box_start|>(100,200),(500,999)<|box_end|>",
    ]


def test_text_alone_and_several_pictures(tmp_path: Path) -> None:
    said = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]}
    two = {"messages": [{"role": "user", "content": "<image><image>?"}, said["messages"][1]]}
    samples = {
        "none": {"json": json.dumps(said).encode()},
        "two": {"0.jpg": jpeg(0), "1.png": jpeg(1, kind="PNG"), "json": json.dumps(two).encode()},
    }
    write_tar(tmp_path / "a.tar", samples)
    index(tmp_path)
    assert [len(m[0]["content"]) for m in messages(tmp_path).values()] == [1, 3]
    assert verify(tmp_path).bad == []


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_pictures_of_every_kind_are_seen(tmp_path: Path, kind: str) -> None:
    extension = {"TIFF": "TIF"}.get(kind, kind)
    members = {extension: jpeg(1, kind=kind), "txt": "\ufeffA bus.".encode()}
    write_tar(tmp_path / "a.tar", {"one": members})
    index(tmp_path)
    assert messages(tmp_path) == {"one": caption_messages("COCO Yes:", "A bus.")}
    assert verify(tmp_path).bad == []


def test_shards_with_the_same_keys_get_their_names_in_front(tmp_path: Path) -> None:
    for shard in "ab":
        write_tar(tmp_path / f"{shard}.tar", {f"{n:03d}": jpg_txt(n) for n in range(3)})
    index(tmp_path)
    assert list(messages(tmp_path)) == [f"{shard}/{n:03d}" for shard in "ab" for n in range(3)]
    assert verify(tmp_path).bad == []
    assert not index(tmp_path).is_new
    damaged = bytearray((tmp_path / "a.tar").read_bytes())
    damaged[load_shard_index(tmp_path / "a.tar.idx").members(1)["jpg"].offset + 5] ^= 1
    (tmp_path / "a.tar").write_bytes(damaged)
    assert [fault.key for fault in verify(tmp_path).bad] == ["a/001"]


def broken(**changes: Any) -> Any:
    def change(samples: dict[str, Members]) -> None:
        samples["two"].update(changes)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (broken(jpg=b"no picture"), "two: not a readable picture"),
        (broken(txt=b" \n"), "two: txt: has an empty caption"),
        (broken(txt=b"\xff"), "two: txt: 'utf-8' codec"),
        (broken(txt=b"A <bbox>."), "two: txt: has <bbox> in a text and no 'objects'"),
        (lambda samples: samples["two"].pop("txt"), "two: txt: missing member"),
        (
            lambda samples: samples["two"].pop("jpg"),
            "two: txt: is the caption of a picture, none lies beside it",
        ),
    ],
)
def test_a_sample_that_cannot_be_used_is_named_or_left_out(tmp_path: Path, change: Any, reason: str) -> None:
    samples = {name: jpg_txt(number) for number, name in enumerate(("one", "two", "three"))}
    change(samples)
    tar = write_tar(tmp_path / "a.tar", samples)
    with pytest.raises(UserError) as error:
        index(tmp_path)
    assert f"{tar}: {reason}" in str(error.value) and "--skip-bad" in str(error.value)
    assert list(tmp_path.iterdir()) == [tar]
    report = index(tmp_path, skip_bad=True)
    assert [bad.key for bad in report.skipped] == ["two"]
    assert list(messages(tmp_path)) == ["one", "three"]
    assert Manifest.load(tmp_path).packing["skipped"] == [{"key": "two", "reason": report.skipped[0].reason}]
    assert verify(tmp_path).bad == []


@pytest.mark.parametrize(
    ("members", "options", "words"),
    [
        ({"jpg": b"x"}, {}, "has the members jpg, no 'json'.*--text-member"),
        ({"jpg": b"x", "txt": b"x"}, {"member": "cap"}, "no 'cap'.*--text-member"),
        ({"txt": b"x"}, {"member": "txt", "caption_field": "a"}, "--caption-field a.*drop one"),
        ({"json": b"{"}, {}, "not JSON.*mend it"),
        ({"json": b'{"a": 1}'}, {}, "has a, none of caption.*--caption-field"),
        ({"json": b'{"caption": 3}'}, {}, "has 3 for 'caption'"),
        ({"features": b"x", "json": b"{}"}, {}, "vision features"),
    ],
)
def test_texts_that_cannot_be_found_are_named(
    tmp_path: Path, members: Members, options: dict[str, str], words: str
) -> None:
    tar = write_tar(tmp_path / "a.tar", {"one": members})
    with pytest.raises(UserError, match=words):
        index(tmp_path, **options)
    assert list(tmp_path.iterdir()) == [tar]


def test_folders_that_cannot_be_indexed(tmp_path: Path) -> None:
    for folder, words in (
        ("s3://a/b", "is a URL"),
        (tmp_path / "no", "no such folder"),
        (tmp_path, "no .tar"),
    ):
        with pytest.raises(UserError, match=words):
            index(folder)  # type: ignore[arg-type]
    write_tar(tmp_path / "a.tar", {})
    with pytest.raises(UserError, match="holds no sample in its 1 tars"):
        index(tmp_path)
    tar = write_tar(tmp_path / "a.tar", {"one": jpg_txt(1)})
    with pytest.raises(UserError, match="is a file; name the folder"):
        index(tar)
    for name in ("b.tar.gz", "b.tgz", "b.tar.zst"):
        (tmp_path / name).write_bytes(gzip.compress(tar.read_bytes()))
        with pytest.raises(UserError, match=rf"{name}, in which no sample.*unpack"):
            index(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "a.tar.idx").write_text("of another program")
    with pytest.raises(UserError, match=r"a.tar.idx.*move it away"):
        index(tmp_path)
    (tmp_path / "a.tar.idx").unlink()
    tar.write_bytes(tar.read_bytes()[:700])
    with pytest.raises(UserError, match=r"a\.tar"):
        index(tmp_path)
    assert list(tmp_path.iterdir()) == [tar]


def test_the_command_indexes_and_shows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "index", str(folder), "--prompt", "Describe:"]) == 0
    assert "indexed 7 samples in 3 shards" in capsys.readouterr().err
    assert main(["shards", "show", str(folder), "--limit", "1"]) == 0
    assert "Picture 1, told 0.&&Picture 1, told 1." in capsys.readouterr().out
    assert main(["shards", "verify", str(folder)]) == 0
    reader = ShardReader(
        ShardSet(folder).storage.open("00000.tar"), load_shard_index(folder / "00000.tar.idx")
    )
    assert json.loads(reader.read_member(0, "json"))["messages"][0]["content"][1]["text"] == "Describe:"
