"""Qwen2-VL and its processor from a folder in hub layout or a hub id, aware of ZeRO-3; and the kernels it runs on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl_dist.errors import UserError
from qwenvl_dist.model.base_folder import refuse_keys

if TYPE_CHECKING:
    import torch

    from qwenvl_dist.config import ModelConfig, PixelRange
    from qwenvl_dist.model.forward import Qwen2VLForCaptionLoss

TRAINING_IMAGES_FILE = "qwenvl_dist.json"  # beside the processor: what preprocessor_config.json cannot say


def resolve_base(base: str) -> Path:
    """Return the folder of a base: itself when it is one, else the hub's snapshot of that id (downloaded once)."""
    folder = Path(base)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.base = {base}: has no config.json; name a folder in hub layout")
        return folder
    if base.count("/") != 1 or base.startswith((".", "/")):
        raise UserError(
            f"model.base = {base}: no such folder; give a folder in hub layout or a hub id owner/name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(base))
    except Exception as error:
        raise UserError(
            f"model.base = {base}: no such folder, and the hub gave no snapshot of it ({type(error).__name__}); "
            "download the model first and name its folder"
        ) from error


def load_processor(folder: Path) -> Any:
    """Return the model's processor: tokenizer, chat template and image settings."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.base = {folder}: its processor cannot be loaded ({reason})") from error


def save_processor(
    processor: Any, image_size: int | PixelRange, folder: Path, max_visual_tokens: int | None = None
) -> None:
    """Write tokenizer, chat template and processor with the pixel settings of training into `folder`.

    A fixed square side has no place in preprocessor_config.json: other programs read the same area from it, ours the
    exact side from the file beside it, and the bound of a sample with several pictures.
    """
    if isinstance(image_size, int):
        low = high = image_size * image_size
    else:
        low, high = image_size.min_pixels, image_size.max_pixels
    processor.save_pretrained(folder)
    settings = folder / "preprocessor_config.json"
    if not settings.is_file():
        settings.write_text(processor.image_processor.to_json_string(), encoding="utf-8")
    config = json.loads(settings.read_text(encoding="utf-8"))
    config.update(min_pixels=low, max_pixels=high, size={"shortest_edge": low, "longest_edge": high})
    settings.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    image = image_size if isinstance(image_size, int) else image_size.model_dump()
    content: dict[str, Any] = {"image_size": image}
    if max_visual_tokens is not None:
        content["max_visual_tokens"] = max_visual_tokens
    (folder / TRAINING_IMAGES_FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")


def choose_attention(wanted: str) -> str:
    """Return the attention kernel's name in transformers: `auto` is FlashAttention 2 where it can run, else sdpa."""
    import torch

    installed = importlib.util.find_spec("flash_attn") is not None and torch.cuda.is_available()
    if wanted == "flash_attention_2" and not installed:
        raise UserError(
            "model.attention = flash_attention_2: the package flash-attn or a GPU is missing here; "
            "install it, or use auto or sdpa"
        )
    if wanted == "flex_attention":
        from transformers.utils.import_utils import is_torch_flex_attn_available

        if not (
            torch.cuda.is_available() and is_torch_flex_attn_available()
        ):  # on a CPU it has no backward pass
            raise UserError(
                "model.attention = flex_attention: needs a GPU and a torch that has it; use auto or sdpa"
            )
        return wanted
    return "flash_attention_2" if wanted != "sdpa" and installed else "sdpa"


def use_flex_attention(model: Any) -> None:
    """Let the language model attend by FlexAttention, through transformers; the tower has no mask and keeps sdpa."""
    model.model.language_model.config._attn_implementation = "flex_attention"


def load_model(folder: Path, config: ModelConfig) -> Qwen2VLForCaptionLoss:
    """Load the base for training or generation, under ZeRO-3 each rank its own slices.

    Raises UserError when the folder does not hold exactly the model's tensors.
    """
    import torch
    from safetensors import SafetensorError
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    dtype, attention = getattr(torch, config.dtype), choose_attention(config.attention)
    partitioned = is_deepspeed_zero3_enabled()  # accelerate registered the DeepSpeed configuration
    if partitioned:
        from qwenvl_dist.model.zero3_load import load_partitioned as load
    else:
        load = _load_whole
    try:
        if attention == "flex_attention":
            model = load(folder, dtype, "sdpa")
            use_flex_attention(model)
            return model
        return load(folder, dtype, attention)
    except UserError as error:
        raise UserError(f"model.base = {folder}: {error}") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if partitioned and isinstance(error, RuntimeError):
            raise  # of DeepSpeed or a collective, not of the files
        reason = str(error).splitlines()[0]
        raise UserError(f"model.base = {folder}: its weights cannot be loaded ({reason})") from error


def _load_whole(folder: Path, dtype: torch.dtype, attention: str) -> Qwen2VLForCaptionLoss:
    from qwenvl_dist.model.forward import Qwen2VLForCaptionLoss

    loaded: Any = Qwen2VLForCaptionLoss.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # else a table on the screen and an error without a name
    )
    model, report = loaded
    # transformers fills a gap with random weights and a warning; nobody wants to train on those.
    for fault in ("missing", "mismatched", "unexpected"):
        refuse_keys(fault, [str(key) for key in report[f"{fault}_keys"]])
    return model
