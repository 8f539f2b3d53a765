"""Functions that ranks run: train a little under DeepSpeed, save, and write down what DeepSpeed holds."""

import sys
import traceback
from pathlib import Path
from typing import Any

import torch

ODD_SHAPES = [(7, 5), (3,), (1,), (11, 2, 3), (2, 2), (13,)]


class OddModel(torch.nn.Module):
    """Parameters whose sizes divide by nothing, some smaller than the world, one frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(
            [torch.nn.Parameter(torch.randn(shape)) for shape in ODD_SHAPES]
        )
        self.frozen = torch.nn.Parameter(torch.randn(9), requires_grad=False)

    def forward(self, factor: torch.Tensor) -> torch.Tensor:
        return (
            sum((factor * weight).pow(2).sum() + weight.sum() for weight in self.weights) + self.frozen.sum()
        )


def ds_config(
    stage: int, dtype: str, zero: dict[str, Any] | None = None, config: dict[str, Any] | None = None
):
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **(zero or {})},
        **({dtype: {"enabled": True}} if dtype not in ("float32", "fp32") else {}),
        # A smaller first scale than DeepSpeed's, which skips the first steps until the gradients fit
        **({"fp16": {"enabled": True, "initial_scale_power": 4}} if dtype == "fp16" else {}),
        **(config or {}),
    }


def run_odd(out: str, cases: dict[str, dict[str, Any]]) -> None:
    """Train `OddModel` under each case and save it to `out/<case>`. Collective."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # Torch trains in float16 on any CPU; DeepSpeed asks whether the CPU has instructions of its own for it.
    get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed("gloo")
    for name, case in cases.items():
        print(f"case {name}", file=sys.stderr, flush=True)
        _train_odd(str(Path(out, name)), **case)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_odd_forked(out: str, ranks: int, cases: dict[str, dict[str, Any]]) -> None:
    """Run `run_odd` on `ranks` ranks that are forks of this process: many ranks for one import of DeepSpeed."""
    import os

    import deepspeed  # noqa: F401 - before the forks

    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            code = 1
            try:  # a fork must never return into the code that forked it
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
                os.environ.update(LOCAL_WORLD_SIZE=str(ranks))
                run_odd(out, cases)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * ranks, codes


def _train_odd(
    out: str,
    stage: int,
    dtype: str = "float32",
    groups: int = 1,
    steps: int = 2,
    zero: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    import deepspeed

    torch.manual_seed(0)
    settings = ds_config(stage, dtype, zero, config)
    with deepspeed.zero.Init(enabled=stage == 3, config_dict_or_path=settings):
        model = OddModel()
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    parameters = [{"params": trainable[i::groups], "lr": 0.01 * (i + 1)} for i in range(groups)]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(parameters, lr=0.01), config=settings
    )
    for step in range(steps):
        factor = torch.tensor(1.0 + step + torch.distributed.get_rank(), dtype=next(model.parameters()).dtype)
        engine.backward(engine(factor))
        engine.step()
    save(engine, model, out, moments=steps > 0)


def save(engine: Any, model: torch.nn.Module, out: str, moments: bool = True) -> None:
    """Save as the training loop does, with the truth beside it. Collective."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer = engine.optimizer
    if moments and hasattr(optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed 0.19.8 links the moments after the first group's step: those of later groups are not found
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    engine.save_checkpoint(out, tag="zero", exclude_frozen_parameters=True)
    truth = {
        name: {
            "fp32": safe_get_full_fp32_param(parameter).clone(),
            **{
                key: safe_get_full_optimizer_state(parameter, key).clone()
                for key in ("exp_avg", "exp_avg_sq")
                if moments
            },
        }
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if parameter.requires_grad:
                truth[name]["weight"] = parameter.detach().clone()
    if torch.distributed.get_rank() == 0:
        torch.save(truth, Path(out, "truth.pt"))
