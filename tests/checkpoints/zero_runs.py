"""Functions that ranks run: train a little under DeepSpeed, save, and write down what DeepSpeed itself holds."""

from pathlib import Path
from typing import Any

import torch

ODD_SHAPES = [(7, 5), (3,), (1,), (11, 2, 3), (2, 2), (13,)]


class OddModel(torch.nn.Module):
    """Parameters whose sizes divide by nothing, some smaller than the world, one frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(shape)) for shape in ODD_SHAPES])
        self.frozen = torch.nn.Parameter(torch.randn(9), requires_grad=False)

    def forward(self, factor: torch.Tensor) -> torch.Tensor:
        return sum((factor * weight).pow(2).sum() + weight.sum() for weight in self.weights) + self.frozen.sum()


def ds_config(stage: int, dtype: str, zero: dict[str, Any] | None = None, config: dict[str, Any] | None = None):
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage, **(zero or {})},
        **({"bf16": {"enabled": True}} if dtype == "bfloat16" else {}),
        **(config or {}),
    }


def run_odd(
    out: str,
    stage: int,
    dtype: str = "float32",
    groups: int = 1,
    steps: int = 2,
    zero: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """Train `OddModel` and save it to `out`; `truth.pt` beside it is what DeepSpeed gathers itself."""
    import deepspeed

    torch.manual_seed(0)
    deepspeed.init_distributed("gloo")
    with deepspeed.zero.Init(enabled=stage == 3, config_dict_or_path=ds_config(stage, dtype, zero, config)):
        model = OddModel()
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    parameters = [{"params": trainable[i::groups], "lr": 0.01 * (i + 1)} for i in range(groups)]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(parameters, lr=0.01),
        config=ds_config(stage, dtype, zero, config),
    )
    for step in range(steps):
        factor = torch.tensor(1.0 + step + torch.distributed.get_rank(), dtype=getattr(torch, dtype))
        engine.backward(engine(factor))
        engine.step()
    save(engine, model, out, moments=steps > 0)


def save(engine: Any, model: torch.nn.Module, out: str, moments: bool = True) -> None:
    """Save as the training loop does, with the truth beside it. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

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
    if torch.distributed.get_rank() == 0:
        torch.save(truth, Path(out, "truth.pt"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
