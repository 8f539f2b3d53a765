"""One optimizer step under a real engine: what the frozen tower keeps, and who learns at which rate."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.ranks import run_ranks
from tests.training.runs import TIMEOUT, write_recipe

pytestmark = pytest.mark.dist


@pytest.fixture
def on_ranks(tmp_path: Path, scenes_base: Path, scene_shards: Path) -> Callable[..., None]:
    """Runs one of the checks below on so many ranks under a ZeRO stage, with these sections in its recipe."""

    def run(check: Callable[[str], None], world: int, stage: int, **sections: Any) -> None:
        recipe = write_recipe(
            tmp_path / "recipe.yaml", scenes_base, scene_shards, tmp_path / "run", stage,
            data={"workers": 0}, **sections,
        )  # fmt: skip
        run_ranks(f"{__name__}:{check.__name__}", world, timeout=TIMEOUT, recipe=str(recipe))

    return run


def state_of(recipe: str, *overrides: str) -> Any:
    """One rank: everything up to the first step."""
    from qwenvl_dist.config import load_recipe
    from qwenvl_dist.distributed import HostGroup, Topology, start
    from qwenvl_dist.model.load import resolve_base
    from qwenvl_dist.training.run import assemble

    loaded = load_recipe(recipe, overrides)
    accelerator = start(loaded)
    return assemble(
        loaded, accelerator, Topology.from_environment(), HostGroup(60), resolve_base(loaded.model.base)
    )


def one_step(state: Any, rate: float) -> None:
    from qwenvl_dist.training.step import train_step

    batches = next(state.batches.iterate())
    tokens, samples = state.host.sum(sum(b.target_tokens for b in batches), sum(len(b.keys) for b in batches))
    train_step(state, batches, rate, tokens, samples)


def run_tower_check(recipe: str) -> None:
    """One rank: steps under each checkpointing mode; nothing of the frozen tower is kept, nor is it run twice."""
    from qwenvl_dist.model.lora import set_activation_checkpointing

    state = state_of(recipe)
    base = state.engine.module.get_base_model()
    base.enable_input_require_grads()  # as libraries do
    inside: list[bool] = []
    saved: list[bool] = []
    outputs: list[bool] = []

    def leave(_module: Any, _inputs: Any, output: Any) -> None:
        outputs.append(output.pooler_output.requires_grad)
        inside.clear()

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(bool(inside))
        return tensor

    base.model.visual.register_forward_pre_hook(lambda *_: inside.append(True))
    base.model.visual.register_forward_hook(leave)
    state.engine.train()
    for every in (0, 2, 1):
        set_activation_checkpointing(base, every)
        with saved_tensors_hooks(note, lambda tensor: tensor):
            one_step(state, 1e-3)
    assert saved and not any(saved)
    assert outputs == [False] * 3 * state.recipe.train.grad_accum_steps
    state.accelerator.end_training()


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("fast", ["true", "false"])
def test_the_frozen_tower_keeps_nothing_under_zero(
    on_ranks: Callable[..., None], stage: int, fast: str
) -> None:
    on_ranks(
        run_tower_check,
        2,
        stage,
        model={"fast_path": fast == "true"},
        train={"grad_accum_steps": 2},
    )


def run_rates_check(recipe: str) -> None:
    """One rank: Adam's first step moves each element by its learning rate, or not at all."""
    from deepspeed.utils import safe_get_full_fp32_param

    from qwenvl_dist.model.lora import part_of, trainable_parameters

    state = state_of(recipe)
    trained = trainable_parameters(state.engine.module)

    def values() -> dict[str, torch.Tensor]:
        found = {name: safe_get_full_fp32_param(parameter) for name, parameter in trained.items()}
        return {name: tensor.clone() for name, tensor in found.items() if tensor is not None}

    state.engine.train()
    before = values()
    one_step(state, 1e-3)
    largest: dict[str, float] = {}
    for name, tensor in values().items():
        part = part_of(name)
        largest[part] = max(largest.get(part, 0.0), float((tensor - before[name]).abs().max()))
    # The schedule's rate of this step is a tenth of the peak.
    assert largest == pytest.approx({"vision": 2e-5, "merger": 3e-4, "language": 1e-3}, rel=0.02)
    state.accelerator.end_training()


@pytest.mark.parametrize("stage", [2, 3])
def test_each_part_learns_at_its_own_rate(on_ranks: Callable[..., None], stage: int) -> None:
    on_ranks(
        run_rates_check,
        1,
        stage,
        model={"train": ["vision", "merger"]},
        optim={"learning_rate": 1e-2, "learning_rates": {"vision": 2e-4, "merger": 3e-3}},
        train={"grad_accum_steps": 1},
    )


def run_fused_check(recipe: str) -> None:
    """One rank: each step of each partition, beside the same step of the AdamW that is not fused."""
    state = state_of(recipe)
    adam = state.engine.optimizer.optimizer
    assert type(adam) is torch.optim.AdamW  # DeepSpeed took ours, and no untested one
    plain: dict[int, tuple[torch.nn.Parameter, torch.optim.AdamW]] = {}
    compared = 0

    def partitions() -> list[tuple[dict[str, Any], torch.Tensor]]:
        return [(group, p) for group in adam.param_groups for p in group["params"] if p.grad is not None]

    def copy_inputs(*_: Any) -> None:
        for group, partition in partitions():
            assert group["fused"]
            if id(partition) not in plain:
                copy = torch.nn.Parameter(partition.detach().clone())
                options = {key: group[key] for key in ("betas", "eps", "weight_decay")}
                plain[id(partition)] = copy, torch.optim.AdamW([copy], fused=False, foreach=False, **options)
            copy, optimizer = plain[id(partition)]
            copy.grad = partition.grad.clone()  # type: ignore[union-attr]
            optimizer.param_groups[0]["lr"] = group["lr"]

    def compare(*_: Any) -> None:
        nonlocal compared
        for _, partition in partitions():
            copy, optimizer = plain[id(partition)]
            optimizer.step()
            torch.testing.assert_close(partition.detach(), copy.detach(), rtol=1e-6, atol=1e-7)
            compared += 1

    adam.register_step_pre_hook(copy_inputs)
    adam.register_step_post_hook(compare)
    state.engine.train()
    for _ in range(3):
        one_step(state, 1e-2)
    assert compared == 3 * len(plain) > 0
    state.accelerator.end_training()


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_steps_our_fused_adam_as_the_plain_one(on_ranks: Callable[..., None], stage: int) -> None:
    on_ranks(
        run_fused_check,
        2,
        stage,
        optim={"weight_decay": 0.1},
        train={"grad_accum_steps": 1},
    )


def run_refusal(recipe: str) -> None:
    """One rank: a rate for what does not train."""
    from qwenvl_dist.errors import UserError

    with pytest.raises(UserError, match=r"^optim.learning_rates names 'vision', of which nothing trains"):
        state_of(recipe, "optim.learning_rates={vision: 1e-5}")


def test_a_rate_for_a_frozen_part_is_refused(tmp_path: Path, scenes_base: Path, scene_shards: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", scenes_base, scene_shards, tmp_path / "run")
    run_ranks("tests.training.test_step:run_refusal", 1, timeout=TIMEOUT, recipe=str(recipe))
