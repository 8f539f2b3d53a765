"""Preflight on real ranks: healthy, and with one fault at a time."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwenvl_dist.commands.preflight import _end
from qwenvl_dist.preflight.registry import CHECKS
from tests.planning.test_plan import recipe_of
from tests.ranks import ROOT, command, free_port, run_ranks


def write_recipe(folder: Path, base: Path, shards: Path, stage: int = 2, **sections: Any) -> Path:
    folder.mkdir(exist_ok=True)
    train = {"output_dir": str(folder / "run"), "max_steps": 2, **sections.pop("train", {})}
    model = {"base": str(base), "dtype": "float32", **sections.pop("model", {})}
    recipe = recipe_of(
        base, shards, model=model, train=train, tracking={"mode": "disabled"},
        deepspeed={"config": str(ROOT / "ds_configs" / f"zero{stage}.json")}, **sections,
    )  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    return path


@pytest.fixture(scope="module")
def broken(scenes_base: Path, scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the checks of step and checkpoint say, healthy and broken, on one rank."""
    folder = tmp_path_factory.mktemp("broken")
    # Recomputed layers, of which a test makes reentrant ones; workers, of which a test wants more.
    recipe = write_recipe(folder, scenes_base, scene_shards, data={"train": str(scene_shards), "workers": 1})
    run_ranks(
        "tests.preflight.faults:run_step_faults", 1, timeout=150, recipe=str(recipe), out=str(folder / "out")
    )
    return json.loads((folder / "out").read_text())


@pytest.mark.parametrize(
    ("case", "status", "value", "remedy"),
    [
        ("model_loads", "ok", "0.028 M parameters train, ZeRO-2", ""),
        ("worst_batch", "ok", "micro-batch of 4 samples x ", ""),
        ("rank_without_picture", "ok", "rank 0 without a picture", ""),
        ("adapter_gradients", "ok", "all 28 tensors", ""),
        ("loss_falls", "ok", " -> ", ""),
        ("loader_rate", "ok", "", ""),
        ("checkpoint", "ok", "written and verified", ""),
        ("left behind", "ok", "[]", ""),
        ("out of memory", "fail", "CUDA out of memory", "lower data.micro_batch_size"),
        ("reentrant", "fail", "14 of 28 tensors get none, such as", "is activation checkpointing reentrant"),
        ("uphill", "fail", " -> ", "a run would not learn"),
        ("slow loader", "warn", "samples/s on", "raise data.workers"),
        ("full disk", "fail", "No space left on device", "mend the storage"),
        ("not read back", "fail", "came back changed, such as master 0", "a resume would not go on"),
        ("empty adapter", "fail", "a merge of 14 tensors would change nothing", "did not learn"),
    ],
)
def test_step_and_checkpoint(broken: dict[str, Any], case: str, status: str, value: str, remedy: str) -> None:
    found = broken[case]
    assert found["status"] == status and value in found["value"] and remedy in found["remedy"], found


def launched(recipe: Path, *words: str, stage: int = 2, code: int = 0, **environment: str) -> dict[str, Any]:
    """Run preflight on two ranks as a user does; return its report."""
    done = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file",
            f"launch/accelerate/cpu_zero{stage}.yaml", "--num_processes", "2", "--main_process_port", str(free_port()),
            "-m", "qwenvl_dist", "preflight", str(recipe), "--json", *words,
        ],
        capture_output=True, text=True, timeout=300, cwd=ROOT, env={**os.environ, **environment},
    )  # fmt: skip
    assert (done.returncode != 0) == (code != 0), done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("stage", [2, 3])
def test_all_checks_pass_on_two_ranks(
    tiny_base: Path, photo_shards: Path, tmp_path: Path, stage: int
) -> None:
    recipe = write_recipe(
        tmp_path, tiny_base, photo_shards, stage, data={"train": str(photo_shards), "workers": 1}
    )
    report = launched(recipe, stage=stage)
    assert [check["name"] for check in report["checks"]] == [check.name for check in CHECKS]
    assert {check["status"] for check in report["checks"]} <= {"ok", "warn"}, report
    assert report["ok"] and report["complete"] and not report["failed"]
    assert not (tmp_path / "run").exists()  # nothing is left behind
    print(f"ZeRO-{stage}: {report['seconds']} s")


def test_a_recipe_that_names_its_deepspeed_file_passes_without_a_launcher(
    scenes_base: Path, scene_shards: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, scenes_base, scene_shards, stage=3)
    assert "ok      compiled_ops" in command("preflight", recipe, "--only", "compiled_ops").stdout


def test_checks_that_never_began_are_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    _end(as_json=False, findings=[], failed=[], seconds=0.0, complete=False)
    assert capsys.readouterr().out == "\n0 checks in 0.0 s; broken off\n"


@pytest.mark.parametrize(
    ("fault", "name", "value"),
    [
        ("other version", "same_versions", "peft is 0.21.2 on rank 0 and 9.9.9 on rank 1"),
        ("late", "clocks", "is +1000.0 s from rank 0"),
    ],
)
def test_a_rank_that_differs_is_named(
    scenes_base: Path, scene_shards: Path, tmp_path: Path, fault: str, name: str, value: str
) -> None:
    recipe = write_recipe(tmp_path, scenes_base, scene_shards)
    out = tmp_path / "out"
    run_ranks(
        "tests.preflight.faults:run_preflight", 2, timeout=120, fault=fault,
        words=[str(recipe), "--only", name], out=str(out),
    )  # fmt: skip
    report = json.loads(out.read_text())
    assert report["code"] == 1 and report["failed"] == [name] and not report["ok"]
    (found,) = report["checks"]
    assert value in found["value"], found


@pytest.mark.parametrize(
    ("fault", "only", "message"),
    [
        ("silent", "manifests", r"rank 1 on \S+ did not answer"),
        ("no dummy picture", "rank_without_picture", r"rank_without_picture|rank 1 on \S+"),
    ],
)
def test_a_rank_that_does_not_come_is_named_in_time(
    scenes_base: Path, scene_shards: Path, tmp_path: Path, fault: str, only: str, message: str
) -> None:
    recipe = write_recipe(tmp_path, scenes_base, scene_shards, stage=3)
    words = [str(recipe), "--only", only, "--timeout", "15"]
    with pytest.raises(AssertionError, match=message):
        run_ranks(
            "tests.preflight.faults:run_preflight",
            2,
            timeout=90,
            fault=fault,
            words=words,
            out=str(tmp_path / "out"),
        )


def test_ranks_with_other_recipes_and_folders(scenes_base: Path, scene_shards: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, scenes_base, scene_shards)
    out = tmp_path / "out"
    for name, key, value in (
        ("same_recipe", "train.seed", "train.seed is 0 on rank 0 and 1 on rank 1"),
        ("output_folder", "train.output_dir", "ranks [1] do not see what rank 0 writes"),
    ):
        other = yaml.safe_load(recipe.read_text())
        section, _, last = key.partition(".")
        for rank in (0, 1):
            other[section][last] = rank if last == "seed" else str(tmp_path / f"run{rank}")
            (tmp_path / f"recipe{rank}.yaml").write_text(yaml.safe_dump(other))
        out.unlink(missing_ok=True)
        run_ranks(
            "tests.preflight.faults:run_check", 2, timeout=120, name=name, out=str(out),
            recipe=str(tmp_path / "recipe{rank}.yaml"),
        )  # fmt: skip
        found = json.loads(out.read_text())
        assert found["status"] == "fail" and value in found["value"], found


# --- a slow link, between two hosts that are network namespaces ---


@pytest.fixture
def two_hosts() -> Iterator[list[str]]:
    """Names of two network namespaces with a wire between them, 10.98.7.1 and 10.98.7.2."""
    names = [f"qwenvl-{os.getpid()}-{end}" for end in "ab"]
    a, b = names
    steps = [
        f"ip netns add {a}", f"ip netns add {b}",
        f"ip link add eth0 netns {a} type veth peer name eth0 netns {b}",
        f"ip -n {a} addr add 10.98.7.1/24 dev eth0", f"ip -n {b} addr add 10.98.7.2/24 dev eth0",
        *(f"ip -n {name} link set {device} up" for name in names for device in ("lo", "eth0")),
        f"ip netns exec {b} tc qdisc add dev eth0 root tbf rate 80mbit burst 64kbit latency 400ms",
    ]  # fmt: skip
    try:
        if os.geteuid() != 0 or not shutil.which("tc"):
            pytest.skip("needs root and tc")
        for step in steps:
            done = subprocess.run(step.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces here: {step}: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_a_throttled_link_is_named(
    scenes_base: Path, scene_shards: Path, tmp_path: Path, two_hosts: list[str]
) -> None:
    recipe = write_recipe(tmp_path, scenes_base, scene_shards)
    out = tmp_path / "out"
    arguments = json.dumps({"recipe": str(recipe), "name": "links", "out": str(out)})
    port = free_port()
    ranks = []
    for rank, host in enumerate(two_hosts):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "10.98.7.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }  # fmt: skip
        run = f"{sys.executable} -m tests.ranks tests.preflight.faults:run_check '{arguments}'"
        inside = f"hostname node{rank + 1} && exec {run}"
        ranks.append(
            subprocess.Popen(
                ["ip", "netns", "exec", host, "unshare", "--uts", "bash", "-c", inside], cwd=ROOT, env=environment,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    for rank in ranks:
        output, _ = rank.communicate(timeout=120)
        assert rank.returncode == 0, output[-4000:]
    found = json.loads(out.read_text())
    assert found["status"] == "warn" and "QWENVL_INTERFACE" in found["remedy"], found
    assert "the link between rank 0 on node1 and rank 1 on node2 is slow" in found["value"]


# --- what `train` looks at by itself ---


def train(recipe: Path, *words: str, files: int, code: int) -> str:
    """Train on one rank that may open so many files; return what it said."""
    done = subprocess.run(
        ["bash", "-c", f"ulimit -n {files} && exec {sys.executable} -m qwenvl_dist train {recipe} {' '.join(words)}"],
        capture_output=True, text=True, timeout=240, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-4000:]
    return done.stderr


def test_train_stops_at_a_cheap_check_unless_told_otherwise(
    scenes_base: Path, scene_shards: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, scenes_base, scene_shards)
    said = train(recipe, files=700, code=2)
    line = said.strip().splitlines()[-1]
    assert (
        "error: preflight check limits: 700 open files are allowed, 1024 may be needed; ulimit -n 1024"
        in line
    )
    assert "--skip-preflight trains all the same" in line
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert "finished: step 2" in train(recipe, "--skip-preflight", files=700, code=0)
    assert "finished" in train(recipe, "train.max_steps=3", files=4096, code=0)  # and a resume passes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "lenghts"], "check lenghts: is none; there are"),
        (["--timeout", "1"], "--timeout 1: must be at least 10 seconds"),
        (["--shards", "-1"], "--shards -1: must be at least 0"),
    ],
)
def test_a_wrong_word_is_told_in_one_line(
    scenes_base: Path, scene_shards: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    done = command("preflight", write_recipe(tmp_path, scenes_base, scene_shards), *words, code=2)
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
