"""What a look at the disk tells is told at once, by key, with exit code 2."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qwenvl_dist.config import make_recipe
from qwenvl_dist.errors import UserError
from qwenvl_dist.training.history import RunHistory, rewind
from qwenvl_dist.training.run import check_recipe_paths
from tests.ranks import ROOT


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=nowhere", "data.train: nowhere"),
        ("data.validation=nowhere", "data.validation: nowhere"),
        ("train.resume=nowhere", "train.resume = nowhere: no such folder"),
    ],
)
def test_a_path_that_leads_nowhere_is_named(
    override: str, message: str, scenes_base: Path, scene_shards: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{base: {scenes_base}}}\ndata: {{train: {scene_shards}}}\n")
    done = subprocess.run(
        [sys.executable, "-m", "qwenvl_dist", "train", str(recipe), override, f"train.output_dir={tmp_path / 'run'}"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("missing", "override", "message"),
    [
        ("swanboard", "tracking.mode=local", "tracking.mode = local: needs swanlab[dashboard]"),
        ("wandb", "tracking.trackers=[wandb]", "tracking.trackers: wandb is not installed"),
    ],
)
def test_a_tracker_that_is_not_installed_is_named(
    missing: str, override: str, message: str, scene_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name)
    )
    with pytest.raises(UserError, match=re.escape(message)):
        check_recipe_paths(make_recipe({"data": {"train": str(scene_shards)}}, "a test", [override]))


def test_rewind_moves_later_lines_and_drops_a_torn_one(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    separator = "\u2028"  # a line end to str.splitlines, not to JSON lines
    metrics.write_text(f'{{"step": 1, "note": "a{separator}b"}}\n{{"step": 2}}\n{{"step": 3}}\n{{"st')
    assert rewind(tmp_path, 2) == 1
    assert metrics.read_text() == f'{{"step": 1, "note": "a{separator}b"}}\n{{"step": 2}}\n'
    assert (tmp_path / "discarded" / "metrics.jsonl").read_text() == '{"step": 3}\n'


def test_a_number_that_is_not_finite_is_null_in_the_metrics(tmp_path: Path) -> None:
    history = RunHistory(tmp_path, rank=0, ledger=False)
    history.metrics({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "epoch": 0.5})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 1, "loss": null, "grad_norm": null, "epoch": 0.5}\n'


def test_rewind_ends_a_last_line_that_was_cut_before_its_newline(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger" / "rank-00000.jsonl"
    ledger.parent.mkdir()
    ledger.write_text('{"step": 1, "keys": []}')
    assert rewind(tmp_path, 5) == 0
    assert ledger.read_text().endswith("}\n")
