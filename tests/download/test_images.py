"""`download images`, against a server on localhost that resets, cuts, limits and lies."""

import csv
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from qwenvl_dist.__main__ import main
from qwenvl_dist.data import storage
from qwenvl_dist.data.storage import ReadPolicy
from qwenvl_dist.download import images
from qwenvl_dist.download.images import fetch_images
from qwenvl_dist.download.url_list import UrlList, file_name
from qwenvl_dist.errors import UserError
from tests.http_server import FileServer
from tests.ranks import ROOT

QUICK = ReadPolicy(timeout_seconds=0.5, retries=3)
NAMES = [f"photo-{number}.jpg" for number in range(12)]


def jpeg(seed: int, side: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 50 + seed).convert("RGB").save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setattr(storage, "FIRST_PAUSE_SECONDS", 0.01)
    folder = tmp_path / "web"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        (folder / name).write_bytes(jpeg(number))
    with FileServer(folder) as server:
        yield server


def listed(server: FileServer, folder: Path, names: list[str] = NAMES) -> UrlList:
    path = folder / "urls.txt"
    path.write_text("# photos\n\n" + "".join(f"{server.url}/{name}\n" for name in names))
    return UrlList(path)


def failed(out: Path) -> dict[str, str]:
    path = out / "failed.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {entry["url"].rpartition("/")[2]: entry["reason"] for entry in map(json.loads, lines)}


def test_two_at_once_in_one_folder_is_refused(server: FileServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    urls = listed(server, tmp_path)
    server.fail(NAMES[0], "stall")
    first = threading.Thread(target=fetch_images, args=(urls, out), kwargs={"policy": ReadPolicy(2, 3)})
    first.start()
    while not server.count(NAMES[0]):
        time.sleep(0.01)
    with pytest.raises(UserError, match="another download is at work in it"):
        fetch_images(urls, out, policy=QUICK)
    server.heal()
    first.join()
    assert fetch_images(urls, out, policy=QUICK).kept == len(NAMES)


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_csv_lists_of_every_usual_kind(server: FileServer, tmp_path: Path, mark: str) -> None:
    path = tmp_path / "urls.csv"
    long = "x" * 200_000
    rows = [f'{server.url}/{NAMES[0]}{mark}"a{mark} b"', f"{server.url}/{NAMES[1]}{mark}{long}"]
    path.write_text("\ufeff" + "\r\n".join([f"image_path{mark} caption", *rows, ""]))
    assert fetch_images(UrlList(path, "image_path"), tmp_path / "out", policy=QUICK).fetched == 2
    lines = (tmp_path / "out" / "captions.csv").read_text().splitlines()
    assert next(csv.reader(lines[1:2])) == [NAMES[0], f"a{mark} b"]
    assert lines[2] == f"{NAMES[1]},{long}"
    path.write_text(f'image_path,caption\n{server.url}/{NAMES[0]},"a\n{server.url}/{NAMES[1]},b\n')
    with pytest.raises(UserError, match="is not CSV"):
        fetch_images(UrlList(path, "image_path"), tmp_path / "other", policy=QUICK)


def test_pictures_arrive_whole_whatever_the_server_does(server: FileServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    faults = ["reset", "short", "429", "503", "html", "stall", "etag", "redirect"]
    for name, fault in zip(NAMES, faults, strict=False):
        server.fail(name, fault, 1)
    report = fetch_images(listed(server, tmp_path), out, connections=4, policy=QUICK)
    assert (report.fetched, report.kept, report.failed) == (12, 0, 0)
    assert all((out / name).read_bytes() == (server.folder / name).read_bytes() for name in NAMES)
    assert failed(out) == {} and not list(out.glob("*.part"))


def test_what_cannot_be_had_is_named_and_the_rest_arrives(server: FileServer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (server.folder / NAMES[0]).unlink()
    server.fail(NAMES[1], "403")
    server.fail(NAMES[2], "429")
    server.fail(NAMES[3], "html")
    cut = jpeg(4)[:-300]  # lies like this on the server: its length agrees with what it says
    (server.folder / NAMES[4]).write_bytes(cut)
    (server.folder / NAMES[5]).write_bytes(b"")
    server.fail(NAMES[6], "reset")
    report = fetch_images(listed(server, tmp_path), out, connections=4, policy=QUICK)
    assert (report.fetched, report.failed) == (5, 7)
    reasons = failed(out)
    assert reasons[NAMES[0]] == "no such file (404)"
    assert "answers 403" in reasons[NAMES[1]]
    assert "answers 429" in reasons[NAMES[2]] and "tried 4 times" in reasons[NAMES[2]]
    assert reasons[NAMES[3]] == "no picture but a page of text"
    assert "truncated" in reasons[NAMES[4]]
    assert reasons[NAMES[5]] == "the file is empty"
    assert "the connection broke off" in reasons[NAMES[6]]
    assert sorted(path.name for path in out.glob("*.jpg")) == sorted(name for name in NAMES[7:])
    assert server.count(NAMES[0]) == 1, "a 404 does not get better"

    # the server gets well: only what failed is asked for again
    for number, name in enumerate(NAMES[:7]):
        (server.folder / name).write_bytes(jpeg(number))
    server.heal()
    server.requests.clear()
    report = fetch_images(listed(server, tmp_path), out, connections=4, policy=QUICK)
    assert (report.fetched, report.kept, report.failed) == (7, 5, 0)
    assert set(server.counts()) == set(NAMES[:7]) and failed(out) == {}


def test_a_picture_that_is_gone_or_half_is_fetched_again(server: FileServer, tmp_path: Path) -> None:
    out, urls = tmp_path / "out", listed(server, tmp_path)
    fetch_images(urls, out, policy=QUICK)
    (out / NAMES[3]).unlink()
    (out / NAMES[4]).write_bytes(b"half")
    (out / "x.jpg.part").write_bytes(b"left by a kill")
    record = out / "images.jsonl"
    record.write_bytes(record.read_bytes()[:-40])  # the last line cut by a kill: its picture is fetched again
    report = fetch_images(urls, out, policy=QUICK)
    assert (report.fetched, report.kept) == (3, 9) and not (out / "x.jpg.part").exists()
    assert all((out / name).read_bytes() == (server.folder / name).read_bytes() for name in NAMES)
    assert fetch_images(urls, out, policy=QUICK).kept == 12


def test_after_a_kill_every_file_is_whole_and_none_is_fetched_twice(
    server: FileServer, tmp_path: Path
) -> None:
    out, urls = tmp_path / "out", listed(server, tmp_path)
    server.chunk_seconds = 0.15  # after the first 64 KiB: the end of a picture is long in coming
    for number, name in enumerate(NAMES):
        (server.folder / name).write_bytes(jpeg(number, 640))
    words = ["download", "images", "--urls", str(urls.path), "--out", str(out), "--connections", "2"]
    process = subprocess.Popen([sys.executable, "-m", "qwenvl_dist", *words], cwd=ROOT)
    try:
        deadline = time.monotonic() + 30
        while len(list(out.glob("*.jpg"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    left = {path.name for path in out.glob("*.jpg")}
    assert 4 <= len(left) < 12
    assert all((out / name).read_bytes() == (server.folder / name).read_bytes() for name in left)
    server.chunk_seconds = 0
    time.sleep(0.5)  # until the server has noticed, and noted, whom it was answering
    server.requests.clear()
    report = fetch_images(urls, out, policy=QUICK)
    assert report.kept >= len(left) - 2 and report.failed == 0  # two could be between name and record
    assert sum(server.counts().values()) == report.fetched == 12 - report.kept
    assert all((out / name).read_bytes() == (server.folder / name).read_bytes() for name in NAMES)


def test_no_more_requests_at_a_time_than_allowed(server: FileServer, tmp_path: Path) -> None:
    now, most, lock = [0], [0], threading.Lock()
    real = server.next_fault

    def counted(name: str) -> str:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.03)
        with lock:
            now[0] -= 1
        return real(name)

    server.next_fault = counted  # type: ignore[method-assign]
    fetch_images(listed(server, tmp_path), tmp_path / "out", connections=3, policy=QUICK)
    assert most[0] == 3


def test_a_servers_wish_to_be_left_alone_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", pauses.append)

    def refuse() -> None:
        raise storage.TransientError("429", storage._wish_seconds("40"))

    with pytest.raises(storage.StorageError):
        ReadPolicy(1, 1, longest_wish_seconds=300).run(refuse)
    with pytest.raises(storage.StorageError):
        ReadPolicy(1, 1).run(refuse)
    assert pauses == [40, storage.LONGEST_PAUSE_SECONDS], "a loader does not wait as long as a download"
    from email.utils import formatdate

    assert 55 < storage._wish_seconds(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert storage._wish_seconds("soon") == storage._wish_seconds("") == 0


def test_a_csv_keeps_its_rows_with_names_of_files(server: FileServer, tmp_path: Path) -> None:
    path, out = tmp_path / "coco.csv", tmp_path / "out"
    rows = [[f"{server.url}/{NAMES[i // 2]}", f"caption {i}, with a comma"] for i in range(8)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["image_path", "caption"], *rows])
    server.fail(NAMES[1], "404")
    assert main(["download", "images", "--urls", str(path), "--out", str(out)]) == 1
    with (out / "captions.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["image_path", "caption"],
            *([NAMES[i // 2], f"caption {i}, with a comma"] for i in (0, 1, 4, 5, 6, 7)),
        ]
    assert server.count(NAMES[0]) == 1, "a picture of several rows is fetched once"


def test_pictures_that_end_alike_do_not_overwrite_each_other(server: FileServer, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (server.folder / folder).mkdir()
        (server.folder / folder / "1.jpg").write_bytes(jpeg(ord(folder)))
    out = tmp_path / "out"
    fetch_images(listed(server, tmp_path, ["a/1.jpg", "b/1.jpg", "a/1.jpg", NAMES[0]]), out, policy=QUICK)
    entries = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    assert len({entry["file"] for entry in entries}) == 3
    for entry in entries:
        name = entry["url"].removeprefix(f"{server.url}/")
        assert (out / entry["file"]).read_bytes() == (server.folder / name).read_bytes()


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://h/a/b.jpg?sig=1", "b.jpg"),
        ("http://h/%2e%2e%2f%2e%2e%2fetc/passwd", "passwd"),
        ("http://h/x/..%2F..%2Fboot.sh", "boot.sh"),
        ("http://h/.hidden.jpg", "hidden.jpg"),
        ("http://h/图.jpg", "_.jpg"),
        ("http://h/photo%201.jpg", "photo_1.jpg"),
    ],
)
def test_names_stay_inside_the_folder(url: str, name: str) -> None:
    assert file_name(url, set()) == name
    assert file_name(url, {name}) != name and "/" not in file_name(url, {name})


def test_no_picture_takes_a_name_of_ours() -> None:
    assert file_name("http://h/images.jsonl", set()).startswith("images-")


def test_a_picture_without_end_is_given_up(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 1 << 20)
    (server.folder / NAMES[0]).write_bytes(bytes(3 << 20))
    fetch_images(listed(server, tmp_path, NAMES[:2]), tmp_path / "out", policy=QUICK)
    assert failed(tmp_path / "out") == {NAMES[0]: "larger than 1 MiB"}


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ("photo.jpg\n", [], "line 1: 'photo.jpg' is no http(s) URL of a file"),
        ("# none\n", [], "names no picture"),
        ("a,b\n1,2\n", ["--column", "url"], "has no column 'url', its columns are a, b"),
        ("http://h/a.jpg\n", ["--connections", "0"], "--connections 0: must be at least 1"),
        ("http://h/a.jpg\n", ["--timeout-seconds", "0"], "--timeout-seconds 0: must be above 0"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, words: list[str], message: str
) -> None:
    path = tmp_path / "list"
    path.write_text(content)
    with pytest.raises(SystemExit) as left:
        main(["download", "images", "--urls", str(path), "--out", str(tmp_path / "out"), *words])
    assert left.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_things_is_left_alone(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "photo-0.jpg").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"holds other data \(photo-0\.jpg\)"):
        fetch_images(listed(server, tmp_path), tmp_path / "out")
    assert (tmp_path / "out" / "photo-0.jpg").read_bytes() == b"mine"
