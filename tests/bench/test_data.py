"""`bench data` on scenes: what it reports is there, positive, and the ratios are those of its own numbers."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwenvl_dist.__main__ import main
from qwenvl_dist.bench import data, rivals
from qwenvl_dist.bench.data import Lane
from qwenvl_dist.data.sizes import ImageSizeRule

RATES = (
    "decode", "decode_resize", "sample", "decode_workers", "loader", "hub_fast", "hub_pil", "plain_webdataset",
)  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[dict[str, Any], str]:
    assert main(["bench", "data", *map(str, arguments), "--json"]) == 0
    said = capsys.readouterr()
    return json.loads(said.out.splitlines()[-1]), said.err


@pytest.mark.parametrize("image_size", ["56", "784,3136"])
def test_every_path_is_measured(
    scene_shards: Path, scenes_base: Path, capsys: pytest.CaptureFixture[str], image_size: str
) -> None:
    report, table = run(
        capsys, "--shards", scene_shards, "--base", scenes_base, "--workers", "2", "--seconds", "0.3",
        "--rounds", "2", "--image-size", image_size,
    )  # fmt: skip
    assert all(report[f"{name}_per_second"] > 0 for name in RATES)
    stream = report["loader_per_second"]
    for ratio, rival in {
        "share_of_decode": "decode_workers",
        "ratio_to_hub_fast": "hub_fast",
        "ratio_to_hub_pil": "hub_pil",
        "ratio_to_plain_webdataset": "plain_webdataset",
    }.items():
        assert report[ratio] == pytest.approx(stream / report[f"{rival}_per_second"], rel=0.02), ratio
    per_core = report["dataset_map_per_second"]
    if per_core is None:
        assert "dataset_map is left out" in table
        assert report["ratio_to_dataset_map_per_core"] is None
    else:
        assert report["ratio_to_dataset_map_per_core"] == pytest.approx(stream / 2 / per_core, rel=0.02)
        one = report["sample_per_second"] / per_core
        assert report["sample_ratio_to_dataset_map"] == pytest.approx(one, rel=0.02)
    assert len(report["worker_peak_rss_mib"]) == report["workers"] == 2
    assert "the data stream, to the training process" in table


def test_without_the_datasets_library_its_path_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    lanes = {"loader": Lane(endless(2)), "dataset_map": Lane(rivals.dataset_map([], None, 28))}
    data._take_turns(lanes, rounds=2, seconds=0.001)
    assert list(lanes) == ["loader"]
    report = data._report(lanes | {"hub_fast": lanes["loader"]}, workers=3)
    assert report["dataset_map_per_second"] is None and report["ratio_to_dataset_map_per_core"] is None
    assert report["ratio_to_hub_fast"] == 1


def endless(pictures: int) -> Iterator[int]:
    while True:
        yield pictures


@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_the_hubs_processors_get_the_streams_picture_size(shared_data: Path, backend: str) -> None:
    """Else they would be timed on larger pictures: most photos are four times the area of 280x280."""
    base = shared_data / "qwen2vl" / "Qwen2-VL-7B-Instruct"
    processor = rivals.hub_processor(base, ImageSizeRule(side=280), backend)
    messages = [{"role": "user", "content": [{"type": "image"}]}]
    photos = [Image.new("RGB", size) for size in ((640, 480), (427, 640), (500, 500))]
    batch = rivals.HubCollate(processor)([(messages, [photo]) for photo in photos])
    tokens = batch["image_grid_thw"].prod(dim=1) // 4
    assert (tokens <= 100).all() and (tokens >= 80).all()  # ours: 100


def test_a_turn_does_not_count_what_was_made_before_it() -> None:
    drawn = []

    def counts() -> Iterator[int]:
        for number in range(1_000_000):
            drawn.append(number)
            yield 1000 if number < 3 else 0

    lane = Lane(counts(), ready=3)
    lane.take_turn(0.001)
    assert len(drawn) > 3 and lane.rates == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--seconds", "0"], "--seconds 0: must be above 0"),
        (["--image-size", "57"], "--image-size 57: must be a positive multiple of 28"),
    ],
)
def test_wrong_numbers_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "data", "--shards", "nowhere", "--base", "nothing", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
