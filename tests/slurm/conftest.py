"""The lab, once a session, and the run that the broken ones must equal."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.lab import Lab, LabUnavailableError, install
from tests.slurm.runs import PATIENCE, write_lab_recipe
from tests.training.forked import ForkedRanks, train


@pytest.fixture(scope="session")
def _session_lab() -> Iterator[Lab]:
    try:
        install()
        with Lab(nodes=3) as lab:
            yield lab
    except LabUnavailableError as error:
        pytest.skip(f"NO SLURM LAB, so nothing of slurm/ and of several hosts is tested: {error}")


@pytest.fixture
def lab(_session_lab: Lab) -> Iterator[Lab]:
    """Three hosts and their Slurm, quiet before and after."""
    yield _session_lab
    _session_lab.quiet()


@pytest.fixture(scope="session")
def straight(scenes_base: Path, scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing breaks, on one rank."""
    folder = tmp_path_factory.mktemp("straight")
    recipe = write_lab_recipe(folder / "run.yaml", scenes_base, scene_shards)
    run = ForkedRanks(train, (str(recipe),), 1, folder / "log")
    assert run.wait(PATIENCE) == [0], run.said()[-4000:]
    return folder / "run"
