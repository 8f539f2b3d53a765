"""ZeroCheckpoint against what DeepSpeed gathers itself, on files that real ranks wrote."""

import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenvl_dist.checkpoints.torch_file import UnreadableCheckpoint, load_torch_file
from qwenvl_dist.checkpoints.zero import ZeroCheckpoint, _find_files, is_zero_checkpoint
from tests.ranks import run_ranks

CASES = {
    "stage1": {"stage": 1},
    "stage2": {"stage": 2},
    "stage3": {"stage": 3},
    "stage1-fp16": {"stage": 1, "dtype": "fp16"},
    "stage2-fp16": {"stage": 2, "dtype": "fp16"},
    "stage3-fp16": {"stage": 3, "dtype": "fp16"},
    "stage1-bf16": {"stage": 1, "dtype": "bf16"},
    "stage2-bf16": {"stage": 2, "dtype": "bf16"},
    "stage3-bf16": {"stage": 3, "dtype": "bf16"},
    "stage1-bf16-fp32-accumulation": {
        "stage": 1,
        "dtype": "bf16",
        "config": {"data_types": {"grad_accum_dtype": "fp32"}},
    },
    "stage2-three-groups": {"stage": 2, "groups": 3},
    "stage3-groups": {"stage": 3, "groups": 3},
    "stage3-sub-groups": {"stage": 3, "dtype": "bf16", "groups": 2, "zero": {"sub_group_size": 12}},
    "stage2-round-robin": {"stage": 2, "zero": {"round_robin_gradients": True}},
    "stage2-aligned": {"stage": 2, "dtype": "bf16", "zero": {"parameter_alignment": True}},
    "stage2-offload": {"stage": 2, "dtype": "bf16", "zero": {"offload_optimizer": {"device": "cpu"}}},
    "stage3-offload": {"stage": 3, "dtype": "bf16", "zero": {"offload_optimizer": {"device": "cpu"}}},
    "stage3-sub-groups-offload": {
        "stage": 3,
        "groups": 3,
        "zero": {"sub_group_size": 5, "offload_optimizer": {"device": "cpu"}},
    },
    "stage2-groups-round-robin": {"stage": 2, "groups": 2, "zero": {"round_robin_gradients": True}},
    "stage2-groups": {"stage": 2, "groups": 2},
    "stage2-untrained": {"stage": 2, "steps": 0},
    "stage3-untrained": {"stage": 3, "steps": 0},
}
WORLDS = (1, 2, 3)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """Return a function: world -> folder with a checkpoint a case, trained once a session."""
    folders: dict[int, Path] = {}

    def folder(world: int) -> Path:
        if world not in folders:
            folders[world] = tmp_path_factory.mktemp(f"zero-{world}")
            run_ranks(
                "tests.checkpoints.zero_runs:run_odd",
                world,
                timeout=240,
                out=str(folders[world]),
                cases=CASES,
            )
        return folders[world]

    return folder


@pytest.mark.dist
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES)
def test_masters_moments_and_step_are_those_deepspeed_gathers(saved, case: str, world: int) -> None:
    assert_what_deepspeed_gathers(saved(world), case, world, CASES[case])


@pytest.mark.dist
@pytest.mark.slow
def test_eleven_ranks(tmp_path: Path) -> None:
    """More ranks than most parameters have elements: empty last partitions, and file names that sort as text do not."""
    cases = {
        "stage2": {"stage": 2},
        "stage2-groups": {"stage": 2, "dtype": "bf16", "groups": 3},
        "stage3-bf16": {"stage": 3, "dtype": "bf16", "groups": 2, "zero": {"sub_group_size": 3}},
    }
    run_ranks(
        "tests.checkpoints.zero_runs:run_odd_forked",
        1,
        timeout=300,
        out=str(tmp_path),
        ranks=11,
        cases=cases,
    )
    for name, case in cases.items():
        assert_what_deepspeed_gathers(tmp_path, name, 11, case)


def assert_what_deepspeed_gathers(root: Path, name: str, world: int, case: dict[str, Any]) -> None:
    folder = root / name
    # DeepSpeed 0.19.8 looks for round-robin parameters in the wrong place; the same run without must agree
    truth = torch.load(root / name.replace("-round-robin", "") / "truth.pt")
    checkpoint = ZeroCheckpoint(folder)
    assert checkpoint.stage == case["stage"]
    assert checkpoint.world_size == world
    assert {name: tuple(shape) for name, shape in checkpoint.shapes.items()} == {
        name: tuple(state["fp32"].shape) for name, state in truth.items()
    }
    steps = case.get("steps", 2)
    for name, state in truth.items():
        assert torch.equal(checkpoint.fp32(name), state["fp32"]), name
        assert torch.equal(checkpoint.fp32(name).to(state["weight"].dtype), state["weight"]), name
        flat, numel = state["fp32"].flatten(), state["fp32"].numel()
        for begin, count in ((0, 1), (numel // 3, numel // 2), (numel - 1, 1)):
            if count:
                assert torch.equal(checkpoint.fp32_elements(name, begin, count), flat[begin : begin + count])
        for key in ("exp_avg", "exp_avg_sq"):
            expected = state[key] if steps else torch.zeros(checkpoint.shapes[name])
            assert torch.equal(checkpoint.optimizer_state(name, key), expected), (name, key)
        assert checkpoint.optimizer_step(name) == steps


@pytest.mark.dist
def test_partition_folder_and_its_parent_are_both_accepted(saved) -> None:
    folder = saved(2) / "stage3"
    assert ZeroCheckpoint(folder / "zero").shapes == ZeroCheckpoint(folder).shapes
    assert is_zero_checkpoint(folder) and is_zero_checkpoint(folder / "zero")
    assert not is_zero_checkpoint(folder.parent)


@pytest.mark.dist
@pytest.mark.parametrize("stage", (2, 3))
def test_missing_and_left_over_rank_files_are_refused(saved, tmp_path: Path, stage: int) -> None:
    two, three = saved(2) / f"stage{stage}/zero", saved(3) / f"stage{stage}/zero"
    for name, source, removed, added in (
        ("missing", three, "zero_pp_rank_1_mp_rank_00_optim_states.pt", None),
        ("last", three, "zero_pp_rank_2_mp_rank_00_optim_states.pt", None),
        ("left-over", two, None, three / "zero_pp_rank_2_mp_rank_00_optim_states.pt"),
    ):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        if removed:
            (folder / removed).unlink()
        if added:
            shutil.copy(added, folder)
        with pytest.raises(UnreadableCheckpoint, match="rank"):
            ZeroCheckpoint(folder)


@pytest.mark.dist
@pytest.mark.parametrize("keep", (0, 100, -200))
def test_truncated_files_are_refused(saved, tmp_path: Path, keep: int) -> None:
    folder = tmp_path / "zero"
    shutil.copytree(saved(2) / "stage2/zero", folder)
    file = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UnreadableCheckpoint, match="zero_pp_rank_1"):
        ZeroCheckpoint(folder)


UNSUPPORTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "tensor-parallel-world": ("model", {"mp_world_size": 2}, "tensor parallelism"),
    "experts": ("model", {"autoep_layers": {"0": {}}}, "expert parallelism"),
    "hpz": ("zero", {"zero_hpz_partition_size": 2}, "hpZ"),
    "mics": ("zero", {"mics_shard_size": 2}, "MiCS"),
    "quantised": ("zero", {"zero_quantized_weights": True}, "quantised weights"),
}


@pytest.mark.dist
@pytest.mark.parametrize("case", UNSUPPORTED)
def test_layouts_that_are_not_understood_are_refused(saved, tmp_path: Path, case: str) -> None:
    """Real files with the one entry that DeepSpeed writes for such a run."""
    where, entries, reason = UNSUPPORTED[case]
    shutil.copytree(saved(2) / "stage3/zero", tmp_path / "zero")
    pattern = "*rank_0_*model_states.pt" if where == "model" else "*rank_0_*optim_states.pt"
    (file,) = (tmp_path / "zero").glob(pattern)
    content = torch.load(file, weights_only=False)
    (content if where == "model" else content["ds_config"]["zero_optimization"]).update(entries)
    torch.save(content, file)
    with pytest.raises(UnreadableCheckpoint, match=f"saved with {re.escape(reason)}.* not supported"):
        ZeroCheckpoint(tmp_path / "zero")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("layer_0_expert_0_mp_rank_00_model_states.pt", "experts and pipeline stages"),
        ("layer_01-model_00-model_states.pt", "experts and pipeline stages"),
        ("zero_pp_rank_0_mp_rank_01_optim_states.pt", "tensor parallel"),
    ],
)
def test_files_of_other_kinds_of_parallelism_are_refused(tmp_path: Path, name: str, reason: str) -> None:
    for file in ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt", name):
        (tmp_path / file).touch()
    with pytest.raises(UnreadableCheckpoint, match=f"{reason}.*not supported"):
        _find_files(tmp_path)


def test_rank_files_sort_as_numbers(tmp_path: Path) -> None:
    for rank in range(12):
        (tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    (tmp_path / "mp_rank_00_model_states.pt").touch()
    files, _ = _find_files(tmp_path)
    assert [int(file.name.split("_")[3]) for file in files] == list(range(12))


class _Evil:
    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call",
    [
        lambda mark: (exec, f"open({str(mark)!r}, 'w').write('x')"),
        lambda mark: (eval, f"open({str(mark)!r}, 'w').write('x')"),
        lambda mark: (subprocess.run, [sys.executable, "-c", f"open({str(mark)!r}, 'w')"]),
        lambda mark: (getattr, 3, "real"),
        lambda mark: (torch.load, str(mark)),
        lambda mark: (Path.touch, mark),
    ],
    ids=["exec", "eval", "subprocess", "getattr", "torch.load", "pathlib"],
)
def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path, call) -> None:
    mark, file = tmp_path / "mark", tmp_path / "evil.pt"
    torch.save({"optimizer_state_dict": {"a": torch.ones(2), "b": _Evil(*call(mark))}}, file)
    with pytest.raises(UnreadableCheckpoint, match="refused"):
        load_torch_file(file)
    assert not mark.exists()


def test_other_kinds_of_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(UnreadableCheckpoint, match="old format"):
        load_torch_file(file)
    file.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UnreadableCheckpoint):
        load_torch_file(file)


def test_stored_tensors_read_the_same_bytes(tmp_path: Path) -> None:
    base = torch.arange(60, dtype=torch.float32)
    tree = {
        "view": base[7:40],
        "matrix": base.view(6, 10)[2:4],
        "bf16": torch.randn(5).bfloat16(),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "strided": base.view(6, 10)[:, 3],
        "bytes": b"\xff\x00",
        "set": {1},
    }
    torch.save(tree, tmp_path / "a.pt")
    read = load_torch_file(tmp_path / "a.pt")
    assert read["bytes"] == b"\xff\x00" and read["set"] == {1}
    for name in ("view", "matrix", "bf16", "bool", "scalar", "empty"):
        assert torch.equal(read[name].read().view(read[name].shape), tree[name]), name
        assert read[name].shape == tuple(tree[name].shape)
    assert torch.equal(read["view"].read(3, 5), base[10:15])
    with pytest.raises(UnreadableCheckpoint, match="strided"):
        read["strided"].read()
