"""Load a model, with an adapter or without, and let it answer prompts."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from qwenvl_dist.config import DataConfig, ModelConfig, PixelRange
from qwenvl_dist.data.prompts import PromptEncoder
from qwenvl_dist.data.sizes import ImageSizeRule
from qwenvl_dist.data.stream import SampleEncoder
from qwenvl_dist.distributed import Topology
from qwenvl_dist.errors import UserError
from qwenvl_dist.model.base_folder import BaseFolder
from qwenvl_dist.model.generate import answer
from qwenvl_dist.model.load import TRAINING_IMAGES_FILE, load_model, load_processor, resolve_base
from qwenvl_dist.model.pixels import PixelSettings

if TYPE_CHECKING:
    from peft import PeftModel

    from qwenvl_dist.data.prompts import PromptBatch
    from qwenvl_dist.model.forward import Qwen2VLForCaptionLoss

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Captioner:
    """A model that answers, with what turns samples into its input."""

    model: Qwen2VLForCaptionLoss  # with the adapter's layers inside, if there is one
    adapter: PeftModel | None
    processor: Any
    encoder: SampleEncoder
    device: torch.device

    def prompt_encoder(self) -> PromptEncoder:
        """Return what makes prompts for this model."""
        return PromptEncoder(self.encoder)

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Make it the bare base for a while: what it was before fine-tuning."""
        with contextlib.nullcontext() if self.adapter is None else self.adapter.disable_adapter():
            yield

    def answer(self, batch: PromptBatch, max_new_tokens: int) -> list[str]:
        """Return the answer to each row of the batch, dummies too."""
        return answer(self.model, batch.to(self.device), max_new_tokens, self.processor.tokenizer)


def load_captioner(
    model: str,
    adapter: Path | None = None,
    *,
    dtype: str | None = None,
    image_size: int | PixelRange | None = None,
    max_length: int = DataConfig().max_length,
    trained_as: Path | None = None,
) -> Captioner:
    """Load a model folder or hub id, and a peft adapter on it.

    Pictures take the size they had in training, unless `image_size` says otherwise: that of the adapter, else of
    `trained_as` (what the model is compared with), else of the model. `dtype` defaults to bfloat16 on a GPU and
    float32 without one. Each rank takes the GPU of its own number on its node.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", Topology.from_environment().local_rank)
    if dtype is None:
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    if adapter is not None:
        _require_adapter(adapter)
    if (Path(model) / ADAPTER_CONFIG).is_file() and not (Path(model) / "config.json").is_file():
        raise UserError(f"{model}: is an adapter; name its base as the model and this folder with --adapter")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    folder = resolve_base(model)
    BaseFolder(folder)  # a download that was cut off is named here, in milliseconds
    processor = load_processor(folder)
    most = None
    if image_size is None:
        image_size, most = training_image_size(
            [f for f in (adapter, trained_as, folder) if f is not None], processor
        )
    rule = ImageSizeRule.of(image_size, processor, "image size", most)
    base = load_model(folder, ModelConfig.model_validate({"base": str(folder), "dtype": dtype}))
    base.pixel_settings = PixelSettings.of(processor)
    tuned = None if adapter is None else add_adapter(base, adapter)
    base.requires_grad_(False).eval()
    base.to(device)  # type: ignore[arg-type] (typed wrongly in transformers)
    return Captioner(base, tuned, processor, SampleEncoder(processor, rule, max_length), device)


def training_image_size(folders: list[Path], processor: Any) -> tuple[int | PixelRange, int | None]:
    """Return the picture size of training as the first of these folders tells it, else the processor's.

    Beside it how many visual tokens all pictures of a sample had at most, None for no bound.
    """
    for folder in folders:
        for path in (folder / TRAINING_IMAGES_FILE, folder / "processor" / TRAINING_IMAGES_FILE):
            if not path.is_file():
                continue
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                most = stored.get("max_visual_tokens")
                return DataConfig(image_size=stored["image_size"], max_visual_tokens=most).image_size, most
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{path}: damaged; restore it, or give --image-size") from error
    size = processor.image_processor.size
    return PixelRange.model_construct(min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"]), None


def _require_adapter(folder: Path) -> None:
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(
                f"--adapter {folder}: has no {name}; "
                "make one with `qwenvl-dist merge CHECKPOINT --adapter-out DIR`"
            )


def add_adapter(model: Qwen2VLForCaptionLoss, folder: Path) -> PeftModel:
    """Put the adapter of a peft folder on the model. Raises UserError unless every tensor finds its place.

    peft itself is silent about adapter tensors that the model has no place for.
    """
    from peft import PeftConfig, PeftModel
    from safetensors import SafetensorError

    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing", category=FutureWarning)
            tuned = PeftModel(model, config, autocast_adapter_dtype=False)
        result = tuned.load_adapter(str(folder), "default", torch_device="cpu", autocast_adapter_dtype=False)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        detail = next((line for line in lines if "size mismatch" in line), lines[0])
        raise UserError(
            f"--adapter {folder}: does not fit this model ({detail}); name the base it was trained on"
        ) from error
    for names, what in (
        (result.unexpected_keys, "of its tensors have no place in this model"),
        (result.missing_keys, "layers of this model have no tensor in it"),
    ):
        if names:
            raise UserError(
                f"--adapter {folder}: {len(names)} {what}, first {sorted(names)[0]}; "
                "name the base it was trained on"
            )
    return tuned
