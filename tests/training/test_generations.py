"""Captions during training, under both stages: those of the merged model, and training that does not notice them."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwenvl_dist.config import load_recipe
from qwenvl_dist.errors import UserError
from qwenvl_dist.evaluate.captioner import load_captioner
from qwenvl_dist.evaluate.run import ShardEvaluation
from qwenvl_dist.merge.merge import merge
from qwenvl_dist.merge.trained import read_trained
from qwenvl_dist.model import whole_weights
from qwenvl_dist.model.base_folder import BaseFolder
from qwenvl_dist.training.history import rewind
from qwenvl_dist.training.run import check_recipe_paths
from tests.ranks import ROOT
from tests.training.forked import ForkedRanks
from tests.training.runs import TIMEOUT, losses, read_lines, run_several, write_recipe

BASE = ROOT / "launch" / "demo_base"  # it speaks; what a random base says hardly depends on the picture
STEPS, IMAGES, BATCH, NEW_TOKENS = 4, 7, 2, 24  # two ranks: 4 and 3 photos, in two batches each
CASES = {"whole-2": 2, "whole-3": 3, "in-step-3": 3}
KEYS = {"key", "image_id", "prompt", "references", "caption", "answer", "scores"}


def run_cases(recipes: list[str]) -> None:
    """One rank: all runs, in those whose name says so without memory for whole weights."""
    reserve = whole_weights.RESERVE_BYTES
    for recipe in recipes:
        whole_weights.RESERVE_BYTES = 1 << 60 if "in-step" in recipe else reserve
        run_several([recipe], leave=recipe == recipes[-1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, scene_shards: Path, scene_validation_shards: Path) -> Path:
    """A folder with a run a case, and one a stage without captions."""
    folder = tmp_path_factory.mktemp("generations")
    recipes = []
    for name, stage in {**CASES, "quiet-2": 2, "quiet-3": 3}.items():
        sections: dict[str, Any] = {}
        if not name.startswith("quiet"):
            sections["eval"] = {
                "every_steps": 3, "images": IMAGES, "batch_size": BATCH, "max_new_tokens": NEW_TOKENS,
                "scores": ["ROUGE_L", "CIDEr"] if name == "whole-2" else [],
            }  # fmt: skip
        recipes.append(
            write_recipe(
                folder / f"{name}.yaml", BASE, scene_shards, folder / name, stage,
                data={"validation": str(scene_validation_shards), "workers": 0, "ledger": False},
                optim={"learning_rate": 2e-2}, train={"max_steps": STEPS, "grad_accum_steps": 1}, **sections,
            )
        )  # fmt: skip
    ranks = ForkedRanks(run_cases, ([str(path) for path in recipes],), 2, folder / "log")
    assert ranks.wait(TIMEOUT) == [0, 0], ranks.said()[-6000:]
    return folder


def generations(run: Path) -> dict[str, list[dict[str, Any]]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((run / "generations").iterdir())}


def merged_captions(run: Path, shards: Path, out: Path) -> list[str]:
    trained = read_trained(run / "checkpoints" / f"step-{STEPS:08d}")
    merge(trained, BaseFolder(BASE), out, dtype="float32")
    work = ShardEvaluation(shards, limit=IMAGES, batch_size=BATCH)
    answers = work.answers(load_captioner(str(out), dtype="float32", image_size=56), NEW_TOKENS)
    return [text for _, text in answers.said]


@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
def test_captions_during_training_are_those_of_the_merged_model(
    runs: Path, scene_validation_shards: Path, tmp_path: Path, name: str
) -> None:
    written = generations(runs / name)
    assert list(written) == ["base", "step-00000003", "step-00000004"]
    work = ShardEvaluation(scene_validation_shards, limit=IMAGES, batch_size=BATCH)
    base = work.answers(load_captioner(str(BASE), image_size=56), NEW_TOKENS)
    assert [entry["answer"] for entry in written["base"]] == [text for _, text in base.said]
    assert [entry["key"] for entry in written["base"]] == [asked.key for asked, _ in base.said]
    said = [entry["answer"] for entry in written[f"step-{STEPS:08d}"]]
    assert said == merged_captions(runs / name, scene_validation_shards, tmp_path / "merged")
    assert said != [entry["answer"] for entry in written["base"]]
    for entries in written.values():
        assert len(entries) == IMAGES
        assert all(set(entry) == KEYS and entry["references"] for entry in entries)
        assert {entry["prompt"] for entry in entries} == {"COCO Yes:"}


@pytest.mark.dist
def test_whole_weights_and_ranks_in_step_say_the_same(runs: Path) -> None:
    assert generations(runs / "whole-3") == generations(runs / "in-step-3")


@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
def test_training_does_not_notice_the_captions(runs: Path, name: str) -> None:
    quiet = runs / f"quiet-{CASES[name]}"
    assert losses(runs / name) == losses(quiet) and len(losses(quiet)) == STEPS
    assert not (quiet / "generations").exists()
    best = [(run / "checkpoints" / "best").resolve().name for run in (runs / name, quiet)]
    assert best[0] == best[1]  # by validation loss


@pytest.mark.dist
def test_scores_of_each_caption_and_of_all_are_written(runs: Path) -> None:
    lines = [line for line in read_lines(runs / "whole-2" / "metrics.jsonl") if "CIDEr" in line]
    assert [line["step"] for line in lines] == [0, 3, 4]
    for line, entries in zip(lines, generations(runs / "whole-2").values(), strict=True):
        assert set(line) == {"step", "ROUGE_L", "CIDEr", "generated_per_second"}
        for name in ("ROUGE_L", "CIDEr"):
            mean = sum(entry["scores"][name] for entry in entries) / IMAGES
            assert line[name] == pytest.approx(mean)
    unscored = [
        line for line in read_lines(runs / "in-step-3" / "metrics.jsonl") if "generated_per_second" in line
    ]
    assert all(set(line) == {"step", "generated_per_second"} for line in unscored) and len(unscored) == 3


def test_captions_of_undone_steps_are_set_aside(tmp_path: Path) -> None:
    folder = tmp_path / "generations"
    folder.mkdir()
    for name in ("base", "step-00000003", "step-00000006"):
        (folder / f"{name}.json").write_text("[]")
    rewind(tmp_path, 3)
    assert sorted(path.stem for path in folder.iterdir()) == ["base", "step-00000003"]
    assert (tmp_path / "discarded" / "generations" / "step-00000006.json").is_file()


def test_without_java_a_run_says_so_before_it_starts(
    tmp_path: Path, scene_shards: Path, scene_validation_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(
        tmp_path / "recipe.yaml", BASE, scene_shards, tmp_path / "run",
        data={"validation": str(scene_validation_shards)}, eval={"every_steps": 2},
    )  # fmt: skip
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(UserError, match=r"^eval\.scores: .*install Java 17 .*set eval\.scores=\[\]"):
        check_recipe_paths(load_recipe(path))
    check_recipe_paths(load_recipe(path, ["eval.scores=[]"]))
    with pytest.raises(UserError, match=r"eval\.every_steps is 2, but data\.validation is missing"):
        load_recipe(path, ["data.validation=null"])
