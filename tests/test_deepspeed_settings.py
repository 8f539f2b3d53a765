"""DeepSpeed settings that cannot work with slices read by each rank are refused before any rank starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from qwenvl_dist.config import Recipe
from qwenvl_dist.distributed import deepspeed_config
from qwenvl_dist.errors import UserError


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"offload_param": {"device": "nvme"}}, "zero_optimization.offload_param.device = nvme: must be"),
        (
            {"offload_optimizer": {"device": "nvme"}},
            "offload_optimizer.nvme_path = null: must be a folder on",
        ),
        (
            {"offload_optimizer": {"device": "nvme", "nvme_path": "/none"}},
            'offload_optimizer.nvme_path = "/none": must be a folder on',
        ),
        (
            {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}},
            "offload_optimizer.device = nvme with stage 2: needs stage 3; use",
        ),
        ({"zero_hpz_partition_size": 2}, "zero_optimization.zero_hpz_partition_size = 2: must be 1"),
        ({"zero_quantized_weights": True}, "zero_optimization.zero_quantized_weights = true: "),
        ({"zero_quantized_nontrainable_weights": True}, "zero_quantized_nontrainable_weights = true: "),
    ],
)
def test_settings_that_need_whole_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: dict[str, Any], message: str
) -> None:
    for name in ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "zero3.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, **setting}}))
    sections = {
        "data": {"train": "shards"},
        "train": {"output_dir": "run"},
        "deepspeed": {"config": str(file)},
    }
    with pytest.raises(UserError) as caught:
        deepspeed_config(Recipe.model_validate(sections))
    assert message in str(caught.value) and "\n" not in str(caught.value)
