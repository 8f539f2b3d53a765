import argparse
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import webdataset
from made_coco import jpeg, make_coco
from PIL import Image

from qwenvl_dist.commands import shards
from qwenvl_dist.data import pack as pack_module
from qwenvl_dist.data.formats import ImageRef, Sample, caption_messages, read_coco_captions
from qwenvl_dist.data.index import Manifest, ShardReader, build_shard_index, index_path, load_shard_index
from qwenvl_dist.data.pack import pack
from qwenvl_dist.data.storage import LocalFile
from qwenvl_dist.data.verify import verify
from qwenvl_dist.errors import UserError
from tests.ranks import ROOT


def read(coco) -> list[Sample]:
    return list(read_coco_captions(coco.captions, coco.images, allow_missing=True))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in [folder, *folder.iterdir()]}


def test_bytes_do_not_depend_on_workers_or_place(tmp_path, coco):
    for workers in (1, 2, 5):
        pack(read(coco), tmp_path / str(workers), samples_per_shard=3, workers=workers)
    moved = coco.images.rename(tmp_path / "moved")
    for path in moved.iterdir():
        os.utime(path)
    coco.images = moved
    pack(read(coco), tmp_path / "again", samples_per_shard=3)
    assert (
        content(tmp_path / "1")
        == content(tmp_path / "2")
        == content(tmp_path / "5")
        == content(tmp_path / "again")
    )
    assert sorted(content(tmp_path / "1")) == sorted(
        ["manifest.json"] + [f"shard-{i:06d}.tar{end}" for i in range(4) for end in ("", ".idx")]
    )


def test_manifest_indexes_and_tars_agree(tmp_path, coco):
    report = pack(read(coco), tmp_path / "out", samples_per_shard=4, packing={"source": "coco"})
    manifest = Manifest.load(tmp_path / "out")
    assert manifest == report.manifest
    assert manifest.shard_sizes.tolist() == [4, 4, 2]
    assert manifest.packing == {"source": "coco", "samples_per_shard": 4, "skipped": []}
    for entry in manifest.shards:
        tar = tmp_path / "out" / entry.name
        index = load_shard_index(index_path(tar), entry.index_sha256)
        assert build_shard_index(tar).to_bytes() == index.to_bytes()
    assert verify(tmp_path / "out").bad == []


def test_plain_webdataset_reads_the_original_bytes(tmp_path, coco):
    pack(read(coco), tmp_path / "out", samples_per_shard=4)
    urls = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))  # type: ignore[arg-type]
    assert [sample["__key__"] for sample in samples] == [f"{i:012d}" for i in range(1, 11)]
    for sample in samples:
        assert sample["jpg"] == (coco.images / f"{sample['__key__']}.jpg").read_bytes()
        number = int(sample["__key__"])
        text = f"Picture {number}, told 0.&&Picture {number}, told 1."
        assert json.loads(sample["json"])["messages"] == caption_messages("COCO Yes:", text)


def test_kind_of_picture_goes_by_content(tmp_path, coco):
    for image_id, kind in [(1, "PNG"), (2, "WEBP")]:
        (coco.images / f"{image_id:012d}.jpg").write_bytes(jpeg(image_id, kind=kind))
    pack(read(coco), tmp_path / "out")
    tar = tmp_path / "out" / "shard-000000.tar"
    index = load_shard_index(index_path(tar))
    assert [list(index.members(i)) for i in range(3)] == [["json", "png"], ["json", "webp"], ["jpg", "json"]]
    assert ShardReader(LocalFile(tar), index).read(0).images == [jpeg(1, kind="PNG")]


def test_several_images_and_none(tmp_path):
    refs = []
    for i in range(11):
        (tmp_path / f"{i}").write_bytes(jpeg(i))
        refs.append(ImageRef(tmp_path / f"{i}"))
    samples = [
        Sample("many", caption_messages("p", "a", num_images=11), refs, None, "test"),
        Sample("none", caption_messages("p", "a", num_images=0), [], "id", "test"),
    ]
    pack(samples, tmp_path / "out")
    tar = tmp_path / "out" / "shard-000000.tar"
    reader = ShardReader(LocalFile(tar), load_shard_index(index_path(tar)))
    assert reader.read(0).images == [jpeg(i) for i in range(11)]
    assert reader.read(1).images == []
    assert verify(tmp_path / "out").bad == []
    assert pack(samples, tmp_path / "out").shards_written == 0


def test_a_rerun_over_finished_output_touches_nothing(tmp_path, coco):
    pack(read(coco), tmp_path / "out", samples_per_shard=3)
    before = times(tmp_path / "out")
    report = pack(read(coco), tmp_path / "out", samples_per_shard=3, workers=2)
    assert (report.shards_written, report.shards_kept) == (0, 4)
    assert times(tmp_path / "out") == before


def slow_pack(coco, out: Path) -> None:
    quick = pack_module._read_sample

    def slow(sample):
        time.sleep(0.01)
        return quick(sample)

    pack_module._read_sample = slow
    pack(read(coco), out, samples_per_shard=3, workers=2)


@pytest.mark.parametrize("shards_before_kill", [0, 2, 5])
def test_sigkill_then_rerun_gives_the_same_bytes(tmp_path, shards_before_kill):
    coco = make_coco(tmp_path / "coco", 30)
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=slow_pack, args=(coco, out))
    process.start()
    deadline = time.monotonic() + 30
    while len(list(out.glob("*.tar*"))) <= 2 * shards_before_kill and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    finished = len(list(out.glob("*.tar")))
    assert not (out / "manifest.json").exists()

    report = pack(
        read(coco), out, samples_per_shard=3, workers=2
    )  # at once: orphaned workers must not interfere
    assert report.shards_kept >= min(finished, shards_before_kill) >= shards_before_kill // 2
    assert report.shards_written > 0
    pack(read(coco), tmp_path / "straight", samples_per_shard=3)
    assert content(out) == content(tmp_path / "straight")


def test_missing_and_truncated_parts_are_packed_again(tmp_path, coco):
    out = tmp_path / "out"
    pack(read(coco), out, samples_per_shard=3)
    expected = content(out)
    (out / "shard-000000.tar").unlink()
    (out / "shard-000001.tar.idx").unlink()
    os.truncate(out / "shard-000002.tar", 2000)
    (out / "shard-000003.tar.idx").write_bytes(b"damaged")
    report = pack(read(coco), out, samples_per_shard=3)
    assert (report.shards_written, report.shards_kept) == (2, 2)
    assert content(out) == expected


def test_damage_that_only_a_checksum_shows_is_not_blessed(tmp_path, coco):
    out = tmp_path / "out"
    pack(read(coco), out, samples_per_shard=3)
    with (out / "shard-000001.tar").open("r+b") as file:
        file.seek(600)
        file.write(b"????")
    (out / "shard-000000.tar").unlink()
    manifest = (out / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="verify it"):
        pack(read(coco), out, samples_per_shard=3)
    assert (out / "manifest.json").read_bytes() == manifest


def change_caption(coco):
    coco.content["annotations"][9]["caption"] = "Another."
    coco.write()


def change_picture(coco):
    path = coco.images / "000000000005.jpg"
    data = bytearray(path.read_bytes())
    data[-10] ^= 1  # the same size
    path.write_bytes(data)


def drop_image(coco):
    coco.content["images"].pop()
    del coco.content["annotations"][-2:]
    coco.write()


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("change", [change_caption, change_picture, drop_image])
def test_output_of_another_input_is_refused_and_kept(tmp_path, coco, change, finished):
    out = tmp_path / "out"
    pack(read(coco), out, samples_per_shard=3)
    if not finished:
        (out / "manifest.json").unlink()
        (out / pack_module.UNFINISHED_NAME).touch()
    before = content(out)
    change(coco)
    with pytest.raises(UserError, match=r"another input.*--out"):
        pack(read(coco), out, samples_per_shard=3)
    assert content(out) == before


@pytest.mark.parametrize("name", ["notes.txt", "shard-000000.tar", "manifest.json"])
def test_a_folder_with_other_data_is_refused_and_kept(tmp_path, coco, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("{}")
    with pytest.raises(UserError, match=str(out)):
        pack(read(coco), out)
    assert content(out) == {name: b"{}"}
    with pytest.raises(UserError, match="is a file"):
        pack(read(coco), out / name)


def test_two_packers_do_not_mix(tmp_path, coco, monkeypatch):
    monkeypatch.setattr(pack_module, "LOCK_PATIENCE_SECONDS", 0.1)
    out = tmp_path / "out"
    out.mkdir()
    with (
        pack_module.locked(out / pack_module.UNFINISHED_NAME),
        pytest.raises(UserError, match="another process"),
    ):
        pack(read(coco), out)
    pack(read(coco), out)


def test_parts_and_a_last_look_leave_the_bytes_of_one_packer(tmp_path, coco, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert pack_command(coco, whole) == 0
    context = multiprocessing.get_context("fork")
    parts = [context.Process(target=pack_command, args=(coco, out, "--part", f"{i}/4")) for i in range(4)]
    for part in parts:  # at the same time; the last one has no shard
        part.start()
    for part in parts:
        part.join(60)
    assert [part.exitcode for part in parts] == [0] * 4
    assert not (out / "manifest.json").exists()
    assert {name: data for name, data in content(whole).items() if name.startswith("shard")} == {
        name: data for name, data in content(out).items() if name.startswith("shard")
    }
    written = {name: when for name, when in times(out).items() if name.startswith("shard")}
    (out / "packing.1-of-4.lock").touch()  # of a part that was killed and then done again
    assert pack_command(coco, out) == 0
    assert content(out) == content(whole)
    assert {name: times(out)[name] for name in written} == written
    assert pack_command(coco, out, "--part", "0/4") == 0  # over finished output
    capsys.readouterr()

    # What a part made of other pictures is found by the last look.
    torn = tmp_path / "torn"
    assert pack_command(coco, torn, "--part", "0/2") == 0
    (coco.images / "000000000002.jpg").write_bytes(jpeg(99))
    with pytest.raises(UserError, match="was packed from another input"):
        pack_command(coco, torn)


def test_parts_keep_out_who_packs_the_whole_and_themselves(tmp_path, coco, monkeypatch):
    monkeypatch.setattr(pack_module, "LOCK_PATIENCE_SECONDS", 0.1)
    out = tmp_path / "out"
    out.mkdir()
    with pack_module.locked(out / pack_module.UNFINISHED_NAME, shared=True):
        pack(read(coco), out, samples_per_shard=3, part=(0, 2))
        with pytest.raises(UserError, match="another process"):
            pack(read(coco), out, samples_per_shard=3)
    own = out / pack_module.PART_LOCK.format(1, 2)
    with pack_module.locked(own), pytest.raises(UserError, match="another process"):
        pack(read(coco), out, samples_per_shard=3, part=(1, 2))


@pytest.mark.parametrize("part", ["2/2", "1", "-1/2", "a/b", "/3"])
def test_a_senseless_part_is_refused(tmp_path, coco, part):
    with pytest.raises(UserError, match=r"--part .*must be I/N"):
        pack_command(coco, tmp_path / "out", f"--part={part}")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"no picture", "not a readable picture"),
        (b"", "an empty file"),
        (jpeg(1, kind="PPM"), "PPM"),
        (None, "No such file"),
    ],
)
def test_a_bad_picture_is_named_or_skipped_and_counted(tmp_path, coco, data, reason):
    path = coco.images / "000000000005.jpg"
    path.write_bytes(data) if data is not None else path.unlink()
    out = tmp_path / "out"
    with pytest.raises(UserError, match=rf"000000000005\.jpg.*{reason}.*--skip-bad"):
        pack(read(coco), out, samples_per_shard=3, workers=2)
    assert not (out / "manifest.json").exists()

    report = pack(read(coco), out, samples_per_shard=3, skip_bad=True)
    assert [bad.key for bad in report.skipped] == ["000000000005"]
    manifest = Manifest.load(out)
    assert manifest.shard_sizes.tolist() == [3, 2, 3, 1]
    assert [bad["key"] for bad in manifest.packing["skipped"]] == ["000000000005"]
    assert verify(out).bad == []
    again = pack(read(coco), out, samples_per_shard=3, skip_bad=True)
    assert (again.shards_written, again.skipped) == (0, report.skipped)
    path.write_bytes(jpeg(5))
    with pytest.raises(UserError, match="lacks 000000000005"):
        pack(read(coco), out, samples_per_shard=3, skip_bad=True)


def test_a_disk_that_takes_no_more_is_one_line_and_leaves_no_half_shard(tmp_path, coco):
    Image.effect_noise((400, 400), 90).save(coco.images / "000000000005.jpg")
    out = tmp_path / "out"
    words = [sys.executable, "-m", "qwenvl_dist", "shards", "pack", "--source", "coco", "--workers", "2"]
    words += ["--captions", coco.captions, "--images", coco.images, "--out", out, "--samples-per-shard", "2"]

    def most_bytes() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    done = subprocess.run(words, capture_output=True, text=True, preexec_fn=most_bytes, cwd=ROOT, check=False)
    assert done.returncode == 1, done.stderr
    assert "File too large: once that is mended" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(out.glob("*.tmp")) and not (out / "manifest.json").exists()
    assert (out / "shard-000000.tar").exists()
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0 and "kept from an earlier run" in done.stderr
    assert verify(out).bad == []
    with pytest.raises(UserError, match=r"x: cannot be written \(Not a directory\); choose another --out"):
        pack(read(coco), coco.captions / "x")


def test_a_shard_of_nothing_but_bad_pictures_is_empty(tmp_path, coco):
    for image_id in (4, 5, 6):
        (coco.images / f"{image_id:012d}.jpg").unlink()
    pack(read(coco), tmp_path / "out", samples_per_shard=3, skip_bad=True)
    assert Manifest.load(tmp_path / "out").shard_sizes.tolist() == [3, 0, 3, 1]
    assert verify(tmp_path / "out").bad == []


def test_a_picture_of_too_many_pixels_is_refused(tmp_path, coco, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="more than 100 pixels"):
        pack(read(coco), tmp_path / "out")


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "../a", "/a", "ä", "x" * 81])
def test_unsafe_keys_are_refused(tmp_path, key):
    with pytest.raises(UserError, match="unsafe"):
        pack([Sample(key, [], [], None, "test")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_repeated_keys_and_senseless_numbers_are_refused(tmp_path, coco):
    sample = read(coco)[0]
    for samples, options, words in [
        ([sample, sample], {}, "keys must differ"),
        ([], {}, "nothing to pack"),
        ([sample], {"samples_per_shard": 0}, "--samples-per-shard 0"),
        ([sample], {"workers": 0}, "--workers 0"),
    ]:
        with pytest.raises(UserError, match=words):
            pack(samples, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    shards.add_parser(parser.add_subparsers())
    args = parser.parse_args([str(word) for word in ("shards", *words)])
    return args.run(args)


def pack_command(coco, out: Path, *more: object) -> int:
    paths = ("--captions", coco.captions, "--images", coco.images, "--out", out)
    return run("pack", "--source", "coco", *paths, "--samples-per-shard", 4, *more)


def test_commands_pack_verify_and_show(tmp_path, coco, capsys, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setenv("COLUMNS", "70")
    assert pack_command(coco, out) == 0
    assert "10 samples in 3 shards" in capsys.readouterr().err
    assert pack_command(coco, out) == 0
    assert "nothing to do" in capsys.readouterr().err

    assert run("show", out, "--limit", 5) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(len(line) <= 70 for line in lines)
    assert lines[4].split()[:3] == ["shard-000001.tar", "000000000005", "21x16"]
    assert "Picture 5" in lines[4]

    assert run("verify", out, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"shards": 3, "samples": 10, "bad": []}
    (out / "shard-000001.tar").unlink()
    assert run("verify", out, "--json", "--workers", 2) == 1
    printed = capsys.readouterr()
    bad = json.loads(printed.out.splitlines()[-1])["bad"]
    assert bad == [
        {"shard": "shard-000001.tar", "key": f"{i:012d}", "reason": "missing shard file"}
        for i in (5, 6, 7, 8)
    ]
    assert "000000000005, 000000000006, 000000000007 and 1 more" in printed.err


def test_command_skips_bad_pictures_and_names_them(tmp_path, coco, capsys):
    (coco.images / "000000000002.jpg").unlink()
    with pytest.raises(UserError, match="image 2 "):
        pack_command(coco, tmp_path / "out")
    assert pack_command(coco, tmp_path / "out", "--skip-bad") == 0
    assert "left out 000000000002" in capsys.readouterr().err


def test_command_skips_captions_that_cannot_be_used_and_pictures_without_one(tmp_path, coco):
    captions = coco.content["annotations"]
    captions[0]["caption"] = None  # the first of image 1, which has another
    for caption in captions:
        if caption["image_id"] in (2, 3):
            caption["caption"] = " " if caption["image_id"] == 2 else caption["caption"]
    coco.write(annotations=[caption for caption in captions if caption["image_id"] != 3])
    with pytest.raises(UserError, match=r"annotations\[0\], of image 1, is .* it needs a 'caption'"):
        pack_command(coco, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert pack_command(coco, tmp_path / "out", "--skip-bad") == 0
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.samples == len(coco.content["images"]) - 2
    skipped = [bad["key"].removeprefix(f"{coco.captions}: ") for bad in manifest.packing["skipped"]]
    assert skipped[0] == "annotations[0], of image 1"
    assert [place.rpartition("of ")[2] for place in skipped[1:-2]] == ["image 2"] * len(skipped[1:-2])
    assert skipped[-2:] == ["image 2 ('000000000002.jpg')", "image 3 ('000000000003.jpg')"]
    coco.write(annotations=[])
    with pytest.raises(UserError, match="no image has a caption that can be used"):
        pack_command(coco, tmp_path / "none", "--skip-bad")


def test_the_real_photos_pack_and_verify(tmp_path, real_coco):
    samples = list(read_coco_captions(real_coco / "captions.json", real_coco / "images"))
    out = tmp_path / "out"
    report = pack(samples, out, samples_per_shard=64, workers=2)
    assert (len(report.manifest.shards), report.manifest.samples) == (5, 290)
    assert verify(out, workers=2).bad == []
    urls = sorted(str(path) for path in out.glob("*.tar"))
    num_captions = 0
    for sample in webdataset.WebDataset(urls, shardshuffle=False):  # type: ignore[arg-type]
        assert sample["jpg"] == (real_coco / "images" / f"{sample['__key__']}.jpg").read_bytes()
        text = json.loads(sample["json"])["messages"][1]["content"][0]["text"]
        num_captions += len(text.split("&&"))
    assert num_captions == 1451
