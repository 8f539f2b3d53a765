"""The plan of a run over several data sets, and preflight's look at them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qwenvl_dist.data.index import Manifest
from qwenvl_dist.planning import plan
from qwenvl_dist.planning.samples import SourceFacts, look_at
from qwenvl_dist.planning.table import text, to_json
from tests.planning.test_plan import recipe_of
from tests.preflight.fakes import assert_found, context_of, find


@pytest.fixture(scope="module")
def mixed(scene_shards: Path, scene_validation_shards: Path) -> dict[str, Any]:
    """40 scenes in 4 shards twice an epoch, and half of 12 in 2 shards."""
    return {
        "train": "",
        "mixture": [
            {"name": "scenes", "train": str(scene_shards), "epochs": 2},
            {"name": "held-out", "train": str(scene_validation_shards), "epochs": 0.5},
        ],
    }


def test_plan_counts_the_samples_of_each_source(
    scenes_base: Path, scene_shards: Path, scene_validation_shards: Path, mixed: dict[str, Any]
) -> None:
    train = {"epochs": 3, "grad_accum_steps": 2}
    recipe = recipe_of(scenes_base, scene_shards, data=mixed, train=train)
    facts, _ = look_at(recipe, 2)
    assert (facts.samples, facts.shards, facts.shards_read) == (86, 6, 6)
    assert (facts.steps_per_epoch, facts.total_steps, facts.total_samples) == (6, 17, 258)
    assert facts.sources == {"held-out": SourceFacts(12, 6, 1.5), "scenes": SourceFacts(40, 80, 6.0)}
    alone = [
        look_at(recipe_of(scenes_base, shards), 2)[0].target_tokens_per_sample
        for shards in (scene_shards, scene_validation_shards)
    ]
    assert alone[0] != alone[1]
    assert facts.target_tokens_per_sample == pytest.approx((80 * alone[0] + 6 * alone[1]) / 86)
    assert 0 <= facts.padding_share < 0.5

    planned = plan(recipe, 1, 2)
    assert "scenes: 80 an epoch from 40 samples, 6 passes in all epochs" in text(planned)
    assert json.loads(json.dumps(to_json(planned)))["data"]["sources"]["held-out"]["passes"] == 1.5


def test_preflight_names_each_source(
    scenes_base: Path, scene_shards: Path, tmp_path: Path, mixed: dict[str, Any]
) -> None:
    context = context_of(scenes_base, scene_shards, tmp_path / "run", data=mixed)
    assert_found(
        find("manifests", context), "ok", "data.mixture held-out 12 samples in 2 shards (6 an epoch)", ""
    )
    assert_found(find("sampled_shards", context), "ok", "2 of 6 shards", "")
    for name in ("lengths", "text_only", "extremes"):
        assert str(find(name, context).status) == "ok", name


def test_preflight_looks_into_every_source(
    scenes_base: Path, scene_shards: Path, tmp_path: Path, mixed: dict[str, Any]
) -> None:
    """Two shards of six, the first and the last, would leave out the source between."""
    copy = tmp_path / "copy"
    shutil.copytree(scene_shards, copy)
    for entry in Manifest.load(copy).shards:
        (copy / entry.name).write_bytes((copy / entry.name).read_bytes()[:-600])
    between = {"name": "middle", "train": str(copy), "epochs": 1}
    data = {**mixed, "mixture": [*mixed["mixture"], between]}
    context = context_of(scenes_base, scene_shards, tmp_path / "run", data=data)
    found = find("sampled_shards", context)
    assert_found(found, "fail", "3 of 10 shards", f"shards verify {copy}")
    assert "middle/shard-0000" in found.value
    context.sampled_shards = 0
    assert_found(find("sampled_shards", context), "ok", "0 of 10 shards", "")


def test_preflight_finds_the_damaged_source(
    scenes_base: Path, scene_shards: Path, tmp_path: Path, mixed: dict[str, Any]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(scene_shards, copy)
    last = copy / Manifest.load(copy).shards[-1].name
    last.write_bytes(last.read_bytes()[:-600])
    held_out, _ = sorted(mixed["mixture"], key=lambda entry: entry["name"])
    data = {"train": "", "mixture": [held_out, {"name": "scenes", "train": str(copy), "epochs": 2}]}
    context = context_of(scenes_base, scene_shards, tmp_path / "run", data=data)
    found = find("sampled_shards", context)
    assert_found(found, "fail", f"scenes/{last.name}", f"shards verify {copy}")
