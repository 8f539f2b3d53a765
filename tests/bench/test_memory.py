"""The tensors of a step, counted exactly: beside a sum by hand, and under each checkpointing mode."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwenvl_dist.bench.memory import TensorBytes
from qwenvl_dist.config import LoraConfig, ModelConfig
from qwenvl_dist.data.batch import CaptionBatch, Example, collate
from qwenvl_dist.data.sizes import ImageSizeRule
from qwenvl_dist.data.stream import SampleEncoder
from qwenvl_dist.model import fast_path
from qwenvl_dist.model.load import load_model
from qwenvl_dist.model.lora import make_trainable, set_activation_checkpointing
from qwenvl_dist.model.pixels import PixelSettings


def test_a_tensor_counts_until_nobody_holds_it() -> None:
    given = torch.ones(1000)
    with TensorBytes() as made:
        one = given + 1
        view = one.view(10, 100)[2:]
        one.mul_(2)
        assert made.now == 4000
        del one
        assert made.now == 4000  # the view keeps it
        two = view @ view.T  # 8 by 8
        del view
        assert made.now == 256
        del two
    assert made.now == 0


def test_what_a_backward_pass_makes_counts() -> None:
    weight = torch.ones(100, 100, requires_grad=True)
    with TensorBytes() as made:
        (weight * weight).sum().backward()
    assert made.now == 40_000  # the gradient


@pytest.fixture(scope="module")
def batch(scenes_processor: Any) -> CaptionBatch:
    encoder = SampleEncoder(scenes_processor, ImageSizeRule(side=56), 256)
    grids = ((1, 4, 4),)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "COCO Yes:"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a red circle above a blue square " * 6}]},
    ]
    row = Example("0", encoder.chat.encode(messages, grids), grids, np.zeros(3 * 56 * 56, np.uint8))
    return collate([row] * 4, encoder.dummy, encoder.chat.pad_token, encoder.chat.image_token)


@pytest.mark.parametrize("fast", [True, False])
def test_more_checkpointing_keeps_fewer_bytes(
    scenes_base: Path, scenes_processor: Any, batch: CaptionBatch, fast: bool
) -> None:
    config = ModelConfig(dtype="float32", attention="sdpa")
    base = load_model(scenes_base, config)
    base.pixel_settings = PixelSettings.of(scenes_processor)
    model = make_trainable(base, LoraConfig(), config)
    if fast:
        fast_path.install(base, False)
    model.train()
    kept = []
    for every in (1, 2, 0, 0):
        set_activation_checkpointing(base, every)
        with TensorBytes() as made:
            loss = model(batch=batch)
            kept.append(made.now)
            loss.backward()
        model.zero_grad()
    assert kept[0] < kept[1] < kept[2] == kept[3]
