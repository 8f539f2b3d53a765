"""The lab, once a session."""

from collections.abc import Iterator

import pytest

from tests.slurm.lab import Lab, LabUnavailableError, install


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
