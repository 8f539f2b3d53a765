"""What a micro-batch keeps and needs at its peak, beside the tensors of real forward and backward passes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap

from qwenvl_dist.bench.memory import TensorBytes
from qwenvl_dist.config import LoraConfig, ModelConfig
from qwenvl_dist.data.batch import CaptionBatch
from qwenvl_dist.data.sizes import ImageSizeRule
from qwenvl_dist.data.stream import SampleEncoder
from qwenvl_dist.model import fast_path
from qwenvl_dist.model.load import load_model, load_processor
from qwenvl_dist.model.lora import make_trainable, set_activation_checkpointing
from qwenvl_dist.model.pixels import PixelSettings
from qwenvl_dist.planning.activations import Activations, MicroBatch, activations
from qwenvl_dist.planning.estimate import kernels_of
from qwenvl_dist.planning.shapes import parameters_of
from qwenvl_dist.synthetic.base import SHAPES
from tests.model.made_batches import batch_of, example
from tests.planning.test_plan import recipe_of

PROMISED = 0.15
# (samples, pixels a side, words of an answer as repeats of a sentence)
SIZES = [(1, 56, 2), (4, 56, 4), (4, 140, 10), (2, 280, 20)]


class Case:
    """A model and what its passes take."""

    def __init__(
        self, base: Path, shape: str, stage: int, lora: LoraConfig | None, config: ModelConfig
    ) -> None:
        self.shape, self.stage, self.lora, self.config = SHAPES[shape], stage, lora, config
        self.recipe = recipe_of(
            base, Path("-"), lora=None if lora is None else lora.model_dump(mode="json"),
            model={"base": str(base), **config.model_dump(mode="json", exclude={"base"})},
        )  # fmt: skip
        self.base = load_model(base, config)
        processor = load_processor(base)
        self.base.pixel_settings = PixelSettings.of(processor)
        self.processor: Any = processor
        self.model = make_trainable(self.base, lora, config)
        if config.fast_path:
            fast_path.install(self.base, stage == 3)
        self.model.train()

    def batch(self, samples: int, side: int, words: int) -> CaptionBatch:
        encoder = SampleEncoder(self.processor, ImageSizeRule(side=side), 8192)
        sentence = "a red circle above a blue square " * words
        return batch_of(encoder, *[example(encoder, str(n), sentence, (side, side)) for n in range(samples)])

    def measure(self, batch: CaptionBatch, every: int) -> tuple[int, int]:
        """Return bytes kept when the forward pass ends, and the peak of both passes without gradients."""
        set_activation_checkpointing(self.base, every)
        fast_path.causal_bias.cache_clear()
        with TensorBytes() as made:
            loss = self.model(batch=batch)
            kept = made.now
            loss.backward()
        self.model.zero_grad()
        return kept, made.peak

    def predict(self, batch: CaptionBatch, every: int) -> tuple[Activations, int]:
        """Return what is predicted, and the bytes of gradients, which are counted elsewhere."""
        samples, length = batch.input_ids.shape
        visual = len(batch.image_positions)
        size = MicroBatch(samples, length, batch.target_tokens, visual, visual // len(batch.grids))
        parameters = parameters_of(self.shape, self.recipe)
        kernels = kernels_of(self.recipe, parameters, self.stage, on_cpu=True)
        lora = self.lora
        predicted = activations(
            self.shape, size, kernels, lora.rank if lora else 0, lora.target_modules if lora else (), every
        )
        return predicted, kernels.number_bytes * sum(p.numel for p in parameters if p.trains)


def compare(case: Case, monkeypatch: pytest.MonkeyPatch, name: str, sizes: list[Any] = SIZES) -> None:
    if case.stage == 3:  # DeepSpeed exchanges it while a model is partitioned
        monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    print()
    for size in sizes:
        batch = case.batch(*size)
        for every in (0, 2, 1):
            kept, peak = case.measure(batch, every)
            predicted, gradients = case.predict(batch, every)
            # Gradients come to life in the backward pass, and are not there at the tower's and the head's peaks.
            act = predicted
            expected = max(act.decoder + gradients, act.kept + act.logits, act.tower)
            off = (act.kept / kept - 1, expected / peak - 1)
            print(f"{name} {size} every {every}: kept {kept:9,} {off[0]:+.1%}, peak {peak:11,} {off[1]:+.1%}")
            assert abs(off[0]) < 0.01, (size, every)
            assert abs(off[1]) < PROMISED, (size, every)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kept_and_peak_are_those_of_real_passes(
    scenes_base: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, stage: int
) -> None:
    config = ModelConfig(dtype=dtype, attention="sdpa")
    compare(Case(scenes_base, "scenes", stage, LoraConfig(), config), monkeypatch, f"{dtype} ZeRO-{stage}")


def test_with_152k_words_too(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(
        dtype="float32", attention="sdpa"
    )  # bfloat16 takes a minute where a CPU lacks its products
    compare(Case(tiny_base, "tiny", 2, LoraConfig(), config), monkeypatch, "tiny ZeRO-2")


@pytest.mark.slow
def test_in_real_proportions_too(larger_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(dtype="float32", attention="sdpa")
    case = Case(larger_base, larger_base.name, 2, LoraConfig(), config)
    compare(case, monkeypatch, f"{larger_base.name} ZeRO-2", SIZES[::2])


def test_without_dropout_and_with_few_targets(scenes_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = LoraConfig(rank=32, dropout=0.0, target_modules=("q_proj", "up_proj"))
    config = ModelConfig(dtype="bfloat16", attention="sdpa")
    # Not the smallest: all gradients are counted at the peak, and there those of r=32 weigh more than its tokens.
    compare(Case(scenes_base, "scenes", 2, lora, config), monkeypatch, "r=32 on two", SIZES[1:])
