"""Small datasets that the data tests make themselves, and the real photos where they are."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from made_coco import Coco, make_coco
from remote import pack_small

from qwenvl_dist.data import storage
from tests.http_server import FileServer


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


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven generated pictures in shards of 3, 3, 3 and 2. Read only: copy it to change it."""
    return pack_small(tmp_path_factory.mktemp("packed"))


@pytest.fixture
def server(packed: Path) -> Iterator[FileServer]:
    """`packed` over http."""
    with FileServer(packed) as server:
        yield server


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits long before it asks a server again."""
    monkeypatch.setattr(storage, "FIRST_PAUSE_SECONDS", 0.01)
