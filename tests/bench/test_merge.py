"""The merge's measurement on a tiny base: every way runs, in a process of its own, and nothing stays behind."""

import json
import sys
from pathlib import Path

import pytest

from qwenvl_dist.__main__ import main
from qwenvl_dist.bench import merge as bench
from qwenvl_dist.errors import CheckFailed
from qwenvl_dist.merge.merge import merge
from qwenvl_dist.merge.trained import read_trained
from qwenvl_dist.model.base_folder import BaseFolder


def test_random_adapter_is_on_every_projection(scenes_base: Path, tmp_path: Path) -> None:
    base = BaseFolder(scenes_base)
    bench.write_random_adapter(base, 3, tmp_path / "adapter")
    trained = read_trained(tmp_path / "adapter")
    assert len(trained.deltas) == 7 * base.config["num_hidden_layers"]
    assert {delta.lora_a.shape[0] for delta in trained.deltas.values()} == {3}
    report = merge(trained, base, tmp_path / "out", verify=True, verify_forward=True)
    assert all(line["changed"] > 0.1 for line in report.modules)


def test_all_ways_are_measured(scenes_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["bench", "merge", "--base", str(scenes_base), "--scratch", str(tmp_path), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    report = json.loads(captured.out.splitlines()[-1])
    contract = {"seconds", "cp_seconds", "ratio_to_cp", "peak_rss_gib", "peft_seconds", "peft_peak_rss_gib"}
    assert contract <= report.keys()
    assert report["ratio_to_cp"] == pytest.approx(report["seconds"] / report["cp_seconds"], rel=0.05)
    assert 0 < report["peak_anonymous_gib"] < report["peak_rss_gib"]
    assert report["peak_rss_gib"] < report["peft_peak_rss_gib"]
    assert "times faster than peft" in captured.err
    assert not list(tmp_path.iterdir())


def test_a_way_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="ended with 3: no such model"):
        bench._run([sys.executable, "-c", "print('no such model', flush=True); raise SystemExit(3)"])


def test_scratch_must_be_there(scenes_base: Path, tmp_path: Path) -> None:
    arguments = ["bench", "merge", "--base", str(scenes_base), "--scratch", str(tmp_path / "none")]
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
