"""A merge that was killed: nothing half-done appears, and the next start goes on with the files that are done."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qwenvl_dist.errors import UserError
from qwenvl_dist.merge import write
from qwenvl_dist.merge.merge import merge
from qwenvl_dist.merge.trained import Trained, read_trained
from qwenvl_dist.model.base_folder import BaseFolder
from tests.merge.test_variants import with_adapter
from tests.merge.tiny import make_base

# A merge that stops for ever before call number N of a function of its own, and says so.
STOPPING = """
import importlib, sys, time
from pathlib import Path
from qwenvl_dist.merge.merge import merge
from qwenvl_dist.merge.trained import read_trained
from qwenvl_dist.model.base_folder import BaseFolder
adapter, base, out, owner, name, number = sys.argv[1:]
if owner:
    module, _, kind = owner.partition(":")
    place = importlib.import_module(module)
    place = getattr(place, kind) if kind else place
    real, left = getattr(place, name), [int(number)]
    def stopping(*a, **k):
        left[0] -= 1
        if left[0] == 0:
            print("stopped", flush=True)
            time.sleep(1000)
        return real(*a, **k)
    setattr(place, name, stopping)
print("ready", flush=True)
merge(read_trained(Path(adapter)), BaseFolder(base), Path(out), verify=True)
"""
WRITER = "qwenvl_dist.merge.safetensors_writer:SafetensorsWriter"
MERGE = "qwenvl_dist.merge.merge"
INSTANTS = {  # where the merge is killed: owner, name, number of the call, are some files done by then
    "before-the-first-tensor": ("qwenvl_dist.merge.write", "_write_tensor", 1, False),
    "before-a-block": (WRITER, "write", 10, None),
    "before-a-copy": (WRITER, "clone", 30, None),
    "before-the-first-sync": (WRITER, "finish", 1, False),
    "before-the-first-mark": ("qwenvl_dist.merge.partial:PartialOutput", "mark_done", 1, False),
    "before-the-third-mark": ("qwenvl_dist.merge.partial:PartialOutput", "mark_done", 3, True),
    "before-the-side-files": (MERGE, "write_side_files", 1, True),
    "in-the-proof": (MERGE, "verify_output", 1, True),
    "before-the-report": (MERGE, "asdict", 1, True),
    "before-the-rename": ("pathlib:Path", "rename", 1, True),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` in shards, `adapter`, and `whole`, the merge that nobody disturbed."""
    root = tmp_path_factory.mktemp("restart")
    make_base(root / "base", tied=False, max_shard_size="100KB")
    variant = {"target_modules": ["q_proj", "up_proj", "fc1"], "modules_to_save": ["merger"]}
    with_adapter(root / "base", variant).save_pretrained(root / "adapter")
    merge(read_trained(root / "adapter"), BaseFolder(root / "base"), root / "whole")
    assert len(BaseFolder(root / "base").files) > 5
    return root


def start(work: Path, out: Path, owner: str = "", name: str = "", number: int = 0) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPING, work / "adapter", work / "base", out, owner, name, str(number)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # A shell that starts the tests in the background has them ignore SIGINT, and a child inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    if owner:
        assert process.stdout.readline() == "stopped\n"
    return process


def end(process: subprocess.Popen[str], how: signal.Signals = signal.SIGKILL) -> None:
    process.send_signal(how)
    process.wait(timeout=30)
    assert process.stdout
    process.stdout.close()


def finished_files(out: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of the weight files that a killed merge has finished, by its own marks."""
    partial = out.parent / f".{out.name}.partial"
    names = [mark.name.removesuffix(".json") for mark in partial.glob("*.safetensors.json")]
    states = {name: (partial / "model" / name).stat() for name in names}
    return {name: (state.st_ino, state.st_mtime_ns) for name, state in states.items()}


def assert_whole(work: Path, out: Path) -> None:
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert {path.name for path in out.iterdir()} == {path.name for path in (work / "whole").iterdir()}
    for file in BaseFolder(work / "base").files:
        assert (out / file).read_bytes() == (work / "whole" / file).read_bytes()


QUICK = ("before-a-copy", "before-the-third-mark", "before-the-rename")


@pytest.mark.parametrize(
    "instant", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in INSTANTS]
)
def test_second_start_goes_on_after_a_kill(work: Path, tmp_path: Path, instant: str) -> None:
    *where, some = INSTANTS[instant]
    process = start(work, tmp_path / "out", *where)
    trained, base = read_trained(work / "adapter"), BaseFolder(work / "base")
    with pytest.raises(UserError, match="is running"):
        merge(trained, base, tmp_path / "out")
    end(process)
    assert not (tmp_path / "out").exists()
    finished = finished_files(tmp_path / "out")
    assert some is None or bool(finished) == some
    report = merge(trained, base, tmp_path / "out", verify=True)
    assert report.files_from_earlier_start == sorted(finished)
    for name, state in finished.items():
        now = (tmp_path / "out" / name).stat()
        assert (now.st_ino, now.st_mtime_ns) == state  # the very file, not written again
    assert_whole(work, tmp_path / "out")
    first = json.loads((work / "whole/merge_report.json").read_text())
    assert (report.sha256, report.modules) == (first["sha256"], first["modules"])


@pytest.mark.slow
def test_kills_at_random_times(work: Path, tmp_path: Path) -> None:
    generator = random.Random(5)
    out = tmp_path / "out"
    for _ in range(6):
        process = start(work, out)
        time.sleep(generator.uniform(0, 0.15))
        end(process)
        if out.exists():
            break
    if not out.exists():
        merge(read_trained(work / "adapter"), BaseFolder(work / "base"), out, verify=True)
    shutil.rmtree(tmp_path / ".out.partial", ignore_errors=True)  # killed between rename and tidying up
    assert_whole(work, out)


def test_interrupted_merge_goes_on_too(work: Path, tmp_path: Path) -> None:
    end(start(work, tmp_path / "out", MERGE, "verify_output", 1), signal.SIGINT)
    finished = finished_files(tmp_path / "out")
    assert len(finished) == len(BaseFolder(work / "base").files)
    report = merge(read_trained(work / "adapter"), BaseFolder(work / "base"), tmp_path / "out")
    assert report.files_from_earlier_start == sorted(finished)
    assert_whole(work, tmp_path / "out")


def other_adapter(work: Path, folder: Path) -> Trained:
    """The same adapter with one value changed, in files of the same size and time."""
    shutil.copytree(work / "adapter", folder)
    file = folder / "adapter_model.safetensors"
    state, data = file.stat(), bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    return read_trained(folder)


def other_scaling(work: Path, folder: Path) -> Trained:
    shutil.copytree(work / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 7}))
    return read_trained(folder)


@pytest.mark.parametrize("what", ("adapter", "scaling", "base", "dtype"))
def test_stale_files_never_mix(work: Path, tmp_path: Path, what: str) -> None:
    end(start(work, tmp_path / "made" / "out", MERGE, "verify_output", 1))
    out = tmp_path / "made" / "out"
    assert finished_files(out)
    trained, base, options = read_trained(work / "adapter"), BaseFolder(work / "base"), {}
    if what == "adapter":
        trained = other_adapter(work, tmp_path / "adapter")
    elif what == "scaling":
        trained = other_scaling(work, tmp_path / "adapter")
    elif what == "base":
        shutil.copytree(work / "base", tmp_path / "base")
        file = next(iter(base.files))
        data = bytearray((tmp_path / "base" / file).read_bytes())
        data[-2] ^= 1  # an end of a tensor, where the fingerprint does not look
        (tmp_path / "base" / file).write_bytes(data)
        base = BaseFolder(tmp_path / "base")
    else:
        options: dict[str, Any] = {"dtype": "bfloat16"}
    report = merge(trained, base, out, verify=True, **options)
    assert not report.files_from_earlier_start
    merge(trained, base, tmp_path / "made" / "fresh", **options)
    for file in base.files:
        assert (out / file).read_bytes() == (tmp_path / "made" / "fresh" / file).read_bytes()


def test_cut_off_mark_and_shortened_file_are_written_again(work: Path, tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    end(start(work, out, MERGE, "verify_output", 1))
    first, second, *others = sorted(finished_files(out))
    (partial / f"{first}.json").write_bytes((partial / f"{first}.json").read_bytes()[:-20])
    os.truncate(partial / "model" / second, 1000)
    report = merge(read_trained(work / "adapter"), BaseFolder(work / "base"), out)
    assert report.files_from_earlier_start == others
    assert_whole(work, out)


def test_full_disk_keeps_what_is_done(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = write._write_tensor, 0

    def fails(place: Any) -> Any:
        nonlocal count
        count += 1
        if count > 40:
            raise OSError(28, "No space left on device")
        return real(place)

    monkeypatch.setattr(write, "_write_tensor", fails)
    trained, base = read_trained(work / "adapter"), BaseFolder(work / "base")
    with pytest.raises(OSError, match="No space"):
        merge(trained, base, tmp_path / "out")
    monkeypatch.undo()
    finished = finished_files(tmp_path / "out")
    assert finished and len(finished) < len(base.files)
    assert merge(trained, base, tmp_path / "out").files_from_earlier_start == sorted(finished)
    assert_whole(work, tmp_path / "out")
