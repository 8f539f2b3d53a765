"""How fast GPUs multiply, by what their makers publish. Imports no torch."""

from __future__ import annotations

import re

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
