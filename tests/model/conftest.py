"""Fixtures of the model's tests."""

from pathlib import Path
from typing import Any

import pytest

from qwenvl_dist.data.batch import CaptionBatch
from qwenvl_dist.data.sizes import ImageSizeRule
from qwenvl_dist.data.stream import SampleEncoder
from qwenvl_dist.model.pixels import PixelSettings
from tests.model.made_batches import batch_of, example, loss_model


@pytest.fixture(scope="module")
def encoder(scenes_processor: Any) -> SampleEncoder:
    return SampleEncoder(scenes_processor, ImageSizeRule(side=56), 256)


@pytest.fixture(scope="module")
def batch(encoder: SampleEncoder) -> CaptionBatch:
    """One picture, three of two shapes, none, and a dummy."""
    return batch_of(
        encoder,
        example(encoder, "one", "a red circle above a blue square", (56, 56)),
        example(encoder, "three", "a green triangle", (28, 84), (56, 56), (56, 56)),
        example(encoder, "text", "a black square below a yellow circle"),
        encoder.dummy,
    )


@pytest.fixture(scope="module")
def settings(scenes_processor: Any) -> PixelSettings:
    return PixelSettings.of(scenes_processor)


@pytest.fixture
def model(scenes_base: Path, settings: PixelSettings) -> Any:
    return loss_model(scenes_base, pixel_settings=settings)
