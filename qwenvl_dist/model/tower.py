"""The vision tower alone: its weights out of a base, and a fingerprint of all that its output depends on."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qwenvl_dist.errors import UserError
from qwenvl_dist.model.base_folder import FINGERPRINT_BLOCK, BaseFolder
from qwenvl_dist.model.fast_path import FrozenTower, Grid
from qwenvl_dist.model.pixels import PixelSettings, pixel_values

_PREFIX = "model.visual."
# Numbers of the configuration that no tensor's shape tells.
_SETTINGS = ("num_heads", "hidden_act", "patch_size", "spatial_merge_size", "temporal_patch_size")


def vision_config(folder: Path) -> Any:
    """Return the configuration of a base's vision tower."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder).vision_config
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--base {folder}: has no readable configuration of a vision tower ({reason})"
        ) from error


def vision_fingerprint(folder: Path) -> str:
    """Return a sha256 that a base with another vision tower does not share.

    Over configuration, name, type, shape and the middle 4 KiB of every tensor of the tower: the same for a base whose
    files are cut otherwise or whose language model was trained.
    """
    base, config = BaseFolder(folder), vision_config(folder)
    digest = hashlib.sha256(json.dumps([getattr(config, name) for name in _SETTINGS]).encode())
    for name, stored in sorted(base.by_runtime_name.items()):
        if name.startswith(_PREFIX):
            entry = base.tensors[stored]
            size = min(entry.nbytes, FINGERPRINT_BLOCK)
            with base.files[entry.file].path.open("rb", buffering=0) as file:
                middle = os.pread(file.fileno(), size, entry.begin + (entry.nbytes - size) // 2)
            digest.update(f"\0{name}\0{entry.dtype}\0{entry.shape}\0".encode() + middle)
    return digest.hexdigest()


class VisionTower:
    """A base's tower and merger without the language model, to be run, never trained."""

    def __init__(
        self, folder: Path, settings: PixelSettings, dtype: torch.dtype, device: torch.device
    ) -> None:
        base = BaseFolder(folder)
        weights: dict[str, Tensor] = {}
        for name, stored in base.by_runtime_name.items():
            if name.startswith(_PREFIX):
                with safe_open(base.files[base.tensors[stored].file].path, "pt") as file:
                    weights[name.removeprefix(_PREFIX)] = file.get_tensor(stored)
        loaded: Any = FrozenTower.from_pretrained(
            None,
            config=vision_config(folder),
            state_dict=weights,
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
        tower, report = loaded
        for fault in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if report[fault]:
                names = sorted(map(str, report[fault]))
                raise UserError(
                    f"--base {folder}: {len(names)} {fault.replace('_', ' ')} in its vision tower, first {names[0]}; "
                    "complete the download or name a Qwen2-VL model"
                )
        self.tower: FrozenTower = tower.eval().to(device)
        self.settings, self.device = settings, device

    @torch.no_grad()
    def encode(self, pixels: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        """Return (visual tokens, hidden) bfloat16 on the host, of flat uint8 pictures."""
        patches = pixel_values(pixels.to(self.device), grids, self.settings).to(self.tower.dtype)
        grid_thw = torch.tensor(grids, device=self.device)
        return self.tower(patches, grid_thw=grid_thw, grids=grids).pooler_output.to("cpu", torch.bfloat16)
