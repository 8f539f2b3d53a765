"""Each check finds what it looks for: the fault is made, and its name, value and remedy are told."""

import json
import os
import resource
import shutil
import subprocess
import time
from collections import namedtuple
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from qwenvl_dist.errors import UserError
from qwenvl_dist.model.base_folder import SINGLE_FILE
from qwenvl_dist.preflight import environment, storage
from qwenvl_dist.preflight.checks import Check, Context, Status, fail, ok, run, warn
from qwenvl_dist.preflight.network import Link, _judge, pairings
from qwenvl_dist.preflight.registry import CHECKS, choose
from tests.made_shards import jpeg, key_of, record, seal, write_tar
from tests.preflight.fakes import FakeHost, assert_found, context_of, find


@pytest.fixture
def context(scenes_base: Path, scene_shards: Path, tmp_path: Path) -> Context:
    return context_of(scenes_base, scene_shards, tmp_path / "run")


def two(scenes_base: Path, scene_shards: Path, tmp_path: Path, others: Any, **sections: Any) -> Context:
    """Two ranks, the second of which has what `others` makes of the first's dictionaries."""

    def other(value: Any) -> Any:
        return others(value) if isinstance(value, dict) else "node2" if isinstance(value, str) else value

    return context_of(scenes_base, scene_shards, tmp_path / "run", FakeHost(2, other), **sections)


CHEAP_ONES = [check.name for check in CHECKS if check.group not in ("step", "checkpoint", "network")]


@pytest.mark.parametrize("name", CHEAP_ONES)
def test_a_healthy_run_passes(context: Context, name: str) -> None:
    context.run.mkdir()
    assert find(name, context).status == Status.OK


# --- how checks run ---


def test_a_check_whose_need_failed_is_skipped_and_so_on() -> None:
    def first(context: Context) -> Any:
        return fail("1 of 2", "mend it")

    def second(context: Context) -> Any:
        raise AssertionError("must not be called")

    def third(context: Context) -> Any:
        raise AssertionError("must not be called")

    def fourth(context: Context) -> Any:
        return ok("fine")

    checks = [
        Check(first, "a"), Check(second, "a", ("first",)), Check(third, "a", ("second",)), Check(fourth, "a"),
    ]  # fmt: skip
    fake: Any = type("Fake", (), {"host": FakeHost()})()
    found = list(run(checks, fake))
    assert [str(finding.status) for finding in found] == ["fail", "skipped", "skipped", "ok"]
    assert "first" in found[1].value


@pytest.mark.parametrize(
    ("error", "value", "remedy"),
    [
        (UserError("a = 1: must be 2; set it"), "a = 1: must be 2", "set it"),
        (OSError(28, "No space left on device", "/x"), "/x: No space left on device", "mend the storage"),
        (KeyError("k"), "KeyError: 'k'", "not a mistake in the recipe"),
    ],
)
def test_an_error_becomes_a_finding(context: Context, error: Exception, value: str, remedy: str) -> None:
    def broken(context: Context) -> Any:
        raise error

    (finding,) = run([Check(broken, "a")], context)
    assert_found(finding, "fail", value, remedy)


def test_the_worst_verdict_counts_and_names_its_ranks(
    scenes_base: Path, scene_shards: Path, tmp_path: Path
) -> None:
    worse = FakeHost(2, lambda value: warn("half full", "tidy up") if value == ok("fine") else value)
    context = context_of(scenes_base, scene_shards, tmp_path, worse)
    context.hosts = ["node1", "node2"]
    (finding,) = run([Check(lambda _: ok("fine"), "a")], context)
    assert_found(finding, "warn", "rank 1 on node2: half full", "tidy up")


def test_checks_are_chosen_by_name_and_group_with_what_they_need() -> None:
    names = [check.name for check in choose(["lengths"], [])]
    assert names == ["manifests", "lengths"]
    assert {check.group for check in choose([], ["step", "checkpoint"])} == {
        "environment", "storage", "data", "model", "network",
    }  # fmt: skip
    assert "write_speed" not in [check.name for check in choose(["storage"], ["write_speed"])]
    with pytest.raises(UserError, match="check lenghts: is none; there are"):
        choose(["lenghts"], [])


def test_names_are_unique_and_needs_come_first() -> None:
    seen: set[str] = set()
    for check in CHECKS:
        assert check.name not in seen and set(check.needs) <= seen
        seen.add(check.name)


# --- environment ---


def test_packages_in_range(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    real = environment.version
    monkeypatch.setattr(environment, "version", lambda name: "0.1.0" if name == "deepspeed" else real(name))
    assert_found(
        find("packages_in_range", context), "fail", "deepspeed 0.1.0, must be <1,>=0.19", "pip install"
    )

    def missing(name: str) -> str:
        if name == "peft":
            raise PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(environment, "version", missing)
    assert_found(find("packages_in_range", context), "fail", "peft is missing", "launch/setup.sh")


def test_accelerator(
    scenes_base: Path, scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(scenes_base, scene_shards, tmp_path / "run", local_rank=1)
    device = tmp_path / "nvidiactl"
    device.touch()
    monkeypatch.setattr(environment, "NVIDIA_DEVICE", device)
    assert_found(find("accelerator", context), "fail", "the node has NVIDIA GPUs", "a torch built for CUDA")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert_found(
        find("accelerator", context), "fail", "1 GPUs can be seen, local rank 1", "CUDA_VISIBLE_DEVICES"
    )


def test_same_versions(scenes_base: Path, scene_shards: Path, tmp_path: Path) -> None:
    context = two(scenes_base, scene_shards, tmp_path, lambda versions: {**versions, "torch": "2.13.0"})
    assert_found(find("same_versions", context), "fail", "and 2.13.0 on rank 1 on node2", "one environment")


def test_same_code(scenes_base: Path, scene_shards: Path, tmp_path: Path) -> None:
    changed = {"qwenvl_dist/config.py": "0" * 12}
    context = two(scenes_base, scene_shards, tmp_path, lambda files: {**files, **changed})
    assert_found(find("same_code", context), "fail", "sha256 of qwenvl_dist/config.py is", "one checkout")


def test_same_recipe(scenes_base: Path, scene_shards: Path, tmp_path: Path) -> None:
    context = two(scenes_base, scene_shards, tmp_path, lambda keys: {**keys, "lora.rank": "16"})
    assert_found(
        find("same_recipe", context), "fail", "lora.rank is 8 on rank 0 and 16 on rank 1", "same recipe"
    )
    data = {"train": str(scene_shards), "cache_dir": "/scratch/0"}
    own = two(scenes_base, scene_shards, tmp_path, lambda keys: keys, data=data)
    assert find("same_recipe", own).status == Status.OK
    assert "data.cache_dir" not in environment._keys(own.recipe)  # a node's own folder


@pytest.mark.parametrize(("seconds", "status"), [(10, "warn"), (-1000, "fail")])
def test_clocks(scenes_base: Path, scene_shards: Path, tmp_path: Path, seconds: float, status: str) -> None:
    def other(value: Any) -> Any:
        return value + seconds if isinstance(value, float) else value

    context = context_of(scenes_base, scene_shards, tmp_path / "run", FakeHost(2, other))
    assert_found(find("clocks", context), status, f"is {seconds:+.1f} s from rank 0", "NTP")


def test_limits(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (256, 256))
    assert_found(find("limits", context), "fail", "256 open files are allowed, 1024", "ulimit -n 1024")


def test_locked_memory(
    scenes_base: Path, scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = two(scenes_base, scene_shards, tmp_path, lambda value: value)
    monkeypatch.setattr(environment, "has_gpu", lambda: True)
    monkeypatch.setattr(resource, "getrlimit", lambda what: (65536, 65536))
    assert_found(find("limits", context), "warn", "locked memory 64 KiB", "ulimit -l unlimited")


@pytest.mark.parametrize(("mib", "status"), [(64, "fail"), (100, "warn"), (200, "ok")])
def test_shared_memory(
    scenes_base: Path,
    scene_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mib: int,
    status: str,
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(1 << 40, 0, mib << 20))
    context = context_of(scenes_base, scene_shards, tmp_path / "run", FakeHost(2))
    remedy = "" if status == "ok" else "--shm-size"
    assert_found(
        find("shared_memory", context), status, f"{mib}.0 MiB free in /dev/shm, 66.0 MiB for 2 ranks", remedy
    )
    alone = context_of(scenes_base, scene_shards, tmp_path / "run")
    assert find("shared_memory", alone).status == Status.OK  # Docker's 64 MiB are enough


def test_compiled_ops(context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert_found(
        find("compiled_ops", context), "warn", "will be compiled when the run starts", "launch/setup.sh"
    )
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    assert_found(find("compiled_ops", context), "fail", "c++ is not there", "install c++")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB and a hundred files."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k,nr_inodes=100", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_space(scenes_base: Path, scene_shards: Path, small_disk: Path) -> None:
    context = context_of(scenes_base, scene_shards, small_disk / "run")
    assert_found(find("disk_space", context), "fail", "for 1 checkpoints", "train.keep_checkpoints")


def test_disk_space_counts_what_an_earlier_start_left(
    scenes_base: Path, scene_shards: Path, small_disk: Path
) -> None:
    context = context_of(scenes_base, scene_shards, small_disk / "run")
    needed = context.checkpoints.disk_bytes
    checkpoints = small_disk / "run" / "checkpoints" / "step-00000001"
    checkpoints.mkdir(parents=True)
    with (checkpoints / "weights").open("wb") as file:
        file.truncate(needed)  # takes no room, but has that size
    assert find("disk_space", context).status == Status.OK


def test_inodes(scenes_base: Path, scene_shards: Path, small_disk: Path) -> None:
    context = context_of(scenes_base, scene_shards, small_disk / "run")
    context.checkpoints.__dict__.update(bytes=1)
    for number in range(90):
        (small_disk / str(number)).touch()
    assert_found(find("disk_space", context), "fail", "inodes free", "train.output_dir")


# --- storage ---


def test_output_folder(
    scenes_base: Path, scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = FakeHost(2, lambda value: False if value is True else value)  # does not see rank 0's token
    context = context_of(scenes_base, scene_shards, tmp_path / "run", apart)
    assert_found(find("output_folder", context), "fail", "ranks [1] do not see", "train.output_shared=false")
    own = context_of(scenes_base, scene_shards, tmp_path / "run", apart, train={"output_shared": False})
    assert_found(find("output_folder", own), "ok", "rank 0 gathers checkpoints", "")
    (tmp_path / "file").touch()
    blocked = context_of(scenes_base, scene_shards, tmp_path / "file" / "run")
    assert_found(find("output_folder", blocked), "fail", "rank 0 cannot write there", "choose another folder")


def test_atomic_files(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, target: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refused)
    assert_found(find("atomic_files", context), "fail", "cannot make a symbolic link", "POSIX file system")
    assert not list(context.run.iterdir())


def test_write_speed(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.5)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    monkeypatch.setattr(storage, "WRITE_BYTES", 1 << 20)  # 2 MB/s
    context.checkpoints.__dict__.update(bytes=1 << 30)
    assert_found(
        find("write_speed", context), "warn", "a checkpoint of 1024 MiB takes", "train.checkpoint_async"
    )


def test_node_cache(scenes_base: Path, scene_shards: Path, tmp_path: Path) -> None:
    data = {"train": str(scene_shards), "cache_dir": str(tmp_path / "cache"), "cache_gib": 1e-6}
    context = context_of(scenes_base, scene_shards, tmp_path / "run", data=data)
    assert_found(find("node_cache", context), "warn", "two windows of shards are", "data.cache_gib")
    (tmp_path / "file").touch()
    data = {**data, "cache_dir": str(tmp_path / "file" / "cache")}
    context = context_of(scenes_base, scene_shards, tmp_path / "run", data=data)
    assert find("node_cache", context).status == Status.FAIL


# --- data ---


def test_manifests(scenes_base: Path, scene_shards: Path, tmp_path: Path) -> None:
    context = context_of(scenes_base, tmp_path / "none", tmp_path / "run")
    assert_found(find("manifests", context), "fail", "data.train: ", "")
    packed_twice = {"data.train": ("0" * 64, "40 samples")}
    context = two(scenes_base, scene_shards, tmp_path, lambda value: packed_twice)
    assert_found(
        find("manifests", context), "fail", "data.train has another fingerprint on rank 1", "one packing"
    )


def test_sampled_shards(scenes_base: Path, scene_shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(scene_shards, tmp_path / "shards"))
    tar = copy / "shard-000003.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 0xFF  # inside the first member
    tar.write_bytes(data)
    context = context_of(scenes_base, copy, tmp_path / "run")
    finding = find("sampled_shards", context)
    assert_found(finding, "fail", " in shard-000003.tar: ", f"qwenvl-dist shards verify {copy}")


def test_lengths(scenes_base: Path, scene_shards: Path, tmp_path: Path) -> None:
    data = {"train": str(scene_shards), "image_size": 280, "max_length": 110}
    context = context_of(scenes_base, scene_shards, tmp_path / "run", data=data)
    assert_found(find("lengths", context), "fail", "with 100 visual tokens", "raise data.max_length")
    context = context_of(scenes_base, scene_shards, tmp_path / "run", data={**data, "over_length": "drop"})
    assert_found(find("lengths", context), "warn", "100.00% of samples cannot fit", "data.max_visual_tokens")
    context = context_of(scenes_base, scene_shards, tmp_path / "run", data={**data, "max_length": 130})
    assert_found(find("lengths", context), "warn", "lose the end of the caption", "raise data.max_length")


def test_text_only(scenes_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    members = [{"json": record("How many?", f"{n} of them.", images=0)} for n in range(3)]
    write_tar(folder / "shard-000000.tar", 0, members)
    context = context_of(scenes_base, seal(folder), tmp_path / "run")
    assert_found(find("text_only", context), "warn", "no sample has a picture", "shards show")


def test_extremes(scenes_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    members = [{"jpg": jpeg(n, 56), "json": record("COCO Yes:", "A square.")} for n in range(3)]
    members.append({"jpg": jpeg(3, 112), "json": record("COCO Yes:", "A square.")})
    members.append(
        {"jpg": jpeg(4, 56), "json": record("COCO Yes:", "A red square on a large blue circle. " * 9)}
    )
    write_tar(folder / "shard-000000.tar", 0, members)
    data = {"train": str(seal(folder)), "image_size": {"min_pixels": 3136, "max_pixels": 200704}}
    context = context_of(scenes_base, folder, tmp_path / "run", data=data)
    value = find("extremes", context).value
    assert f"longest text: {key_of(0, 4)} in shard-000000.tar" in value
    assert f"most visual tokens: {key_of(0, 3)} in shard-000000.tar" in value and "112x112 pixels" in value


# --- model ---


@pytest.fixture
def own_base(scenes_base: Path, tmp_path: Path) -> Path:
    """A copy of the base, to change."""
    return Path(shutil.copytree(scenes_base, tmp_path / "base"))


def set_config(base: Path, **values: Any) -> None:
    path = base / "config.json"
    config = json.loads(path.read_text())
    owner = config["text_config"] if "text_config" in config and not set(values) & set(config) else config
    owner.update(values)
    path.write_text(json.dumps(config))


def test_base_files(own_base: Path, scene_shards: Path, tmp_path: Path) -> None:
    differs = FakeHost(2, lambda value: value[::-1] if isinstance(value, str) else value)
    context = context_of(own_base, scene_shards, tmp_path / "run", differs)
    assert_found(
        find("base_files", context), "fail", "has other files on rank 1", "copy one base to all nodes"
    )
    weights = own_base / SINGLE_FILE
    weights.write_bytes(weights.read_bytes()[:-1000])
    context = context_of(own_base, scene_shards, tmp_path / "run")
    assert_found(find("base_files", context), "fail", SINGLE_FILE, "")
    weights.unlink()
    context = context_of(own_base, scene_shards, tmp_path / "run")
    assert_found(find("base_files", context), "fail", "", "")


def test_base_tensor_names(own_base: Path, scene_shards: Path, tmp_path: Path) -> None:
    set_config(own_base, num_hidden_layers=9)
    context = context_of(own_base, scene_shards, tmp_path / "run")
    assert_found(
        find("base_tensor_names", context), "fail", "tensors are missing, such as", "of one revision"
    )


def test_shapes_of_the_base(own_base: Path, scene_shards: Path, tmp_path: Path) -> None:
    set_config(own_base, intermediate_size=128)
    context = context_of(own_base, scene_shards, tmp_path / "run")
    assert_found(find("base_tensor_names", context), "fail", "config.json asks for", "of one revision")


def test_processor(own_base: Path, scene_shards: Path, tmp_path: Path) -> None:
    set_config(own_base, image_token_id=3)
    context = context_of(own_base, scene_shards, tmp_path / "run")
    assert_found(find("processor", context), "fail", "config.json says image_token_id = 3", "one revision")


def test_adapter_targets(scenes_base: Path, scene_shards: Path, tmp_path: Path) -> None:
    lora = {"target_modules": ["q_proj", "v_prj"]}
    context = context_of(scenes_base, scene_shards, tmp_path / "run", lora=lora)
    assert_found(find("adapter_targets", context), "fail", "'v_prj' matches no linear layer", "it has")
    lora = {"target_modules": ["q_proj", "qkv"]}
    context = context_of(scenes_base, scene_shards, tmp_path / "run", lora=lora)
    assert_found(find("adapter_targets", context), "ok", "2 of them in the vision tower", "")


def test_memory(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    class Little:
        available = 1 << 20

    monkeypatch.setattr(psutil, "virtual_memory", Little)
    assert_found(find("memory", context), "fail", "GiB of 0.0 of the node's memory", "qwenvl-dist plan")


# --- network ---


@pytest.mark.parametrize("count", [2, 3, 4, 7, 16])
def test_each_node_meets_each_other_once(count: int) -> None:
    rounds = pairings(range(count))
    met = [pair for pairs in rounds for pair in pairs]
    assert len(met) == len(set(met)) == count * (count - 1) // 2
    for pairs in rounds:
        ends = [end for pair in pairs for end in pair]
        assert len(ends) == len(set(ends))


def test_links_name_the_slow_one(context: Context) -> None:
    context.hosts = ["node1", "node2", "node3"]
    fast = [Link((0, 1), 1e-4, 2e9, 2e9), Link((0, 2), 1e-4, 2e9, 1.8e9)]
    assert _judge(context, fast, "nodes").status == Status.OK
    verdict = _judge(context, [*fast, Link((1, 2), 1e-4, 3e8, 3e8)], "nodes")
    assert verdict.status == Status.WARN and "QWENVL_INTERFACE" in verdict.remedy
    assert "between rank 1 on node2 and rank 2 on node3 is slow" in verdict.value
    assert _judge(context, [Link((0, 1), 1e-4, 5e6, 5e6)], "nodes").status == Status.WARN
    assert _judge(context, [Link((0, 1), 1e-4, 5e7, 5e7)], "ranks").status == Status.OK
