"""Training from a web server is training from disk; what the server does not give is a bad sample."""

from pathlib import Path
from typing import Any

import pytest

from qwenvl_dist.data.index import Manifest, index_path, load_shard_index
from tests.http_server import FileServer
from tests.training.runs import ledger, losses, read_lines, train, write_recipe

pytestmark = pytest.mark.dist


def test_two_ranks_learn_the_same_from_a_url_as_from_disk(
    tmp_path: Path, scenes_base: Path, scene_shards: Path, scene_validation_shards: Path
) -> None:
    def run(name: str, shards: str, validation: str, **data: Any) -> Path:
        recipe = write_recipe(
            tmp_path / f"{name}.yaml", scenes_base, Path(), tmp_path / name,
            data={"train": shards, "validation": validation, "shuffle_window": 2, "workers": 2, **data},
            train={"grad_accum_steps": 2, "eval_every_steps": 3},
        )  # fmt: skip
        train(recipe, 2)
        return tmp_path / name

    local = run("local", str(scene_shards), str(scene_validation_shards))
    with FileServer(scene_shards.parent.parent) as server:
        urls = [
            f"{server.url}/{folder.relative_to(server.folder)}"
            for folder in (scene_shards, scene_validation_shards)
        ]
        cached = run("cached", *urls, cache_dir=str(tmp_path / "cache"))
        counts = server.counts()
        assert all(counts[name] == 1 for name in counts if not name.endswith("manifest.json")), counts
        assert sum(name.endswith(".tar") for name in counts) == 6
        in_parts = run("parts", *urls)
    for remote in (cached, in_parts):
        assert ledger(remote) == ledger(local)
        assert losses(remote) == losses(local)
        assert read_lines(remote / "bad_samples.jsonl") == []
        assert [line.get("val_loss") for line in read_lines(remote / "metrics.jsonl")] == [
            line.get("val_loss") for line in read_lines(local / "metrics.jsonl")
        ]


def test_a_shard_that_the_server_does_not_give_is_named_sample_by_sample(
    tmp_path: Path, scenes_base: Path, scene_shards: Path
) -> None:
    lost, *others = Manifest.load(scene_shards).shards
    keys = {e.name: load_shard_index(index_path(scene_shards / e.name)).keys for e in (lost, *others)}
    out = tmp_path / "run"
    with FileServer(scene_shards) as server:
        server.fail(lost.name, "503")
        recipe = write_recipe(
            tmp_path / "r.yaml", scenes_base, Path(), out,
            data={"train": server.url, "read_retries": 0, "bad_sample_budget": 1.0},
            train={"max_steps": None, "epochs": 1, "grad_accum_steps": 1},
        )  # fmt: skip
        train(recipe, 2)
    records = read_lines(out / "bad_samples.jsonl")
    assert {record["key"] for record in records} == set(keys[lost.name])
    assert {record["reason"] for record in records} == {
        "shard cannot be read (the server answers 503 Service Unavailable)"
    }
    seen = [key for step in ledger(out).values() for key in step]
    assert sorted(seen) == sorted(key for entry in others for key in keys[entry.name])
