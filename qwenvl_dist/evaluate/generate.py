"""Load a model, with an adapter or without, and let it answer prompts.

Generation is greedy whatever the model's generation_config.json says: no sampling and no repetition penalty,
so that a caption depends neither on chance nor on the padding of its batch.
"""

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
from transformers import GenerationConfig

from qwenvl_dist.config import DataConfig, ModelConfig, PixelRange
from qwenvl_dist.data.images import ImageSizeRule
from qwenvl_dist.data.prompts import PromptEncoder
from qwenvl_dist.data.stream import SampleEncoder
from qwenvl_dist.errors import UserError
from qwenvl_dist.model.base_folder import BaseFolder
from qwenvl_dist.model.load import TRAINING_IMAGES_FILE, load_model, load_processor, resolve_base
from qwenvl_dist.model.pixels import PixelSettings, pixel_values

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
        answers = greedy_tokens(self.model, batch.to(self.device), max_new_tokens, self.processor.tokenizer)
        return [self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]


def load_captioner(
    model: str,
    adapter: Path | None = None,
    *,
    dtype: str | None = None,
    image_size: int | PixelRange | None = None,
    max_length: int = DataConfig().max_length,
) -> Captioner:
    """Load a model folder or hub id, and a peft adapter on it.

    Pictures take the size they had in training, unless `image_size` says otherwise. `dtype` defaults to
    bfloat16 on a GPU and float32 without one.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    if image_size is None:
        image_size = training_image_size([f for f in (adapter, folder) if f is not None], processor)
    rule = ImageSizeRule.of(image_size, processor, "image size")
    base = load_model(folder, ModelConfig.model_validate({"base": str(folder), "dtype": dtype}))
    base.pixel_settings = PixelSettings.of(processor)
    tuned = None if adapter is None else add_adapter(base, adapter)
    base.requires_grad_(False).eval()
    base.to(device)  # type: ignore[arg-type] (typed wrongly in transformers)
    return Captioner(base, tuned, processor, SampleEncoder(processor, rule, max_length), device)


def training_image_size(folders: list[Path], processor: Any) -> int | PixelRange:
    """Return the picture size of training as the first of these folders tells it, else the processor's."""
    for folder in folders:
        for path in (folder / TRAINING_IMAGES_FILE, folder / "processor" / TRAINING_IMAGES_FILE):
            if not path.is_file():
                continue
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))["image_size"]
                return DataConfig(image_size=stored).image_size
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}: damaged; restore it, or give --image-size") from error
    size = processor.image_processor.size
    return PixelRange.model_construct(min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"])


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


@contextlib.contextmanager
def _generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Hide the model's own settings, from which transformers would fill in what `config` leaves open."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


@torch.inference_mode()
def greedy_tokens(
    model: Qwen2VLForCaptionLoss, batch: PromptBatch, max_new_tokens: int, tokenizer: Any
) -> list[list[int]]:
    """Return the most likely next tokens of each row, up to the end of the turn."""
    assert model.pixel_settings is not None, "set pixel_settings after loading"
    own_ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    ends.update([own_ends] if isinstance(own_ends, int) else own_ends or [])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
        use_cache=True,
    )
    generate: Any = model.generate  # type: ignore[attr-defined] (its protocol does not fit its own models)
    with _generation_config(model, config):
        output: Any = generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            mm_token_type_ids=batch.mm_token_type_ids,
            pixel_values=pixel_values(batch.pixels, batch.grids, model.pixel_settings),
            image_grid_thw=batch.image_grid_thw,
            generation_config=config,
        )
    rows = output[:, batch.input_ids.shape[1] :].tolist()
    return [row[: next((n for n, token in enumerate(row) if token in ends), len(row))] for row in rows]
