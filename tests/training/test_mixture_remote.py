"""A mixture of which one set lies behind http: the same run as from folders, and what is lost is named with its set."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qwenvl_dist.data.index import Manifest, index_path, load_shard_index
from qwenvl_dist.files import sha256_of
from tests.http_server import FileServer
from tests.ranks import run_ranks
from tests.report.made_run import keys_of
from tests.training.runs import TIMEOUT, ledger, losses, read_lines, write_recipe
from tests.training.test_mixture import damaged_copy

pytestmark = pytest.mark.dist
FAR, NEAR = 40, 12  # samples: the set that a server has, and the one in a folder
LOST = "shard-000003.tar"  # of one sample, which one server never gives
ENOUGH = 1.5 / (
    FAR + NEAR
)  # of all samples, rounded up to two of them; two sets of their own would allow one each
RUNS: dict[str, dict[str, Any]] = {
    "local": {},
    "parts": {},
    "cached": {"cache_dir": "cache"},
    "flaky": {},
    "flaky-cached": {"cache_dir": "flaky-cache"},
    "moved": {},  # begun in folders, gone on with from a server
    "lost": {"read_retries": 0, "bad_sample_budget": 2.5 / (FAR + NEAR)},
    "refused": {"bad_sample_budget": 0.9 / (FAR + NEAR)},
}
SAME = ("parts", "cached", "flaky", "flaky-cached", "moved")
STOP = 5  # optimizer steps


class Place:
    """The folder of all runs, what was damaged in each set, and the servers that they read from."""

    def __init__(self, folder: Path, bad: set[tuple[str, str]]) -> None:
        self.folder, self.bad = folder, bad
        self.counts: dict[str, Counter[str]] = {}  # requests for whole files, by run
        self.unmet: list[str] = []  # faults of the servers that fail for a while that nobody met
        self.outcomes: list[dict[str, str]] = []  # of the runs, by rank


@pytest.fixture(scope="module")
def place(
    scenes_base: Path, scene_shards: Path, scene_validation_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Place:  # fmt: skip
    """All runs on two ranks; of each set one sample is damaged."""
    folder = tmp_path_factory.mktemp("remote-mixture")
    bad = set()
    for name, shards in (("far", scene_shards), ("near", scene_validation_shards)):
        shard, key = damaged_copy(shards, folder / name)
        bad.add((f"{name}/{shard}", f"{name}/{key}"))
    place = Place(folder, bad)
    servers = {name: FileServer(folder / "far") for name in RUNS if name != "local"}
    for entry in Manifest.load(folder / "far").shards:
        for name, fault in (("flaky", "503"), ("flaky-cached", "reset")):
            servers[name].fail(entry.name, fault, 1)
            servers[name].fail(f"{entry.name}.idx", "short", 1)
    servers["flaky"].fail("manifest.json", "503", 1)
    servers["lost"].fail(LOST, "503")

    def recipe(name: str, stop: int | None = None) -> str:
        data = dict(RUNS[name])
        if "cache_dir" in data:
            data["cache_dir"] = str(folder / data["cache_dir"])
        far = servers[name].url if name in servers and stop is None else str(folder / "far")
        mixture = [
            {"name": "far", "train": far, "weight": 3},
            {"name": "near", "train": str(folder / "near"), "weight": 1},
        ]
        return str(
            write_recipe(
                folder / f"{name}{stop or ''}.yaml", scenes_base, Path(), folder / name,
                data={"train": "", "mixture": mixture, "shuffle_window": 1, "workers": 2,
                      "bad_sample_budget": ENOUGH, **data},
                optim={"schedule": "constant", "warmup_ratio": 0.0},  # else the rate depends on where a run ends
                train={"max_steps": stop, "epochs": 2, "grad_accum_steps": 2, "checkpoint_every_steps": 99},
            )
        )  # fmt: skip

    try:
        for server in servers.values():
            server.__enter__()
        run_ranks(
            "tests.training.runs:run_several", 2, timeout=2 * TIMEOUT,
            recipes=[recipe("moved", STOP), *map(recipe, RUNS)], outcomes=str(folder),
        )  # fmt: skip
    finally:
        for server in servers.values():
            server.__exit__()
    files = [path.name for path in (folder / "far").iterdir()]
    place.unmet = [n for name in ("flaky", "flaky-cached") for n in files if servers[name].next_fault(n)]
    for name, server in servers.items():
        asked = [request for request in server.requests if request.method == "GET" and request.range is None]
        place.counts[name] = Counter(request.name for request in asked)
    place.outcomes = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    return place


def bad_of(run: Path) -> dict[tuple[str, str], str]:
    return {(line["shard"], line["key"]): line["reason"] for line in read_lines(run / "bad_samples.jsonl")}


@pytest.mark.parametrize("name", SAME)
def test_a_set_behind_http_is_the_set_in_a_folder(place: Place, name: str) -> None:
    assert not place.unmet
    local, remote = place.folder / "local", place.folder / name
    assert ledger(remote) == ledger(local) and len(losses(local)) > 2 * STOP
    assert losses(remote) == pytest.approx(losses(local), rel=1e-9 if name == "moved" else 0)
    assert bad_of(remote) == bad_of(local)
    assert [line.get("sources") for line in read_lines(remote / "metrics.jsonl")] == [
        line.get("sources") for line in read_lines(local / "metrics.jsonl")
    ]


def test_each_set_has_its_share_and_its_damage_has_its_name(place: Place) -> None:
    run = place.folder / "local"
    assert set(bad_of(run)) == place.bad
    assert all(reason.startswith("jpg: checksum differs") for reason in bad_of(run).values())
    far, near = 39, 13  # three quarters of the 52 samples that both hold
    counts = Counter(key for keys in ledger(run).values() for key in keys)
    last = [line for line in read_lines(run / "metrics.jsonl") if "loss" in line][-1]
    assert last["sources"]["far"]["samples"] == 2 * far and last["sources"]["near"]["samples"] == 2 * near
    damaged = {key for _, key in place.bad}
    for name, total, held in (("far", 2 * far, FAR), ("near", 2 * near, NEAR)):
        keys = [f"{name}/{key}" for key in keys_of(place.folder / name)]
        assert len(keys) == held
        whole = [counts[key] for key in keys if key not in damaged]
        assert set(whole) <= {total // held, math.ceil(total / held)}
        times_damaged = total - sum(whole)
        assert times_damaged in (total // held, math.ceil(total / held))
    assert not damaged & set(counts)


def test_each_shard_comes_into_the_cache_once_but_for_those_that_are_not_what_the_manifest_says(
    place: Place,
) -> None:
    damaged = {shard for shard, _ in place.bad}
    wanted, counts = set(), place.counts["cached"]
    for name in ("far", "near"):
        for entry in Manifest.load(place.folder / name).shards:
            whole = f"{name}/{entry.name}" not in damaged
            wanted |= {entry.index_sha256, *([entry.sha256] if whole else [])}
            if name == "far":
                assert counts[f"{entry.name}.idx"] == 1, counts
                assert counts[entry.name] == 1 or not whole, counts
                assert place.counts["parts"][entry.name] == 0  # in ranges only
    for cache in ("cache", "flaky-cache"):
        assert {sha256_of(path) for path in (place.folder / cache).glob("*.shard")} == wanted


def test_a_sample_that_the_server_never_gives_is_named_with_its_set(place: Place) -> None:
    (key,) = load_shard_index(index_path(place.folder / "far" / LOST)).keys
    lost = bad_of(place.folder / "lost")
    assert set(lost) == {*place.bad, (f"far/{LOST}", f"far/{key}")}
    assert (
        lost[f"far/{LOST}", f"far/{key}"]
        == "shard cannot be read (the server answers 503 Service Unavailable)"
    )
    without = {
        step: [other for other in keys if other != f"far/{key}"]
        for step, keys in ledger(place.folder / "local").items()
    }
    assert ledger(place.folder / "lost") == without


def test_the_budget_counts_the_bad_samples_of_all_sets(place: Place) -> None:
    for said in place.outcomes:
        assert {name for name in said if said[name] != "finished"} == {"refused"} and {*RUNS} < {*said}
        assert "2 bad samples, 1 allowed" in said["refused"] and f"of {FAR + NEAR})" in said["refused"]
        assert any(f"the last is {key} in {shard}: jpg" in said["refused"] for shard, key in place.bad)
