"""A folder written by several ranks is whole under its name or not there, whatever one rank's disk says."""

import contextlib
import json
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwenvl_dist.checkpoints.manifest import verify
from qwenvl_dist.checkpoints.publish import BLOCK_BYTES, partial_folder, publish, remove_leftovers
from tests.ranks import run_ranks

BIG = 4 << 20  # bytes of rank 1's file: more than the small file system holds
WHERE = {  # case -> ranks that do not see rank 0's disk
    "good": [],
    "gathered": [1, 2],
    "file-size-limit": [],
    "no-permission": [],
    "full": [],
    "full-at-rank-0-for-rank-1": [1],
}
GOOD = ("good", "gathered")


def content(rank: int, case: str) -> bytes:
    """What a rank writes: in the good cases more than a block."""
    size = 2 * BLOCK_BYTES + 7 if case in GOOD else BIG if rank == 1 else 1000
    return bytes([rank + 1]) * size


@contextlib.contextmanager
def trouble(case: str, rank: int) -> Iterator[None]:
    """Let the operating system refuse what rank 1 writes."""
    if rank == 1 and case == "file-size-limit":
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (BIG // 2, limits[1]))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    elif rank == 1 and case == "no-permission" and os.geteuid() == 0:  # modes do not bind root
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


def run_publish(folder: str, cases: dict[str, list[int]]) -> None:
    """One rank: publish twice under each case; tell what came of the second."""
    from qwenvl_dist.checkpoints.publish import PublishFailed
    from qwenvl_dist.distributed import host_ranks

    outcomes = {}
    with host_ranks(60) as group:
        for case, elsewhere in cases.items():
            place = Path(folder, case)
            for step in (1, 2):
                name = f"zero/rank-{group.rank}"
                data = content(group.rank, case) if step == 2 else b"small"
                with trouble(case, group.rank) if step == 2 else contextlib.nullcontext():
                    try:
                        publish(
                            group, place / f"step-{step:08d}",
                            {name: lambda file, data=data: file.write(data)}, {"step": step}, elsewhere,
                        )  # fmt: skip
                        outcomes[case] = "published"
                    except PublishFailed as error:
                        outcomes[case] = str(error)
    print(json.dumps(outcomes))


def mounted(folder: Path) -> bool:
    """Put a file system of 2 MiB there, where that is allowed."""
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """The folder of all cases, and what each rank said of each."""
    folder = tmp_path_factory.mktemp("published")
    folder.chmod(0o755)
    cases, mounts = dict(WHERE), []
    for case in WHERE:
        (folder / case).mkdir()
        if case.startswith("full"):
            if mounted(folder / case):
                mounts.append(folder / case)
            else:
                del cases[case]
        if case == "no-permission" and os.geteuid() != 0:
            del cases[case]
    try:
        outputs = run_ranks(
            "tests.checkpoints.test_publish:run_publish", 3, timeout=120, folder=str(folder), cases=cases
        )
        yield folder, [json.loads(output.splitlines()[-1]) for output in outputs]
    finally:
        for place in mounts:
            subprocess.run(["umount", str(place)], check=True)


@pytest.mark.dist
@pytest.mark.parametrize("case", GOOD)
def test_all_ranks_files_arrive_byte_for_byte(published, case: str) -> None:
    folder, said = published
    assert [outcomes[case] for outcomes in said] == ["published"] * 3
    step = folder / case / "step-00000002"
    assert verify(step)["step"] == 2
    for rank in range(3):
        assert (step / "zero" / f"rank-{rank}").read_bytes() == content(rank, case)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("file-size-limit", "rank 1: File too large"),
        ("no-permission", "rank 1: Permission denied"),
        ("full", "rank 1: No space left on device"),
        ("full-at-rank-0-for-rank-1", "rank 0, for rank 1: No space left on device"),
    ],
)
def test_one_ranks_error_reaches_all_and_leaves_the_earlier_folder(published, case: str, reason: str) -> None:
    folder, said = published
    if case not in said[0]:
        pytest.skip("needs root")
    assert reason in said[0][case] and "step-00000002" in said[0][case]
    assert said[1][case] == said[2][case] == said[0][case]
    assert [path.name for path in (folder / case).iterdir()] == ["step-00000001"]
    assert verify(folder / case / "step-00000001")["step"] == 1


def test_leftovers_of_any_step_are_removed_and_nothing_else(tmp_path: Path) -> None:
    stay = ["step-00000001", ".step-00000002.mine", "best"]
    gone = [
        partial_folder(tmp_path / "step-00000009").name,
        ".step-00000003.removed",
        ".step-00000004.stale",
    ]
    for name in stay + gone:
        (tmp_path / name / "zero").mkdir(parents=True)
        (tmp_path / name / "zero" / "file").touch()
    assert remove_leftovers(tmp_path) == sorted(gone)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(stay)
