"""Model FLOPs utilisation: the arithmetic that a step needs, as a share of what its GPU could do in that time."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from qwenvl_dist.config import PROJECTIONS
from qwenvl_dist.model.flops import StepWork, step_work

if TYPE_CHECKING:
    from qwenvl_dist.config import Recipe
    from qwenvl_dist.data.batch import CaptionBatch
    from qwenvl_dist.training.state import TrainState

# Dense bf16 products summed in float32, TFLOP/s, by torch's name of the device after "NVIDIA", "Tesla" or "GeForce":
# what NVIDIA publishes for each card (half of it where sparsity is counted), not measured. V100 and T4 have float16 in
# these units alone: bf16 on them is far from this rate.
_PEAK_TFLOPS = (
    (r"H200", 989.4),
    (r"H200 NVL", 835.5),
    (r"GH200 .*", 989.4),
    (r"H100 80GB HBM3|H800", 989.4),
    (r"H100 PCIe", 756.0),
    (r"H100 NVL", 835.5),
    (r"A100[- ].*|A800[- ].*", 312.0),
    (r"A40", 149.7),
    (r"A30", 165.0),
    (r"A10", 125.0),
    (r"L40S", 362.0),
    (r"L40", 181.0),
    (r"L4", 121.0),
    (r"RTX A6000", 154.8),
    (r"RTX 4090", 165.2),
    (r"RTX 3090", 71.0),
    (r"V100-SXM[23]-.*", 125.0),
    (r"V100-PCIE-.*", 112.0),
    (r"T4", 65.0),
)


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a GPU, None for an unknown one. A slice of a GPU (MIG) is an unknown one."""
    name = re.sub(r"^(NVIDIA |Tesla |GeForce )+", "", device_name)
    if "MIG" in name.split():
        return None
    return next((1e12 * peak for pattern, peak in _PEAK_TFLOPS if re.fullmatch(pattern, name)), None)


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
