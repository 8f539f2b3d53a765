"""Model FLOPs utilisation: the arithmetic that a step needs, as a share of what its GPU could do in that time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qwenvl_dist.config import PROJECTIONS
from qwenvl_dist.model.flops import StepWork, step_work
from qwenvl_dist.model.peaks import peak_flops

if TYPE_CHECKING:
    from qwenvl_dist.config import Recipe
    from qwenvl_dist.data.batch import CaptionBatch
    from qwenvl_dist.training.state import TrainState


def usable_peak(recipe: Recipe, device: torch.device) -> tuple[float | None, str]:
    """Return the FLOP/s that a step of the recipe is set against, or None and why there is no MFU."""
    if device.type != "cuda":
        return None, "no GPU"
    if recipe.model.dtype != "bfloat16":
        return None, f"peaks are those of bfloat16, model.dtype is {recipe.model.dtype}"
    lora = recipe.lora
    if recipe.model.train or (lora and (lora.modules_to_save or set(lora.target_modules) - set(PROJECTIONS))):
        return None, "only adapters on the language model's projections are counted"
    name = torch.cuda.get_device_name(device)
    peak = peak_flops(name)
    return peak, "" if peak else f"the peak of {name} is not known"


def base_model(state: TrainState) -> Any:
    """Return the Qwen2-VL inside engine and adapter."""
    module = state.engine.module
    return module.get_base_model() if hasattr(module, "get_base_model") else module


def work_of(state: TrainState, batch: CaptionBatch) -> StepWork:
    """Return what a batch, still on the host, takes."""
    lora = state.recipe.lora
    return step_work(
        base_model(state).config, batch, lora.rank if lora else 0, lora.target_modules if lora else ()
    )
