"""slurm/submit.sh: from captions and pictures to an evaluated model, every job of it on the lab."""

import json
import re
from pathlib import Path

import pytest

from qwenvl_dist.data.index import Manifest
from tests.slurm.lab import Lab
from tests.slurm.runs import CPU, write_lab_recipe

pytestmark = [pytest.mark.slurm, pytest.mark.dist]


def test_the_chain_runs_from_captions_to_an_evaluated_model(
    lab: Lab, _scenes: dict[str, Path], scenes_base: Path, scene_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    recipe = write_lab_recipe(tmp_path / "run.yaml", scenes_base, tmp_path / "train", max_steps=2)
    inputs = []
    for prefix, split in (("", "train"), ("validation-", "validation")):
        captions = _scenes[split]
        inputs += [f"--{prefix}captions", str(captions), f"--{prefix}images", str(captions.parent / "images")]
    site = tmp_path / "site.env"
    options = f'QWENVL_SBATCH_OPTIONS="--output={tmp_path}/%x-%j.log"\nQWENVL_CPU_OPTIONS=--partition=cpu\n'
    site.write_text(f"{options}source slurm/site.env\n")
    printed = lab.run(
        "bash", "slurm/submit.sh", *inputs, "--samples-per-shard", "13", "--parts", "2", "--nodes", "2", "--gpus", "1",
        "--encode", tmp_path / "features", "--limit", "3", recipe, f"data.validation={tmp_path / 'validation'}",
        env={**CPU, "QWENVL_SITE": str(site)},
    )  # fmt: skip
    chain = re.findall(r"^(\w+) +job (\d+)(?: after ([\d, ]+))?: ", printed, flags=re.MULTILINE)
    labels = [label for label, *_ in chain]
    assert labels == ["prepare"] * 4 + ["encode", "train", "merge", "evaluate"], printed
    jobs = [job for _, job, _ in chain]
    assert [after for *_, after in chain] == ["", jobs[0], "", jobs[2], f"{jobs[3]}, {jobs[1]}", *jobs[4:7]]

    for job in jobs:
        ended = lab.wait(job, 300)
        assert ended["JobState"] == "COMPLETED", (ended["JobName"], Path(ended["StdOut"]).read_text())
        assert ended["Partition"] == (
            "cpu" if ended["JobName"] in ("qwenvl-prepare", "qwenvl-merge") else "main"
        )

    # What two tasks of an array packed is what one process packs, to the byte.
    for path in scene_shards.glob("shard-*"):
        assert (tmp_path / "train" / path.name).read_bytes() == path.read_bytes()
    packed, straight = Manifest.load(tmp_path / "train"), Manifest.load(scene_shards)
    assert (packed.fingerprint, packed.shards) == (straight.fingerprint, straight.shards)
    assert len(list((tmp_path / "train").iterdir())) == len(list(scene_shards.iterdir()))
    assert Manifest.load(tmp_path / "features").samples == 40
    resolved = (run / "recipe.yaml").read_text()
    assert str(tmp_path / "features") in resolved and (run / "checkpoints" / "best").exists()
    assert json.loads((run / "merged" / "merge_report.json").read_text())
    assert len(json.loads((run / "evaluation" / "predictions.json").read_text())) == 3
