"""Conversations with random pictures as batches, and models with an adapter that is not zero."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qwenvl_dist.config import LoraConfig, ModelConfig
from qwenvl_dist.data.batch import CaptionBatch, Example, collate
from qwenvl_dist.data.stream import SampleEncoder
from qwenvl_dist.model.load import load_model
from qwenvl_dist.model.lora import make_trainable, trainable_parameters
from qwenvl_dist.model.pixels import PixelSettings, pixel_values

CONFIG = ModelConfig(dtype="float32", attention="sdpa")
LORA = LoraConfig(rank=4, alpha=8, dropout=0.0)


def example(encoder: SampleEncoder, key: str, answer: str, *sizes: tuple[int, int]) -> Example:
    """A conversation with random pictures of these (height, width)."""
    random = np.random.default_rng(len(answer))
    content = [*[{"type": "image"}] * len(sizes), {"type": "text", "text": "COCO Yes:"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    grids = tuple((1, height // 14, width // 14) for height, width in sizes)
    pixels = [random.integers(0, 256, 3 * height * width, dtype=np.uint8) for height, width in sizes]
    flat = np.concatenate(pixels) if pixels else np.zeros(0, np.uint8)
    return Example(key, encoder.chat.encode(messages, grids), grids, flat)


def batch_of(encoder: SampleEncoder, *examples: Example) -> CaptionBatch:
    return collate(examples, encoder.dummy, encoder.chat.pad_token, encoder.chat.image_token)


def loss_model(
    base: Path, lora: LoraConfig | None = LORA, config: ModelConfig = CONFIG, **settings: Any
) -> Any:
    """The model to train, its adapter not zero, so that both of its halves get gradients."""
    model = load_model(base, config)
    model.pixel_settings = settings["pixel_settings"]
    return randomise(make_trainable(model, lora, config))


def randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.train()


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run the backward pass; return the gradient of each parameter that trains."""
    model.zero_grad()
    loss.backward()
    trained = trainable_parameters(model)
    assert all(parameter.grad is not None for parameter in trained.values())
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)
    return {name: parameter.grad.clone() for name, parameter in trained.items()}  # type: ignore[union-attr]


def library_inputs(batch: CaptionBatch, encoder: SampleEncoder, settings: PixelSettings) -> dict[str, Any]:
    """The batch as transformers' forward takes it."""
    mask = torch.ones_like(batch.input_ids)
    for row, ids in enumerate(batch.input_ids):
        mask[row, int((ids != encoder.chat.pad_token).nonzero()[-1]) + 1 :] = 0
    return {
        "input_ids": batch.input_ids,
        "labels": batch.labels,
        "attention_mask": mask,
        "mm_token_type_ids": (batch.input_ids == encoder.chat.image_token).int(),
        "pixel_values": pixel_values(batch.pixels, batch.grids, settings),
        "image_grid_thw": batch.image_grid_thw,
    }
