"""A run whose recipe says what becomes of samples that are too long: left out, or with smaller pictures."""

from pathlib import Path

import pytest

from qwenvl_dist.checkpoints import manifest as manifests
from tests.made_shards import jpeg, key_of, record, seal, write_tar
from tests.training.runs import read_lines, train, write_recipe

pytestmark = pytest.mark.dist
LARGE = (3, 9, 14)


@pytest.fixture(scope="module")
def mixed_sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen pictures of 56x56, three of them of 448x448."""
    folder = tmp_path_factory.mktemp("mixed") / "shards"
    folder.mkdir()
    members = [
        {"jpg": jpeg(n, 448 if n in LARGE else 56), "json": record("COCO Yes:", "A red circle.")}
        for n in range(16)
    ]
    write_tar(folder / "shard-000000.tar", 0, members)
    return seal(folder)


@pytest.mark.parametrize(("policy", "count"), [("drop", "dropped_samples"), ("shrink", "shrunk_samples")])
def test_too_long_samples_are_counted_in_metrics_ledger_and_manifest(
    scenes_base: Path, mixed_sizes: Path, tmp_path: Path, policy: str, count: str
) -> None:
    sizes = {"min_pixels": 3136, "max_pixels": 448 * 448}
    data = {"image_size": sizes, "max_length": 100, "over_length": policy, "workers": 0}
    recipe = write_recipe(
        tmp_path / "run.yaml", scenes_base, mixed_sizes, tmp_path / "run", data=data,
        train={"max_steps": None, "epochs": 2, "grad_accum_steps": 2, "log_every_steps": 1},
    )  # fmt: skip
    train(recipe, 2)
    lines = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert lines[-1][count] == 2 * len(LARGE)  # since the start of the run, as bad samples are
    keys = [
        key
        for rank in (0, 1)
        for line in read_lines(tmp_path / "run" / "ledger" / f"rank-{rank:05d}.jsonl")
        for key in line["keys"]
    ]
    small = [key_of(0, n) for n in range(16) if n not in LARGE]
    large = [key_of(0, n) for n in LARGE]
    assert sorted(keys) == sorted(2 * (small if policy == "drop" else small + large))
    newest, manifest, _ = manifests.newest_valid(tmp_path / "run" / "checkpoints")
    assert newest is not None
    wanted = {
        "cut": 0,
        "shrunk": 0,
        "dropped": 0,
        ("dropped" if policy == "drop" else "shrunk"): 2 * len(LARGE),
    }
    assert manifest["data"]["adjusted"] == wanted
    assert not (tmp_path / "run" / "bad_samples.jsonl").exists() or not read_lines(
        tmp_path / "run" / "bad_samples.jsonl"
    )
