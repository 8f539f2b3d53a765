"""LoRA and DoRA as peft keeps them: config, tensor names, folder."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qwenvl_dist.errors import UserError
from qwenvl_dist.merge.safetensors_writer import COPY_BYTES, SafetensorsWriter
from qwenvl_dist.model.base_folder import write_header
from qwenvl_dist.model.names import PEFT_PREFIX, SAVED_COPY, hub_name, runtime_name

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_TENSOR_NAME = re.compile(
    r"(?P<module>.+)\.lora_(?:(?P<side>[AB])(?:\.default)?\.weight|(?P<bias>B)(?:\.default)?\.bias"
    r"|(?P<other>embedding_[AB]|magnitude_vector)(?:\.default)?(?:\.weight)?)"
)

# What this merge is right for: these keys it uses or need not know ...
_KNOWN_KEYS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias",
    "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
# ... and every other key must say "nothing"; peft grows a new kind of adapter with every release
_NOTHING: tuple[Any, ...] = (None, False, "none", {}, [])
_PLAIN_INITS: tuple[Any, ...] = (True, False, "gaussian", "orthogonal")  # others change the base weights too


@dataclass(frozen=True)
class LoraDelta:
    """What LoRA adds to one weight: `scaling * lora_b @ lora_a`, not multiplied out.

    With DoRA the sum's rows then get the lengths in `magnitude` (arXiv:2402.09353, equation 5).
    """

    lora_a: torch.Tensor  # (rank, in) float32
    lora_b: torch.Tensor  # (out, rank) float32
    scaling: float
    magnitude: torch.Tensor | None = None  # (out,) float32
    bias: torch.Tensor | None = (
        None  # (out,) float32, of lora_B: `scaling * bias` is added to the module's own
    )
    embedding: bool = False  # of an embedding, which peft keeps transposed and by other names
    vector: bool = False  # what `of_bias` gives

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, or of the bias, that it belongs to."""
        return (self.lora_b.shape[0],) if self.vector else (self.lora_b.shape[0], self.lora_a.shape[1])

    def of_bias(self) -> "LoraDelta":
        """Return what is added to the module's bias."""
        assert self.bias is not None
        return LoraDelta(torch.ones(1, 1), self.bias[:, None], self.scaling, vector=True)

    def norm(self) -> float:
        """Return the Frobenius norm of the whole product: ||B A||^2 = sum((B^T B) * (A A^T))."""
        a, b = self.lora_a.double(), self.lora_b.double()
        return abs(self.scaling) * math.sqrt(max(((b.T @ b) * (a @ a.T)).sum().item(), 0.0))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return what peft's folder holds, by the end of its name."""
        if self.embedding:
            return {"lora_embedding_A": self.lora_b.T, "lora_embedding_B": self.lora_a.T}
        optional = {"lora_magnitude_vector": self.magnitude, "lora_B.bias": self.bias}
        return {
            "lora_A.weight": self.lora_a,
            "lora_B.weight": self.lora_b,
            **{end: tensor for end, tensor in optional.items() if tensor is not None},
        }


@dataclass(frozen=True)
class TrainedParameter:
    """A parameter that was trained as a whole; its values stay on the disk until they are read."""

    shape: tuple[int, ...]
    elements: Callable[[int, int], torch.Tensor]  # (first, count) of the flattened parameter, in float32
    in_adapter: bool = False  # of a copy that the adapter holds (modules_to_save), not the base's own


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

    @property
    def use_dora(self) -> bool:
        """Whether each adapter has a magnitude vector."""
        return bool(self.raw.get("use_dora"))

    def saves(self, tensor: str) -> set[str]:
        """Return the entries of modules_to_save that a tensor (run-time name) is of: peft goes by a module's end."""
        modules = {
            ".".join(parts[:depth])
            for parts in (name.split(".") for name in (tensor, hub_name(tensor)))
            for depth in range(1, len(parts))
        }
        ends = self.raw.get("modules_to_save") or ()
        return {end for end in ends if any(module.endswith(end) for module in modules)}

    def excludes(self, module: str) -> bool:
        """Whether a module (run-time name) gets no adapter though it is a target (check_target_module_exists)."""
        names = (module, hub_name(module))
        if any(
            re.match(rf"(^|.*\.){saved}($|\..*)", name)
            for saved in self.raw.get("modules_to_save") or ()
            for name in names
        ):
            return True
        excluded = self.raw.get("exclude_modules") or ()
        if isinstance(excluded, str):
            return any(re.fullmatch(excluded, name) for name in names)
        return any(name == end or name.endswith(f".{end}") for end in excluded for name in names)

    def rank(self, module: str) -> int:
        """Return the rank of the adapter on a module, by the name it had in training; so for `scaling`."""
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
    """Return the module, as it was called, and the part of an adapter's tensor; None for other tensors.

    A part is `A`, `B`, `bias`, `embedding_A`, `embedding_B` or `magnitude_vector`.

    Raises:
        UserError: the tensor belongs to another kind of adapter.
    """
    match = _TENSOR_NAME.fullmatch(name)
    if match:
        part = "bias" if match["bias"] else match["side"] or match["other"]
        return match["module"].removeprefix(PEFT_PREFIX), part
    if ".lora_" in name or ".modules_to_save." in name.replace(SAVED_COPY, "."):
        raise UserError(
            f"adapter tensor {name} is not lora_A, lora_B or magnitude of one adapter; merge it with peft"
        )
    return None


def pair_up(tensors: dict[str, torch.Tensor], config: LoraConfig, source: Path) -> dict[str, LoraDelta]:
    """Return the delta of each module (run-time name) from all LoRA tensors, each used and sound.

    Raises:
        UserError: a tensor that is empty, not finite, alone, of the wrong shape, or named twice.
    """
    adapters: dict[str, dict[str, torch.Tensor]] = {}
    names: dict[str, str] = {}  # that the modules had in training, which patterns are for
    for name, tensor in tensors.items():
        split = split_name(name)
        if split is None:
            raise UserError(f"{source}: {name} is not a LoRA tensor")
        module, part = runtime_name(split[0]), split[1]
        if tensor.numel() == 0:
            raise UserError(
                f"{source}: {name} has shape {list(tensor.shape)}: it was saved without gathering the "
                "partitions of ZeRO-3; merge from the checkpoint's own partitions"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{source}: {name} holds NaN or infinity: training went wrong; use an older checkpoint"
            )
        if part in adapters.setdefault(module, {}):
            raise UserError(f"{source}: lora_{part} of {module} is there twice")
        adapters[module][part] = tensor.to(torch.float32)
        names[module] = split[0]
    deltas = {}
    for module, parts in adapters.items():
        embedding = "embedding_A" in parts or "embedding_B" in parts
        due = {"embedding_A", "embedding_B"} if embedding else {"A", "B"}
        due |= {"magnitude_vector"} if config.use_dora else set()
        due |= {"bias"} if config.raw.get("lora_bias") else set()
        if embedding and config.use_dora:
            raise UserError(
                f"{source}: {module} is an embedding under DoRA, not supported; merge it with peft"
            )
        if set(parts) != due:
            raise UserError(
                f"{source}: {module} has only lora_{', lora_'.join(sorted(parts))}; with use_dora = "
                f"{str(config.use_dora).lower()} and lora_bias = {str(bool(config.raw.get('lora_bias'))).lower()} "
                f"due are lora_{', lora_'.join(sorted(due))}"
            )
        if embedding:
            parts |= {"A": parts["embedding_B"].T.contiguous(), "B": parts["embedding_A"].T.contiguous()}
        a, b, rank = parts["A"], parts["B"], config.rank(names[module])
        if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
            raise UserError(
                f"{source}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, "
                f"the config says rank {rank}"
            )
        magnitude, bias = parts.get("magnitude_vector"), parts.get("bias")
        for what, vector in (("a magnitude vector", magnitude), ("a bias of lora_B", bias)):
            if vector is not None and vector.shape != b.shape[:1]:
                raise UserError(
                    f"{source}: {module} has {b.shape[0]} rows and {what} of {list(vector.shape)}"
                )
        deltas[module] = LoraDelta(a, b, config.scaling(names[module]), magnitude, bias, embedding)
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


def read_peft_folder(folder: Path) -> tuple[dict[str, LoraDelta], dict[str, TrainedParameter]]:
    """Read an adapter that peft saved: deltas by module, and trained copies (modules_to_save) by tensor."""
    raw = read_config(folder)
    if raw is None or not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{folder} needs {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}")
    config = LoraConfig(raw, folder)
    lora: dict[str, torch.Tensor] = {}
    saved: dict[str, TrainedParameter] = {}
    for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items():  # maps the file, reads nothing yet
        # Below an adapter on the head peft saves the head too.
        if split_name(name) or not (".base_layer." in name or config.saves(runtime_name(name))):
            lora[name] = tensor
        elif runtime_name(name) in saved:
            raise UserError(f"{folder}: {name} is there twice")
        else:
            saved[runtime_name(name)] = TrainedParameter(tuple(tensor.shape), _reader(tensor), True)
    return pair_up(lora, config, folder), saved


def _reader(tensor: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    flat = tensor.reshape(-1)
    return lambda start, count: flat[start : start + count].to(torch.float32, copy=True)


def write_peft_folder(
    folder: Path,
    raw_config: dict[str, Any],
    deltas: dict[str, LoraDelta],
    saved: dict[str, TrainedParameter],
) -> None:
    """Write a folder that `PeftModel.from_pretrained` loads onto transformers 5's Qwen2-VL, in float32."""
    config = LoraConfig(raw_config, folder)
    for module, delta in deltas.items():
        if (config.rank(module), config.scaling(module)) != (delta.lora_a.shape[0], delta.scaling):
            raise UserError(
                f"rank_pattern or alpha_pattern of the adapter call {module} by another name, which peft would not "
                "find; change the patterns in adapter_config.json to run-time names"
            )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; name another folder for the adapter")
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {
        f"{PEFT_PREFIX}{module}.{end}": TrainedParameter(tuple(tensor.shape), _reader(tensor))
        for module, delta in deltas.items()
        for end, tensor in delta.tensors().items()
    }
    for name, parameter in saved.items():
        module, _, kind = name.rpartition(".")
        below = ".base_layer" if module in deltas else ""
        parameters[f"{PEFT_PREFIX}{module}{below}.{kind}"] = parameter
    header = write_header({name: ("F32", each.shape) for name, each in parameters.items()}, {"format": "pt"})
    counts = {name: math.prod(each.shape) for name, each in parameters.items()}
    size = len(header) + 4 * sum(counts.values())
    with SafetensorsWriter(folder / ADAPTER_WEIGHTS, header, size) as writer:
        offset = len(header)
        for name, parameter in parameters.items():
            for start in range(0, counts[name], COPY_BYTES // 4):
                block = parameter.elements(start, min(COPY_BYTES // 4, counts[name] - start))
                writer.write(block.numpy().data.cast("B"), offset)
                offset += 4 * len(block)
        writer.finish()
    (folder / ADAPTER_CONFIG).write_text(
        json.dumps({**raw_config, "inference_mode": True}, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
