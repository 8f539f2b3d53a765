"""Weight files are written in pieces of any size at any place, past the page cache and through it, or share blocks."""

import errno
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qwenvl_dist.merge import safetensors_writer
from qwenvl_dist.merge.safetensors_writer import ALIGNMENT, SafetensorsWriter, Stage, open_for_reading

HEADER = b"h" * 104
# Sizes of tensors: below a block, of whole blocks, above the stage; and of the pieces that they come in.
TENSORS = [1, 2 * ALIGNMENT, 5000, 3 * ALIGNMENT - 104, ALIGNMENT - 3, 70_001, 12, 40_000]
PIECES = [1, 4095, 20_001]


def write_tensors(path: Path, content: bytes, piece: int) -> None:
    with SafetensorsWriter(path, HEADER, len(HEADER) + len(content)) as writer:

        def write(begin: int, count: int) -> None:
            stream = Stage().open(writer, len(HEADER) + begin)
            for start in range(begin, begin + count, piece):
                end = min(start + piece, begin + count)
                stream.space(end - start)[:] = content[start:end]
            stream.finish()

        with ThreadPoolExecutor(4) as pool:
            begins = [sum(TENSORS[:number]) for number in range(len(TENSORS))]
            list(pool.map(write, begins, TENSORS))
        writer.finish()


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("way", ("direct", "cached", "refused"))
def test_any_pieces_make_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, way: str
) -> None:
    monkeypatch.setattr(safetensors_writer, "COPY_BYTES", 4 * ALIGNMENT)
    if way == "cached":
        monkeypatch.delattr(os, "O_DIRECT")
    direct, real = [], os.pwrite

    def pwrite(descriptor: int, view: memoryview, offset: int) -> int:
        if way != "cached" and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            direct.append(len(view))
            if way == "refused":
                raise OSError(errno.EINVAL, "no direct writes here")
        return real(descriptor, view, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    content = os.urandom(sum(TENSORS))
    write_tensors(tmp_path / "f", content, piece)
    assert (tmp_path / "f").read_bytes() == HEADER + content
    assert bool(direct) == (way != "cached") and all(size % ALIGNMENT == 0 for size in direct)


def test_a_full_disk_is_told_before_anything_is_written(xfs: Path) -> None:
    free = shutil.disk_usage(xfs).free
    with (
        pytest.raises(OSError, match="No space left") as caught,
        SafetensorsWriter(xfs / "f", HEADER, 2 * free),
    ):
        pass
    assert caught.value.errno == errno.ENOSPC
    assert shutil.disk_usage(xfs).free > 0.99 * free  # what it could get was given back


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Path]:
    """A small XFS, on which files can share blocks."""
    image, folder = tmp_path / "image", tmp_path / "xfs"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(320 << 20)
    try:
        subprocess.run(["mkfs.xfs", "-q", str(image)], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"NO TEST OF SHARED BLOCKS: no XFS can be made here (needs root and xfsprogs): {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_untouched_bytes_share_blocks_where_the_file_system_can(xfs: Path, tmp_path: Path) -> None:
    content = os.urandom(3_000_001)
    parts = [(104, 2_500_000), (2_500_104, 499_897)]
    for folder, shares in ((xfs, True), (tmp_path, None)):
        (folder / "base").write_bytes(content)
        with (
            open_for_reading(folder / "base") as source,
            SafetensorsWriter(folder / "out", content[:104], len(content)) as writer,
        ):
            cloned = [writer.clone(source, begin, begin, count) for begin, count in parts]
            if not all(cloned):
                assert shares is None
                continue
            writer.finish()
        assert (folder / "out").read_bytes() == content
    used = shutil.disk_usage(xfs).used
    (xfs / "out").unlink()
    assert used - shutil.disk_usage(xfs).used < 100_000  # of three million bytes
