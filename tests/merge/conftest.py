from pathlib import Path

import pytest

from tests.merge.tiny import TARGETS, make_base
from tests.ranks import run_ranks

LORA = {"r": 4, "lora_alpha": 12, "target_modules": TARGETS}
CASES = {
    "lora-stage2": {"stage": 2, "lora": LORA, "parts": [], "dtype": "fp32"},
    "lora-stage3": {"stage": 3, "lora": LORA, "parts": [], "dtype": "fp32"},
    "lora-stage3-bf16": {"stage": 3, "lora": LORA, "parts": [], "dtype": "bf16"},
    "rslora-patterns": {
        "stage": 2,
        "lora": {
            **LORA,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"layers.1.mlp.up_proj": 5},
        },
        "parts": [],
        "dtype": "fp32",
    },
    "vision-lora": {
        "stage": 2,
        "lora": {"r": 3, "lora_alpha": 6, "target_modules": ["qkv", "fc1", "q_proj"]},
        "parts": [],
        "dtype": "fp32",
    },
    "lora-bias": {
        "stage": 2,
        "lora": {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "qkv"], "lora_bias": True},
        "parts": [],
        "dtype": "fp32",
    },
    "lora-and-merger": {"stage": 3, "lora": LORA, "parts": ["merger", "q_proj.base_layer"], "dtype": "fp32"},
    "full": {"stage": 3, "lora": None, "parts": ["language_model", "visual"], "dtype": "fp32"},
    "full-stage2": {"stage": 2, "lora": None, "parts": ["language_model"], "dtype": "fp32"},
}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return tiny bases: tied in one file, untied in shards, bf16."""
    root = tmp_path_factory.mktemp("bases")
    return {
        "tied": make_base(root / "tied", tied=True),
        "untied": make_base(root / "untied", tied=False, max_shard_size="200KB"),
        "bf16": make_base(root / "bf16", tied=True, dtype="bfloat16"),
    }


@pytest.fixture(scope="session")
def steps(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a step folder a case, trained on the tied base by two ranks."""
    out = tmp_path_factory.mktemp("steps")
    run_ranks(
        "tests.merge.tiny:run_train", 2, timeout=300, base=str(bases["tied"]), out=str(out), cases=CASES
    )
    return out
