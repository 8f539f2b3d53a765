"""Bases in shapes of real proportions."""

from pathlib import Path

import psutil
import pytest

from tests.ranks import command

NEEDED_BYTES = {"small": 4 << 30, "trunc2b": 14 << 30}  # by four ranks


@pytest.fixture(scope="session", params=["small", "trunc2b"])
def larger_base(
    request: pytest.FixtureRequest, shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Bases of 50 and 550 million parameters."""
    if request.param == "trunc2b" and not request.config.getoption("--all-shapes"):
        pytest.skip("only with --all-shapes")
    if psutil.virtual_memory().available < NEEDED_BYTES[request.param]:
        pytest.skip("four ranks of this base need more memory than there is")
    base = tmp_path_factory.mktemp("larger") / request.param
    text = shared_data / "qwen2vl" / "Qwen2-VL-7B-Instruct"
    command("synthetic", "base", "--out", base, "--shape", request.param, "--text-files", text)
    return base
