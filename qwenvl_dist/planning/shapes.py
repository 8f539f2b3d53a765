"""The parameters of a base and of what trains on it, by name and shape, from config.json alone."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_dist.errors import UserError
from qwenvl_dist.model.names import runtime_name
from qwenvl_dist.synthetic.base import BaseShape, base_tensors

if TYPE_CHECKING:
    from qwenvl_dist.config import LoraConfig, Recipe

PARTS = {  # by the beginning of a run-time name; the first that fits
    "merger": "model.visual.merger.",
    "vision tower": "model.visual.",
    "embeddings": "model.language_model.embed_tokens.",
    "decoder": "model.language_model.",
    "head": "lm_head.",
}
_OF_RECIPE = {  # what `model.train` calls them
    "vision": ("vision tower",),
    "merger": ("merger",),
    "language": ("embeddings", "decoder"),
    "head": ("head",),
}


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model as it trains."""

    name: str  # at run time, without peft's prefix
    shape: tuple[int, ...]
    part: str  # a key of PARTS, or "adapter"
    trains: bool

    @cached_property
    def numel(self) -> int:
        """Return its elements."""
        return math.prod(self.shape)

    @property
    def recipe_part(self) -> str:
        """Return which part of a recipe's `model.train` its name belongs to, adapters included."""
        part = _part(self.name)
        return next(name for name, parts in _OF_RECIPE.items() if part in parts)


def read_config(base: str) -> dict[str, Any]:
    """Return the config.json of a base: a folder in hub layout, or a hub id whose files are in the hub's cache.

    Raises UserError when there is none.
    """
    path = base_folder_of(base) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"model.base = {base}: {path} cannot be read ({error.strerror}); name a model folder in hub layout"
        ) from error
    except ValueError as error:
        raise UserError(f"model.base = {base}: {path} is not JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise UserError(f"model.base = {base}: {path} holds no object; download it again")
    return config


def base_folder_of(base: str) -> Path:
    """Return the folder of a base, or of the hub's cache; downloads nothing. Raises UserError when there is none."""
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(base, "config.json")
    except HFValidationError:
        found = None
    if not isinstance(found, str):
        raise UserError(
            f"model.base = {base}: neither a folder nor in the hub's cache; a plan needs its config.json, "
            "which `hf download` or the first start of a run fetches"
        )
    return Path(found).parent


def shape_of(config: dict[str, Any], base: str) -> BaseShape:
    """Return the numbers of a config.json, with the text model's at the top (hub files) or in `text_config`.

    Raises UserError when it is another model's.
    """
    text, vision = {**config, **(config.get("text_config") or {})}, config.get("vision_config") or {}
    try:
        shape = BaseShape(
            hidden=int(text["hidden_size"]),
            intermediate=int(text["intermediate_size"]),
            layers=int(text["num_hidden_layers"]),
            heads=int(text["num_attention_heads"]),
            kv_heads=int(text["num_key_value_heads"]),
            vision_depth=int(vision["depth"]),
            vision_width=int(vision["embed_dim"]),
            vision_heads=int(vision["num_heads"]),
            tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            vocab=int(text["vocab_size"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"model.base = {base}: its config.json is not a Qwen2-VL's ({error!r}); name a Qwen2-VL base"
        ) from error
    if config.get("model_type") != "qwen2_vl":
        raise UserError(
            f"model.base = {base}: its config.json says model_type {config.get('model_type')!r}, "
            "a plan can be made for 'qwen2_vl'; name a Qwen2-VL base"
        )
    return shape


def parameters_of(shape: BaseShape, recipe: Recipe) -> list[Parameter]:
    """Return every parameter of the model that a recipe trains, the adapter's last.

    Raises UserError when a target of the adapter matches no linear layer.
    """
    thawed = {part for name in recipe.model.train for part in _OF_RECIPE[name]}
    lora = recipe.lora
    base = [(runtime_name(name), dims) for name, dims in base_tensors(shape)]
    found = [Parameter(name, dims, part := _part(name), part in thawed) for name, dims in base]
    if lora is None:
        return found
    linear = {name.removesuffix(".weight"): dims for name, dims in base if _is_linear(name, dims)}
    saved = [name for name, _ in base if any(_below(name, end) for end in lora.modules_to_save)]
    found += [Parameter(name, dims, "adapter", True) for name, dims in base if name in saved]
    for target in lora.target_modules:
        if not any(_ends(module, target) for module in linear):
            ends = ", ".join(sorted({module.rsplit(".", 1)[-1] for module in linear}))
            raise UserError(
                f"lora.target_modules: {target!r} matches no linear layer of the base; it has {ends}"
            )
    for module, (rows, columns) in linear.items():
        if f"{module}.weight" in saved or not any(_ends(module, target) for target in lora.target_modules):
            continue
        rank = _rank(module, lora)
        shapes: dict[str, tuple[int, ...]] = {"lora_A.weight": (rank, columns), "lora_B.weight": (rows, rank)}
        if lora.lora_bias:
            shapes["lora_B.bias"] = (rows,)
        if lora.use_dora:
            shapes["lora_magnitude_vector"] = (rows,)
        found += [Parameter(f"{module}.{name}", dims, "adapter", True) for name, dims in shapes.items()]
    return found


def _part(name: str) -> str:
    return next(part for part, start in PARTS.items() if name.startswith(start))


def _is_linear(name: str, dims: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and len(dims) == 2 and "embed_tokens" not in name


def _ends(module: str, end: str) -> bool:
    return module == end or module.endswith("." + end)


def _below(name: str, end: str) -> bool:
    """Whether a parameter lies in a module whose name ends so."""
    parts = name.split(".")
    return any(_ends(".".join(parts[:count]), end) for count in range(1, len(parts)))


def _rank(module: str, lora: LoraConfig) -> int:
    for pattern, rank in lora.rank_pattern.items():  # peft.utils.other.get_pattern_key
        if re.match(rf"(.*\.)?({pattern})$", module):
            return int(rank)
    return lora.rank
