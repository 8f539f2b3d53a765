"""An optimizer on NVMe (ZeRO-3) is saved, read and resumed like any other; real ranks, real asynchronous I/O."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenvl_dist.checkpoints.torch_file import UnreadableCheckpoint
from qwenvl_dist.checkpoints.zero import ZeroCheckpoint
from tests.training.forked import ForkedRanks
from tests.training.test_restore import advance, held

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(900)]
WORLD, STEPS = 2, 2
# On two ranks the first two take more than 1 MiB each and are swapped, the others stay in memory together.
SHAPES = [(1024, 601), (700, 1003), (7, 5), (13,)]


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES])
        self.frozen = torch.nn.Parameter(torch.randn(9), requires_grad=False)

    def forward(self, factor: torch.Tensor) -> torch.Tensor:
        return sum((factor * weight).pow(2).sum() for weight in self.weights) + self.frozen.sum()


def start(nvme: str, seed: int, pipeline: bool) -> tuple[Any, torch.nn.Module]:
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    from tests.checkpoints.zero_runs import ds_config

    torch.manual_seed(seed)
    offload = {
        "device": "nvme", "nvme_path": nvme, "pin_memory": False, "buffer_count": 8,
        "pipeline_read": pipeline, "pipeline_write": pipeline,
    }  # fmt: skip
    settings = ds_config(3, "float32", {"sub_group_size": 300_000, "offload_optimizer": offload})
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = Model()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=DeepSpeedCPUAdam(trained, lr=0.01), config=settings
    )
    return engine, model


def run_and_resume(folder: str) -> None:
    """One rank: train, save in both ways, train on; then another engine that loads what was saved."""
    import deepspeed

    from qwenvl_dist.training.checkpoint import partitions
    from qwenvl_dist.training.restore import load_trained_state
    from qwenvl_dist.training.swapped import is_swapped

    deepspeed.init_distributed("gloo")
    main = torch.distributed.get_rank() == 0
    for pipeline in (False, True):
        out = Path(folder, f"pipeline-{pipeline}")
        engine, model = start(f"{out}/nvme", 0, pipeline)
        zero = engine.optimizer
        swapped = [is_swapped(zero, group) for group in range(len(zero.fp16_groups))]
        assert swapped == [True, True, False], zero.fp16_partitioned_groups_flat_numel
        for step in range(STEPS):
            advance(engine, step)
        engine.save_checkpoint(f"{out}/deepspeed", tag="zero", exclude_frozen_parameters=True)
        for name, content in partitions(engine).items():
            Path(out, "ours").mkdir(parents=True, exist_ok=True)
            torch.save(content, Path(out, "ours", name))
        saved = held(model)
        advance(engine, STEPS)
        after = held(model)
        torch.distributed.barrier()
        engine, model = start(f"{out}/nvme-again", 1, pipeline)
        load_trained_state(engine, ZeroCheckpoint(out / "ours"))
        loaded = held(model)
        advance(engine, STEPS)
        if main:
            torch.save((saved, after, loaded, held(model)), out / "truth.pt")
        else:
            held(model)
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip(
            "NO TEST OF NVMe: DeepSpeed's asynchronous I/O needs libaio's headers (Debian: libaio-dev)"
        )
    folder = tmp_path_factory.mktemp("nvme")
    ranks = ForkedRanks(run_and_resume, (str(folder),), WORLD, folder / "log")
    assert ranks.wait(600) == [0] * WORLD, ranks.said()[-6000:]
    return folder


@pytest.mark.parametrize("pipeline", (False, True))
@pytest.mark.parametrize("writer", ("ours", "deepspeed"))
def test_checkpoint_holds_what_was_swapped_out(folder: Path, writer: str, pipeline: bool) -> None:
    saved, *_ = torch.load(folder / f"pipeline-{pipeline}/truth.pt")
    checkpoint = ZeroCheckpoint(folder / f"pipeline-{pipeline}" / writer)
    assert len(checkpoint.shapes) == len(SHAPES)
    for name in checkpoint.shapes:
        assert torch.equal(checkpoint.fp32(name), saved[f"{name} master"]), name
        assert checkpoint.optimizer_step(name) == STEPS
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(checkpoint.optimizer_state(name, key), saved[f"{name} {key}"]), (name, key)


@pytest.mark.parametrize("pipeline", (False, True))
def test_resume_loads_to_the_bit_and_goes_on_alike(folder: Path, pipeline: bool) -> None:
    saved, after, loaded, resumed = torch.load(folder / f"pipeline-{pipeline}/truth.pt")
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor), name
        torch.testing.assert_close(resumed[name], after[name], rtol=1e-6, atol=1e-7)
        assert not torch.equal(after[name], tensor), name


def test_swap_files_that_are_missing_or_cut_off_are_refused(folder: Path) -> None:
    own = folder / "pipeline-False/deepspeed"
    masters = sorted((own / "zero/offloaded_tensors/rank01").glob("[0-9]*.tensor.swp"))
    content = masters[0].read_bytes()
    masters[0].write_bytes(content[:-5000])
    with pytest.raises(UnreadableCheckpoint, match=r"bytes, \d+ are due: missing, cut off"):
        ZeroCheckpoint(own)
    masters[0].unlink()
    with pytest.raises(UnreadableCheckpoint, match="holds the masters of 1 sub-groups, at least 2 of rank 1"):
        ZeroCheckpoint(own)
    masters[0].write_bytes(content)
