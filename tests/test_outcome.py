"""What a rank leaves for whoever started it."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from qwenvl_dist.__main__ import main
from qwenvl_dist.errors import CheckFailed, Stopped, UserError
from qwenvl_dist.outcome import Outcome


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QWENVL_OUTCOME_DIR", str(tmp_path / "outcomes"))
    monkeypatch.setenv("RANK", "3")
    return tmp_path / "outcomes"


def left(folder: Path) -> dict[str, Any]:
    (path,) = folder.iterdir()
    assert path.name == "rank-00003.json"
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("error", "outcome", "reason"),
    [
        (None, "finished", ""),
        (Stopped("stopped by SIGUSR1 after step 7"), "stopped", "stopped by SIGUSR1 after step 7"),
        (CheckFailed("the loss is not finite"), "failed", "the loss is not finite"),
        (MemoryError("3 GiB\n  more"), "failed", "MemoryError: 3 GiB more"),
        (KeyboardInterrupt(), "failed", "interrupted"),
        (UserError("data.train is missing"), "usage", "data.train is missing"),
    ],
)
def test_every_end_has_a_name_and_a_reason(
    folder: Path, error: BaseException | None, outcome: str, reason: str
) -> None:
    def work() -> None:
        with ended.recorded():
            ended.step = 7
            if error:
                raise error

    ended = Outcome()
    if error:
        with pytest.raises(type(error)):
            work()
    else:
        work()
    expected = {"rank": 3, "host": socket.gethostname(), "outcome": outcome, "step": 7, "reason": reason}
    assert left(folder) == expected


def test_the_first_end_counts(folder: Path) -> None:
    outcome = Outcome()
    outcome.write("failed", "its launcher is gone")
    outcome.write("failed", "what came of that")
    assert left(folder)["reason"] == "its launcher is gone"


def test_without_the_variable_nothing_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QWENVL_OUTCOME_DIR")
    Outcome().write("finished")
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_is_told_and_hides_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.write_text("a file")
    with pytest.raises(CheckFailed, match="the real reason"), Outcome().recorded():
        raise CheckFailed("the real reason")
    assert "rank-00003.json cannot be written: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["no-such-recipe.yaml"], "recipe no-such-recipe.yaml: cannot be read"),
        (
            ["recipe.yaml", "--no-such-option"],
            "the command line is wrong: train recipe.yaml --no-such-option",
        ),
    ],
)
def test_errors_before_ranks_are_joined_are_left_too(folder: Path, arguments: list[str], reason: str) -> None:
    with pytest.raises(SystemExit) as left_with:
        main(["train", *arguments])
    assert left_with.value.code == 2
    assert left(folder)["outcome"] == "usage" and left(folder)["reason"].startswith(reason)


def test_a_dry_run_and_other_commands_leave_nothing(folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {train: shards}\n")
    assert main(["train", str(recipe), "--dry-run"]) == 0
    with pytest.raises(SystemExit):
        main(["shards", "no-such-command"])
    assert not folder.exists()
