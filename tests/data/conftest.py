"""Small datasets that the data tests make themselves, and the real photos where they are."""

import os
from pathlib import Path

import pytest
from made_coco import Coco, make_coco


@pytest.fixture
def coco(tmp_path: Path) -> Coco:
    """Ten generated pictures with two captions each."""
    return make_coco(tmp_path / "coco", 10)


@pytest.fixture(scope="session")
def real_coco() -> Path:
    """The folder of the 290 real photos, read in place."""
    repository = Path(__file__).resolve().parents[2]
    shared = Path(os.environ.get("QWENVL_SHARED", repository.parent / "shared"))
    folder = shared / "data" / "coco"
    if not folder.is_dir():
        pytest.skip(f"the real photos are not at {folder}; QWENVL_SHARED names the folder above data/")
    return folder
