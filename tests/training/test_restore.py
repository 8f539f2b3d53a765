"""A checkpoint of any number of ranks and ZeRO stage is loaded by any other, to the bit, and trained on alike."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.forked import ForkedRanks

pytestmark = pytest.mark.dist
WORLDS, STAGES = (1, 2, 3, 4), (2, 3)
CASES = [(world, stage) for world in WORLDS for stage in STAGES]
STEPS = 2  # before the checkpoint; one more comes after


def start(stage: int, seed: int) -> tuple[Any, torch.nn.Module]:
    import deepspeed

    from tests.checkpoints.zero_runs import OddModel, ds_config

    torch.manual_seed(seed)
    settings = ds_config(stage, "float32", {"stage3_param_persistence_threshold": 10} if stage == 3 else None)
    with deepspeed.zero.Init(enabled=stage == 3, config_dict_or_path=settings):
        model = OddModel()
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [{"params": trainable[0::2]}, {"params": trainable[1::2], "lr": 0.02}]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(groups, lr=0.01), config=settings
    )
    return engine, model


def advance(engine: Any, step: int) -> None:
    """Make a step whose mean gradient is the same in every world."""
    engine.backward(engine(torch.tensor(1.0 + step)))
    engine.step()


def held(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Master, moments and weight of each trained parameter, whole. Collective."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[f"{name} master"] = safe_get_full_fp32_param(parameter).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{name} {key}"] = safe_get_full_optimizer_state(parameter, key).clone()
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                found[f"{name} weight"] = parameter.detach().clone()
    return found


def link_all_moments(engine: Any) -> None:
    """DeepSpeed 0.19.8 links the moments after the first group's step: those of later groups are not found."""
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def run_and_save(folder: str, world: int) -> None:
    """One rank: train, save, train on; under each stage."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    for stage in STAGES:
        engine, model = start(stage, seed=0)
        out = Path(folder, f"{world}-{stage}")
        for step in range(STEPS):
            advance(engine, step)
        link_all_moments(engine)
        engine.save_checkpoint(str(out), tag="zero", exclude_frozen_parameters=True)
        saved = held(model)
        advance(engine, STEPS)
        after = held(model)
        if torch.distributed.get_rank() == 0:
            torch.save((saved, after), out / "truth.pt")
    torch.distributed.barrier()


def run_and_load(folder: str, world: int) -> None:
    """One rank: load every checkpoint under each stage, write down what is held then, and after one more step."""
    import deepspeed

    from qwenvl_dist.checkpoints.zero import ZeroCheckpoint
    from qwenvl_dist.training.restore import load_trained_state

    deepspeed.init_distributed("gloo")
    for stage in STAGES:
        for source_world, source_stage in CASES:
            source = Path(folder, f"{source_world}-{source_stage}")
            engine, model = start(stage, seed=1)
            load_trained_state(engine, ZeroCheckpoint(source))
            loaded = held(model)
            advance(engine, STEPS)
            after = held(model)
            if torch.distributed.get_rank() == 0:
                torch.save((loaded, after), source / f"loaded-{world}-{stage}.pt")
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("restored")
    for run in (run_and_save, run_and_load):
        for world in WORLDS:
            ranks = ForkedRanks(run, (str(folder), world), world, folder / "log")
            assert ranks.wait(200) == [0] * world, ranks.said()[-6000:]
    return folder


@pytest.mark.parametrize(("world", "stage"), CASES)
@pytest.mark.parametrize(("source_world", "source_stage"), CASES)
def test_any_world_and_stage_loads_any_other(
    folder: Path, source_world: int, source_stage: int, world: int, stage: int
) -> None:
    source = folder / f"{source_world}-{source_stage}"
    saved, _ = torch.load(source / "truth.pt")
    _, unbroken = torch.load(folder / "1-2" / "truth.pt")
    loaded, after = torch.load(source / f"loaded-{world}-{stage}.pt")
    assert set(loaded) == set(saved) == set(after)
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor), name
        torch.testing.assert_close(after[name], unbroken[name], rtol=1e-6, atol=1e-7)
        assert not torch.equal(after[name], tensor), name
