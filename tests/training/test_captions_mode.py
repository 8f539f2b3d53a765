"""How captions are learned, by the recipe or by what the shards were packed with: the same runs."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from qwenvl_dist.checkpoints import manifest as manifests
from qwenvl_dist.data.captions import CAPTIONS_MODES, CaptionsMode, PackedCaptions
from qwenvl_dist.data.index import Manifest
from qwenvl_dist.synthetic.scenes import captions, scene
from tests.made_shards import jpeg, record, write_shards
from tests.ranks import run_ranks
from tests.training.runs import TIMEOUT, losses, write_recipe

pytestmark = pytest.mark.dist


def shards_of(folder: Path, says: CaptionsMode | None) -> Path:
    """Sixteen pictures with three captions each."""
    numbers = iter(range(16))
    samples = [
        [
            {
                "jpg": jpeg(n),
                "json": record("COCO Yes:", " / ".join(captions(scene(n + 9 * i, 0))[0] for i in range(3))),
            }
            for n in itertools.islice(numbers, 8)
        ]
        for _ in range(2)
    ]
    out = write_shards(folder, samples)
    replace(Manifest.load(out), captions=PackedCaptions("/", says)).write(out)
    return out


def test_a_silent_recipe_learns_as_the_shards_say(scenes_base: Path, tmp_path: Path) -> None:
    recipes = []

    def add(name: str, says: CaptionsMode | None, steps: int = 3, **data: str) -> None:
        shards = tmp_path / f"shards-{says}"
        if not shards.exists():
            shards_of(shards, says)
        recipes.append(
            write_recipe(
                tmp_path / f"{name}.yaml",
                scenes_base,
                shards,
                tmp_path / name.split("-again")[0],
                data={"workers": 0, **data},
                lora={"dropout": 0.0},
                train={"max_steps": steps, "grad_accum_steps": 2},
            )
        )

    for mode in CAPTIONS_MODES:
        add(f"packed-{mode}", mode)
        add(f"said-{mode}", None, captions_mode=mode)
    add("silent", None)
    add("packed-sample-again", "each", steps=4)  # the same keys and bytes, another way to learn them
    run_ranks(
        "tests.training.runs:run_several", 1, timeout=TIMEOUT, recipes=[str(path) for path in recipes],
        outcomes=str(tmp_path),
    )  # fmt: skip
    came = json.loads((tmp_path / "0.json").read_text())
    refusal = came.pop("packed-sample-again")
    assert set(came.values()) == {"finished"}, came
    learned = {}
    for mode in CAPTIONS_MODES:
        learned[mode] = losses(tmp_path / f"packed-{mode}")
        assert len(learned[mode]) == 3 and learned[mode] == losses(tmp_path / f"said-{mode}")
        for name in (f"packed-{mode}", f"said-{mode}"):
            data = yaml.safe_load((tmp_path / name / "recipe.yaml").read_text())["data"]
            assert (data["captions_mode"], data["caption_mark"]) == (mode, "/")
    assert learned["join"] == losses(tmp_path / "silent")
    assert len({tuple(values) for values in learned.values()}) == 3
    _, manifest, _ = manifests.newest_valid(tmp_path / "packed-sample" / "checkpoints")
    assert manifest["data"]["captions"] == "sample of /"
    assert (
        "data captions was sample of / and is now each of /" in refusal
        and "restore the data and recipe" in refusal
    )
