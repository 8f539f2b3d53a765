"""What precomputed vision features are bound to, and who may train on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_dist.errors import UserError
from qwenvl_dist.model.lora import part_of
from qwenvl_dist.model.pixels import PixelSettings
from qwenvl_dist.model.tower import vision_config, vision_fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qwenvl_dist.config import DataConfig, PixelRange, Recipe
    from qwenvl_dist.data.index import Manifest


def feature_binding(base: Path, processor: Any, image_size: int | PixelRange, resize: str) -> dict[str, Any]:
    """Return all that features depend on beside the pictures, in JSON types: what a manifest's `features` holds."""
    pixels = PixelSettings.of(processor)
    return {
        "vision": vision_fingerprint(base),
        "image_size": image_size if isinstance(image_size, int) else image_size.model_dump(),
        "resize": resize,
        "patch_size": pixels.patch_size,
        "merge_size": pixels.merge_size,
        "temporal_patch_size": pixels.temporal_patch_size,
        "mean": list(pixels.mean),
        "std": list(pixels.std),
        "hidden": vision_config(base).hidden_size,
    }


def check_binding(manifest: Manifest, name: str, base: Path, processor: Any, data: DataConfig) -> None:
    """Raise UserError unless the features of these shards are those that this base and recipe would compute."""
    for key in ("max_visual_tokens", "micro_batch_visual_tokens"):
        if getattr(data, key) is not None:
            raise UserError(
                f"{name}: holds features, which cannot shrink to data.{key} = {getattr(data, key)}; "
                "drop that key, or train on the pictures themselves"
            )
    if data.over_length == "shrink":
        raise UserError(
            f"{name}: holds features, which cannot shrink; set data.over_length to cut or drop, or train on "
            "the pictures themselves"
        )
    held = manifest.features or {}
    wanted = feature_binding(base, processor, data.image_size, data.resize)
    for key, value in wanted.items():
        if held.get(key) != value:
            remedy = "name the base they were encoded with, or run `shards encode` with this one"
            if key in ("image_size", "resize"):
                remedy = f"set data.{key} to that, or run `shards encode` with this one"
            what = "the vision tower" if key == "vision" else key
            raise UserError(
                f"{name}: holds features of {what} {_short(held.get(key))}, this run has {_short(value)}; {remedy}"
            )


def check_frozen(recipe: Recipe, trained: Iterable[str]) -> None:
    """Raise UserError when a parameter of the tower or the merger is among those that train."""
    moving = [name for name in trained if part_of(name) in ("vision", "merger")]
    if moving:
        raise UserError(
            f"{recipe.data.training_sets[0]}: holds features of a frozen vision tower, but {len(moving)} of its "
            f"parameters would train, first {moving[0]}; train on the pictures themselves, or take vision and merger "
            "out of model.train and lora.target_modules"
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 64 else text[:12]
