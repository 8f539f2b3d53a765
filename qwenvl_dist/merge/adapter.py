"""LoRA as peft keeps it: its config, its tensor names, its folder."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qwenvl_dist.errors import UserError
from qwenvl_dist.model.names import PEFT_PREFIX, runtime_name

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_TENSOR_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")

# What `W + scaling * B A` is right for: these keys it uses or need not know ...
_KNOWN_KEYS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# ... and every other key must say "nothing"; peft grows a new kind of adapter with every release
_NOTHING: tuple[Any, ...] = (None, False, "none", {}, [])
_PLAIN_INITS: tuple[Any, ...] = (True, False, "gaussian", "orthogonal")  # others change the base weights too


@dataclass(frozen=True)
class LoraDelta:
    """What LoRA adds to one weight: `scaling * lora_b @ lora_a`, not multiplied out."""

    lora_a: torch.Tensor  # (rank, in) float32
    lora_b: torch.Tensor  # (out, rank) float32
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight it belongs to."""
        return self.lora_b.shape[0], self.lora_a.shape[1]

    def norm(self) -> float:
        """Return the Frobenius norm of the whole product: ||B A||^2 = sum((B^T B) * (A A^T))."""
        a, b = self.lora_a.double(), self.lora_b.double()
        return abs(self.scaling) * math.sqrt(max(((b.T @ b) * (a @ a.T)).sum().item(), 0.0))


class LoraConfig:
    """The parts of adapter_config.json that decide what a merge computes.

    Raises:
        UserError: the adapter is of a kind that a merge here would get wrong.
    """

    def __init__(self, raw: dict[str, Any], source: Path) -> None:
        self.raw = raw
        if str(raw.get("peft_type", "LORA")).upper() != "LORA":
            raise UserError(f"{source}: peft_type {raw['peft_type']} is not LORA; merge it with peft")
        if raw.get("init_lora_weights", True) not in _PLAIN_INITS:
            raise UserError(
                f"{source}: init_lora_weights {raw['init_lora_weights']!r} changes the base weights too; "
                "convert the adapter with peft (path_initial_model_for_weight_conversion of save_pretrained)"
            )
        for key, value in sorted(raw.items()):
            if key not in _KNOWN_KEYS and value not in _NOTHING:
                raise UserError(f"{source}: {key} = {value!r} is not supported here; merge it with peft")
        try:
            self._rank, self._alpha = int(raw["r"]), float(raw["lora_alpha"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{source}: r and lora_alpha must be numbers ({error!r})") from error

    def rank(self, module: str) -> int:
        """Return the rank of the adapter on a module."""
        return int(_by_pattern(self.raw.get("rank_pattern"), module, self._rank))

    def scaling(self, module: str) -> float:
        """Return alpha / rank, or alpha / sqrt(rank) for rsLoRA (peft/tuners/lora/layer.py, update_layer)."""
        alpha = float(_by_pattern(self.raw.get("alpha_pattern"), module, self._alpha))
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.raw.get("use_rslora") else alpha / rank


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():  # as peft.utils.other.get_pattern_key
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def split_name(name: str) -> tuple[str, str] | None:
    """Return the run-time module name and the side, `A` or `B`, of a LoRA tensor; None for other tensors.

    Raises:
        UserError: the tensor belongs to another kind of adapter.
    """
    match = _TENSOR_NAME.fullmatch(name)
    if match:
        return runtime_name(match["module"]), match["side"]
    if ".lora_" in name or ".modules_to_save." in name:
        raise UserError(f"adapter tensor {name} is not lora_A or lora_B of one adapter; merge it with peft")
    return None


def pair_up(tensors: dict[str, torch.Tensor], config: LoraConfig, source: Path) -> dict[str, LoraDelta]:
    """Return the delta of each module (run-time name) from all LoRA tensors, each used and sound.

    Raises:
        UserError: a tensor that is empty, not finite, alone, of the wrong shape, or named twice.
    """
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        split = split_name(name)
        if split is None:
            raise UserError(f"{source}: {name} is not a LoRA tensor")
        module, side = split
        if tensor.numel() == 0:
            raise UserError(
                f"{source}: {name} has shape {list(tensor.shape)}: it was saved without gathering the "
                "partitions of ZeRO-3; merge from the checkpoint's own partitions"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{source}: {name} holds NaN or infinity: training went wrong; use an older checkpoint"
            )
        if side in sides.setdefault(module, {}):
            raise UserError(f"{source}: lora_{side} of {module} is there twice")
        sides[module][side] = tensor.to(torch.float32)
    deltas = {}
    for module, pair in sides.items():
        if set(pair) != {"A", "B"}:
            raise UserError(f"{source}: {module} has only lora_{''.join(pair)}")
        a, b, rank = pair["A"], pair["B"], config.rank(module)
        if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
            raise UserError(
                f"{source}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, "
                f"the config says rank {rank}"
            )
        deltas[module] = LoraDelta(a, b, config.scaling(module))
    if not deltas:
        raise UserError(f"{source} holds no adapter tensor")
    return deltas


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return adapter_config.json of a folder, or None."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def read_peft_folder(folder: Path) -> dict[str, LoraDelta]:
    """Read an adapter that peft saved."""
    raw = read_config(folder)
    if raw is None or not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{folder} needs {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}")
    return pair_up(load_file(folder / ADAPTER_WEIGHTS), LoraConfig(raw, folder), folder)


def write_peft_folder(folder: Path, raw_config: dict[str, Any], deltas: dict[str, LoraDelta]) -> None:
    """Write a folder that `PeftModel.from_pretrained` loads onto transformers 5's Qwen2-VL, in float32."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; name another folder for the adapter")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, delta in deltas.items():
        tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = delta.lora_a.contiguous()
        tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = delta.lora_b.contiguous()
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = {**raw_config, "inference_mode": True}
    (folder / ADAPTER_CONFIG).write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
